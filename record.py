"""Everything about a run that is not the algorithm: data files, run.db, pictures, saved models, the command line."""

import ast
import difflib
import functools
import importlib.util
import inspect
import math
import sqlite3
import sys
import time
from pathlib import Path
from typing import NamedTuple, NoReturn

import datasets
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from tqdm import tqdm
from transformers.utils import logging


def say(message):
    """Prints a line without breaking the progress bar, whatever characters the terminal lacks."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    tqdm.write(message.encode(encoding, "replace").decode(encoding))


def fail(message) -> NoReturn:
    """Ends the program for a reason that its user can mend: one line, exit status 2."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


# ---- Models and data files ------------------------------------------------------------------------------------------


def from_pretrained(kind, path, **options):
    """kind.from_pretrained(path) for one of transformers' Auto classes, with a progress bar only for downloads."""
    (logging.disable_progress_bar if Path(path).is_dir() else logging.enable_progress_bar)()
    try:
        return kind.from_pretrained(path, **options)
    except (OSError, ValueError) as error:
        fail(f"MODEL {str(path)!r} cannot be loaded, neither as a folder nor from the Hub: {first_line(error)}")


def first_line(error):
    return (str(error).splitlines() or [type(error).__name__])[0]


def load_rows(source):
    """(question, answer) of each row of a data set, given as an entry of TRAIN_DATASETS.

    A question is text or a list of chat messages. A Hub data set may also name its configuration ("name") and its
    "split", which otherwise is train.
    """
    path, kind = source["path"], source["type"]
    (datasets.enable_progress_bars if kind == "hub" else datasets.disable_progress_bars)()
    try:
        if kind == "hub":
            rows = datasets.load_dataset(path, source.get("name"), split=source.get("split", "train"))
        else:
            rows = datasets.load_dataset(kind, data_files=path, split="train")
    except Exception as error:  # whatever a library makes of a missing, broken or foreign file
        fail(f"the data set {path!r} cannot be read as {kind!r}: {first_line(error)}")
    return list(zip(column(rows, source, "input"), column(rows, source, "output")))


def column(rows, source, role):
    """The values of the column that source[role] names; a dot goes one level into nested ones."""
    values = rows
    for part in source[role].split("."):
        names = rows.column_names if values is rows else list(values[0])
        if part not in names:
            fail(f"{source['path']!r} has no column {source[role]!r} for {role!r}; there are: {', '.join(names)}")
        values = values[part] if values is rows else [value[part] for value in values]
    return values


# ---- Reward functions -----------------------------------------------------------------------------------------------


@functools.cache
def load_reward(name):
    """The function that REWARD names as `path:function`."""
    path, _, function = name.rpartition(":")
    if not Path(path).is_file():
        fail(f"REWARD={name} names no function: write it as path:function, like reward.py:compute_score")
    spec = importlib.util.spec_from_file_location("reward_function", path)
    module = sys.modules["reward_function"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not callable(getattr(module, function, None)):
        functions = [name for name, value in vars(module).items() if inspect.isfunction(value)]
        fail(f"REWARD={name}: there is no function {function!r} in {path!r}; there are: {', '.join(functions)}")
    return getattr(module, function)


def judge(name, questions, texts):
    """A verdict {"score": number, "acc": number, ...} on each text by the reward function of that name.

    It has the parameters of verl's reward functions (data_source, solution_str, ground_truth, extra_info), or of its
    batch reward functions (the same in the plural), then lists. The question is extra_info["question"]. It may return
    a plain number, which then is "acc" too.
    """
    function = load_reward(name)
    asked = {
        "data_source": [question.source for question in questions],
        "solution_str": texts,
        "ground_truth": [question.answer for question in questions],
        "extra_info": [{"question": question.text} for question in questions],
    }
    if "solution_strs" in inspect.signature(function).parameters:
        verdicts = function(**{f"{name}s": values for name, values in asked.items()})
    else:
        verdicts = [function(**dict(zip(asked, values))) for values in zip(*asked.values())]
    verdicts = [verdict if isinstance(verdict, dict) else {"score": float(verdict)} for verdict in verdicts]
    return [{"acc": verdict["score"]} | verdict for verdict in verdicts]


# ---- The record of a run --------------------------------------------------------------------------------------------


class Run(NamedTuple):
    folder: Path
    db: sqlite3.Connection
    bar: tqdm
    start: float


def open_run(folder, steps):
    """Makes the folder of a run, moving an earlier run that it holds to the next free number."""
    folder = Path(folder)
    if (folder / "run.db").exists():
        aside = next(p for p in (Path(f"{folder}_{n}") for n in range(1, sys.maxsize)) if not p.exists())
        folder.rename(aside)
        say(f"{folder} holds an earlier run: it is now {aside}")
    folder.mkdir(parents=True, exist_ok=True)
    db = sqlite3.connect(folder / "run.db")
    with db:
        db.execute("CREATE TABLE metrics (step INTEGER, name TEXT, value REAL, PRIMARY KEY (step, name))")
        db.execute(
            "CREATE TABLE responses (step INTEGER, question TEXT, answer TEXT, response TEXT, accuracy REAL, "
            "reward REAL, length INTEGER, truncated INTEGER, kept INTEGER)"
        )
    return Run(folder, db, tqdm(total=steps, desc="training", unit="step", disable=None), time.time())


def write(run, step, metrics, groups=()):
    """Records one step, in one transaction, and shows it; after an evaluation the pictures are drawn anew."""
    with run.db:
        run.db.executemany("INSERT INTO metrics VALUES (?, ?, ?)", [(step, *item) for item in metrics.items()])
        for r in (response for group in groups for response in group):
            judged = r.accuracy, r.reward, len(r.tokens), r.truncated, r.advantage is not None
            values = step, r.question.text, r.question.answer, r.text, *judged
            run.db.execute("INSERT INTO responses VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", values)
    shown = {
        "accuracy": "accuracy",
        "reward": "reward/mean",
        "length": "response_length/mean",
        "entropy": "entropy",
        "resampled": "dynamic_resample_rate",
    }
    figures = {label: f"{metrics[name]:.2f}" for label, name in shown.items() if name in metrics}
    if figures:
        run.bar.set_postfix(figures, refresh=False)
        run.bar.update(step - run.bar.n)
        if run.bar.disable and step % 5 == 0:  # no terminal
            line = "  ".join(f"{label} {value}" for label, value in figures.items())
            say(f"step {step}  {line}  {time.time() - run.start:.0f} s")
    if "eval/accuracy" in metrics:
        say(f"step {step}: {describe(metrics)}")
        draw(run.folder)


def describe(metrics):
    """The results of an evaluation in words."""
    results = {name.removeprefix("eval/"): value for name, value in metrics.items() if name.startswith("eval/")}
    return "held-out " + ", ".join(f"{name} {value:.3f}" for name, value in results.items())


def show(response):
    """One question with the model's answer."""
    verdict = "right" if response.accuracy else "wrong"
    say(f"  {shorten(response.question.text)}\n    -> {shorten(response.text)}  ({verdict})")


def shorten(text, length=240):
    text = " ".join(text.split())
    return text if len(text) <= length else f"{text[: length - 4]} ..."


def sampling_metrics(groups, sampled, rounds, seconds):
    """What the policy did in one step, over everything sampled in it, before any filtering."""
    responses = [response for group in sampled for response in group]
    lengths = [len(response.tokens) for response in responses]
    right = [sum(response.accuracy for response in group) / len(group) for group in sampled]
    return {
        "reward/mean": sum(response.reward for response in responses) / len(responses),
        "accuracy": sum(right) / len(right),
        "response_length/mean": sum(lengths) / len(lengths),
        "response_length/max": max(lengths),
        "truncated_fraction": sum(response.truncated for response in responses) / len(responses),
        "groups/all_correct": right.count(1) / len(right),
        "groups/all_wrong": right.count(0) / len(right),
        "dynamic_resample_rate": 1 - len(groups) / len(sampled),
        "generation_batches": rounds,
        "time/generate": seconds,
        "tokens_per_second": sum(lengths) / seconds,
        "memory/peak_gib": peak_memory(),
    }


def peak_memory():
    """In GiB: of the GPU where there is one, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    try:
        import resource
    except ImportError:  # Windows
        return math.nan
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** (30 if sys.platform == "darwin" else 20)


# ---- Pictures -------------------------------------------------------------------------------------------------------

PANELS = {
    "accuracy": ["accuracy", "eval/accuracy"],
    "response length (tokens)": ["response_length/mean", "response_length/max"],
    "reward": ["reward/mean"],
    "share of groups": ["groups/all_correct", "groups/all_wrong"],
    "dynamic resample rate": ["dynamic_resample_rate"],
    "truncated responses": ["truncated_fraction"],
    "entropy (nats)": ["entropy"],
    "entropy loss": ["entropy_loss"],
    "policy loss": ["policy_loss"],
    "share of tokens clipped": ["clip_fraction/low", "clip_fraction/high"],
    "gradient norm": ["grad_norm"],
    "time (s)": ["time/step", "time/generate", "time/update"],
}


def read_metrics(folder):
    """{name: (steps, values)} of the run in a folder."""
    path = Path(folder) / "run.db"
    if not path.exists():
        fail(f"there is no run in {str(folder)!r}: {path} is missing")
    db, curves = sqlite3.connect(path), {}
    for step, name, value in db.execute("SELECT step, name, value FROM metrics ORDER BY step"):
        steps, values = curves.setdefault(name, ([], []))
        steps.append(step)
        values.append(math.nan if value is None else value)
    db.close()
    return curves


def draw(folder):
    """Draws training_metrics.png of the run in a folder; returns its path."""
    curves = read_metrics(folder)
    figure = Figure(figsize=(15, 9), layout="constrained")
    figure.suptitle(str(folder))
    for axes, (title, names) in zip(figure.subplots(3, 4).flat, PANELS.items()):
        for name in names:
            if name in curves:
                held_out = name.startswith("eval/")
                axes.plot(*curves[name], "o" if held_out else "-", label="held out, greedy" if held_out else name)
        if len(axes.lines) > 1:
            axes.legend(fontsize="small")
        axes.set_title(title, fontsize="medium")
        axes.set_xlabel("step", fontsize="small")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.grid(alpha=0.3)
    picture = Path(folder) / "training_metrics.png"
    figure.savefig(picture, dpi=80)
    return picture


# ---- Saved models ---------------------------------------------------------------------------------------------------


def save_model(run, model, tokenizer, name, constants):
    """Saves the model in Hugging Face form, with the generation_config it came with and the script that made it."""
    folder, unfinished = run.folder / name, run.folder / f"{name}.unfinished"
    model.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    model.own_generation_config.to_json_file(unfinished / "generation_config.json")
    (unfinished / "train_script.py").write_text(script_as_run(constants), encoding="utf-8")
    unfinished.rename(folder)
    say(f"the model is saved in {folder}")


def script_as_run(constants):
    """The source of dapo.py with the values that its constants have in this run."""
    source = read_source(constants["__file__"])
    lines = source.splitlines(keepends=True)
    for name, node in reversed(assignments(source).items()):
        if eval(ast.unparse(node.value)) != constants[name]:
            start, end = node.value.lineno - 1, node.value.end_lineno
            before, after = lines[start][: node.value.col_offset], lines[end - 1][node.value.end_col_offset :]
            lines[start:end] = [f"{before}{constants[name]!r}{after}"]
    return "".join(lines)


# ---- The command line -----------------------------------------------------------------------------------------------

USAGE = """\
usage: python dapo.py [train|eval|plot] [recipe.py] [--NAME=VALUE ...] [FOLDER ...]

  train             trains MODEL, and leaves a record, pictures and the trained model in OUTPUT_DIR (the default)
  eval [FOLDER ..]  evaluates saved models on EVAL_DATASETS, or MODEL if none is named
  plot [FOLDER ..]  draws training_metrics.png of runs again, or of the one in OUTPUT_DIR

A recipe is a Python file that sets constants; it is run as such. These are the constants and their values:
"""
COMMANDS = ("train", "eval", "plot")
OPTIONAL = {"NUM_STEPS": int}  # constants that may be None, and their type otherwise


@functools.cache
def read_source(path):
    """Read once, at the start: by the end of a run its author may have edited the file."""
    return Path(path).read_text(encoding="utf-8")


def assignments(source):
    """{name: its syntax node} of the constants at the top level of dapo.py's source."""
    found = {}
    for node in ast.parse(source).body:
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        if isinstance(target, ast.Name) and target.id.isupper():
            found[target.id] = node
    return found


def read_command_line(argv, constants):
    """Sets `constants`, dapo.py's globals, from the command line; returns the command and the folders it names."""
    words, known = [], assignments(read_source(constants["__file__"]))
    for argument in sys.argv[1:] if argv is None else argv:
        if argument in ("-h", "--help"):
            print(USAGE + "\n".join(help_lines(constants)))
            sys.exit()
        if argument.startswith("-"):
            name, equals, text = argument.lstrip("-").partition("=")
            if not equals:
                fail(f"{argument} has no value: write {argument}=VALUE")
            set_constant(constants, known, name, parse(text, constants.get(name)), text)
        elif argument.endswith(".py"):
            run_recipe(argument, constants, known)
        else:
            words.append(argument)
    command = words.pop(0) if words and words[0] in COMMANDS else "train"
    if words and command == "train":
        fail(f"{words[0]!r} is not a command; there are {', '.join(COMMANDS)}")
    check(constants)
    if command != "plot":
        load_reward(constants["REWARD"])  # now, and not when the first responses are there
    return command, words


def parse(text, current):
    """The value that a text on the command line stands for; a constant that is text takes it as it is."""
    if isinstance(current, str):
        return text
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def run_recipe(path, constants, known):
    try:
        source = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        fail(f"the recipe {path!r} cannot be read: {error.strerror}")
    settings = {}
    exec(compile(source, path, "exec"), settings)
    for name, value in settings.items():
        if name.isupper():
            set_constant(constants, known, name, value, repr(value))


def set_constant(constants, known, name, value, text):
    """Sets one constant, provided that it is known and that the value has its type."""
    if name not in known:
        close = difflib.get_close_matches(name.upper(), known, 1)
        fail(f"there is no constant {name}" + (f"; did you mean {close[0]}?" if close else "; --help lists them"))
    wanted = OPTIONAL.get(name) or type(constants[name])
    if wanted is float and type(value) is int:
        value = float(value)
    if type(value) is not wanted and not (value is None and name in OPTIONAL):
        or_none = " or None" if name in OPTIONAL else ""
        fail(f"{name}={text} does not fit: {name} is {KINDS[wanted]}{or_none}, for example {constants[name]!r}")
    constants[name] = value


KINDS = {int: "a whole number", float: "a number", bool: "True or False", str: "text", list: "a list of data sets"}
MODES = ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean")
AT_LEAST_ONE = (
    "MAX_PROMPT_LENGTH NUM_EPOCHS EVAL_EVERY EVAL_SAMPLES BATCH_SIZE MAX_RESPONSE_LENGTH DECODE_STAGE MAX_GEN_BATCHES "
    "DAPO_EPOCHS MINI_BATCHES MICRO_BATCH_TOKENS LOGITS_CHUNK"
).split()
NOT_NEGATIVE = "SAVE_EVERY REST_EPOCHS OVERLONG_PENALTY_FACTOR KL_COEF ENTROPY_COEF WARMUP_STEPS WEIGHT_DECAY".split()
POSITIVE = "TEMPERATURE LEARNING_RATE MAX_GRAD_NORM CLIP_RANGE_HIGH".split()


def check(constants):
    """Refuses values that no run can have."""
    c, limit = constants, constants["MAX_RESPONSE_LENGTH"]
    rules = [
        ("DEVICE", c["DEVICE"] in ("", "cpu", "cuda", "mps"), "cpu, cuda or mps, or empty"),
        *[(name, c[name] >= 1, "at least 1") for name in AT_LEAST_ONE],
        *[(name, 0 <= c[name] < math.inf, "at least 0") for name in NOT_NEGATIVE],
        *[(name, 0 < c[name] < math.inf, "more than 0") for name in POSITIVE],
        ("NUM_STEPS", c["NUM_STEPS"] is None or c["NUM_STEPS"] >= 1, "at least 1, or None"),
        ("MINI_BATCHES", c["MINI_BATCHES"] <= c["BATCH_SIZE"] * c["GROUP_SIZE"], "at most BATCH_SIZE x GROUP_SIZE"),
        ("GROUP_SIZE", c["GROUP_SIZE"] >= 2, "at least 2: a response is compared with the others of its group"),
        ("CLIP_RANGE_LOW", 0 < c["CLIP_RANGE_LOW"] < 1, "between 0 and 1"),
        ("LOSS_AGG_MODE", c["LOSS_AGG_MODE"] in MODES, f"one of {', '.join(MODES)}"),
        ("OVERLONG_BUFFER_LENGTH", 0 <= c["OVERLONG_BUFFER_LENGTH"] <= limit, f"0 to MAX_RESPONSE_LENGTH, {limit}"),
    ]
    for name, holds, rule in rules:
        if not holds:
            fail(f"{name}={c[name]} is out of range: it has to be {rule}")


def help_lines(constants):
    """The constants of dapo.py under their headings, with the values they have now and their comments."""
    source = read_source(constants["__file__"])
    starts = {node.lineno: name for name, node in assignments(source).items()}
    for number, line in enumerate(source.splitlines(), 1):
        if number in starts:
            name = starts[number]
            yield f"  --{name}={constants[name]}".ljust(40) + "  " + line.partition("  # ")[2]
        elif line.startswith("# ") and not line.startswith("# --") and number < max(starts):
            yield "\n" + line.removeprefix("# ")

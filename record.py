"""Everything about a run that is not the algorithm: data files, run.db, pictures, saved models, the command line."""

import ast
import contextlib
import difflib
import functools
import gc
import importlib.util
import inspect
import itertools
import json
import logging
import math
import os
import random
import re
import shlex
import shutil
import signal
import sqlite3
import statistics
import sys
import tempfile
import threading
import time
import traceback
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NoReturn

import datasets
import numpy
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tqdm import tqdm
from transformers.utils import logging as bars

for library in ("transformers", "huggingface_hub", "datasets"):
    logging.getLogger(library).setLevel(logging.CRITICAL)  # what is wrong they also raise, and then one line says it


def say(message):
    """Prints a line without breaking the progress bar, whatever characters the terminal lacks."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    with contextlib.suppress(BrokenPipeError):  # who listened has gone
        tqdm.write(message.encode(encoding, "replace").decode(encoding))
        sys.stdout.flush()


def fail(message, kind=SystemExit) -> NoReturn:
    """Ends the program for a reason that its user can mend: one line, exit status 2."""
    tqdm.write(f"error: {' '.join(message.split())}", file=sys.stderr)
    raise kind(2)


@contextlib.contextmanager
def plain_endings():
    """Ctrl-C outside of a run, and memory that does not suffice, end the program without a page of traceback."""
    try:
        yield
    except KeyboardInterrupt:
        say("stopped")
        sys.exit(128 + signal.SIGINT)
    except torch.OutOfMemoryError as error:
        fail(f"DEVICE has too little memory for MODEL and what goes with it: {first_line(error)}")
    except BrokenPipeError:  # who listened has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except RuntimeError as error:
        if "probability tensor contains" not in str(error):  # torch.multinomial
            raise
        fail("the model's probabilities are not finite: try a lower LEARNING_RATE, or look at the weights of MODEL")


def halve_when_out_of_memory(name):
    """A decorator: when its device runs out of memory, a function is called again with half of the constant `name`."""

    def decorate(function):
        constants = inspect.unwrap(function).__globals__

        @functools.wraps(function)
        def persistent(*args, **kwargs):
            while True:
                try:
                    return function(*args, **kwargs)
                except torch.OutOfMemoryError:
                    if constants[name] == 1:
                        raise
                # Only here, after the except block, are the tensors of the failed call free.
                gc.collect()
                torch.cuda.empty_cache()
                constants[name] //= 2
                say(f"out of memory: {name} is {constants[name]} from here on")

        return persistent

    return decorate


# ---- Models and data files ------------------------------------------------------------------------------------------


PROMPT_TEMPLATES = {  # what PROMPT_TEMPLATE may name: the two usual ways to have an answer announced
    "boxed": "{question}\nPlease reason step by step, and put your final answer within \\boxed{}.",
    "answer": "{question}\nPlease reason step by step, and write your final answer in the last line, after 'Answer:'.",
}


def template_of(constants):
    """What is asked, with {question} where the question goes."""
    return PROMPT_TEMPLATES.get(constants["PROMPT_TEMPLATE"], constants["PROMPT_TEMPLATE"])


def with_template(messages, constants):
    """Chat messages with PROMPT_TEMPLATE around the last one."""
    *before, last = messages
    return [*before, last | {"content": template_of(constants).replace("{question}", last["content"])}]


def from_pretrained(kind, path, **options):
    """kind.from_pretrained(path) for one of transformers' Auto classes, with a progress bar only for downloads."""
    (bars.disable_progress_bar if os.path.isdir(path) else bars.enable_progress_bar)()
    try:
        return kind.from_pretrained(path, **options)
    except Exception as error:  # whatever a library makes of a missing, broken or foreign file
        place = "loaded from that folder" if os.path.isdir(path) else "found, neither as a folder nor on the Hub"
        fail(f"MODEL={path} cannot be {place}: {first_line(error)}")


def first_line(error):
    return (str(error).splitlines() or [""])[0] or type(error).__name__


def load_rows(source):
    """(chat messages, answer) of each question of a data set, given as an entry of TRAIN_DATASETS.

    In the data a question is text or a list of chat messages. The entry may also have a "split", such as train[:100],
    and for a Hub data set the "name" of its configuration.
    """
    path, kind = source["path"], source["type"]
    if kind != "hub" and os.path.isfile(path) and os.path.getsize(path) == 0:
        fail(f"the data set {path!r} is an empty file")
    (datasets.enable_progress_bars if kind == "hub" else datasets.disable_progress_bars)()
    try:
        place = dict(path=path, name=source.get("name")) if kind == "hub" else dict(path=kind, data_files=path)
        if kind == "csv":  # as text: pandas would make 2.0 of 2 where a cell is empty, 7 of 007, and nothing of "None"
            place |= dict(keep_default_na=False, converters={source["input"]: str, source["output"]: str})
        rows = datasets.load_dataset(**place, split=source.get("split", "train"))
    except Exception as error:  # whatever a library makes of a missing, broken or foreign file
        if "corresponds to no data" in str(error):
            fail(f"the data set {path!r} has no rows" + (f" in {source['split']!r}" if "split" in source else ""))
        fail(f"the data set {path!r} cannot be read as {kind!r}: {first_line(error.__cause__ or error)}")
    kept, blanks, number = {}, 0, 0  # a row at a time: DAPO-Math-17k has 1.79 million of them for 17 thousand questions
    for number, (question, answer) in enumerate(zip(column(rows, source, "input"), column(rows, source, "output")), 1):
        messages = as_messages(question, path)
        if isinstance(answer, (dict, list)):
            fail(f"the data set {path!r} has in {source['output']!r} no answer but {shorten(str(answer), 60)}")
        if blank(answer) or blank(messages[-1]["content"]):
            blanks += 1
        else:
            kept.setdefault(json.dumps(messages, default=str), (messages, str(answer)))
    if not kept:
        fail(f"the data set {path!r} has no row with a question and an answer; it has {number} rows")
    repeats = number - blanks - len(kept)
    for count, what in (
        (blanks, "have no question or no answer"),
        (repeats, "repeat a question, perhaps with another answer"),
    ):
        if count:
            say(f"{count} of {number} rows of {path} {what}: left out")
    return list(kept.values())


def as_messages(question, path):
    if blank(question) or question in ([], {}):
        return [{"role": "user", "content": ""}]
    if not isinstance(question, (list, dict)):
        return [{"role": "user", "content": str(question)}]
    try:
        fits = all(isinstance(message["content"] or "", str) for message in question) and question[-1]["role"] == "user"
    except (TypeError, KeyError):
        fits = False
    if not fits:
        fail(
            f"the data set {path!r} has a question that is neither text nor a list of chat messages, each with role "
            f"and content, the last by the user: {shorten(str(question))}"
        )
    return question


def blank(value):
    return value is None or value != value or not str(value).strip()  # of all values only NaN is not itself


def column(rows, source, role):
    """The values of the column that source[role] names; a dot goes one level into nested ones."""
    values, names, above = rows, rows.column_names, ""
    for part in [source[role]] if source[role] in names else source[role].split("."):
        if part not in names:
            there = f"; there are: {', '.join(above + name for name in names)}" if names else ""
            fail(f"the data set {source['path']!r} has no column {source[role]!r} for {role!r}{there}")
        values = values[part] if values is rows else [value and value[part] for value in values]
        names, above = next(([*value] for value in values if isinstance(value, dict)), []), f"{above}{part}."
    return values


# ---- Reward functions -----------------------------------------------------------------------------------------------


@functools.cache
def load_reward(name):
    """The function that REWARD names as `path:function`."""
    path, _, function = name.rpartition(":")
    if not os.path.isfile(path):
        what = f"there is no file {path!r}" if path else "it names no file"
        fail(f"REWARD={name}: {what}; write it as path:function, like reward.py:compute_score")
    spec = importlib.util.spec_from_file_location("reward_function", path)
    module = sys.modules["reward_function"] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        fail(f"REWARD={name} cannot be loaded: {described(error)}")
    if not callable(getattr(module, function, None)):
        functions = [name for name, value in vars(module).items() if inspect.isfunction(value)]
        fail(f"REWARD={name}: there is no function {function!r} in {path!r}; there are: {', '.join(functions)}")
    signature = inspect.signature(getattr(module, function))
    names = [f"{name}s" for name in ASKED] if takes_batches(signature) else ASKED
    try:
        signature.bind(**dict.fromkeys(names))
    except TypeError:
        fail(f"REWARD={name}: {function} takes {signature}, but it is given {', '.join(names)}")
    return getattr(module, function)


ASKED = ("data_source", "solution_str", "ground_truth", "extra_info")  # the parameters of a reward function


def takes_batches(signature):
    return "solution_strs" in signature.parameters


def described(error):
    """What an exception in a user's file says, and the line that it comes from."""
    if isinstance(error, SyntaxError):
        return f"SyntaxError: {error.msg} ({error.filename}, line {error.lineno})"
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {first_line(error)} ({place.filename}, line {place.lineno})"


def judge(name, questions, texts):
    """A verdict {"score": number, "acc": number, ...} on each text by the reward function of that name.

    It has the parameters of verl's reward functions, ASKED, or of its batch reward functions (the same in the plural),
    then lists. The question is extra_info["question"]. It may return a plain number, which then is "acc" too.
    """
    function, verdicts = load_reward(name), []
    sources, answers = [question.source for question in questions], [question.answer for question in questions]
    asked = sources, texts, answers, [{"question": question.text} for question in questions]
    try:
        if takes_batches(inspect.signature(function)):
            verdicts = list(function(**{f"{name}s": values for name, values in zip(ASKED, asked)}))
        else:
            for values in zip(*asked):
                verdicts.append(function(**dict(zip(ASKED, values))))
    except torch.OutOfMemoryError:  # of a reward model: fewer responses at a time may help
        raise
    except (Exception, SystemExit) as error:
        reward_fault(name, f"raised {described(error)}", questions[len(verdicts)], texts[len(verdicts)])
    if len(verdicts) != len(texts):
        reward_fault(name, f"gave {len(verdicts)} verdicts on {len(texts)} responses", questions[0], texts[0])
    for question, text, verdict in zip(questions, texts, verdicts):
        if not is_verdict(verdict):
            reward_fault(name, f"gave {verdict!r} and not a finite number or {{'score': number}}", question, text)
    verdicts = [verdict if isinstance(verdict, dict) else {"score": verdict} for verdict in verdicts]
    verdicts = [{"acc": verdict["score"]} | verdict for verdict in verdicts]
    for verdict in verdicts:
        if "pred" in verdict:
            verdict["pred"] = "" if verdict["pred"] is None else str(verdict["pred"])
    return [verdict | {key: float(verdict[key]) for key in ("score", "acc")} for verdict in verdicts]


def is_verdict(value):
    numbers = [value.get("score"), value.get("acc", 0)] if isinstance(value, dict) else [value]
    try:
        return all(math.isfinite(number) for number in numbers)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # text, None, a list, a tensor of several numbers
        return False


class RewardFault(SystemExit):
    """A reward function went wrong. The model is then still as it was after the last step: Run saves a checkpoint."""


def reward_fault(name, what, question, text) -> NoReturn:
    about = f"the question {shorten(question.text)!r} and the response {shorten(text)!r}"
    fail(f"REWARD={name} {what}, for {about}", RewardFault)


# ---- Checkpoints ----------------------------------------------------------------------------------------------------

# With others it would not be the same run.
FIXED = ("MODEL", "TRAIN_DATASETS", "PROMPT_TEMPLATE", "MAX_PROMPT_LENGTH", "SEED")


@dataclass
class Progress:
    """Where a run stands in its steps and in its data."""

    step: int = 0
    epoch: int = 0
    drawn: int = 0  # questions of this epoch that have had their turn


def find_checkpoint(constants, questions):
    """The last checkpoint, a folder, of a run in OUTPUT_DIR that was broken off. None where a new run is to begin.

    A run that has ended goes on if more steps are wanted, and nothing else. Nothing is changed here yet; what would
    keep a run from writing or from going on ends the program.
    """
    folder = Path(constants["OUTPUT_DIR"])
    try:
        places = [next(path for path in (folder, *folder.absolute().parents) if path.exists())]
        if holds_run(folder):  # it may have to be moved
            places.append(folder.absolute().parent)
            lock(folder).close()
        for place in places:
            tempfile.TemporaryFile(dir=place).close()
    except OSError as error:
        fail(f"OUTPUT_DIR={folder} cannot be written: {error.strerror}")
    checkpoint = last_checkpoint(folder) if constants["RESUME"] else None
    if not checkpoint or not goes_on(folder, checkpoint, constants, questions):
        used = {"MODEL": constants["MODEL"], "REWARD": constants["REWARD"].rpartition(":")[0]}
        used |= {source["path"]: source["path"] for source in constants["TRAIN_DATASETS"] + constants["EVAL_DATASETS"]}
        for name, path in used.items():
            if os.path.exists(path) and Path(path).resolve().is_relative_to(folder.resolve()):
                fail(f"{name} lies in OUTPUT_DIR={folder}, which belongs to a run: give this run another OUTPUT_DIR")
        return None
    return checkpoint


def goes_on(folder, checkpoint, constants, questions):
    """Whether a run goes on from its checkpoint; if it should but cannot, the program ends."""
    steps, epochs = constants["NUM_STEPS"], constants["NUM_EPOCHS"]
    start_over = "--RESUME=False starts over, and keeps what there is aside"
    try:
        state = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
        then, progress, same_data = state["constants"], state["progress"], state["data"] == fingerprint(questions)
    except (OSError, ValueError, KeyError, TypeError) as error:
        fail(f"{checkpoint / 'state.json'} cannot be read: {first_line(error)}; {start_over}")
    now = values_of(constants)
    changed = {
        name: f"{name} {then[name]!r} -> {now[name]!r}" for name in now if then.get(name, now[name]) != now[name]
    }
    grown = [name for name in ("NUM_STEPS", "NUM_EPOCHS") if then[name] and now[name] and now[name] > then[name]]
    if (checkpoint / "ended").exists() and not (changed and set(changed) <= set(grown)):
        return False
    fixed = [change for name, change in changed.items() if name in FIXED]
    if fixed:
        fail(f"the run in {folder} cannot go on with {', '.join(fixed)}: set it back, or {start_over}")
    if not same_data:
        fail(f"the run in {folder} cannot go on: TRAIN_DATASETS held other questions when it began; {start_over}")
    if steps and steps < progress["step"]:
        fail(f"the run in {folder} cannot go on to NUM_STEPS={steps}: it is at step {progress['step']}; {start_over}")
    if not steps and (progress["epoch"], progress["drawn"]) > (epochs, 0):
        fail(f"the run in {folder} cannot go on to NUM_EPOCHS={epochs}: it is past that; {start_over}")
    say(f"the run in {folder} goes on from step {progress['step']}")
    for change in changed.values():
        say(f"  changed: {change}")
    return True


def holds_run(folder):
    return (folder / "run.db").exists() or (folder / "checkpoint").exists()


def last_checkpoint(folder):
    """It got its name when it was whole; what is unfinished has another, so that there is always a whole one."""
    found = (path for path in (folder / "checkpoint").glob("step_*") if path.name[5:].isdecimal())
    return max(found, key=lambda path: int(path.name[5:]), default=None)


def fingerprint(questions):
    return zlib.crc32(repr([(question.prompt.tolist(), question.answer) for question in questions]).encode())


def values_of(constants):
    """{name: value} of the constants of dapo.py, without those that say nothing about a run itself."""
    names = assignments(read_source(constants["__file__"]))
    return {name: constants[name] for name in names if name not in ("OUTPUT_DIR", "RESUME")}


def lock(folder):
    """Keeps other processes from training in this folder, until it is closed or this process ends in whatever way."""
    db = sqlite3.connect(folder / ".lock", timeout=0, isolation_level=None)
    try:
        db.execute("BEGIN IMMEDIATE")
    except sqlite3.OperationalError:
        fail(f"another process is training in OUTPUT_DIR={folder}: give this run another folder")
    return db


# ---- The record of a run --------------------------------------------------------------------------------------------

UNWRITABLE = (OSError, sqlite3.DatabaseError, SafetensorError)  # what a full disk turns into


@contextlib.contextmanager
def open_run(constants, checkpoint, *parts):
    """A Run in OUTPUT_DIR that goes on from a checkpoint, or begins. However it ends, what was open is closed.

    `parts` are the model, its tokenizer, its optimizer, the Progress and the questions.
    """
    run, ended = Run(constants, *parts), False
    try:
        run.begin(checkpoint)
        try:
            yield run
        except RewardFault:
            run.save_checkpoint()
            raise
        ended = True
        if run.state:
            (last_checkpoint(run.folder) / "ended").touch()
    except UNWRITABLE as error:
        fail(f"OUTPUT_DIR={run.folder} cannot be read or written: {first_line(error)}")
    finally:
        run.close(ended)


def tensorboard_mirror(folder, values):
    """Metrics in folder/tensorboard: (write(metrics, step), close)."""
    from torch.utils.tensorboard import SummaryWriter

    remove(folder / "tensorboard")  # a run that goes on writes it anew
    writer = SummaryWriter(folder / "tensorboard")

    def write(metrics, step):
        for name, value in metrics.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return write, writer.close


def wandb_mirror(folder, values):
    """Metrics in a run of W&B, named like the folder: (write(metrics, step), close)."""
    import wandb

    run = wandb.init(project="dapo", name=folder.name, dir=folder, config=values)
    return run.log, run.finish


MIRRORS = {"tensorboard": tensorboard_mirror, "wandb": wandb_mirror}


def mirrors_of(constants):
    return [name.strip() for name in constants["REPORT_TO"].split(",") if name.strip()]


ADVICE = "go on with a lower LEARNING_RATE, or look for what is not finite in MODEL, the data or the reward"


class Run:
    """A run in work: its folder, run.db, progress bar and checkpoints.

    Ctrl-C and SIGTERM end it at the next call of checkpoint(), that is between two steps; a second one does at once.
    """

    def __init__(self, constants, model, tokenizer, optimizer, progress, questions):
        self.constants, self.folder = constants, Path(constants["OUTPUT_DIR"])
        self.values, self.data = values_of(constants), fingerprint(questions)  # as they are at the start
        self.model, self.tokenizer, self.optimizer = model, tokenizer, optimizer
        self.progress, self.questions = progress, questions
        self.signal, self.state, self.opened, self.start = None, None, contextlib.ExitStack(), time.time()
        self.mirrors = {}  # by name, each a function write(metrics, step)
        self.unsound = 0  # steps in a row with an update that was skipped

    def begin(self, checkpoint):
        if not checkpoint:
            set_aside(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.opened.enter_context(contextlib.closing(lock(self.folder)))
        remove_unfinished(self.folder)
        self.opened.callback(remove_unfinished, self.folder)
        self.db = self.opened.enter_context(open_db(self.folder / "run.db"))
        if checkpoint:
            try:
                self.restore(checkpoint)
            except (OSError, ValueError, KeyError, SafetensorError) as error:
                fail(f"{checkpoint} cannot be read: {first_line(error)}; --RESUME=False starts over")
        for name in mirrors_of(self.constants):
            self.mirrors[name] = self.open_mirror(name)
        steps, done = self.constants["NUM_STEPS"], self.progress.step
        self.bar = tqdm(total=steps, initial=done, desc="training", unit="step", disable=None)
        self.opened.enter_context(contextlib.closing(self.bar))
        if threading.current_thread() is threading.main_thread():  # nowhere else are signals received
            for number in (signal.SIGINT, signal.SIGTERM):
                self.opened.callback(signal.signal, number, signal.signal(number, self.stop))

    def open_mirror(self, name):
        """Its function write(metrics, step); it already has what a run that goes on has in its run.db."""
        rows = self.db.execute("SELECT step, name, value FROM metrics ORDER BY step")
        try:
            write, close = MIRRORS[name](self.folder, self.values)
            self.opened.callback(self.try_mirror, name, close)
            for step, values in itertools.groupby(rows, lambda row: row[0]):
                write({metric: math.nan if value is None else value for _, metric, value in values}, step)
        except Exception as error:  # W&B without an account or a network
            fail(f"REPORT_TO={name} cannot be written to: {first_line(error)}")
        return write

    def try_mirror(self, name, function, *args):
        """run.db is the record, and a mirror that fails is no reason to end a long run."""
        try:
            function(*args)
        except Exception as error:
            say(f"REPORT_TO={name} failed, the run goes on without it: {first_line(error)}")
            self.mirrors.pop(name, None)

    def stop(self, number, frame):
        """What Ctrl-C and SIGTERM do."""
        self.signal = number
        for again in (signal.SIGINT, signal.SIGTERM):
            signal.signal(again, signal.SIG_DFL)
        os.write(2, b"\nstopping after this step; once more, and it stops at once, without a checkpoint\n")

    def checkpoint(self, last=False):
        """Called between two steps. Remembers the state of the run, and saves it if it is time to.

        So a later fault, while the model has not been changed yet, can still save it. Every SAVE_EVERY steps the model
        is saved as well.
        """
        step, device, stopping = self.progress.step, self.model.device.type, self.signal
        kind, key, *others = numpy.random.get_state()
        self.state = {
            "progress": asdict(self.progress),
            "rests": {index: question.rests for index, question in enumerate(self.questions) if question.rests},
            "data": self.data,
            "constants": self.values,
            "random": {"python": random.getstate(), "numpy": [kind, key.tolist(), *others]},
        }
        self.random = {"random.cpu": torch.get_rng_state()}
        if device != "cpu":
            self.random[f"random.{device}"] = getattr(torch, device).get_rng_state()
        if not torch.stack([weights.isfinite().all() for weights in self.model.parameters()]).all():
            fail(f"after step {step} the weights are not finite: {ADVICE}")
        if (last or stopping or step % self.constants["CHECKPOINT_EVERY"] == 0) and not self.unsound:
            self.save_checkpoint()
        if stopping:
            sys.exit(128 + stopping)
        if self.constants["SAVE_EVERY"] and step and step % self.constants["SAVE_EVERY"] == 0 and not last:
            self.save_model(f"step_{step}")

    def save_checkpoint(self):
        """Saves what checkpoint() remembers, and then removes the checkpoint before it."""
        folder = self.folder / "checkpoint" / f"step_{self.state['progress']['step']}"
        if folder.exists():
            return
        moments = self.optimizer.state_dict()["state"].items()  # by the index of the parameter
        tensors = {f"{index}.{name}": tensor for index, values in moments for name, tensor in values.items()}
        with finished(folder) as unfinished:
            self.write_model(unfinished)
            save_file(tensors | self.random, unfinished / "optimizer.safetensors")
            (unfinished / "state.json").write_text(json.dumps(self.state), encoding="utf-8")
        for other in folder.parent.iterdir():
            if other != folder:
                remove(other)

    def restore(self, checkpoint):
        """Puts everything back as it was when a checkpoint was saved; the model has been loaded from it already."""
        state = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
        vars(self.progress).update(state["progress"])
        for index, rests in state["rests"].items():
            self.questions[int(index)].rests = rests
        moments = {}
        for name, tensor in load_file(checkpoint / "optimizer.safetensors").items():
            first, _, rest = name.partition(".")
            if first != "random":
                moments.setdefault(int(first), {})[rest] = tensor.clone()  # without a hold on the file
            elif rest == "cpu":
                torch.set_rng_state(tensor)
            elif rest == self.model.device.type:
                getattr(torch, rest).set_rng_state(tensor)
        groups = self.optimizer.state_dict()["param_groups"]  # of this run's constants
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
        version, key, gauss = state["random"]["python"]
        random.setstate((version, tuple(key), gauss))
        numpy.random.set_state(tuple(state["random"]["numpy"]))
        with self.db:
            self.db.execute("DELETE FROM metrics WHERE step > ?", [self.progress.step])
            self.db.execute("DELETE FROM responses WHERE step > ?", [self.progress.step])

    def write(self, metrics, groups=()):
        """Records one step, in one transaction, and shows it; after an evaluation the pictures are drawn anew."""
        step = self.progress.step
        with self.db:
            rows = [(step, *item) for item in metrics.items()]
            self.db.executemany("INSERT OR REPLACE INTO metrics VALUES (?, ?, ?)", rows)
            for r in (response for group in groups for response in group):
                judged = r.accuracy, r.reward, len(r.tokens), r.truncated, r.advantage is not None
                values = step, r.question.text, r.question.answer, r.text, *judged
                self.db.execute("INSERT INTO responses VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", values)
        for name, write in list(self.mirrors.items()):
            self.try_mirror(name, write, metrics, step)
        shown = {
            "accuracy": "accuracy",
            "reward": "reward/mean",
            "length": "response_length/mean",
            "entropy": "entropy",
            "resampled": "dynamic_resample_rate",
        }
        figures = {label: f"{metrics[name]:.2f}" for label, name in shown.items() if name in metrics}
        if figures:
            self.bar.set_postfix(figures, refresh=False)
            self.bar.update(step - self.bar.n)
            if self.bar.disable and step % 5 == 0:  # no terminal
                line = "  ".join(f"{label} {value}" for label, value in figures.items())
                say(f"step {step}  {line}  {time.time() - self.start:.0f} s")
        if "skipped_updates" in metrics:
            self.count_skipped_updates(step, metrics["skipped_updates"])
        if "eval/accuracy" in metrics:
            say(f"step {step}: {describe(metrics)}")
            draw(self.folder)

    def count_skipped_updates(self, step, count):
        """While there are some no checkpoint is saved, so that the last one is from before the trouble."""
        self.unsound = self.unsound + 1 if count else 0
        if count:
            say(f"step {step}: {count} updates were skipped, their loss or gradient is not finite")
        if self.unsound == 3:
            picture = draw(self.folder)
            fail(f"in 3 steps in a row a loss or gradient was not finite: look at {picture}; {ADVICE}")

    def save_model(self, name):
        with finished(self.folder / name) as unfinished:
            self.write_model(unfinished)
        say(f"the model is saved in {self.folder / name}")

    def write_model(self, folder):
        """In Hugging Face form, with the generation_config that it came with and the script that made it."""
        bars.disable_progress_bar()
        self.model.save_pretrained(folder)
        try:
            self.tokenizer.save_pretrained(folder)
        except Exception as error:  # a full disk is a plain Exception there
            raise OSError(str(error)) from error
        self.model.own_generation_config.to_json_file(folder / "generation_config.json")
        (folder / "train_script.py").write_text(script_as_run(self.constants), encoding="utf-8")

    def close(self, ended):
        """Closes what is open, and unless the run has ended, says how to go on."""
        self.opened.close()
        checkpoint = last_checkpoint(self.folder)
        if checkpoint and self.state and not ended:
            words = [word for word in sys.argv if not word.startswith("--RESUME=")]
            say(f"to go on from {checkpoint}: {shlex.join(['python', *words])}")


@contextlib.contextmanager
def open_db(path):
    """run.db, for writing. It has a write-ahead log, so that who reads it meanwhile does not keep the run from writing.
    The log is emptied at every write: run.db has everything even if it is copied without it."""
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA wal_autocheckpoint = 1")
        with db:
            db.execute(
                "CREATE TABLE IF NOT EXISTS metrics (step INTEGER, name TEXT, value REAL, PRIMARY KEY (step, name))"
            )
            db.execute(
                "CREATE TABLE IF NOT EXISTS responses (step INTEGER, question TEXT, answer TEXT, response TEXT, "
                "accuracy REAL, reward REAL, length INTEGER, truncated INTEGER, kept INTEGER)"
            )
        yield db
        with contextlib.suppress(sqlite3.OperationalError):  # somebody is reading
            db.execute("PRAGMA journal_mode = DELETE")


def set_aside(folder):
    """Moves a run that is in the folder to the next free number."""
    if holds_run(folder):
        lock(folder).close()
        aside = next(p for p in (Path(f"{folder}_{n}") for n in range(1, sys.maxsize)) if not p.exists())
        try:
            folder.rename(aside)
        except OSError as error:
            fail(f"OUTPUT_DIR={folder} cannot be moved aside, {error.strerror}: give this run another OUTPUT_DIR")
        say(f"{folder} holds an earlier run: it is now {aside}")


@contextlib.contextmanager
def finished(folder):
    """Gives a folder with another name to write in. That of `folder` it gets when all of it is on the disk."""
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    remove(unfinished)
    unfinished.mkdir(parents=True)
    yield unfinished
    for path in [*unfinished.rglob("*"), unfinished]:
        sync(path)
    remove(folder)
    unfinished.rename(folder)
    sync(folder.parent)


def sync(path):
    if os.name == "posix":  # elsewhere a folder cannot be opened
        file = os.open(path, os.O_RDONLY)
        os.fsync(file)
        os.close(file)


def remove(path):
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def remove_unfinished(folder):
    for path in [*folder.glob("*.unfinished"), *folder.glob("checkpoint/*.unfinished")]:
        remove(path)


def describe(metrics):
    """The results of an evaluation in words."""
    shown = [name for name in metrics if re.fullmatch(r"eval/(accuracy|(avg|pass|maj)@\d+)", name)]
    return "held-out " + ", ".join(f"{name.removeprefix('eval/')} {metrics[name]:.3f}" for name in shown)


def progress(items, description):
    """A bar over `items` that appears only if it takes long, and goes away when it is done."""
    return tqdm(items, description, leave=False, delay=5, disable=None)


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
    if not os.path.exists(path):
        fail(f"there is no run in {str(folder)!r}: {path} is missing")
    curves = {}
    try:
        with contextlib.closing(sqlite3.connect(path)) as db:
            rows = db.execute("SELECT step, name, value FROM metrics ORDER BY step").fetchall()
    except sqlite3.DatabaseError as error:
        fail(f"{path} cannot be read: {error}")
    for step, name, value in rows:
        steps, values = curves.setdefault(name, ([], []))
        steps.append(step)
        values.append(math.nan if value is None else value)
    return curves


def draw(folder):
    """Draws training_metrics.png of the run in a folder; returns its path."""
    curves = read_metrics(folder)
    rows = math.ceil(len(PANELS) / 4)
    figure = Figure(figsize=(15, 3 * rows))
    figure.suptitle(str(folder))
    figure.subplots_adjust(left=0.04, right=0.99, bottom=0.06, top=0.91, wspace=0.2, hspace=0.42)
    for axes, (title, names) in zip(figure.subplots(rows, 4).flat, PANELS.items()):
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
    unfinished = picture.with_suffix(f".{os.getpid()}.unfinished")  # `plot` may draw the same while a run goes on
    figure.savefig(unfinished, format="png", dpi=80)
    return unfinished.replace(picture)


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


COMPARED = {  # title: metric, x axis
    "held-out accuracy, greedy": ("eval/accuracy", "step"),
    "accuracy of the samples": ("accuracy", "step"),
    "response length (tokens)": ("response_length/mean", "step"),
    "held-out accuracy, by time": ("eval/accuracy", "minutes of training"),
    "entropy (nats)": ("entropy", "step"),
    "truncated responses": ("truncated_fraction", "step"),
    "share of groups with a gradient": ("groups/with_gradient", "step"),
    "accuracy of the samples, by time": ("accuracy", "minutes of training"),
}


def compare(folders):
    """Draws several runs in one picture, outputs/comparison.png; returns its path.

    Folders whose names differ only in seed0, seed1, ... at the end are one experiment, drawn as the mean and a band
    from the lowest to the highest.
    """
    experiments = {}
    for folder in folders:
        name = re.sub(r"[-_/]?seed[-_]?\d+$", "", str(Path(folder)))
        experiments.setdefault(name, []).append(with_derived(read_metrics(folder)))
    figure = Figure(figsize=(15, 6.5))
    figure.subplots_adjust(left=0.04, right=0.99, bottom=0.08, top=0.87, wspace=0.2, hspace=0.45)
    for axes, (title, (metric, against)) in zip(figure.subplots(2, 4).flat, COMPARED.items()):
        for color, (name, runs) in enumerate(experiments.items()):
            x, mean, lowest, highest = average(runs, metric, against)
            label = name if len(runs) == 1 else f"{name} ({len(runs)} seeds)"
            axes.plot(x, mean, "o-" if metric == "eval/accuracy" else "-", color=f"C{color}", markersize=3, label=label)
            axes.fill_between(x, lowest, highest, color=f"C{color}", alpha=0.2)
        axes.set_title(title, fontsize="medium")
        axes.set_xlabel(against, fontsize="small")
        axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="upper center", ncols=4)
    picture = Path("outputs/comparison.png")
    picture.parent.mkdir(exist_ok=True)
    figure.savefig(picture, dpi=80)
    return picture


def average(runs, metric, against):
    """(x, mean, lowest, highest) of a metric over runs of one experiment, at the steps that all of them have."""
    curves = [dict(zip(*run.get(metric, ((), ())))) for run in runs]
    clocks = [dict(zip(*run.get(against, ((), ())))) for run in runs]  # none where x is the step itself
    steps = sorted(set.intersection(*map(set, curves if against == "step" else curves + clocks)))
    values = [[curve[step] for curve in curves] for step in steps]
    x = steps if against == "step" else [statistics.fmean(clock[step] for clock in clocks) for step in steps]
    return x, list(map(statistics.fmean, values)), list(map(min, values)), list(map(max, values))


def with_derived(curves):
    """Adds to read_metrics' curves the share of groups with a gradient among those trained on, and the clock."""
    correct, wrong, dropped = (
        dict(zip(*curves.get(name, ((), ()))))
        for name in ("groups/all_correct", "groups/all_wrong", "dynamic_resample_rate")
    )
    steps = [step for step in dropped if step in correct and step in wrong and dropped[step] < 1]
    shares = [min(1.0, (1 - correct[step] - wrong[step]) / (1 - dropped[step])) for step in steps]
    timed, seconds = curves.get("time/step", ((), ()))
    minutes = [total / 60 for total in itertools.accumulate([0.0, *seconds])]
    return curves | {"groups/with_gradient": (steps, shares), "minutes of training": ([0, *timed], minutes)}


# ---- The command line -----------------------------------------------------------------------------------------------

USAGE = """\
usage: python dapo.py [train|eval|chat|plot] [recipe.py] [--NAME=VALUE ...] [FOLDER ...]

  train             trains MODEL, and leaves a record, pictures and the trained model in OUTPUT_DIR (the default)
  eval [FOLDER ..]  evaluates models on EVAL_DATASETS, several side by side; without a folder, MODEL
  chat [FOLDER]     puts your questions to a model, or to MODEL
  plot [FOLDER ..]  draws training_metrics.png of a run again, or several runs into outputs/comparison.png

A recipe is a Python file that sets constants; it is run as such. The folder of a run stands for the model it saved
last. PROMPT_TEMPLATE is a text with {question} in it, or a word for one:
"""
COMMANDS = ("train", "eval", "chat", "plot")
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
            templates = "".join(f"  {name}: {text!r}\n" for name, text in PROMPT_TEMPLATES.items())
            print(f"{USAGE}{templates}\nThese are the constants and their values:\n" + "\n".join(help_lines(constants)))
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
    if words[1:] and command == "chat":
        fail(f"chat is with one model, not with {len(words)}: {', '.join(words)}")
    check(constants)
    for name in mirrors_of(constants) if command == "train" else ():
        try:
            importlib.import_module(name)
        except ImportError as error:
            fail(f"REPORT_TO={name}: {first_line(error)}; pip install {name}, or leave it out")
    if command != "plot":
        load_reward(constants["REWARD"])  # now, and not when the first responses are there
    return command, words


def parse(text, current):
    """The value that a text on the command line stands for; a constant that is text takes it as it is."""
    if isinstance(current, str):
        return text
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text


def run_recipe(path, constants, known):
    settings = {"__file__": path, "__name__": "recipe"}
    try:
        exec(compile(Path(path).read_text(encoding="utf-8"), path, "exec"), settings)
    except OSError as error:
        fail(f"the recipe {path!r} cannot be read: {error.strerror}")
    except Exception as error:
        fail(f"the recipe {path!r} failed: {described(error)}")
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
    "MAX_PROMPT_LENGTH NUM_EPOCHS EVAL_EVERY EVAL_SAMPLES CHECKPOINT_EVERY BATCH_SIZE MAX_RESPONSE_LENGTH "
    "GENERATION_BATCH DECODE_STAGE MAX_GEN_BATCHES DAPO_EPOCHS MINI_BATCHES MICRO_BATCH_TOKENS LOGITS_CHUNK"
).split()
NOT_NEGATIVE = "SAVE_EVERY REST_EPOCHS OVERLONG_PENALTY_FACTOR KL_COEF ENTROPY_COEF WARMUP_STEPS WEIGHT_DECAY".split()
POSITIVE = "TEMPERATURE LEARNING_RATE MAX_GRAD_NORM".split()


def check(constants):
    """Refuses values that no run can have."""
    c, limit = constants, constants["MAX_RESPONSE_LENGTH"]
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    devices = [device for device, available in there.items() if available]
    rules = [
        ("DEVICE", c["DEVICE"] in ["", *devices], f"{' or '.join(devices)} on this machine, or empty"),
        *[(name, c[name] >= 1, "at least 1") for name in AT_LEAST_ONE],
        *[(name, 0 <= c[name] < math.inf, "at least 0, and finite") for name in NOT_NEGATIVE],
        *[(name, 0 < c[name] < math.inf, "more than 0, and finite") for name in POSITIVE],
        ("SEED", 0 <= c["SEED"] < 2**32, "0 to 2**32 - 1"),
        ("MODEL", c["MODEL"].strip(), "a folder or the name of a model on the Hub"),
        ("PROMPT_TEMPLATE", "{question}" in template_of(c), TEMPLATE_RULE),
        ("OUTPUT_DIR", c["OUTPUT_DIR"].strip()[:1] not in ("", "~"), "a folder, with no ~ for your home folder"),
        *[(name, is_data(c[name]), DATA_RULE) for name in ("TRAIN_DATASETS", "EVAL_DATASETS")],
        ("REPORT_TO", set(mirrors_of(c)) <= set(MIRRORS), f"{' or '.join(MIRRORS)}, both with a comma, or empty"),
        ("NUM_STEPS", c["NUM_STEPS"] is None or c["NUM_STEPS"] >= 1, "at least 1, or None"),
        ("GROUP_SIZE", c["GROUP_SIZE"] >= 2, "at least 2: a response is compared with the others of its group"),
        ("MINI_BATCHES", c["MINI_BATCHES"] <= c["BATCH_SIZE"] * c["GROUP_SIZE"], "at most BATCH_SIZE x GROUP_SIZE"),
        *[(name, 0 < c[name] < 1, "between 0 and 1") for name in ("CLIP_RANGE_LOW", "CLIP_RANGE_HIGH")],
        ("LOSS_AGG_MODE", c["LOSS_AGG_MODE"] in MODES, f"one of {', '.join(MODES)}"),
        ("OVERLONG_BUFFER_LENGTH", 0 <= c["OVERLONG_BUFFER_LENGTH"] <= limit, f"0 to MAX_RESPONSE_LENGTH, {limit}"),
    ]
    for name, holds, rule in rules:
        if not holds:
            fail(f"{name}={c[name]} is out of range: it has to be {rule}")


TEMPLATE_RULE = f"a text with {{question}} in it, or one of {', '.join(PROMPT_TEMPLATES)}"
DATA_TYPES = ("parquet", "json", "csv", "hub")
DATA_RULE = f"a list of {{'path': ..., 'type': ..., 'input': ..., 'output': ...}}, type {', '.join(DATA_TYPES)}"


def is_data(value):
    """Whether TRAIN_DATASETS or EVAL_DATASETS have the form that load_rows reads."""
    needed, hub = {"path", "type", "input", "output"}, {"name"}
    return value and all(
        isinstance(source, dict)
        and needed <= set(source) <= needed | {"split"} | (hub if source["type"] == "hub" else set())
        and all(isinstance(text, str) and text for text in source.values())
        and source["type"] in DATA_TYPES
        for source in value
    )


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

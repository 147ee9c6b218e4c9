"""README.md and README_zh.md say the same, and what they say is so."""

import importlib
import io
import re
import runpy
import shlex
import subprocess
import sys
from collections import Counter
from unittest import mock

import pyarrow.csv
import pyarrow.parquet
import pytest
from architectures import ARCHITECTURES
from conftest import ROOT, rows
from test_verl import OTHER

import dapo
from tools import trl, verl

FILES = {name: (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README_zh.md")}
EN, ZH = FILES.values()
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[([^\]]*)\]\(([^)]*)\)")
UNITS = {"million": 10**6, "billion": 10**9, "万": 10**4, "亿": 10**8}


def sections(text):
    """[(heading, prose)], the blocks of code left out."""
    parts = re.split(r"^(#+ .*)$", BLOCK.sub("", text), flags=re.MULTILINE)
    return list(zip(parts[1::2], parts[2::2]))


def numbers(text):
    """Counts of all numbers written in digits; those in links' targets and names such as step_40 are not numbers."""
    found = re.findall(
        r"(?<![\w.])(-?\d+(?:,\d+)*(?:\.\d+)?(?![.]\d))(?: ?(million|billion|万|亿))?",
        LINK.sub(r"\1", text),
        re.ASCII,
    )
    values = [(float(digits.replace(",", "")), UNITS.get(unit, 1)) for digits, unit in found]
    return Counter(round(value * unit, 6) for value, unit in values)


def anchors(text):
    """What GitHub calls the headings in links, in their order."""
    headings = [heading.lstrip("# ").lower() for heading, _ in sections(text)]
    return ["#" + re.sub(r"[^\w\- ]", "", heading).replace(" ", "-") for heading in headings]


def test_both_have_the_same_blocks_of_code():
    assert BLOCK.findall(EN) == BLOCK.findall(ZH) and len(BLOCK.findall(EN)) > 10


def test_both_have_the_same_headings():
    levels = [[heading.count("#") for heading, _ in sections(text)] for text in (EN, ZH)]
    assert levels[0] == levels[1]


@pytest.mark.parametrize("pair", list(zip(sections(EN), sections(ZH))), ids=lambda pair: pair[0][0])
def test_both_have_the_same_numbers(pair):
    english, chinese = (numbers(prose) for _, prose in pair)
    assert english == chinese, f"only in English {english - chinese}, only in Chinese {chinese - english}"


@pytest.mark.parametrize("pair", list(zip(sections(EN), sections(ZH))), ids=lambda pair: pair[0][0])
def test_both_have_the_same_links(pair):
    places = dict(zip(anchors(ZH), anchors(EN))) | {"README.md": "README_zh.md"}
    english, chinese = ([target for _, target in LINK.findall(prose)] for _, prose in pair)
    assert Counter(english) == Counter(places.get(target, target) for target in chinese)


@pytest.mark.parametrize("pair", list(zip(sections(EN), sections(ZH))), ids=lambda pair: pair[0][0])
def test_both_name_the_same_things(pair):
    english, chinese = (Counter(re.findall(r"`([^`\n]+)`", prose)) for _, prose in pair)
    assert set(english) == set(chinese)


@pytest.mark.parametrize("name", [path.name for path in ROOT.glob("docs/*.md")])
def test_pages_of_the_docs_are_equals(name):
    """In the numbers of each row of a table, what they name, and their code."""
    pages = [(ROOT / folder / name).read_text(encoding="utf-8") for folder in ("docs", "docs/zh")]
    english, chinese = ([*map(numbers, re.findall(r"^\|.*", page, re.MULTILINE))] for page in pages)
    assert english == chinese
    english, chinese = (set(re.findall(r"`([^`\n]+)`", BLOCK.sub("", page))) for page in pages)
    assert english == chinese
    assert BLOCK.findall(pages[0]) == BLOCK.findall(pages[1])
    for target in (target for page in pages for _, target in LINK.findall(page)):
        assert target.startswith("https://") or any((ROOT / place / target).is_file() for place in ("docs", "docs/zh"))


@pytest.mark.parametrize("name", FILES)
def test_formulas_in_a_line_are_set(name):
    """GitHub takes a $ for the beginning of a formula only after a space, and for its end only before one or a sign."""
    for before, after in re.findall(r"(.?)\$[^$\n]+\$(.?)", BLOCK.sub("", FILES[name])):
        assert before in ("", " ", "(") and re.fullmatch(r"[ .,;:)]?", after), (before, after)


@pytest.mark.parametrize("name", FILES)
def test_links_lead_somewhere(name):
    """To a heading, a file, or a file with the function that the link is named after: lines would change too often."""
    for text, target in LINK.findall(FILES[name]):
        if target.startswith("#"):
            assert target in anchors(FILES[name]), target
        elif not target.startswith("https://"):
            source = ROOT / target
            assert source.is_file(), target
            if source.suffix == ".py":
                assert f"\ndef {text.strip('`')}(" in source.read_text(encoding="utf-8"), (text, target)


MADE = set("training_metrics.png checkpoint.pt run.db train_script.py constants.py step_14/ verl_run/".split())
# Other programs', a run's, or a part of a name.
THEIRS = {"eval/", "NAME", "checkpoint.previous.pt", "WANDB_MODE=offline", "get_soft_overlong_punishment"}
THEIRS |= {"PYTORCH_ALLOC_CONF=expandable_segments:True"}


@pytest.mark.parametrize("name", FILES)
def test_what_is_named_exists(name):
    """Each constant, file, module, function, and metric."""
    source = "".join(path.read_text(encoding="utf-8") for path in [*ROOT.glob("*.py"), *ROOT.glob("*/*.py")])
    for span in set(re.findall(r"`([^`\n]+)`", BLOCK.sub("", FILES[name]))) - MADE - THEIRS:
        if re.fullmatch(r"[A-Z][A-Z_0-9]+(=.*)?", span):
            assert span.partition("=")[0] in dapo.CONSTANTS, span
        elif re.fullmatch(r"[\w/]+\.(py|md|png|parquet|txt|json|db|pt)|[\w/]+/", span):
            assert span.startswith("outputs/") or (ROOT / span).exists(), span
        elif module := re.search(r"\btools\.(\w+)", span):
            assert (ROOT / f"tools/{module[1]}.py").exists(), span
        elif re.fullmatch(r"[a-z_]+", span):
            assert re.search(rf"\b{span}\b", source), span


SHORT = {
    "NUM_STEPS": 1,
    "MODEL": "toy",
    "TRAIN_DATASETS": [{"path": "few.parquet", "type": "parquet", "input": "question", "output": "answer"}],
    "EVAL_SAMPLES": 2,
    "BATCH_SIZE": 2,
    "GROUP_SIZE": 2,
    "MINI_BATCHES": 1,
    "MAX_GEN_BATCHES": 2,
    "MAX_RESPONSE_LENGTH": 24,
    "OVERLONG_BUFFER_LENGTH": 8,
    "DEVICE": "cpu",
}
SHORT["EVAL_DATASETS"] = SHORT["TRAIN_DATASETS"]
COMMANDS = [
    line
    for language, block in BLOCK.findall(EN)
    for line in block.splitlines()
    if language == "bash" and not re.match(r"git clone|python3? -m (venv|pytest)|pip install", line)
]


@pytest.fixture
def follow(tmp_path, monkeypatch):
    """Runs a command where a reader would: beside the toy, eight questions of it, and the files that README shows."""
    monkeypatch.chdir(tmp_path)
    for name in ("toy", "recipes"):
        (tmp_path / name).symlink_to(ROOT / name)
    questions = pyarrow.parquet.read_table(ROOT / "toy/train.parquet")
    pyarrow.csv.write_csv(questions.slice(0, 20), "questions.csv")
    pyarrow.parquet.write_table(questions.slice(0, 8), "few.parquet")
    for _, code in BLOCK.findall(EN):
        if name := re.match(r"# (\w+\.py)\n", code):
            (tmp_path / name[1]).write_text(code, encoding="utf-8")
    short = [f"--{name}={value}" for name, value in SHORT.items()]
    own = [word for word in short if "DATASETS" not in word]  # where a recipe has data of its own

    def follow(command):
        """In this process, except for a python -c. What would train or sample begins with SHORT."""
        program, script, *words = shlex.split(command.replace("step = 10", "step = 1"))
        assert program == "python"
        if script == "-c":
            assert subprocess.run([sys.executable, "-c", *words], capture_output=True, check=True).stdout
            return
        with monkeypatch.context() as patch:
            for name in dapo.CONSTANTS:
                patch.setattr(dapo, name, dapo.CONSTANTS[name])
            patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"Tom has 3 apples.\n")))  # for tools.chat
            if script == "-m":
                module = importlib.import_module(words.pop(0))
                takes_constants = module.__name__ not in ("tools.plot", "tools.mirror")
                module.main([*(own if "mine.py" in words else short), *words] if takes_constants else words)
            elif script in ("dapo.py", "grpo.py"):
                runpy.run_path(str(ROOT / script))  # grpo.py sets its constants; dapo.main is what it then calls
                patch.setattr(sys.modules["__main__"], "__file__", str(ROOT / script), raising=False)
                patch.setattr(dapo, "draw_metrics", lambda folder: None)
                dapo.main([*(own if "mine.py" in words else short), *words])
            else:  # takes long: at least it is there, and takes these arguments
                patch.setattr(sys, "argv", [script, *words, "--help"])
                runpy.run_path(str(ROOT / script), run_name="__main__")

    return follow


def test_commands_run(follow, tmp_path, monkeypatch, capsys):
    """In the order in which they stand, because some look at what others have left. TensorBoard need not be there."""
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", tensorboard := mock.MagicMock())
    for command in COMMANDS:
        try:
            follow(command)
        except SystemExit as end:
            assert not end.code, f"{command}: {capsys.readouterr().err}"
        assert capsys.readouterr().out or re.search(r" -c |mirror", command), command
    assert tensorboard.mock_calls
    run = tmp_path / "outputs/dapo_1"  # the first one, renamed since
    saved = "dapo.py reward.py train_script.py constants.py".split()
    assert {path.name for path in run.iterdir()} - {"checkpoint.previous.pt"} == set(
        "training_metrics.png checkpoint.pt run.db step_1".split()
    )
    assert {path.name for path in (run / "step_1").glob("*.py")} == {*saved}
    # GRPO has all metrics: it drops no group.
    written = {name.replace("@2", "@k") for (name,) in rows(tmp_path / "outputs/grpo", "SELECT name FROM metrics")}
    for text in FILES.values():
        table = next(prose for _, prose in sections(text) if "| `accuracy` |" in prose)
        explained = " ".join(re.findall(r"^\| (`.*?) \|", table, re.MULTILINE))
        assert written | {"reward/NAME"} == set(re.findall(r"`(.*?)`", explained))


@pytest.mark.parametrize("name", FILES)
def test_the_figures_are_those_measured(name):
    """Each row with standard errors is a part of one of outputs/reference/ablation.md, which benchmarks/ablation.py
    wrote, and none of its rows is left out."""

    def figures(text):
        return [row.strip("| ").split(" | ") for row in text.splitlines() if row.startswith("| ") and " ± " in row]

    measured = [set(row) for row in figures((ROOT / "outputs/reference/ablation.md").read_text(encoding="utf-8"))]
    shown = [{cell for cell in row[1:] if cell} for row in figures(FILES[name])]
    assert all(any(row <= whole for whole in measured) for row in shown)
    assert all(any(row <= whole for row in shown) for whole in measured)


def test_the_number_of_architectures():
    count = len({config for config, _ in ARCHITECTURES.values()})
    assert f"{count} architectures" in EN and f"{count} 种架构" in ZH


PAGES = [(ROOT / page).read_text(encoding="utf-8") for page in ("docs/scaling.md", "docs/zh/scaling.md")]


def handed_over(page):
    """The rows of the table of constants in verl and TRL: [constants, code in verl's column, code in TRL's column]."""
    table = next(prose for _, prose in sections(page) if "GRPOConfig" in prose and "| verl |" in prose)
    rows = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| `")]
    return [[re.findall(r"`([^`]+)`", cell) for cell in row] for row in rows]


@pytest.mark.parametrize("page", PAGES, ids=["en", "zh"])
def test_the_keys_of_verl_are_those_that_a_constant_changes(page, monkeypatch):
    """And of every constant it is said what becomes of it."""
    monkeypatch.setattr(verl, "chat_template", lambda *_: None)  # which is no constant's
    named = []
    for constants, keys, _ in handed_over(page):
        named += constants
        changed = set()
        for constant in constants:
            values = dapo.CONSTANTS | ({"NUM_STEPS": None} if constant == "NUM_EPOCHS" else {})
            before, after = verl.overrides(values), verl.overrides(values | {constant: OTHER.get(constant, 3)})
            changed |= {key.lstrip("+") for key in before if before[key] != after[key]}
        keys = {re.sub("^A[.]", "actor_rollout_ref.", key) for key in keys}
        assert constants[0] == "TRAIN_DATASETS" or changed == keys, constants
    assert sorted(named) == sorted(dapo.CONSTANTS)


@pytest.mark.parametrize("page", PAGES, ids=["en", "zh"])
@pytest.mark.parametrize("constants", [{}, {name: OTHER[name] for name in ("SAVE_EVERY", "WARMUP_STEPS", "KL_COEF")}])
def test_the_arguments_of_trl_are_those_of_the_tool(page, constants):
    """What the table says, worked out with the constants. Checkpointing is dapo.load_model's there."""
    constants = dapo.CONSTANTS | constants
    spans = [span for _, _, column in handed_over(page) for span in column]
    pairs = [re.fullmatch(r"(\w+)=(.+)", span) for span in spans]
    said = {pair[1]: eval(pair[2], constants.copy()) for pair in pairs if pair}
    made = trl.arguments(constants)
    assert said == {name: made[name] for name in said} and len(said) > 25
    others = "use_cpu bf16 report_to logging_steps eval_strategy eval_on_start per_device_eval_batch_size".split()
    assert made.keys() - said.keys() == {*others, "disable_dropout", "router_aux_loss_coef"}

"""README.md and README_zh.md say the same, and what they say is so."""

import io
import re
import runpy
import shlex
import subprocess
import sys
from collections import Counter

import pandas
import pytest
from architectures import ARCHITECTURES
from conftest import ROOT

import dapo
from test_verl import OTHER

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


@pytest.mark.parametrize("name", FILES)
def test_formulas_in_a_line_are_set(name):
    """GitHub takes a $ for the beginning of a formula only after a space, and for its end only before one or a sign."""
    for before, after in re.findall(r"(.?)\$[^$\n]+\$(.?)", BLOCK.sub("", FILES[name])):
        assert before in ("", " ", "(") and re.fullmatch(r"[ .,;:)]?", after), (before, after)


@pytest.mark.parametrize("name", FILES)
def test_links_lead_somewhere(name):
    for text, target in LINK.findall(FILES[name]):
        path, _, place = target.partition("#")
        if not path:
            assert target in anchors(FILES[name]), target
        elif not path.startswith("https://"):
            assert (ROOT / path).is_file(), target
            if place:
                line = (ROOT / path).read_text(encoding="utf-8").splitlines()[int(place.removeprefix("L")) - 1]
                assert line.startswith(f"def {text.strip('`')}("), f"{target} is now the line {line!r}"


@pytest.mark.parametrize("name", FILES)
def test_what_is_named_exists(name):
    """Each constant, file, function and metric. What only stands for something of the reader's is in `theirs`."""
    theirs = {"eval/", "WANDB_MODE=offline", "get_soft_overlong_punishment"}
    places = [*ROOT.glob("*.py"), *ROOT.glob("benchmarks/*.py"), *ROOT.glob("recipes/*.py")]
    source = "".join(path.read_text(encoding="utf-8") for path in places)
    for span in set(re.findall(r"`([^`\n]+)`", BLOCK.sub("", FILES[name]))) - theirs:
        if re.fullmatch(r"[A-Z][A-Z_0-9]+(=.*)?", span):
            assert hasattr(dapo, span.partition("=")[0]), span
        elif re.fullmatch(r"[\w/]+\.(py|md|png|parquet|txt|json)|[\w/]+/", span) and "step_" not in span:
            made = span in ("training_metrics.png", "train_script.py", "run.db", "checkpoint/") or span.startswith(
                "outputs/"
            )
            assert made or (ROOT / span).exists(), span
        elif re.fullmatch(r"[a-z_]+", span):
            assert re.search(rf"\b{span}\b", source), span


def test_every_metric_is_explained(run_folder):
    """The names in a run's run.db are those in the table, which writes k for EVAL_SAMPLES."""
    written = {name.replace("@2", "@k") for name in dapo.record.read_metrics(run_folder / "outputs/metrics")}
    for name, text in FILES.items():
        table = next(prose for _, prose in sections(text) if "| `accuracy` |" in prose)
        first = re.findall(r"^\| (`.*?) \|", table, re.MULTILINE)
        assert written == set(re.findall(r"`(.*?)`", " ".join(first))), name


SHORT = {
    "NUM_STEPS": 2,
    "MODEL": "toy",
    "TRAIN_DATASETS": [{"path": "few.parquet", "type": "parquet", "input": "question", "output": "answer"}],
    "BATCH_SIZE": 2,
    "GROUP_SIZE": 2,
    "MINI_BATCHES": 1,
    "MAX_RESPONSE_LENGTH": 24,
    "OVERLONG_BUFFER_LENGTH": 8,
    "DEVICE": "cpu",
}
SHORT["EVAL_DATASETS"] = SHORT["TRAIN_DATASETS"]


def shortened(constants=SHORT):
    return [f"--{name}={value}" for name, value in constants.items()]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """Where a reader would be: the toy, eight questions of it, and the files that README asks to write."""
    folder = tmp_path_factory.mktemp("reader")
    (folder / "toy").symlink_to(ROOT / "toy")
    (folder / "reward.py").symlink_to(ROOT / "reward.py")
    (folder / "recipes").symlink_to(ROOT / "recipes")
    pandas.read_parquet(ROOT / "toy/train.parquet").head(20).to_csv(folder / "questions.csv", index=False)
    pandas.read_parquet(ROOT / "toy/train.parquet").head(8).to_parquet(folder / "few.parquet")
    for _, code in BLOCK.findall(EN):
        if name := re.match(r"# (\w+\.py)\n", code):
            (folder / name[1]).write_text(code, encoding="utf-8")
    more = shortened({"OUTPUT_DIR": "outputs/metrics", "KL_COEF": 0.1, "EVAL_SAMPLES": 2, "CHECKPOINT_EVERY": 50})
    subprocess.run([sys.executable, str(ROOT / "dapo.py"), *shortened(), *more], cwd=folder, check=True)
    return folder


COMMANDS = [
    line
    for language, block in BLOCK.findall(EN)
    for line in block.splitlines()
    if language == "bash" and not re.match(r"git clone|python3? -m|pip install", line)
]


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_run(command, run_folder, main, monkeypatch, capsys):
    """Each as it stands, only with SHORT after it where it would train, and in the order in which they stand."""
    monkeypatch.chdir(run_folder)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"Tom has 3 apples.\n")))  # for chat
    program, script, *arguments = shlex.split(command.replace("step = 10", "step = 2"))
    assert program == "python"
    if script == "-c":
        assert subprocess.run([sys.executable, "-c", *arguments], capture_output=True, check=True).stdout
    elif script in ("dapo.py", "grpo.py"):
        if script == "grpo.py":
            runpy.run_path(str(ROOT / script))  # sets its constants; dapo.main is what it then calls
        quick = "plot" in arguments or "--help" in arguments
        try:
            own = {name: value for name, value in SHORT.items() if "mine.py" not in arguments or "DATA" not in name}
            main(arguments if quick else arguments + shortened(own))
        except SystemExit as end:
            assert "--help" in arguments and not end.code
        assert capsys.readouterr().out
    else:  # takes long: at least it is there, and takes these arguments
        options = [word for word in arguments if word.startswith("--")]
        listed = subprocess.run(
            [sys.executable, str(ROOT / script), "--help"], capture_output=True, text=True, check=True
        )
        assert all(option.partition("=")[0] in listed.stdout for option in options)


@pytest.mark.parametrize("name", FILES)
def test_the_figures_are_those_measured(name):
    """Each row with standard errors is a part of one of outputs/reference/ablation.md, which benchmarks/ablation.py
    wrote, and none of its rows is left out."""

    def rows(text):
        return [row.strip("| ").split(" | ") for row in text.splitlines() if row.startswith("| ") and " ± " in row]

    measured = [set(row) for row in rows((ROOT / "outputs/reference/ablation.md").read_text(encoding="utf-8"))]
    shown = [{cell for cell in row[1:] if cell} for row in rows(FILES[name])]
    assert all(any(row <= whole for whole in measured) for row in shown)
    assert all(any(row <= whole for row in shown) for whole in measured)


def test_the_number_of_architectures():
    count = len({config for config, _ in ARCHITECTURES.values()})
    assert f"{count} architectures" in EN and f"{count} 种架构" in ZH


def handed_over(name):
    """The rows of the table of constants in verl and TRL: [constants, code in verl's column, code in TRL's column]."""
    table = next(prose for _, prose in sections(FILES[name]) if "GRPOConfig" in prose and "| verl |" in prose)
    rows = [
        line.strip("| ").split(" | ")
        for line in table.splitlines()
        if line.startswith("| `") and "recipes/" not in line
    ]
    return [[re.findall(r"`([^`]+)`", cell) for cell in row] for row in rows]


@pytest.mark.parametrize("name", FILES)
def test_the_keys_of_verl_are_those_that_a_constant_changes(name):
    """And of every constant it is said what becomes of it."""
    overrides = runpy.run_path(str(ROOT / "recipes/verl.py"))["overrides"]
    usual = {name: value for name, value in vars(dapo).items() if name.isupper()}
    named = []
    for constants, keys, _ in handed_over(name):
        named += constants
        changed = set()
        for constant in constants:
            values = usual | ({"NUM_STEPS": None} if constant == "NUM_EPOCHS" else {})
            before, after = overrides(values), overrides(values | {constant: OTHER.get(constant, 3)})
            changed |= {key.lstrip("+") for key in before if before[key] != after.get(key)}
        assert constants[0] == "TRAIN_DATASETS" or changed == {
            re.sub("^A[.]", "actor_rollout_ref.", key) for key in keys
        }
    assert sorted(named) == sorted(usual)


def test_trl_accepts_the_arguments():
    """What the table says, worked out with dapo.py's constants, is a GRPOConfig; it samples a whole batch at a time."""
    trl = pytest.importorskip("trl", reason="TRL is not installed")
    spans = [span for _, _, column in handed_over("README.md") for span in column]
    pairs = [re.fullmatch(r"(\w+)=(.+)", span) for span in spans]
    arguments = {pair[1]: eval(pair[2], vars(dapo).copy()) for pair in pairs if pair}
    config = trl.GRPOConfig(**arguments, bf16=False, use_cpu=True)
    assert len(arguments) > 20 and config.generation_batch_size == dapo.BATCH_SIZE * dapo.GROUP_SIZE
    assert config.max_steps == dapo.NUM_STEPS * dapo.MINI_BATCHES

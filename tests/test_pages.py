"""The pages in English and in Chinese say the same, and what they say is so."""

import argparse
import ast
import contextlib
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
import torch
from architectures import ARCHITECTURES
from conftest import ROOT, rows
from test_verl import OTHER

import dapo
from tools import trl, verl

# All pages, in the order in which a reader may run their commands: README.md, docs/NAME.md, benchmarks/README.md.
TOPICS = """equations metrics ablation experiments answers siblings lesson sheet solutions runs data_and_rewards lora
scaling deviations questions words mirrors""".split()
TWINS = {"README.md": "README_zh.md"}
TWINS |= {f"docs/{topic}.md": f"docs/zh/{topic}.md" for topic in TOPICS}
TWINS |= {"benchmarks/README.md": "benchmarks/README_zh.md"}
TEXT = {page: (ROOT / page).read_text(encoding="utf-8") for pair in TWINS.items() for page in pair}
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[([^\]]*)\]\(([^)]*)\)")
SPAN = re.compile(r"`([^`\n]+)`")
UNITS = {"million": 10**6, "billion": 10**9, "万": 10**4, "亿": 10**8}
every_page = pytest.mark.parametrize("page", TEXT)
every_pair = pytest.mark.parametrize("page", TWINS)


def sections(page):
    """[(heading, prose)], the blocks of code left out."""
    parts = re.split(r"^(#+ .*)$", BLOCK.sub("", TEXT[page]), flags=re.MULTILINE)
    return list(zip(parts[1::2], parts[2::2]))


def pairs_of_sections(page):
    """[(heading, English prose, Chinese prose)]"""
    return [(heading, prose, other) for (heading, prose), (_, other) in zip(sections(page), sections(TWINS[page]))]


def numbers(text):
    """Counts of numbers written in digits, but not of those in links' targets, names (step_40), or versions (0.9.1)."""
    found = re.findall(
        r"(?<![\w.])(-?\d+(?:,\d+)*(?:\.\d+)?(?![.]\d))(?: ?(million|billion|万|亿))?",
        LINK.sub(r"\1", text),
        re.ASCII,
    )
    values = [(float(digits.replace(",", "")), UNITS.get(unit, 1)) for digits, unit in found]
    return Counter(round(value * unit, 6) for value, unit in values)


def anchors(page):
    """What GitHub calls the headings in links, in their order."""
    headings = [heading.lstrip("# ").lower() for heading, _ in sections(page)]
    return [re.sub(r"[^\w\- ]", "", heading).replace(" ", "-") for heading in headings]


def destination(page, target):
    """(the file that a link on the page leads to, relative to the root, and the anchor there, maybe empty)"""
    path, _, anchor = target.partition("#")
    place = (ROOT / page).parent / path if path else ROOT / page
    return place.resolve().relative_to(ROOT).as_posix(), anchor


def destinations(page, prose):
    """Counts of where links lead: a page and the number of its heading, the same for twins; else the file, or URL."""
    english = {twin: page for page, twin in TWINS.items()}
    found = Counter()
    for text, target in LINK.findall(prose):
        if target.startswith("https://"):
            found[target] += 1
        elif text not in ("中文", "English"):
            place, anchor = destination(page, target)
            found[english.get(place, place), anchor and anchors(place).index(anchor)] += 1
    return found


def test_the_list_of_pages_is_complete():
    """And the front pages lead to each of them."""
    folders = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/*.md")]
    assert {path.relative_to(ROOT).as_posix() for path in folders} == set(TEXT)
    for front, pages in (("README.md", TWINS), ("README_zh.md", TWINS.values())):
        linked = {
            destination(front, target)[0]
            for _, target in LINK.findall(TEXT[front])
            if not target.startswith("https://")
        }
        assert {*pages} - {front} <= linked


@pytest.mark.parametrize("page", ["README.md", "README_zh.md"])
def test_the_front_page_has_at_most_220_lines(page):
    assert len(TEXT[page].splitlines()) <= 220


def test_the_front_page_is_not_crammed():
    prose = [line for line in BLOCK.sub("", TEXT["README.md"]).splitlines() if not line.startswith("|")]
    assert max(map(len, prose)) <= 120


def test_the_front_pages_lead_to_each_other():
    assert "[中文](README_zh.md)" in TEXT["README.md"] and "[English](README.md)" in TEXT["README_zh.md"]


@pytest.mark.parametrize("page", [page for page in TWINS if page != "README.md"])
def test_the_first_line_says_for_whom_the_page_is(page):
    """And leads to the other language and to the front page."""
    for name, start, other in ((page, "For ", "中文"), (TWINS[page], "写给", "English")):
        line = TEXT[name].splitlines()[2]
        assert re.fullmatch(rf"\*{start}[^*]+\* · \[{other}\]\(.+\) · \[(front page|首页)\]\(.+\)", line), line
        places = [destination(name, target)[0] for _, target in LINK.findall(line)]
        assert places == ([TWINS[page], "README.md"] if name == page else [page, "README_zh.md"])


@every_pair
def test_both_have_the_same_blocks_of_code(page):
    assert BLOCK.findall(TEXT[page]) == BLOCK.findall(TEXT[TWINS[page]])


@every_pair
def test_both_have_the_same_headings(page):
    levels = [[len(re.match("#+", heading)[0]) for heading, _ in sections(name)] for name in (page, TWINS[page])]
    assert levels[0] == levels[1]


@every_pair
def test_both_have_the_same_numbers(page):
    for heading, english, chinese in pairs_of_sections(page):
        english, chinese = numbers(english), numbers(chinese)
        assert english == chinese, f"{heading}: only in English {english - chinese}, in Chinese {chinese - english}"


@every_pair
def test_tables_have_the_same_numbers_in_each_row(page):
    english, chinese = ([*map(numbers, re.findall(r"^\|.*", TEXT[name], re.MULTILINE))] for name in (page, TWINS[page]))
    assert english == chinese


@every_pair
def test_both_have_the_same_links(page):
    for heading, english, chinese in pairs_of_sections(page):
        assert destinations(page, english) == destinations(TWINS[page], chinese), heading


@every_pair
def test_both_name_the_same_things(page):
    for heading, english, chinese in pairs_of_sections(page):
        assert {*SPAN.findall(english)} == {*SPAN.findall(chinese)}, heading


@every_page
def test_formulas_in_a_line_are_set(page):
    """GitHub takes a $ for the beginning of a formula only after a space, and for its end only before one or a sign."""
    for before, after in re.findall(r"(.?)\$[^$\n]+\$(.?)", BLOCK.sub("", TEXT[page])):
        assert before in ("", " ", "(") and re.fullmatch(r"[ .,;:)]?", after), (before, after)


@pytest.mark.parametrize("page", TWINS.values())
def test_chinese_is_set_as_usual(page):
    """A blank between Chinese and Latin letters or digits, none before %, and none in the middle of a sentence, which
    is what GitHub makes of a line break between two Chinese characters."""
    prose = LINK.sub(r"\1", BLOCK.sub("\n", TEXT[page]))
    wrong = r"[一-鿿][A-Za-z0-9`]|[A-Za-z0-9`%][一-鿿]|\d %|[一-鿿]\n[一-鿿]"
    assert not [prose[max(0, match.start() - 12) : match.end() + 8] for match in re.finditer(wrong, prose)]


@every_page
def test_links_lead_somewhere(page):
    """To a heading, a file, or a file with the function that the link is named after: lines would change too often."""
    for text, target in LINK.findall(TEXT[page]):
        if not target.startswith("https://"):
            place, anchor = destination(page, target)
            assert (ROOT / place).is_file(), target
            assert not anchor or anchor in anchors(place), target
            if place.endswith(".py") and text.startswith("`"):
                assert f"\ndef {text.strip('`')}(" in (ROOT / place).read_text(encoding="utf-8"), (text, target)


# What commands on the pages make, by files' names.
MADE = set("training_metrics.png checkpoint.pt run.db train_script.py constants.py step_14/".split())
MADE |= set("comparison.png ablation.png experiments.png".split())
# Other programs', a run's, or a part of a name. Some pages name so much of other programs that this is left out there.
THEIRS = {"eval/", "NAME", "WANDB_MODE=offline", "anwser"}
THEIRS |= {"PYTORCH_ALLOC_CONF=expandable_segments:True"}
OF_OTHERS = {"docs/scaling.md", "docs/deviations.md"}


PROGRAMS = "".join(
    path.read_text(encoding="utf-8")
    for folder in (".", "siblings", "tools", "recipes", "benchmarks", "toy")
    for path in (ROOT / folder).glob("*.py")
)
PROGRAMS = re.sub(r'"\s*\n\s*f?"', "", PROGRAMS)  # strings in several lines
METRIC = r"(eval|reward|response_length|groups|sampling_gap|clip_fraction|time|memory)/\w+(@\w+)?"
EXPLAINED = {*SPAN.findall(" ".join(re.findall(r"^\| (`.*?) \|", TEXT["docs/metrics.md"], re.MULTILINE)))}


@every_pair
def test_what_is_named_exists(page):
    """Each constant, file, module, function, and metric."""
    tests = "".join(path.read_text(encoding="utf-8") for path in ROOT.glob("tests/*.py"))
    for span in {*SPAN.findall(BLOCK.sub("", TEXT[page]))} - MADE - THEIRS:
        if module := re.search(r"\btools\.(\w+)", span):
            assert (ROOT / f"tools/{module[1]}.py").exists(), span
        elif page in OF_OTHERS:
            continue
        elif re.fullmatch(r"[A-Z][A-Z_0-9]+(=.*)?", span):
            assert span.partition("=")[0] in dapo.CONSTANTS, span
        elif re.fullmatch(METRIC, span):
            assert re.sub(r"@\d+", "@k", span) in EXPLAINED, span
        elif re.fullmatch(r"[\w/]+\.(py|md|png|parquet|txt|json|db|pt)|[\w/]+/", span):
            assert span.startswith("outputs/") or (ROOT / span).exists(), span
        elif re.fullmatch(r"[a-z_]+", span):
            assert re.search(rf"\b{span}\b", tests if span.startswith("test_") else PROGRAMS), span


def test_the_messages_of_a_run_are_in_the_programs():
    """The words in the first column of the table of docs/runs.md, as they stand there."""
    table = TEXT["docs/runs.md"].partition("## When something goes wrong")[2]
    messages = [span for cell in re.findall(r"^\| ([^|]*) \|", table, re.MULTILINE) for span in SPAN.findall(cell)]
    messages = [span for span in messages if " " in span]
    assert len(messages) > 10 and not [span for span in messages if span not in PROGRAMS]


def test_the_lines_on_the_screen_are_those_of_the_programs():
    """Of longer messages that docs/words.md explains, most words, three in a row at a time: the rest are values."""
    page = TEXT["docs/words.md"]
    checked = 0
    for span in SPAN.findall(page[page.index("## Lines on the screen") :]):
        words = span.split()
        threes = [" ".join(three) for three in zip(words, words[1:], words[2:])]
        threes = [three for three in threes if not re.search(r"[A-Z_=/\d]|nowhere|mine|toy", three)]
        if len(threes) >= 3:
            checked += 1
            assert sum(three in PROGRAMS for three in threes) >= 0.6 * len(threes), span
    assert checked > 10


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
BLOCKS = [block for page in TWINS for block in BLOCK.findall(TEXT[page])]
COMMANDS = dict.fromkeys(
    line
    for language, block in BLOCKS
    for line in block.splitlines()
    if language == "bash" and not re.match(r"python3? -m (venv|pytest)|[.] |pip install", line)
)


@pytest.fixture
def follow(tmp_path, monkeypatch):
    """Runs a command where a reader would: beside the toy, eight questions of it, and the files that the pages show."""
    monkeypatch.chdir(tmp_path)
    for name in ("toy", "recipes"):
        (tmp_path / name).symlink_to(ROOT / name)
    questions = pyarrow.parquet.read_table(ROOT / "toy/train.parquet")
    pyarrow.csv.write_csv(questions.slice(0, 20), "questions.csv")
    pyarrow.parquet.write_table(questions.slice(0, 8), "few.parquet")
    for _, code in BLOCKS:
        if name := re.match(r"# (\w+\.py)\n", code):
            (tmp_path / name[1]).write_text(code, encoding="utf-8")
    short = [f"--{name}={value}" for name, value in SHORT.items()]
    short_without_data = [word for word in short if "DATASETS" not in word]  # where a recipe has data of its own

    def follow(command):
        """In this process, except for a python -c. What would train or sample begins with SHORT."""
        one_step = command.replace("step = 10", "step = 1").replace("--step 3", "--step 1")
        program, script, *words = shlex.split(one_step, comments=True)
        assert program == "python"
        if script == "-c":
            assert subprocess.run([sys.executable, "-c", *words], capture_output=True, check=True).stdout
            return
        if script == "benchmarks/gspo_noise.py":  # in a process of its own, as it replaces parts of dapo
            command = [sys.executable, ROOT / script, *short, *words]
            return print(subprocess.run(command, capture_output=True, check=True, text=True).stdout)
        with monkeypatch.context() as patch:
            for name in dapo.CONSTANTS:
                patch.setattr(dapo, name, dapo.CONSTANTS[name])
            patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"Tom has 3 apples.\n")))  # for tools.chat
            if script == "-m" and words[0].startswith("siblings."):
                for function in ("group_advantages", "aggregate_loss", "policy_loss", "probability_ratio"):
                    patch.setattr(dapo, function, getattr(dapo, function))
                script = f"{words.pop(0).replace('.', '/')}.py"
            if script == "-m":
                module = importlib.import_module(words.pop(0))
                takes_constants = module.__name__.removeprefix("tools.") not in ("plot", "show", "mirror", "export")
                constants = short_without_data if "mine.py" in words else short
                module.main([*constants, *words] if takes_constants else words)
            elif script in ("dapo.py", "grpo.py") or script.startswith("siblings/"):
                runpy.run_path(str(ROOT / script))  # sets constants, and functions; dapo.main is what it then calls
                patch.setattr(sys.modules["__main__"], "__file__", str(ROOT / script), raising=False)
                patch.setattr(dapo, "draw_metrics", lambda folder: None)
                dapo.main([*(short_without_data if "mine.py" in words else short), *words])
            else:  # takes long: at least it is there, and takes these arguments
                parse = argparse.ArgumentParser.parse_args
                patch.setattr(argparse.ArgumentParser, "parse_args", lambda parser: sys.exit(print(parse(parser))))
                patch.setattr(sys, "argv", [script, *words])
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
        "training_metrics.png checkpoint.pt run.db step_1 steps.html".split()
    )
    assert {path.name for path in (run / "step_1").glob("*.py")} == {*saved}
    # GRPO has all metrics: it drops no group.
    written = {name.replace("@2", "@k") for (name,) in rows(tmp_path / "outputs/grpo", "SELECT name FROM metrics")}
    for page in ("docs/metrics.md", "docs/zh/metrics.md"):
        explained = " ".join(re.findall(r"^\| (`.*?) \|", TEXT[page], re.MULTILINE))
        assert written | {"reward/NAME"} == set(re.findall(r"`(.*?)`", explained))


@pytest.mark.parametrize("page", ["README.md", "README_zh.md"])
def test_the_experiments_of_the_front_page_are_run(page):
    listed = re.findall(r"^\| .*\| `(python .*)` \|$", TEXT[page], re.MULTILINE)
    assert len(listed) == 7 and {*listed} <= {*COMMANDS}


def test_the_gradient_of_k3_is_as_said():
    """The lines that docs/deviations.md has its readers try."""
    code = next(code for _, code in BLOCKS if "k3 =" in code)
    torch.manual_seed(0)
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(code, {})
    k3, base_from_pi, pi_from_base = (torch.tensor(ast.literal_eval(line)) for line in out.getvalue().splitlines())
    assert torch.allclose(k3, base_from_pi) and not torch.allclose(k3, pi_from_base, atol=1e-3)


def measured_rows(text):
    """The cells of each row with standard errors, or with three decimals, where there was one run."""
    rows = [row.strip("| ").split(" | ") for row in text.splitlines() if row.startswith("| ")]
    return [row for row in rows if any(re.search(r" ± |^0\.\d{3}$", cell) for cell in row)]


def setting(label):
    """The label of a row as benchmarks/ablation.py writes it."""
    name = label.replace("`", "").replace("dapo.py", "dapo")
    return f"dapo {name}" if name.startswith("without") else name


def measured_in(table):
    """{setting: cells} of a table in outputs/reference/."""
    text = (ROOT / f"outputs/reference/{table}").read_text(encoding="utf-8")
    return {setting(label): cells for label, *cells in measured_rows(text)}


MEASURED = measured_in("ablation.md")


@pytest.mark.parametrize(
    "page, table",
    [("README.md", "ablation.md"), *((f"docs/{name}.md", f"{name}.md") for name in ("ablation", "siblings", "lora"))],
)
def test_the_figures_are_those_measured(page, table):
    """Each row has the figures of its setting, in the order of their columns. Their twins have the same numbers."""
    found = measured_rows(TEXT[page])
    for label, *cells in found:
        measured = iter(measured_in(table)[setting(label)])
        assert all(cell in measured for cell in cells if cell.strip()), label
    assert len(found) >= 6 and (table == "ablation.md" or len(found) == len(measured_in(table)))


def test_the_ablation_is_shown_whole():
    """All its settings, in their order, with seven or eight figures each (the paper's is missing where it has none)."""
    table = measured_rows(TEXT["docs/ablation.md"].partition("What the columns mean")[0])
    assert [setting(label) for label, *_ in table] == [*MEASURED]
    assert all(len([cell for cell in cells if cell.strip()]) >= 7 for _, *cells in table)


def test_the_number_of_architectures():
    count = len({config for config, _ in ARCHITECTURES.values()})
    for page, chinese in TWINS.items():
        named = re.findall(r"(\d+) architectures", TEXT[page]), re.findall(r"(\d+) 种架构", TEXT[chinese])
        assert {*named[0], *named[1]} <= {str(count)}
    assert f"{count} architectures" in TEXT["README.md"] and f"{count} 种架构" in TEXT["README_zh.md"]


SCALING = pytest.mark.parametrize("page", ["docs/scaling.md", "docs/zh/scaling.md"])


def handed_over(page):
    """The rows of the table of constants in verl and TRL: [constants, code in verl's column, code in TRL's column]."""
    table = next(prose for _, prose in sections(page) if "GRPOConfig" in prose and "| verl |" in prose)
    lines = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| `")]
    return [[re.findall(r"`([^`]+)`", cell) for cell in cells] for cells in lines]


@SCALING
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
            changed |= {key.lstrip("+") for key in after if before.get(key) != after[key]}
        keys = {re.sub("^A[.]", "actor_rollout_ref.", key) for key in keys}
        assert constants[0] == "TRAIN_DATASETS" or changed == keys, constants
    assert sorted(named) == sorted(dapo.CONSTANTS)


@SCALING
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

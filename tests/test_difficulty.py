"""tools.difficulty: the histogram and the share with a gradient by hand, and the file of the questions in between."""

import datetime
import io
import itertools
import json
import statistics

import pyarrow
import pyarrow.parquet
import pytest
import torch
from conftest import load, response
from test_bad_input import stop_of

import dapo
from tools import difficulty, evaluate


def group(rights, k, asked=None, source="data"):
    """k responses to a question, of which so many are right."""
    asked = asked or dapo.Question("Tom?", "34", source, torch.tensor([1]))
    return [response(float(n < rights), asked=asked) for n in range(k)]


def graded(*accuracies):
    return [response(accuracy) for accuracy in accuracies]


def bars(lines):
    """{label: (questions, share, length of the bar)}"""
    parts = [line.split() for line in lines[1:]]
    return {label: (int(count), share, len("".join(bar))) for label, count, share, *bar in parts}


def test_the_histogram_by_hand():
    groups = [group(rights, 4) for rights in (0, 0, 0, 0, 0, 1, 3, 4)]
    assert bars(difficulty.histogram(groups)) == {
        "0": (5, "62%", 40),
        "1": (1, "12%", 8),
        "2": (0, "0%", 0),
        "3": (1, "12%", 8),
        "4": (1, "12%", 8),
    }


def test_of_many_samples_the_histogram_has_ranges():
    """None and all stay apart, however few they are; and each bar that is not empty has a length."""
    groups = [group(rights, 32) for rights in [0] * 100 + [1, 3, 4, 30, 31, 32]]
    found = bars(difficulty.histogram(groups))
    assert [*found] == "0 1-3 4-6 7-9 10-12 13-15 16-18 19-21 22-24 25-27 28-30 31 32".split()
    assert {label: count for label, (count, *_) in found.items() if count} == {
        "0": 100, "1-3": 2, "4-6": 1, "28-30": 1, "31": 1, "32": 1
    }  # fmt: skip
    assert found["0"][2] == 40 and found["31"][2] == 1


def test_every_question_is_in_one_line():
    for k in range(2, 70):
        found = bars(difficulty.histogram([group(rights, k) for rights in range(k + 1)]))
        assert sum(count for count, *_ in found.values()) == k + 1 and len(found) <= 17
        assert found["0"][0] == found[str(k)][0] == 1


def test_grades_are_rounded_but_not_to_none_or_all():
    groups = [graded(0.0, 0.1), graded(0.9, 1.0), graded(0.6, 0.3), graded(0.0, 0.0), graded(1.0, 1.0)]
    assert [count for count, *_ in bars(difficulty.histogram(groups)).values()] == [1, 3, 1]
    assert [count for count, *_ in bars(difficulty.histogram([graded(-1.0, 0.0), graded(2.0, 3.0)])).values()] == [
        1,
        0,
        1,
    ]


@pytest.mark.parametrize("values", [[1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1], [0.5, 0.5, 0.2, 1.0, 0.2]])
def test_the_probability_of_a_gradient_is_counted_out(values):
    """From all choices among the samples; beyond their number, from all draws with replacement."""
    for size in range(2, 8):
        choices = (
            itertools.combinations(values, size) if size <= len(values) else itertools.product(values, repeat=size)
        )
        expected = statistics.fmean(len(set(choice)) > 1 for choice in choices)
        assert difficulty.gradient_probability(graded(*values), size) == pytest.approx(expected)


def test_the_description_by_hand(set_constants):
    """Of 4 responses, 0 and 2 are right: half of the pairs to the first, and 4 of the 6 to the second, differ."""
    set_constants(GROUP_SIZE=2)
    groups = [group(0, 4), group(2, 4), group(4, 4, source="easy")]
    first, second = difficulty.describe("toy", groups).split("easy: ")
    assert first.splitlines()[1] == "data: how many of 4 responses by toy are right"
    assert "33% of groups of GROUP_SIZE=2 would have a gradient" in first and "too low" not in first
    assert "0% of groups" in second and bars(second.splitlines()[1:-1])["4"] == (1, "100%", 40)
    set_constants(GROUP_SIZE=8)  # 1 - 2 / 2 ** 8 of the second's, and none of the first's
    assert "50% of groups of GROUP_SIZE=8" in (said := difficulty.describe("toy", groups[:2]))
    assert "(by only 4 samples: on average too low)" in said


CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Tom has 12 apples."}]
OTHER_CHAT = [CHAT[0] | {"content": "Be kind."}, CHAT[1]]
TALK = [CHAT[1], {"role": "assistant", "content": "12"}, {"role": "user", "content": "And now?"}]
LONG_CHAT = [CHAT[0] | {"content": "Be brief. " * 60}, TALK[2]]
LIKE_A_CHAT = [{"role": "user", "content": json.dumps(CHAT)}]
MEDIUM = {"type": "parquet", "input": "question", "output": "answer"}


@pytest.fixture
def sources(tmp_path):
    """Questions of every form, in two data sets whose other columns do not go together."""
    rows = [
        {"prompt": chat, "truth": 12, "level": n, "meta": {}, "extra_info": {"question": "theirs", "n": 2**70}}
        for n, chat in enumerate([CHAT, OTHER_CHAT, LONG_CHAT, TALK, LIKE_A_CHAT])
    ]
    (tmp_path / "chats.json").write_text(json.dumps(rows))
    days = [datetime.date(2024, 1, n) for n in (1, 2, 3)]
    texts = {"q": ["½ an apple?", "Mia has\n2 pens. ", "And now?"], "a": ["0.50", "007", "x"], "day": days}
    table = pyarrow.table(texts | {"level": ["hard", "easy", None], "data_source": ["gsm8k"] * 3})
    pyarrow.parquet.write_table(table, tmp_path / "texts.parquet")
    return [
        {"path": str(tmp_path / "chats.json"), "type": "json", "input": "prompt", "output": "truth"},
        {"path": str(tmp_path / "texts.parquet"), "type": "parquet", "input": "q", "output": "a"},
    ]


@pytest.fixture
def keep(tmp_path, make_folder, sources, monkeypatch):
    """Keeps the questions of which so many of ten responses are right; returns where, and the questions asked."""

    def keep(rights, folder=None, **constants):
        path, folder = tmp_path / "new/medium.parquet", str(folder or make_folder())
        constants = dict(MODEL=folder, EVAL_DATASETS=sources, MAX_PROMPT_LENGTH=200, EVAL_SAMPLES=10) | constants
        for name, value in (difficulty.CONSTANTS | {"KEEP_IN": str(path)} | constants).items():
            monkeypatch.setattr(dapo, name, value, raising=False)
        difficulty.check_file()
        questions = evaluate.questions_for(folder)
        rows = difficulty.rows_of(questions, folder)
        difficulty.keep([group(n, 10, asked) for n, asked in zip(rights, questions, strict=True)], rows)
        return path, questions

    return keep


@pytest.mark.parametrize("template", [True, False])
def test_the_file_is_read_as_the_data_sets_were(template, keep, make_folder, sources, set_reward, capsys):
    """The same messages, answers, and other columns in the same order; without a chat template, a model reads only the
    last message, so that several rows are the same prompt, and none is too long."""
    set_reward(lambda **columns: 0.0)  # not our own, for which no other columns are read
    folder = make_folder()
    if not template:
        (folder / "chat_template.jinja").unlink()
    expected = [
        (messages, answer, {"data_source": source["path"]} | columns)
        for source in sources
        for messages, answer, columns in dapo.load_rows(source)
        if messages != LONG_CHAT or not template
    ]
    assert len(expected) == 8 - template
    path, questions = keep([1, 5, 9, 3, 4, 8, 7, 6][: len(expected)], folder)
    found = dapo.load_rows(MEDIUM | {"path": str(path)})
    assert [row[:2] for row in found] == [row[:2] for row in expected]
    for (*_, columns), (*_, original), rights in zip(found, expected, [1, 5, 9, 3, 4, 8, 7, 6]):
        assert columns.pop("pass_rate") == rights / 10
        # What no type of parquet fits has become JSON; what a row lacks is None.
        original |= {name: json.dumps(original.get(name)) for name in ("level", "meta", "n")}
        assert {name: value for name, value in columns.items() if value is not None} == original
    tokenizer = load(folder)[1]
    again = dapo.load_questions([MEDIUM | {"path": str(path)}], tokenizer)
    assert [(q.text, q.answer, q.prompt.tolist(), q.prompt_end) for q in again] == [
        (q.text, q.answer, q.prompt.tolist(), q.prompt_end) for q in questions
    ]
    source = json.loads(capsys.readouterr().out.rpartition("TRAIN_DATASETS = [")[2].rstrip().rstrip("]"))
    assert source == MEDIUM | {"path": str(path)}


def test_both_bounds_are_kept_and_the_order(keep, capsys):
    path, _ = keep([0, 1, 2, 3, 6, 7, 10], PASS_RATE_LOW=0.1, PASS_RATE_HIGH=0.6)
    table = pyarrow.parquet.read_table(path)
    assert table["pass_rate"].to_pylist() == [0.1, 0.2, 0.3, 0.6]
    assert [json.loads(table["question"][0].as_py())[0], table["question"][3].as_py()] == [OTHER_CHAT[0], "½ an apple?"]
    assert "4 of 7 questions have a pass rate from 0.1 to 0.6" in capsys.readouterr().out
    assert [*path.parent.iterdir()] == [path]


def test_a_kept_file_can_be_filtered_again(keep, sources, tmp_path):
    """By a better model, say: the pass rate is the new one, the data set still the first one, and nothing is lost,
    though our own judge looks at no other columns."""
    first, _ = keep([4] * 7)
    second, _ = keep([3] * 7, EVAL_DATASETS=[MEDIUM | {"path": str(first)}], KEEP_IN=str(tmp_path / "second.parquet"))
    (tmp_path / "new/medium.parquet").rename(tmp_path / "first.parquet")
    before, after = (pyarrow.parquet.read_table(tmp_path / f"{name}.parquet") for name in ("first", "second"))
    assert after["pass_rate"].to_pylist() == [0.3] * 7
    assert before.drop_columns("pass_rate") == after.drop_columns("pass_rate")
    assert before["extra_info"][0].as_py()["data_source"] == sources[0]["path"]
    assert before["extra_info"][5].as_py()["data_source"] == "gsm8k"


def test_if_no_question_is_in_between_no_file_is_written(keep, tmp_path, capsys):
    said = stop_of(keep, [0, 0, 0, 10, 10, 10, 10], capsys)
    assert "0 of 7 questions have a pass rate from 0.1 to 0.9: KEEP_IN=" in said
    assert not list((tmp_path / "new").iterdir())


def test_a_full_disk_leaves_no_half_of_a_file(keep, tmp_path, monkeypatch, capsys):
    def write(table, place):
        if not isinstance(place, io.BytesIO):
            place.write_bytes(b"half")
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(pyarrow.parquet, "write_table", write)
    said = stop_of(keep, [5] * 7, capsys)
    assert f"KEEP_IN={tmp_path / 'new/medium.parquet'} cannot be written: OSError" in said and "No space left" in said
    assert not list((tmp_path / "new").iterdir())


@pytest.fixture
def settings(sources, main, parity):
    """The command line of a tiny evaluation of a model; `main` restores the constants."""
    constants = dict(EVAL_DATASETS=sources, MAX_PROMPT_LENGTH=200, MAX_RESPONSE_LENGTH=8, OVERLONG_BUFFER_LENGTH=4)
    return [f"--{name}={value}" for name, value in (constants | {"DEVICE": "cpu", "EVAL_SAMPLES": 6}).items()]


def test_the_last_model_is_described_and_its_questions_are_kept(settings, make_folder, tmp_path, capsys):
    """As a recipe says where. What is said of it follows the report, which is as without it."""
    first, last, path = str(make_folder()), str(make_folder(seed=1)), tmp_path / "medium.parquet"
    recipe = tmp_path / "recipe.py"
    recipe.write_text(f"import pathlib\nKEEP_IN = pathlib.Path({str(path)!r})\nPASS_RATE_LOW = 0\n")
    constants, rules = dict(dapo.CONSTANTS), dict(dapo.RULES)
    evaluate.main([*settings, first, last, str(recipe), "--PASS_RATE_HIGH=1", "--GROUP_SIZE=3"])
    assert (dapo.CONSTANTS, dapo.RULES) == (constants, rules)
    said = capsys.readouterr().out
    difficulties = said.partition("are not always answered right")[2].partition(f"{last} are right")[2]
    assert f"{first} are right" not in said and difficulties.count(f"{last} are right") == 1  # two data sets
    rates = pyarrow.parquet.read_table(path)["pass_rate"].to_pylist()
    assert len(rates) == 7 and 0 < statistics.fmean(rates) < 1
    counts = bars(difficulties.split("\n\n")[0].splitlines()[1:-1])
    assert {label: count for label, (count, *_) in counts.items()} == {
        str(n): sum(round(6 * rate) == n for rate in rates[:4]) for n in range(7)
    }
    probabilities = [difficulty.gradient_probability(group(round(6 * rate), 6), 3) for rate in rates[:4]]
    assert f"{statistics.fmean(probabilities):.0%} of groups of GROUP_SIZE=3" in difficulties.split("\n\n")[0]
    evaluate.main([*settings, first, "--EVAL_SAMPLES=2"])  # nothing of the earlier call is left
    assert "questions have a pass rate from 0.1 to 0.9\n" in capsys.readouterr().out


def test_one_response_to_each_question_has_no_difficulty(settings, make_folder, capsys):
    evaluate.main([*settings, str(make_folder()), "--EVAL_SAMPLES=1"])
    said = capsys.readouterr().out
    assert "accuracy" in said and "gradient" not in said and "pass rate" not in said


@pytest.mark.parametrize(
    "words, message",
    [
        (["--KEEP_IN=FOLDER/new.parquet", "--EVAL_SAMPLES=1"], "set EVAL_SAMPLES, which is 1, to 16"),
        (["--KEEP_IN=FOLDER/chats.json"], "chats.json exists already: remove it, or name another file"),
        (["--KEEP_IN=FOLDER"], "exists already"),
        (["--KEEP_IN=FOLDER/chats.json/new.parquet"], "chats.json/new.parquet cannot be written"),
        ([f"--KEEP_IN=FOLDER/{250 * 'x'}"], "cannot be written: OSError"),  # with .unfinished, the name is too long
        ([f"--KEEP_IN=FOLDER/{300 * 'x'}"], "cannot be written: OSError"),
        (["--KEEP_IN=~/new.parquet"], "KEEP_IN=~/new.parquet is out of range"),
        (["--PASS_RATE_HIGH=90"], "PASS_RATE_HIGH <= 1"),
        (["--PASS_RATE_LOW=0.5", "--PASS_RATE_HIGH=0.4"], "PASS_RATE_LOW=0.5 is out of range"),
        (["--PASS_RATE_LOW=few"], "PASS_RATE_LOW=few does not fit: it has to be of type float, such as 0.1"),
        (["--KEEP=new.parquet"], "there is no constant KEEP; did you mean KEEP_IN?"),
    ],
)
def test_what_cannot_be_kept_is_refused_before_the_sampling(words, message, settings, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "sample", lambda *parts: pytest.fail("too early"))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    words = [word.replace("FOLDER", str(tmp_path)) for word in words]
    assert message in stop_of(evaluate.main, [*settings, "--MODEL=toy", *words], capsys)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_run_does_not_have_these_constants(settings, capsys):
    assert "there is no constant KEEP_IN" in stop_of(dapo.main, [*settings, "--KEEP_IN=new.parquet"], capsys)

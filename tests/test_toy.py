"""What ships in toy/: questions, tokenizer and model, as make_toy.py describes them."""

import re
import sys

import pyarrow.parquet
import pytest
from conftest import ROOT, load
from conftest import rows as rows_of

import dapo

sys.path.insert(0, str(ROOT / "toy"))
import make_toy  # noqa: E402


@pytest.fixture(scope="module")
def rows():
    return {name: pyarrow.parquet.read_table(ROOT / f"toy/{name}.parquet").to_pylist() for name in ("train", "test")}


def test_questions(rows):
    asked = [row["question"] for row in rows["train"] + rows["test"]]
    assert len(rows["train"]) >= 4000 and len(rows["test"]) == 256
    assert len(set(asked)) == len(asked)


def test_worked_solutions_solve_their_questions(rows):
    """Read anew from the words of the question, not from the program that wrote them."""
    for row in rows["test"]:
        start, *changes = re.findall(r"\w+ (has|\w+) (\d+)", row["question"])
        value = int(start[1])
        for verb, number in changes:
            value += int(number) if verb in make_toy.GAINS else -int(number)
        first, *work, last = row["answer"].split("\n")
        assert first == "Work:" and last == f"#### {value}" and 0 < value < 100
        assert len(work) == len(changes)
        for line in work:
            left, right = line.split("=")
            one, sign, other = re.fullmatch(r"(\d+)([+-])(\d+)", left).groups()
            assert int(one) + int(sign + other) == int(right)


def test_tokenizer_gives_every_answer_back(rows, tokenizer):
    for row in rows["test"]:
        for text in row.values():
            ids = tokenizer(text)["input_ids"]
            assert tokenizer.decode(ids) == text
    assert tokenizer.tokenize("407") == ["4", "0", "7"]
    assert tokenizer.decode(tokenizer("schön, 你好")["input_ids"]) == "schön, 你好"
    assert tokenizer.eos_token == "<|im_end|>"  # which verl requires of every qwen2


def test_longest_solution_fits_the_response_limit(rows, tokenizer):
    longest = max(len(tokenizer(row["answer"])["input_ids"]) + 1 for row in rows["train"])
    assert longest < dapo.MAX_RESPONSE_LENGTH - dapo.OVERLONG_BUFFER_LENGTH


def test_the_model_is_small_and_loads(tokenizer):
    model, _ = load(ROOT / "toy")
    assert model.config.model_type == "qwen2" and 0.5e6 < model.num_parameters() < 2e6
    assert sum(file.stat().st_size for file in (ROOT / "toy").iterdir() if file.is_file()) < 5 * 2**20


def test_kinds_of_answers():
    equations = ["1+2=3", "3+4=7"]
    assert make_toy.make_answer(equations, 7, works=False) == "#### 7"
    work = make_toy.make_answer(equations, 7, works=True)
    assert work == "Work:\n1+2=3\n3+4=7\n#### 7"
    assert make_toy.make_answer(equations, 7, works=True, checks=2) == work + "\nCheck:\n1+2=3\n3+4=7" * 2


@pytest.mark.parametrize("start, right", [("#### 7", True), ("Work:\n1+2=3\n3+4=7\n#### 7", True), ("#### 8", False)])
def test_checks_after_the_answer_change_nothing_for_the_judge(start, right):
    """Wherever the limit cuts them off: what is punished there is length alone."""
    text = start + "\nCheck:\n1+2=3\n3+4=7" * 3
    for end in range(len(start), len(text) + 1):
        assert dapo.compute_score("", text[:end], "7")["acc"] == right, text[:end]


@pytest.mark.slow
def test_the_trainer_learns(main, tmp_path, no_pictures):
    """The default run, with all constants as shipped but the folder."""
    main([f"--OUTPUT_DIR={tmp_path / 'run'}", "--DEVICE=cpu"])
    accuracy = dict(rows_of(tmp_path / "run", "SELECT step, value FROM metrics WHERE name = 'eval/accuracy'"))
    assert accuracy[0] < 0.35 and accuracy[dapo.NUM_STEPS] >= 0.9, accuracy

"""Every number in docs/solutions.md is what the project's functions compute, and the lesson has 45 minutes."""

import itertools
import math
import re
from fractions import Fraction

import pytest
import torch
from conftest import ROOT

import dapo
from reward import compute_score, overlong_penalty

in_both_languages = pytest.mark.parametrize("folder", ["docs", "docs/zh"])
PUSHES = {"none": 0, "up": 1, "down": -1, "无": 0, "往上": 1, "往下": -1}
NONE = {"none", "无"}
ABSENT = "—"  # there is no such response
LENGTHS = 2, 8  # tokens of the two responses in task 3


def text_of(folder, name):
    return (ROOT / folder / name).read_text(encoding="utf-8")


def tables(text):
    """The tables of a page, each a list of rows, each a list of cells; the first row holds the titles."""
    lines = (re.findall(r"^\|.*", block, re.MULTILINE) for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE))
    cells = [[[cell.strip() for cell in line.strip("|").split("|")] for line in table] for table in lines]
    return [[row for row in table if set("".join(row)) != {"-"}] for table in cells]


def solutions(folder):
    """Its tables, without their titles."""
    return [table[1:] for table in tables(text_of(folder, "solutions.md"))]


def numbers(*texts):
    return {*re.findall(r"\d+(?:\.\d+)?", " ".join(texts))}


def double(values):
    return torch.tensor(values, dtype=torch.float64)


def check(cells, values):
    """Each cell holds its value: as a fraction, or rounded to as many decimals as it has."""
    for cell, value in zip(cells, [torch.as_tensor(value).item() for value in values], strict=True):
        if "/" in cell:
            assert Fraction(cell) == pytest.approx(value), cells
        else:
            assert cell == f"{value + 0.0:.{len(cell.partition('.')[2])}f}", (cells, value)  # + 0.0: no -0


@in_both_languages
def test_the_advantages(folder):
    table = solutions(folder)[0]
    for right, *cells in table:
        rewards = double([[1.0] * int(right) + [-1.0] * (8 - int(right))])
        squares = (rewards - rewards.mean()).square().sum()
        advantages = dapo.group_advantages(rewards)[0]
        if right == "8":
            assert cells.pop() == ABSENT
            advantages = advantages[:-1]
        used = advantages[[0, -1]] if right != "8" else advantages[:1]
        check(cells, [rewards.mean(), squares, squares / 7, rewards.std(), *used])
    assert [row[0] for row in table] == ["2", "8"]


def clip_at(a, rho):
    """What policy_loss and clipped_tokens take for one token, with the ratio ρ."""
    return double([[math.log(rho)]]).requires_grad_(), double([[0.0]]), double([a]), double([[1.0]])


def push_of(a, rho):
    """The loss of a token, and the direction in which a step moves its probability: against the gradient."""
    inputs = clip_at(a, rho)
    loss = dapo.policy_loss(*inputs)
    loss.sum().backward()
    push = -inputs[0].grad.sign().item()
    assert (push == 0) == any(held.item() for held in dapo.clipped_tokens(*inputs))
    return loss, push


@in_both_languages
def test_the_clip(folder):
    table = solutions(folder)[1]
    for a, rho, *cells, push in table:
        loss, computed = push_of(float(a), float(rho))
        log_probs, old, _, mask = clip_at(float(a), float(rho))
        ratio = dapo.probability_ratio(log_probs, old, mask)
        clipped = ratio.clamp(1 - dapo.CLIP_RANGE_LOW, 1 + dapo.CLIP_RANGE_HIGH)
        check(cells, [clipped, -float(a) * ratio, -float(a) * clipped, loss])
        assert PUSHES[push] == computed
    assert {(row[0], PUSHES[row[-1]]) for row in table} == {("1", 0), ("1", 1), ("-1", 0), ("-1", -1)}


@in_both_languages
def test_the_clips_of_dapo_and_grpo(folder, monkeypatch):
    """The question below the table of task 2: the same on both pages, with GRPO's end of the clip, and its answers."""
    question = re.compile(r"^A = (\d)\D+ρ = ([\d.]+)[:：] ?(.+)", re.MULTILINE)
    asked, answered = (question.search(text_of(folder, page)) for page in ("sheet.md", "solutions.md"))
    assert asked.groups()[:2] == answered.groups()[:2]
    a, rho = map(float, answered.groups()[:2])
    answers = dict(re.findall(r"(DAPO|GRPO)[:：] ?(\w+)", answered[3]))
    assert PUSHES[answers.pop("DAPO")] == push_of(a, rho)[1]
    high = float(re.search(r"CLIP_RANGE_HIGH = ([\d.]+)", (ROOT / "grpo.py").read_text(encoding="utf-8"))[1])
    assert numbers(asked[3]) == {f"{1 + high:g}"} and asked[3].count("____") >= 2
    monkeypatch.setattr(dapo, "CLIP_RANGE_HIGH", high)
    assert PUSHES[answers.pop("GRPO")] == push_of(a, rho)[1] and not answers


@in_both_languages
def test_the_weights_of_tokens(folder):
    table, mask = solutions(folder)[2], double([[1.0] * n + [0.0] * (max(LENGTHS) - n) for n in LENGTHS])
    for mode, *cells in table:
        losses = torch.zeros_like(mask, requires_grad=True)
        dapo.aggregate_loss(losses, mask, mode).backward()
        check(cells, [losses.grad[0, 0], losses.grad[1, 0], *losses.grad.sum(1)])
    assert [row[0] for row in table] == ["token-mean", "seq-mean-token-sum", "seq-mean-token-mean"]


@in_both_languages
def test_the_length_penalties(folder):
    titles, *rows = tables(text_of(folder, "solutions.md"))[3]
    lengths = [int(re.match(r"\d+", title)[0]) for title in titles[1:]]
    penalties = [overlong_penalty(n, dapo.MAX_RESPONSE_LENGTH, dapo.OVERLONG_BUFFER_LENGTH) for n in lengths]
    right = compute_score("toy", "#### 7", "7")["score"]
    for (_, *cells), base in zip(rows, [0, right], strict=True):
        check(cells, [base + penalty for penalty in penalties])


def value_of(formula):
    formula = re.sub(r"√([\d.]+)", r"math.sqrt(\1)", formula.replace("·", "*").replace("²", "**2"))
    return eval(formula, {"math": math, "max": max})


def equations(text):
    """What stands in backticks and has an equals sign, at which it is split."""
    return [span.split(" = ") for span in re.findall(r"`([^`\n]+)`", text) if " = " in span]


@in_both_languages
def test_the_working(folder):
    """Each equation holds, to as many decimals as its right side has."""
    found = equations(text_of(folder, "solutions.md"))
    for left, right in itertools.chain.from_iterable(map(itertools.pairwise, found)):
        if re.fullmatch(r"-?[\d.]+", right):
            assert round(value_of(left), len(right.partition(".")[2])) == float(right), (left, right)
        else:
            assert value_of(left) == pytest.approx(value_of(right)), (left, right)
    assert len(found) > 20 and found == equations(text_of("docs", "solutions.md"))


@in_both_languages
def test_no_other_number_stands_in_the_solutions(folder):
    """Those in the sentences of a section, and those that its equations begin with, are in its table, are what an
    equation ends with, or are constants."""
    _, *sections = re.split(r"^## ", text_of(folder, "solutions.md"), flags=re.MULTILINE)
    assert len(sections) == 4
    constants = dapo.CLIP_RANGE_LOW, dapo.CLIP_RANGE_HIGH, dapo.OVERLONG_BUFFER_LENGTH, *LENGTHS
    for section in sections:
        (table,), found = tables(section), equations(section)
        results = itertools.chain(*(results for _, *results in found))
        known = numbers(*itertools.chain(*table), *results, *map(str, constants))
        said = re.sub(r"^\|.*|`[^`\n]+`|\A\d[.]", "", section, flags=re.MULTILINE)
        assert numbers(said, *(begin for begin, *_ in found)) <= known


@in_both_languages
def test_the_sheet_has_the_same_tasks(folder):
    """The same tables, with empty cells; what is given is the titles and the first column, in task 2 the first two."""
    sheet, solved = tables(text_of(folder, "sheet.md")), tables(text_of(folder, "solutions.md"))
    assert len(sheet) == 4
    for number, (asked, answered) in enumerate(zip(sheet, solved, strict=True)):
        given = 2 if number == 1 else 1
        assert asked[0] == answered[0]
        for row, solution in zip(asked[1:], answered[1:], strict=True):
            assert row == solution[:given] + [""] * (len(solution) - given) and all(solution)


@in_both_languages
def test_the_numbers_of_the_sheet(folder):
    """They are dapo.py's: the rewards, the ends of the clip, the limit of a response's length, the size of a group, and
    the number of updates; or those of the tasks, of rows of the second, of its question, and of its hint."""
    low, high, limit = 1 - dapo.CLIP_RANGE_LOW, 1 + dapo.CLIP_RANGE_HIGH, dapo.MAX_RESPONSE_LENGTH
    buffer, group = dapo.OVERLONG_BUFFER_LENGTH, dapo.GROUP_SIZE
    said = numbers(re.sub(r"^[|#].*", "", text_of(folder, "sheet.md"), flags=re.MULTILINE))
    updates, right = dapo.MINI_BATCHES * dapo.DAPO_EPOCHS, compute_score("toy", "#### 7", "7")["score"]
    assert -right == compute_score("toy", "#### 8", "7")["score"]
    expected = low, high, limit, buffer, limit - buffer, group, group - 1, updates, right, 0, *LENGTHS
    asked = 1, 2, 3, 4, 1.5, 1.25, 1.2, 0.01  # the tasks, the first row, the question, the change of ρ
    assert said == {f"{number:g}" for number in expected + asked}


@in_both_languages
def test_the_lesson_takes_45_minutes(folder):
    """Each part begins when the one before it ends."""
    parts = [re.findall(r"\d+", row[0]) for row in tables(text_of(folder, "lesson.md"))[0][1:]]
    starts, ends = zip(*[map(int, part) for part in parts])
    assert starts == (0, *ends[:-1]) and ends[-1] == 45 and all(start < end for start, end in zip(starts, ends))

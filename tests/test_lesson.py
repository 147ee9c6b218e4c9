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
            assert cells.pop() in NONE
            advantages = advantages[:-1]
        used = advantages[[0, -1]] if right != "8" else advantages[:1]
        check(cells, [rewards.mean(), squares, squares / 7, rewards.std(), *used])
    assert [row[0] for row in table] == ["2", "6", "8"]


@in_both_languages
def test_the_clip(folder):
    table = solutions(folder)[1]
    for a, rho, *cells, push in table:
        log_probs = double([[math.log(float(rho))]]).requires_grad_()
        inputs = log_probs, double([[0.0]]), double([float(a)]), double([[1.0]])
        loss = dapo.policy_loss(*inputs)
        loss.sum().backward()
        ratio = dapo.probability_ratio(log_probs.detach(), inputs[1], inputs[3])
        clipped = ratio.clamp(1 - dapo.CLIP_RANGE_LOW, 1 + dapo.CLIP_RANGE_HIGH)
        check(cells, [clipped, -float(a) * ratio, -float(a) * clipped, loss])
        assert PUSHES[push] == -log_probs.grad.sign().item()  # a step goes against the gradient
        assert (push in NONE) == any(held.item() for held in dapo.clipped_tokens(*inputs))
    assert {(row[0], PUSHES[row[-1]]) for row in table} == {("1", 0), ("1", 1), ("-1", 0), ("-1", -1)}


@in_both_languages
def test_the_weights_of_tokens(folder):
    table, mask = solutions(folder)[2], double([[1.0] * 2 + [0.0] * 6, [1.0] * 8])
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
    right, wrong = (compute_score("toy", f"#### {answer}", "7")["score"] for answer in "78")
    for (_, *cells), base in zip(rows, [0, right, wrong], strict=True):
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
    constants = dapo.CLIP_RANGE_LOW, dapo.CLIP_RANGE_HIGH, dapo.OVERLONG_BUFFER_LENGTH
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
    """They are dapo.py's: the ends of the clip, the limit of a response's length, and the size of a group."""
    low, high, limit = 1 - dapo.CLIP_RANGE_LOW, 1 + dapo.CLIP_RANGE_HIGH, dapo.MAX_RESPONSE_LENGTH
    buffer, group = dapo.OVERLONG_BUFFER_LENGTH, dapo.GROUP_SIZE
    said = numbers(re.sub(r"^[|#].*", "", text_of(folder, "sheet.md"), flags=re.MULTILINE))
    expected = low, high, limit, buffer, limit - buffer, group, group - 1, 0, 1, 2  # 2: tokens of the short response
    assert said == {f"{number:g}" for number in expected}


@in_both_languages
def test_the_lesson_takes_45_minutes(folder):
    """Each part begins when the one before it ends."""
    parts = [re.findall(r"\d+", row[0]) for row in tables(text_of(folder, "lesson.md"))[0][1:]]
    starts, ends = zip(*[map(int, part) for part in parts])
    assert starts == (0, *ends[:-1]) and ends[-1] == 45 and all(start < end for start, end in zip(starts, ends))

import json
from pathlib import Path

import pytest

import reward

GOLDEN = json.loads((Path(__file__).parent / "golden_verl.json").read_text())


@pytest.mark.parametrize("case", GOLDEN["overlong"])
def test_overlong_penalty_is_verls(case):
    penalty = reward.overlong_penalty(case["length"], case["max_length"], case["buffer"], case["factor"])
    assert penalty == pytest.approx(case["penalty"], abs=1e-6)


@pytest.mark.parametrize(
    "length, penalty", [(60, 0.0), (80, 0.0), (88, -0.25), (96, -0.5), (112, -1.0), (113, -1.0), (500, -1.0)]
)
def test_overlong_penalty_by_hand(length, penalty):
    assert reward.overlong_penalty(length, 112, 32) == pytest.approx(penalty)
    assert reward.overlong_penalty(length, 112, 32, factor=0.5) == pytest.approx(penalty / 2)
    assert reward.overlong_penalty(length, 112, 0) == 0


@pytest.mark.parametrize(
    "text, answer",
    [
        ("13+7=20\n#### 20", "20"),
        ("#### 3\nNo, wait.\n#### 4", "4"),
        (r"so it is \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed{1}, then \boxed {2}", "2"),
        ("Answer: 34.", "34"),
        ("the answer is **34**.", "34"),
        ("**Answer: 34.**", "34"),
        ("**Answer:** 34", "34"),
        ("The final answer is $7$", "7"),
        ("the answer is: 7\nand more", "7"),
        ("答案：42", "42"),
        ("答案是 42", "42"),
        (r"Answer: \boxed{9}", "9"),
        ("there are 12 apples", None),
        ("####", None),
        ("#### \n5", None),
        (r"\boxed{", None),
        (r"\boxed{}", None),
        ("", None),
    ],
)
def test_extract_answer(text, answer):
    assert reward.extract_answer(text) == answer


@pytest.mark.parametrize(
    "one, other, same",
    [
        ("20", "20", True),
        ("20", "20.0", True),
        ("1,234", "1234", True),
        ("$12", "12", True),
        ("7.", "7", True),
        ("+5", "5", True),
        ("1/2", "0.5", True),
        ("-3", "3", False),
        ("0.333", "1/3", False),
        ("12345678901234567", "12345678901234568", False),
        ("3/0", "0", False),
        ("2 0", "20", False),
        ("5 or 6", "5", False),
        ("Yes", "yes", True),
        ("B", "C", False),
        ("1_000", "1000", False),
        ("1,23", "123", False),
        ("3" * 5000, "34", False),
        ("1." + "3" * 5000, "4/3", False),
    ],
)
def test_answers_match(one, other, same):
    assert reward.answers_match(one, other) is same and reward.answers_match(other, one) is same


def test_compute_score_takes_gsm8k_ground_truths():
    right = reward.compute_score("gsm8k", "I say\n#### 1,000", "a lot of work\n#### 1000")
    assert right == {"score": 1.0, "acc": True, "pred": "1,000"}
    assert reward.compute_score("gsm8k", "1000", "#### 1000") == {"score": -1.0, "acc": False, "pred": ""}
    assert reward.compute_score("math", "Answer: 9", "8")["score"] == -1.0

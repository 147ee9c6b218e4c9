r"""Sixty responses and how reward.py, math-verify alone and verl's rule for DAPO judge them, as a Markdown table.

    pip install verl   # in an environment of its own; without it that column stays empty
    python benchmarks/verdicts.py

math-verify alone is verify(parse(truth), parse(response)) with its defaults, the truth between dollar signs; verl's
rule is verl.utils.reward_score.math_dapo.compute_score. "Should be" is what a person would say. The responses were
chosen by whoever wrote reward.py, so the counts say what differs and not how often it matters.
"""

import sys
from pathlib import Path

import math_verify

sys.path.insert(0, str(Path(__file__).parent.parent))
import reward  # noqa: E402

try:
    from verl.utils.reward_score import math_dapo
except ImportError:
    math_dapo = None

RIGHT = [  # response, truth
    (r"So it is \boxed{34}.", "34"),
    ("**Answer:** 34", "34"),
    ("Answer: 34.", "34"),
    ("#### 34", "34"),
    ("The answer is 34.", "34"),
    ("答案：34", "34"),
    (r"\boxed 34", "34"),
    ("Answer: ３４", "34"),
    ("Answer: 1,234", "1234"),
    (r"Answer: 1\,234", "1234"),
    ("Answer: 12 dollars", "12"),
    ("Answer: 12 apples", "12"),
    ("Answer: 12%", r"12\%"),
    ("Answer: 1e3", "1000"),
    ("Answer: 1/2", r"\frac{1}{2}"),
    (r"Answer: \dfrac{1}{2}", "0.5"),
    (r"Answer: \frac12", r"\frac{1}{2}"),
    (r"Answer: 1\frac{1}{2}", "1.5"),
    ("Answer: x=7", "7"),
    (r"Answer: \text{12}", "12"),
    (r"Answer: 90^\circ", "90"),
    (r"Answer: 2\sqrt{3}", r"\sqrt{12}"),
    (r"Answer: $\frac{\sqrt{2}}{2}$", r"\frac{1}{\sqrt{2}}"),
    ("Answer: $(x+1)^2$", "x^2+2x+1"),
    ("Answer: $(1, 2)$", "(1,2)"),
    (r"Answer: $\{2,1\}$", r"\{1,2\}"),
    (r"Answer: $(-\infty, 3]$", r"(-\infty,3]"),
    ("Answer: Yes", "yes"),
    ("Answer: (B)", "B"),
    (r"Answer: \text{no solution}", "No solution"),
    ("Work: 13+21=34\n#### 34", "a solution\n#### 34"),
    ("Answer: 34, because 2*17 = 34", "34"),
    (r"Answer: $0.\overline{3}$", "1/3"),
    ("Answer: 12 hrs", "12 hours"),
    ("Answer: thirty-four", "34"),
]
WRONG = [
    ("Answer: 5 or 6", "5"),
    (r"\boxed{5} or \boxed{6}", "5"),
    ("Answer: 5, 6", "5"),
    (r"Answer: $5\text{ or }6$", "6"),
    ("I have seen 12 apples and 34 pears", "34"),
    ("Answer: 33\nThere are 34 pupils", "34"),
    ("<think>Answer: 34</think> I do not know", "34"),
    ("Answer: 13+21", "34"),
    (r"Answer: $2\cdot17$", "34"),
    ("Answer: 0.333333", "1/3"),
    ("Answer: 1.414214", r"\sqrt{2}"),
    ("Answer: 3.14159265", r"\pi"),
    ("Answer: 12345678901234567", "12345678901234568"),
    ("Answer: 3/0", "0"),
    ("Answer: (2,1)", "(1,2)"),
    (r"Answer: $\{1,2\}$", "(1,2)"),
    ("Answer: [0,1]", "[0,1)"),
    ("Answer: no", "on"),
    ("Answer: 5m", "5"),
    ("Answer: 12 cents", "12 dollars"),
    ("Answer: 5 thousand", "5"),
    ("Answer: 2 0", "20"),
    ("Answer: 1_000", "1000"),
    ("Answer: -x", "x"),
    ("Answer: A, B", "A"),
]


def verdicts(response, truth):
    """Of reward.py, math-verify and verl's rule; None: not installed."""
    yield reward.compute_score("", response, truth)["acc"]
    yield math_verify.verify(math_verify.parse(f"${truth}$"), math_verify.parse(response))
    yield math_dapo and math_dapo.compute_score(response, truth)["acc"]


def cell(text):
    return "`" + text.replace("\n", " ⏎ ").replace("|", "\\|") + "`"


if __name__ == "__main__":
    print("| response | truth | should be | reward.py | math-verify | verl |\n|---|---|---|---|---|---|")
    mistakes = [0, 0, 0]
    for right, cases in (True, RIGHT), (False, WRONG):
        for response, truth in cases:
            judged = list(verdicts(response, truth))
            mistakes = [count + (verdict == (not right)) for count, verdict in zip(mistakes, judged)]
            signs = ["" if verdict is None else "right" if verdict else "wrong" for verdict in judged]
            signs = [f"**{sign}**" if verdict == (not right) else sign for sign, verdict in zip(signs, judged)]
            print(f"| {cell(response)} | {cell(truth)} | {'right' if right else 'wrong'} | {' | '.join(signs)} |")
    print(f"\n{len(RIGHT) + len(WRONG)} responses; mistakes: reward.py %d, math-verify %d, verl %d" % tuple(mistakes))

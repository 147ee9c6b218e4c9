"""How long reward.py takes to judge 4,096 responses, 16 to each of 256 questions, on one core.

    python benchmarks/reward.py

A response is 2,000 characters of working, formulas included, and an announced answer: the right one, the right one
written otherwise, or a wrong one. The truth is a whole number, as in GSM8K and DAPO-Math-17k, or for one question in
20, as in MATH, a formula, which math-verify compares where the text is not the same. Median of five rounds, each with
numbers that have not been judged before.
"""

import argparse
import random
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import reward  # noqa: E402

WORKING = r"So we have $x_{%d} = \frac{%d}{7} + 3^2$, that is {%d} in all. The next step is to add what is left. "
FORMS = [r"\boxed{%s}", "#### %s", "**Answer:** %s", "The final answer is $%s$.", "答案：%s"]


def responses(count, formulas, seed):
    """(response, truth) pairs."""
    rng = random.Random(seed)
    for number in range(count // 16):
        value, formula = rng.randrange(1000, 10**6), formulas and number % 20 == 0
        truth = rf"{value}\sqrt{{2}}" if formula else str(value)
        forms = [truth, rf"\sqrt{{2}}\cdot {value}" if formula else f"{value:,}", f"{value}.5", str(value + 1)]
        for _ in range(16):
            working = "".join(WORKING % tuple(rng.sample(range(99), 3)) for _ in range(20))
            yield working + rng.choice(FORMS) % rng.choice(forms), truth


def seconds(count, formulas, seed):
    pairs = list(responses(count, formulas, seed))
    start = time.perf_counter()
    right = sum(reward.compute_score("", text, truth)["acc"] for text, truth in pairs)
    assert count * 0.4 < right < count * 0.6
    return time.perf_counter() - start


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    reward.answers_match("x+1", "1+x")  # starts the processes that compare formulas
    for name, formulas in ("numbers only", False), ("one formula in 20", True):
        rounds = [seconds(4096, formulas, seed) for seed in range(5)]
        print(f"{name}: {statistics.median(rounds):.2f} s for 4,096 responses ({min(rounds):.2f} to {max(rounds):.2f})")

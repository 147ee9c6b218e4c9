"""Rule-based rewards: find a response's final answer, judge it, and punish overlong responses.

A model is right if its final answer is the ground truth, and nothing else about its response counts (eq. 7 of the
paper, arXiv 2503.14476). Numbers are compared exactly, and everything else as text: symbolic LaTeX is not understood.
"""

import re
from fractions import Fraction

# What announces a final answer. The text after the last one counts, up to the end of its line.
MARKER = re.compile(r"####|\\boxed\s*(?=\{)|(?:final )?answer(?: is\b|\s*:)|答案(?:是|为|[:：])", re.IGNORECASE)
NUMBER = re.compile(r"[+-]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d*)?|[+-]?\.\d+", re.ASCII)


def extract_answer(text):
    r"""The final answer that a response announces: `#### 7`, `\boxed{7}`, `Answer: 7`, `the answer is 7`, `答案：7`.

    The last announcement counts. None where there is none or nothing follows it: the last number somewhere in a text
    is not an answer, and taking it for one would reward guessing.
    """
    markers = list(MARKER.finditer(text))
    if not markers:
        return None
    after = text[markers[-1].end() :]
    if markers[-1].group().startswith("\\boxed"):
        answer = inside_braces(after)
    else:
        answer = after.lstrip(" \t*:：").partition("\n")[0]
    answer = answer.strip().rstrip(".").strip("*$ ").rstrip(".")
    return answer or None


def inside_braces(text):
    """What stands between the brace that `text` begins with and the one that closes it; "" where none does."""
    depth = 0
    for position, character in enumerate(text):
        depth += {"{": 1, "}": -1}.get(character, 0)
        if depth == 0:
            return text[1:position]
    return ""


def answers_match(prediction, ground_truth):
    """Whether two answers are the same number, or failing that the same text, case and white space apart."""
    numbers = as_number(prediction), as_number(ground_truth)
    if None not in numbers:
        return numbers[0] == numbers[1]
    return as_text(prediction) == as_text(ground_truth)


def as_number(answer):
    """The Fraction that `1,234`, `-0.5`, `$7`, `7.` or `1/2` writes, or None."""
    if len(answer) > 1000:  # int() refuses thousands of digits
        return None
    parts = answer.replace("$", "").strip().split("/")
    if len(parts) > 2 or not all(NUMBER.fullmatch(part.strip()) for part in parts):
        return None
    values = [Fraction(part.strip().replace(",", "")) for part in parts]
    if len(values) == 1:
        return values[0]
    return values[0] / values[1] if values[1] else None


def as_text(answer):
    return " ".join(answer.casefold().rstrip(".").split())


def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    """Judges a response: {"score": 1.0 or -1.0, "acc": bool, "pred": str}, as verl's custom reward functions do.

    A ground truth in GSM8K's form, a worked solution that ends in `#### 42`, stands for its answer.
    """
    prediction = extract_answer(solution_str)
    truth = extract_answer(ground_truth) if "####" in ground_truth else ground_truth
    right = prediction is not None and truth is not None and answers_match(prediction, truth)
    return {"score": 1.0 if right else -1.0, "acc": right, "pred": prediction or ""}


def overlong_penalty(length, max_length, buffer_length, factor=1.0):
    """The soft overlong punishment (eq. 13), to be added to the reward of a response of `length` tokens.

    0 up to max_length - buffer_length, from there falling evenly to -factor at max_length, and no further. With a
    buffer_length of 0 there is no punishment.
    """
    if buffer_length == 0:
        return 0.0
    excess = length - (max_length - buffer_length)
    return -factor * min(max(excess / buffer_length, 0.0), 1.0)

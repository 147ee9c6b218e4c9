"""The difficulty of questions for a model: how often it gets each of them right, and a file of those in between.

tools.evaluate prints this if EVAL_SAMPLES is above 1. A question that the model always or never gets right has groups
without a gradient; dynamic sampling drops them, but only after sampling them.
"""

import io
import itertools
import json
import math
import statistics
from collections import Counter
from pathlib import Path

import dapo  # isort: skip  (before torch, for Windows)
import pyarrow.parquet
import transformers

CONSTANTS = {  # set like those of dapo.py, and only for tools.evaluate
    "KEEP_IN": "",  # a new parquet file for the questions whose pass rate is from the first to the second; empty: none
    "PASS_RATE_LOW": 0.1,  # the pass rate is the share of right responses among EVAL_SAMPLES
    "PASS_RATE_HIGH": 0.9,
}
RULES = {
    "KEEP_IN": "not KEEP_IN.startswith('~')",
    "PASS_RATE_LOW": "0 <= PASS_RATE_LOW <= PASS_RATE_HIGH <= 1",
}
BAR = 40  # signs in the longest bar


def read_command_line(words):
    """dapo.read_command_line with the constants above, which are then in dapo, too. A run does not have them."""
    theirs = dapo.CONSTANTS, dapo.RULES
    dapo.CONSTANTS, dapo.RULES = dapo.CONSTANTS | CONSTANTS, dapo.RULES | RULES
    vars(dapo).update(CONSTANTS)
    try:
        return dapo.read_command_line(words)
    finally:
        dapo.CONSTANTS, dapo.RULES = theirs


def check_file():
    """Refuses, before the sampling, what could not be written after it."""
    path = Path(dapo.KEEP_IN)
    if dapo.EVAL_SAMPLES == 1:
        dapo.fail(f"KEEP_IN={path} needs several responses to each question: set EVAL_SAMPLES, which is 1, to 16")
    with dapo.explained(f"KEEP_IN={path} cannot be written"):
        if path.exists():
            dapo.fail(f"KEEP_IN={path} exists already: remove it, or name another file")
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f"{path.name}.unfinished")  # as dapo.complete calls it
        unfinished.touch()
        unfinished.unlink()


# ---- How difficult they are -----------------------------------------------------------------------------------------


def pass_rate(group):
    return statistics.fmean(response.accuracy for response in group)


def describe(model, groups):
    """A histogram of each data set, and the share of its groups that would have a gradient."""
    lines = []
    for path in dict.fromkeys(group[0].question.source for group in groups):
        own = [group for group in groups if group[0].question.source == path]
        smallest, size = min(map(len, own)), dapo.GROUP_SIZE
        share = statistics.fmean(gradient_probability(group, size) for group in own)
        lines += ["", f"{path}: how many of {max(map(len, own))} responses by {model} are right", *histogram(own)]
        said = f"{share:.0%} of groups of GROUP_SIZE={size} would have a gradient: not all responses are equally good"
        lines += [said + (f" (by only {smallest} samples: on average too low)" if smallest < size else "")]
    return "\n".join(lines)


def histogram(groups):
    """A line for each number of right responses, or, above 16 samples, for each of at most 15 ranges, 0, and all.

    What a reward function that grades has between 0 and 1 is rounded to a whole number, but not to 0 or all.
    """
    k = max(map(len, groups))
    width = math.ceil((k - 1) / 15)
    ranges = [range(1), *(range(low, min(low + width, k)) for low in range(1, k, width)), range(k, k + 1)]
    rates = [pass_rate(group) for group in groups]
    rights = [0 if rate <= 0 else k if rate >= 1 else min(max(round(rate * k), 1), k - 1) for rate in rates]
    counts = [sum(right in numbers for right in rights) for numbers in ranges]
    lines = ["  right  questions"]
    for numbers, count in zip(ranges, counts):
        label = f"{numbers[0]}" if len(numbers) == 1 else f"{numbers[0]}-{numbers[-1]}"
        bar = "#" * math.ceil(BAR * count / max(counts))
        lines.append(f"  {label:>5}  {count:>9}  {count / len(groups):>4.0%}  {bar}".rstrip())
    return lines


def gradient_probability(group, size):
    """The probability that `size` responses to a question are not all equal, estimated from its k responses.

    It is the share of all choices of `size` among the k, without bias; with c of them right, it is
    1 - C(c, size) / C(k, size) - C(k - c, size) / C(k, size). If k is smaller, it is 1 - p^size - (1 - p)^size with
    p = c / k: on average too low, as this is concave in p.
    """
    k, counts = len(group), Counter(response.signal for response in group).values()
    if size <= k:
        return 1 - sum(math.comb(count, size) for count in counts) / math.comb(k, size)
    return 1 - sum((count / k) ** size for count in counts)


# ---- The file of those in between -----------------------------------------------------------------------------------


def rows_of(questions, path):
    """{question: (chat messages, columns)} as the data sets have them, for the model in `path`.

    A Question has only the text of its last message. Both are in the same order, but some rows are no questions: those
    that are too long for the model, for example.
    """
    tokenizer = transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=dapo.TRUST_REMOTE_CODE)
    rows, found = itertools.chain.from_iterable(map(dapo.load_rows, dapo.EVAL_DATASETS)), {}
    judge, dapo.REWARD = dapo.REWARD, None  # load_rows reads the other columns for any judge but dapo's own
    try:
        for question in questions:
            asked = question.text, question.answer, question.prompt.tolist()
            for messages, answer, columns in rows:  # goes on after the last one found
                if (messages[-1]["content"], answer, dapo.read_prompt(tokenizer, messages)[1]) == asked:
                    found[question] = messages, columns
                    break
    finally:
        dapo.REWARD = judge
    return found


def keep(groups, rows):
    """Writes the questions with a pass rate in between to KEEP_IN, in their order; the other columns in extra_info."""
    path, low, high = Path(dapo.KEEP_IN), dapo.PASS_RATE_LOW, dapo.PASS_RATE_HIGH
    kept = [(pass_rate(group), group[0].question) for group in groups if low <= pass_rate(group) <= high]
    said = f"{len(kept)} of {len(groups)} questions have a pass rate from {low} to {high}"
    if not dapo.KEEP_IN:
        return dapo.say(said)
    if not kept:
        dapo.fail(f"{said}: KEEP_IN={path} is not written; set other values of PASS_RATE_LOW and PASS_RATE_HIGH")
    extras = [{"data_source": question.source} | rows[question][1] for _, question in kept]
    names = dict.fromkeys(name for extra in extras for name in extra if name != "pass_rate")  # of an earlier time
    columns = {
        "question": [as_text(rows[question][0]) for _, question in kept],
        "answer": [question.answer for _, question in kept],
        "pass_rate": [rate for rate, _ in kept],
    }
    others = [as_array([extra.get(name) for extra in extras]) for name in names]
    columns["extra_info"] = pyarrow.StructArray.from_arrays(others, [*names])
    with dapo.explained(f"KEEP_IN={path} cannot be written"), dapo.complete(path) as unfinished:
        pyarrow.parquet.write_table(pyarrow.table(columns), unfinished)
    source = {"path": dapo.KEEP_IN, "type": "parquet", "input": "question", "output": "answer"}
    dapo.say(f"{said}: a recipe names them as\nTRAIN_DATASETS = [{json.dumps(source, ensure_ascii=False)}]")


def as_text(messages):
    """Chat messages as what dapo.chat_messages makes them of: text if they are one question, else JSON."""
    text = messages[-1]["content"]
    return text if dapo.chat_messages(text) == messages else json.dumps(messages, ensure_ascii=False, default=str)


def as_array(values):
    """A column of a parquet file: the values or, if parquet has no type for them all, their JSON."""
    try:
        array = pyarrow.array(values)
        pyarrow.parquet.write_table(pyarrow.table({"column": array}), io.BytesIO())
        return array
    except Exception:  # Arrow's own errors, OverflowError, UnicodeEncodeError
        return pyarrow.array([json.dumps(value, default=str) for value in values])

r"""Rule-based rewards: find a response's final answer, judge it, and punish overlong responses.

A model is right if its final answer is the ground truth, and nothing else about its response counts (eq. 7 of the
paper, arXiv 2503.14476). This is its only teacher, so a way to be called right without being right is what it learns.

    extract_answer   the last \boxed{...}, "#### ...", "Answer: ..." or the like in a response, never just some number
    answers_match    exact for numbers, the same text for words, symbolic (math-verify) for other mathematics
    compute_score    both in one, with the signature of verl's reward functions; trl_reward is the same for TRL

Left out: converting units, repeating decimals, numbers to another base.
"""

import faulthandler
import functools
import json
import os
import re
import signal
import subprocess
import sys
import threading
from fractions import Fraction

# ---- The answer in a response ---------------------------------------------------------------------------------------

MARKER = re.compile(
    r"####+|\\(?:boxed|fbox)(?![a-z])|answer[*_ ]*(?:[:：]|is\b)|答案[*_ ]*(?:[:：]|是|为)", re.IGNORECASE
)
BRACE = re.compile(r"\\.|[{}]", re.DOTALL)  # a brace, or something escaped, which is none
SENTENCE_END = re.compile(r"\.\s|。|,? (?:because|since)\b")
DECORATION = ' \t\r\n*_`"“”'
FORMULA = re.compile(r"\$\$(.+)\$\$|\$([^$]+)\$|\\\((.+)\\\)|\\\[(.+)\\\]", re.DOTALL)


def extract_answer(text):
    r"""The final answer that a response announces, as text, or None.

    Announced by `\boxed{7}` (or \fbox), `#### 7`, `Answer: 7`, `the answer is 7`, `答案：7` or `答案是 7`. The last
    announcement counts, and after a `</think>` only what follows it. None where there is none, or nothing in it: the
    last number somewhere in a text is not an answer, and taking it for one would reward guessing.
    """
    text, marker = text.rpartition("</think>")[2], None
    for marker in MARKER.finditer(text):
        pass
    if marker is None:
        return None
    sign, rest = marker.group(), text[marker.end() :]
    if sign.startswith("\\"):
        rest = rest.lstrip()
        answer = before_closing_brace(rest[1:]) if rest.startswith("{") else re.match(r"[^\s${}]*", rest).group()
        return tidy(answer or "") or None
    rest = rest.lstrip(" \t*_:：" if sign.startswith("#") else " \t*_:：\n")
    sentence = SENTENCE_END.split(rest.partition("\n")[0], maxsplit=1)[0]
    inside = before_closing_brace(sentence)  # where the sentence is in a box
    return tidy(sentence if inside is None else inside) or None


def before_closing_brace(text):
    """What stands before the brace that closes one opened before `text`; None where there is none."""
    depth = 0
    for brace in BRACE.finditer(text):
        depth += {"{": 1, "}": -1}.get(brace.group(), 0)
        if depth < 0:
            return text[: brace.start()]
    return None


def tidy(answer):
    """An answer without emphasis, quotation marks, full stop and the signs that make it a formula."""
    answer = answer.strip(DECORATION).rstrip(".。 ").strip(DECORATION)
    formula = FORMULA.fullmatch(answer)
    return next(filter(None, formula.groups())).strip().rstrip(".") if formula else answer


# ---- Its comparison with the ground truth ---------------------------------------------------------------------------

LONGEST = 500  # characters; longer answers are compared as they stand
SIGNS = {"\u2212": "-", "×": "*", "·": "*", "π": r"\pi ", "∞": r"\infty ", "≤": r"\le ", "≥": r"\ge ", "∪": r"\cup "}
FULL_WIDTH = {chr(0xFEE0 + code): chr(code) for code in range(0x21, 0x7F)}
ASCII = str.maketrans(SIGNS | FULL_WIDTH | dict.fromkeys("\u00a0\u2009\u202f\u3000", " "))
LAYOUT = [  # what can be written in several ways, and how it is written here
    (r"(?<!\\)\$((?:\\.|[^$\\])*)\$", r" \1 "),
    (r"\\(?:left|right|displaystyle)(?![a-z])|(?<!\\)\\[!()\[\]]", ""),
    (r"(?<!\\)\\[,;: ]|~|\\q?quad(?![a-z])|\s+", " "),
    (r"\\(?:times|cdot)(?![a-z])", "*"),
    (r"\\([%$#&_])|\{(,)\}", r"\1\2"),
]
LAYOUT = [(re.compile(pattern), standard) for pattern, standard in LAYOUT]
WRAPPER = re.compile(r"(?:\\(?:text|mathrm|mathbf|textbf|textrm|mbox|boxed|fbox) ?)?\{(.*)\}")
CHOICE = re.compile(r"\(?([A-Za-z])[).:]")
WORDS = re.compile(r"[^\W\d_]+(?:[ ,.'’-]+[^\W\d_]+)*")
NAMED = re.compile(
    r"(\\?[A-Za-z]\w*(?:_\{\w+\})?(?:\([\w ,]+\))?|(?:[-\d +*/^().{}]|\\[dt]?frac|\\sqrt)+) ?= ?([^=<>]+)"
)
UNFINISHED = re.compile(r"[\d)}\]] ?[-+*/]")
SET, TUPLE = re.compile(r"\\\{.*\\\}"), re.compile(r"\(.*,.*\)")
NO_FORMULA = re.compile(r"(?<![\\{A-Za-z])(?!sqrt|infinity)[A-Za-z]{4}|\d \d|[$?\x00-\x1f\ud800-\udfff]")


def answers_match(prediction, ground_truth):
    """Whether two answers are the same: as text or as numbers or, where they are neither, as mathematics."""
    if max(len(prediction), len(ground_truth)) > LONGEST:
        return prediction.strip() == ground_truth.strip()
    prediction, truth = without_names(plain(prediction), plain(ground_truth))
    if prediction == truth or "\\" not in truth and prediction.casefold() == truth.casefold():
        return truth != ""
    are_words = [WORDS.fullmatch(answer) is not None for answer in (prediction, truth)]
    if any(are_words):
        return all(are_words) and as_words(prediction) == as_words(truth)
    number, true_number = as_number(prediction), as_number(truth)
    if number and true_number:
        return same_number(number, true_number)
    if true_number and UNFINISHED.search(prediction):  # 13+21 where it is 34: the judge is not to do the work
        return False
    formulas = [TEXT_UNIT_AT_END.sub("", answer) for answer in (prediction, truth)]
    if any(map(SET.fullmatch, formulas)) and any(map(TUPLE.fullmatch, formulas)):
        return False
    return not any(map(NO_FORMULA.search, formulas)) and same_formula(*formulas)


def plain(answer):
    r"""An answer in plain characters and without layout: `\text{ 1\,234 }` → `1 234`."""
    answer = tidy(answer.translate(ASCII))
    for pattern, standard in LAYOUT:
        answer = pattern.sub(standard, answer)
    answer = answer.strip()
    while (wrapped := WRAPPER.fullmatch(answer)) and before_closing_brace(wrapped[1]) is None:
        answer = tidy(wrapped[1])
    choice = CHOICE.fullmatch(answer)
    return choice[1] if choice else answer


def as_words(answer):
    return re.findall(r"\w+", answer.casefold())


def without_names(*answers):
    """`x=7` → `7` and `13+21=34` → `34`, unless the other one is another equation, such as `y=7`."""
    equations = [NAMED.fullmatch(answer) for answer in answers]
    names = {
        equation[1].strip() if equation else answer for equation, answer in zip(equations, answers) if "=" in answer
    }
    return [equation[2] if equation and len(names) == 1 else answer for equation, answer in zip(equations, answers)]


DECIMAL = r"(?:\d{1,3}(?:,\d{3})+|\d{1,3}(?:\ \d{3})+|\d+)(?:\.\d*)?|\.\d+"
FRACTION = re.compile(r"\\[dtc]?frac ?(?:\{ ?([^{}]*?) ?\}|(\d)) ?(?:\{ ?([^{}]*?) ?\}|(\d))")
NUMBER = re.compile(
    rf"""(?P<sign>[+-]?)\ ?(?P<currency>[$€£¥]?)\ ?
    (?:(?P<whole>\d+)\ (?=\d+/))?  (?P<top>[+-]?(?:{DECIMAL}))
    (?: e(?P<power>[+-]?\d{{1,3}}) | \ ?\*\ ?10\ ?\^\ ?(?P<brace>\{{)?(?P<exponent>[+-]?\d{{1,3}})(?(brace)\}}) )?
    (?:\ ?/\ ?(?P<bottom>[+-]?(?:{DECIMAL})))?
    (?P<unit>.*)""",
    re.VERBOSE | re.ASCII | re.IGNORECASE,
)
WORD = r"(?:square |cubic )?[^\W\d_]{%d,}(?:(?: per |/)[^\W\d_]+)?"
TEXT_UNIT = rf" ?\\(?:text|mathrm|mbox) ?\{{ ?({WORD % 1}) ?\}}(?: ?\^ ?\{{?[23]\}}?)?"
TEXT_UNIT_AT_END = re.compile(TEXT_UNIT + "$")
UNIT = re.compile(rf"{TEXT_UNIT}| ?([ckm]m|[km]g|ml|[\u4e00-\u9fff]{{1,3}})| ({WORD % 3})")
UNIT_SIGNS = {"%": "percent", "$": "dollar", "€": "euro", "£": "pound", "¥": "元"}
UNIT_SIGNS |= dict.fromkeys(["°", r"^\circ", r"^{\circ}"], "degree")
NO_UNIT = re.compile(
    r"hundred|thousand|illion|dozen|hal[fv]|third|quarter|(?<!mon)ths?\b|squared|cubed|[零一二三四五六七八九十百千万亿两半或和]"
)


def as_number(answer):
    r"""(exact Fraction, unit) of `1,234.5`, `-2 1/2`, `\frac13`, `1.5e3`, `$7`, `12\%` or `12 apples`; else None."""
    match = NUMBER.fullmatch(FRACTION.sub(lambda m: f" {m[1] or m[2]}/{m[3] or m[4]} ", answer).strip())
    unit = match and as_unit(match["currency"] + match["unit"])
    if unit is None:
        return None
    whole, top, bottom = (Fraction(re.sub("[ ,]", "", match[name] or "0")) for name in ("whole", "top", "bottom"))
    if match["bottom"]:
        if bottom == 0:
            return None
        top /= bottom
    power = int(match["power"] or match["exponent"] or 0)
    return (whole + top) * Fraction(10) ** power * (-1 if match["sign"] == "-" else 1), unit


def as_unit(text):
    """What a number counts or measures, in the singular: a sign or a word or two. None if it is anything else."""
    if text.strip() in UNIT_SIGNS:
        return UNIT_SIGNS[text.strip()]
    unit = UNIT.fullmatch(text)
    if unit is None or NO_UNIT.search(text):
        return None if text else ""
    return (unit[1] or unit[2] or unit[3]).casefold().removesuffix("s")


def same_number(number, true_number):
    """A unit may be missing on one side, and 12% may also be written as 0.12."""
    (value, unit), (true_value, true_unit) = number, true_number
    if unit and true_unit:
        return unit == true_unit and value == true_value
    scale, true_scale = (100 if unit == "percent" else 1 for unit in (unit, true_unit))
    return value == true_value or value / scale == true_value / true_scale


# ---- Symbolic answers -----------------------------------------------------------------------------------------------
# Algebra can take for ever, and what is compared here was written by a model. Nothing in Python stops it when its time
# is up: signals reach the main thread only, and on Windows not even that. So it is done in a process of its own, which
# a clock outside the interpreter, faulthandler's, ends.

DECIMALS = re.compile(r"(\d*)\.(\d+)")
TIME_LIMIT = 0.4  # seconds; a comparison takes about 0.02
WORKERS = {}  # of each process that asks, which may have been forked: two, one ready to step in for the other
LOCK = threading.Lock()


@functools.lru_cache(maxsize=2**16)
def same_formula(prediction, truth):
    """Whether math-verify finds two formulas equal before TIME_LIMIT is over."""
    with LOCK:
        if os.getpid() not in WORKERS:
            WORKERS[os.getpid()] = [start_worker(), start_worker()]
            if ask_worker("x+1", "1+x") != "True":
                del WORKERS[os.getpid()]
                raise ImportError(
                    "math-verify, which compares formulas, does not work: pip install -r requirements.txt"
                )
        return ask_worker(prediction, truth) == "True"


def start_worker():
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    return subprocess.Popen([sys.executable, __file__], **pipes, start_new_session=True)  # Ctrl-C is for who asks


def ask_worker(*formulas):
    """The first worker's answer: True, False or, if it has died of the question, nothing."""
    workers = WORKERS[os.getpid()]
    workers[:] = [start_worker() if worker.poll() is not None else worker for worker in workers]  # killed from outside
    try:
        workers[0].stdin.write(json.dumps(formulas) + "\n")
        workers[0].stdin.flush()
        answer = workers[0].stdout.readline().strip()
    except OSError:
        answer = ""
    if not answer:
        workers.pop(0).kill()
        workers.append(start_worker())
    return answer


def work():
    """The worker: reads two formulas a line, writes True or False."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # where it shares a console with who asks (Windows)
    from math_verify import LatexExtractionConfig, parse, verify
    from latex2sympy2_extended import NormalizationConfig

    layout = NormalizationConfig(basic_latex=True, malformed_operators=True, nits=True, boxed="none", units=False)
    latex = [LatexExtractionConfig(boxed_match_priority=-1, normalization_config=layout)]
    answers, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        faulthandler.dump_traceback_later(TIME_LIMIT, exit=True)
        try:
            # math-verify takes a decimal for an approximation, a fraction not.
            exact = [
                DECIMALS.sub(lambda m: rf"\frac{{{m[1]}{m[2]}}}{{{10 ** len(m[2])}}}", f) for f in json.loads(line)
            ]
            prediction, truth = (parse(f"${formula}$", latex, "no_fallback", parsing_timeout=None) for formula in exact)
            verdict = verify(truth, prediction, allow_set_relation_comp=True, timeout_seconds=None)
        except BaseException:  # whatever a library makes of it
            verdict = False
        faulthandler.cancel_dump_traceback_later()
        print(verdict, file=answers, flush=True)


# ---- Rewards --------------------------------------------------------------------------------------------------------


def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    """Judges a response: {"score": 1.0 or -1.0, "acc": bool, "pred": str}, as verl's custom reward functions do.

    A ground truth that is a worked solution, as in GSM8K (`... #### 42`), stands for its answer.
    """
    prediction, truth = extract_answer(solution_str), str(ground_truth)
    right = prediction is not None and answers_match(prediction, extract_answer(truth) or truth)
    return {"score": 1.0 if right else -1.0, "acc": right, "pred": prediction or ""}


def trl_reward(completions, answer, **columns):
    """The scores of a list of completions, as text or as chat messages, given their answers; for TRL's GRPOTrainer."""
    texts = [completion if isinstance(completion, str) else completion[-1]["content"] for completion in completions]
    return [compute_score("", text, truth)["score"] for text, truth in zip(texts, answer)]


def overlong_penalty(length, max_length, buffer_length, factor=1.0):
    """The soft overlong punishment (eq. 13), to be added to the reward of a response of `length` tokens.

    0 up to max_length - buffer_length, from there falling evenly to -factor at max_length, and no further. With a
    buffer_length of 0 there is no punishment.
    """
    if buffer_length == 0:
        return 0.0
    excess = length - (max_length - buffer_length)
    return -factor * min(max(excess / buffer_length, 0.0), 1.0)


if __name__ == "__main__":
    work()

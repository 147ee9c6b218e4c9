r"""Rule-based rewards: find a response's final answer, judge it, and punish overlong responses.

A model is right if its final answer is the ground truth, and nothing else about its response counts (eq. 7 of the
paper, arXiv 2503.14476). This is its only teacher, so a way to be called right without being right is what it learns.
`compute_score` goes from text to verdict by way of

    extract_answer   the last \boxed{...}, "#### ...", "Answer: ..." or the like in a response, never just some number
    plain            the answer in one spelling: no Unicode, no fonts, one word for each synonym
    same             takes lists, points, and equations apart, and compares numbers exactly and words as text
    same_formula     compares what is left by sympy, exactly, in a process of its own with a limit on its CPU time

Left out: converting units, numbers to another base, and answers that are sentences.
"""

import faulthandler
import functools
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import unicodedata
import warnings
from fractions import Fraction
from itertools import takewhile


def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    """Judges a response: {"score": 1.0 or -1.0, "acc": bool, "pred": str}, as verl's custom reward functions do.

    A ground truth is a text, a number, a worked solution that announces its answer (GSM8K: `... #### 42`), or a list
    of which each is right. Of extra_info, "question" shows whether an answer is only copied from it, and "prompt" (or
    else the question) whether what the model read ends by opening a <think>.
    """
    info = extra_info or {}
    question = str(info.get("question") or "")
    prediction = extract_answer(solution_str, str(info.get("prompt") or question))
    truths = ground_truth if isinstance(ground_truth, (list, tuple)) else [ground_truth]
    truths = [extract_answer(str(truth)) or str(truth) for truth in truths]
    right = prediction is not None and any(answers_match(prediction, truth, question) for truth in truths)
    return {"score": 1.0 if right else -1.0, "acc": right, "pred": prediction or ""}


def read_verdict(verdict):
    """What a reward function returns (see dapo.judge) → the fields of a dapo.Response that it sets, or None."""
    verdict = verdict if isinstance(verdict, dict) else {"score": verdict}
    score, accuracy = verdict["score"], verdict.get("acc")
    if score is None:
        return None
    signal = score if accuracy is None else accuracy
    others = {name: value for name, value in verdict.items() if name not in ("score", "acc", "pred")}
    others = {name: float(value) for name, value in others.items() if hasattr(value, "__float__")}
    if not all(map(math.isfinite, (score, signal, *others.values()))):
        raise ValueError(f"{verdict} is not finite")
    accuracy = float(score > 0 if accuracy is None else accuracy)
    numbers = {"accuracy": accuracy, "signal": float(signal), "reward": float(score)}
    return numbers | {"prediction": verdict.get("pred"), "others": others}


def trl_reward(completions, answer, prompts=None, **columns):
    """The scores of a list of completions, as text or as chat messages, given their answers; for TRL's GRPOTrainer."""
    both = completions, prompts or [""] * len(completions)
    texts, asked = ([x if isinstance(x, str) else x[-1]["content"] for x in column] for column in both)
    return [compute_score("", *row, {"question": question})["score"] for *row, question in zip(texts, answer, asked)]


def overlong_penalty(length, max_length, buffer_length, factor=1.0):
    """The soft overlong punishment (eq. 13), to be added to the reward of a response of `length` tokens.

    0 up to max_length - buffer_length, from there falling evenly to -factor at max_length, and no further. With a
    buffer_length of 0 there is no punishment.
    """
    if buffer_length == 0:
        return 0.0
    excess = length - (max_length - buffer_length)
    return -factor * min(max(excess / buffer_length, 0.0), 1.0)


# ---- The answer in a response ---------------------------------------------------------------------------------------

THOUGHT = re.compile(r"<(/?)(?:think(?:ing)?|thought|reasoning)>|<\|(?:begin|(end))_of_thought\|>|◁(/?)think▷")
REWRITTEN = [  # before a text is searched
    (r"</?(?:b|strong|i|em|u|p|span|code|mark|br)\b[^<>]*>", ""),
    (r"[-−](?:(?<=[\s$:][-−])|(?<=[=(][-−])\s*|(?<=[=(]\s[-−])\s*)\\boxed\s*\{", r"\\boxed{-"),
    (  # boxes that are one answer: `and`, `$, $x_2=`, `. Part (b): `
        r"""(?ix) (\\boxed\s*\{(?:[^{}]|\{[^{}]*\})+)\} [\s$(]* (?: (=)[\s$]*
        | (?=[^\\\n]*(?:[,;、)和或与及]|\band\b|\bor\b|\\text)) (?: [\s$(),;、.:和或与及] | \b(?:and|or)\b | also
          | maybe | Part | \\text\{[\ ,]*(?:and|or)\ ?\} | [a-z](?:_\{?\d\}?)?\ ?= | [a-z](?=\)) )* ) \\boxed\s*\{""",
        lambda boxes: boxes[1] + (boxes[2] or (" or " if re.search("[^a-z]or[^a-z]|或", boxes[0]) else ", ")),
    ),
]
KEY = re.compile(r"\\boxed|\\fbox|\\framebox|<answer>|####+|answer|Answer|ANSWER|答案")  # found fast
MARKER = re.compile(
    r"""(?P<box>\\[a-z]+\s*\{) | (?P<bare>\\boxed\s*(?=[-\\\w])) | (?P<tag><answer>) | (?P<hashes>\#+) | (?:answer|答案)
    (?:(?P<colon>(?:\ \([^()\n]*\))?[*_}`\ ]*[:：]) | (?P<title>[*_}\ \t]*$)
      | (?P<prose>[*_]*(?:\ (?:to|for|of)(?:\ [\w'’]+){1,6}?)?\ (?:is|are|equals|turns\ out\ to\ be
        |(?:should|must|would|will)\ be)\b | 就?[是为]))""",
    re.IGNORECASE | re.MULTILINE | re.VERBOSE,
)
TITLE = re.compile(r"[#*_ \t]*(?:\\textbf\{)?(?:the )?(?:final )?", re.IGNORECASE)  # what may stand before "Answer"
BLOCK = re.compile(r"```\w*\n(.*?)```|\$\$(.+?)\$\$|\\\[(.+?)\\\]", re.DOTALL)
ITEM = re.compile(r"(?:[-*•]|\d+[.)])\s+(.+)")
FILLER = re.compile(r"(?:\s*(?:indeed|therefore|thus|simply|just|exactly|equal to|option|choice)\b[ ,:]*)*", re.I)
SENTENCE = re.compile(r".*(?:\n *or [-$\d\\].*)?")
AFTERTHOUGHT = re.compile(
    r"""(?<=[\d}$)\]*])\.\s | \.\s+(?=[A-Z\\$(*]) | 。 | [；;]\s*(?=[a-z]+\ ) | </ | \ —\ (?=[a-z])
    | \ \((?!or\b|and\b|mod\b|not\b)[a-z] | ,?\ (?:because|since|as|so|which|where|when|while|given|meaning|hence
      |thus|in\ total|in\ all)\b""",
    re.VERBOSE,
)
CLEAR = re.compile(r"[-+−–$\\({\[√\d*\"'“`]|.{1,3}$|(?:yes|no|true|false|none)\b", re.IGNORECASE)
DECORATION = ' \t\r\n*_`"“”\u200b\ufeff✅✓✔'
BRACKET = re.compile(r"\\.|[][(){}]", re.DOTALL)
POWER_OF_BOX = re.compile(r"(?:\^|_[\w{])[^\s$]*|")  # 7^2 is not 7
FORMULA = re.compile(r"\$\$(.+)\$\$|\$([^$]+)\$|\\\((.+)\\\)|\\\[(.+)\\\]", re.DOTALL)


def extract_answer(text, prompt=""):
    r"""The final answer that a response announces, as text, or None.

    Announced by `\boxed{7}` (or \fbox), `<answer>7</answer>`, `#### 7`, `Answer: 7`, `the answer is 7`, `答案：7` or
    `答案是 7`. The last announcement counts that has something in it; what follows "####" (a heading?) and "the answer
    is" (in simplest form?) has to look like an answer, unless there is no other. After a `</think>` only what follows
    it counts, and a thought that is not closed has no answer, whether the response opened it or the prompt. None where
    nothing is announced: taking the last number somewhere in a text for an answer would reward guessing.
    """
    *_, thought = [None, *THOUGHT.finditer(text)]
    if not any(thought.groups()) if thought else re.search(r"<think(?:ing)?>\s*$", prompt):
        return None
    text, unclear = text[thought.end() :] if thought else text, None
    for pattern, standard in REWRITTEN:
        count = 1
        while count:
            text, count = re.subn(pattern, standard, text)
    for key in reversed(list(KEY.finditer(text))):
        marker = MARKER.match(text, key.start())
        kind = marker and marker.lastgroup
        if not marker or kind == "title" and not TITLE.fullmatch(text[: key.start()].rpartition("\n")[2]):
            continue
        answer = announced(text[marker.end() :], kind)
        if answer is None:
            return None  # an unfinished box
        if answer.strip(". ") and (kind not in ("hashes", "prose") or CLEAR.match(answer) and not ITEM.match(answer)):
            return answer
        unclear = unclear or answer.strip(". ") or None
    return unclear


def announced(rest, kind):
    """What a box holds, or what follows "Answer:": a block, a list, or a sentence without its afterthoughts."""
    if kind == "box":
        inside = before_closing(rest)
        return inside if inside is None else tidy(inside) + POWER_OF_BOX.match(rest, len(inside) + 1).group()
    if kind == "bare":
        return tidy(re.match(r"[-\\\d][^\s${}]*|\w\b|", rest).group())
    start = rest.lstrip(" \t*_:：>}" if kind == "hashes" else " \t*_:：>}\n")
    if block := BLOCK.match(start):
        return tidy(next(filter(None, block.groups()), ""))
    if "\n" in rest[: len(rest) - len(start)] and ITEM.match(start):
        return ", ".join(tidy(ITEM.match(line)[1]) for line in takewhile(ITEM.match, start.split("\n")))
    sentence = AFTERTHOUGHT.split(SENTENCE.match(start, FILLER.match(start).end()).group(), maxsplit=1)[0]
    inside = before_closing(sentence)  # where the sentence is in a box
    return tidy(sentence if inside is None else inside)


def before_closing(text, opening="{", closing="}"):
    """What stands before the bracket that closes one opened before `text`; None where there is none."""
    depth = 0
    for bracket in BRACKET.finditer(text):  # or something escaped, which is none
        depth += (bracket.group() in opening) - (bracket.group() in closing)
        if depth < 0:
            return text[: bracket.start()]
    return None


def tidy(answer):
    """An answer without emphasis, quotation marks, full stop, and the signs that make it a formula."""
    answer = re.sub(r"(?:(?<![.\\])\.(?!\.)|[。，]|(?<!\\),)+$", "", answer.strip(DECORATION)).strip(DECORATION)
    formula = FORMULA.fullmatch(answer)
    return next(filter(None, formula.groups())).strip().rstrip(".") if formula else answer


# ---- One spelling ---------------------------------------------------------------------------------------------------


def synonyms(table):
    """`standard spelling spelling | standard spelling` → {spelling: standard}"""
    rows = (row.split() for row in table.split("|"))
    return {spelling: standard for standard, *spellings in rows for spelling in spellings}


STANDARD = synonyms(r"""\infty ∞ \infinity | \le ≤ ⩽ <= \leq \leqslant | \ge ≥ ⩾ >= => \geq \geqslant | \ne ≠ != \neq
    | \cup ∪ | \cap ∩ | \emptyset ∅ \varnothing | \in ∈ | \pm ± | \mp ∓ | \div ÷ | \approx ≈ | \to → \rightarrow
    | \mathbb{R} ℝ | \mathbb{Z} ℤ | \mathbb{N} ℕ | \mathbb{Q} ℚ | \angle ∠ | \sqrt √ | \Delta Δ \triangle | \alpha α
    | \beta β | \gamma γ | \delta δ | \epsilon ε | \theta θ | \lambda λ | \mu μ | \pi π | \rho ρ | \sigma σ | \tau τ
    | \phi φ | \omega ω | * × · ⋅ ∙ • ∗ \times \cdot \cdotp \ast \bullet | - − – — ‐ ‑ | ' ′ ’ \prime | '' ″ | = :=
    | ^ ** | $ \$ | % \% | & \& | _ \_ | : \colon | ( \langle | ) \rangle | \{ \lbrace | \} \rbrace | ° \degree \circ
    | or \lor \vee | \frac \dfrac \tfrac \cfrac | \binom \dbinom \tbinom | \ldots ... … \dots \cdots \dotsc
    | \overline \bar | \setminus \backslash | \text \mathrm \textrm \textbf \textit \textnormal \mbox \operatorname""")


def standard(sign):
    r"""`≤`, `<=` or `\leq` → `\le`"""
    name = STANDARD.get(sign) or unicodedata.normalize("NFKC", sign)
    return f"{name} " if name[:1] == "\\" != sign[0] else name


SIGN = re.compile(r"\\(?:[a-zA-Z]+|[%$&_])|[<>!:]=|=>|\.\.\.|(?<=[\w)])\*\*(?=[\w(-])|[^\x00-\x7f]")
DRESS = r"[bB]igg?[lr]?|left|right|displaystyle|textstyle|[lL]arge|bm|boldsymbol|math(?:bf|sf|it)|underline|boxed|fbox"
FUNCTION = r"sqrt|sin|cos|tan|arc\w{3}|ln|log|exp|gcd|lcm|pi|infinity"
LAYOUT = [  # what else can be written in several ways, and how it is written here
    (r"(?<![A-Za-z\\])([kcdm]?m)([²³])", r"\\text{\1}\2"),  # a unit, where m^2 is a formula
    (r"[⁰¹²³⁴-⁹⁻]+", lambda powers: f"^{{{unicodedata.normalize('NFKC', powers[0])}}}"),
    (r"[¼-¾⅐-⅞]", lambda fraction: f" {unicodedata.normalize('NFKC', fraction[0]).replace('⁄', '/')} "),
    (r"√ ?(\d+)", r"\\sqrt{\1}"),
    (r"(?<!\\)\$((?:\\.|[^$\\])*)\$", r" \1 "),
    (rf"(?<!\\)\\[([)\]!]|\\(?:{DRESS})(?![a-zA-Z])|\\(?:text)?color ?\{{\w+\}}", ""),
    (r"(?<!\\)\\[,;: ]|\\(?:q?quad|thinspace)(?![a-zA-Z])|~|\s+", " "),
    (rf"(?<![\\a-zA-Z])(?:\\(?:text|mathrm|operatorname) ?\{{ ?)?({FUNCTION})(?![a-zA-Z])(?: ?\}})?", r"\\\1 "),
    (SIGN, lambda sign: standard(sign[0])),
    (r"\\text ?\{([^{}]*?)[ ,]*(\band\b|\bor\b|[和或])[ ,]*\}", r"\\text{\1} \2 "),
    (r"(?i)(?<=\d) ?(?:\\text ?\{)? ?([ap])\.? ?m\.? ?\}?$", r" \1m"),
    (r"\\text ?\{([^{}A-Za-z\u4e00-\u9fff]*|\(?[A-J][.)]* ?| ?(?:[ied]|Rs\.) ?)\}|\{([,+*:-])\}", r"\1\2"),
    (r"([_^]) ?\{ ?(\w|°|'+) ?\}", r"\1\2"),
    (r"\^ ?(?=[°'])|(?<=°) ", ""),
    (r"\\frac ?(\w)", r"\\frac{\1}"),
    (r"(\\frac ?\{[^{}]*\}) ?(\w)", r"\1{\2}"),
    (r"\\sqrt ?(\[\w+\])? ?(?:\((\w+)\)|\{ ?(\w+) ?\}|(\w))", r"\\sqrt\1{\2\3\4}"),
    (r"\((\d+)\)_", r"\1_"),
    (r"\\mathbb ?([A-Z])", r"\\mathbb{\1}"),
    (r"\{ ?(\w+) ?\\choose ?(\w+) ?\}", r"\\binom{\1}{\2}"),
    (
        r"^\[ ?\[(.+)\] ?\]$",
        lambda rows: r"\begin{pmatrix}%s\end{pmatrix}" % re.sub("] ?, ?\\[", r"\\\\", rows[1]).replace(",", "&"),
    ),
    (r"^(?:\\text\{)?[Aa]ll real(?: number)?s?\}?$", r"\\mathbb{R}"),
    (r"^\]|\[$", lambda bracket: {"]": "(", "[": ")"}[bracket[0]]),  # ]0,1[
    (r"^\\\{ ?[a-z] ?(?:\||:|\\mid(?![a-z]))(.*)\\\}$", r"\1"),
    (r"^(\d+) to (\d+)$", r"\1:\2"),
    (r"^\\forall[^,]*,|(?:,? ?(?:\\forall|\\text\{ ?for all ?\})|, ?[a-z] ?\\in ?\\mathbb).*$", ""),
    (r"^\([a-z, ]+\) ?= ?(?=\()|^[a-z](?:_\w)? ?\\in(?![a-z]) ?", ""),
    (r"(\d) ?(\\text ?\{ ?[a-z.]+ ?\}|[a-z]{2,}\.?|h) ?(?=\d)", r"\1 \2, "),
]
BARE = re.compile(r"-?[0-9][0-9,]*(?:\.[0-9]+)?")
WRAPPER = re.compile(r"(?:\\text ?)?\{(.*)\}|\(([^(),;]*)\)")


@functools.lru_cache(maxsize=2**12)  # a group has one ground truth, and often one answer
def plain(answer):
    r"""An answer in plain characters and without layout: `\text{ 1\,234 }` → `1 234`."""
    if BARE.fullmatch(answer):
        return answer
    for pattern, spelling in LAYOUT:
        answer = re.sub(pattern, spelling, answer)
    answer = tidy(answer)
    while (wrapped := WRAPPER.fullmatch(answer)) and before_closing(wrapped[1] or "") is None:
        answer = tidy(wrapped[1] or wrapped[2] or "")
    return answer


# ---- The comparison with the ground truth ---------------------------------------------------------------------------

LONGEST = 500  # characters; longer answers are compared as they stand
CHOICE = re.compile(r"\(?([A-J])(?:\)|[.:](?!\d))[ :.]*(?![ :.]*(?:or|and)\b|,)(.*)|([A-Ja-j])")
NOISE = re.compile(r"-?(?=(?:\D*\d){15})0?\.?0*\d*\.\d*[1-9]\d*")  # a truth with 15 digits or more is a float
IRRATIONAL = re.compile(r"\\(?:sqrt|pi|ln|log|sin|cos|tan|exp|arc)|e\^|\^\{[^{}]*[/.]")
MONTH = re.compile(r"\b(?:jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)[a-z]*\b", re.IGNORECASE)
WORDS = re.compile(r"(?=.*[^\W\d_]{3}|.*[^\x00-\x7f]|[Nn][Oo]$|on$|.*\d [apAP]m$)[\w\s,.:'()/!-]+")
NO_FORMULA = re.compile(r"\^\{?T\b|(?<![\\{A-Za-z])[A-Za-z]{4}|(?<![_\d])\d+ \d|\d_|[$?\x00-\x1f\ud800-\udfff]")
WORK = re.compile(r"\\sum|\\prod|\\int|\\lim|!|gcd|lcm|max|(?<!set)min|mod|\\det|frac\{d")
SEPARATOR = r"\s*[,;、&]\s*(?:(?:and|or)\b)?|\b(?:and|or)\b|[和或]"
EQUALS = r"=|\\approx"
RELATION = re.compile(r"[<>]|\\[lgn]e(?![a-z])")
NAME = re.compile(  # the left side of an equation that tells a value: `x_1`, `f(2)`, `\angle ABC`, or a calculation
    r"\\?[A-Za-z]+(?:_\{?\w+\}?)?'*(?: ?\([^()]*\)| [A-Z]+)?|\|[A-Z]{2}\||\\[a-z]+\{[^{}]*\}|(?:\\[a-z]+|[^A-Za-z\\])*"
)


def answers_match(prediction, ground_truth, question=""):
    """Whether an answer is the ground truth: as text, as numbers, or as mathematics. `question` is what it may copy."""
    if ground_truth.strip() in ("", "None", "nan"):
        return False
    if max(len(prediction), len(ground_truth)) > LONGEST:
        return prediction.strip() == ground_truth.strip()
    prediction, truth = plain(prediction), plain(ground_truth)
    return same(prediction, truth) and not copied(prediction, truth, question)


def copied(answer, truth, question):
    """Whether an answer is a formula of the question that the truth does not have; numbers and names are none."""
    if not question or as_choice(truth)[0] or as_number(answer) or not re.search(r"[-+*/^!(]|\\[a-z]", answer):
        return False
    parts, true_parts = (re.findall(r"\\[A-Za-z]+|\S", text) for text in (answer, truth))
    formula = r"(?<![\w}^.\\])" + r"\s*".join(map(re.escape, parts)) + r"(?![\w^{])"
    return sorted(parts) != sorted(true_parts) and re.search(formula, plain(question)) is not None


def same(answer, truth):
    """Whether two plain answers are the same. Lists, points, and equations are taken apart until neither is one."""
    if answer == truth or not answer or not truth:
        return answer == truth != ""
    number, true_number = as_number(answer), as_number(truth)
    if number and true_number:
        return same_number(number, true_number) or bool(NOISE.fullmatch(truth)) and near(number[0], truth)
    (letter, text), (true_letter, true_text) = as_choice(answer), as_choice(truth)
    if letter and true_letter:
        return letter == true_letter and (not text or not true_text or same(text, true_text))
    if (letter or true_letter) and text and true_text:  # (D) 42 where it is 42
        return same(text, true_text)
    point, true_point = as_point(answer), as_point(truth)
    if point and true_point:
        return answer[0] + answer[-1] == truth[0] + truth[-1] and all_same(point, true_point)
    values, true_values = as_values(answer, truth), as_values(truth)
    if (point or true_point) and len(values) + len(true_values) > 2:  # x=1, y=2 where it is (1, 2)
        listed = sorted(values) if all("=" in value for value in values) else values
        return "\\{" not in (answer[:2], truth[:2]) and all_same(point or listed, true_point or true_values)
    if [answer, truth] != values + true_values:
        right = all(any(same(value, true) for true in true_values) for value in values)
        return right and all(any(same(value, true) for value in values) for true in true_values)
    if re.search(EQUALS, answer + truth) and len(split(answer, EQUALS)) + len(split(truth, EQUALS)) > 2:
        return same_equation(answer, truth)
    if true_number and not (NOISE.fullmatch(truth) and IRRATIONAL.search(answer)):
        return False  # 13+21 where it is 34: the judge is not to do the work
    words, true_words = as_words(answer), as_words(truth)
    if words or true_words:
        return words == true_words
    ratio, true_ratio = split(answer, ":"), split(truth, ":")
    if len(ratio) + len(true_ratio) > 2:
        return same_ratio(ratio, true_ratio)
    (formula, unit), (true_formula, true_unit) = formulas = without_unit(answer), without_unit(truth)
    undone, truly_undone = (set(WORK.findall(formula.replace(r"\binom", "!"))) for formula, _ in formulas)
    if undone - truly_undone or not same_unit(unit, true_unit):
        return False
    return not any(map(NO_FORMULA.search, (formula, true_formula))) and formulas_match(formula, true_formula)


def all_same(answers, truths):
    return len(answers) == len(truths) and all(map(same, answers, truths))


def split(text, separator):
    """The parts of a text between separators that are not in brackets."""
    parts, depth = [""], 0
    for place, part in enumerate(re.split(f"({separator})", text)):
        if place % 2 and depth <= 0:
            parts.append("")
        else:
            parts[-1] += part
            depth += sum((sign in "([{") - (sign in ")]}") for sign in part)
    return [part.strip() for part in parts if part.strip()]


def as_choice(text):
    """`(D) 42` → `D`, `42`; where there is no letter, None and the text"""
    choice = CHOICE.fullmatch(text)
    return ((choice[1] or choice[3]).upper(), choice[2] or "") if choice else (None, text)


def as_point(text):
    """The coordinates of `(1, 2)`, or the ends of an interval, or None."""
    closed = text[0] in "([" and before_closing(text[1:], "([{", ")]}") == text[1:-1]
    parts = split(text[1:-1], "[,;]") if closed else []
    return parts if len(parts) > 1 else None


def as_values(text, truth=""):
    r"""The values of a list or a set: `x=\pm 2` → `x=+2`, `x=-2`. A single value is a list of one."""
    if r"\pm" in text or r"\mp" in text:
        upper, lower = text.replace(r"\pm", "+").replace(r"\mp", "-"), text.replace(r"\pm", "-").replace(r"\mp", "+")
        return as_values(upper) + as_values(lower)
    if r"\begin" in text or MONTH.search(text):
        return [text]
    if as_number(text) and not re.search(r"[^\\][,;] |°,", truth):  # 1,200 is a number, unless the truth is a list
        return [text]
    braces = re.fullmatch(r"(?:\w ?= ?)?\\\{(?!\\emptyset)(.*)\\\}", text)
    parts = split(braces[1], "[,;]") if braces else split(text, SEPARATOR)
    return [text] if all(map(RELATION.search, parts)) else parts  # an inequality, or several joined by and, or


def same_equation(answer, truth):
    """The last side of an equation is its value, unless the other is another equation, such as `y=7` for `x=7`."""
    sides, true_sides = split(answer, EQUALS), split(truth, EQUALS)
    numbers = [value / (100 if unit == "percent" else 1) for value, unit in filter(None, map(as_number, sides))]
    digits = len(sides[-1].partition(".")[2]) if r"\approx" in answer else 99
    if re.match(EQUALS, answer) or any(numbers[-1] not in (n, round(n, digits)) for n in numbers):
        return False  # 41=42
    if r"\approx" in answer + truth:
        return any(same(side, true) for side in sides for true in true_sides)
    if len(sides) == 1:
        return all(map(NAME.fullmatch, true_sides[:-1])) and same(answer, value_of(true_sides))
    function, true_function = (re.fullmatch(r"([A-Za-z]\w*) ?\(([a-z])\)", side[0]) for side in (sides, true_sides))
    if function and true_function and function[1] == true_function[1]:
        return same(re.sub(rf"(?<![A-Za-z\\]){function[2]}(?![A-Za-z])", true_function[2], sides[-1]), true_sides[-1])
    if sides[0] == true_sides[0] or not re.search("[A-Za-z]", "".join(true_sides[:-1])):
        return same(value_of(sides), value_of(true_sides))
    return formulas_match(answer, truth)


def value_of(sides):
    r"""The value of `x=7`, `13+21=34` or `7=x`."""
    first, last = (re.fullmatch(r"\\?[A-Za-z]+", side) for side in (sides[0], sides[-1]))
    return sides[0] if last and not first else sides[-1]


def same_ratio(parts, true_parts):
    """Ratios are proportional, and times are the same minute."""
    numbers, true_numbers = ([number and number[0] for number in map(as_number, side)] for side in (parts, true_parts))
    if len(parts) != len(true_parts) or len(parts[-1]) == len(true_parts[-1]) == 2 or not all(numbers + true_numbers):
        return all_same(parts, true_parts)
    return all(a * true_numbers[0] == b * numbers[0] for a, b in zip(numbers, true_numbers))


def as_words(text):
    """The words of an answer that is no formula, without articles; a date's in any order. None of a formula."""
    text = re.sub(r"\\text ?\{([^{}]*)\}", r" \1 ", text).strip()
    words = re.findall(r"\d+|[^\W\d_]+", text.casefold()) if WORDS.fullmatch(text) else []
    words = [word for word in words if word not in ("a", "an", "the", "th", "st")]
    return sorted(words) if MONTH.search(text) else words


# ---- Numbers and units ----------------------------------------------------------------------------------------------

DECIMAL = r"(?:\d{1,3}(?:,\d{3})+|\d{1,2}(?:,\d\d)+,\d{3}|\d{1,3}(?:\ \d{3})+|\d+)(?:\.\d*)?|\.\d+"
FRACTION = re.compile(r"\\frac ?\{ ?([^{}]*?) ?\} ?\{ ?([^{}]*?) ?\}")
SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12, "万": 4, "亿": 8}
NUMBER = re.compile(
    rf"""(?P<sign>[+-]?)\ ?(?P<currency>(?:(?:US|HK|A)?[$]|[€£¥₹]|Rs\.?|USD)?)\ ?
    (?:(?P<whole>\d+)\ +(?=\d+\ ?/))?  (?P<top>[+-]?(?:{DECIMAL}))(?:\\overline\{{?(?P<period>\d+)\}}?)?
    (?: e(?P<power>[+-]?\d{{1,3}}) | \ ?[*x]\ ?10\ ?\^\ ?(?P<brace>\{{)?(?P<exponent>[+-]?\d{{1,3}})(?(brace)\}}) )?
    (?:\ ?/\ ?(?P<bottom>[+-]?(?:{DECIMAL})))?
    (?:\ ?(?:\\text\ ?\{{\ ?)?(?P<scale>{"|".join(SCALES)})(?![a-z])\ ?\}}?)?
    (?P<unit>.*)""",
    re.VERBOSE | re.ASCII | re.IGNORECASE,
)
POWER = re.compile(r"(\d+) ?\^ ?(?:\{ ?([+-]?\d{1,5}) ?\}|(\d))")
UNITS = synonyms("""m meter metre 米 | cm centimeter centimetre 厘米 | mm millimeter millimetre 毫米 | in inch inche ''
    | km kilometer kilometre 千米 公里 | ft foot feet ' | yd yard | mi mile | km/h kph kmh | mi/h mph | h hour hr 小时
    | min minute 分钟 | s second sec 秒 | g gram 克 | kg kilogram 千克 公斤 | pound lb £ | oz ounce | L liter litre l 升
    | mL milliliter millilitre ml 毫升 | dollar $ usd us$ 美元 | cent ¢ | euro € eur | yuan ¥ rmb 元 块 | rupee ₹ rs
    | percent % | ² square sq 平方 | ³ cubic cu 立方 | degree ° deg 度 | celsius °C C | fahrenheit °F F | / per 每""")
NO_UNIT = re.compile(  # 5 dozen, 5 sevenths, 5 plus one, 5成
    r"""(?:hundred|thousand|.*illion|dozen|hal[fv]e?|third|quarter|(?!mon).*(?:[fhnx]|ur|ie|red|sand|nd)th|.*(?:squar|cub)ed
    |ten|score|gross?|grand|lakh|crore|double|triple|factorial|pair|couple|.*mille|not|plu|minu|than|mod|over|choose|something
    |and|root|base|power|divided|multiplied|about|nan|.*[零一二三四五六七八九十百千万亿半或和成打倍折不].*
    |(?!of|at|on|by)[a-z]{1,2}|')s?""",
    re.VERBOSE,
)


def as_number(answer):
    r"""(exact Fraction, unit) of `1,234.5`, `-2 1/2`, `\frac13`, `1.5e3`, `2^{10}`, `$7` or `12 apples`, else None."""
    answer = FRACTION.sub(r" \1/\2 ", answer).strip()
    answer = re.sub(r"^\((-?[\d./ ]+)\)$|(?<=/)\((-?\d+)\)$", r"\1\2", answer)
    if power := POWER.fullmatch(answer):
        base, exponent = int(power[1]), int(power[2] or power[3])
        return (Fraction(base) ** exponent, "") if base and abs(exponent) * base.bit_length() < 10**5 else None
    if angle := re.fullmatch(r"(\d+)° ?(\d+)'(?: ?(\d+)'')?", answer):
        return sum(Fraction(int(part or 0), 60**place) for place, part in enumerate(angle.groups())), "degree"
    match = NUMBER.fullmatch(answer)
    unit = match and as_unit(match["currency"] + " " + match["unit"])
    if unit is None:
        return None
    whole, top, bottom = (Fraction(re.sub("[ ,]", "", match[name] or "0")) for name in ("whole", "top", "bottom"))
    if match["period"]:
        places = len(match["top"].partition(".")[2])
        top += Fraction(int(match["period"]), (10 ** len(match["period"]) - 1) * 10**places)
    if match["bottom"] and not bottom:
        return None
    power = int(match["power"] or match["exponent"] or 0) + SCALES.get((match["scale"] or "").lower(), 0)
    return (whole + top / (bottom or 1)) * Fraction(10) ** power * (-1 if match["sign"] == "-" else 1), unit


def as_unit(text):
    """What a number counts or measures, in one spelling; None if it is anything else, "?m" if it may be a variable."""
    words = re.sub(r"\\text ?\{|[{}.,*]", " ", re.sub("(平方|立方|每)", r" \1 ", text))
    words = re.sub(r"([^\W\d_]+) ?(?:\^2|squared)", r"² \1", words)
    words = re.sub(r"([^\W\d_]+) ?(?:\^3|cubed)", r"³ \1", words)
    tokens = re.findall(r"[^\W\d_]+\$?|\^-\d|/|''|°[CF]?|[%$€£¥₹¢']", words)
    unit = [one_unit(token) for token in tokens]
    if None in unit or "".join(tokens) != re.sub(r"\s", "", words):
        return None
    weak = r"\text" not in text and re.fullmatch(r"[²³]?\s*[A-Za-z]|''?", words.strip())
    return ("?" if weak else "") + re.sub(r"(?<=[²³/]) | (?=/)", "", " ".join(unit))


def one_unit(name):
    """`Feet` → `ft`"""
    word = name.lower().removesuffix("s")
    known = name if name in UNITS.values() else UNITS.get(name) or UNITS.get(name.lower()) or UNITS.get(word)
    return known or (None if NO_UNIT.fullmatch(name.lower()) else word)


def same_unit(unit, true_unit):
    """A unit may be missing on one side, and "marbles" are "red marbles"."""
    if "?" in unit + true_unit:
        return unit.strip("?") == true_unit.strip("?")
    short, long = sorted((unit, true_unit), key=len)
    return not short or short == long or long.endswith(f" {short}") and "/" not in long


def same_number(number, true_number):
    """Exactly; 12% may also be written as 0.12, and where the truth is a number as such, as 12."""
    (value, unit), (true_value, true_unit) = number, true_number
    if unit and true_unit or "?" in unit + true_unit:
        return value == true_value and same_unit(unit, true_unit)
    scale, true_scale = (100 if unit == "percent" else 1 for unit in (unit, true_unit))
    return value == true_value or value / scale == true_value / true_scale


def near(value, truth):
    """Whether a number rounds to a truth that is a float: to its last digit, or to a float's precision."""
    digits, exact = len(truth.partition(".")[2]), Fraction(truth)
    return abs(value - exact) <= max(Fraction(1, 2 * 10**digits), abs(exact) / 2**52)


def without_unit(formula):
    r"""`3\sqrt2\text{ cm}` → `3\sqrt2`, `cm`"""
    found = re.fullmatch(r"(.*?[\w)}\]])\s*(\\text ?\{.*|(?<=[ \d)}])(?:[a-z]{3,}|[ckm]m|kg|sq)\b.*|%)", formula)
    unit = as_unit(found[2]) if found else None
    return (found[1], unit) if unit else (formula, "")


# ---- Formulas -------------------------------------------------------------------------------------------------------
# Algebra can take for ever, and what is compared here was written by a model. Nothing in Python stops it when its time
# is up, so it is done in another process, whose child the kernel kills when its CPU time is over, however busy the
# machine is; the next child begins warm.

CPU_LIMIT = 0.8  # seconds for a comparison, which takes about 0.02
CLOCK_LIMIT = 60  # seconds; for what waits instead of computing, and for all on Windows, which cannot fork
TIMEOUTS = []  # the comparisons given up, which are wrong this once, but not remembered as wrong
WORKERS = {}  # of each process that asks, which may have been forked
LOCK = threading.Lock()


def formulas_match(formula, true_formula):
    """Whether sympy finds two formulas equal before CPU_LIMIT is over."""
    try:
        return same_formula(formula, true_formula)
    except TimeoutError:
        warnings.warn(f"a formula that cannot be compared in {CPU_LIMIT} s counts as wrong, see reward.TIMEOUTS")
        TIMEOUTS.append((formula, true_formula))
        return False


@functools.lru_cache(maxsize=2**16)
def same_formula(*formulas):
    """formulas_match, which remembers verdicts, but not that the time was over, which raises TimeoutError."""
    with LOCK:
        worker = WORKERS.get(os.getpid())
        if worker is None or worker.poll() is not None:
            worker = WORKERS[os.getpid()] = start_worker()
        worker.stdin.write(json.dumps(formulas) + "\n")
        worker.stdin.flush()
        verdict = worker.stdout.readline().strip()
    if not verdict:
        raise TimeoutError
    return verdict == "True"


def start_worker():
    """A process that runs `work`; it takes a second, and however long a busy machine needs."""
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, encoding="utf-8")
    worker = subprocess.Popen([sys.executable, __file__], **pipes, start_new_session=True)  # Ctrl-C is for who asks
    found = worker.stdout.readline().strip()
    if found != "ready":
        why = f"math-verify, which compares formulas, does not work ({found or 'its process was killed'})"
        raise ImportError(f"{why}: pip install -r requirements.txt")
    return worker


def work():
    """Reads two formulas a line, and writes True, False or, if it took too long, an empty line."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # where it shares a console with who asks (Windows)
    try:
        for formula in r"\frac{\sqrt{2}x^2}{2}", r"(1,2]\cup\{3\}", r"\sin(\pi+1)", "2<x":
            equal(formula, formula)  # the first of a kind takes long, which is not to count
    except ImportError as error:
        return print(error, flush=True)
    print("ready", flush=True)
    while hasattr(os, "fork") and (child := os.fork()):
        if os.waitpid(child, 0)[1] != signal.SIGPROF:
            return  # it broke, or nobody asks any more
        print(flush=True)
    set_timer = getattr(signal, "setitimer", lambda *parts: None)  # Windows has none
    kind = getattr(signal, "ITIMER_PROF", None)  # counts CPU time
    for line in sys.stdin:
        faulthandler.dump_traceback_later(CLOCK_LIMIT, exit=True)
        set_timer(kind, CPU_LIMIT)
        try:
            verdict = bool(equal(*json.loads(line)))
        except BaseException:  # whatever a library makes of it
            verdict = False
        set_timer(kind, 0)
        faulthandler.cancel_dump_traceback_later()
        print(verdict, flush=True)


def equal(formula, true_formula):
    """Whether sympy finds two formulas equal; exactly, where math-verify by itself compares numbers to 15 digits."""
    from math_verify import grader
    from sympy import N
    from sympy.logic.boolalg import Boolean

    one, other = map(to_sympy, (formula, true_formula))
    if NOISE.fullmatch(true_formula):
        return near(Fraction(str(N(one, 30))), true_formula)
    if not (isinstance(one, Boolean) and isinstance(other, Boolean)) or one.free_symbols == other.free_symbols:
        one, other = (x.as_set() if isinstance(x, Boolean) and len(x.free_symbols) == 1 else x for x in (one, other))
    grader.sympy_numeric_eq = lambda one, other, *digits: False
    grader.sympy_symbolic_eq = lambda one, other: is_zero(one - other)
    return grader.verify(other, one, timeout_seconds=None)


def to_sympy(formula):
    r"""`\frac{x}{2}` → x/2, with real variables, i, and e."""
    import sympy
    from latex2sympy2_extended import NormalizationConfig, latex2sympy
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig, normalize_latex

    for word, joined in ("or", sympy.Or), ("and", sympy.And):
        if len(parts := formula.split(f" {word} ")) > 1:
            return joined(*map(to_sympy, parts))
    formula = re.sub(r"(\d*)\.(\d+)", lambda m: rf"\frac{{{m[1]}{m[2]}}}{{{10 ** len(m[2])}}}", formula)
    formula = re.sub(r"([\d}])°", r"\1\\cdot\\frac{\\pi}{180}", formula)
    formula = re.sub(r"([A-Za-z])('+)", lambda m: rf"{m[1]}_{{prime{len(m[2])}}}", formula)
    layout = NormalizationConfig(basic_latex=True, malformed_operators=True, nits=True, boxed="none", units=False)
    exact = ConversionConfig(lowercase_symbols=False)
    options = dict(is_real=True, convert_degrees=False, normalization_config=None, conversion_config=exact)
    tree = latex2sympy(normalize_latex(formula, layout), **options).doit()
    i, e = sympy.symbols("i e", real=True)
    return tree.subs({i: sympy.I, e: sympy.E}).replace(
        lambda x: x.is_Pow and x.base.is_negative and x.exp.is_Rational and x.exp.q % 2 and x.exp.q > 1,
        lambda x: (-1) ** x.exp.p * (-x.base) ** x.exp,  # odd roots of negative numbers are real
    )


def is_zero(difference):
    """Whether it is 0 for all variables or, where no absolute value is taken, for positive ones."""
    import sympy

    difference = sympy.simplify(difference)
    if difference.is_number:
        return difference == 0 or bool(difference.equals(0))
    return not difference.has(sympy.Abs) and sympy.simplify(sympy.posify(difference)[0]) == 0


if __name__ == "__main__":
    work()

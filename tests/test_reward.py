import contextlib
import json
import os
import re
import runpy
import signal
import sqlite3
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import numpy
import pytest
import torch
from architectures import SIZES
from conftest import ROOT, question
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Qwen2Config, Qwen2ForSequenceClassification

import dapo
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
        (r"\fbox{9}", "9"),
        (r"\boxed 9.", "9"),
        ("so $\\boxed 9$ it is", "9"),
        ("\\boxed\n{\n9\n}", "9"),
        (r"\boxed{\boxed{9}}", "9"),
        (r"\boxed{Answer: 9}", "9"),
        (r"\boxed{\{1, \{2\}\}}", r"\{1, \{2\}\}"),
        (r"\boxed{\left\{1\right\} \}}", r"\left\{1\right\} \}"),
        (r"The final answer is: $\boxed{9}$. I hope it is correct.", "9"),
        ("The final answer is $9$. I hope it is correct.", "9"),
        ("The answer is 3.14.", "3.14"),
        ("The answer is 9, because 3 * 3 = 9.", "9"),
        ("### Final Answer: 9", "9"),
        ("**Final Answer:**\n\n9", "9"),
        ("__Answer__: `9`", "9"),
        ("ANSWER：（B）", "（B）"),
        (r"Answer: \(9\)", "9"),
        ("Answer: 5 or 6", "5 or 6"),
        ("#### **9**", "9"),
        ("##### $1,000.50", "$1,000.50"),
        ("**答案**：42。", "42"),
        ("最终答案是：$42$", "42"),
        ("答案为 42 个。", "42 个"),
        ("<think>#### 1</think>\n#### 2", "2"),
        ("<think>#### 1</think>", None),
        ("<think>so</think>#### 1</think> 2", None),
        ("#### 1\nor rather #### ", "1"),  # an announcement of nothing changes nothing
        (r"\boxed{1}, no: \boxed{2", None),
        ("The answer: ", None),
        ("Answer: ...", None),
        ("my answers: 9", None),
        ("there are 12 apples", None),
        ("####", None),
        (r"\boxed{9}. This answer is in simplest form.", "9"),
        ("Answer: 9\n\n#### Explanation\nThree times three.", "9"),
        ("**Final Answer**\n\n$$\n9\n$$", "9"),
        ("<answer>9</answer>", "9"),
        ("**Answer:**\n- 9", "9"),
        (r"so $x = -\boxed{9}$", "-9"),
        (r"the roots are $\boxed{3}$, $\boxed{5}$ and $\boxed{7}$.", "3, 5, 7"),
        (r"either \boxed{3} or \boxed{5}", "3 or 5"),
        (r"first \boxed{3}. No, that is wrong; it is \boxed{5}.", "5"),
        ("<think>#### 1", None),
        ("</think>#### 1<think>#### 2", None),
        ("#### \n5", None),
        (r"\boxed{", None),
        (r"\boxed{}", None),
        ("", None),
    ],
)
def test_extract_answer(text, answer):
    assert reward.extract_answer(text) == answer


ANSWERS = [
    pytest.param(*re.fullmatch("(.+) ([=!]=) (.+)", line).groups(), id=line)
    for line in (Path(__file__).parent / "answers.txt").read_text(encoding="utf-8").splitlines()
    if line and not line.startswith("# ")
]


def test_a_prompt_may_open_a_thought():
    assert reward.extract_answer("#### 1", "2-1?\n<think>\n") is None
    assert reward.extract_answer("so</think>#### 1", "2-1?\n<think>\n") == "1"
    assert reward.extract_answer("#### 1", "Think between <think> and </think>.") == "1"
    info = {"question": "2-1?", "prompt": "<think>"}
    assert not reward.compute_score("", "#### 1", "1", info)["acc"] and reward.compute_score("", "#### 1", "1")["acc"]


# judged_answers.json: 574 answers after public bug reports. own_answers.json: 240 ordinary ones to GSM8K's, MATH's, and
# Chinese questions, and 839 of the same kinds as the 574, written before they were tried and used since to mend the
# judge; "missed" says why reward.py judges one otherwise than a person would.
JUDGED = [
    pytest.param(
        case,
        id=f"{case['kind']}: {case['response'][-40:]!r}, {case['gold']!r}",
        marks=[pytest.mark.xfail(reason=case["missed"], strict=True)] if "missed" in case else [],
    )
    for name in ("judged_answers.json", "own_answers.json")
    for case in json.loads((Path(__file__).parent / name).read_text(encoding="utf-8"))
]


@pytest.mark.parametrize("case", JUDGED)
def test_judged_answers(case):
    verdict = reward.compute_score("", case["response"], case["gold"], {"question": case.get("question", "")})
    assert verdict["acc"] is case["right"]


QUESTION = r"Simplify $\sqrt{50}$. Which is larger, 2/3 or \frac{3}{5}, and what is $x+1$ times $(x+2)(x+3)$?"


@pytest.mark.parametrize(
    "answer, truth, right",
    [
        (r"\sqrt{50}", r"5\sqrt{2}", False),
        (r"\sqrt {50}", r"5\sqrt2", False),
        (r"5\sqrt{2}", r"\sqrt{50}", True),
        ("(x+2)(x+3)", "x^2+5x+6", False),
        ("(x+3)(x+2)", "(x+2)(x+3)", True),
        ("x+1", "1+x", True),
        ("2/3", r"\frac{2}{3}", True),
        (r"\frac{3}{5}", "0.6", True),
    ],
)
def test_a_formula_copied_from_the_question_is_no_answer(answer, truth, right):
    judged = reward.compute_score("", f"Answer: {answer}", truth, {"question": QUESTION})
    assert judged["acc"] is right and reward.compute_score("", f"Answer: {answer}", truth)["acc"]
    assert reward.trl_reward([f"Answer: {answer}"], [truth], prompts=[QUESTION]) == [1.0 if right else -1.0]


@pytest.mark.parametrize("one, sign, other", ANSWERS)
def test_answers_match(one, sign, other):
    assert reward.answers_match(one, other) is (sign == "==") and reward.answers_match(other, one) is (sign == "==")


@pytest.mark.parametrize(
    "work",
    ["13+21", "2*17", r"2\cdot17", "40-6", r"17\times2", r"\frac{60}{2}+4", "34-0", r"4\sqrt{4}+26", r"\sqrt{1156}"],
)
def test_work_left_to_the_judge_is_no_answer(work):
    assert not reward.answers_match(work, "34")
    assert reward.answers_match("34", work), "as a ground truth it stands for what it comes to"


# ---- Properties -----------------------------------------------------------------------------------------------------

numbers = st.fractions(min_value=-(10**12), max_value=10**12, max_denominator=10**6)
whole_numbers = st.integers(min_value=-(10**30), max_value=10**30)
hundredths = st.integers(min_value=-(10**12), max_value=10**12)
any_text = st.text(st.characters(), max_size=200)  # control characters and lone surrogates too
latex_like = st.text(r"\{}$()[]^_*#/+-=<>|&%,.;:!? 0123456789abx°×（）１" + "\n", max_size=60)


def decimal(count):
    """-105 → -1.05"""
    return f"{'-' * (count < 0)}{abs(count) // 100}.{abs(count) % 100:02}"


UNIT_FORMS = ["{}%", "{} apples", r"{}\text{{ cm}}", r"{}^\circ", r"\${}"]
WHOLE_FORMS = ["{}", "{:+}", "{:,}", "{}.", "{}.0", "{}e0", "${}$", r"\text{{{}}}", r"\boxed{{{}}}", "x={}", "**{}**"]
WHOLE_FORMS += [r"\({}\)", "{}/1", r"\frac{{{}}}{{1}}", *UNIT_FORMS]
FRACTION_FORMS = [
    "{}/{}",
    r"\frac{{{}}}{{{}}}",
    r"\dfrac {{{}}} {{{}}}",
    r"$\tfrac{{{}}}{{{}}}$",
    "{} / {}",
    r"x = \frac{{{}}}{{{}}}",
]


@given(whole_numbers, st.sampled_from(WHOLE_FORMS), st.sampled_from(WHOLE_FORMS), st.integers(1, 10**6))
def test_a_number_is_itself_in_any_form_and_no_other(number, form, other_form, more):
    same = form == other_form or form not in UNIT_FORMS or other_form not in UNIT_FORMS  # 5 apples are not 5 cm
    assert reward.answers_match(form.format(number), other_form.format(number)) is same
    assert not reward.answers_match(form.format(number), form.format(number + more))
    assert not reward.answers_match(form.format(-number), form.format(number)) or number == 0


@given(numbers, st.sampled_from(FRACTION_FORMS), st.sampled_from(FRACTION_FORMS), st.integers(1, 99))
def test_a_fraction_is_itself_in_any_form_and_no_other(number, form, other_form, factor):
    top, bottom = number.numerator, number.denominator
    assert reward.answers_match(form.format(top, bottom), other_form.format(top * factor, bottom * factor))
    assert not reward.answers_match(form.format(top, bottom), other_form.format(top * factor + 1, bottom * factor))


@given(hundredths)
def test_a_decimal_is_its_fraction_and_no_other(count):
    assert reward.answers_match(decimal(count), str(Fraction(count, 100)))
    assert reward.answers_match(f"{count}e-2", decimal(count)) and reward.answers_match(
        f"{decimal(count)}0", decimal(count)
    )
    assert not reward.answers_match(decimal(count), str(Fraction(count, 100) + Fraction(1, 10**40)))


@given(any_text | latex_like, any_text | latex_like)
@settings(deadline=None)
def test_no_text_makes_it_raise(text, other):
    extracted = reward.extract_answer(text)
    assert extracted is None or extracted.strip()
    assert reward.answers_match(text, other) in (True, False)
    assert reward.compute_score("", f"#### {text}", other)["score"] in (1.0, -1.0)


@given(
    any_text,
    st.sampled_from(["#### {}", r"\boxed{{{}}}", "Answer: {}", "**Answer:** {}.", "the answer is ${}$", "答案：{}。"]),
    numbers,
)
def test_what_is_planted_after_any_text_is_found(text, form, number):
    assert reward.extract_answer(text + "\n" + form.format(number)) == str(number)
    assert reward.compute_score("", text + "\n" + form.format(number), str(number))["acc"]


# ---- What a model may write to break it -----------------------------------------------------------------------------

HOSTILE = {
    "braces": "{" * 100_000,
    "closing braces": "}" * 100_000,
    "dollars": "$" * 100_000,
    "backslashes": "\\" * 99_999,
    "stars": "*" * 100_000,
    "hashes": "#" * 100_000,
    "digits": "9" * 100_000,
    "commas": "1," * 50_000,
    "spaces": "1 " * 50_000,
    "fractions": r"\frac{1}{" * 10_000,
    "texts": r"\text{" * 20_000 + "}" * 20_000,
    "boxes": r"\boxed{" * 50_000,
    "closed boxes": r"\boxed{" * 50_000 + "1" + "}" * 50_000,
    "answers": "answer: " * 20_000,
    "thoughts": "</think>" * 20_000,
    "parentheses": "(" * 200 + "1" + ")" * 200,
    "roots": r"\sqrt{" * 60 + "2" + "}" * 60,
    "short braces": "{" * 400,
    "bars": "|" * 400,
    "python powers": "9**9**9**9",
    "powers": "10^{10^{10}}",
    "tower": "9^{9^{9^{9}}}",
    "exponent": "1e999999999",
    "factorial": "100000!",
    "factorials": "9!!!!!!",
    "sum": r"\sum_{i=1}^{10^{12}} i",
    "hard sum": r"\sum_{i=1}^{10^{12}} i^{i}",
    "product": r"\prod_{n=1}^{10^9} n",
    "binomial": r"\binom{10^9}{10^8}",
    "polynomial": "(a+b+c+d+e+f+g)^{60}",
    "integral": r"\int_0^1 e^{x^2} \sin x^x dx",
    "surrogates": "\ud800\udfff \\frac{1}{\ud800}",
    "NUL": "1\0 + \\sqrt{2}\0",
    "lines": "\\sqrt{2}\n\n\\sqrt{3}\r\u2028",
    "code": "__import__('os').system('touch hostile')",
    "code in LaTeX": r"\sqrt{__import__('os').system('touch hostile')}",
    "division": r"\frac{0}{0}",
}


def cpu_seconds():
    """Of this process; and of those that compare formulas for it, which are a session of their own."""
    seconds = 0
    for worker in reward.WORKERS.values():
        for place in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):  # it has just ended
                fields = place.read_text().rpartition(") ")[2].split()  # from the third: state, parent, group, session
                if int(fields[3]) == worker.pid:  # its own time, and that of children it had
                    seconds += sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
    return time.process_time(), seconds


def judged_in_every_way(text):
    """Asserts that a text is wrong wherever it stands, and that no verdict takes more than a second of CPU, here or in
    the processes that compare formulas. Those have a limit of their own, on every machine; this one reads the text."""
    reward.answers_match(r"\sqrt{3+1}+x", "x+2")  # starts what compares formulas
    for announced in text, f"#### {text}", rf"\boxed{{{text}}}":
        for truth in "34", r"\sqrt{7}+x", "yes":
            before = cpu_seconds()
            assert not reward.compute_score("", announced, truth)["acc"]
            assert all(now - then <= 1 for then, now in zip(before, cpu_seconds()))
    reward.answers_match("34", text)


@pytest.mark.filterwarnings("ignore:a formula that cannot be compared")
@pytest.mark.parametrize("name", HOSTILE)
def test_nothing_makes_it_hang_or_run_code(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    reward.same_formula.cache_clear()
    judged_in_every_way(HOSTILE[name])
    reward.same_formula.cache_clear()
    with ThreadPoolExecutor(1) as thread:
        thread.submit(judged_in_every_way, HOSTILE[name]).result()
    assert not list(tmp_path.iterdir())
    assert reward.answers_match(rf"\sqrt{{{len(name) ** 2 * 2}}}", rf"{len(name)}\sqrt2"), "and it still judges others"


def test_a_time_out_is_counted_and_not_remembered(monkeypatch):
    monkeypatch.setattr(reward, "TIMEOUTS", [])
    for count in 1, 2:
        with pytest.warns(UserWarning, match="counts as wrong"):
            assert not reward.answers_match("9^{9^{9^{9}}}", r"\sqrt{7}+x")
        assert len(reward.TIMEOUTS) == count


@pytest.mark.skipif(not hasattr(signal, "SIGPROF"), reason="Windows counts no CPU time")
def test_verdicts_do_not_depend_on_load():
    """A worker that starts and judges beside eight busy processes judges as ever: its limit is on its own CPU time."""
    code = r"""
import reward, time
right = [reward.answers_match(rf"{n}\sqrt{{8}}", rf"{2 * n}\sqrt{{2}}") for n in range(3, 23)]
assert all(right) and not reward.TIMEOUTS, (right, reward.TIMEOUTS)
assert not reward.answers_match("9^{9^{9^{9}}}", r"\sqrt{7}+x")
assert reward.answers_match(r"\sqrt{50}", r"5\sqrt{2}")
"""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(8)]
    try:
        subprocess.run([sys.executable, "-c", code], cwd=Path(reward.__file__).parent, check=True)
    finally:
        for process in busy:
            process.kill()
            process.wait()


def test_threads_ask_side_by_side():
    def ask(number):
        right = reward.answers_match(rf"{number}\sqrt{{8}}", rf"{2 * number}\sqrt{{2}}")
        return right and not reward.answers_match(rf"{number}\sqrt{{8}}", rf"{number}\sqrt{{2}}")

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(ask, range(3, 40)))


@pytest.mark.skipif(not hasattr(signal, "SIGALRM"), reason="Windows has no fork")
def test_a_forked_process_has_workers_of_its_own(tmp_path):
    """Two processes that read answers from one pipe would take each other's."""
    code = r"""
import multiprocessing, reward
def ask(number):
    right = reward.answers_match(rf"{number}\sqrt{{12}}", rf"{2 * number}\sqrt{{3}}")
    return right and not reward.answers_match(rf"{number}\sqrt{{12}}", rf"{number}\sqrt{{3}}")
assert ask(1)
with multiprocessing.get_context("fork").Pool(2) as pool:
    assert all(pool.map(ask, range(2, 30)))
assert ask(50)
"""
    subprocess.run([sys.executable, "-c", code], cwd=Path(reward.__file__).parent, check=True, timeout=100)


def test_workers_that_die_are_replaced():
    """Those that died idle, before the next question: a right answer is not called wrong for it."""
    assert reward.answers_match(r"2\sqrt{18}", r"6\sqrt{2}")
    worker = reward.WORKERS[reward.os.getpid()]
    worker.kill()
    worker.wait()
    assert reward.answers_match(r"3\sqrt{18}", r"9\sqrt{2}")


def test_ctrl_c_does_not_reach_the_workers():
    assert reward.answers_match(r"\sqrt{20}", r"2\sqrt{5}")
    reward.WORKERS[reward.os.getpid()].send_signal(signal.SIGINT)
    time.sleep(0.2)
    assert reward.answers_match(r"\sqrt{45}", r"3\sqrt{5}")


def test_without_math_verify_it_says_so(monkeypatch, tmp_path):
    """Silence would teach the model that every formula is wrong."""
    (tmp_path / "math_verify.py").write_text("raise ImportError")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(reward, "WORKERS", {})
    assert reward.answers_match("1/2", "0.5")
    with pytest.raises(ImportError, match="math-verify.*pip install"):
        reward.answers_match(r"\sqrt{28}", r"2\sqrt{7}")


# ---- Rewards --------------------------------------------------------------------------------------------------------


def test_compute_score_takes_gsm8k_ground_truths():
    right = reward.compute_score("gsm8k", "I say\n#### 1,000", "a lot of work\n#### 1000")
    assert right == {"score": 1.0, "acc": True, "pred": "1,000"}
    assert reward.compute_score("gsm8k", "1000", "#### 1000") == {"score": -1.0, "acc": False, "pred": ""}
    assert reward.compute_score("math", "Answer: 9", "8")["score"] == -1.0


def test_a_ground_truth_may_be_a_number_or_a_solution_in_a_box():
    assert reward.compute_score("", "#### 8", 8)["acc"] and not reward.compute_score("", "#### 8", 9)["acc"]
    assert reward.compute_score("", r"\boxed{\frac12}", r"Because of this it is \boxed{\frac{1}{2}}.")["acc"]


def test_trl_reward_takes_texts_and_messages():
    texts = ["#### 8", "8", r"\boxed{9}"]
    messages = [[{"role": "assistant", "content": text}] for text in texts]
    for completions in texts, messages:
        scores = reward.trl_reward(
            completions=completions, answer=["8", "8", "#### 9"], prompts=["q"] * 3, trainer_state=None
        )
        assert scores == [1.0, -1.0, 1.0]


# ---- In other hands -------------------------------------------------------------------------------------------------


def from_the_page(name, folder):
    """Saves the example of that name from docs/data_and_rewards.md, as a user would."""
    page = (ROOT / "docs/data_and_rewards.md").read_text(encoding="utf-8")
    code = re.search(rf"```python\n(# {name}\n.*?)\n```\n", page, re.DOTALL)
    (folder / name).write_text(code[1], encoding="utf-8")
    return folder / name


@pytest.mark.parametrize(
    "code, right",
    [
        ("def double(x):\n    return 2 * x\n", True),
        ("def double(x):\n    return x\n", False),
        ("def double(x):\n    return 2 * x\nraise SystemExit", False),
        ("while True: pass\n", False),
        (None, False),
    ],
)
def test_the_readmes_code_runner(code, right, tmp_path):
    judge = runpy.run_path(str(from_the_page("code_reward.py", tmp_path)))["compute_score"]
    text = "I think so" if code is None else f"so\n```python\n{code}```\n"
    assert judge("", text, "assert double(4) == 8")["acc"] is right


def test_the_readmes_neural_reward_model_trains(main, make_folder, monkeypatch, tmp_path, tokenizer):
    """For real: its scores, of a random classifier, are the rewards of a run, and it is asked in batches."""
    monkeypatch.chdir(ROOT)
    policy, path = make_folder(), from_the_page("neural_reward.py", tmp_path)
    classifier = tmp_path / "classifier"
    ids = dict(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id)
    Qwen2ForSequenceClassification(Qwen2Config(**SIZES, **ids, num_labels=1)).save_pretrained(classifier)
    tokenizer.save_pretrained(classifier)
    path.write_text(
        path.read_text(encoding="utf-8").replace("your/reward-model", classifier.as_posix()), encoding="utf-8"
    )
    sizes = ["--BATCH_SIZE=2", "--GROUP_SIZE=4", "--MINI_BATCHES=1", "--NUM_STEPS=2", "--MAX_RESPONSE_LENGTH=8"]
    sizes += ["--OVERLONG_BUFFER_LENGTH=0", "--EVAL_EVERY=2", f"--OUTPUT_DIR={tmp_path / 'run'}", f"--MODEL={policy}"]
    main([*sizes, f"--REWARD={path}:compute_score"])
    db = sqlite3.connect(tmp_path / "run/run.db")
    rows = db.execute("SELECT question, response, accuracy, reward FROM responses").fetchall()
    judge = runpy.run_path(str(path))["compute_score"]
    for asked, response, accuracy, score in rows:
        alone = judge([""], [response], [""], [{"question": asked}])[0]
        assert score == pytest.approx(alone, abs=1e-5) and accuracy == (score > 0)
    assert len({row[3] for row in rows}) > len(rows) / 2
    assert db.execute("SELECT max(value) FROM metrics WHERE name = 'grad_norm'").fetchone()[0] > 0
    db.close()


@pytest.mark.parametrize("plural", [False, True])
@pytest.mark.parametrize(
    "verdict, said",
    [
        (ZeroDivisionError("of mine"), "ZeroDivisionError: of mine (" + __file__),
        (float("nan"), "{'score': nan} is not finite"),
        (float("inf"), "{'score': inf} is not finite"),
        ("1.0", "not str"),
        ([1.0], "not list"),
        ({"acc": True}, "KeyError: 'score'"),
        ({"score": 1.0, "acc": "yes"}, "not str"),
        ({"score": float("nan")}, "{'score': nan} is not finite"),
    ],
)
def test_a_verdict_that_is_none_is_named_with_its_response(verdict, said, plural, set_reward, capsys):
    def one(solution_str, **others):
        if solution_str == "third" and isinstance(verdict, Exception):
            raise verdict
        return verdict if solution_str == "third" else 1.0

    def batch(solution_strs, **others):
        return [one(text) for text in solution_strs]

    set_reward(batch if plural else one)
    with pytest.raises(dapo.RewardFault) as stop:
        dapo.judge([question(f"question {i}") for i in range(4)], ["a", "b", "third", "d"])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith(f"error: REWARD={__file__}:") and error.count("\n") == 1
    assert said in error
    if not (plural and isinstance(verdict, Exception)):  # a batch does not say at which response it failed
        assert "the question 'question 2' and the response 'third'" in error


@pytest.mark.parametrize("count", [1, 4])
def test_a_batch_with_too_few_or_too_many_verdicts(count, set_reward, capsys):
    set_reward(lambda solution_strs, **others: [1.0] * count)
    with pytest.raises(dapo.RewardFault):
        dapo.judge([question()] * 3, ["a", "b", "c"])
    assert f"{count} verdicts on 3 responses" in capsys.readouterr().err


def test_every_kind_of_number_is_a_verdict(set_reward):
    numbers = [
        1,
        1.0,
        True,
        numpy.float32(1),
        numpy.int64(1),
        torch.tensor(1.0),
        {"score": torch.tensor(1), "acc": True},
    ]
    set_reward(lambda solution_str, **others: numbers[int(solution_str)])
    for verdict in dapo.judge([question()] * 7, list("0123456")):
        assert verdict["accuracy"] == verdict["signal"] == verdict["reward"] == 1.0 and verdict["others"] == {}
        assert all(type(verdict[name]) is float for name in ("accuracy", "signal", "reward"))


def test_accuracy_score_and_prediction_are_told_apart(set_reward):
    set_reward(lambda solution_str, **others: {"score": -0.5, "acc": True, "pred": solution_str})
    verdict = dict(accuracy=1.0, signal=1.0, reward=-0.5, others={})
    assert dapo.judge([question()] * 2, ["a", "b"]) == [verdict | {"prediction": text} for text in "ab"]


@pytest.mark.parametrize(
    "value, said",
    [
        ("nowhere.py:f", "REWARD=nowhere.py:f is not a file.py:function: FileNotFoundError"),
        ("reward.py", "REWARD=reward.py is not a file.py:function"),
        ("reward.py:compute", "KeyError: 'compute'"),
    ],
)
def test_a_reward_that_is_not_there(value, said, main, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as stop:
        main([f"--REWARD={value}"])
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(lines) == 1 and said in lines[0]


def test_trl_trains_with_trl_reward(tmp_path):
    trl = pytest.importorskip("trl", reason="needs TRL: pip install trl")
    datasets = pytest.importorskip("datasets")
    seen = []

    def trl_reward(completions, answer, **columns):
        seen.append((completions, reward.trl_reward(completions, answer, **columns)))
        return seen[-1][1]

    rows = datasets.Dataset.from_list([{"prompt": "Say 7.\n", "answer": "7"}, {"prompt": "Say 8.\n", "answer": "8"}])
    sizes = dict(per_device_train_batch_size=8, num_generations=4, max_completion_length=12, max_steps=1)
    options = dict(
        output_dir=str(tmp_path), report_to=[], use_cpu=True, logging_steps=1, bf16=False, save_strategy="no"
    )
    trainer = trl.GRPOTrainer(
        str(ROOT / "toy"), reward_funcs=trl_reward, args=trl.GRPOConfig(**sizes, **options), train_dataset=rows
    )
    trainer.train()
    assert [len(scores) for _, scores in seen] == [8]
    assert any(log.get("reward") == pytest.approx(sum(seen[0][1]) / 8) for log in trainer.state.log_history)


def test_verl_loads_compute_score():
    verl = pytest.importorskip("verl.trainer.ppo.reward", reason="needs verl: pip install verl")
    omegaconf = pytest.importorskip("omegaconf")
    function = {"path": str(ROOT / "reward.py"), "name": "compute_score"}
    judge = verl.get_custom_reward_fn(omegaconf.OmegaConf.create({"reward": {"custom_reward_function": function}}))
    for text in r"so \boxed{\sqrt{8}}", "Answer: 9", "none":
        asked = dict(data_source="math", solution_str=text, ground_truth=r"2\sqrt{2}", extra_info={"index": 3})
        assert judge(**asked) == reward.compute_score(**asked)
    assert judge(**asked | {"solution_str": r"\boxed{\sqrt{8}}"}) == {"score": 1.0, "acc": True, "pred": r"\sqrt{8}"}

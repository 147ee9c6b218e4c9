"""What run.db keeps of each response, against the same worked out by other means: by hand, or by slow, plain passes."""

import contextlib
import itertools
import json
import math
import re
import sqlite3
import statistics
from collections import Counter
from types import SimpleNamespace

import pyarrow.parquet
import pytest
import torch
from conftest import ROOT, load, rows

import dapo
from reward import extract_answer

pytestmark = pytest.mark.usefixtures("no_pictures")

OLD = "step question answer response accuracy reward length truncated kept".split()  # the columns of the version before


def records(folder, table="responses", where="TRUE"):
    """The rows of a table as dictionaries, in their order, with the JSON lists in them read."""
    with contextlib.closing(sqlite3.connect(folder / "run.db")) as db:
        db.row_factory = sqlite3.Row
        found = [dict(row) for row in db.execute(f"SELECT * FROM {table} WHERE {where} ORDER BY step, number")]
    lists = "tokens", "probabilities", "ratios"
    return [row | {name: row[name] and json.loads(row[name]) for name in lists} for row in found]


def metric(folder, name):
    """{step: value}"""
    return dict(rows(folder, f"SELECT step, value FROM metrics WHERE name = '{name}'"))


def grouped(responses):
    """Lists of the rows of each group."""
    return [list(group) for _, group in itertools.groupby(responses, lambda row: (row["step"], row["group_number"]))]


def check_advantages(group):
    """eq. 9 by hand: over the whole group, also those that the loss leaves out."""
    rewards = [row["reward"] for row in group]
    mean, std = statistics.fmean(rewards), statistics.stdev(rewards)
    for row in group:
        assert row["advantage"] == pytest.approx((row["reward"] - mean) / (std + 1e-6), rel=1e-5, abs=1e-5) or (
            row["fate"] == "truncated"
        )


@pytest.fixture
def settings(settings, make_folder):
    """With a model that ends many of its responses early, so that they differ in length."""
    return [*settings, f"--MODEL={make_folder(ends=[0, *range(20, 60)])}"]


@pytest.fixture(scope="module")
def toy_run(tmp_path_factory):
    """A run of one step of the toy model, which writes answers, so short of room that some are cut off."""
    folder = tmp_path_factory.mktemp("toy") / "run"
    constants = dict(
        MODEL=ROOT / "toy", OUTPUT_DIR=folder, NUM_STEPS=1, EVAL_EVERY=9, BATCH_SIZE=5, GROUP_SIZE=4, MINI_BATCHES=2,
        MAX_RESPONSE_LENGTH=72, OVERLONG_BUFFER_LENGTH=60, OVERLONG_PENALTY_FACTOR=0.5, MAX_GEN_BATCHES=6, DEVICE="cpu",
        TRAIN_DATASETS=[{"path": str(ROOT / "toy/train.parquet"), "type": "parquet", "input": "question",
                         "output": "answer"}],
        EVAL_DATASETS=[{"path": str(ROOT / "toy/test.parquet"), "type": "parquet", "input": "question",
                        "output": "answer", "split": "train[:4]"}],
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dapo, "draw_metrics", lambda folder: None)
        for name in dapo.CONSTANTS:
            patch.setattr(dapo, name, getattr(dapo, name))
        dapo.main([f"--{name}={value}" for name, value in constants.items()])
    return folder


def test_numbers_rounds_and_questions(toy_run):
    """As many questions as the share kept so far asks for, each with its own group, in the order of sampling."""
    table = pyarrow.parquet.read_table(ROOT / "toy/train.parquet").to_pylist()
    answers, responses = {row["question"]: row["answer"] for row in table}, records(toy_run)
    groups = grouped(responses)
    assert [row["number"] for row in responses] == list(range(len(responses)))
    assert [row["group_number"] for row in responses] == [place // 4 for place in range(len(responses))]
    assert all(len({(row["question"], row["round"]) for row in group}) == 1 for group in groups)
    assert all(answers[row["question"]] == row["answer"] for row in responses)
    assert len({group[0]["question"] for group in groups}) == len(groups)

    rounds, sizes, seen, kept = [group[0]["round"] for group in groups], [], 0, 0
    while seen < len(groups):
        sizes.append(min(5, math.ceil((5 - kept) * (seen + 1) / (kept + 1))))
        fates = [group[0]["fate"] for group in groups[seen : seen + sizes[-1]]]
        seen, kept = seen + sizes[-1], kept + fates.count("trained") + fates.count("surplus")
    assert rounds == [number for number, size in enumerate(sizes, 1) for _ in range(size)]
    assert metric(toy_run, "generation_batches") == {1: len(sizes)} and len(sizes) > 1


def test_rewards_and_advantages_by_hand(toy_run):
    responses, seen = records(toy_run), set()
    for row in responses:
        excess = row["length"] - (72 - 60)
        penalty = 0 if excess <= 0 else -0.5 * excess / 60
        score = {1.0: 1, 0.0: -1}[row["accuracy"]]
        assert row["penalty"] == pytest.approx(penalty) and row["reward"] == pytest.approx(score + penalty)
        assert row["prediction"] == (extract_answer(row["response"]) or "")
        assert row["truncated"] <= (row["length"] == 72)
        assert row["kept"] == (row["fate"] == "trained") == (row["advantage"] is not None)
        seen.add((score, row["penalty"] < 0, row["truncated"]))
    assert {(1, True, 0), (1, False, 0), (-1, True, 1), (-1, False, 0)} <= seen
    trained = [group for group in grouped(responses) if group[0]["fate"] == "trained"]
    for group in trained:
        check_advantages(group)
    assert len(trained) == 5


def test_fates_by_the_accuracies_of_a_group(toy_run):
    mixed = 0
    for group in grouped(records(toy_run)):
        right = sum(row["accuracy"] for row in group)
        mixed += 0 < right < 4
        expected = {0: "all wrong", 4: "all correct"}.get(right, "trained" if mixed <= 5 else "surplus")
        assert [row["fate"] for row in group] == [expected] * 4
    assert mixed >= 5


def test_surplus_groups_are_the_last(main, settings, set_reward, tmp_path):
    """Of the first three groups one can be trained on, so three more are sampled; all of them could be."""
    verdicts = iter([[0] * 10, [1, 1, 1, 0, 0, 0], [1, 0, 0, 1, 1, 0], [0] * 10])
    set_reward(lambda solution_strs, **others: [float(right) for right in next(verdicts)])
    main([*settings, "--NUM_STEPS=1"])
    found = records(tmp_path / "run")
    fates = ["all correct", "trained", "all wrong", "trained", "trained", "surplus"]
    assert [row["fate"] for row in found] == [fate for fate in fates for _ in range(2)]
    assert [row["kept"] for row in found] == [0, 0, 1, 1, 0, 0, 1, 1, 1, 1, 0, 0]
    assert [row["round"] for row in found] == [1] * 6 + [2] * 6
    assert all((row["fate"] == "trained") == (row["advantage"] is not None) for row in found)
    assert all((row["fate"] == "trained") == (row["tokens"] is not None) for row in found)


def test_tokens_are_the_responses(toy_run, tokenizer):
    for row in records(toy_run):
        if row["fate"] == "trained":
            end = "" if row["truncated"] else tokenizer.eos_token
            assert "".join(row["tokens"]) == row["response"] + end
            assert len(row["tokens"]) == len(row["probabilities"]) == len(row["ratios"]) == row["length"]
            assert all(0 < value <= 1 for value in row["probabilities"]) and min(row["ratios"]) > 0
        else:
            assert row["tokens"] is row["probabilities"] is row["ratios"] is None


def test_all_correct_all_wrong_and_neither(main, settings, set_reward, tmp_path):
    """Groups with one accuracy within are named by it, whatever their scores are."""

    def judge(extra_info, solution_str, **others):
        number = int(extra_info["question"].split()[2])
        accuracy = {0: 0.0, 1: 1.0, 2: 0.25}.get(number % 4, len(solution_str) % 2)
        return {"score": accuracy * 3 - 1, "acc": accuracy}

    set_reward(judge)
    main([*settings, "--MAX_GEN_BATCHES=4", "--NUM_STEPS=1"])
    fates = {0.0: "all wrong", 1.0: "all correct", 0.25: "all equal"}
    found = Counter()
    for one, other in grouped(records(tmp_path / "run")):
        assert one["fate"] == other["fate"]
        if one["accuracy"] == other["accuracy"]:
            assert one["fate"] == fates[one["accuracy"]] and one["kept"] == 0 and one["advantage"] is None
            assert one["reward"] == pytest.approx(one["accuracy"] * 3 - 1 + one["penalty"])
        else:
            assert one["fate"] == "trained"
        found[one["fate"]] += 1
    assert set(found) >= set(fates.values())


def test_a_static_batch_is_trained_on_whatever_the_fates(main, settings, set_reward, tmp_path):
    set_reward(lambda extra_info, **others: float("1" in extra_info["question"]))
    main([*settings, "--USE_DYNAMIC_SAMPLING=False", "--OVERLONG_BUFFER_LENGTH=0"])
    found = records(tmp_path / "run")
    assert len(found) == 2 * 3 * 2
    assert {(row["fate"], row["kept"], row["advantage"], row["penalty"], row["round"]) for row in found} == {
        ("trained", 1, 0.0, 0.0, 1)
    }
    assert all(row["tokens"] and row["ratios"] for row in found)


def test_truncated_responses_count_in_the_mean_and_not_in_the_loss(main, settings, parity, tmp_path):
    main([*settings, "--USE_OVERLONG_FILTERING=True", "--GROUP_SIZE=6", "--MAX_RESPONSE_LENGTH=6"])
    trained = [group for group in grouped(records(tmp_path / "run")) if {"trained"} & {row["fate"] for row in group}]
    for group in trained:
        check_advantages(group)
        for row in group:
            assert row["fate"] == ("truncated" if row["truncated"] else "trained")
            if row["truncated"]:
                assert row["advantage"] is row["tokens"] is row["ratios"] is None and row["kept"] == 0
    assert {"truncated", "trained"} == {row["fate"] for group in trained for row in group}


# ---- The estimate of the time to the end -----------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch):
    """A clock that jumps: by 5 s in an evaluation, and by 20 s in a step. Its `said` is [(time, line)]."""
    clock = SimpleNamespace(now=1000.0, evaluations=0, said=[])
    clock.time = clock.perf_counter = lambda: clock.now

    def shape(*parts, real=dapo.shape_rewards):  # the end of sampling
        clock.now += 8
        return real(*parts)

    def update(*parts, real=dapo.update_policy):
        clock.now += 12
        return real(*parts)

    def evaluate(*parts, real=dapo.evaluate):
        clock.now, clock.evaluations = clock.now + 5, clock.evaluations + 1
        return real(*parts)

    monkeypatch.setattr(dapo, "time", clock)
    monkeypatch.setattr(dapo, "shape_rewards", shape)
    monkeypatch.setattr(dapo, "update_policy", update)
    monkeypatch.setattr(dapo, "evaluate", evaluate)
    monkeypatch.setattr(dapo, "say", lambda line: clock.said.append((clock.now, line)))
    return clock


def estimates(clock):
    """[(when, seconds to the end)]"""
    found = [
        (now, re.search(r"step 1 took 20 s: about ([\d:]+) to the end, evaluations incl", line))
        for now, line in clock.said
    ]
    return [
        (now, sum(int(part) * 60**place for place, part in enumerate(reversed(line[1].split(":")))))
        for now, line in found
        if line
    ]


LENGTHS = {  # of the run: evaluations in it, the first and the last included
    "--NUM_STEPS=1 --EVAL_EVERY=2": 2,
    "--NUM_STEPS=4 --EVAL_EVERY=2": 3,  # the last one is due twice, and counts once
    "--NUM_STEPS=5 --EVAL_EVERY=2": 4,
    "--NUM_STEPS=3 --EVAL_EVERY=9": 2,  # more than there are steps
    "--NUM_STEPS=None --NUM_EPOCHS=2 --EVAL_EVERY=3": 3,  # 2 epochs of 2 steps of 5 of the 10 questions
    "--NUM_STEPS=None --NUM_EPOCHS=1 --EVAL_EVERY=1": 3,
}


@pytest.mark.parametrize("length", LENGTHS)
def test_the_estimate_is_what_it_takes(length, clock, main, settings, chance):
    """If all steps take as long as the first one, and all evaluations, it is right to the second."""
    words = ["--BATCH_SIZE=5", "--USE_DYNAMIC_SAMPLING=False", "--DAPO_EPOCHS=1", "--MINI_BATCHES=1"]
    main([*settings, *words, *length.split()])
    ((then, seconds),) = estimates(clock)
    assert clock.now - then == seconds and clock.evaluations == LENGTHS[length]


def test_a_run_that_stopped_before_its_first_step_is_estimated_anew(clock, main, settings, set_reward, tmp_path):
    """And one that stopped later is not: its first step is over."""
    words, asked = [*settings, "--NUM_STEPS=3", "--EVAL_EVERY=2", "--USE_DYNAMIC_SAMPLING=False"], []

    def judge(solution_str, **others):
        asked.append(solution_str)
        return 1 / 0 if len(asked) in (12, 36) else len(asked) % 2

    set_reward(judge)
    for before in (0, 1):  # 10 verdicts on held-out questions, 6 on the responses of a step
        with pytest.raises(dapo.RewardFault):
            main(words)
        assert len(estimates(clock)) == before
        clock.now += 3600
    main(words)
    ((then, seconds),) = estimates(clock)
    assert seconds == 2 * 20 + 2 * 5 and then == 1000 + 5 + 3600 + 5 + 20
    assert sum("resuming the run" in line for _, line in clock.said) == 2


# ---- Tokens: their probabilities and ratios -------------------------------------------------------------------------


@torch.no_grad()
def plain_log_probs(model, response):
    """One forward pass over the prompt and the response, nothing else, and a log-softmax of all logits."""
    ids, start = torch.cat([response.question.prompt, response.tokens]), len(response.question.prompt)
    log_softmax = torch.log_softmax(model(ids[None], use_cache=False).logits[0] / dapo.TEMPERATURE, -1)
    return log_softmax[range(start - 1, len(ids) - 1), ids[start:]]


@pytest.fixture
def references(monkeypatch):
    """Lists, filled as a run goes on, of [log-probabilities before the step, and before the last update] of each
    response trained on, in the order in which they were sampled."""
    found, last = [], {}

    def update(model, base, optimizer, groups, step, real=dapo.update_policy):
        before = [(one, plain_log_probs(model, one)) for group in groups for one in group if one.advantage is not None]
        metrics = real(model, base, optimizer, groups, step)
        found.extend([old, last[one]] for one, old in before)
        return metrics

    def accumulate(model, mini_batch, real=dapo.accumulate_gradients):
        last.update({one: plain_log_probs(model, one) for one in mini_batch})
        return real(model, mini_batch)

    monkeypatch.setattr(dapo, "update_policy", update)
    monkeypatch.setattr(dapo, "accumulate_gradients", accumulate)
    return found


FAST = "--LEARNING_RATE=0.01", "--WARMUP_STEPS=0", "--GROUP_SIZE=4", "--MAX_RESPONSE_LENGTH=24"


@pytest.mark.parametrize("tokens, filtering", [(16384, False), (90, False), (1, True)])
def test_probabilities_and_ratios_are_those_of_plain_passes(
    tokens, filtering, main, settings, parity, references, tmp_path
):
    """Before the step, and just before the last update by this response; for any micro-batches, at a temperature."""
    main([*settings, *FAST, "--TEMPERATURE=0.8", f"--MICRO_BATCH_TOKENS={tokens}", "--MINI_BATCHES=3",
          f"--USE_OVERLONG_FILTERING={filtering}"])  # fmt: skip
    trained = records(tmp_path / "run", where="fate = 'trained'")
    assert len(trained) == len(references) > 6
    for row, (old, last) in zip(trained, references):
        assert row["probabilities"] == pytest.approx(old.exp().tolist(), rel=1e-3)
        assert row["ratios"] == pytest.approx((last - old).exp().tolist(), rel=1e-3)
    ratios = list(itertools.chain(*(row["ratios"] for row in trained)))
    assert sum(abs(ratio - 1) > 0.05 for ratio in ratios) > len(ratios) / 4


@pytest.mark.parametrize("tokens", [16384, 50])
def test_one_pass_in_one_mini_batch_gives_ratios_of_1(tokens, main, settings, parity, tmp_path):
    main([*settings, *FAST, "--DAPO_EPOCHS=1", "--MINI_BATCHES=1", f"--MICRO_BATCH_TOKENS={tokens}"])
    trained = records(tmp_path / "run", where="fate = 'trained'")
    assert trained and all(row["ratios"] == pytest.approx([1] * row["length"], rel=1e-3) for row in trained)


def test_tokens_beyond_the_clip_are_those_that_the_metrics_count(main, settings, parity, tmp_path):
    main([*settings, *FAST, "--DAPO_EPOCHS=1", "--MINI_BATCHES=6", "--CLIP_RANGE_LOW=0.1", "--CLIP_RANGE_HIGH=0.3"])
    for step in (1, 2):
        tokens = [
            (row["advantage"], ratio)
            for row in records(tmp_path / "run", where=f"fate = 'trained' AND step = {step}")
            for ratio in row["ratios"]
        ]
        held = {"low": sum(a < 0 and ratio < 0.9 for a, ratio in tokens) / len(tokens)}
        held["high"] = sum(a > 0 and ratio > 1.3 for a, ratio in tokens) / len(tokens)
        for end, share in held.items():
            assert metric(tmp_path / "run", f"clip_fraction/{end}")[step] == pytest.approx(share) and share > 0.01


def test_recorded_tokens_are_bounded_and_change_nothing_else(main, settings, parity, tmp_path):
    models, found = [], {}
    for number in (0, 60, 2**16):
        folder = tmp_path / str(number)
        main([*settings, *FAST, f"--RECORDED_TOKENS={number}", f"--OUTPUT_DIR={folder}"])
        models.append((folder / "step_2/model.safetensors").read_bytes())
        found[number] = records(folder)
    assert models[0] == models[1] == models[2]
    empty = dict.fromkeys(["tokens", "probabilities", "ratios"])
    assert found[0] == [row | empty for row in found[60]] == [row | empty for row in found[2**16]]
    for step in (1, 2):
        left, count = 60, 0
        for row, whole in zip(found[60], found[2**16]):
            if row["step"] == step and whole["tokens"]:
                left -= len(whole["tokens"])
                assert row == (whole if left >= 0 else whole | empty)
                count += left >= 0
        assert left < 0 < count
    assert all(bool(row["tokens"]) == (row["fate"] == "trained") for row in found[2**16])


# ---- Held-out responses, and runs that are resumed ------------------------------------------------------------------


@torch.no_grad()
def plain_greedy(model, prompt, limit):
    ids = prompt
    for _ in range(limit):
        ids = torch.cat([ids, model(ids[None], use_cache=False).logits[0, -1:].argmax(-1)])
        if ids[-1].item() in model.generation_config.eos_token_id:
            break
    return ids[len(prompt) :]


def test_held_out_responses_are_greedy_and_complete(main, settings, parity, tmp_path):
    main([*settings, "--EVAL_EVERY=1", "--EVAL_SAMPLES=2"])
    for step in (0, 1, 2):
        found = records(tmp_path / "run", "held_out", f"step = {step}")
        assert [row["question"] for row in found] == [f"Tom has {number} apples." for number in range(10, 20)]
        assert [row["answer"] for row in found] == [f"#### {number}" for number in range(10, 20)]
        assert [row["number"] for row in found] == [row["group_number"] for row in found] == list(range(10))
        columns = {"accuracy": "accuracy", "response_length": "length", "truncated_fraction": "truncated"}
        for name, column in columns.items():
            mean = statistics.fmean(row[column] for row in found)
            assert metric(tmp_path / "run", f"eval/{name}")[step] == pytest.approx(mean)
        assert all(row["accuracy"] == len(row["response"]) % 2 for row in found)
        assert not any(row["tokens"] or row["kept"] or row["advantage"] for row in found)
    for step, folder in (0, dapo.MODEL), (2, tmp_path / "run/step_2"):
        model, tokenizer = load(folder)
        for row in records(tmp_path / "run", "held_out", f"step = {step}"):
            prompt = torch.tensor(dapo.read_prompt(tokenizer, [{"role": "user", "content": row["question"]}])[1])
            tokens = plain_greedy(model, prompt, 8)
            assert row["response"] == tokenizer.decode(tokens, skip_special_tokens=True)
            assert (row["length"], row["prediction"]) == (len(tokens), None)


@pytest.fixture
def two_runs(main, settings, parity, monkeypatch, tmp_path):
    """A whole run of five steps in tmp_path/whole; and one in tmp_path/cut that an error ended in the fourth step, one
    step and one evaluation after its last checkpoint. Gives what to call to resume it."""
    settings = [*settings, "--NUM_STEPS=5", "--EVAL_EVERY=1", "--CHECKPOINT_EVERY=2"]
    main([*settings, f"--OUTPUT_DIR={tmp_path / 'whole'}"])

    def fails(model, base, optimizer, groups, step, real=dapo.update_policy):
        if step == 4:
            raise ArithmeticError
        return real(model, base, optimizer, groups, step)

    with monkeypatch.context() as patch, pytest.raises(ArithmeticError):
        patch.setattr(dapo, "update_policy", fails)
        main([*settings, f"--OUTPUT_DIR={tmp_path / 'cut'}"])
    assert rows(tmp_path / "cut", "SELECT max(step) FROM responses") == [(3,)]
    return lambda: main([*settings, f"--OUTPUT_DIR={tmp_path / 'cut'}"])


def test_a_resumed_run_has_the_rows_of_a_whole_one(two_runs, tmp_path, capsys):
    two_runs()
    assert "after step 2" in capsys.readouterr().out
    for table in ("responses", "held_out"):
        assert records(tmp_path / "cut", table) == records(tmp_path / "whole", table)
    assert [step for (step,) in rows(tmp_path / "cut", "SELECT DISTINCT step FROM held_out")] == list(range(6))


def test_a_run_of_the_version_before_gets_the_new_columns(two_runs, tmp_path, capsys):
    """Its table of responses has nine columns, and there is none of held-out ones, nor a RECORDED_TOKENS."""
    with contextlib.closing(sqlite3.connect(tmp_path / "cut/run.db")) as db, db:
        kinds = "INTEGER TEXT TEXT TEXT REAL REAL INTEGER INTEGER INTEGER".split()
        db.execute(f"CREATE TABLE old ({', '.join(f'{name} {kind}' for name, kind in zip(OLD, kinds))})")
        db.execute(f"INSERT INTO old SELECT {', '.join(OLD)} FROM responses ORDER BY step, number")
        db.execute("DROP TABLE responses")
        db.execute("ALTER TABLE old RENAME TO responses")
        db.execute("DROP TABLE held_out")
        db.execute("DELETE FROM constants WHERE name = 'RECORDED_TOKENS'")
    for path in tmp_path.glob("cut/checkpoint*.pt"):
        state = torch.load(path, weights_only=True)
        del state["constants"]["RECORDED_TOKENS"]
        torch.save(state, path)

    two_runs()
    assert "after step 2" in capsys.readouterr().out
    assert records(tmp_path / "cut", where="step > 2") == records(tmp_path / "whole", where="step > 2")
    assert records(tmp_path / "cut", "held_out") == records(tmp_path / "whole", "held_out", "step >= 2")
    old = f"SELECT {', '.join(OLD)} FROM responses WHERE step <= 2 ORDER BY rowid"
    assert rows(tmp_path / "cut", old) == rows(tmp_path / "whole", old)
    assert {row["fate"] for row in records(tmp_path / "cut", where="step <= 2")} == {None}

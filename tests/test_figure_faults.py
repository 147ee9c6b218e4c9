"""Figures say what they claim, whatever a reward function returns; the first step says what keeps it from learning."""

import itertools
import math

import matplotlib.figure
import pytest
import torch
from conftest import load, question, response, rows
from test_update import make_groups

import dapo


def sampled(make_folder, tokenizer, group_size=4):
    """Groups of one question each, judged by REWARD."""
    model, _ = load(make_folder())
    prompts = [torch.tensor(tokenizer(text)["input_ids"]) for text in ("Tom has", "Tom", "apples")]
    return dapo.sample_groups(
        model, tokenizer, [dapo.Question("q", "1", "test", prompt) for prompt in prompts], group_size
    )


def verdicts(values):
    """A reward function that returns these values in turn."""
    values = itertools.cycle(values)
    return lambda solution_str, **others: next(values)


@pytest.fixture
def short(set_constants):
    set_constants(MAX_RESPONSE_LENGTH=4, OVERLONG_BUFFER_LENGTH=0)


# ---- 17. Verdicts ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong, right", [(-1, 1), (0.0, 0.5), (-2.5, 0.1)])
def test_without_acc_more_than_0_is_right(wrong, right, make_folder, tokenizer, set_reward, short):
    set_reward(verdicts([wrong] * 4 + [right] * 4 + [wrong, right, right, right]))
    groups = sampled(make_folder, tokenizer)
    assert [[r.accuracy for r in group] for group in groups] == [[0.0] * 4, [1.0] * 4, [0.0, 1.0, 1.0, 1.0]]
    metrics = dapo.sampling_metrics(groups, groups, groups, 1, 1.0)
    assert metrics["accuracy"] == 7 / 12
    assert metrics["groups/all_wrong"] == metrics["groups/all_correct"] == 1 / 3


def test_a_shown_response_is_right_if_its_score_is_more_than_0(make_folder, tokenizer, set_reward, short, capsys):
    for score, shown in (-1, "(wrong)"), (0, "(wrong)"), (0.5, "(right)"):
        set_reward(verdicts([score]))
        metrics, _ = dapo.evaluate(*load(make_folder()), [question("Tom", length=3)])
        assert shown in capsys.readouterr().out and metrics["eval/accuracy"] == (score > 0)


@pytest.mark.parametrize(
    "values, kept",
    [
        ([0.2, 0.9, 0.5, 0.3], True),  # a learned reward, which has no right and wrong
        ([-1, -2, -1, -1], True),
        ([0.3, 0.1 + 0.2, 0.3, 0.3], False),
        ([{"score": s, "acc": False} for s in (0.1, 0.4, 0.2, 0.3)], False),  # all wrong, in whatever form
        ([{"score": 1.0, "acc": a} for a in (True, False, True, True)], True),
    ],
)
def test_groups_are_filtered_by_acc_or_else_by_the_score(values, kept, make_folder, tokenizer, set_reward, short):
    set_reward(verdicts(values))
    groups = sampled(make_folder, tokenizer)
    assert dapo.filter_groups(groups) == ((groups, []) if kept else ([], groups))


@pytest.mark.parametrize("plural", [False, True])
@pytest.mark.parametrize("none", [None, {"score": None}])
def test_a_response_without_a_verdict_leaves_its_group(none, plural, make_folder, tokenizer, set_reward, short):
    values = [1.0, none, 0.0, 1.0] + [none] * 4 + [none, 1.0, none, none]
    alone = verdicts(values)
    set_reward((lambda solution_strs, **others: values) if plural else alone)
    groups = sampled(make_folder, tokenizer)
    assert [[r.reward for r in group] for group in groups] == [[1.0, 0.0, 1.0], [1.0]]
    dapo.compare_rewards(groups)
    three = dapo.group_advantages(torch.tensor([[1.0, 0.0, 1.0]]))[0].tolist()
    assert [r.advantage for r in groups[0]] == pytest.approx(three) and groups[1][0].advantage == 0
    assert all(map(math.isfinite, dapo.sampling_metrics(groups, groups, groups, 1, 1.0).values()))


def test_no_verdict_at_all_is_a_fault(set_reward, capsys):
    set_reward(verdicts([None]))
    with pytest.raises(dapo.RewardFault):
        dapo.judge([question()] * 2, ["a", "b"])
    assert "no verdict on any of 2 responses" in capsys.readouterr().err


def test_more_numbers_of_a_reward_are_recorded(main, settings, set_reward, no_pictures, tmp_path):
    coin = itertools.cycle([1.0, 0.0, 1.0])

    def judge(solution_str, **others):
        right = next(coin)
        return {"score": right, "acc": right > 0, "pred": "7", "format": 0.5, "steps": len(solution_str), "why": "text"}

    set_reward(judge)
    main([*settings, "--NUM_STEPS=1"])
    told = dict(rows(tmp_path / "run", "SELECT name, value FROM metrics WHERE name LIKE 'reward/%'"))
    lengths = [len(text) for (text,) in rows(tmp_path / "run", "SELECT response FROM responses")]
    assert told["reward/format"] == 0.5 and told["reward/steps"] == pytest.approx(sum(lengths) / len(lengths))
    assert set(told) == {"reward/mean", "reward/timeouts", "reward/format", "reward/steps"}


# ---- 18, 19. Metrics ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("buffer, expected", [(0, 0.0), (3, 1.0)])
def test_a_group_whose_overlong_penalties_differ_has_a_gradient(buffer, expected, set_constants):
    set_constants(OVERLONG_BUFFER_LENGTH=buffer, MAX_RESPONSE_LENGTH=4, USE_DYNAMIC_SAMPLING=False)
    group = [response(0.0, tokens=tokens) for tokens in ((4,), (4, 5), (4, 5, 6), (4, 5, 6, 7))]
    dapo.shape_rewards([group])
    dapo.compare_rewards([group])
    assert dapo.sampling_metrics([group], [group], [group], 1, 1.0)["groups/with_gradient"] == expected


def test_a_group_of_which_only_what_is_filtered_differs_has_none(set_constants):
    set_constants(USE_OVERLONG_FILTERING=True)
    group = [response(0.0, truncated=True), response(1.0, truncated=True)]
    dapo.compare_rewards([group])
    assert dapo.sampling_metrics([group], [group], [group], 1, 1.0)["groups/with_gradient"] == 0.0


def test_kept_says_what_was_in_the_loss(main, settings, chance, no_pictures, tmp_path):
    main([*settings, "--NUM_STEPS=1", "--USE_OVERLONG_FILTERING=True", "--USE_DYNAMIC_SAMPLING=False"])
    found = rows(tmp_path / "run", "SELECT truncated, kept FROM responses")
    assert (1, 0) in found and all(kept == 1 - truncated for truncated, kept in found)


def test_peak_memory_is_that_of_the_step(main, settings, chance, no_pictures, monkeypatch, tmp_path):
    """Asked after the update, which takes the most."""
    peak = [1.0]
    real = dapo.update_policy

    def update(*parts):
        peak[0] += 1
        return real(*parts)

    monkeypatch.setattr(dapo, "update_policy", update)
    monkeypatch.setattr(dapo, "peak_memory", lambda: peak[0])
    main(settings)
    assert rows(tmp_path / "run", "SELECT value FROM metrics WHERE name = 'memory/peak_gib'") == [(2.0,), (3.0,)]


def test_kl_avg_and_odd_names_are_drawn(main, settings, set_reward, monkeypatch):
    drawn, coin = {}, itertools.cycle([1.0, 0.0, 1.0])
    real = matplotlib.figure.Figure.savefig

    def save(figure, *parts, **others):
        drawn.update({axes.get_title(): axes.get_legend_handles_labels()[1] for axes in figure.axes})
        return real(figure, *parts, **others)

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", save)
    set_reward(lambda solution_str, **others: {"score": next(coin), r"$\x$": 1.0})
    main([*settings, "--NUM_STEPS=1", "--KL_COEF=0.1", "--EVAL_SAMPLES=2"])
    assert drawn["accuracy"] == ["training", "held-out, greedy", "held-out, avg@2"]
    assert "KL (nats per token)" in drawn and drawn["reward"] == ["mean", r"\$\x\$"]


@pytest.mark.parametrize("epochs", [1, 3])
def test_mini_batches_are_drawn_anew_in_each_pass(epochs, make_folder, set_constants, monkeypatch):
    set_constants(DAPO_EPOCHS=epochs, MINI_BATCHES=2, BATCH_SIZE=3, GROUP_SIZE=4)
    model, _ = load(make_folder())
    groups, seen, real = make_groups(), [], dapo.accumulate_gradients
    monkeypatch.setattr(dapo, "accumulate_gradients", lambda model, part: (seen.append(part), real(model, part))[1])
    dapo.update_policy(model, None, torch.optim.AdamW(model.parameters()), groups, 1)
    assert len(seen) == 2 * epochs
    everything = {id(r) for r in itertools.chain(*groups)}
    for first in range(0, len(seen), 2):
        assert {id(r) for part in seen[first : first + 2] for r in part} == everything
    cuts = {frozenset(map(id, part)) for part in seen[::2]}
    assert len(cuts) == epochs


@pytest.mark.parametrize("learning_rate", [1e-3, 1e-2])
def test_the_first_ratio_gap_is_that_of_the_first_mini_batch(learning_rate, make_folder, set_constants, monkeypatch):
    set_constants(LEARNING_RATE=learning_rate, MINI_BATCHES=2, BATCH_SIZE=2, GROUP_SIZE=4)
    model, _ = load(make_folder())
    optimizer = torch.optim.AdamW(model.parameters())
    assert dapo.update_policy(model, None, optimizer, make_groups(), 9)["first_ratio_gap"] < 1e-4
    real = dapo.store_log_probs

    def stale(model, responses, name):  # as if they were another policy's
        real(model, responses, name)
        for r in responses:
            r.old_log_probs[0] += math.log(2)

    monkeypatch.setattr(dapo, "store_log_probs", stale)
    assert dapo.update_policy(model, None, optimizer, make_groups(), 9)["first_ratio_gap"] == pytest.approx(
        0.5, abs=1e-3
    )


# ---- 20. The first step ---------------------------------------------------------------------------------------------


def first_step(groups, capsys):
    dapo.diagnose(dapo.sampling_metrics(groups, groups, groups, 1, 1.0), groups)
    return capsys.readouterr().out


def test_the_first_step_says_what_keeps_it_from_learning(capsys, set_constants):
    mixed = [response(1.0, prediction="1"), response(0.0, prediction="2")]
    wrong = [response(0.0, prediction="3")] * 2
    right = [response(1.0, prediction="3")] * 2
    unread = [response(0.0, prediction="")] * 2
    cut = [response(0.0, prediction="", truncated=True)] * 2
    untold = [response(0.0, prediction=None)] * 2
    set_constants(MAX_RESPONSE_LENGTH=77)
    assert first_step([mixed] * 4 + [wrong] * 6, capsys) == ""
    assert first_step([cut] * 9 + [mixed], capsys).startswith(
        "step 1: 90% of responses were cut off: raise MAX_RESPONSE_"
    )
    assert "=77" in first_step([cut] * 9 + [mixed], capsys)
    assert "100% of responses hold no answer that REWARD reads: see PROMPT_TEMPLATE" in first_step([unread] * 9, capsys)
    assert "90% of groups were all wrong" in first_step([wrong] * 9 + [mixed], capsys)
    assert "100% of groups were all wrong" in first_step([untold] * 9, capsys)
    assert "100% of groups were all right: take harder questions" in first_step([right] * 9, capsys)


def test_it_is_said_once_and_only_where_something_is_wrong(main, settings, set_reward, no_pictures, capsys):
    set_reward(lambda solution_str, **others: {"score": -1.0, "acc": False, "pred": ""})
    main([*settings, "--USE_DYNAMIC_SAMPLING=False"])
    said = capsys.readouterr().out
    assert said.count("step 1: 100%") + said.count("step 1: 83%") == 1 and "step 2: 1" not in said

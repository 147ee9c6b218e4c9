"""Dynamic sampling, fed with a scripted reward."""

import itertools

import pytest
import torch
from conftest import ROOT, question

import dapo
import record


@pytest.fixture
def script(set_constants, set_reward, tokenizer):
    """Replaces the model: a question's text says how many of its responses are right, and how long they are."""
    asked = []

    def scripted_tokens(model, prompts, group_size, greedy=False):
        return [torch.full((1 + i,), 9) for _ in prompts for i in range(group_size)]

    def scripted_score(ground_truth, **others):
        asked.append(ground_truth)
        right = (len(asked) - 1) % dapo.GROUP_SIZE < int(ground_truth)
        return {"score": 1.0 if right else -1.0, "acc": right, "pred": ""}

    class Model:
        generation_config = dapo.GenerationConfig(eos_token_id=[9])

    set_reward(scripted_score)
    set_constants(sample_tokens=scripted_tokens)
    set_constants(BATCH_SIZE=4, GROUP_SIZE=4, MAX_GEN_BATCHES=5, USE_DYNAMIC_SAMPLING=True, MAX_RESPONSE_LENGTH=8)

    def collect(right):
        """collect_groups over questions of which `right[i]` responses are right; also gives what was drawn."""
        drawn = []
        stream = (question(f"question {i}", str(n)) for i, n in enumerate(right))
        stream = (drawn.append(q) or q for q in stream)
        return *dapo.collect_groups(Model, tokenizer, stream), drawn

    return collect


def texts(groups):
    return [group[0].question.text for group in groups]


def test_even_groups_are_replaced_by_new_questions(script):
    groups, sampled, rounds, drawn = script([4, 2, 0, 1, 3, 0, 0, 2, 1] + [2] * 20)
    assert texts(groups)[:4] == ["question 1", "question 3", "question 4", "question 7"]
    assert len(groups) == 4 and rounds > 1
    assert len(sampled) == len(drawn) == len(set(texts(sampled)))


def test_a_full_batch_takes_one_round_and_no_more_questions(script):
    groups, sampled, rounds, drawn = script([1, 2, 3, 1] + [2] * 20)
    assert (len(groups), len(sampled), rounds, len(drawn)) == (4, 4, 1, 4)


def test_refills_are_sized_by_what_is_missing_and_the_share_kept(script, set_constants):
    set_constants(BATCH_SIZE=8)
    _, sampled, rounds, _ = script([2, 2, 2, 2, 2, 2, 2, 0] + [2] * 20)
    assert rounds == 2 and len(sampled) == 8 + 2  # one is missing, and 8 of 9 are kept (smoothed): ask for 2


def test_it_stops_at_the_cap_with_what_there_is(script):
    groups, sampled, rounds, _ = script([2] + [0, 4] * 50)
    assert rounds == 5 and texts(groups) == ["question 0"] and len(sampled) == 5 * 4
    groups, sampled, rounds, _ = script([0, 4] * 50)
    assert rounds == 5 and groups == [] and len(sampled) == 5 * 4


def test_it_stops_at_the_end_of_the_data(script):
    groups, sampled, rounds, _ = script([0, 2, 4])
    assert texts(groups) == ["question 1"] and len(sampled) == 3
    assert script([])[:3] == ([], [], 0)


def test_off_it_takes_every_group_once(script, set_constants):
    set_constants(USE_DYNAMIC_SAMPLING=False)
    groups, sampled, rounds, _ = script([0, 4, 2, 0] + [2] * 20)
    assert len(groups) == 4 and groups == sampled and rounds == 1


def test_an_all_wrong_group_is_dropped_though_penalties_differ(script, set_constants):
    set_constants(OVERLONG_BUFFER_LENGTH=8)  # responses of 1 to 4 tokens, all in the buffer
    groups, sampled, _, _ = script([0, 0, 0, 0, 2, 2, 2, 2])
    wrong = next(group for group in sampled if group[0].question.text == "question 0")
    assert len({response.reward for response in wrong}) == 4
    assert not set(texts(groups)) & {f"question {i}" for i in range(4)}


def test_shaped_reward_by_hand(script, set_constants):
    set_constants(OVERLONG_BUFFER_LENGTH=8, OVERLONG_PENALTY_FACTOR=0.8)
    (group, *_), *_ = script([2, 2, 2, 2])
    assert [r.reward for r in group] == pytest.approx([1 - 0.1, 1 - 0.2, -1 - 0.3, -1 - 0.4])
    assert [r.accuracy for r in group] == [1, 1, 0, 0]


def test_accuracy_is_logged_before_filtering(script):
    groups, sampled, rounds, _ = script([0, 0, 4, 2] + [1] * 20)
    metrics = record.sampling_metrics(groups, sampled, rounds, 1.0)
    right = [int(group[0].question.answer) / 4 for group in sampled]
    assert metrics["accuracy"] == pytest.approx(sum(right) / len(right))
    assert metrics["groups/all_wrong"] == pytest.approx(2 / len(sampled))
    assert metrics["groups/all_correct"] == pytest.approx(1 / len(sampled))
    assert metrics["dynamic_resample_rate"] == pytest.approx(1 - 4 / len(sampled))
    assert metrics["response_length/mean"] == pytest.approx(2.5) and metrics["response_length/max"] == 4
    assert metrics["generation_batches"] == rounds


def test_retry_asks_the_same_questions_again(script, set_constants):
    set_constants(RETRY_SAME_QUESTION=True, MAX_GEN_BATCHES=3)
    _, sampled, rounds, drawn = script([0, 2, 2, 4] + [2] * 20)
    assert len(drawn) == 4 and rounds == 3
    assert texts(sampled)[4:] == ["question 0", "question 3"] * 2


def test_even_questions_rest_for_some_epochs(script, set_constants):
    set_constants(REST_EPOCHS=2)
    *_, drawn = script([0, 2, 2, 2, 2])
    set_constants(NUM_STEPS=None, NUM_EPOCHS=4)
    later = [asked.text for asked in dapo.question_stream(drawn, record.Progress())]
    assert later.count("question 0") == 2 and later.count("question 1") == 4


def test_stream_draws_each_question_once_an_epoch_in_an_order_of_its_own(set_constants):
    set_constants(NUM_STEPS=None, NUM_EPOCHS=3)
    questions = [question(str(i)) for i in range(20)]
    drawn = [asked.text for asked in dapo.question_stream(questions, record.Progress())]
    epochs = [drawn[i : i + 20] for i in (0, 20, 40)]
    assert all(sorted(epoch) == sorted(str(i) for i in range(20)) for epoch in epochs) and len(drawn) == 60
    assert epochs[0] != epochs[1] != epochs[2]
    assert drawn == [asked.text for asked in dapo.question_stream(questions, record.Progress())]
    set_constants(SEED=1)
    assert drawn != [asked.text for asked in dapo.question_stream(questions, record.Progress())]
    set_constants(NUM_STEPS=5)
    assert len(list(itertools.islice(dapo.question_stream(questions, record.Progress()), 100))) == 100


def test_out_of_memory_in_sampling_halves_the_generation_batch(script, set_constants, monkeypatch, capsys):
    sizes, real = [], dapo.sample_tokens

    def small(model, prompts, group_size, greedy=False):
        sizes.append(len(prompts) * group_size)
        if sizes[-1] > 8:
            raise torch.OutOfMemoryError
        return real(model, prompts, group_size, greedy)

    set_constants(sample_tokens=small, GENERATION_BATCH=64)
    groups, sampled, rounds, drawn = script([2] * 20)
    assert sizes == [16, 16, 16, 8, 8] and dapo.GENERATION_BATCH == 8
    assert texts(groups) == [f"question {i}" for i in range(4)] and len(drawn) == 4
    assert [len(r.tokens) for r in groups[3]] == [1, 2, 3, 4]
    assert "out of memory: GENERATION_BATCH is 8 from here on" in capsys.readouterr().out


def test_when_nothing_fits_it_says_so(set_constants, main, monkeypatch, capsys):
    def full(*parts, **others):
        raise torch.OutOfMemoryError("not one byte")

    set_constants(sample_tokens=full)
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as stop:
        main(["eval"])
    assert stop.value.code == 2 and dapo.GENERATION_BATCH == 1
    error = capsys.readouterr().err
    assert "too little memory" in error and "not one byte" in error and error.count("\n") == 1


def test_samples_are_drawn_generation_batch_by_batch(script, set_constants):
    set_constants(GENERATION_BATCH=10)  # two groups of four
    sizes, real = [], dapo.sample_tokens
    set_constants(
        sample_tokens=lambda model, prompts, *others: (sizes.append(len(prompts)), real(model, prompts, *others))[1]
    )
    script([2] * 20)
    assert sizes == [2, 2]
    set_constants(GENERATION_BATCH=3)  # at least one group
    script([2] * 20)
    assert sizes[2:] == [1, 1, 1, 1]

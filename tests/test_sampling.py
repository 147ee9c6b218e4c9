"""Dynamic sampling, fed with a scripted reward."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from conftest import question, response
from transformers import GenerationConfig

import dapo


@pytest.fixture
def script(set_constants, set_reward, tokenizer):
    """Replaces the model: a question's answer says how many responses to it are right; they have 1, 2, 3 ... tokens."""

    def scripted_tokens(model, prompts, group_size, greedy=False):
        return [torch.full((1 + i,), 9) for _ in prompts for i in range(group_size)]

    def scripted_scores(data_sources, solution_strs, ground_truths, extra_infos):
        places = itertools.cycle(range(dapo.GROUP_SIZE))
        verdicts = [place < int(count) for count, place in zip(ground_truths, places)]
        return [{"score": 2.0 * right - 1, "acc": right} for right in verdicts]

    set_reward(scripted_scores)
    set_constants(sample_tokens=scripted_tokens)
    set_constants(BATCH_SIZE=4, GROUP_SIZE=4, MAX_GEN_BATCHES=5, USE_DYNAMIC_SAMPLING=True, MAX_RESPONSE_LENGTH=8)
    set_constants(OVERLONG_BUFFER_LENGTH=0)
    model = SimpleNamespace(generation_config=GenerationConfig(eos_token_id=[9]))

    def step(right):
        """One train_step over questions of which `right[i]` responses are right: what came into the batch, what was
        sampled, the metrics, and the questions drawn."""
        drawn, batches = [], []
        stream = (question(f"question {i}", str(n)) for i, n in enumerate(right))
        stream = (drawn.append(q) or q for q in stream)
        set_constants(update_policy=lambda model, base, optimizer, groups, step: batches.append(groups) or {})
        metrics, sampled = dapo.train_step(model, None, tokenizer, None, stream, 1)
        return (batches[0] if batches else None), sampled, metrics, drawn

    return step


def texts(groups):
    return [group[0].question.text for group in groups]


def test_even_groups_are_replaced_by_new_questions(script):
    batch, sampled, metrics, drawn = script([4, 2, 0, 1, 3, 0, 0, 2, 1] + [2] * 20)
    assert texts(batch) == ["question 1", "question 3", "question 4", "question 7"]
    assert metrics["generation_batches"] > 1 and metrics["groups_trained"] == 4
    assert len(sampled) == len(drawn) == len(set(texts(sampled)))


def test_a_full_batch_takes_one_round_and_no_more_questions(script):
    batch, sampled, metrics, drawn = script([1, 2, 3, 1] + [2] * 20)
    assert (len(batch), len(sampled), metrics["generation_batches"], len(drawn)) == (4, 4, 1, 4)


def test_refills_are_sized_by_what_is_missing_and_the_share_kept(script, set_constants):
    set_constants(BATCH_SIZE=8)
    _, sampled, metrics, _ = script([2, 2, 2, 2, 2, 2, 2, 0] + [2] * 20)
    # one is missing, and 7 of 8 were kept, with one more of each 8 of 9: ask for 2
    assert metrics["generation_batches"] == 2 and len(sampled) == 8 + 2


def test_no_round_is_larger_than_a_batch(script, set_constants):
    sizes, real = [], dapo.sample_groups
    set_constants(sample_groups=lambda m, t, questions, n: (sizes.append(len(questions)), real(m, t, questions, n))[1])
    script([0] * 8 + [2] * 20)
    assert sizes == [4, 4, 4]


def test_the_surplus_is_not_trained_on(script, set_constants):
    """It is recorded as sampled but not kept, and has no advantage."""
    batch, sampled, metrics, _ = script([0, 0, 2, 2] + [2] * 20)
    assert len(batch) == 4 and len(sampled) > 6
    trained = [response for group in batch for response in group]
    for one in itertools.chain(*sampled):
        assert (one.advantage is not None) == (one in trained)
    assert metrics["dynamic_resample_rate"] == pytest.approx(2 / len(sampled))  # but it was no reason to sample anew


def test_it_stops_at_the_cap_with_what_there_is(script):
    batch, sampled, metrics, _ = script([2] + [0, 4] * 50)
    assert metrics["generation_batches"] == 5 and texts(batch) == ["question 0"] and len(sampled) == 5 * 4
    batch, sampled, metrics, _ = script([0, 4] * 50)
    assert metrics["generation_batches"] == 5 and batch == [] and len(sampled) == 5 * 4
    assert metrics["groups_trained"] == 0


def test_it_stops_at_the_end_of_the_data(script):
    batch, sampled, *_ = script([0, 2, 4])
    assert texts(batch) == ["question 1"] and len(sampled) == 3
    assert script([])[:3] == (None, [], {})


def test_off_it_takes_every_group_once(script, set_constants):
    set_constants(USE_DYNAMIC_SAMPLING=False)
    batch, sampled, metrics, _ = script([0, 4, 2, 0] + [2] * 20)
    assert len(batch) == 4 and batch == sampled and metrics["generation_batches"] == 1
    assert metrics["groups/with_gradient"] == 1 / 4 and metrics["dynamic_resample_rate"] == 0


def test_an_all_wrong_group_is_dropped_though_penalties_differ(script, set_constants):
    set_constants(OVERLONG_BUFFER_LENGTH=8)  # responses of 1 to 4 tokens, all in the buffer
    batch, sampled, *_ = script([0, 0, 0, 0, 2, 2, 2, 2])
    wrong = next(group for group in sampled if group[0].question.text == "question 0")
    assert len({response.reward for response in wrong}) == 4
    assert texts(batch) == [f"question {i}" for i in range(4, 8)]


def test_filter_groups_by_hand(set_constants):
    groups = [
        [response(accuracy, reward=0.1 * i) for i, accuracy in enumerate(row)] for row in ((1, 0), (1, 1), (0, 0))
    ]
    assert dapo.filter_groups(groups) == (groups[:1], groups[1:])
    set_constants(USE_DYNAMIC_SAMPLING=False)
    assert dapo.filter_groups(groups) == (groups, [])


def test_shaped_reward_by_hand(script, set_constants):
    set_constants(OVERLONG_BUFFER_LENGTH=8, OVERLONG_PENALTY_FACTOR=0.8)
    (group, *_), *_ = script([2, 2, 2, 2])
    assert [r.reward for r in group] == pytest.approx([1 - 0.1, 1 - 0.2, -1 - 0.3, -1 - 0.4])
    assert [r.accuracy for r in group] == [1, 1, 0, 0]
    rewards = torch.tensor([[0.9, 0.8, -1.3, -1.4]], dtype=torch.float64)
    by_hand = (rewards - rewards.mean()) / (rewards.var(unbiased=True).sqrt() + 1e-6)
    assert [r.advantage for r in group] == pytest.approx(by_hand[0].tolist(), abs=1e-5)


def test_accuracy_is_logged_before_filtering(script):
    _, sampled, metrics, _ = script([0, 0, 4, 2] + [1] * 20)
    right = [int(group[0].question.answer) / 4 for group in sampled]
    assert metrics["accuracy"] == pytest.approx(sum(right) / len(right))
    assert metrics["reward/mean"] == pytest.approx(2 * metrics["accuracy"] - 1)
    assert metrics["groups/all_wrong"] == pytest.approx(2 / len(sampled))
    assert metrics["groups/all_correct"] == pytest.approx(1 / len(sampled))
    assert metrics["groups/with_gradient"] == 1 and metrics["groups_trained"] == 4
    assert metrics["dynamic_resample_rate"] == pytest.approx(3 / len(sampled))
    assert metrics["response_length/mean"] == pytest.approx(2.5) and metrics["response_length/max"] == 4
    assert metrics["generation_batches"] == 2


def test_retry_asks_the_same_questions_again(script, set_constants):
    set_constants(RETRY_SAME_QUESTION=True, MAX_GEN_BATCHES=3)
    _, sampled, metrics, drawn = script([0, 2, 2, 4] + [2] * 20)
    assert len(drawn) == 4 and metrics["generation_batches"] == 3
    assert texts(sampled)[4:] == ["question 0", "question 3"] * 2


def drawn_questions(questions):
    return dapo.question_stream(questions, SimpleNamespace(step=0, drawn=0))


def test_even_questions_rest_for_some_epochs(script, set_constants):
    set_constants(REST_EPOCHS=2)
    *_, drawn = script([0, 2, 2, 2, 2])
    set_constants(NUM_STEPS=None, NUM_EPOCHS=4)
    later = [asked.text for asked in drawn_questions(drawn)]
    assert later.count("question 0") == 2 and later.count("question 1") == 4


def test_stream_draws_each_question_once_an_epoch_in_an_order_of_its_own(set_constants):
    set_constants(NUM_STEPS=None, NUM_EPOCHS=3)
    questions = [question(str(i)) for i in range(20)]
    drawn = [asked.text for asked in drawn_questions(questions)]
    epochs = [drawn[i : i + 20] for i in (0, 20, 40)]
    assert all(sorted(epoch) == sorted(str(i) for i in range(20)) for epoch in epochs) and len(drawn) == 60
    assert epochs[0] != epochs[1] != epochs[2]
    assert drawn == [asked.text for asked in drawn_questions(questions)]
    set_constants(SEED=1)
    assert drawn != [asked.text for asked in drawn_questions(questions)]
    set_constants(NUM_STEPS=5)
    assert len(list(itertools.islice(drawn_questions(questions), 100))) == 100


@pytest.mark.parametrize("taken", [0, 7, 20, 33])
def test_the_stream_goes_on_from_where_it_was(taken, set_constants):
    set_constants(NUM_STEPS=None, NUM_EPOCHS=3)
    questions, progress = [question(str(i)) for i in range(20)], SimpleNamespace(step=0, drawn=0)
    whole = [asked.text for asked in drawn_questions(questions)]
    stream = dapo.question_stream(questions, progress)
    first = [next(stream).text for _ in range(taken)]
    assert progress.drawn == taken
    rest = [asked.text for asked in dapo.question_stream(questions, SimpleNamespace(step=0, drawn=taken))]
    assert first + rest == whole


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

"""Sampling and scoring: the distribution that is scored is the one that was sampled from, for many architectures."""

import json

import pytest
import torch
from architectures import KINDS
from conftest import HOSTILE, load
from transformers import AutoModelForCausalLM, DynamicCache, GenerationConfig

import dapo

LENGTHS = [3, 17, 9, 1, 12, 7]


def make_prompts(tokenizer):
    torch.manual_seed(1)
    return [torch.randint(10, len(tokenizer), (length,)) for length in LENGTHS]


@pytest.fixture
def sampled_from(monkeypatch):
    """The probabilities of each row that sampling hands to torch.multinomial, one (rows, V) a token."""
    record, multinomial = [], torch.multinomial

    def spy(probabilities, *args, **kwargs):
        record.append(probabilities.clone())
        return multinomial(probabilities, *args, **kwargs)

    monkeypatch.setattr(torch, "multinomial", spy)
    return record


def plain_model(folder, ends=None, pad=0):
    """The model as transformers loads it, with none of its settings for sampling."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.generation_config = GenerationConfig(eos_token_id=ends, pad_token_id=pad)
    return model.eval()


@pytest.mark.parametrize("kind", KINDS)
def test_scored_is_sampled_and_greedy_is_generate(kind, make_folder, tokenizer, sampled_from, set_constants):
    """Neither the shared reading of a prompt nor padding nor leaving the batch in stages changes anything: what tokens
    are drawn from is softmax(logits / T) of a plain forward pass, and greedy tokens are those of one plain call."""
    set_constants(MAX_RESPONSE_LENGTH=18, TEMPERATURE=0.7, DECODE_STAGE=5, LOGITS_CHUNK=3 * len(tokenizer))
    ends = [tokenizer.eos_token_id, *range(20, 60)]  # many, so that responses end at many lengths
    folder, questions = make_folder(kind, ends), make_prompts(tokenizer)
    model, plain = load(folder)[0], plain_model(folder, ends)
    torch.manual_seed(2)
    responses = dapo.sample_tokens(model, questions, group_size=8)
    prompts = [prompt for prompt in questions for _ in range(8)]
    lengths = [len(response) for response in responses]
    assert len(set(lengths)) > (3 if kind == "gemma3" else 4) and max(lengths) == 18 > min(lengths)

    tolerance = 5e-4 if kind == "smollm3" else 1e-4  # its fp32 rounds more: in fp64 the two agree to 1e-6
    log_probs, entropy, mask = dapo.token_log_probs(model, prompts, responses)
    assert log_probs.shape == entropy.shape == mask.shape == (len(prompts), 18)
    assert mask.sum(1).tolist() == lengths
    assert len(sampled_from) == 18
    for position, probabilities in enumerate(sampled_from):
        # the rows of this call: those that had not ended when its stage began
        rows = [i for i, length in enumerate(lengths) if length > position // 5 * 5]
        assert len(probabilities) == len(rows)
        for row, distribution in zip(rows, probabilities):
            if position < lengths[row]:
                token = responses[row][position]
                assert log_probs[row, position].item() == pytest.approx(distribution[token].log().item(), abs=tolerance)
                by_hand = -torch.special.xlogy(distribution, distribution).sum().item()
                assert entropy[row, position].item() == pytest.approx(by_hand, abs=tolerance)

    for i in range(0, len(prompts), 5):  # several of each length, also those whose neighbors left the batch
        with torch.no_grad():
            logits = plain(torch.cat([prompts[i], responses[i]])[None]).logits[0, len(prompts[i]) - 1 : -1]
        for position, expected in enumerate((logits / 0.7).softmax(-1)):
            row = [j for j, length in enumerate(lengths) if length > position // 5 * 5].index(i)
            torch.testing.assert_close(sampled_from[position][row], expected, atol=tolerance, rtol=0)

    set_constants(MAX_RESPONSE_LENGTH=20, DECODE_STAGE=3)
    responses = [response.tolist() for response in dapo.sample_tokens(model, questions, 2, greedy=True)]
    for prompt, *pair in zip(questions, responses[::2], responses[1::2]):
        alone = plain.generate(prompt[None], do_sample=False, max_new_tokens=20)[0, len(prompt) :]
        assert pair == [alone.tolist()] * 2


def test_it_is_the_one_call_that_its_docstring_shows(make_folder, tokenizer, set_constants):
    """With one stage for the whole response, even the random numbers fall to the same rows."""
    set_constants(MAX_RESPONSE_LENGTH=12, DECODE_STAGE=12, TEMPERATURE=1.3)
    ends = [tokenizer.eos_token_id, *range(20, 60)]
    folder, prompts = make_folder(ends=ends), make_prompts(tokenizer)
    torch.manual_seed(3)
    staged = dapo.sample_tokens(load(folder)[0], prompts, 4)
    ids = torch.stack([torch.cat([torch.zeros(17 - len(p), dtype=int), p]) for p in prompts for _ in range(4)])
    mask = torch.tensor([[0] * (17 - len(p)) + [1] * len(p) for p in prompts for _ in range(4)])
    torch.manual_seed(3)
    method = dict(do_sample=True, temperature=1.3, top_k=0, max_new_tokens=12)
    whole = plain_model(folder, ends, tokenizer.pad_token_id).generate(ids, attention_mask=mask, **method)[:, 17:]
    for response, tokens in zip(staged, whole.tolist()):
        assert response.tolist() == tokens[: len(response)]
        assert response[-1].item() in ends or len(response) == 12
    assert len({len(response) for response in staged}) > 4


@pytest.fixture
def stages(monkeypatch):
    """What each call of generate is given: rows of ids, of the mask and of the cache, and the columns of each."""

    def watch(model):
        seen, generate = [], model.generate

        def spy(ids, attention_mask, cache, **options):
            keys = cache.layers[0].keys
            seen.append([(len(ids), len(attention_mask), len(keys)), (ids.shape[1], attention_mask.shape[1])])
            seen[-1].append(keys.shape[2])
            return generate(ids, attention_mask=attention_mask, cache=cache, **options)

        monkeypatch.setattr(model, "generate", spy)
        return seen

    return watch


@pytest.fixture
def copies(monkeypatch):
    """How many rows each copy of a cache has."""
    rows, real = [], DynamicCache.reorder_cache
    monkeypatch.setattr(DynamicCache, "reorder_cache", lambda cache, kept: (rows.append(len(kept)), real(cache, kept)))
    return rows


def test_rows_that_have_ended_leave_the_batch_and_the_cache(make_folder, tokenizer, set_constants, stages, copies):
    set_constants(MAX_RESPONSE_LENGTH=20, DECODE_STAGE=4)
    model, _ = load(make_folder(ends=list(range(20, 50))))
    seen = stages(model)
    lengths = [len(response) for response in dapo.sample_tokens(model, make_prompts(tokenizer), 8)]
    live = [sum(length > start for length in lengths) for start in range(0, 20, 4)]
    assert live[0] == 48 and live[-1] > 0 and len(set(live)) > 3
    assert seen == [[(rows,) * 3, (17 + 4 * i,) * 2, 16 + 4 * i] for i, rows in enumerate(live)]
    assert copies == [rows for rows, earlier in zip(live, [6, *live]) if rows != earlier]


@pytest.mark.parametrize("group_size, expected", [(1, []), (2, [12])])
def test_nothing_is_copied_where_no_row_has_ended(
    group_size, expected, make_folder, tokenizer, set_constants, stages, copies
):
    """But for the one copy that gives each response of a group its prompt's cache."""
    set_constants(MAX_RESPONSE_LENGTH=9, DECODE_STAGE=2)
    model, tokenizer = load(make_folder())
    model.generation_config.eos_token_id = [len(tokenizer) - 1]
    model.generation_config.suppress_tokens = [len(tokenizer) - 1]
    seen = stages(model)
    responses = dapo.sample_tokens(model, make_prompts(tokenizer), group_size)
    assert [len(response) for response in responses] == [9] * 6 * group_size
    assert len(seen) == 5 and copies == expected


def test_sampling_stops_when_all_have_ended(make_folder, tokenizer, set_constants, stages):
    set_constants(MAX_RESPONSE_LENGTH=50, DECODE_STAGE=2)
    model, _ = load(make_folder(ends=list(range(len(tokenizer)))))
    seen = stages(model)
    assert [len(response) for response in dapo.sample_tokens(model, make_prompts(tokenizer), 2)] == [1] * 12
    assert len(seen) == 1


def test_a_response_keeps_no_more_than_its_tokens(make_folder, tokenizer, set_constants):
    """A view would keep the tensor of its stage alive: prompts, padding, and the other responses."""
    set_constants(MAX_RESPONSE_LENGTH=12, DECODE_STAGE=4)
    model, _ = load(make_folder(ends=list(range(20, 60))))
    responses = dapo.sample_tokens(model, make_prompts(tokenizer), 4)
    assert all(r.untyped_storage().nbytes() == 8 * len(r) for r in responses)
    assert len({r.untyped_storage().data_ptr() for r in responses}) == len(responses)


def test_prompts_of_one_token(make_folder, tokenizer, set_constants):
    """There is nothing to read before them, so the cache starts empty."""
    set_constants(MAX_RESPONSE_LENGTH=6, DECODE_STAGE=4)
    folder, prompts = make_folder(), [torch.tensor([20]), torch.tensor([31])]
    responses, plain = dapo.sample_tokens(load(folder)[0], prompts, 2, greedy=True), plain_model(folder)
    for prompt, response in zip([p for p in prompts for _ in range(2)], responses):
        assert response.tolist() == plain.generate(prompt[None], do_sample=False, max_new_tokens=6)[0, 1:].tolist()


def test_padding_changes_nothing(make_folder, tokenizer):
    model, _ = load(make_folder())
    prompts = make_prompts(tokenizer)
    responses = [prompt.flip(0)[: 2 + i] for i, prompt in enumerate(prompts)]
    together = dapo.token_log_probs(model, prompts, responses)
    for i, (prompt, response) in enumerate(zip(prompts, responses)):
        for alone, row in zip(dapo.token_log_probs(model, [prompt], [response]), together):
            torch.testing.assert_close(row[i, : len(response)], alone[0], atol=1e-5, rtol=1e-5)
            assert (row[i, len(response) :] == 0).all()


@pytest.mark.parametrize("pad_is_end", [True, False])
def test_responses_end_with_their_first_end_token(pad_is_end, make_folder, tokenizer, set_constants):
    set_constants(MAX_RESPONSE_LENGTH=18, DECODE_STAGE=4)
    ends = [tokenizer.eos_token_id, *range(20, 60)]
    model, _ = load(make_folder("qwen2", ends))
    if pad_is_end:
        model.generation_config.pad_token_id = tokenizer.eos_token_id
    responses = dapo.sample_tokens(model, make_prompts(tokenizer), 4)
    ended = [response for response in responses if response[-1].item() in ends]
    assert 0 < len(ended) < len(responses)
    for response in responses:
        assert not set(response[:-1].tolist()) & set(ends)
        assert response[-1].item() in ends or len(response) == 18
    assert len({response[-1].item() for response in ended}) > 1

    # its gradient is the end token's too, and nothing's that follows
    prompts = [prompt for prompt in make_prompts(tokenizer) for _ in range(4)]
    log_probs, _, mask = dapo.token_log_probs(model, prompts, responses)
    for row, response in zip(mask, responses):
        assert row.tolist() == [1.0] * len(response) + [0.0] * (len(row) - len(response))
    assert (log_probs[mask == 1] < 0).all()


def test_the_end_tokens_are_those_of_model_and_tokenizer(make_folder, tokenizer):
    assert load(make_folder(ends=[30, 40]))[0].generation_config.eos_token_id == sorted(
        [tokenizer.eos_token_id, 30, 40]
    )
    assert load(make_folder(ends=30))[0].generation_config.eos_token_id == sorted([tokenizer.eos_token_id, 30])


def test_truncated_is_told_from_ended(make_folder, tokenizer, set_constants):
    """A response whose end token is the last that the limit allows has ended; pad == end does not confuse it."""
    model, _ = load(make_folder(ends=[30], pad=30))
    scripted = [torch.tensor([5, 6, 30]), torch.tensor([5, 6, 7])]
    set_constants(MAX_RESPONSE_LENGTH=3, sample_tokens=lambda *args: scripted)
    (group,) = dapo.sample_groups(model, tokenizer, [dapo.Question("q", "1", "test", torch.tensor([4]))], 2)
    assert [response.truncated for response in group] == [False, True]


def test_the_models_own_sampling_settings_come_back_when_saved(make_folder, set_constants, tmp_path):
    folder = make_folder()
    model, tokenizer = load(folder)
    for name in HOSTILE:
        assert getattr(model.generation_config, name) in (None, getattr(GenerationConfig(), name))
    set_constants(OUTPUT_DIR=str(tmp_path / "run"))
    with dapo.open_run(model, tokenizer, torch.optim.AdamW(model.parameters()), [], []) as run:
        run.save_model("saved")
    before, after = (json.loads((f / "generation_config.json").read_text()) for f in (folder, tmp_path / "run/saved"))
    for name in HOSTILE:
        assert after[name] == before[name] == HOSTILE[name]
    assert after["eos_token_id"] == before["eos_token_id"]
    again, _ = load(tmp_path / "run/saved")
    for one, other in zip(model.state_dict().values(), again.state_dict().values()):
        assert torch.equal(one, other)
    assert list((tmp_path / "run/saved").glob("*.safetensors")) and not list((tmp_path / "run").glob("*.unfinished"))


def test_weights_are_fp32_whatever_was_saved(make_folder):
    folder = make_folder()
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(folder)
    assert {parameter.dtype for parameter in load(folder)[0].parameters()} == {torch.float32}


def test_experts_are_not_switched_while_decoding(make_folder, tokenizer, set_constants, monkeypatch):
    """On a GPU, transformers would gather the weights of each token's experts."""
    model, _ = load(make_folder("mixtral"))
    monkeypatch.setattr(type(model), "device", torch.device("cuda"))
    as_loaded = model.get_experts_implementation()
    with model._optimize_model_for_decode():
        assert model.get_experts_implementation() == as_loaded
    with type(model)._optimize_model_for_decode(model):
        assert model.get_experts_implementation() != as_loaded  # else this test has become useless
    monkeypatch.undo()
    calls, real = [], model._optimize_model_for_decode
    monkeypatch.setattr(model, "_optimize_model_for_decode", lambda: (calls.append(1), real())[1])
    set_constants(MAX_RESPONSE_LENGTH=6, DECODE_STAGE=3)
    dapo.sample_tokens(model, make_prompts(tokenizer))
    assert calls  # it is what generate calls


def test_the_cache_is_copied_once_a_stage_and_not_at_every_token(make_folder, tokenizer, set_constants, monkeypatch):
    set_constants(MAX_RESPONSE_LENGTH=40, DECODE_STAGE=8)
    model, _ = load(make_folder())
    model.generation_config.eos_token_id = [-1]
    storages, real = [], dapo.RoomyLayer.update

    def watched(layer, *arguments, **options):
        result, storage = real(layer, *arguments, **options), layer.keys.untyped_storage()
        if storage.data_ptr() not in [one.data_ptr() for one in storages]:
            storages.append(storage)
        return result

    monkeypatch.setattr(dapo.RoomyLayer, "update", watched)
    tokens = dapo.sample_tokens(model, make_prompts(tokenizer), 2)
    assert [len(ids) for ids in tokens] == [40] * 2 * len(LENGTHS)
    layers, prompt, stages = model.config.num_hidden_layers, 1, 5
    assert 2 * layers <= len(storages) <= (prompt + stages) * layers


@pytest.fixture
def bfloat16(set_constants):
    """Arithmetic as on CUDA, on the CPU."""
    set_constants(autocast=lambda model: torch.autocast("cpu", torch.bfloat16))


@pytest.mark.parametrize("kind", ["qwen2", "gemma2", "qwen3_next", "deepseek_v3"])
def test_the_cache_holds_bfloat16_under_autocast(kind, make_folder, tokenizer, set_constants, bfloat16):
    """And no token is another for it, as attention rounds keys and values in any case."""
    set_constants(MAX_RESPONSE_LENGTH=12)
    model, _ = load(make_folder(kind))
    caches, real = [], dapo.new_cache
    set_constants(new_cache=lambda model: caches.append(real(model)) or caches[-1])
    torch.manual_seed(0)
    narrow = dapo.sample_tokens(model, make_prompts(tokenizer), 2)
    set_constants(new_cache=lambda model: caches.append(DynamicCache(config=model.config)) or caches[-1])
    torch.manual_seed(0)
    assert all(map(torch.equal, narrow, dapo.sample_tokens(model, make_prompts(tokenizer), 2)))
    types = []
    for cache in caches:
        layers = [layer for layer in cache.layers if getattr(layer, "keys", None) is not None]
        types.append({part.dtype for layer in layers for part in (layer.keys, layer.values)})
    assert types[0] == {torch.bfloat16} and torch.float32 in types[1]


def test_rounding_is_no_reason_to_refuse_a_model(make_folder, tokenizer, set_constants, bfloat16):
    gaps = []
    for kind, temperature in zip(("qwen2", "gemma2", "mixtral", "qwen3_next"), (0.1, 5.0, 1.0, 1.0)):
        set_constants(MAX_RESPONSE_LENGTH=80, TEMPERATURE=temperature, OVERLONG_BUFFER_LENGTH=0)
        model, _ = load(make_folder(kind, seed=1))
        asked = [dapo.Question(str(prompt), "1", "test", prompt) for prompt in make_prompts(tokenizer)]
        gaps.append(dapo.evaluate(model, tokenizer, asked)[0]["sampling_gap/mean"] * temperature)
    assert 0.01 < max(gaps) < 0.25


def test_the_sampling_gap_is_the_difference_of_log_probabilities(make_folder, tokenizer, sampled_from, set_constants):
    """Between those that torch.multinomial drew from, for the shortest and the longest prompts, and scoring's."""
    set_constants(MAX_RESPONSE_LENGTH=7, DECODE_STAGE=3, TEMPERATURE=0.7, OVERLONG_BUFFER_LENGTH=0)
    model, _ = load(make_folder(ends=[tokenizer.eos_token_id, *range(20, 100)]))
    asked, seen, sample = [], [], dapo.sample_tokens

    def spy(model, prompts, **options):
        asked.extend(prompts)
        seen.extend(sample(model, prompts, **options))
        return seen

    set_constants(sample_tokens=spy)
    lengths = [9, 1, 4, 6, 3, 2, 8, 5, 11, 10, 7]
    shifted, score = 0.002, dapo.token_log_probs
    set_constants(token_log_probs=lambda *batch: [score(*batch)[0] + shifted, *score(*batch)[1:]])
    gaps = dapo.sampling_gap(model, [torch.arange(30, 30 + length) for length in lengths])
    assert [len(prompt) for prompt in asked] == [1, 2, 3, 4, 8, 9, 10, 11]
    live, by_hand = list(range(8)), [[] for _ in seen]
    for position, probabilities in enumerate(sampled_from):
        live = [i for i in live if position % 3 or len(seen[i]) > position]
        for row, i in enumerate(live):
            if position < len(seen[i]):
                by_hand[i].append(probabilities[row, seen[i][position]].log())
    scored = [score(model, [prompt], [tokens])[0][0] + shifted for prompt, tokens in zip(asked, seen)]
    expected = torch.cat([(one - torch.stack(other)).abs() for one, other in zip(scored, by_hand)])
    assert len(set(map(len, seen))) > 2
    torch.testing.assert_close(gaps, expected)
    assert 0.0015 < gaps.mean() <= gaps.max() < 0.0025


def test_bfloat16_arithmetic_keeps_them_close(make_folder, tokenizer, sampled_from, set_constants, bfloat16):
    """Sampling and scoring differ by rounding only, and gradients stay fp32."""
    set_constants(MAX_RESPONSE_LENGTH=12)
    model, _ = load(make_folder())
    prompts = make_prompts(tokenizer)
    responses = dapo.sample_tokens(model, prompts)
    log_probs, _, mask = dapo.token_log_probs(model, prompts, responses)
    first = torch.tensor([response[0] for response in responses])
    at_sampling = sampled_from[0].gather(1, first[:, None]).log()[:, 0]
    torch.testing.assert_close(log_probs[:, 0], at_sampling, atol=0.2, rtol=0.05)
    (log_probs * mask).sum().backward()
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}

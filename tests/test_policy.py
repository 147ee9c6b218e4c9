"""The distribution that is scored is the one that was sampled from, for several architectures."""

import json

import pytest
import torch
from architectures import ARCHITECTURES
from conftest import HOSTILE, load

import dapo

LENGTHS = [3, 17, 9, 3, 12, 7]


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


@pytest.mark.parametrize("stage", [5, 100])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_scored_is_sampled(kind, stage, make_folder, tokenizer, sampled_from, set_constants):
    set_constants(MAX_RESPONSE_LENGTH=18, TEMPERATURE=0.7, DECODE_STAGE=stage, LOGITS_CHUNK=3 * len(tokenizer))
    ends = list(range(20, 60))  # many, so that responses end at many lengths
    model, _ = load(make_folder(kind, ends))
    torch.manual_seed(2)
    responses = dapo.sample_tokens(model, make_prompts(tokenizer), group_size=8)
    prompts = [prompt for prompt in make_prompts(tokenizer) for _ in range(8)]
    lengths = [len(response) for response in responses]
    assert len(set(lengths)) > (3 if kind == "gemma3" else 4) and max(lengths) == 18 > min(lengths)

    tolerance = 5e-4 if kind == "smollm3" else 1e-4  # its fp32 rounds more: in fp64 the two agree to 1e-6
    log_probs, entropy, mask = dapo.token_log_probs(model, prompts, responses)
    assert log_probs.shape == entropy.shape == mask.shape == (len(prompts), 18)
    assert mask.sum(1).tolist() == lengths
    for position, probabilities in enumerate(sampled_from):
        # the rows of this call: those that had not ended when its stage began
        rows = [i for i, length in enumerate(lengths) if length > position // stage * stage]
        assert len(probabilities) == len(rows)
        for row, distribution in zip(rows, probabilities):
            if position < lengths[row]:
                token = responses[row][position]
                assert log_probs[row, position].item() == pytest.approx(distribution[token].log().item(), abs=tolerance)
                by_hand = -(distribution * distribution.log()).sum().item()
                assert entropy[row, position].item() == pytest.approx(by_hand, abs=tolerance)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_greedy_responses_are_those_of_transformers(kind, make_folder, tokenizer, set_constants):
    """Neither the shared reading of a prompt nor padding nor leaving the batch in stages changes them."""
    set_constants(MAX_RESPONSE_LENGTH=20, DECODE_STAGE=3)
    ends = list(range(20, 80))
    model, _ = load(make_folder(kind, ends))
    prompts = make_prompts(tokenizer)
    responses = [response.tolist() for response in dapo.sample_tokens(model, prompts, 2, greedy=True)]
    for prompt, *pair in zip(prompts, responses[::2], responses[1::2]):
        alone = model.generate(prompt[None], do_sample=False, max_new_tokens=20, pad_token_id=0)[0, len(prompt) :]
        assert pair == [alone.tolist()] * 2


def test_a_prompt_of_one_token(make_folder, tokenizer, set_constants):
    """There is nothing to read before it, so the cache starts empty."""
    set_constants(MAX_RESPONSE_LENGTH=6)
    model, _ = load(make_folder())
    prompt = torch.tensor([20])
    (response,) = dapo.sample_tokens(model, [prompt], greedy=True)
    assert response.tolist() == model.generate(prompt[None], do_sample=False, max_new_tokens=6)[0, 1:].tolist()


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
    log_probs, _, mask = dapo.token_log_probs(
        model, [prompt for prompt in make_prompts(tokenizer) for _ in range(4)], responses
    )
    for row, response in zip(mask, responses):
        assert row.tolist() == [1.0] * len(response) + [0.0] * (len(row) - len(response))
    assert (log_probs[mask == 1] < 0).all()


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
    set_constants(OUTPUT_DIR=str(tmp_path / "run"))
    parts = model, tokenizer, torch.optim.AdamW(model.parameters()), dapo.record.Progress(), []
    with dapo.record.open_run(vars(dapo), None, *parts) as run:
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
    dapo.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(folder)
    assert {parameter.dtype for parameter in load(folder)[0].parameters()} == {torch.float32}


@pytest.mark.parametrize("kind", ["qwen2", "gemma2", "qwen3_next"])
def test_the_cache_holds_bfloat16_under_autocast(kind, make_folder, tokenizer, set_constants, monkeypatch):
    """And no token is another for it, as attention rounds keys and values in any case."""
    set_constants(MAX_RESPONSE_LENGTH=12, autocast=lambda model: torch.autocast("cpu", torch.bfloat16))
    model, _ = load(make_folder(kind))
    caches, real = [], dapo.NarrowCache
    monkeypatch.setattr(dapo, "NarrowCache", lambda **options: caches.append(real(**options)) or caches[-1])
    torch.manual_seed(0)
    narrow = dapo.sample_tokens(model, make_prompts(tokenizer), 2)
    layers = [layer for layer in caches[0].layers if getattr(layer, "keys", None) is not None]
    assert layers and all(part.dtype == torch.bfloat16 for layer in layers for part in (layer.keys, layer.values))
    monkeypatch.setattr(dapo, "NarrowCache", dapo.DynamicCache)
    torch.manual_seed(0)
    assert all(map(torch.equal, narrow, dapo.sample_tokens(model, make_prompts(tokenizer), 2)))


@pytest.mark.parametrize("kind", ["qwen2", "gemma2", "mixtral"])
def test_rounding_is_no_reason_to_refuse_a_model(kind, make_folder, tokenizer, set_constants, capsys):
    for temperature in (0.1, 1.0, 5.0):
        set_constants(MAX_RESPONSE_LENGTH=80, TEMPERATURE=temperature, OVERLONG_BUFFER_LENGTH=0)
        set_constants(autocast=lambda model: torch.autocast("cpu", torch.bfloat16))
        model, _ = load(make_folder(kind))
        asked = [dapo.Question(str(prompt), "1", "test", prompt) for prompt in make_prompts(tokenizer)]
        dapo.evaluate(model, tokenizer, asked)


def test_a_policy_is_checked_by_a_padded_prompt(make_folder, tokenizer, set_constants, monkeypatch):
    set_constants(MAX_RESPONSE_LENGTH=4, OVERLONG_BUFFER_LENGTH=0)
    lengths = []
    set_constants(check_policy=lambda model, response: lengths.append(len(response.question.prompt)))
    model, _ = load(make_folder())
    asked = [dapo.Question(str(prompt), "1", "test", prompt) for prompt in make_prompts(tokenizer)]
    dapo.evaluate(model, tokenizer, asked)
    assert lengths == [min(LENGTHS)] and max(LENGTHS) > min(LENGTHS)


def test_bfloat16_arithmetic_keeps_them_close(make_folder, tokenizer, sampled_from, set_constants):
    """As on CUDA, but on the CPU: sampling and scoring differ by rounding only, and gradients stay fp32."""
    set_constants(MAX_RESPONSE_LENGTH=12, autocast=lambda model: torch.autocast("cpu", torch.bfloat16))
    model, _ = load(make_folder())
    prompts = make_prompts(tokenizer)
    responses = dapo.sample_tokens(model, prompts)
    log_probs, _, mask = dapo.token_log_probs(model, prompts, responses)
    first = torch.tensor([response[0] for response in responses])
    at_sampling = sampled_from[0].gather(1, first[:, None]).log()[:, 0]
    torch.testing.assert_close(log_probs[:, 0], at_sampling, atol=0.2, rtol=0.05)
    (log_probs * mask).sum().backward()
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}

"""The update: a by-hand float64 calculation of a whole one, and what its gradient must not depend on."""

import itertools
import math
import random
import runpy
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, load, response
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

import dapo

MODES = ["token-mean", "seq-mean-token-sum", "seq-mean-token-mean"]


def make_groups(seed=0, lengths=range(3, 15)):
    """Groups of four responses with mixed rewards, to prompts of different lengths, some truncated."""
    rng, groups = random.Random(seed), []
    for first in range(0, len(lengths), 4):
        asked = dapo.Question("q", "1", "test", torch.tensor([rng.randrange(5, 300) for _ in range(3 + first)]))
        group = []
        for i, length in enumerate(lengths[first : first + 4]):
            tokens = [rng.randrange(5, 300) for _ in range(length)]
            group.append(response(float(i % 2), rng.uniform(-2, 1), tokens, truncated=i == 3, asked=asked))
        groups.append(group)
    dapo.compare_rewards(groups)
    return groups


def make_responses():
    return [response for group in make_groups() for response in group]


def score(model, responses):
    return dapo.token_log_probs(model, [r.question.prompt for r in responses], [r.tokens for r in responses])


def gradient(model, responses):
    """Gradient and metrics of one mini-batch, with old log-probabilities that are some way off the present ones."""
    dapo.store_log_probs(model, responses, "old_log_probs")
    for index, r in enumerate(sorted(responses, key=lambda r: r.reward)):
        r.advantage = (-1) ** index * 1.5
        r.old_log_probs += torch.linspace(-0.5, 0.5, len(r.tokens))
    model.zero_grad()
    losses, token_sums, _ = dapo.accumulate_gradients(model, responses)
    metrics = {name: float(value) for name, value in {**losses, **token_sums}.items()}
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]), metrics


@pytest.mark.parametrize("filtered", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_gradient_does_not_depend_on_micro_batches_or_order(mode, filtered, make_folder, set_constants):
    set_constants(LOSS_AGG_MODE=mode, ENTROPY_COEF=0.01, MICRO_BATCH_TOKENS=100000)
    model, _ = load(make_folder())
    responses = [r for r in make_responses() if not (filtered and r.truncated)]
    whole, metrics = gradient(model, responses)
    assert whole.norm() > 0.1

    for order in range(3):
        random.Random(order).shuffle(responses)
        set_constants(MICRO_BATCH_TOKENS=[256, 40, 1][order], LOGITS_CHUNK=[2**27, 1000, 1][order])
        cut, cut_metrics = gradient(model, responses)
        assert ((cut - whole).norm() / whole.norm()).item() < 1e-5
        assert cut_metrics == pytest.approx(metrics, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("mode", MODES)
def test_gradient_is_that_of_a_plain_loop(mode, make_folder, set_constants):
    """policy_loss + KL_COEF * kl - ENTROPY_COEF * entropy, and what each of the three is, against full logits, one
    response and one token at a time, with every formula written out."""
    set_constants(LOSS_AGG_MODE=mode, ENTROPY_COEF=0.02, KL_COEF=0.3, TEMPERATURE=0.8, MICRO_BATCH_TOKENS=64)
    model, _ = load(make_folder())
    base, _ = load(make_folder(seed=5))
    responses = make_responses()
    dapo.store_log_probs(base, responses, "base_log_probs")
    ours, metrics = gradient(model, responses)

    model.zero_grad()
    all_tokens, total = sum(len(r.tokens) for r in responses), {"policy_loss": 0.0, "kl": 0.0, "entropy": 0.0}
    entropies, held = [], {"low": 0, "high": 0}
    for r in responses:
        ids = torch.cat([r.question.prompt, r.tokens])[None]
        start = len(r.question.prompt) - 1
        now = torch.log_softmax(model(ids).logits[0] / 0.8, -1)
        with torch.no_grad():
            then = torch.log_softmax(base(ids).logits[0] / 0.8, -1)
        for t, token in enumerate(r.tokens):
            log_prob = now[start + t, token]
            ratio = torch.exp(log_prob - r.old_log_probs[t])
            clipped = min(max(ratio, 1 - dapo.CLIP_RANGE_LOW), 1 + dapo.CLIP_RANGE_HIGH)
            held["low"] += bool(r.advantage < 0 and ratio < 1 - dapo.CLIP_RANGE_LOW)
            held["high"] += bool(r.advantage > 0 and ratio > 1 + dapo.CLIP_RANGE_HIGH)
            log_r = then[start + t, token] - log_prob
            weight = {
                "token-mean": 1 / all_tokens,
                "seq-mean-token-sum": 1 / len(responses),
                "seq-mean-token-mean": 1 / len(responses) / len(r.tokens),
            }[mode]
            entropies.append(-(now[start + t].exp() * now[start + t]).sum())
            total["policy_loss"] -= min(ratio * r.advantage, clipped * r.advantage) * weight
            total["kl"] += (log_r.exp() - 1 - log_r) * weight
            total["entropy"] += entropies[-1] * weight
    (total["policy_loss"] + 0.3 * total["kl"] - 0.02 * total["entropy"]).backward()
    plain = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    assert ((ours - plain).norm() / plain.norm()).item() < 1e-5
    assert held["low"] > 0 and held["high"] > 0
    expected = {"policy_loss": total["policy_loss"], "kl": total["kl"], "entropy_loss": -total["entropy"]}
    expected |= {"tokens": all_tokens, "entropy": sum(entropies)}
    expected |= {f"clip_fraction/{end}": count for end, count in held.items()}
    with torch.no_grad():
        assert metrics == pytest.approx({name: float(value) for name, value in expected.items()}, rel=1e-4)


@pytest.mark.parametrize("coefficient", ["KL_COEF", "ENTROPY_COEF"])
def test_each_coefficient_scales_its_own_term(coefficient, make_folder, set_constants):
    """The gradient is linear in it: twice the coefficient, twice the difference to none."""
    model, base = load(make_folder())[0], load(make_folder(seed=5))[0]
    responses, gradients = make_responses(), []
    dapo.store_log_probs(base, responses, "base_log_probs")
    for value in (0.0, 0.1, 0.2):
        set_constants(**{coefficient: value})
        gradients.append(gradient(model, responses)[0])
    none, once, twice = gradients
    assert (once - none).norm() > 0.01
    torch.testing.assert_close(twice - none, 2 * (once - none), atol=1e-5, rtol=1e-3)


def test_first_ratio_is_one(make_folder, set_constants, monkeypatch):
    """Although the old log-probabilities come from another pass, over other micro-batches."""
    model, _ = load(make_folder())
    ratios, real = [], dapo.policy_loss

    def spy(log_probs, old_log_probs, advantages, mask):
        ratios.append((log_probs - old_log_probs).exp().detach())
        return real(log_probs, old_log_probs, advantages, mask)

    monkeypatch.setattr(dapo, "policy_loss", spy)
    responses = make_responses()
    set_constants(MICRO_BATCH_TOKENS=50)
    dapo.store_log_probs(model, responses, "old_log_probs")
    set_constants(MICRO_BATCH_TOKENS=300)
    dapo.accumulate_gradients(model, responses)
    assert ratios and max((ratio - 1).abs().max().item() for ratio in ratios) < 1e-4


def test_end_token_is_trained_and_padding_is_not(make_folder, tokenizer, monkeypatch):
    """With pad == end, the loss has a gradient at each token of a response, the last included, and nowhere else."""
    model, tokenizer = load(make_folder(pad=tokenizer.eos_token_id))
    end = tokenizer.eos_token_id
    model.generation_config.pad_token_id = end
    short, long = response(tokens=[7, 8, end]), response(tokens=[7, 8, 9, end])
    short.advantage = long.advantage = 2.0
    dapo.store_log_probs(model, [short, long], "old_log_probs")
    seen, real = [], dapo.policy_loss

    def spy(log_probs, *others):
        log_probs.retain_grad()
        seen.append(log_probs)
        return real(log_probs, *others)

    monkeypatch.setattr(dapo, "policy_loss", spy)
    dapo.accumulate_gradients(model, [long, short])
    expected = torch.tensor([[1.0] * 3 + [0.0], [1.0] * 4]) * -2 / 7
    torch.testing.assert_close(seen[0].grad, expected, atol=1e-5, rtol=0)


CPU = SimpleNamespace(device=torch.device("cpu"))


def length_of(response):
    return len(response.question.prompt) + len(response.tokens)


def test_micro_batches_keep_to_their_budget(set_constants):
    responses = make_responses()
    set_constants(MICRO_BATCH_TOKENS=60)
    batches = list(dapo.micro_batches(CPU, responses))
    assert len(batches) > 1
    for batch in batches:
        assert len(batch) * max(map(length_of, batch)) <= 60
    assert sorted(id(r) for batch in batches for r in batch) == sorted(map(id, responses))
    set_constants(MICRO_BATCH_TOKENS=1)  # what is over the budget goes by itself
    assert [len(batch) for batch in dapo.micro_batches(CPU, responses)] == [1] * len(responses)


def test_micro_batches_hold_little_padding(set_constants):
    """A few long responses do not stretch many short ones."""
    responses = [response(tokens=[4] * length) for length in [3] * 300 + [90] * 3 + list(range(4, 90))]
    random.Random(0).shuffle(responses)
    set_constants(MICRO_BATCH_TOKENS=16384)
    batches = [[length_of(r) for r in batch] for batch in dapo.micro_batches(CPU, responses)]
    assert sorted(sum(batches, [])) == sorted(map(length_of, responses))
    assert all(max(batch) <= 1.5 * min(batch) for batch in batches)
    assert sum(len(batch) * max(batch) for batch in batches) < 1.3 * sum(map(sum, batches))
    assert len(batches) < 15


@pytest.mark.parametrize(
    "recipe, responses, typical, spread, on_cpu, on_gpu",
    [("gsm8k", 16, 250, 0.5, (410, 440), (280, 300)), ("dapo_math", 64, 900, 0.8, (1000, 1060), (750, 800))],
)
def test_on_a_gpu_a_mini_batch_takes_few_passes(recipe, responses, typical, spread, on_cpu, on_gpu, set_constants):
    """It is idle in short ones. So 100 mini-batches of a recipe take fewer, of lengths that are made up, log-normal."""
    constants = runpy.run_path(str(ROOT / f"recipes/{recipe}.py"))
    set_constants(MICRO_BATCH_TOKENS=constants["MICRO_BATCH_TOKENS"])
    chance, passes, longest = random.Random(0), {"cpu": 0, "cuda": 0}, constants["MAX_RESPONSE_LENGTH"]
    for _ in range(100):
        lengths = [min(longest, int(chance.lognormvariate(math.log(typical), spread))) for _ in range(responses)]
        lengths = [length + int(chance.gauss(140, 40)) for length in lengths]
        mini_batch = [response(tokens=[4] * length) for length in lengths]
        for device in passes:
            passes[device] += len(list(dapo.micro_batches(SimpleNamespace(device=torch.device(device)), mini_batch)))
    assert on_cpu[0] < passes["cpu"] < on_cpu[1] and on_gpu[0] < passes["cuda"] < on_gpu[1]


def test_logits_are_made_in_chunks(make_folder, tokenizer, set_constants, monkeypatch):
    sizes, real = [], dapo.head_logits

    def spy(model, decoded, hidden):
        logits = real(model, decoded, hidden)
        sizes.append(logits.shape)
        return logits

    monkeypatch.setattr(dapo, "head_logits", spy)
    set_constants(LOGITS_CHUNK=5 * len(tokenizer) + 3)
    model, _ = load(make_folder())
    responses = make_responses()
    with torch.no_grad():
        score(model, responses)
    assert all(size[1] == len(tokenizer) for size in sizes) and max(size[0] for size in sizes) == 5
    assert sum(size[0] for size in sizes) == sum(len(r.tokens) for r in responses)  # response tokens, and no others


@pytest.mark.parametrize("parts", [1, 4])
def test_the_output_layer_is_made_bfloat16_once_and_once_more_for_each_chunk(
    parts, make_folder, tokenizer, set_constants
):
    """For the forward pass, and as each chunk is computed again; a cast of 152 thousand rows is no small thing."""
    set_constants(autocast=lambda model: torch.autocast("cpu", torch.bfloat16))
    model, responses, casts = load(make_folder())[0], make_responses(), []
    tokens = sum(len(r.tokens) for r in responses)
    set_constants(LOGITS_CHUNK=math.ceil(tokens / parts) * len(tokenizer))

    class Casts(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if args and getattr(result, "dtype", None) == torch.bfloat16 and result.shape == head.shape:
                casts.append(function)
            return result

    head = model.get_output_embeddings().weight
    with Casts():
        log_probs = score(model, responses)[0]
        assert casts == [torch.ops.aten._to_copy.default]
        log_probs.sum().backward()
    assert casts.count(torch.ops.aten._to_copy.default) == 1 + parts
    assert head.grad.dtype == torch.float32


def test_all_responses_are_scored_before_the_first_optimizer_step(make_folder, set_constants, monkeypatch):
    """By the policy that sampled them, and by the base model, once each, however many passes are made."""
    set_constants(MINI_BATCHES=3, BATCH_SIZE=3, GROUP_SIZE=4, KL_COEF=0.1, DAPO_EPOCHS=2, LEARNING_RATE=1e-3)
    events, store, accumulate = [], dapo.store_log_probs, dapo.accumulate_gradients

    def spy_on_store(model, responses, name):
        events.append((name, len(responses), model))
        store(model, responses, name)

    def spy_on_gradients(model, mini_batch):
        events.append(("gradients", len(mini_batch), model))
        return accumulate(model, mini_batch)

    monkeypatch.setattr(dapo, "store_log_probs", spy_on_store)
    monkeypatch.setattr(dapo, "accumulate_gradients", spy_on_gradients)
    model, base, groups = load(make_folder())[0], load(make_folder(seed=5))[0], make_groups()
    optimizer = torch.optim.AdamW(model.parameters())
    with torch.no_grad():
        expected = [score(one, sum(groups, []))[0] for one in (model, base)]
    dapo.update_policy(model, base, optimizer, groups, 9)
    scored = [("old_log_probs", 12, model), ("base_log_probs", 12, base)]
    assert events == scored + [("gradients", 4, model)] * 6
    for row, r in enumerate(sum(groups, [])):
        for log_probs, found in zip(expected, (r.old_log_probs, r.base_log_probs)):
            torch.testing.assert_close(found, log_probs[row, : len(r.tokens)], atol=1e-4, rtol=0)


def test_fewer_responses_make_fewer_updates_of_the_same_size(make_folder, set_constants, monkeypatch):
    set_constants(MINI_BATCHES=4, DAPO_EPOCHS=1, BATCH_SIZE=4, GROUP_SIZE=4)
    sizes, real = [], dapo.accumulate_gradients
    monkeypatch.setattr(dapo, "accumulate_gradients", lambda model, rs: (sizes.append(len(rs)), real(model, rs))[1])
    model, _ = load(make_folder())
    dapo.update_policy(model, None, torch.optim.AdamW(model.parameters()), make_groups(), 1)
    assert sizes == [4, 4, 4]


def test_kl_is_to_the_base_model(make_folder, set_constants):
    set_constants(KL_COEF=0.1, MINI_BATCHES=1, DAPO_EPOCHS=1)
    model, base = load(make_folder())[0], load(make_folder(seed=5))[0]
    groups = make_groups()
    with torch.no_grad():
        responses = [r for group in groups for r in group]
        (now, _, mask), (then, _, _) = score(model, responses), score(base, responses)
    ratio = (then - now).exp()
    expected = ((ratio - 1 - (then - now)) * mask).sum() / mask.sum()
    metrics = dapo.update_policy(model, base, torch.optim.AdamW(model.parameters()), groups, 1)
    assert metrics["kl"] == pytest.approx(expected.item(), rel=1e-4) and expected > 0.1


def test_in_bfloat16_as_on_cuda(make_folder, set_constants):
    """Autocast by hand, since tests have no GPU: fp32 results and gradients, near those of fp32 arithmetic."""
    model, _ = load(make_folder())
    responses = make_responses()
    exact, _ = gradient(model, responses)
    set_constants(autocast=lambda model: torch.autocast("cpu", torch.bfloat16))
    rough, _ = gradient(model, responses)
    assert rough.dtype == torch.float32 and 0 < ((rough - exact).norm() / exact.norm()).item() < 0.2
    tokens = dapo.sample_tokens(model, [r.question.prompt for r in responses])
    assert len(tokens) == len(responses)


def test_overlong_filtering_leaves_the_loss_but_not_the_baseline(make_folder, set_constants):
    set_constants(USE_OVERLONG_FILTERING=True, MINI_BATCHES=1, LEARNING_RATE=1e-3)
    groups = make_groups()
    expected = dapo.group_advantages(torch.tensor([[r.reward for r in group] for group in groups]))
    for r in itertools.chain(*groups):
        r.advantage = None
    dapo.compare_rewards(groups)
    model, _ = load(make_folder())
    optimizer = torch.optim.AdamW(model.parameters())
    dapo.update_policy(model, None, optimizer, groups, 1)
    for group, row in zip(groups, expected):
        assert [r.advantage for r in group] == [*map(pytest.approx, row.tolist()[:3]), None]
        assert [r.old_log_probs is None for r in group] == [False, False, False, True]

    before = [p.clone() for p in model.parameters()]
    for group in groups:
        for r in group:
            r.truncated, r.advantage = True, None
    dapo.compare_rewards(groups)
    assert dapo.update_policy(model, None, optimizer, groups, 1) == {}
    assert all(torch.equal(p, q) for p, q in zip(before, model.parameters()))


def test_infinite_gradient_changes_nothing(make_folder, set_constants):
    set_constants(MINI_BATCHES=1, DAPO_EPOCHS=1)
    model, _ = load(make_folder())
    optimizer = torch.optim.AdamW(model.parameters())
    before = [p.clone() for p in model.parameters()]
    groups = make_groups()
    groups[0][0].advantage = math.inf
    metrics = dapo.update_policy(model, None, optimizer, groups, 3)
    assert metrics["skipped_updates"] == 1 and "grad_norm" not in metrics
    assert all(torch.equal(p, q) for p, q in zip(before, model.parameters()))

    metrics = dapo.update_policy(model, None, optimizer, make_groups(), 4)  # nothing of it is left behind
    assert all(p.isfinite().all() for p in model.parameters()) and all(map(math.isfinite, metrics.values()))
    assert not any(torch.equal(p, q) for p, q in zip(before, model.parameters()))


def test_nan_in_one_response_costs_only_its_own_update(make_folder, set_constants, monkeypatch):
    """Of three mini-batches the one that holds it is skipped; the result is that of the other two."""
    set_constants(MINI_BATCHES=3, DAPO_EPOCHS=1, BATCH_SIZE=3, GROUP_SIZE=4, LEARNING_RATE=1e-3)
    monkeypatch.setattr(random, "shuffle", lambda items: None)  # mini-batch i holds responses i, i + 3, ...
    folder, real = make_folder(), dapo.token_log_probs
    results = []
    for nan in (True, False):
        model, _ = load(folder)
        optimizer = torch.optim.AdamW(model.parameters())
        groups = make_groups()
        sick = groups[1][0].tokens  # response 4, so in the second mini-batch

        def spoiled(model, prompts, answers):
            log_probs, entropy, mask = real(model, prompts, answers)
            factors = torch.tensor([[math.nan if answer is sick else 1.0] for answer in answers])
            return log_probs * factors, entropy, mask

        if nan:
            monkeypatch.setattr(dapo, "token_log_probs", spoiled)
            metrics = dapo.update_policy(model, None, optimizer, groups, 9)
            assert metrics["skipped_updates"] == 1 and all(map(math.isfinite, metrics.values()))
        else:
            monkeypatch.setattr(dapo, "token_log_probs", real)
            steps, step = [], optimizer.step
            monkeypatch.setattr(optimizer, "step", lambda: (steps.append(None), len(steps) == 2 or step()))
            assert dapo.update_policy(model, None, optimizer, groups, 9)["skipped_updates"] == 0 and len(steps) == 3
        results.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*results) and results[0].isfinite().all()


class Ones(torch.nn.Module):
    def forward(self, input_ids, use_cache):
        return BaseModelOutputWithPast(last_hidden_state=torch.ones(*input_ids.shape, 1))


class TwoTokens(torch.nn.Module):
    """A policy over two tokens that ignores its input: π = softmax(w)."""

    device = torch.device("cpu")
    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=2))

    def __init__(self):
        super().__init__()
        self.base_model, self.lm_head = Ones(), torch.nn.Linear(1, 2, bias=False)

    def get_decoder(self):
        return self.base_model

    def forward(self, inputs_embeds, use_cache):
        return CausalLMOutputWithPast(logits=self.lm_head(self.base_model().last_hidden_state))


def test_whole_update_by_hand(set_constants, monkeypatch):
    """Four optimizer steps of AdamW on two tokens, in plain Python's float64, with clips at both ends at work."""
    set_constants(
        LEARNING_RATE=0.4, WARMUP_STEPS=4, WEIGHT_DECAY=0.1, MAX_GRAD_NORM=0.05, MINI_BATCHES=2, DAPO_EPOCHS=2,
        CLIP_RANGE_LOW=0.02, CLIP_RANGE_HIGH=0.03, LOSS_AGG_MODE="token-mean", TEMPERATURE=1.0, MICRO_BATCH_TOKENS=12,
        KL_COEF=0.0, ENTROPY_COEF=0.0, USE_OVERLONG_FILTERING=False, BATCH_SIZE=1, GROUP_SIZE=4,
    )  # fmt: skip
    answers, rewards = [[0, 1], [1], [0, 0, 1], [1, 0, 1]], [1.0, -1.0, 0.5, -1.5]
    model = TwoTokens()
    model.lm_head.weight.data = torch.tensor([[0.3], [-0.2]])
    optimizer = torch.optim.AdamW(model.parameters(), dapo.LEARNING_RATE, weight_decay=dapo.WEIGHT_DECAY)
    monkeypatch.setattr(random, "shuffle", lambda items: None)
    group = [response(float(r > 0), r, tokens) for tokens, r in zip(answers, rewards)]
    dapo.compare_rewards([group])
    metrics = dapo.update_policy(model, None, optimizer, [group], 2)

    mean = sum(rewards) / 4
    std = math.sqrt(sum((r - mean) ** 2 for r in rewards) / 3)
    advantages = [(r - mean) / (std + 1e-6) for r in rewards]
    w, m, v = [0.3, -0.2], [0.0, 0.0], [0.0, 0.0]
    rate, held, norms, losses, entropies = 0.4 * 2 / 4, {"low": 0, "high": 0}, [], [], []

    def policy(w):
        total = math.exp(w[0]) + math.exp(w[1])
        return [math.exp(w[0]) / total, math.exp(w[1]) / total]

    old = policy(w)
    for k, batch in enumerate([[0, 2], [1, 3], [0, 2], [1, 3]], 1):
        now, grad, loss = policy(w), [0.0, 0.0], 0.0
        count = sum(len(answers[i]) for i in batch)
        for i in batch:
            for token in answers[i]:
                ratio, advantage = now[token] / old[token], advantages[i]
                clipped = min(max(ratio, 0.98), 1.03)
                loss -= min(ratio * advantage, clipped * advantage) / count
                entropies.append(-sum(p * math.log(p) for p in now))
                if advantage > 0 and ratio > 1.03 or advantage < 0 and ratio < 0.98:
                    held["high" if advantage > 0 else "low"] += 1
                else:  # d loss / d w_j = -A ρ (1[j = token] - π_j)
                    for j in range(2):
                        grad[j] -= advantage * ratio * ((j == token) - now[j]) / count
        norm = math.hypot(*grad)
        grad = [g * min(1.0, 0.05 / (norm + 1e-6)) for g in grad]
        norms.append(norm)
        losses.append(loss)
        for j in range(2):
            m[j], v[j] = 0.9 * m[j] + 0.1 * grad[j], 0.999 * v[j] + 0.001 * grad[j] ** 2
            w[j] -= rate * 0.1 * w[j]
            w[j] -= rate * (m[j] / (1 - 0.9**k)) / (math.sqrt(v[j] / (1 - 0.999**k)) + 1e-8)

    assert model.lm_head.weight.flatten().tolist() == pytest.approx(w, abs=1e-5)
    assert held["low"] > 0 and held["high"] > 0
    assert metrics["clip_fraction/low"] == pytest.approx(held["low"] / 18)
    assert metrics["clip_fraction/high"] == pytest.approx(held["high"] / 18)
    assert metrics["entropy"] == pytest.approx(sum(entropies) / 18, abs=1e-5)
    assert metrics["learning_rate"] == rate
    assert metrics["grad_norm"] == pytest.approx(sum(norms) / 4, abs=1e-5)
    assert metrics["policy_loss"] == pytest.approx(sum(losses) / 4, abs=1e-5)

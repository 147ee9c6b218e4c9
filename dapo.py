"""DAPO: reinforcement learning for language models, in one file to be read from top to bottom.

    python dapo.py                         trains the toy model that ships with it, on a laptop, in minutes
    python dapo.py --CLIP_RANGE_HIGH=0.2   the same with one constant changed; --help lists them all

The paper is "DAPO: An Open-Source LLM Reinforcement Learning System at Scale", arXiv 2503.14476. One step of it:

    1. sample   GROUP_SIZE responses to each of BATCH_SIZE questions, and judge their final answers by rule (eq. 7)
    2. filter   drop the groups that are all right or all wrong, and sample new questions in their place (eq. 11)
    3. shape    take something off the reward of a response that comes close to the length limit (eq. 13)
    4. compare  each reward with its own group's: that is the advantage, no value network needed (eq. 9)
    5. update   the policy by PPO's clipped objective, with more room upwards than downwards (eq. 10), averaged over
                tokens and not over responses (eq. 12)

GRPO is the same without 2 and 3, without the two changes in 5, and with a KL penalty. Left out: more than one GPU, and
a sampling engine such as vLLM. Reading data, the run's record, its pictures and the command line are in record.py,
measuring models and talking to them in evaluation.py.
"""

import functools
import itertools
import math
import random
import time
from collections import Counter
from dataclasses import dataclass, replace

import record  # before torch: it imports datasets, which on Windows has to come first
import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, DynamicCache, GenerationConfig, set_seed
from transformers.modeling_layers import GradientCheckpointingLayer

import evaluation
from reward import overlong_penalty

# ---- Constants: read when a function runs, so that the command line, a recipe or grpo.py can set them ---------------

# Model and data
MODEL = "toy"  # folder or Hub name of a causal language model
TRAIN_DATASETS = [  # path: file or Hub name; type: parquet, json, csv or hub; input, output: columns, dotted if nested
    {"path": "toy/train.parquet", "type": "parquet", "input": "question", "output": "answer"},
]
EVAL_DATASETS = [  # held-out questions, in the same form
    {"path": "toy/test.parquet", "type": "parquet", "input": "question", "output": "answer"},
]
PROMPT_TEMPLATE = "{question}"  # what is asked; boxed or answer: ready-made ones. A chat template comes around it
MAX_PROMPT_LENGTH = 256  # tokens; longer questions are left out
TRUST_REMOTE_CODE = False  # run the Python code that a model from the Hub may bring along
OUTPUT_DIR = "outputs/dapo"  # the run's own folder; an earlier run in it is kept aside
RESUME = True  # go on with a run in it that was broken off; False: start over, and keep that one aside too
DEVICE = ""  # cpu, cuda or mps; empty: the best there is
SEED = 0  # of every random choice

# Length of the run
NUM_STEPS: int | None = 40  # batches to train on; None: NUM_EPOCHS passes over the data
NUM_EPOCHS = 1  # passes over the data where NUM_STEPS is None
EVAL_EVERY = 5  # steps between evaluations, each with a sample answer and new pictures
EVAL_SAMPLES = 1  # k: above 1, avg@k, pass@k, maj@k at TEMPERATURE beside the greedy accuracy
SAVE_EVERY = 0  # steps between saved models; 0: only at the end
CHECKPOINT_EVERY = 5  # steps between checkpoints, of which only the last is kept
REPORT_TO = ""  # mirrors of the metrics: tensorboard or wandb, or both with a comma between them

# Sampling
BATCH_SIZE = 32  # questions a step
GROUP_SIZE = 8  # responses to each question
MAX_RESPONSE_LENGTH = 96  # tokens, the end token included
TEMPERATURE = 1.0  # of the policy, wherever it is sampled or scored
GENERATION_BATCH = 1024  # responses sampled at a time, in whole groups; halved if memory does not suffice
DECODE_STAGE = 8  # tokens decoded before the responses that have ended leave the batch

# Dynamic sampling
USE_DYNAMIC_SAMPLING = True  # replace groups that are all right or all wrong (GRPO: False)
MAX_GEN_BATCHES = 10  # rounds of sampling a step at most, of up to BATCH_SIZE questions each
RETRY_SAME_QUESTION = False  # replace such a group by a new try at its question, which is not the paper's way
REST_EPOCHS = 0  # epochs in which the question of such a group is not asked again

# Reward
REWARD = "reward.py:compute_score"  # path:function of what judges a response, with verl's signature
OVERLONG_BUFFER_LENGTH = 32  # tokens before the limit in which the punishment grows; 0: none (GRPO: 0)
OVERLONG_PENALTY_FACTOR = 1.0  # reward taken off at the limit
USE_OVERLONG_FILTERING = False  # leave truncated responses out of the loss, but in their group's baseline

# Loss
CLIP_RANGE_LOW = 0.2  # a bad token is pushed down until its probability has fallen to 1 - this times the old one
CLIP_RANGE_HIGH = 0.28  # a good token is pushed up until it has risen to 1 + this (GRPO: 0.2)
LOSS_AGG_MODE = "token-mean"  # or seq-mean-token-sum, or seq-mean-token-mean (GRPO)
KL_COEF = 0.0  # weight of the divergence from the base model (GRPO: above 0)
ENTROPY_COEF = 0.0  # weight of the entropy bonus

# Update
LEARNING_RATE = 2e-5  # of AdamW, after the warm-up (the paper, for 32 B parameters: 1e-6)
WARMUP_STEPS = 5  # steps in which the learning rate rises to it
WEIGHT_DECAY = 0.1  # of AdamW
MAX_GRAD_NORM = 1.0  # a longer gradient is cut to this length
DAPO_EPOCHS = 1  # passes over each batch
MINI_BATCHES = 16  # optimizer steps in one pass over a full batch
MICRO_BATCH_TOKENS = 16384  # tokens in one forward and backward pass, padding included; halved likewise
GRADIENT_CHECKPOINTING = False  # keep each layer's input only, and compute the layer again: less memory, more time
LOGITS_CHUNK = 2**25  # logits made at a time: 0.125 GiB, and about 6 times that while they are worked on

# ---- Data -----------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Question:
    text: str
    answer: str  # the ground truth
    source: str  # its data set's path
    prompt: torch.Tensor  # (P,) token ids, as the model reads them
    rests: int = 0  # epochs in which it is still not to be asked


def question_stream(questions, progress):
    """Each question once an epoch, in an order fixed by SEED; without end where NUM_STEPS ends the run."""
    while NUM_STEPS or progress.epoch < NUM_EPOCHS:
        order = random.Random(f"{SEED} {progress.epoch}").sample(questions, len(questions))
        for question in order[progress.drawn :]:
            progress.drawn += 1
            if question.rests:
                question.rests -= 1
            else:
                yield question
        progress.epoch, progress.drawn = progress.epoch + 1, 0


# ---- Sampling -------------------------------------------------------------------------------------------------------


def autocast(model):
    return torch.autocast(model.device.type, torch.bfloat16, enabled=model.device.type == "cuda")


@dataclass(eq=False)
class Response:
    question: Question
    tokens: torch.Tensor  # (T,) ids as sampled, through the end token; never decoded and tokenized again
    text: str
    truncated: bool  # cut off by MAX_RESPONSE_LENGTH
    accuracy: float  # 1 right, 0 wrong
    reward: float  # 1 right, -1 wrong, less the overlong penalty
    prediction: str | None  # the answer in it, where REWARD tells
    advantage: float | None = None  # None: its group was dropped
    old_log_probs: torch.Tensor | None = None  # (T,) by the policy that sampled it
    base_log_probs: torch.Tensor | None = None  # (T,) by the base model, where there is a KL_COEF


@torch.no_grad()
def sample_tokens(model, prompts, group_size=1, greedy=False):
    """B prompts of (P,) token ids → `group_size` responses to each, B·G of (T,), through their first end token.

    A prompt is read once, then its cache is copied for its group. Every DECODE_STAGE tokens the responses that have
    ended leave the batch, and their part of the cache with them.
    """
    device, pad = model.device, model.generation_config.pad_token_id
    ends = torch.tensor(model.generation_config.eos_token_id, device=device)
    ids = pad_sequence(prompts, True, pad, "left").to(device)  # (B, P)
    mask = pad_sequence([torch.ones_like(prompt) for prompt in prompts], True, 0, "left").to(device)  # (B, P)
    width = ids.shape[1]
    with autocast(model):  # around all of it, so that the weights are cast once and not for each token
        cache, before = NarrowCache(config=model.config), mask[:, :-1]
        if width > 1:  # the last token is left to the loop
            positions = before.cumsum(1).sub(1).clamp(min=0)
            model.base_model(ids[:, :-1], attention_mask=before, position_ids=positions, past_key_values=cache)
        cache.reorder_cache(torch.arange(len(ids), device=device).repeat_interleave(group_size))
        ids, mask = (tensor.repeat_interleave(group_size, 0) for tensor in (ids, mask))
        token, position, live = ids[:, -1:], mask.sum(1, keepdim=True) - 1, torch.arange(len(ids), device=device)
        mask = torch.nn.functional.pad(mask, (0, MAX_RESPONSE_LENGTH), value=1)  # (B·G, P + MAX_RESPONSE_LENGTH)
        tokens = torch.full((len(ids), MAX_RESPONSE_LENGTH), pad, device=device)
        for step in range(MAX_RESPONSE_LENGTH):
            past = dict(attention_mask=mask[:, : width + step], position_ids=position + step, past_key_values=cache)
            logits = model(token, **past).logits[:, -1]  # (live, V)
            probabilities = (logits.float() / TEMPERATURE).softmax(-1)
            token = probabilities.argmax(-1, True) if greedy else torch.multinomial(probabilities, 1)
            tokens[live, step] = token[:, 0]
            if (step + 1) % DECODE_STAGE == 0:
                rows = (~torch.isin(tokens[live, : step + 1], ends).any(1)).nonzero()[:, 0]  # not ended
                if len(rows) == 0:
                    break
                token, position, live, mask = token[rows], position[rows], live[rows], mask[rows]
                cache.reorder_cache(rows)
    is_end = torch.isin(tokens, ends)
    lengths = torch.where(is_end.any(1), is_end.int().argmax(1) + 1, MAX_RESPONSE_LENGTH).tolist()
    return [row[:length] for row, length in zip(tokens.cpu(), lengths)]


@record.halve_when_out_of_memory("GENERATION_BATCH")
def sample_groups(model, tokenizer, questions, group_size, greedy=False):
    """`group_size` judged responses to each question: a list of groups, each a list of Responses."""
    asked, tokens = [question for question in questions for _ in range(group_size)], []
    size = max(1, GENERATION_BATCH // group_size)
    for first in record.progress(range(0, len(questions), size), "sampling"):
        prompts = [question.prompt for question in questions[first : first + size]]
        tokens += sample_tokens(model, prompts, group_size, greedy)
    texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)
    truncated = [ids[-1].item() not in model.generation_config.eos_token_id for ids in tokens]
    responses = list(map(reward_response, asked, tokens, texts, truncated, record.judge(REWARD, asked, texts)))
    return [responses[i : i + group_size] for i in range(0, len(responses), group_size)]


def reward_response(question, tokens, text, truncated, verdict):
    """A Response with its reward: ±1 for the answer (eq. 7) and the soft overlong punishment (eq. 13)."""
    penalty = overlong_penalty(len(tokens), MAX_RESPONSE_LENGTH, OVERLONG_BUFFER_LENGTH, OVERLONG_PENALTY_FACTOR)
    return Response(question, tokens, text, truncated, verdict["acc"], verdict["score"] + penalty, verdict.get("pred"))


# ---- Dynamic sampling -----------------------------------------------------------------------------------------------


def collect_groups(model, tokenizer, stream):
    """Groups with 0 < right answers < GROUP_SIZE, sampled until there are BATCH_SIZE of them (eq. 11).

    Each round draws new questions, as many as are missing by the share of groups kept so far. Returns the groups to
    train on, all groups sampled, and the number of rounds. Groups are fewer after MAX_GEN_BATCHES rounds or at the end
    of the data; those over BATCH_SIZE are not saved for the next step, whose policy is another.
    """
    kept, sampled, again, rounds = [], [], [], 0
    while len(kept) < BATCH_SIZE and rounds < MAX_GEN_BATCHES:
        keep_rate = (len(kept) + 1) / (len(sampled) + 1)  # never 0
        wanted = min(BATCH_SIZE, math.ceil((BATCH_SIZE - len(kept)) / keep_rate))
        questions = again or list(itertools.islice(stream, wanted))
        if not questions:
            break
        groups = sample_groups(model, tokenizer, questions, GROUP_SIZE)
        sampled, rounds = sampled + groups, rounds + 1
        if not USE_DYNAMIC_SAMPLING:
            return groups, sampled, rounds
        kept += [group for group in groups if not all_alike(group)]
        for group in groups:
            group[0].question.rests = REST_EPOCHS if all_alike(group) else 0
        again = [group[0].question for group in groups if all_alike(group)] if RETRY_SAME_QUESTION else []
    return kept[:BATCH_SIZE], sampled, rounds


def all_alike(group):
    """All right or all wrong, so that no response is an example to the others. Accuracy decides, not the shaped reward:
    the overlong penalty makes a difference between wrong answers too, but not one worth learning."""
    return len({response.accuracy for response in group}) == 1


# ---- Advantage and loss ---------------------------------------------------------------------------------------------


def group_advantages(rewards):
    """(n, G) rewards → (n, G): each compared with its group, (r - mean) / (std + 1e-6), std unbiased (eq. 9).

    A group of equal rewards, or of one, gives zeros.
    """
    advantages = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-6)
    even = (rewards == rewards[:, :1]).all(1, keepdim=True)  # rounding in the mean would be blown up by the tiny std
    return advantages.masked_fill(even, 0.0)


def probability_ratio(log_probs, old_log_probs):
    """ρ = π(token) / π_old(token), (B, T) each, kept between e^-20 and e^20."""
    return (log_probs - old_log_probs).clamp(-20, 20).exp()


def policy_loss(log_probs, old_log_probs, advantages):
    """(B, T), (B, T), (B,) → (B, T): max(-A·ρ, -A·clip(ρ, 1 - low, 1 + high)), with clip-higher (eq. 10).

    A token stops pushing once its probability has moved as far as the clip lets it in the direction its advantage
    wants. If it has moved the other way, the maximum takes the unclipped term, and it is pulled back.
    """
    ratio, advantages = probability_ratio(log_probs, old_log_probs), advantages[:, None]
    clipped = ratio.clamp(1 - CLIP_RANGE_LOW, 1 + CLIP_RANGE_HIGH)
    return torch.maximum(-advantages * ratio, -advantages * clipped)


def clipped_tokens(log_probs, old_log_probs, advantages):
    """The tokens without a gradient, as two (B, T) masks: held by the lower and by the upper end of the clip range."""
    ratio, advantages = probability_ratio(log_probs, old_log_probs), advantages[:, None]
    return (advantages < 0) & (ratio < 1 - CLIP_RANGE_LOW), (advantages > 0) & (ratio > 1 + CLIP_RANGE_HIGH)


def kl_to_base(log_probs, base_log_probs):
    """(B, T), (B, T) → (B, T): r - 1 - log r with r = base / π, an estimate of KL(π || base) that is never negative."""
    ratio = probability_ratio(base_log_probs, log_probs)
    return ratio - 1 - ratio.log()


def aggregate_loss(token_losses, mask, mode, denominator=None):
    """(B, T) token losses and a (B, T) mask of 0 and 1 → one number.

    "token-mean" is the mean over all tokens, so that a long response counts by its length (eq. 12). The mean over
    responses, of sums ("seq-mean-token-sum") or of means ("seq-mean-token-mean", GRPO), counts each of them once.
    `denominator` is the number of tokens, or of responses that have any, in the whole optimizer step. Given it, the
    losses of a mini-batch's parts add up to that of the whole, however it was cut.
    """
    token_losses, lengths = token_losses * mask, mask.sum(1)
    if mode == "token-mean":
        return token_losses.sum() / (denominator or lengths.sum())
    losses = token_losses.sum(1)
    if mode == "seq-mean-token-mean":
        losses = losses / lengths.clamp(min=1)
    return losses.sum() / (denominator or lengths.count_nonzero())


# ---- Scoring --------------------------------------------------------------------------------------------------------


def token_log_probs(model, prompts, responses):
    """B prompts and B responses, 1-D token ids → log_probs, entropy, mask, (B, T) each, of the policy at TEMPERATURE.

    Padding is on the right, where a causal model's real tokens do not see it: no attention mask, no position ids.
    Logits, (N, vocabulary) for N tokens in all responses, would be by far the largest tensor. They are made in chunks,
    for response tokens only, and made again for the backward pass instead of kept.
    """
    lengths = [len(response) for response in responses]
    ids = pad_sequence([torch.cat(pair) for pair in zip(prompts, responses)], True)  # (B, P + T)
    ids = ids.to(model.device, non_blocking=True)  # waiting for the device to be done would leave it idle afterwards
    with autocast(model):
        decoded = model.base_model(input_ids=ids, use_cache=False)
    # The state at one position predicts the token at the next.
    states = zip(decoded.last_hidden_state, [len(prompt) - 1 for prompt in prompts], lengths)
    hidden = torch.cat([state[start : start + length] for state, start, length in states])  # (N, H)
    targets = torch.cat(list(responses)).to(model.device, non_blocking=True)  # (N,)
    size = max(1, LOGITS_CHUNK // model.config.vocab_size)
    chunks = zip(hidden.split(size), targets.split(size))
    options = dict(use_reentrant=False, preserve_rng_state=False)  # nothing is random in it
    parts = [checkpoint(chunk_log_probs, model, decoded, *chunk, **options) for chunk in chunks]
    log_probs, entropy = (pad_sequence(torch.cat(values).split(lengths), True) for values in zip(*parts))
    return log_probs, entropy, pad_sequence([torch.ones(length, device=model.device) for length in lengths], True)


def chunk_log_probs(model, decoded, hidden, targets):
    """(N, H) hidden states, (N,) token ids → log-probabilities and full-vocabulary entropies, (N,) each.

    The head is the model's own forward, its decoder replaced by one that hands on `hidden`. The last layer alone would
    miss what some models do to their logits after it: Gemma 2 caps them, Granite scales them.
    """
    decoder = model.get_decoder()
    decoder.forward = lambda *args, **kwargs: replace(decoded, last_hidden_state=hidden[None])
    try:
        with autocast(model):
            logits = model(inputs_embeds=hidden[None], use_cache=False).logits[0]  # (N, V)
    finally:
        del decoder.forward
    log_probs = logits.float().div_(TEMPERATURE).log_softmax(-1)
    with torch.set_grad_enabled(torch.is_grad_enabled() and ENTROPY_COEF != 0):
        entropy = -(log_probs.exp() * log_probs).sum(-1)
    return log_probs.gather(-1, targets[:, None]).squeeze(-1), entropy


def micro_batches(responses):
    """Responses, sorted by length, in lists of at most MICRO_BATCH_TOKENS tokens. A list also ends where padding would
    cost more than another pass, taken as 1/128 of a full one."""
    batch, real = [], 0
    for response in sorted(responses, key=total_length):
        length = total_length(response)
        padded = (len(batch) + 1) * length
        if batch and (padded > MICRO_BATCH_TOKENS or padded - real - length > MICRO_BATCH_TOKENS // 128):
            yield batch
            batch, real = [], 0
        batch.append(response)
        real += length
    if batch:
        yield batch


def total_length(response):
    return len(response.question.prompt) + len(response.tokens)


def batch_log_probs(model, batch):
    return token_log_probs(model, [r.question.prompt for r in batch], [r.tokens for r in batch])


@record.halve_when_out_of_memory("MICRO_BATCH_TOKENS")
@torch.no_grad()
def store_log_probs(model, responses, name):
    """Sets `name`, old_log_probs or base_log_probs, of each response."""
    for batch in micro_batches(responses):
        for response, log_probs in zip(batch, batch_log_probs(model, batch)[0]):
            setattr(response, name, log_probs[: len(response.tokens)])


# ---- Update ---------------------------------------------------------------------------------------------------------


@record.halve_when_out_of_memory("MICRO_BATCH_TOKENS")
def accumulate_gradients(model, mini_batch):
    """Adds up the gradients of one optimizer step, micro-batch by micro-batch. Returns metrics as sums over tokens.

    Each micro-batch is divided by the count of the whole mini-batch. In a mean of means, the weight of a token would
    depend on the company it happened to be put in.
    """
    model.zero_grad()  # of an attempt for which the memory did not suffice
    tokens = sum(len(response.tokens) for response in mini_batch)
    denominator = tokens if LOSS_AGG_MODE == "token-mean" else len(mini_batch)
    sums = Counter(tokens=tokens)
    for batch in micro_batches(mini_batch):
        log_probs, entropy, mask = batch_log_probs(model, batch)  # (B, T) each
        for response, now in zip(batch, log_probs.detach()):
            if response.old_log_probs is None:  # this very policy sampled it: its ratio is 1
                response.old_log_probs = now[: len(response.tokens)]
        old_log_probs = pad_sequence([response.old_log_probs for response in batch], True)  # (B, T)
        advantages = torch.tensor([r.advantage for r in batch]).to(model.device, non_blocking=True)  # (B,)
        token_losses = {"policy_loss": policy_loss(log_probs, old_log_probs, advantages), "entropy_loss": -entropy}
        if KL_COEF:
            token_losses["kl"] = kl_to_base(log_probs, pad_sequence([r.base_log_probs for r in batch], True))
        losses = {name: aggregate_loss(loss, mask, LOSS_AGG_MODE, denominator) for name, loss in token_losses.items()}
        weights = {"policy_loss": 1.0, "entropy_loss": ENTROPY_COEF, "kl": KL_COEF}
        sum(weights[name] * loss for name, loss in losses.items()).backward()
        low, high = clipped_tokens(log_probs.detach(), old_log_probs, advantages)
        per_token = {"entropy": entropy.detach(), "clip_fraction/low": low, "clip_fraction/high": high}
        sums.update({name: loss.detach() * tokens for name, loss in losses.items()})
        sums.update({name: (value * mask).sum() for name, value in per_token.items()})
    return sums


def update(model, base, optimizer, groups, step):
    """Trains the model on groups of responses: MINI_BATCHES optimizer steps, DAPO_EPOCHS times. Returns the metrics."""
    advantages = group_advantages(torch.tensor([[response.reward for response in group] for group in groups]))
    responses = list(itertools.chain(*groups))
    for response, advantage in zip(responses, advantages.flatten().tolist()):
        response.advantage = advantage
    if USE_OVERLONG_FILTERING:
        responses = [response for response in responses if not response.truncated]
    if not responses:
        return {}
    random.shuffle(responses)
    count = math.ceil(len(responses) * MINI_BATCHES / (BATCH_SIZE * GROUP_SIZE))  # fewer of them for fewer responses
    mini_batches = [responses[i::count] for i in range(count)]
    # Old log-probabilities are those from before the first optimizer step. The first mini-batch is still scored by that
    # very policy in its own forward pass (accumulate_gradients), the others are scored here.
    store_log_probs(model, list(itertools.chain(*mini_batches[1:])), "old_log_probs")
    if KL_COEF:
        store_log_probs(base, responses, "base_log_probs")

    learning_rate = optimizer.param_groups[0]["lr"] = LEARNING_RATE * min(1, step / max(1, WARMUP_STEPS))
    sums, skipped = Counter(), 0
    for mini_batch in mini_batches * DAPO_EPOCHS:
        part = accumulate_gradients(model, mini_batch)
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        if torch.stack([part["policy_loss"], grad_norm]).isfinite().all():
            optimizer.step()
            sums.update(part, grad_norm=grad_norm * part["tokens"])
        else:
            skipped += 1
    optimizer.zero_grad()
    means = {name: float(value) / sums["tokens"] for name, value in sums.items() if name != "tokens"}
    return means | {"learning_rate": learning_rate, "skipped_updates": skipped}


# ---- The loop -------------------------------------------------------------------------------------------------------


def train():
    """Trains MODEL on TRAIN_DATASETS; everything it leaves is in OUTPUT_DIR."""
    set_seed(SEED)
    tokenizer, progress = load_tokenizer(MODEL), record.Progress()
    questions, held_out = load_questions(TRAIN_DATASETS, tokenizer), load_questions(EVAL_DATASETS, tokenizer)
    checkpoint = record.find_checkpoint(globals(), questions)  # of a run that was broken off, or None
    model = load_model(checkpoint or MODEL, tokenizer)
    base = load_model(MODEL, tokenizer) if KL_COEF else None
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True)
    stream = question_stream(questions, progress)
    with record.open_run(globals(), checkpoint, model, tokenizer, optimizer, progress, questions) as run:
        while progress.step != NUM_STEPS:
            run.checkpoint()
            if progress.step % EVAL_EVERY == 0:
                run.write(evaluation.metrics(*evaluate(model, tokenizer, held_out)))
            metrics, sampled = train_step(model, base, tokenizer, optimizer, stream, progress)
            if not sampled:  # NUM_EPOCHS are over
                break
            run.write(metrics, sampled)
        run.checkpoint(last=True)
        if NUM_STEPS or progress.step % EVAL_EVERY:  # else it was just done
            run.write(evaluation.metrics(*evaluate(model, tokenizer, held_out)))
        run.save_model(f"step_{progress.step}" if NUM_STEPS else f"epoch_{NUM_EPOCHS}")


def train_step(model, base, tokenizer, optimizer, stream, progress):
    """One step. Returns its metrics and all groups sampled in it, none where NUM_EPOCHS are over."""
    start = time.perf_counter()
    groups, sampled, rounds = collect_groups(model, tokenizer, stream)
    if not sampled:
        return {}, []
    progress.step += 1
    metrics = record.sampling_metrics(groups, sampled, rounds, time.perf_counter() - start)
    changes = update(model, base, optimizer, groups, progress.step) if groups else {}
    if not changes:
        record.say(f"step {progress.step}: no update, there is nothing to learn from in {len(sampled)} groups")
    seconds = time.perf_counter() - start
    return metrics | changes | {"time/update": seconds - metrics["time/generate"], "time/step": seconds}, sampled


# ---- Not the algorithm: model and data, evaluation, the command line; for the rest see record.py --------------------


def load_tokenizer(path):
    """The tokenizer of a model. A model that cannot be used is refused here, before its weights are read."""
    config = record.from_pretrained(AutoConfig, path, trust_remote_code=TRUST_REMOTE_CODE).get_text_config()
    positions, needed = getattr(config, "max_position_embeddings", None), MAX_PROMPT_LENGTH + MAX_RESPONSE_LENGTH
    if positions and positions < needed:
        record.fail(f"MODEL={path} has {positions} positions, MAX_PROMPT_LENGTH + MAX_RESPONSE_LENGTH are {needed}")
    tokenizer = record.from_pretrained(AutoTokenizer, path, trust_remote_code=TRUST_REMOTE_CODE)
    if tokenizer.eos_token_id is None:
        record.fail(f"MODEL={path}: its tokenizer names no end token (eos_token), so that no response could end")
    if not tokenizer("a")["input_ids"] or len(tokenizer) > config.vocab_size:
        record.fail(f"MODEL={path}: its tokenizer has {len(tokenizer)} tokens, and the model {config.vocab_size}")
    return tokenizer


def load_model(path, tokenizer):
    """The model from a folder or the Hub, with fp32 weights.

    At a learning rate of 1e-6 most of AdamW's steps are too small to change a bf16 weight at all. So weights are fp32,
    and only the arithmetic is bf16, on CUDA. Of a checkpoint's generation_config only the end tokens count here: its
    top_k or repetition_penalty would make the distribution sampled another than the one scored. save_model keeps it.
    """
    best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    options = dict(dtype=torch.float32, use_safetensors=True, trust_remote_code=TRUST_REMOTE_CODE)
    model, report = record.from_pretrained(AutoModelForCausalLM, path, output_loading_info=True, **options)
    if report["missing_keys"]:
        record.fail(f"MODEL={path} has no weights for {', '.join(sorted(report['missing_keys']))}")
    for name, weights in model.named_parameters():
        if not weights.isfinite().all():
            record.fail(f"MODEL={path} has weights that are not finite, in {name}")
    own = model.own_generation_config = model.generation_config
    ends = own.eos_token_id if isinstance(own.eos_token_id, list) else [own.eos_token_id]
    ends = sorted({tokenizer.eos_token_id, *ends} - {None})
    pad = ends[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    model.generation_config = GenerationConfig(eos_token_id=ends, pad_token_id=pad)
    if GRADIENT_CHECKPOINTING:
        recompute_layers(model)
    # Never train(): with dropout, the policy scored would not be the one sampled.
    return model.to(DEVICE or best).eval()


def recompute_layers(model):
    """Gradient checkpointing: layers keep their input only, and are computed again in the backward pass.

    transformers' own works in train() only, with dropout, and leaves sampling without its cache.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, GradientCheckpointingLayer)]
    if not layers:
        record.fail(f"GRADIENT_CHECKPOINTING=True is not possible: {type(model).__name__} has no layers made for it")
    for layer in layers:
        layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)


class NarrowCache(DynamicCache):
    """Keeps keys and values in bf16 under autocast. The rotary embedding makes them fp32, which takes twice the memory,
    and attention would cast all of them again at every token."""

    def update(self, keys, values, *args, **kwargs):
        if torch.is_autocast_enabled(keys.device.type):
            keys, values = keys.bfloat16(), values.bfloat16()
        return super().update(keys, values, *args, **kwargs)


def read_prompt(tokenizer, messages):
    """Chat messages → token ids, as a list. Without a chat template only the last message is read."""
    messages = record.with_template(messages, globals())
    if not tokenizer.chat_template:
        return tokenizer(messages[-1]["content"])["input_ids"]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]


def load_questions(data, tokenizer):
    """The questions of all data sets in `data`, a list in the form of TRAIN_DATASETS, without the overlong ones."""
    questions = []
    for source in data:
        for messages, answer in record.load_rows(source):
            try:
                ids = read_prompt(tokenizer, messages)
            except Exception as error:  # a template may refuse a role, or be broken
                record.fail(f"the chat template of MODEL={MODEL} refuses {messages} of {source['path']!r}: {error}")
            questions.append(Question(messages[-1]["content"], answer, source["path"], torch.tensor(ids)))
    short = [question for question in questions if len(question.prompt) <= MAX_PROMPT_LENGTH]
    if not short:
        record.fail(f"none of {len(questions)} questions is of at most MAX_PROMPT_LENGTH={MAX_PROMPT_LENGTH} tokens")
    if len(short) < len(questions):
        record.say(f"{len(questions) - len(short)} of {len(questions)} questions are over MAX_PROMPT_LENGTH: left out")
    return short


def evaluate(model, tokenizer, questions):
    """Groups of responses to held-out questions: a greedy one each, and EVAL_SAMPLES at TEMPERATURE if that is above 1.

    Shows the answer to the longest question. Its random numbers are its own, so that evaluating does not change a run.
    """
    greedy, sampled = sample_groups(model, tokenizer, questions, 1, greedy=True), []
    check_policy(model, min(greedy, key=lambda group: len(group[0].question.prompt))[0])
    record.show(max(greedy, key=lambda group: len(group[0].question.prompt))[0])
    if EVAL_SAMPLES > 1:
        with torch.random.fork_rng():
            torch.manual_seed(SEED)
            sampled = sample_groups(model, tokenizer, questions, EVAL_SAMPLES)
    return greedy, sampled


@torch.no_grad()
def check_policy(model, response):
    """Refuses a model that is sampled or scored wrong here, by a greedy response, best of all to a padded prompt.

    In a plain forward pass its tokens have to be the likeliest, else the cache is at fault, and their log-probabilities
    those of token_log_probs, else the head. Rounding in bf16 makes far less than half a nat, in the mean of 64 tokens.
    """
    prompt, tokens = response.question.prompt, response.tokens[:64]
    with autocast(model):
        logits = model(torch.cat([prompt, tokens])[None].to(model.device), use_cache=False).logits
    plain = (logits[0, len(prompt) - 1 : -1].float() / TEMPERATURE).log_softmax(-1)  # (T, V)
    chosen = plain.gather(-1, tokens[:, None].to(model.device))[:, 0]
    scored = token_log_probs(model, [prompt], [tokens])[0][0]
    gaps = torch.stack([plain.amax(-1) - chosen, (scored - chosen).abs()]).mean(1) * TEMPERATURE
    if not (gaps < 0.5).all():
        kind = type(model).__name__
        record.fail(f"MODEL: {kind} cannot be trained here, for its cache or head works in another way than usual")


def measure(paths, tokenizers):
    """`eval`: evaluates one model after the other, and compares them."""
    results = {}
    for path, tokenizer in zip(paths, tokenizers):
        record.say(f"{path}:")
        questions = load_questions(EVAL_DATASETS, tokenizer)
        results[path] = evaluate(load_model(path, tokenizer), tokenizer, questions)
    print(evaluation.report(results))


def chat(path, tokenizer):
    """`chat`: asks the model what is typed."""
    model = load_model(path, tokenizer)
    with autocast(model):
        evaluation.chat(path, model, tokenizer, read_prompt, globals())


def main(argv=None):
    """The command line, as `--help` describes it."""
    with record.plain_endings():
        command, folders = record.read_command_line(argv, globals())
        if command == "train":
            train()
        elif command == "plot":
            print(record.compare(folders) if len(folders) > 1 else record.draw(*(folders or [OUTPUT_DIR])))
        else:
            paths = [evaluation.saved_model(name) for name in folders or [MODEL]]
            tokenizers = [load_tokenizer(path) for path in paths]  # of all, before the first takes its time
            for path in paths:
                evaluation.note_changes(path, globals())
            measure(paths, tokenizers) if command == "eval" else chat(paths[0], tokenizers[0])


if __name__ == "__main__":
    main()

"""DAPO: reinforcement learning for language models, in one file that you read from top to bottom.

    python dapo.py                         trains the toy model that ships with it, on a laptop, in minutes
    python dapo.py --CLIP_RANGE_HIGH=0.2   trains it with one constant changed
    python dapo.py recipes/gsm8k.py        trains with the constants that a Python file, a recipe, sets

The paper is "DAPO: An Open-Source LLM Reinforcement Learning System at Scale", arXiv 2503.14476. One training step:

    1. sample   GROUP_SIZE responses to each of BATCH_SIZE questions, and judge their final answers by rule (eq. 7)
    2. filter   drop every group that is all right or all wrong, and sample new questions in its place (eq. 11)
    3. shape    lower the reward of a response that comes close to the length limit (eq. 13)
    4. compare  each reward with its group's mean, in standard deviations: this is the advantage (eq. 9)
    5. update   the policy by PPO's clipped objective, with more room upward than downward, so that rare tokens can grow
                (eq. 10), averaged over tokens instead of responses (eq. 12)

GRPO, which DAPO improves on, omits 2 and 3 and the two changes in 5, and adds a KL penalty. We leave out training on
more than one GPU, sampling engines such as vLLM, and the second clip ("dual clip") that the authors' script
sets. docs/deviations.md lists what else differs from the paper, its script, verl, and TRL.

Words:
    policy π   the language model, as something that chooses the next token; training changes its probabilities
    reward     one number for a whole response: 1 if its final answer is right, -1 if it is wrong
    advantage  how much better a response did than its group, all responses to one question; each of its tokens gets it
    ratio ρ    the probability of a token now, divided by its probability when it was sampled
    clip       stops pushing a token once its ratio has moved far enough from 1
    entropy    how undecided the policy is about the next token, in nats
    KL         how far the policy has moved away from the base model, the one that training started from
    cache      what each layer keeps of the tokens that it has read ("keys and values"), so none is computed twice
    shapes     B rows of a batch, P prompt tokens, T response tokens, N response tokens of all rows, H hidden size,
               V vocabulary, n groups of G responses
"""

import ast
import contextlib
import csv
import difflib
import fnmatch
import functools
import glob
import inspect
import io
import itertools
import json
import logging
import math
import os
import random
import re
import runpy
import shutil
import signal
import sqlite3
import statistics
import sys
import time
import traceback
import warnings
import zipfile
import zlib
from collections import Counter
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

# torch's OpenMP reads this when torch is imported: a thread that waits for others soon gives up its core. Without it, a
# step takes up to 60 times as long while another program keeps the cores busy.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import pyarrow.dataset  # before torch, for Windows
import torch
import transformers
from filelock import FileLock, Timeout
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from tqdm.utils import ObjectWrapper

from reward import TIMEOUTS as given_up
from reward import compute_score, overlong_penalty, read_verdict

# ---- Constants: functions read them when they run: the command line, a recipe, or grpo.py can set them first ---------

# Model and data
MODEL = "toy"  # folder or Hub name of a causal language model, or a run's folder, for the model that it saved last
TRAIN_DATASETS = [  # path: file or Hub name; type: parquet, json, csv, or hub; input, output: columns, dotted if nested
    {"path": "toy/train.parquet", "type": "parquet", "input": "question", "output": "answer"},
]
EVAL_DATASETS = [  # held-out questions, in the same form
    {"path": "toy/test.parquet", "type": "parquet", "input": "question", "output": "answer"},
]
PROMPT_TEMPLATE = "{question}"  # what is asked, inside the chat template; "boxed" and "answer" name ready-made ones
CHAT_TEMPLATE_KWARGS = {}  # switches of the model's chat template, such as {"enable_thinking": False} for Qwen3
MAX_PROMPT_LENGTH = 256  # tokens; longer questions are left out
TRUST_REMOTE_CODE = False  # run the Python code that a model from the Hub may bring along
OUTPUT_DIR = "outputs/dapo"  # the run's own folder; an earlier run in it is renamed, not overwritten
RESUME = True  # resume an interrupted run in it; False: always start a new one
DEVICE = ""  # cpu, cuda, or mps; empty: the best one available
SEED = 0  # seeds every random choice

# Length of the run
NUM_STEPS = 14  # batches to train on; None: NUM_EPOCHS passes over the data
NUM_EPOCHS = 1  # passes over the data if NUM_STEPS is None
EVAL_EVERY = 2  # steps between evaluations, each with a sample response and a new picture
EVAL_SAMPLES = 1  # above 1: the mean accuracy of so many samples, avg@k, is measured besides that of greedy responses
SAVE_EVERY = 0  # steps between saved models; 0: only at the end
CHECKPOINT_EVERY = 5  # steps between checkpoints, of which the last two are kept
RECORDED_TOKENS = 2**16  # tokens per step that run.db keeps one by one, in about 25 bytes each; 0: none

# Sampling
BATCH_SIZE = 32  # questions per step
GROUP_SIZE = 8  # responses per question
MAX_RESPONSE_LENGTH = 96  # tokens, including the end token
TEMPERATURE = 1.0  # logits are divided by it, in sampling and in training; below 1, likely tokens become likelier
GENERATION_BATCH = 1024  # responses sampled at a time, in whole groups; lower it if memory runs out while sampling
DECODE_STAGE = 8  # tokens output at a time; then the responses that have ended leave the batch
USE_DYNAMIC_SAMPLING = True  # replace groups that are all right or all wrong (GRPO: False)
MAX_GEN_BATCHES = 10  # at most this many rounds of sampling per step, each of up to BATCH_SIZE questions
RETRY_SAME_QUESTION = False  # sample the same question again instead of a new one; the paper does not
REST_EPOCHS = 0  # epochs for which the question of such a group is skipped

# Reward
REWARD = compute_score  # judges a response; has the parameters of verl's reward functions; or "file.py:function"
OVERLONG_BUFFER_LENGTH = 32  # tokens before the limit over which the penalty grows; 0: no penalty (GRPO: 0)
OVERLONG_PENALTY_FACTOR = 1.0  # reward taken off at the limit
USE_OVERLONG_FILTERING = False  # leave truncated responses out of the loss, but not out of their group's mean

# Loss
CLIP_RANGE_LOW = 0.2  # a bad token is pushed down until its ratio ρ is 1 - this
CLIP_RANGE_HIGH = 0.28  # a good token is pushed up until its ratio ρ is 1 + this, as from 0.01 to 0.0128 (GRPO: 0.2)
LOSS_AGG_MODE = "token-mean"  # or seq-mean-token-sum, or seq-mean-token-mean (GRPO)
KL_COEF = 0.0  # weight of the KL penalty (GRPO: above 0)
ENTROPY_COEF = 0.0  # weight of the entropy bonus

# Update
LORA_RANK = 0  # 0: train all weights; above: keep them, and train adapters of this rank, in less memory (needs peft)
LORA_ALPHA = 32.0  # what an adapter adds is multiplied by this / LORA_RANK
LEARNING_RATE = 2e-5  # of AdamW, after the warm-up (the paper, with 32 billion parameters: 1e-6)
WARMUP_STEPS = 5  # steps over which the learning rate rises to it
WEIGHT_DECAY = 0.1  # of AdamW
MAX_GRAD_NORM = 1.0  # a gradient with a larger norm is scaled down to this
DAPO_EPOCHS = 3  # passes over each batch (the paper: 1)
MINI_BATCHES = 16  # parts that a full batch is cut into, for one optimizer step each
MICRO_BATCH_TOKENS = 16384  # tokens in one forward and backward pass, with padding; lower it if memory runs out
GRADIENT_CHECKPOINTING = False  # keep only each layer's input and compute the layer again: less memory, more time
LOGITS_CHUNK = 2**25  # logits computed at a time: 0.125 GiB, and several times that while they are worked on

CONSTANTS = {name: value for name, value in globals().items() if name.isupper()}  # the defaults

# ---- The loop; helpers that you miss here are below the algorithm ---------------------------------------------------


def train():
    """Trains MODEL on TRAIN_DATASETS. Everything it writes is in OUTPUT_DIR."""
    model, tokenizer = load_model(MODEL)
    base = load_model(MODEL)[0] if KL_COEF and not LORA_RANK else None
    if LORA_RANK:
        add_adapters(model)
    questions, held_out = load_questions(TRAIN_DATASETS, tokenizer), load_questions(EVAL_DATASETS, tokenizer)
    check(model, questions, held_out)
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True)
    with open_run(model, tokenizer, optimizer, questions, held_out) as run:  # resumes it if it was interrupted
        stream = question_stream(questions, run)
        while not run.is_over():
            run.save_if_due()
            if run.step % EVAL_EVERY == 0:
                run.record(*evaluate(model, tokenizer, held_out))
            metrics, sampled = train_step(model, base, tokenizer, optimizer, stream, run.step + 1)
            if sampled:  # else the stream has ended, and the run is over
                run.step += 1
                run.record(metrics, sampled)
        run.save_if_due(last=True)
        run.record(*evaluate(model, tokenizer, held_out))
        run.finish()


def train_step(model, base, tokenizer, optimizer, stream, step):
    """One step of DAPO. Returns its metrics, and all groups that it sampled: none if the stream has ended."""
    set_seed("step", step)  # each step has its own seed, so a resumed run needs only the number of the next step
    start, groups, sampled, again, rounds = time.perf_counter(), [], [], [], 0
    while len(groups) < BATCH_SIZE and rounds < MAX_GEN_BATCHES:
        keep_rate = (len(groups) + 1) / (len(sampled) + 1)  # so far, and never 0
        wanted = min(BATCH_SIZE, math.ceil((BATCH_SIZE - len(groups)) / keep_rate))
        questions = again or list(itertools.islice(stream, wanted))
        if not questions:
            break
        fresh = sample_groups(model, tokenizer, questions, GROUP_SIZE)  # 1. sample
        kept, dropped = filter_groups(fresh)  # 2. filter
        groups, sampled, rounds = groups + kept, sampled + fresh, rounds + 1
        for response in itertools.chain(*fresh):
            response.round = rounds
        again = [group[0].question for group in dropped] if RETRY_SAME_QUESTION else []
    if not sampled:
        return {}, []
    batch = groups[:BATCH_SIZE]  # the surplus is not kept for the next step: the policy will have changed
    shape_rewards(sampled)  # 3. shape; the batch is among them, and the metrics show them all
    compare_rewards(batch)  # 4. compare
    metrics = sampling_metrics(sampled, groups, batch, rounds, time.perf_counter() - start)
    metrics |= update_policy(model, base, optimizer, batch, step) | {"memory/peak_gib": peak_memory()}  # 5. update
    seconds = time.perf_counter() - start
    return metrics | {"time/step": seconds, "time/update": seconds - metrics["time/generate"]}, sampled


@dataclass(eq=False)  # compared by identity, as tensors cannot be
class Question:
    text: str
    answer: str  # the ground truth
    source: str  # the path of its data set
    prompt: torch.Tensor  # (P,) token ids, as the model reads them
    columns: dict = field(default_factory=dict)  # the rest of its row
    rests: int = 0  # epochs for which it is still skipped
    prompt_end: str = ""  # its last tokens as text: a chat template may open a <think> there


@dataclass(eq=False)
class Response:
    question: Question
    tokens: torch.Tensor  # (T,) ids as sampled, through the end token; never output and tokenized again
    text: str
    truncated: bool  # cut off by MAX_RESPONSE_LENGTH
    accuracy: float  # 1 right, 0 wrong; this and the next four are REWARD's verdict
    signal: float  # what groups are filtered by: the accuracy if REWARD tells it, else the score
    reward: float  # the score, 1 right and -1 wrong, less the overlong penalty
    prediction: str | None  # the answer found in it, if REWARD tells
    others: dict[str, float]  # more numbers that REWARD tells
    round: int = 0  # the round of sampling, in its step
    fate: str = "surplus"  # trained, or why not
    penalty: float = 0.0  # for its length, 0 or below
    advantage: float | None = None  # None: not in the loss
    old_log_probs: torch.Tensor | None = None  # (T,) by the policy that sampled it
    log_probs: torch.Tensor | None = None  # (T,) when it was last trained on
    base_log_probs: torch.Tensor | None = None  # (T,) by the base model, if there is a KL_COEF


# ---- 1. Sample ------------------------------------------------------------------------------------------------------


def sample_groups(model, tokenizer, questions, group_size, greedy=False):
    """Samples `group_size` responses to each question and judges them. Returns a list of groups of Responses."""
    tokens, size = [], max(1, GENERATION_BATCH // group_size)
    for first in tqdm(range(0, len(questions), size), "sampling", leave=False, delay=5, disable=None):
        prompts = [question.prompt for question in questions[first : first + size]]
        tokens += sample_tokens(model, prompts, group_size, greedy)
    asked = [question for question in questions for _ in range(group_size)]
    texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)
    truncated = [ids[-1].item() not in model.generation_config.eos_token_id for ids in tokens]
    rows = zip(asked, tokens, texts, truncated, judge(asked, texts))
    responses = [verdict and Response(*row, **verdict) for *row, verdict in rows]  # None: REWARD gave no verdict
    groups = [responses[first : first + group_size] for first in range(0, len(responses), group_size)]
    return [list(filter(None, group)) for group in groups if any(group)]


@torch.no_grad()
def sample_tokens(model, prompts, group_size=1, greedy=False, limit=None, drawn=None):
    """B prompts, (P,) token ids each → B·G responses, (T,) token ids each, through their first end token. If `drawn` is
    B·G empty lists, they receive the log-probability with which each token was sampled, and more after the end token.

    With each prompt repeated G times, one call would do the same, but on a CPU it takes 2.5 to 6 times as long:

        model.generate(ids, attention_mask=mask, do_sample=True, temperature=TEMPERATURE, top_k=0,
                       max_new_tokens=MAX_RESPONSE_LENGTH)

    It reads each prompt G times, and keeps every row until the longest response has ended. So we read each prompt once,
    copy its cache to the rows of its group, call generate for DECODE_STAGE tokens at a time, and drop ended rows:

        prompts       after a stage     before the next     G = 1, a stage is 2 tokens, _ is padding, E the end token
        _ _ a b c     _ _ a b c 5 6     _ _ a b c 5 6       mask      0 0 1 1 1 1 1
        p q r s t     p q r s t 7 E                         position  0 0 0 1 2 3 4
    """
    pad, ends = model.generation_config.pad_token_id, model.generation_config.eos_token_id
    limit = limit or MAX_RESPONSE_LENGTH
    # top_k=0: any token can be sampled, not only the 50 likeliest (the default), as token_log_probs assumes.
    method = {"do_sample": False} if greedy else {"do_sample": True, "temperature": TEMPERATURE, "top_k": 0}
    method |= {"return_dict_in_generate": True, "output_scores": bool(drawn)}
    ids = pad_sequence(prompts, True, pad, "left").to(model.device)  # (B, P), so that all responses begin together
    mask = pad_sequence([torch.ones_like(prompt) for prompt in prompts], True, 0, "left").to(model.device)  # (B, P)
    cache, width = new_cache(model), ids.shape[1]  # generate computes only what is not in the cache yet
    rows = torch.arange(len(prompts), device=model.device).repeat_interleave(group_size)  # the prompt of each response
    live = list(range(len(rows)))  # the response in each row of ids, mask, and cache
    responses = [[] for _ in live]
    with autocast(model):
        if width > 1:  # all but the last token: generate reads that one, and its output there predicts the next
            positions = mask.cumsum(1).sub(1).clamp(min=0)
            model.get_decoder()(ids[:, :-1], attention_mask=mask[:, :-1], position_ids=positions[:, :-1], cache=cache)
        for start in range(0, limit, DECODE_STAGE):
            if len(rows) != len(ids):  # copy each prompt's row G times or, later, keep the rows that have not ended
                ids, mask = ids[rows], mask[rows]
                cache.reorder_cache(rows)
            stage = min(DECODE_STAGE, limit - start)
            output = model.generate(ids, attention_mask=mask, cache=cache, max_new_tokens=stage, **method)
            ids = output.sequences
            if drawn:
                log_softmax = torch.stack(output.scores, 1).log_softmax(-1)  # (rows, stage, V)
                for row, values in zip(live, log_softmax.gather(-1, ids[:, width + start :, None])[..., 0].tolist()):
                    drawn[row] += values
            mask = torch.nn.functional.pad(mask, (0, ids.shape[1] - mask.shape[1]), value=1)
            staying = []
            for row, tokens in enumerate(ids[:, width + start :].tolist()):
                end = next((place for place, token in enumerate(tokens) if token in ends), None)
                responses[live[row]] += tokens if end is None else tokens[: end + 1]
                staying += [row] if end is None else []
            if not staying:
                break
            rows, live = torch.tensor(staying, device=model.device), [live[row] for row in staying]
    return [torch.tensor(tokens) for tokens in responses]


# ---- 2. Filter, 3. Shape, 4. Compare --------------------------------------------------------------------------------


def filter_groups(groups):
    """Dynamic sampling (eq. 11): returns the groups with 0 < right answers < G, and those whose advantages would be 0.
    Accuracy decides, not the shaped reward: overlong penalties differ in all-wrong groups, too, but teach little."""
    if not USE_DYNAMIC_SAMPLING:
        return groups, []
    signals = [torch.tensor([[response.signal for response in group]]) for group in groups]  # (1, G) each
    uniform = [group for group, signal in zip(groups, signals) if not group_advantages(signal).any()]
    for group in groups:
        group[0].question.rests = REST_EPOCHS if group in uniform else 0
    for response in itertools.chain(*uniform):
        response.fate = {1: "all correct", 0: "all wrong"}.get(response.accuracy, "all equal")
    return [group for group in groups if group not in uniform], uniform


def shape_rewards(groups):
    """Adds the soft overlong penalty (eq. 13) to each reward: here 0 up to token 64, -0.5 at 80, and -1 at 96."""
    for response in itertools.chain(*groups):
        limit, buffer, factor = MAX_RESPONSE_LENGTH, OVERLONG_BUFFER_LENGTH, OVERLONG_PENALTY_FACTOR
        response.penalty = overlong_penalty(len(response.tokens), limit, buffer, factor)
        response.reward += response.penalty


def compare_rewards(groups):
    """Sets the advantage of each response in the loss."""
    for group in groups:
        advantages = group_advantages(torch.tensor([[response.reward for response in group]]))  # (1, G)
        for response, advantage in zip(group, advantages[0].tolist()):
            filtered = USE_OVERLONG_FILTERING and response.truncated
            response.advantage, response.fate = (None, "truncated") if filtered else (advantage, "trained")


def group_advantages(rewards):
    """(n, G) rewards → (n, G) advantages: (r - mean) / (std + 1e-6), with the group's mean and unbiased std (eq. 9).
    With 2 of 8 rewards 1 and the others -1, they are 1.62 and -0.54. Equal rewards, or a group of one, give zeros."""
    std = rewards.std(1, keepdim=True, correction=min(1, rewards.shape[1] - 1))  # of one reward it is 0
    equal = rewards.isclose(rewards[:, :1], rtol=1e-4, atol=1e-6).all(1, keepdim=True)  # but for rounding errors
    return ((rewards - rewards.mean(1, keepdim=True)) / (std + 1e-6)).masked_fill(equal, 0.0)


# ---- 5. Update ------------------------------------------------------------------------------------------------------


def update_policy(model, base, optimizer, groups, step):
    """Trains the model on the groups: MINI_BATCHES optimizer steps, DAPO_EPOCHS times. Returns the metrics."""
    responses = [response for response in itertools.chain(*groups) if response.advantage is not None]
    if not responses:
        return {}
    count = math.ceil(len(responses) * MINI_BATCHES / (BATCH_SIZE * GROUP_SIZE))  # fewer steps for fewer responses
    mini_batches = []
    for _ in range(DAPO_EPOCHS):
        random.shuffle(responses)
        mini_batches += [responses[first::count] for first in range(count)]  # each takes every count-th response
    store_log_probs(model, responses, "old_log_probs")  # before any step, scored as in the update: ratios start at 1
    if KL_COEF:
        with contextlib.nullcontext() if base else model.adapters.disable_adapter():  # LoRA needs no second model
            store_log_probs(base or model, responses, "base_log_probs")
    learning_rate = optimizer.param_groups[0]["lr"] = LEARNING_RATE * min(1, step / max(1, WARMUP_STEPS))
    sums, first_gap, skipped = Counter(), None, 0  # Counter.update adds, where dict.update would replace
    for mini_batch in mini_batches:  # each step changes the policy, so ratios leave 1 after the first
        losses, token_sums, gap = accumulate_gradients(model, mini_batch)
        first_gap = gap if first_gap is None else first_gap
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        if grad_norm.isfinite():
            optimizer.step()
            sums.update({**losses, **token_sums, "grad_norm": grad_norm, "updates": 1})
        else:
            skipped += 1
        optimizer.zero_grad()
    tokens, updates = sums.pop("tokens", 0), sums.pop("updates", 0)
    means = {name: float(sums[name]) / (tokens if name in token_sums else updates) for name in sums}
    return means | {"learning_rate": learning_rate, "skipped_updates": skipped, "first_ratio_gap": first_gap.item()}


def accumulate_gradients(model, mini_batch):
    """Adds up the gradients of a mini-batch, one micro-batch of at most MICRO_BATCH_TOKENS tokens at a time.

    Each loss is divided by the count of the whole mini-batch, so the losses of its micro-batches add up to its loss; in
    a mean of their means, a token's weight would depend on its neighbors. Returns losses, sums over tokens of the other
    metrics, and the largest |ρ - 1|."""
    count = sum(len(response.tokens) for response in mini_batch)
    denominator = count if LOSS_AGG_MODE == "token-mean" else len(mini_batch)
    losses, token_sums, gaps = Counter(), Counter(tokens=count), []
    for micro_batch in micro_batches(model, mini_batch):
        log_probs, entropy, mask = score(model, micro_batch)  # (B, T) each
        old_log_probs = pad_sequence([response.old_log_probs for response in micro_batch], True)  # (B, T)
        advantages = torch.tensor([r.advantage for r in micro_batch]).to(model.device, non_blocking=True)  # (B,)
        terms = {"policy_loss": policy_loss(log_probs, old_log_probs, advantages, mask), "entropy_loss": -entropy}
        if KL_COEF:
            terms["kl"] = kl_to_base(log_probs, pad_sequence([r.base_log_probs for r in micro_batch], True))
        parts = {name: aggregate_loss(term, mask, LOSS_AGG_MODE, denominator) for name, term in terms.items()}
        loss = parts["policy_loss"] + KL_COEF * parts.get("kl", 0) + ENTROPY_COEF * parts["entropy_loss"]
        loss.backward()
        low, high = clipped_tokens(log_probs.detach(), old_log_probs, advantages, mask)
        sums = {"entropy": entropy.detach() * mask, "clip_fraction/low": low, "clip_fraction/high": high}
        for response, row in zip(micro_batch, log_probs.detach()):
            response.log_probs = row[: len(response.tokens)]
        losses.update({name: part.detach() for name, part in parts.items()})
        token_sums.update({name: values.sum() for name, values in sums.items()})
        gaps.append((probability_ratio(log_probs.detach(), old_log_probs, mask) - 1).abs().max())
    return losses, token_sums, torch.stack(gaps).max()


def policy_loss(log_probs, old_log_probs, advantages, mask):
    """(B, T), (B, T), (B,), (B, T) → (B, T): max(-A·ρ, -A·clip(ρ, 1 - low, 1 + high)), with clip-higher (eq. 10).

    This is minus the paper's objective, hence max for its min. At ρ = 1 its value is -A, its gradient -A·∇log π: a step
    makes a good token (A > 0) likelier, until ρ = 1 + high, and a bad one less likely, until ρ = 1 - low. Beyond, it is
    constant, without a gradient. But if a token has moved the other way, the unclipped term counts: it is pulled back.
    """
    ratio, advantages = probability_ratio(log_probs, old_log_probs, mask), advantages[:, None]
    clipped = ratio.clamp(1 - CLIP_RANGE_LOW, 1 + CLIP_RANGE_HIGH)
    return torch.maximum(-advantages * ratio, -advantages * clipped)


def probability_ratio(log_probs, old_log_probs, mask):
    """ρ = π(token) / π_old(token), (B, T) each; 1 at padding. The clamp prevents overflow in exp."""
    return ((log_probs - old_log_probs) * mask).clamp(-20, 20).exp()


def kl_to_base(log_probs, base_log_probs):
    """(B, T), (B, T) → (B, T): x - 1 - log x with x = π_base / π; its mean over tokens from π is KL(π ‖ π_base)."""
    log_ratio = (base_log_probs - log_probs).clamp(-20, 20)
    return log_ratio.exp() - 1 - log_ratio


def aggregate_loss(token_losses, mask, mode, denominator=None):
    """(B, T) token losses, and a (B, T) mask that is 1 at response tokens and 0 at padding → one number.

    "token-mean" is the mean over all tokens, so a longer response counts for more (eq. 12), as it does in
    "seq-mean-token-sum", the mean over responses of their sums. "seq-mean-token-mean" (GRPO), the mean of their means,
    counts each response once. `denominator` is the number of tokens, or of responses, in the whole mini-batch."""
    token_losses, lengths = token_losses * mask, mask.sum(1)
    if mode == "token-mean":
        return token_losses.sum() / (denominator or lengths.sum())
    losses = token_losses.sum(1) / (lengths.clamp(min=1) if mode == "seq-mean-token-mean" else 1)
    return losses.sum() / (denominator or lengths.count_nonzero())


def token_log_probs(model, prompts, responses):
    """B prompts and B responses, token ids → log-probabilities, entropies, and mask, (B, T) each, at TEMPERATURE.

    Padding is on the right here, where earlier tokens do not see it: no attention mask, no position ids. What the model
    computes at one position, its hidden state, predicts the token at the next:

        ids      a b c 5 6 E _ _        prompt a b c, response 5 6 E, padding
        hidden       ^ ^ ^              predict 5, 6, and E
    """
    ids = pad_sequence([torch.cat(pair) for pair in zip(prompts, responses)], True)  # (B, P + T)
    ids = ids.to(model.device, non_blocking=True)  # to wait for a GPU here would leave it idle afterwards
    with autocast(model):
        output = model.get_decoder()(input_ids=ids, use_cache=False)  # all layers but the last, which gives logits
    starts, lengths = [len(prompt) - 1 for prompt in prompts], [len(response) for response in responses]
    rows = zip(output.last_hidden_state, starts, lengths)
    hidden = torch.cat([row[start : start + length] for row, start, length in rows])  # (N, H)
    targets = torch.cat(list(responses)).to(model.device, non_blocking=True)  # (N,)
    log_probs, entropy = log_softmax_at(targets, model, output, hidden)  # (N,) each: of logits / TEMPERATURE, in chunks
    return [pad_sequence(flat.split(lengths), True) for flat in (log_probs, entropy, torch.ones_like(entropy))]


# =====================================================================================================================
# The algorithm ends here, and you can stop here. The rest is what any training program needs: memory, model, data, the
# record of a run, metrics, and the command line.


def micro_batches(model, responses):
    """Yields lists of responses of similar length, each of at most MICRO_BATCH_TOKENS tokens, padding included. On a
    CPU, another pass costs as much as about 100 tokens of padding. A short pass leaves a GPU mostly idle, so there we
    accept more padding, for fewer passes."""
    stretch = 1.3 if model.device.type == "cpu" else 2  # length of the longest response / the shortest, at most
    lengths, batch = {response: len(response.question.prompt) + len(response.tokens) for response in responses}, []
    for response in sorted(responses, key=lengths.get):
        length = lengths[response]
        if batch and ((len(batch) + 1) * length > MICRO_BATCH_TOKENS or length > stretch * lengths[batch[0]]):
            yield batch
            batch = []
        batch.append(response)
    if batch:
        yield batch


@torch.no_grad()
def store_log_probs(model, responses, name):
    """Sets `name`, old_log_probs or base_log_probs, of each response."""
    for micro_batch in micro_batches(model, responses):
        for response, log_probs in zip(micro_batch, score(model, micro_batch)[0]):
            setattr(response, name, log_probs[: len(response.tokens)].clone())  # without the padding


def score(model, batch):
    return token_log_probs(model, [r.question.prompt for r in batch], [r.tokens for r in batch])


def log_softmax_at(targets, model, output, hidden):
    """(N,) token ids and (N, H) hidden states → log-probabilities of the tokens, and entropies, (N,) each. The logits,
    (N, V), would be by far the largest tensor. They are computed in chunks, and again for the backward pass."""

    def chunk(targets, hidden):
        log_softmax = head_logits(model, output, hidden).float().div(TEMPERATURE).log_softmax(-1)
        log_probs = log_softmax.gather(-1, targets[:, None])[:, 0]
        with torch.set_grad_enabled(torch.is_grad_enabled() and ENTROPY_COEF != 0):
            return log_probs, -(log_softmax.exp() * log_softmax).sum(-1)

    size = max(1, LOGITS_CHUNK // model.config.get_text_config().vocab_size)
    parts = zip(targets.split(size), hidden.split(size))
    with autocast(model):  # one for all chunks, so that the output layer's weights are made bf16 once
        parts = [checkpoint(chunk, *part, use_reentrant=False, preserve_rng_state=False) for part in parts]
    return [torch.cat(part) for part in zip(*parts)]


def head_logits(model, output, hidden):
    """(N, H) hidden states → (N, V) logits, by the model's own forward, its decoder made to return `hidden`. The output
    layer alone would not do: Gemma 2 caps the logits after it, Granite and Cohere scale them."""
    decoder = model.get_decoder()
    decoder.forward = lambda *args, **kwargs: replace(output, last_hidden_state=hidden[None])
    logits = model(inputs_embeds=hidden[None], use_cache=False).logits[0]
    del decoder.forward
    return logits


def autocast(model):
    """What is trained is fp32, as bf16 would lose AdamW's steps at a learning rate of 1e-6. Arithmetic is bf16 on CUDA
    GPUs that have it; older ones, such as T4 and V100, would emulate it, very slowly."""
    native = model.device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.autocast(model.device.type, torch.bfloat16, enabled=native)


def arithmetic(model):
    """The type that a model computes products in."""
    with autocast(model):
        return torch.bfloat16 if torch.is_autocast_enabled(model.device.type) else torch.float32


def new_cache(model):
    """A key-value cache in the type of the arithmetic: under autocast, norms and rotary embeddings give fp32."""
    dtype = arithmetic(model)

    class Cache(transformers.DynamicCache):  # a method set on the instance would refer back to it, and so keep it alive
        def update(self, keys, values, *rest, **more):
            return super().update(keys.to(dtype), values.to(dtype), *rest, **more)

    cache = Cache(config=model.config)
    for layer in cache.layers:
        if type(layer) is transformers.cache_utils.DynamicLayer:
            layer.__class__ = RoomyLayer
    return cache


class RoomyLayer(transformers.cache_utils.DynamicLayer):
    """A layer of the cache with room for a stage of tokens. Without that room, each new token would copy the keys and
    values of all earlier ones."""

    room = None  # for keys and for values: (B, heads, tokens kept and tokens to come, head size) each

    def update(self, keys, values, *rest, **more):
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
        start = self.get_seq_length()
        end = start + keys.shape[2]
        if self.room is None or self.room[0].shape[2] < end:
            after = [part.new_empty(*part.shape[:2], DECODE_STAGE, part.shape[3]) for part in (keys, values)]
            self.room = [torch.cat(parts, 2) for parts in zip((self.keys, self.values), (keys, values), after)]
        else:
            for room, part in zip(self.room, (keys, values)):
                room[:, :, start:end] = part
        self.keys, self.values = (room[:, :, :end] for room in self.room)
        return self.keys, self.values

    def reorder_cache(self, rows):
        super().reorder_cache(rows)
        self.room = None


def set_seed(*words):
    transformers.set_seed(random.Random(f"{SEED} {words}").getrandbits(32))


# ---- Model and data -------------------------------------------------------------------------------------------------

# Chat templates may tell the date, but what a run reads must not depend on the day.
transformers.utils.chat_template_utils.datetime = SimpleNamespace(now=lambda: datetime(2026, 1, 1))
transformers.logging.disable_progress_bar()
for library in ("transformers", "huggingface_hub", "datasets"):  # errors are raised, too, and then told in one line
    logging.getLogger(library).setLevel(logging.CRITICAL)
warnings.filterwarnings("ignore", module="transformers|peft")


def load_model(path):
    """The model in a folder or on the Hub, in fp32, or in the type of the arithmetic for LoRA, and its tokenizer."""
    path, options = saved_model(path), {"trust_remote_code": TRUST_REMOTE_CODE}
    device = torch.device(DEVICE or torch.accelerator.current_accelerator(check_available=True) or "cpu")
    dtype = arithmetic(SimpleNamespace(device=device)) if LORA_RANK else torch.float32
    with explained(f"MODEL={path} is neither a model's folder nor its name on the Hub"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, **options)
        whole = transformers.AutoConfig.from_pretrained(path, **options)
        config = whole.get_text_config()  # of a model that sees pictures, too, the part that we train
        if getattr(whole, "quantization_config", None):
            fail(f"MODEL={path} is quantized, and AdamW cannot train that: take the model that it was made from")
        for part in (whole, config):
            part.return_dict = True
            if hasattr(part, "output_router_logits"):
                part.output_router_logits = False
        options |= {"dtype": dtype, "use_safetensors": True, "output_loading_info": True}
        model, report = transformers.AutoModelForCausalLM.from_pretrained(path, config=whole, **options)
    size, positions = config.vocab_size, getattr(config, "max_position_embeddings", None) or math.inf
    if report["missing_keys"]:
        fail(f"MODEL={path} has no weights for {', '.join(sorted(report['missing_keys']))}")
    if not all(weights.isfinite().all() for weights in model.parameters()):
        fail(f"MODEL={path} has weights that are not finite")
    if tokenizer.eos_token_id not in range(size):
        fail(f"MODEL={path} has a tokenizer that names no end token (eos_token) among its {size} tokens")
    if (needed := MAX_PROMPT_LENGTH + MAX_RESPONSE_LENGTH) > positions:
        fail(f"MODEL={path} has {positions} positions, MAX_PROMPT_LENGTH + MAX_RESPONSE_LENGTH are {needed}")
    if GRADIENT_CHECKPOINTING:  # transformers' own needs train(), and turns the cache off
        kind = transformers.modeling_layers.GradientCheckpointingLayer
        layers = [layer for layer in model.modules() if isinstance(layer, kind)]
        for layer in layers or fail(f"MODEL={path} has no layers that are made for GRADIENT_CHECKPOINTING=True"):
            layer.forward = recomputed(layer.forward)
    # Of its own generation_config only the end tokens count: its top_k or repetition_penalty would make the
    # distribution that we sample another one than the one that we score. The saved model gets it back.
    own = model.own_generation_config = model.generation_config
    ends = own.eos_token_id if isinstance(own.eos_token_id, list) else [own.eos_token_id]
    ends = sorted({tokenizer.eos_token_id, *ends} - {None})
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id in range(size) else ends[0]
    model.generation_config = transformers.GenerationConfig(eos_token_id=ends, pad_token_id=pad)
    model._optimize_model_for_decode = contextlib.nullcontext  # it would gather the expert weights of every token
    # Never train(): with dropout, the policy that we score would not be the one that we sample.
    return model.to(device).eval(), tokenizer


def add_adapters(model):
    """LoRA (arXiv 2106.09685): a linear layer gives W x + LORA_ALPHA / LORA_RANK · B A x. Only A and B are trained, in
    fp32, and B begins at 0. The output layer gets none. Nor do experts: peft would round what their adapters learn."""
    set_seed("adapters")
    with explained(f"LORA_RANK={LORA_RANK} needs peft (pip install peft), and a MODEL that it can add to"):
        import peft

        layers = ".*attn.*_proj.*" if hasattr(model.config.get_text_config(), "num_experts_per_tok") else "all-linear"
        kind = peft.LoraConfig(r=LORA_RANK, lora_alpha=LORA_ALPHA, target_modules=layers, task_type="CAUSAL_LM")
        vars(model)["adapters"] = peft.get_peft_model(model, kind)  # by setattr, the model would contain itself
    if isinstance(kind.target_modules, set):  # which would be saved in another order each time
        kind.target_modules = sorted(kind.target_modules)


def save_weights(model, folder):
    """Saves a model in Hugging Face form, its adapters added to the weights, in fp32: bf16 would round much away."""
    weights = {name.replace(".base_layer", ""): w for name, w in model.state_dict().items() if ".lora_" not in name}
    for name, layer in model.named_modules():
        if hasattr(layer, "base_layer"):
            weights[f"{name}.weight"] = (weights[f"{name}.weight"] + layer.get_delta_weight("default")).cpu()
    model.save_pretrained(folder, state_dict=weights)
    if LORA_RANK:
        model.adapters.save_pretrained(folder / "adapters", save_embedding_layers=False)
        config = folder / "config.json"  # says in which type the weights are loaded
        config.write_text(config.read_text("utf-8").replace('"bfloat16"', '"float32"'), "utf-8")


def recomputed(forward):
    """A layer's forward that, while gradients are on, keeps only its input, and runs again in the backward pass."""
    again = functools.partial(checkpoint, forward, use_reentrant=False, preserve_rng_state=False)
    return lambda *args, **options: (again if torch.is_grad_enabled() else forward)(*args, **options)


def saved_model(path):
    """The model that a run saved last if `path` is the folder of a run, else `path`."""
    if not Path(path, "run.db").exists():
        return path
    found = [*Path(path).glob("step_*[0-9]"), *Path(path).glob("epoch_*[0-9]")]  # an epoch_ ends a run
    found.sort(key=lambda place: (place.name.startswith("epoch_"), int(place.name.rpartition("_")[2])))
    return str(found[-1]) if found else fail(f"MODEL={path}: the run in {path} has not saved a model yet")


def load_questions(sources, tokenizer):
    """The questions of all data sets in `sources`, a list in the form of TRAIN_DATASETS, without the overlong ones."""
    added = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    control, questions, left_out = added | set(tokenizer.all_special_tokens), [], Counter()
    for source in sources:
        for messages, answer, columns in load_rows(source):
            text, ids = read_prompt(tokenizer, messages)
            if not ids:
                fail(f"MODEL={MODEL} has a tokenizer or a chat template that makes no tokens of a question")
            written = str(messages)
            if any(token in written for token in control):
                left_out[f"hold text that is a control token, such as {tokenizer.eos_token}"] += 1
            elif len(ids) > MAX_PROMPT_LENGTH:
                left_out["are over MAX_PROMPT_LENGTH"] += 1
            else:
                asked = messages[-1]["content"], answer, source["path"], torch.tensor(ids)
                questions.append(Question(*asked, columns, prompt_end=text[-40:]))
    count = len(questions) + left_out.total()
    for reason, number in left_out.items():
        say(f"{number} of {count} questions {reason}: left out")
    return questions or fail(f"MAX_PROMPT_LENGTH={MAX_PROMPT_LENGTH}: none of {count} questions is that short")


def load_rows(source):
    """[(chat messages, answer, other columns), ...] of a data set, an entry of TRAIN_DATASETS, without rows that lack
    either, and without repeated questions: DAPO-Math-17k has each a hundred times."""
    found, number, row = {}, 0, {}
    with explained(f"{source} cannot be read; a data set has path, type (parquet, json, csv, hub), input, and output"):
        for number, row in enumerate(read_rows(**source), 1):
            messages, answer = chat_messages(value_at(row, source["input"])), value_at(row, source["output"])
            text = value_at(messages[-1], "content")
            if messages[-1]["role"] != "user" or {list, dict, bytes} & {type(text), type(answer)} or None in row:
                raise ValueError(f"a question has to end with the user's message, and an answer to be text: {row}")
            if text is not None and answer is not None:
                messages[-1]["content"] = str(text)
                left_out = row if REWARD is compute_score else (source["input"], source["output"])  # ours needs none
                others = {name: row[name] for name in row if name not in left_out}
                others |= others.pop("extra_info") if isinstance(others.get("extra_info"), dict) else {}  # as in verl
                found.setdefault(str(messages), (messages, str(answer), others))
    if not found:
        fail(f"{source} has {number} rows, and none with an input and an output; its columns: {', '.join(row)}")
    if len(found) < number:
        say(f"{number - len(found)} of {number} rows of {source['path']} repeat a question or are incomplete")
    return list(found.values())


def read_rows(path, type, input, output, split=None, name=None):
    """Yields the rows of a data set as dictionaries, with values as the file has them; `split` selects some of them."""
    if type == "hub" or split:
        import datasets
    if type == "hub":
        table = datasets.load_dataset(path, name, split=split or "train").with_format("arrow")[:]
        yield from arrow_rows(pyarrow.dataset.dataset(table), input, output)
        return
    if split:
        rows = list(read_rows(path, type, input, output))
        for part in datasets.ReadInstruction.from_spec(split).to_absolute({"train": len(rows)}):
            yield from rows[part.from_ : part.to]
        return
    for file in [path] if os.path.exists(path) else sorted(glob.glob(path)) or [path]:
        if type == "parquet":
            yield from arrow_rows(pyarrow.dataset.dataset(file), input, output)
            continue
        text, parse = Path(file).read_bytes().decode("utf-8-sig"), functools.partial(json.loads, parse_float=str)
        if type == "csv":
            yield from csv.DictReader(io.StringIO(text, newline=""), strict=True)
        elif text.lstrip().startswith("["):
            yield from parse(text)  # 2.50 stays 2.50
        else:
            yield from map(parse, filter(str.strip, text.split("\n")))


def arrow_rows(table, *paths):
    """Yields the rows of an Arrow data set. At `paths`, text may be bytes, and Python prints float32 0.1 as
    0.1000000015."""
    as_text = pyarrow.float32(), pyarrow.binary(), pyarrow.large_binary()
    names = table.schema.names
    fields = {path: pyarrow.dataset.field(path if path in names else tuple(path.split("."))) for path in paths}
    fields = {name: pyarrow.dataset.field(name) for name in names if REWARD is not compute_score} | fields
    for batch in table.to_batches(columns=fields):
        columns = dict(zip(fields, batch.columns))
        columns |= {path: columns[path].cast(pyarrow.string()) for path in paths if columns[path].type in as_text}
        yield from pyarrow.table(columns).to_pylist()


def value_at(row, name):
    """row["a.b"], else row["a"]["b"]; None if this row has no such value, or a blank one."""
    path = [name] if name in row else name.split(".")
    value = functools.reduce(lambda part, key: part.get(key) if isinstance(part, dict) else None, path, row)
    return None if value == [] or value != value or not str(value).strip() else value  # only NaN is not itself


def chat_messages(question):
    """A question as chat messages, which it may be already, also as JSON text."""
    if isinstance(question, str) and question.lstrip().startswith("[{"):
        with contextlib.suppress(ValueError):
            messages = json.loads(question)
            question = messages if "role" in messages[-1] else question
    return question if isinstance(question, list) else [{"role": "user", "content": question}]


def read_prompt(tokenizer, messages):
    """Chat messages → what the model reads, as text and as token ids: without a chat template, the last message."""
    if unknown := [key for key in CHAT_TEMPLATE_KWARGS if key not in re.findall(r"\w+", str(tokenizer.chat_template))]:
        fail(f"{CHAT_TEMPLATE_KWARGS=}: the chat template of MODEL={MODEL} has no switch {unknown[0]}")
    text = TEMPLATES.get(PROMPT_TEMPLATE, PROMPT_TEMPLATE).replace("{question}", messages[-1]["content"])
    with explained(f"MODEL={MODEL} has a chat template that refuses {messages}, with {CHAT_TEMPLATE_KWARGS=}"):
        if not tokenizer.chat_template:
            ids = tokenizer(text)["input_ids"]
            return text, ids[:-1] if ids[-1:] == [tokenizer.eos_token_id] else ids  # a prompt must not end the text
        asked = [*messages[:-1], messages[-1] | {"content": text}]
        text = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True, **CHAT_TEMPLATE_KWARGS)
        return text, tokenizer(text[: 1000 * MAX_PROMPT_LENGTH], add_special_tokens=False)["input_ids"]


TEMPLATES = {
    "boxed": "{question}\nPlease reason step by step, and put your final answer within \\boxed{}.",
    "answer": "{question}\nPlease reason step by step, and write your final answer in the last line, after 'Answer:'.",
}


def check(model, questions, held_out):
    """Refuses, before a run begins, what could not be trained."""
    if len(questions) < BATCH_SIZE:
        fail(f"BATCH_SIZE={BATCH_SIZE}: there are only {len(questions)} questions to train on")
    size, largest = model.config.get_text_config().vocab_size, max(q.prompt.max() for q in questions + held_out)
    if largest >= size:
        fail(f"MODEL={MODEL} has {size} tokens, and its tokenizer makes token {largest} of a question")
    with explained(f"MODEL={MODEL}: {type(model).__name__} cannot be trained here"):
        sampling_gap(model, [question.prompt for question in held_out], limit=2 * DECODE_STAGE)
    if model.device.type == "cuda" and arithmetic(model) is torch.float32:
        say("this GPU has no bf16 arithmetic of its own: we compute in fp32, which takes more time and memory")
    if shared := len({question.text for question in questions} & {question.text for question in held_out}):
        say(f"{shared} of {len(held_out)} questions of EVAL_DATASETS are also trained on")


@torch.no_grad()
def sampling_gap(model, prompts, limit=256):
    """|log-probability with which a token was sampled - log-probability that token_log_probs gives it|, for each of the
    N tokens of responses to the 4 shortest prompts, which have the most padding, and the 4 longest: (N,). Each response
    has at most `limit` tokens.

    Exact arithmetic would give 0. Where the gap is more than a rounding error, the model's cache or output layer works
    in a way that we do not know, and the model is refused."""
    set_seed("sampling gap")
    prompts = sorted(prompts, key=len)
    prompts, gaps, limit = prompts[:4] + prompts[-4:], [], min(limit, MAX_RESPONSE_LENGTH)
    if not token_log_probs(model, [prompt[:1] for prompt in prompts], prompts)[0].isfinite().all():
        fail(f"MODEL={MODEL}: its probabilities are not finite: {ADVICE}")
    drawn = [[] for _ in prompts]
    for prompt, tokens, log_probs in zip(prompts, sample_tokens(model, prompts, limit=limit, drawn=drawn), drawn):
        scored = token_log_probs(model, [prompt], [tokens])[0][0].cpu()
        gaps.append((scored - torch.tensor(log_probs[: len(tokens)])).abs())
    halves = torch.cat(gaps[: len(gaps) // 2]), torch.cat(gaps[len(gaps) // 2 :])
    largest = 0.01 if arithmetic(model) is torch.float32 else 0.5  # rounding makes far less
    if not all(TEMPERATURE * half.mean() < largest for half in halves):
        fail(f"MODEL={MODEL}: {type(model).__name__} cannot be trained here, its cache or head works in an unusual way")
    return torch.cat(halves)


def question_stream(questions, run):
    """Yields each question once per epoch, in an order that depends on SEED and the epoch, from where `run` stands."""
    while NUM_STEPS or run.drawn < NUM_EPOCHS * len(questions):
        epoch, drawn = divmod(run.drawn, len(questions))
        if drawn == 0 and (idle := min(question.rests for question in questions)):  # epochs in which all rest
            run.drawn += idle * len(questions)
            for question in questions:
                question.rests -= idle
            continue
        for question in random.Random(f"{SEED} epoch {epoch}").sample(questions, len(questions))[drawn:]:
            run.drawn += 1
            if question.rests:
                question.rests -= 1
            else:
                yield question


def judge(questions, texts):
    """REWARD's verdict on each response: the fields of a Response that it sets, or None if it gives none.

    REWARD returns {"score": number, "acc": number, "pred": text, and more numbers to be recorded}, of which all but the
    score may be missing; or the score alone, where more than 0 counts as right; or None, which leaves the response out
    of its group. As in verl, it may take lists, by parameters with names in the plural, and return a list."""
    columns = {"data_source": [question.source for question in questions], "solution_str": list(texts)}
    columns["ground_truth"] = [question.answer for question in questions]
    columns["extra_info"] = [q.columns | {"question": q.text, "prompt": q.prompt_end} for q in questions]
    verdicts = []
    try:
        if "solution_strs" in inspect.signature(REWARD).parameters:
            given = REWARD(**{f"{name}s": values for name, values in columns.items()})
        else:
            given = (REWARD(**dict(zip(columns, row))) for row in zip(*columns.values()))
        for verdict in given:
            verdicts.append(read_verdict(verdict))
        if len(verdicts) != len(texts):
            raise ValueError(f"{len(verdicts)} verdicts on {len(texts)} responses")
        if not any(verdicts):
            raise ValueError(f"no verdict on any of {len(texts)} responses")
    except Exception as error:
        number = min(len(verdicts), len(texts) - 1)
        about = f"the question {shorten(questions[number].text)!r} and the response {shorten(texts[number])!r}"
        function = f"{inspect.getfile(REWARD)}:{REWARD.__qualname__}"
        fail(f"REWARD={function} failed at {about}: {described(error)}", RewardFault)
    return verdicts


class RewardFault(SystemExit):
    """The reward function has failed. The model is then still as it was after the last step."""


# ---- The record of a run --------------------------------------------------------------------------------------------

COLUMNS = """step number group_number round question answer response prediction accuracy reward penalty advantage length
truncated kept fate tokens probabilities ratios""".split()  # the last three are JSON lists, of trained responses only
# With a write-ahead log, others can read while the run writes; emptied at once, it need not be copied. What is deleted
# was recorded after the checkpoint that the run resumes from.
TABLES = f"""
PRAGMA journal_mode = WAL;
PRAGMA wal_autocheckpoint = 1;
BEGIN;
CREATE TABLE IF NOT EXISTS metrics (step INTEGER, name TEXT, value REAL, PRIMARY KEY (step, name));
CREATE TABLE IF NOT EXISTS constants (step INTEGER, name TEXT, value TEXT, PRIMARY KEY (step, name));
CREATE TABLE IF NOT EXISTS responses ({", ".join(COLUMNS)}, PRIMARY KEY (step, number));
CREATE TABLE IF NOT EXISTS held_out ({", ".join(COLUMNS)}, PRIMARY KEY (step, number));
DELETE FROM metrics WHERE step > {{step}};
DELETE FROM responses WHERE step > {{step}};
DELETE FROM held_out WHERE step > {{step}};
COMMIT;
"""
# What may change when a run is resumed: its folder, device, and length, what is saved and how often, and its memory.
FREE = """OUTPUT_DIR RESUME DEVICE NUM_STEPS NUM_EPOCHS EVAL_EVERY SAVE_EVERY CHECKPOINT_EVERY GENERATION_BATCH
MICRO_BATCH_TOKENS LOGITS_CHUNK GRADIENT_CHECKPOINTING RECORDED_TOKENS""".split()
ADVICE = "lower LEARNING_RATE, or look for what is not finite in MODEL, the data, or the reward"


@contextlib.contextmanager
def open_run(model, tokenizer, optimizer, questions, held_out):
    """A Run in OUTPUT_DIR, begun, or resumed with the model, the optimizer, and the questions as they were."""
    run = Run(model, tokenizer, optimizer, questions, held_out)
    with FileLock(run.folder.with_name(f".{run.folder.name}.lock"), timeout=0), contextlib.ExitStack() as opened:
        run.resume()
        run.folder.mkdir(exist_ok=True)
        run.db = opened.enter_context(contextlib.closing(sqlite3.connect(run.folder / "run.db")))
        run.db.executescript(TABLES.format(step=run.step))
        for name in {*COLUMNS} - {column[1] for column in run.db.execute("PRAGMA table_info(responses)")}:
            run.db.execute(f"ALTER TABLE responses ADD COLUMN {name}")  # of a run that an earlier version began
        then = dict(run.db.execute("SELECT name, value FROM constants ORDER BY step"))
        new = [(run.step, name, value) for name, value in run.facts.items() if then.get(name) != value]
        with run.db:
            run.db.executemany("INSERT OR REPLACE INTO constants VALUES (?, ?, ?)", new)
        if then and new:
            say(f"changed since the last start, and recorded in run.db: {', '.join(name for _, name, _ in new)}")
        run.bar = opened.enter_context(tqdm(initial=run.step, total=NUM_STEPS, unit="step", disable=None))
        numbers = [signal.SIGINT, signal.SIGTERM]
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup ignores it
            numbers.append(signal.SIGHUP)
        for number in numbers:
            opened.callback(signal.signal, number, signal.signal(number, run.stop))
        try:
            yield run
        except RewardFault:
            run.save_checkpoint()
            raise


class Run:
    """The run in OUTPUT_DIR: run.db (its record), two checkpoints, training_metrics.png, and saved models.

    An interrupted run is resumed if all its constants but the FREE ones are the same; any other run in the folder is
    renamed. Ctrl-C, SIGTERM, or a lost terminal stops a run between two steps, and a second Ctrl-C at once."""

    def __init__(self, model, tokenizer, optimizer, questions, held_out):
        self.model, self.tokenizer, self.optimizer, self.questions = model, tokenizer, optimizer, questions
        self.folder, self.step, self.drawn = Path(OUTPUT_DIR).absolute(), 0, 0  # questions drawn from the stream
        self.checkpoints = [self.folder / name for name in ("checkpoint.pt", "checkpoint.previous.pt")]
        self.signal, self.start = None, time.time()
        self.script = Path(getattr(sys.modules["__main__"], "__file__", None) or __file__)  # dapo.py, grpo.py, ...
        files = {Path(__file__), Path(inspect.getfile(overlong_penalty)), Path(inspect.getfile(REWARD)), self.script}
        self.sources = {name_of(file): file.read_text(encoding="utf-8") for file in sorted(files) if file.is_file()}
        self.constants = {name: text_of(globals()[name]) for name in CONSTANTS} | {"the script": self.script.name}
        for name, asked in (("the questions' checksum", questions), ("the held-out questions' checksum", held_out)):
            text = str([(question.prompt.tolist(), question.answer, *question.columns.items()) for question in asked])
            self.constants[name] = str(zlib.crc32(text.encode()))
        some = torch.cat([weights.detach().flatten()[::101].cpu().float() for weights in model.parameters()])
        some = some.bfloat16().float() if LORA_RANK else some  # on another device, they may be of another type
        self.constants["MODEL's checksum"] = str(zlib.crc32(some.numpy().tobytes()))
        self.facts = self.constants | {f"source of {name}": text for name, text in self.sources.items()}  # for run.db
        self.facts |= {"python": sys.version, "torch": torch.__version__, "transformers": transformers.__version__}
        self.facts |= {"device": str(model.device), "arithmetic": str(arithmetic(model))}

    def resume(self):
        """Resumes the run in the folder if it is this one and has not finished. Renames any other."""
        path, recorded = next(filter(Path.exists, self.checkpoints), None), self.recorded_steps()
        reason = "it has no checkpoint"
        if recorded is None and not (path and RESUME):
            if others := sorted(self.folder.glob("[!.]*")):
                fail(f"OUTPUT_DIR={OUTPUT_DIR} contains {others[0].name} but no run: give this run a folder of its own")
            return
        if not RESUME:
            reason = "RESUME is False"
        elif path:
            with explained(f"{path} cannot be read; move it to resume from checkpoint.previous.pt, if there is one"):
                reason = self.restore(path)
            if not reason:
                say(f"resuming the run in {OUTPUT_DIR} after step {self.step}")
                if self.step > (recorded or 0):
                    say(f"{self.folder / 'run.db'} was lost, or is another run's: it lacks steps before that")
                return
        for place in (MODEL, *(source["path"] for source in TRAIN_DATASETS + EVAL_DATASETS)):
            if os.path.exists(place) and Path(place).resolve().is_relative_to(self.folder.resolve()):
                fail(f"{place} lies in OUTPUT_DIR={OUTPUT_DIR}: give this run a folder of its own")
        aside = next(name for n in itertools.count(1) if not os.path.exists(name := f"{OUTPUT_DIR}_{n}"))
        self.folder.rename(aside)
        say(f"{OUTPUT_DIR} held another run, renamed to {aside}: {reason}. To return to it, set what it had and "
            f"OUTPUT_DIR={aside}; to start from the model that it saved, set MODEL={aside}")  # fmt: skip

    def recorded_steps(self):
        """How many steps run.db records, 0 if it was just begun; None where it is not there, or another program's."""
        if not (self.folder / "run.db").exists():
            return None
        with contextlib.closing(sqlite3.connect(self.folder / "run.db")) as db:
            tables = {name for (name,) in db.execute("SELECT name FROM sqlite_master")}
            if {"metrics", "constants", "responses"} <= tables:
                return db.execute("SELECT max(step) FROM metrics").fetchone()[0] or 0
        return None if tables else 0

    def restore(self, path):
        """Puts everything back as it was at a checkpoint. Returns why not if it is another run's, or its run's end."""
        if damaged := zipfile.ZipFile(path).testzip():  # torch.load does not look at the checksums that it holds
            raise ValueError(f"{damaged} in it is damaged")
        state = torch.load(path, map_location="cpu", weights_only=True)  # runs no code that a file may hold
        then, now = state["constants"], self.constants
        changed = [name for name in now if name not in FREE and then.get(name, now[name]) != now[name]]
        if changed:
            return "; ".join(f"{name} was {then[name]}, is now {now[name]}" for name in changed)
        left = self.left(state["step"], state["drawn"])
        if state["finished"] and left <= 0:
            return "it has finished"
        if left < 0:
            fail(f"the run in OUTPUT_DIR={OUTPUT_DIR} is at step {state['step']}, past {NUM_STEPS=}, {NUM_EPOCHS=}")
        self.step, self.drawn = state["step"], state["drawn"]
        self.model.load_state_dict(state["model"], strict=not LORA_RANK)
        self.optimizer.load_state_dict(state["optimizer"])
        for weights, moments in self.optimizer.state.items():
            for moment in (moments["exp_avg"], moments["exp_avg_sq"]):
                if moment.shape != weights.shape or not moment.isfinite().all():
                    raise ValueError("the optimizer's moments do not fit the model, or are not finite")
        for question, rests in zip(self.questions, state["rests"]):
            question.rests = rests

    def left(self, step, drawn):
        """How many steps, or questions to draw, are left."""
        return NUM_STEPS - step if NUM_STEPS else NUM_EPOCHS * len(self.questions) - drawn

    def is_over(self):
        if self.latest("groups_trained", 3) == [0, 0, 0]:
            say("in 3 steps in a row, every group was all right or all wrong: nothing is left to learn from")
            return True
        return self.left(self.step, self.drawn) <= 0

    def latest(self, name, count):
        """The last `count` values of a metric."""
        query = "SELECT value FROM metrics WHERE name = ? ORDER BY step DESC LIMIT ?"
        return [value for (value,) in self.db.execute(query, [name, count])]

    def save_if_due(self, last=False):
        """Called between two steps: saves what is due, and ends the program if a signal has asked for that."""
        step, lost = self.step, self.recorded_steps() is None
        self.position = {"step": step, "drawn": self.drawn, "rests": [question.rests for question in self.questions]}
        if not torch.stack([weights.isfinite().all() for weights in self.model.parameters()]).all():  # asks a GPU once
            fail(f"after step {step} there are weights that are not finite: {ADVICE}")
        if self.folder.exists() and (last or self.signal or lost or step % CHECKPOINT_EVERY == 0):
            self.save_checkpoint()
        if lost:
            fail(f"OUTPUT_DIR={OUTPUT_DIR} or its run.db was moved or removed: the run stops after step {step}")
        if self.signal:
            say("stopped; the same command resumes the run")
            sys.exit(128 + self.signal)
        if SAVE_EVERY and step and step % SAVE_EVERY == 0 and not last:
            self.save_model(f"step_{step}")

    def save_checkpoint(self, finished=False):
        if any(self.latest("skipped_updates", 1)) and not finished:  # the last checkpoint is from before the trouble
            return
        trained = {name: w for name, w in self.model.state_dict().items() if not LORA_RANK or ".lora_" in name}
        state = {"model": trained, "optimizer": self.optimizer.state_dict(), "finished": finished}
        path, previous = self.checkpoints
        with complete(path) as unfinished:
            torch.save(state | self.position | {"constants": self.constants}, unfinished)
            if path.exists():
                path.replace(previous)

    def save_model(self, name):
        """In Hugging Face form, and beside it what made it: python train_script.py constants.py makes it again."""
        constants = "".join(f"{constant} = {self.constants[constant]}\n" for constant in CONSTANTS)
        files = self.sources | {"train_script.py": self.sources[name_of(self.script)], "constants.py": constants}
        place = self.folder / name
        if place.exists() and not (place / "train_script.py").exists():
            fail(f"{place} is not this run's: move it; the same command then resumes the run, and saves its model")
        with complete(place) as unfinished:
            save_weights(self.model, unfinished)
            for weights in unfinished.rglob("*.safetensors"):  # its library lets only their owner read them
                shutil.copymode(unfinished / "config.json", weights)
            self.tokenizer.save_pretrained(unfinished)
            self.model.own_generation_config.to_json_file(unfinished / "generation_config.json")
            for file, text in files.items():
                (unfinished / file).write_text(text, encoding="utf-8")
        say(f"the model is saved in {OUTPUT_DIR}/{name}")

    def record(self, metrics, groups):
        """Records one step, or one evaluation, in run.db and on the screen."""
        step, evaluation = self.step, "eval/accuracy" in metrics
        rows = [(step, number, *row) for number, row in enumerate(response_rows(groups, self.tokenizer))]
        table = f"{'held_out' if evaluation else 'responses'} ({', '.join(COLUMNS)})"
        measured = [(step, *item) for item in metrics.items()]
        with self.db:  # all or nothing
            self.db.executemany("INSERT OR REPLACE INTO metrics VALUES (?, ?, ?)", measured)
            self.db.executemany(f"INSERT OR REPLACE INTO {table} VALUES ({', '.join('?' * len(COLUMNS))})", rows)
        shown = "  ".join(f"{name} {metrics[name]:.2f}" for name in SHOWN if name in metrics)
        self.bar.set_postfix_str(shown, refresh=False)
        self.bar.update(step - self.bar.n)
        if evaluation or self.bar.disable and step % 5 == 0:  # without a terminal there is no bar
            say(f"step {step}: {shown}  ({time.time() - self.start:.0f} s)")
        if evaluation:
            draw_metrics(self.folder)
            return
        if step == 1:
            diagnose(metrics, groups)
            steps, seconds = self.left(1, self.drawn) / (1 if NUM_STEPS else self.drawn), metrics["time/step"]
            left = steps * seconds + (steps // EVAL_EVERY + 1) * (time.time() - self.start - seconds)
            say(f"step 1 took {seconds:.0f} s: about {tqdm.format_interval(left)} to the end, evaluations included")
        if metrics["groups_trained"] < BATCH_SIZE:
            say(f"step {step}: trains on {metrics['groups_trained']} groups instead of {BATCH_SIZE}")
        if metrics.get("skipped_updates"):
            say(f"step {step}: {metrics['skipped_updates']} updates were skipped, their gradients are not finite")
            if sum(map(bool, self.latest("skipped_updates", 3))) == 3:
                fail(f"3 steps in a row had gradients that are not finite: {ADVICE}")

    def finish(self):
        self.save_model(f"step_{self.step}" if NUM_STEPS else f"epoch_{NUM_EPOCHS}")
        self.save_checkpoint(finished=True)

    def stop(self, number, frame):
        """What Ctrl-C, SIGTERM, and SIGHUP do."""
        self.signal = number
        for again in (signal.SIGINT, signal.SIGTERM):
            signal.signal(again, signal.SIG_DFL)
        with contextlib.suppress(OSError):  # the terminal may be lost
            os.write(2, b"\nstopping after this step; press again to stop at once, without a checkpoint\n")


def response_rows(groups, tokenizer):
    """Yields what run.db keeps of each response, in the order of COLUMNS from group_number on."""
    left = RECORDED_TOKENS
    for number, group in enumerate(groups):
        for r in group:
            said = r.question.text, r.question.answer, r.text, None if r.prediction is None else str(r.prediction)
            judged = r.accuracy, r.reward, r.penalty, r.advantage, len(r.tokens), r.truncated, r.advantage is not None
            tokens = [None] * 3
            if r.log_probs is not None and (left := left - len(r.tokens)) >= 0:
                numbers = r.old_log_probs.exp(), (r.log_probs - r.old_log_probs).clamp(-20, 20).exp()
                numbers = [[float(f"{x:.4g}") if x == x else None for x in values.tolist()] for values in numbers]
                tokens = [json.dumps(values) for values in (tokenizer.batch_decode(r.tokens[:, None]), *numbers)]
            yield number, r.round, *said, *judged, r.fate, *tokens


@contextlib.contextmanager
def complete(path):
    """Gives another path to write a file or folder to, and renames it to `path` only when all of it is on the disk."""
    unfinished, replaced = (path.with_name(f"{path.name}.{state}") for state in ("unfinished", "replaced"))
    remove(unfinished)
    remove(replaced)
    try:
        yield unfinished
        sync(*unfinished.rglob("*"), unfinished)
        if path.is_dir():  # which nothing can replace at once
            path.rename(replaced)
        unfinished.replace(path)
        sync(path.parent)
    except Exception as error:  # torch, safetensors, and tokenizers each raise their own when a disk is full
        raise OSError(f"{path}: {error}") from error
    finally:
        remove(unfinished)
        remove(replaced)


def sync(*places):
    for place in places if os.name == "posix" else ():  # Windows opens no folders
        file = os.open(place, os.O_RDONLY)
        os.fsync(file)
        os.close(file)


def remove(path):
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


# ---- Metrics --------------------------------------------------------------------------------------------------------

SHOWN = "eval/accuracy accuracy reward/mean response_length/mean entropy".split()


def evaluate(model, tokenizer, questions):
    """Metrics on held-out questions, of one greedy response each and, with EVAL_SAMPLES = k > 1, avg@k; and the greedy
    responses, in groups of one."""
    gaps = sampling_gap(model, [question.prompt for question in questions])
    set_seed("evaluation")
    greedy = list(itertools.chain(*sample_groups(model, tokenizer, questions, 1, greedy=True)))
    metrics = {
        "eval/questions": len(greedy),
        "eval/accuracy": statistics.fmean(response.accuracy for response in greedy),
        "eval/response_length": statistics.fmean(len(response.tokens) for response in greedy),
        "eval/truncated_fraction": statistics.fmean(response.truncated for response in greedy),
    }
    if EVAL_SAMPLES > 1:
        sampled = itertools.chain(*sample_groups(model, tokenizer, questions, EVAL_SAMPLES))
        metrics[f"eval/avg@{EVAL_SAMPLES}"] = statistics.fmean(response.accuracy for response in sampled)
    shown = sorted(greedy, key=lambda response: len(response.question.prompt))[-1]  # to the longest question
    say(f"  {shorten(shown.question.text)}\n    -> {shorten(shown.text)}  ({'right' if shown.accuracy else 'wrong'})")
    metrics |= {"sampling_gap/mean": gaps.mean().item(), "sampling_gap/max": gaps.max().item()}
    return metrics, [[response] for response in greedy]


def sampling_metrics(sampled, kept, batch, rounds, seconds):
    """What the policy did in one step, over all groups sampled, before any were dropped."""
    responses = list(itertools.chain(*sampled))
    lengths = [len(response.tokens) for response in responses]
    right = [statistics.fmean(response.accuracy for response in group) for group in sampled]
    differ = [any(response.advantage for response in group) for group in batch]
    metrics = {
        "reward/mean": statistics.fmean(response.reward for response in responses),
        "reward/timeouts": len(given_up),
        "accuracy": statistics.fmean(right),
        "response_length/mean": statistics.fmean(lengths),
        "response_length/max": max(lengths),
        "truncated_fraction": statistics.fmean(response.truncated for response in responses),
        "groups/all_correct": right.count(1) / len(right),
        "groups/all_wrong": right.count(0) / len(right),
        "groups_trained": len(batch),
        "groups/with_gradient": differ.count(True) / max(1, len(batch)),
        "dynamic_resample_rate": 1 - len(kept) / len(sampled),
        "generation_batches": rounds,
        "time/generate": seconds,
        "tokens_per_second": sum(lengths) / seconds,
    }
    given_up.clear()
    for name in sorted({name for response in responses for name in response.others}):
        values = [response.others[name] for response in responses if name in response.others]
        metrics.setdefault(f"reward/{name}", statistics.fmean(values))
    return metrics


def clipped_tokens(log_probs, old_log_probs, advantages, mask):
    """Two (B, T) masks: the tokens without a gradient, clipped at the lower bound and at the upper."""
    ratio, advantages = probability_ratio(log_probs, old_log_probs, mask), advantages[:, None]
    return (advantages < 0) & (ratio < 1 - CLIP_RANGE_LOW), (advantages > 0) & (ratio > 1 + CLIP_RANGE_HIGH)


def diagnose(metrics, groups):
    """Says after the first step what, if anything, keeps the policy from learning."""
    predictions = [response.prediction for response in itertools.chain(*groups)]
    unread = predictions.count("") / len(predictions)
    for share, meaning in (
        (metrics["truncated_fraction"], f"of responses were cut off: raise MAX_RESPONSE_LENGTH={MAX_RESPONSE_LENGTH}"),
        (unread, f"of responses hold no answer that REWARD reads: see PROMPT_TEMPLATE={PROMPT_TEMPLATE!r}"),
        (metrics["groups/all_wrong"], "of groups were all wrong: take easier questions or a better MODEL"),
        (metrics["groups/all_correct"], "of groups were all right: take harder questions"),
    ):
        if share > 0.8:
            return say(f"step 1: {share:.0%} {meaning}")


def peak_memory():
    """In GiB: of the GPU if there is one, else of the process."""
    if on_gpu := torch.cuda.max_memory_allocated():
        return on_gpu / 2**30
    with contextlib.suppress(ImportError):  # Windows has no such module
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** (30 if sys.platform == "darwin" else 20)


def draw_metrics(folder):
    """Draws training_metrics.png from the run.db in a folder."""
    with contextlib.closing(sqlite3.connect(Path(folder) / "run.db")) as db:
        rows = db.execute("SELECT name, step, value FROM metrics WHERE value NOTNULL ORDER BY name, step").fetchall()
    curves = {name: [*zip(*points)][1:] for name, points in itertools.groupby(rows, lambda row: row[0])}
    with complete(Path(folder) / "training_metrics.png") as unfinished:
        metrics_figure(curves).savefig(unfinished, format="png", dpi=160)


# ---- The picture; tools/plot.py runs this section alone, without torch ----------------------------------------------

COLORS = "#0072B2 #D55E00 #009E73 #CC79A7 #E69F00 #56B4E9 #000000".split()  # Okabe and Ito's, for the color-blind, too
LOOKS = {"color": COLORS[:4], "linestyle": ["-", "--", ":", "-."], "marker": ["D", "o", "s", "^"]}
PANELS = {  # title: limits of its axis (None: as the data), metrics and their labels; the first four panels are large
    "accuracy": (0, 1, "accuracy training; eval/accuracy held-out, greedy; eval/avg@* held-out, *"),
    "response length (tokens)": (0, None, "response_length/mean training; eval/response_length held-out, greedy"),
    "groups": (0, 1, "groups/all_correct all right; groups/all_wrong all wrong; groups/with_gradient with a gradient"),
    "entropy (nats per token)": (0, None, "entropy"),
    "reward": (None, None, "reward/mean mean; reward/* *"),
    "losses": (None, None, "policy_loss policy loss; entropy_loss entropy loss"),
    "dropped groups": (0, 1, "dynamic_resample_rate"),
    "truncated responses": (0, 1, "truncated_fraction training; eval/truncated_fraction held-out, greedy"),
    "tokens held by the clip": (0, None, "clip_fraction/low from falling; clip_fraction/high from rising"),
    "gradient norm": (0, None, "grad_norm"),
    "time (seconds)": (0, None, "time/step step; time/generate sampling; time/update update"),
    "KL (nats per token)": (0, None, "kl"),
}


def metrics_figure(curves):
    """The picture of one run, from {metric: (steps, values)}. Bars at held-out points: one standard error, at most."""
    from matplotlib.figure import Figure

    panels, count = {}, curves.get("eval/questions", [(), [math.inf]])[1][0]
    for title, (*_, metrics) in PANELS.items():
        for pattern, _, label in (metric.partition(" ") for metric in metrics.split("; ")):
            for name in fnmatch.filter(sorted(curves.keys() - {"reward/timeouts"}), pattern):
                own = name.partition("/")[2].replace("$", r"\$").lstrip("_")  # labels that begin with _ are hidden
                panels.setdefault(title, {})[name] = label.replace("*", own)
    cells = [title for title in [*panels][:4] for _ in range(2)] + [*panels][4:] + ["."] * 3
    rows = [cells[first : first + 4] for first in range(0, len(cells) - 3, 4)]
    figure = Figure(figsize=(12, 2 + 2 * len(rows)), layout="constrained")
    for title, axes in figure.subplot_mosaic(rows, height_ratios=[3, 3, 2, 2][: len(rows)]).items():
        axes.set_prop_cycle(**LOOKS)
        for name, label in panels[title].items():
            bars = [math.sqrt(max(0, p * (1 - p)) / count) for p in curves[name][1]]
            style = {"linestyle": "none", "yerr": bars, "ms": 4} if name.startswith("eval/") else {"ms": 2}
            axes.errorbar(*curves[name], label=label, clip_on=False, **style)
        if label:
            axes.legend(fontsize="small", handlelength=1.5)
        frame(axes, title, *PANELS[title][:2], curves.get("eval/accuracy", curves[name])[0])
    return figure


def frame(axes, title, lowest, highest, steps):
    """Title, limits, a line at 0, and ticks at `steps`, thinned out if they are many."""
    every = steps[1] - steps[0] if len(steps) > 1 else 1
    gap = next(10**n * unit for n in range(9) for unit in (1, 2, 5) if 8 * 10**n * unit * every >= steps[-1]) * every
    ticks = [step for step in steps if (step - steps[0]) % gap == 0]
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set(title=title, xlabel="step", xticks=ticks, ylim=(lowest, highest))
    axes.grid(alpha=0.3)


# ---- The command line -----------------------------------------------------------------------------------------------

MAY_BE_0 = """SEED SAVE_EVERY RECORDED_TOKENS REST_EPOCHS OVERLONG_PENALTY_FACTOR KL_COEF ENTROPY_COEF WARMUP_STEPS
WEIGHT_DECAY LORA_RANK""".split()
RULES = {name: f"0 < {name} < math.inf" for name, value in CONSTANTS.items() if type(value) in (int, float)}
RULES |= {name: f"0 <= {name} < math.inf" for name in MAY_BE_0} | {
    "TRAIN_DATASETS": "len(TRAIN_DATASETS) >= 1",
    "EVAL_DATASETS": "len(EVAL_DATASETS) >= 1",
    "NUM_STEPS": "NUM_STEPS is None or NUM_STEPS >= 1",
    "GROUP_SIZE": "GROUP_SIZE >= 2",
    "MINI_BATCHES": "1 <= MINI_BATCHES <= BATCH_SIZE * GROUP_SIZE",
    "CLIP_RANGE_LOW": "0 < CLIP_RANGE_LOW <= 1",
    "CLIP_RANGE_HIGH": "0 < CLIP_RANGE_HIGH <= 10",
    "OVERLONG_BUFFER_LENGTH": "0 <= OVERLONG_BUFFER_LENGTH <= MAX_RESPONSE_LENGTH",
    "LOSS_AGG_MODE": "LOSS_AGG_MODE in ('token-mean', 'seq-mean-token-sum', 'seq-mean-token-mean')",
    "PROMPT_TEMPLATE": "PROMPT_TEMPLATE in ('boxed', 'answer') or '{question}' in PROMPT_TEMPLATE",
    "OUTPUT_DIR": "OUTPUT_DIR.strip() and not OUTPUT_DIR.startswith('~')",
    "DEVICE": "DEVICE in ('', 'cpu', str(torch.accelerator.current_accelerator(check_available=True) or 'cpu'))",
}


def main(argv=None):
    """python dapo.py [recipe.py] [--NAME=VALUE ...]"""
    try:
        for word in read_command_line(argv):
            fail(f"{word!r} is neither a recipe, such as recipes/gsm8k.py, nor --NAME=VALUE; try python -m tools.NAME")
        with contextlib.redirect_stdout(Display(sys.stdout)), contextlib.redirect_stderr(Display(sys.stderr)):
            train()
    except KeyboardInterrupt:
        sys.exit(130)
    except (MemoryError, RuntimeError) as error:
        sampling = "sample_tokens" in [frame.name for frame in traceback.extract_tb(error.__traceback__)]
        if sampling and ("probability tensor" in str(error) or "device-side assert" in str(error)):  # CPU, CUDA
            fail(f"no token can be sampled any more, the policy's probabilities are not finite: {ADVICE}")
        if not is_out_of_memory(error):
            raise
        name = "GENERATION_BATCH" if sampling else "MICRO_BATCH_TOKENS"
        fail(f"out of memory: lower {name}, which is {globals()[name]}; the same command then resumes the run")
    except Timeout:
        fail(f"another process is training in OUTPUT_DIR={OUTPUT_DIR}, or nothing can be written there")
    except (OSError, sqlite3.DatabaseError) as error:
        fail(f"OUTPUT_DIR={OUTPUT_DIR} cannot be read or written: {error}")


def read_command_line(argv=None):
    """Sets constants, first from recipes and then from --NAME=VALUE, and checks them. Returns the other words."""
    words, settings = sys.argv[1:] if argv is None else argv, {}
    if {"-h", "--help"} & set(words):
        constants = Path(__file__).read_text(encoding="utf-8").split("# ---- ")[1].partition("\nCONSTANTS")[0]
        set_here = [f"{name} = {text_of(globals()[name])}" for name in CONSTANTS if globals()[name] != CONSTANTS[name]]
        print(__doc__, constants, *(["# Set by this script", *set_here] if set_here else []), sep="\n")
        sys.exit()
    options = [word for word in words if word.startswith("-")]
    recipes = [word for word in words if word.endswith(".py") and word not in options]
    for recipe in recipes:
        with explained(f"the recipe {recipe} cannot be run"):
            settings |= {name: as_literal(value) for name, value in run_file(recipe).items() if name.isupper()}
    for option in options:
        name, _, settings[name] = option.lstrip("-").partition("=")
        if not isinstance(CONSTANTS.get(name), str):
            with contextlib.suppress(Exception):  # of which type it has to be is checked below
                settings[name] = ast.literal_eval(settings[name])
    for name, value in settings.items():
        set_constant(name, value)
    for name, rule in RULES.items():
        if not eval(rule):
            fail(f"{name}={globals()[name]} is out of range: it must satisfy {rule}")
    return [word for word in words if word not in options + recipes]


def run_file(path):
    """The names that a Python file defines, which may import its neighbors."""
    sys.path.append(os.path.dirname(os.path.abspath(path)))
    return runpy.run_path(path)


def as_literal(value):
    """A recipe's value, with its paths as text and its NumPy numbers as Python's."""
    if callable(value):
        return value
    return json.loads(json.dumps(value, default=lambda part: part.item() if hasattr(part, "item") else os.fspath(part)))


def set_constant(name, value):
    if name not in CONSTANTS:
        close = difflib.get_close_matches(name.upper(), CONSTANTS, 1)
        fail(f"there is no constant {name}; " + (f"did you mean {close[0]}?" if close else "--help lists them all"))
    if name == "REWARD" and isinstance(value, str):
        path, _, function = value.rpartition(":")
        with explained(f"REWARD={value} is not a file.py:function"):
            value = run_file(path)[function]
    kind, example = type(CONSTANTS[name]), text_of(CONSTANTS[name])
    value = float(value) if kind is float and type(value) is int else value
    if type(value) is not kind and (name, value) != ("NUM_STEPS", None):
        fail(f"{name}={value} does not fit: it has to be of type {kind.__name__}, such as {example}")
    globals()[name] = value


def text_of(value):
    """A constant as Python text, which a recipe can set."""
    return repr(f"{name_of(Path(inspect.getfile(value)))}:{value.__qualname__}" if callable(value) else value)


def name_of(file):
    """What a source file is called where its text is kept: a reward.py of one's own must not displace ours."""
    beside = file.resolve().parent == Path(__file__).resolve().parent
    return file.name if beside or file.name not in ("dapo.py", "reward.py") else f"my_{file.name}"


@contextlib.contextmanager
def explained(what):
    """Turns whatever a library or a user's file raises into one line that begins with `what`."""
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error):
            raise
        fail(f"{what}: {described(error)}")


# Messages of errors that are not an OutOfMemoryError: from the CPU (Linux, Windows), CUDA, its libraries, and MPS.
OUT_OF_MEMORY = """can't allocate memory|not enough memory|CUDA error: out of memory|_STATUS_ALLOC_FAILED|\
backend out of memory""".split("|")


def is_out_of_memory(error):
    named = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return named or isinstance(error, RuntimeError) and any(words in str(error) for words in OUT_OF_MEMORY)


def described(error):
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {shorten(str(error), 400)} ({place.filename}, line {place.lineno})"


def fail(message, kind=SystemExit):
    """Ends the program for a reason that its user can mend: one line, exit status 2."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        tqdm.write(f"error: {shorten(message, 4000)}", file=sys.stderr)
    raise kind(2)


say = tqdm.write


class Display(ObjectWrapper):
    """A stream whose failures do not end the training: its reader may have gone, its disk be full, or it is closed."""

    def attempt(self, name, *parts):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            return getattr(self._wrapped, name)(*parts)

    write = functools.partialmethod(attempt, "write")
    flush = functools.partialmethod(attempt, "flush")
    isatty = functools.partialmethod(attempt, "isatty")


def shorten(text, length=240):
    """Text of models and data on one line, without control characters, which could do anything to a terminal."""
    text = " ".join("".join(sign if sign.isprintable() else " " for sign in text).split())
    return text if len(text) <= length else f"{text[: length - 4]} ..."


if __name__ == "__main__":
    main()

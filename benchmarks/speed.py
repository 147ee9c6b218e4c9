"""dapo.py and TRL's GRPOTrainer on the same work, in turn, and the least that the work could take.

    pip install trl==1.16.0   # in an environment of its own, as requirements.txt lacks it; without, TRL is left out
    python benchmarks/speed.py [--rounds 3] [--device cuda]
    python benchmarks/speed.py --scaling   # needs no TRL

The same work: toy/'s questions, 32 of them a step with 8 responses each of up to 96 tokens, 4 mini-batches a step, the
rewards and loss of DAPO, no dynamic sampling (which TRL has not), and a learning rate of 1e-12, so that both see the
same policy all the time. Two policies are measured: the one in toy/, which mostly states an answer in a few tokens but
three times in ten keeps writing, often until it is cut off, and the one that dapo.py makes of it in 14 steps, which
works problems out. TRL samples with a plain call of transformers' generate, its gradient checkpointing, on by default,
is off, and it gets as many responses at a time as MICRO_BATCH_TOKENS hold at full length. Models are not saved here.

The floor is what is left if everything but the model is taken away: for each position a forward pass with as many
responses as have not ended, and a forward and backward pass over the real tokens, packed without padding.

Before that, both train for real, with dapo.py's own constants, three passes over each batch and 48 optimizer steps
among them, until 0.9 of the held-out questions are answered right. That is tried greedily after each step, and its time
not counted. dapo.py has 14 steps for it, TRL 30.

With --device cuda the model has random weights, Qwen2.5-0.5B's shape and an end token that is likely enough to spread
lengths from 1 to 512 tokens; there are 64 questions of 8 responses a step, and no training for real.

--scaling measures steps of dapo.py with more and with longer responses, and the most memory that an update takes, on
the CPU.
"""

import argparse
import contextlib
import importlib.util
import json
import math
import os
import random
import sqlite3
import statistics
import subprocess
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
os.environ["HF_HUB_OFFLINE"] = "1"

import dapo  # noqa: E402, I001  (first: pyarrow has to come before torch on Windows)
import torch  # noqa: E402
import transformers  # noqa: E402

from tools import memory  # noqa: E402
from tools.curves import read_metrics  # noqa: E402

SIZES = {"cpu": dict(BATCH_SIZE=32, MAX_RESPONSE_LENGTH=96), "cuda": dict(BATCH_SIZE=64, MAX_RESPONSE_LENGTH=512)}
QWEN = dict(hidden_size=896, intermediate_size=4864, num_attention_heads=14, num_key_value_heads=2, vocab_size=151_936)
SAME_WORK = dict(
    GROUP_SIZE=8, MINI_BATCHES=4, DAPO_EPOCHS=1, USE_DYNAMIC_SAMPLING=False, LEARNING_RATE=1e-12, NUM_STEPS=6
)  # the first step is not counted
RECORDED = """time/step time/generate time/update tokens_per_second response_length/mean generation_batches
memory/peak_gib sampling_gap/mean sampling_gap/max first_ratio_gap""".split()
GOAL = 0.9
SECONDS = defaultdict(list)


def timed(module, name, part):
    """Puts the seconds that each call of a function takes into SECONDS[part]."""
    function = getattr(module, name)

    def wrapper(*args, **options):
        start = now()
        result = function(*args, **options)
        SECONDS[part].append(now() - start)
        return result

    setattr(module, name, wrapper)


def now():
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


# ---- One measurement, in a process of its own -----------------------------------------------------------------------


def median(values):
    """Without the first, which warms up."""
    return statistics.median(values[1:])


def split(step, sampling, scoring, rate):
    update = step - sampling - scoring
    return dict(step=step, sampling=sampling, scoring=scoring, update=update, rate=rate, gib=dapo.peak_memory())


def ours(model, out, settings, goal=None):
    """Runs dapo.py itself, and reads what it recorded."""
    timed(dapo, "store_log_probs", "scoring")
    arguments = [f"--{name}={value}" for name, value in settings.items()]
    every = 1 if goal else 10**9
    if not goal:
        dapo.Run.save_checkpoint = dapo.Run.save_model = lambda *others, **options: None
    dapo.main([f"--MODEL={model}", f"--OUTPUT_DIR={out}", f"--EVAL_EVERY={every}", "--RESUME=False", *arguments])
    curves = {name: dict(zip(*curve)) for name, curve in read_metrics(out).items()}
    sampling, updates = curves["time/generate"], curves["time/update"]
    if goal:
        reached = next((step for step, value in curves["eval/accuracy"].items() if value >= goal and step), None)
        last = reached or max(sampling)
        return {"steps": reached, "seconds": sum(sampling[n] + updates[n] for n in sampling if n <= last)}
    tokens, responses = curves["response_length/mean"], dapo.BATCH_SIZE * dapo.GROUP_SIZE
    step = median([sampling[n] + updates[n] for n in sampling])
    rate = median([tokens[n] * responses / sampling[n] for n in sampling])
    return split(step, median([*sampling.values()]), median(SECONDS["scoring"]), rate)


def trl(model, out, settings, goal=None):
    import datasets
    from trl import GRPOConfig, GRPOTrainer

    vars(dapo).update(settings)
    cuda = torch.cuda.is_available()

    def score(completions, completion_ids, answer, **columns):
        verdicts = dapo.judge([dapo.Question("", truth, "", None) for truth in answer], completions)
        shape = dapo.MAX_RESPONSE_LENGTH, dapo.OVERLONG_BUFFER_LENGTH, dapo.OVERLONG_PENALTY_FACTOR
        clock["tokens"].append(sum(map(len, completion_ids)))
        penalties = [dapo.overlong_penalty(len(ids), *shape) for ids in completion_ids]
        return [verdict["reward"] + penalty for verdict, penalty in zip(verdicts, penalties)]

    policy, tokenizer = dapo.load_model(model)
    questions, held_out = (dapo.load_questions(data, tokenizer) for data in (dapo.TRAIN_DATASETS, dapo.EVAL_DATASETS))
    responses, parts, passes = dapo.BATCH_SIZE * dapo.GROUP_SIZE, dapo.MINI_BATCHES, dapo.DAPO_EPOCHS
    longest = max(len(question.prompt) for question in questions) + dapo.MAX_RESPONSE_LENGTH
    rows = min(responses // parts, 2 ** int(math.log2(dapo.MICRO_BATCH_TOKENS / longest)))  # in one pass
    config = GRPOConfig(
        output_dir=str(out), per_device_train_batch_size=rows, steps_per_generation=responses // rows,
        gradient_accumulation_steps=responses // parts // rows, num_generations=dapo.GROUP_SIZE,
        max_completion_length=dapo.MAX_RESPONSE_LENGTH, num_iterations=passes,
        max_steps=dapo.NUM_STEPS * parts * passes, learning_rate=dapo.LEARNING_RATE,
        lr_scheduler_type="constant_with_warmup", warmup_steps=dapo.WARMUP_STEPS * parts * passes,
        weight_decay=dapo.WEIGHT_DECAY, max_grad_norm=dapo.MAX_GRAD_NORM,
        loss_type="dapo", epsilon=dapo.CLIP_RANGE_LOW, epsilon_high=dapo.CLIP_RANGE_HIGH, beta=0.0, temperature=1.0,
        top_p=1.0, top_k=0, seed=dapo.SEED, bf16=cuda, use_cpu=not cuda, gradient_checkpointing=False,
        report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    data = [{"prompt": tokenizer.decode(q.prompt), "answer": q.answer} for q in questions]  # TRL tokenizes them again
    assert all(tokenizer(row["prompt"])["input_ids"] == q.prompt.tolist() for row, q in zip(data, questions))
    clock = {"start": None, "times": [], "tokens": [], "reached": None}

    class Clock(transformers.TrainerCallback):
        def on_step_begin(self, args, state, control, **others):
            clock["start"] = clock["start"] or now()

        def on_step_end(self, args, state, control, **others):
            if state.global_step % (parts * passes) == 0:
                clock["times"].append(now() - clock["start"])
                if goal:
                    groups = dapo.sample_groups(policy, tokenizer, held_out, 1, greedy=True)
                    if sum(group[0].accuracy for group in groups) >= goal * len(groups):
                        clock["reached"], control.should_training_stop = len(clock["times"]), True
                clock["start"] = None

    trainer = GRPOTrainer(
        policy,
        score,
        config,
        train_dataset=datasets.Dataset.from_list(data),
        processing_class=tokenizer,
        callbacks=[Clock()],
    )
    timed(trainer, "_generate", "sampling")
    timed(trainer, "_generate_and_score_completions", "sampling and scoring")
    trainer.train()
    if goal:
        return {"steps": clock["reached"], "seconds": sum(clock["times"])}
    sampling, both = SECONDS["sampling"], SECONDS["sampling and scoring"]
    scoring = median([two - one for one, two in zip(sampling, both)])
    rate = median([count / seconds for count, seconds in zip(clock["tokens"], sampling)])
    return split(median(clock["times"]), median(sampling), scoring, rate)


def floor(model, out, settings):
    """Only the model, on the responses of one step."""
    vars(dapo).update(settings)
    policy, tokenizer = dapo.load_model(model)
    questions = dapo.load_questions(dapo.TRAIN_DATASETS, tokenizer)[: dapo.BATCH_SIZE]
    torch.manual_seed(0)
    responses = dapo.sample_tokens(policy, [question.prompt for question in questions], dapo.GROUP_SIZE)
    optimizer, times = torch.optim.AdamW(policy.parameters(), 1e-12), Counter()
    for _ in range(3):
        start = now()
        decode(policy, questions, sorted(map(len, responses)))
        times["sampling"] += now() - start
        start = now()
        learn(policy, optimizer, [question.prompt for question in questions for _ in range(dapo.GROUP_SIZE)], responses)
        times["update"] += now() - start
    sampling, update = times["sampling"] / 3, times["update"] / 3
    rate = sum(map(len, responses)) / sampling
    return split(sampling + update, sampling, 0.0, rate)


@torch.no_grad()
def decode(policy, questions, lengths):
    """A forward pass over the prompts, then for each position one with as many rows as have not ended."""
    width = sum(len(question.prompt) for question in questions) // len(questions)
    with dapo.autocast(policy):
        ids = torch.ones(len(questions), width, dtype=torch.long, device=policy.device)
        cache = dapo.new_cache(policy)
        policy.base_model(ids, cache=cache)
        cache.reorder_cache(torch.arange(len(questions), device=policy.device).repeat_interleave(dapo.GROUP_SIZE))
        token = torch.ones(len(lengths), 1, dtype=torch.long, device=policy.device)
        for step in range(max(lengths)):
            live = sum(length > step for length in lengths)
            if live < len(token):
                cache.reorder_cache(torch.arange(live, device=policy.device))
            token = policy(token[:live], cache=cache).logits.argmax(-1)


def learn(policy, optimizer, prompts, responses):
    """Forward and backward passes over as many tokens as there really are, and as many logits, in MINI_BATCHES."""
    size = len(responses) // dapo.MINI_BATCHES
    for first in range(0, len(responses), size):
        count = sum(len(ids) for ids in responses[first : first + size])
        total = count + sum(len(ids) for ids in prompts[first : first + size])
        width = total // size
        for rows in torch.ones(size, width, dtype=torch.long, device=policy.device).split(
            max(1, dapo.MICRO_BATCH_TOKENS // width)
        ):
            with dapo.autocast(policy):
                hidden = policy.base_model(rows, use_cache=False).last_hidden_state.flatten(0, 1)
                logits = policy.lm_head(hidden[: max(1, count * len(rows) // size)])
            torch.nn.functional.cross_entropy(
                logits.float(), torch.ones_like(logits[:, 0], dtype=torch.long)
            ).backward()
        optimizer.step()
        optimizer.zero_grad()


def step(model, out, settings, length):
    """One step of dapo.py with responses that all have `length` tokens; the most GiB that its update takes."""
    vars(dapo).update(settings)
    policy, tokenizer = dapo.load_model(model)
    policy.generation_config.eos_token_id = [-1]
    dapo.MAX_RESPONSE_LENGTH = length
    questions = dapo.load_questions(dapo.TRAIN_DATASETS, tokenizer)[: dapo.BATCH_SIZE]
    optimizer, seconds, before = torch.optim.AdamW(policy.parameters(), fused=True), [], memory_in_use()
    for _ in range(3):
        start = now()
        groups = dapo.sample_groups(policy, tokenizer, questions, dapo.GROUP_SIZE)
        for number, response in enumerate(response for group in groups for response in group):
            response.reward = float(number % 2)
        sampled = now()
        forget_peak()
        dapo.compare_rewards(groups)
        dapo.update_policy(policy, None, optimizer, groups, 1)
        seconds.append((sampled - start, now() - sampled))
    sampling, update = map(statistics.median, zip(*seconds))
    return {"sampling": sampling, "update": update, "step": sampling + update, "gib": peak_in_use() - before}


def score(model, out, settings):
    """The most GiB that scoring takes, forward and backward, apart from weights and their gradients."""
    vars(dapo).update(settings)
    policy = dapo.load_model(model)[0]
    policy.get_input_embeddings().requires_grad_(False)
    tokens = [torch.arange(100, 356)] * 4
    dapo.token_log_probs(policy, tokens, [ids[:2] for ids in tokens])[0].sum().backward()
    before = memory_in_use()
    forget_peak()
    dapo.token_log_probs(policy, tokens, tokens)[0].sum().backward()
    return {"gib": peak_in_use() - before}


def forget_peak():
    """From here on, peak_in_use counts anew."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # Linux only


def peak_in_use():
    return torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else process_memory("VmHWM")


def memory_in_use():
    return torch.cuda.memory_allocated() / 2**30 if torch.cuda.is_available() else process_memory("VmRSS")


def process_memory(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 2**20


def random_model(folder, **sizes):
    """Saves a model with random weights, and the toy's tokenizer; the end token has a probability of about 1/170.

    All embeddings, which are tied to the output, share a large first component, which no layer changes, so that the
    hidden state has it too; that of the end token is larger, so that its logit is, whatever the text. The last norm
    shrinks it, or logits would be too large for bf16.
    """
    tokenizer = transformers.AutoTokenizer.from_pretrained(ROOT / "toy")
    ids = dict(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None)
    config = transformers.Qwen2Config(**QWEN | sizes, **ids, tie_word_embeddings=True)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        embeddings, end = model.get_input_embeddings().weight, tokenizer.eos_token_id
        embeddings[:, 0] = 10.0
        for layer in model.base_model.layers:
            layer.self_attn.o_proj.weight[0] = layer.mlp.down_proj.weight[0] = 0.0
        model.base_model.norm.weight[0] = 0.01
        output = model(torch.arange(100, 200)[None], output_hidden_states=True)
        missing = output.logits.logsumexp(-1).mean() - math.log(170) - output.logits[..., end].mean()
        embeddings[end, 0] += missing / output.hidden_states[-1][..., 0].mean()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


# ---- What gpu.py measures besides -----------------------------------------------------------------------------------


def recipe(model, out, settings, seconds):
    """recipes/gsm8k.py with another model and the toy's questions, for so many seconds: {figure: its values}."""
    settings = settings | dict(
        MODEL=model, TRAIN_DATASETS=dapo.TRAIN_DATASETS, EVAL_DATASETS=dapo.EVAL_DATASETS, OUTPUT_DIR=out,
        REWARD=f"{__file__}:says_anything", EVAL_EVERY=10**9, CHECKPOINT_EVERY=10**9,
    )  # fmt: skip
    words = ["recipes/gsm8k.py", *(f"--{name}={value}" for name, value in settings.items())]
    process = subprocess.Popen([sys.executable, "dapo.py", *words], cwd=ROOT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        if process.wait(seconds):
            sys.exit(process.returncode)
    process.kill()
    process.wait()
    dapo.read_command_line([str(ROOT / words[0]), *words[1:]])
    curves = read_metrics(out)
    if "time/step" not in curves:
        sys.exit("no step was finished")
    measured = memory.measure(transformers.AutoConfig.from_pretrained(model), torch.cuda.is_available())
    figures = {"steps": [len(curves["time/step"][0])]}  # of which the first warms up, and is not counted
    figures |= {name: curves[name][1][1:] or curves[name][1] for name in RECORDED if name in curves}
    figures |= {"GiB by tools/memory.py, for the longest texts": [max(memory.total(memory.memory(measured))) / 2**30]}
    return figures | {"passes of an optimizer step": passes(model, out)}


def says_anything(solution_str, **others):
    """A reward: random tokens hold one of the toy's, which can be read, in one response of three: groups are mixed."""
    return float(solution_str != "")


def passes(model, out):
    """How many micro-batches the recorded responses make of each mini-batch, drawn anew."""
    tokenizer, steps, counts = transformers.AutoTokenizer.from_pretrained(model), {}, []
    device = SimpleNamespace(device=torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    questions = {question.text: question for question in dapo.load_questions(dapo.TRAIN_DATASETS, tokenizer)}
    with contextlib.closing(sqlite3.connect(Path(out, "run.db"))) as db:
        for step, text, length in db.execute("SELECT step, question, length FROM responses WHERE kept"):
            response = dapo.Response(questions[text], range(length), "", False, 0.0, 0.0, 0.0, None, {})
            steps.setdefault(step, []).append(response)
    for responses in steps.values():
        random.shuffle(responses)
        count = math.ceil(len(responses) * dapo.MINI_BATCHES / (dapo.BATCH_SIZE * dapo.GROUP_SIZE))
        counts += [len([*dapo.micro_batches(device, responses[first::count])]) for first in range(count)]
    return counts


def rollout(model, out, settings, method):
    """Samples GROUP_SIZE responses to each of BATCH_SIZE questions, by one of the next four functions."""
    vars(dapo).update(settings)
    policy, tokenizer = dapo.load_model(model)
    prompts = [q.prompt for q in dapo.load_questions(dapo.TRAIN_DATASETS, tokenizer)[: dapo.BATCH_SIZE]]
    torch.manual_seed(0)
    return globals()[method](policy, prompts)


def staged(policy, prompts):
    return lengths_and_time(
        lambda limit: [len(ids) for ids in dapo.sample_tokens(policy, prompts, dapo.GROUP_SIZE, limit=limit)]
    )


def plain(policy, prompts):
    return lengths_and_time(lambda limit: generated(policy, prompts, limit))


def static(policy, prompts):
    """On a GPU, generate compiles decoding by itself if the cache is static."""
    in_bf16(policy)
    cache = {"cache_implementation": "static", "max_cache_len": max(map(len, prompts)) + dapo.MAX_RESPONSE_LENGTH}
    result = lengths_and_time(lambda limit: generated(policy, prompts, limit, **cache))
    return result | {"notes": "compiled" if hasattr(policy, "_compiled_call") else "not compiled"}


def continuous(policy, prompts):
    """It takes flash-attn if that is installed."""
    in_bf16(policy)
    count, ids = len(prompts) * dapo.GROUP_SIZE, policy.generation_config
    pages = (max(map(len, prompts)) + dapo.MAX_RESPONSE_LENGTH) // 256 + 1  # of 256 tokens, for one response
    method = transformers.GenerationConfig(
        do_sample=True, top_k=0, num_return_sequences=dapo.GROUP_SIZE, eos_token_id=ids.eos_token_id,
        pad_token_id=ids.pad_token_id,
    )  # fmt: skip
    sizes = transformers.ContinuousBatchingConfig(
        num_blocks=count * pages, max_batch_tokens=max(count, 1024), max_requests_per_batch=count
    )

    def sample(limit):
        manager.add_requests([prompt.tolist() for prompt in prompts], max_new_tokens=limit)
        lengths = []
        while len(lengths) < count:
            result = manager.get_result(timeout=1)
            if result and result.error or not manager.is_running():
                raise RuntimeError(result.error if result else "continuous batching has stopped")
            if result and result.is_finished():
                lengths.append(len(result.generated_tokens))
        return lengths

    with policy.continuous_batching_context_manager(method, continuous_batching_config=sizes) as manager:
        return lengths_and_time(sample) | {"notes": f"attention: {policy.config._attn_implementation}"}


def lengths_and_time(sample):
    """Measures sample(limit), which gives lengths. A short call goes before it, for what is done once, as compiling."""
    start = now()
    sample(16)
    forget_peak()
    ready = now()
    lengths = sample(dapo.MAX_RESPONSE_LENGTH)
    seconds = now() - ready
    result = {"rate": sum(lengths) / seconds, "seconds": seconds, "gib": peak_in_use()}
    return result | {"length": statistics.mean(lengths), "before": ready - start}


def generated(policy, prompts, limit, **options):
    """Lengths of the responses by one call of generate, with each prompt as often as its group has responses."""
    pad, ends = policy.generation_config.pad_token_id, policy.generation_config.eos_token_id
    prompts = [prompt for prompt in prompts for _ in range(dapo.GROUP_SIZE)]
    ids, mask = (
        torch.nn.utils.rnn.pad_sequence(rows, True, value, "left").to(policy.device)
        for rows, value in ((prompts, pad), ([torch.ones_like(prompt) for prompt in prompts], 0))
    )
    with dapo.autocast(policy) if policy.dtype == torch.float32 else contextlib.nullcontext():
        ids = policy.generate(ids, attention_mask=mask, do_sample=True, top_k=0, max_new_tokens=limit, **options)
    rows = ids[:, mask.shape[1] :].tolist()
    return [next((n for n, token in enumerate(row, 1) if token in ends), len(row)) for row in rows]


def in_bf16(policy):
    """Under autocast, keys would be of another type than values, and continuous batching has a thread without it."""
    for weights in policy.parameters():
        weights.data = weights.data.bfloat16()


# ---- All of them ----------------------------------------------------------------------------------------------------


def measure(what, model, out, settings, goal=None):
    """Calls one of the functions above in a process of its own; gives its result."""
    command = [sys.executable, __file__, "--measure", json.dumps([what, str(model), str(out), settings, goal])]
    output = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if output.returncode:
        sys.exit(output.stdout + output.stderr)
    return json.loads(output.stdout.splitlines()[-1])


def table(results):
    """{name: list of measurements} → a Markdown table of medians."""
    names = "step", "sampling", "scoring", "update", "rate", "gib"
    print("| | s a step | sampling | scoring | update | sampled tokens a second | peak GiB | step, dapo.py = 1 |")
    print("|---|---|---|---|---|---|---|---|")
    medians = {who: [statistics.median(r[name] for r in rounds) for name in names] for who, rounds in results.items()}
    for who, (step, *parts, rate, gib) in medians.items():
        spread = [r["step"] for r in results[who]]
        cells = [f"{step:.2f} ({min(spread):.2f}-{max(spread):.2f})", *(f"{part:.2f}" for part in parts)]
        print(f"| {who} | {' | '.join(cells)} | {rate:,.0f} | {gib:.2f} | {step / medians['dapo.py'][0]:.2f} |")
    print(flush=True)


def scaling(out):
    """Prints what more and longer responses cost, and what memory an update takes."""
    work = SAME_WORK | {"DEVICE": "cpu"}
    print("| responses | tokens each | s a step | s a response, x1 = 1 | sampling | update | update's memory, GiB |")
    print("|---|---|---|---|---|---|---|")
    first = None
    for times, length in (1, 24), (2, 24), (4, 24), (8, 24), (1, 48), (1, 96), (1, 192):
        settings = work | {"BATCH_SIZE": 32 * times, "MINI_BATCHES": 4 * times}
        result = measure("step", ROOT / "toy", out, settings, length)
        first = first or result["step"]
        print(f"| {256 * times} | {length} | {result['step']:.2f} | {result['step'] / first / times:.2f} "
              f"| {result['sampling']:.2f} | {result['update']:.2f} | {result['gib']:.2f} |", flush=True)  # fmt: skip
    print("\n1,024 tokens scored, forward and backward, with Qwen2.5-0.5B's width and vocabulary, weights apart:\n")
    print("| LOGITS_CHUNK | logits, GiB | most memory, GiB |\n|---|---|---|")
    model = random_model(out / "wide", num_hidden_layers=1)
    for chunk in 2**24, dapo.LOGITS_CHUNK, 2**26, 2**30:
        gib = measure("score", model, out, {"LOGITS_CHUNK": chunk, "DEVICE": "cpu"})["gib"]
        print(f"| {chunk:,} | {min(chunk, 1024 * QWEN['vocab_size']) * 4 / 2**30:.2f} | {gib:.2f} |", flush=True)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cpu", choices=SIZES)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--scaling", action="store_true")
    parser.add_argument("--out", type=Path, default=ROOT / "outputs/speed")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        what, model, out, settings, more = json.loads(options.measure)
        print(json.dumps(globals()[what](model, out, settings, *[more] * (more is not None))))
    elif options.scaling:
        scaling(options.out)
    else:
        compare(options)


def compare(options):
    contenders = {"dapo.py": "ours", "TRL": "trl", "floor": "floor"}
    if not importlib.util.find_spec("trl"):
        print("TRL is not installed, and left out")
        del contenders["TRL"]
    work = SAME_WORK | SIZES[options.device] | {"DEVICE": options.device}
    runs = (options.out / str(number) for number in range(10**6))
    if options.device == "cpu":
        policies = {"as shipped": ROOT / "toy", "trained": options.out / f"0/step_{dapo.NUM_STEPS}"}
        print(f"until {GOAL} of the held-out questions are answered right, one seed a round:", flush=True)
        for seed in range(options.rounds):
            for who, steps in ("dapo.py", dapo.NUM_STEPS), ("TRL", 30):
                if who in contenders:
                    settings = {"DEVICE": "cpu", "SEED": seed, "NUM_STEPS": steps}
                    result = measure(contenders[who], ROOT / "toy", next(runs), settings, GOAL)
                    reached = result["steps"] or f"not in {steps}"
                    print(f"  {who} {reached} steps, {result['seconds']:.0f} s", flush=True)
    else:
        policies = {"random weights": random_model(options.out / "random", num_hidden_layers=24)}
    for name, model in policies.items():
        results = {who: [] for who in contenders}
        for _ in range(options.rounds):
            for who, what in contenders.items():
                results[who].append(measure(what, model, next(runs), work))
        print(f"\nthe policy {name}:\n")
        table(results)


if __name__ == "__main__":
    main()

"""dapo.py and TRL's GRPOTrainer on the same work, in turn, and the least that the work could take.

    pip install trl==1.16.0   # in an environment of its own; it is not in requirements.txt
    python benchmarks/speed.py [--rounds 3] [--device cuda]
    python benchmarks/speed.py --scaling   # needs no TRL

The same work: toy/'s questions, 32 of them a step with 8 responses each of up to 96 tokens, 4 mini-batches a step, the
rewards and loss of DAPO, no dynamic sampling (which TRL has not), and a learning rate of 1e-12, so that both see the
same policy all the time. Two policies are measured: the one in toy/, which mostly answers in 6 tokens but now and then
rambles on until it is cut off, and the one that dapo.py makes of it in 30 steps, which works problems out. TRL samples
with a plain call of transformers' generate, and its gradient checkpointing, on by default, is off.

The floor is what is left if everything but the model is taken away: for each position a forward pass with as many
responses as have not ended, and a forward and backward pass over the real tokens, packed without padding.

Then both train for real, with dapo.py's own constants, until 0.9 of the held-out questions are answered right. That is
tried greedily after each step, and its time not counted.

With --device cuda the model has random weights, Qwen2.5-0.5B's shape and an end token that is likely enough to spread
lengths from 1 to 512 tokens; there are 64 questions of 8 responses a step, and no training for real.

--scaling measures steps of dapo.py with more and with longer responses, and the most memory that an update takes.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
os.environ["HF_HUB_OFFLINE"] = "1"

import dapo  # noqa: E402, I001  (first: pyarrow has to come before torch on Windows)
import torch  # noqa: E402
import transformers  # noqa: E402

from tools import plot  # noqa: E402

SIZES = {"cpu": dict(BATCH_SIZE=32, MAX_RESPONSE_LENGTH=96), "cuda": dict(BATCH_SIZE=64, MAX_RESPONSE_LENGTH=512)}
QWEN = dict(hidden_size=896, intermediate_size=4864, num_attention_heads=14, num_key_value_heads=2, vocab_size=151_936)
SAME_WORK = dict(
    GROUP_SIZE=8, MINI_BATCHES=4, DAPO_EPOCHS=1, USE_DYNAMIC_SAMPLING=False, LEARNING_RATE=1e-12, SAVE_EVERY=0
)
STEPS = 6  # the first is not counted
GOAL = 0.9
SECONDS = Counter()


def timed(module, name, part):
    """Adds the seconds that a function takes to SECONDS[part]."""
    function = getattr(module, name)

    def wrapper(*args, **options):
        start = now()
        result = function(*args, **options)
        SECONDS[part] += now() - start
        return result

    setattr(module, name, wrapper)


def now():
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


# ---- One measurement, in a process of its own -----------------------------------------------------------------------


def split(step, sampling, scoring, rate):
    update = step - sampling - scoring
    return dict(step=step, sampling=sampling, scoring=scoring, update=update, rate=rate, gib=dapo.peak_memory())


def ours(model, out, settings, goal=None):
    """Runs dapo.py itself, and reads what it recorded."""
    timed(dapo, "store_log_probs", "scoring")
    arguments = [f"--{name}={value}" for name, value in settings.items()]
    every = 1 if goal else 10**9
    dapo.main([f"--MODEL={model}", f"--OUTPUT_DIR={out}", f"--EVAL_EVERY={every}", "--RESUME=False", *arguments])
    curves = {name: dict(zip(*curve)) for name, curve in plot.read_metrics(out).items()}
    sampling, updates = curves["time/generate"], curves["time/update"]
    if goal:
        reached = next((step for step, value in curves["eval/accuracy"].items() if value >= goal and step), None)
        last = reached or max(sampling)
        return {"steps": reached, "seconds": sum(sampling[n] + updates[n] for n in sampling if n <= last)}
    tokens, counted = curves["response_length/mean"], range(2, STEPS + 1)
    responses = dapo.BATCH_SIZE * dapo.GROUP_SIZE
    step = statistics.median([sampling[n] + updates[n] for n in counted])
    rate = statistics.median([tokens[n] * responses / sampling[n] for n in counted])
    return split(step, statistics.median([sampling[n] for n in counted]), SECONDS["scoring"] / STEPS, rate)


def trl(model, out, settings, goal=None):
    import datasets
    from trl import GRPOConfig, GRPOTrainer

    vars(dapo).update(settings)
    cuda = torch.cuda.is_available()

    def score(completions, completion_ids, answer, **columns):
        verdicts = dapo.judge([dapo.Question("", truth, "", None) for truth in answer], completions)
        shape = dapo.MAX_RESPONSE_LENGTH, dapo.OVERLONG_BUFFER_LENGTH, dapo.OVERLONG_PENALTY_FACTOR
        SECONDS["tokens"] += sum(map(len, completion_ids))
        penalties = [dapo.overlong_penalty(len(ids), *shape) for ids in completion_ids]
        return [verdict["reward"] + penalty for verdict, penalty in zip(verdicts, penalties)]

    responses, parts, passes = dapo.BATCH_SIZE * dapo.GROUP_SIZE, dapo.MINI_BATCHES, dapo.DAPO_EPOCHS
    config = GRPOConfig(
        output_dir=str(out), per_device_train_batch_size=responses // parts, steps_per_generation=parts,
        gradient_accumulation_steps=1, num_generations=dapo.GROUP_SIZE, max_completion_length=dapo.MAX_RESPONSE_LENGTH,
        num_iterations=passes, max_steps=dapo.NUM_STEPS * parts * passes, learning_rate=dapo.LEARNING_RATE,
        lr_scheduler_type="constant_with_warmup", warmup_steps=dapo.WARMUP_STEPS * parts * passes,
        weight_decay=dapo.WEIGHT_DECAY, max_grad_norm=dapo.MAX_GRAD_NORM,
        loss_type="dapo", epsilon=dapo.CLIP_RANGE_LOW, epsilon_high=dapo.CLIP_RANGE_HIGH, beta=0.0, temperature=1.0,
        top_p=1.0, top_k=0, seed=dapo.SEED, bf16=cuda, use_cpu=not cuda, gradient_checkpointing=False,
        report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    policy, tokenizer = dapo.load_model(model)
    questions, held_out = (dapo.load_questions(data, tokenizer) for data in (dapo.TRAIN_DATASETS, dapo.EVAL_DATASETS))
    rows = [{"prompt": tokenizer.decode(q.prompt), "answer": q.answer} for q in questions]  # TRL tokenizes them again
    assert all(tokenizer(row["prompt"])["input_ids"] == q.prompt.tolist() for row, q in zip(rows, questions))
    clock = {"start": None, "times": [], "reached": None}

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
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[Clock()],
    )
    timed(trainer, "_generate", "sampling")
    timed(trainer, "_generate_and_score_completions", "sampling and scoring")
    trainer.train()
    if goal:
        return {"steps": clock["reached"], "seconds": sum(clock["times"])}
    step, sampling = statistics.median(clock["times"][1:]), SECONDS["sampling"] / STEPS
    scoring = SECONDS["sampling and scoring"] / STEPS - sampling
    rate = SECONDS["tokens"] / SECONDS["sampling"]
    return split(step, sampling, scoring, rate)


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
        cache.batch_repeat_interleave(dapo.GROUP_SIZE)
        token = torch.ones(len(lengths), 1, dtype=torch.long, device=policy.device)
        for step in range(max(lengths)):
            live = sum(length > step for length in lengths)
            if live < len(token):
                cache.batch_select_indices(torch.arange(live, device=policy.device))
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

    All embeddings, which are tied to the output, share a large first component, so that the hidden state has it too;
    that of the end token is larger, so that its logit is, whatever the text.
    """
    tokenizer = transformers.AutoTokenizer.from_pretrained(ROOT / "toy")
    ids = dict(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None)
    config = transformers.Qwen2Config(**QWEN | sizes, **ids, tie_word_embeddings=True)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        embeddings = model.get_input_embeddings().weight
        embeddings[:, 0] = 1.0
        state = model.base_model(torch.arange(100, 200)[None]).last_hidden_state[0, :, 0].mean()
        embeddings[tokenizer.eos_token_id, 0] += torch.log(torch.tensor(config.vocab_size / 170)) / state
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


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
    work = SAME_WORK | SIZES[options.device] | {"NUM_STEPS": STEPS, "DEVICE": options.device}
    runs = (options.out / str(number) for number in range(10**6))
    policies = {"as shipped": ROOT / "toy"}
    if options.device == "cpu":
        settings = {"DEVICE": "cpu"}
        print(f"until {GOAL} of the held-out questions are answered right, one seed a round:", flush=True)
        for seed in range(options.rounds):
            policies["trained"] = next(runs)
            mine = measure("ours", ROOT / "toy", policies["trained"], settings | {"SEED": seed}, GOAL)
            theirs = measure("trl", ROOT / "toy", next(runs), settings | {"SEED": seed, "NUM_STEPS": 30}, GOAL)
            for who, result in ("dapo.py", mine), ("TRL", theirs):
                print(f"  {who} {result['steps']} steps, {result['seconds']:.0f} s", flush=True)
        policies["trained"] /= f"step_{dapo.NUM_STEPS}"
    else:
        policies = {"random weights": random_model(options.out / "random", num_hidden_layers=24)}
    for name, model in policies.items():
        results = {"dapo.py": [], "TRL": [], "floor": []}
        for _ in range(options.rounds):
            for who, what in zip(results, ("ours", "trl", "floor")):
                results[who].append(measure(what, model, next(runs), work))
        print(f"\nthe policy {name}:\n")
        table(results)


if __name__ == "__main__":
    main()

"""Is the noise of scoring larger than GSPO's clip range? How far ratios are from 1 when nothing was trained.

    python benchmarks/gspo_noise.py                                      the toy
    python benchmarks/gspo_noise.py recipes/gsm8k.py --BATCH_SIZE=16     what a recipe trains, on a GPU

One batch of responses is scored twice with the same weights, as siblings/gspo.py does it: all of it before the first
update, and then in mini-batches, where other neighbors make other padding and other sums. In exact arithmetic all
ratios would be 1. On a CPU, which trains in fp32, bf16 is that of torch.autocast, as on a GPU but with other kernels.
"""

import random
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import dapo  # noqa: E402
from siblings import gspo  # noqa: E402


def distances(model, responses):
    """|s - 1| of each response, and |ρ - 1| of each token: two lists."""
    dapo.store_log_probs(model, responses, "old_log_probs")
    responses, of_responses, of_tokens = random.sample(responses, len(responses)), [], []
    for first in range(dapo.MINI_BATCHES):
        mini_batch = responses[first :: dapo.MINI_BATCHES]
        dapo.store_log_probs(model, mini_batch, "log_probs")
        for r in mini_batch:
            now, then = r.log_probs[None], r.old_log_probs[None]
            of_responses.append(abs(gspo.probability_ratio(now, then, torch.ones_like(now))[0, 0].item() - 1))
            of_tokens += ((now - then).exp() - 1).abs()[0].tolist()
    return of_responses, of_tokens


def line(name, ratios, bound):
    ratios = sorted(ratios)
    median, most = ratios[len(ratios) // 2], ratios[int(0.95 * len(ratios))]
    beyond = sum(ratio > bound for ratio in ratios) / len(ratios)
    return f"| {name} | {median:.1e} | {most:.1e} | {ratios[-1]:.1e} | {bound:g} | {beyond:.1%} |"


def main():
    dapo.read_command_line()
    print("| ratios of | median distance from 1 | 95 of 100 are below | largest | clip range | beyond it |")
    print("| --- | --- | --- | --- | --- | --- |")
    for kind in (torch.float32, torch.bfloat16):
        dapo.autocast = lambda model: torch.autocast(model.device.type, kind, kind is torch.bfloat16)
        model, tokenizer = dapo.load_model(dapo.MODEL)
        questions = dapo.load_questions(dapo.TRAIN_DATASETS, tokenizer)[: dapo.BATCH_SIZE]
        dapo.set_seed("noise")
        groups = dapo.sample_groups(model, tokenizer, questions, dapo.GROUP_SIZE)
        of_responses, of_tokens = distances(model, [response for group in groups for response in group])
        name = str(kind).removeprefix("torch.")
        print(line(f"responses, {name}", of_responses, dapo.CLIP_RANGE_LOW))
        print(line(f"tokens, {name}", of_tokens, 0.2), flush=True)


if __name__ == "__main__":
    main()

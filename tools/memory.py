"""How much GPU memory a run needs, for what, and whether a GPU has that much:

    python -m tools.memory recipes/gsm8k.py
    python -m tools.memory recipes/gsm8k.py --gpu 24                  on a GPU of 24 GiB
    python -m tools.memory recipes/gsm8k.py --GENERATION_BATCH=512

We estimate it without weights, for a GPU with bf16 arithmetic; others (T4, V100) need more. What a layer keeps for the
backward pass depends on its norms, heads, MLP, and adapters. So we let the model read torch's fake tensors, which have
a shape and a type but no numbers, and add up what autograd keeps. tests/test_memory.py holds the estimate against what
a step of small models really allocates (CPU, fp32 and bf16). CUDA itself takes about half a GiB more, and torch leaves
some 10% between its tensors; the verdict allows for both.
"""

import argparse
import re
from bisect import bisect_left
from types import SimpleNamespace
from unittest import mock

import dapo  # isort: skip  (before torch, for Windows)
import torch
from torch._subclasses import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM


def main(argv=None):
    form = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    parser = argparse.ArgumentParser("python -m tools.memory", description=__doc__, **form)
    parser.add_argument("--gpu", nargs="?", const="", metavar="GIB", help="the GPU's memory, for a verdict")
    options, words = parser.parse_known_args(argv)
    for word in dapo.read_command_line(words):
        dapo.fail(f"{word!r} is neither a recipe.py nor --NAME=VALUE")
    if options.gpu is not None and not (re.fullmatch(r"\d+(\.\d+)?", options.gpu) and float(options.gpu)):
        dapo.fail(f"--gpu {options.gpu} is not a GPU's memory: it has to be a number of GiB above 0, such as --gpu 24")
    path, trust = dapo.saved_model(dapo.MODEL), {"trust_remote_code": dapo.TRUST_REMOTE_CODE}
    with dapo.explained(f"MODEL={path} cannot be read, or works in a way that we cannot estimate"):
        model = measure(AutoConfig.from_pretrained(path, **trust), **trust)
        parts = memory(model)
    adapters = f", and {number(model.trained)} in LoRA's adapters" if model.frozen else ""
    print(f"{path}: {number(model.frozen or model.trained)} parameters{adapters}")
    print(f"  {'GiB':34}  {'sampling':8}  update")
    for name, sizes in (parts | {"together": total(parts)}).items():
        if any(sizes):
            print(f"  {name:34}  {sizes[0] / 2**30:<8.1f}  {sizes[1] / 2**30:.1f}")
    if options.gpu:
        verdict(model, float(options.gpu))


def number(count):
    return f"{count / 1e6:,.0f} million" if count >= 1e7 else f"{count:,}"


def measure(config, half=True, **options):
    """What `memory` has to know about a model. `half` is for bf16 arithmetic, as on CUDA."""
    length = dapo.MAX_PROMPT_LENGTH + dapo.MAX_RESPONSE_LENGTH
    dtype = torch.bfloat16 if half and dapo.LORA_RANK else torch.float32  # of weights; LoRA's adapters are fp32
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, **options).eval()
        if dapo.LORA_RANK:
            dapo.add_adapters(model)
    trained = sum(weights.numel() for weights in model.parameters() if weights.requires_grad)
    frozen = sum(weights.numel() for weights in model.parameters()) - trained
    # torch's product for experts takes no fake tensors in fp32; without it, transformers has one that keeps the same.
    other = mock.patch("transformers.integrations.moe._can_use_grouped_mm", return_value=False)
    with FakeTensorMode(allow_non_fake_inputs=True), other, torch.autocast("cpu", torch.bfloat16, enabled=half):
        decoder, cache = model.to_empty(device="cpu").get_decoder(), dapo.new_cache(model)
        one, two = (kept_by_autograd(decoder, torch.zeros(rows, length, dtype=torch.long)) for rows in (1, 2))
        with torch.no_grad():
            decoder(torch.zeros(1, length, dtype=torch.long), cache=cache)
    cached = [sum(part.numel() for part in vars(layer).values() if torch.is_tensor(part)) for layer in cache.layers]
    config = config.get_text_config()
    heads, eager = config.num_attention_heads, decoder.config._attn_implementation == "eager"
    copies = heads // (getattr(config, "num_key_value_heads", None) or heads) if eager else 1
    return SimpleNamespace(
        **dict(trained=trained, frozen=frozen, half=half, length=length),  # numbers of parameters; tokens of a row
        **dict(layers=config.num_hidden_layers, vocabulary=config.vocab_size),
        kept=two - one,  # bytes of a row; `one` also holds copies of weights in bf16
        inputs=length * config.num_hidden_layers * config.hidden_size * dtype.itemsize,  # bytes of a row, in all layers
        # One layer at a time gets more room or, in Gemma 2, copies each key and value for all heads that share it.
        cache=(sum(cached) + copies * max(cached)) * (2 if half else 4),
    )


def kept_by_autograd(decoder, ids):
    """The bytes that a forward pass keeps for the backward pass."""
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        decoder(ids, use_cache=False)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def memory(model, rows=None, tokens=None):
    """{what: [bytes while sampling, bytes while updating]}, at the longest prompts and responses. `rows` and `tokens`
    stand for GENERATION_BATCH and MICRO_BATCH_TOKENS. With LORA_RANK, the adapters alone are trained."""
    rows = max(1, (rows or dapo.GENERATION_BATCH) // dapo.GROUP_SIZE) * dapo.GROUP_SIZE
    tokens = max(tokens or dapo.MICRO_BATCH_TOKENS, model.length)
    kept, inputs = model.kept / model.length * tokens, model.inputs / model.length * tokens
    layer, logits = kept / model.layers, min(dapo.LOGITS_CHUNK, tokens * model.vocabulary)
    trained = "adapters" if model.frozen else "weights"
    base = 4 * model.trained if dapo.KL_COEF and not model.frozen else 0  # LoRA's is the frozen weights
    return {
        f"frozen weights, {'bf16' if model.half else 'fp32'}": [(2 if model.half else 4) * model.frozen] * 2,
        f"{trained}, fp32": [4 * model.trained] * 2,
        "gradients, fp32": [0, 4 * model.trained],
        "two moments of AdamW, fp32": [8 * model.trained] * 2,
        "base model, fp32": [base] * 2,
        f"{trained} once more, in bf16": [2 * model.trained if model.half else 0] * 2,
        "key-value cache": [rows * model.cache, 0],
        "layers, kept for the backward pass": [0, inputs + layer if dapo.GRADIENT_CHECKPOINTING else kept],
        "logits, or one layer at work": [
            rows * max(12 * model.vocabulary, layer / tokens),
            max(24 * logits, 0.6 * layer),
        ],
    }


def total(parts):
    return [sum(sizes) for sizes in zip(*parts.values())]


def verdict(model, gib):
    """Says whether the run fits, and the largest batches that fit, each in its own phase."""
    room = max(0, gib - 0.5) / 1.1 * 2**30  # for tensors, in bytes
    needed, phase = max(zip(total(memory(model)), ("sampling", "the update")))
    fits = "fits: {} takes more, and leaves" if needed <= room else "does not fit: {} takes more, and lacks"
    print(f"Of {gib:g} GiB, tensors can have {room / 2**30:.1f}: CUDA takes 0.5, and torch leaves 10% between tensors.")
    print(f"It {fits.format(phase)} {abs(room - needed) / 2**30:.1f} GiB.")
    sizes = range(1, 2**40)  # a size's place in it is that of the last one that fits
    groups = bisect_left(sizes, True, key=lambda size: total(memory(model, rows=size * dapo.GROUP_SIZE))[0] > room)
    tokens = bisect_left(sizes, True, key=lambda size: total(memory(model, tokens=size))[1] > room)
    print("Largest GENERATION_BATCH:", groups * dapo.GROUP_SIZE or "none, not even one group fits")
    print("Largest MICRO_BATCH_TOKENS:", tokens or "none, not even one response fits")
    if not groups or not tokens:
        helps = ["a smaller MODEL", "a smaller MAX_RESPONSE_LENGTH"] + ["LORA_RANK=32"] * (not dapo.LORA_RANK)
        if not tokens:
            helps += ["a smaller LOGITS_CHUNK"] + ["GRADIENT_CHECKPOINTING=True"] * (not dapo.GRADIENT_CHECKPOINTING)
        print(f"What helps: {', '.join(helps)}.")


if __name__ == "__main__":
    main()

"""tools/memory.py: the estimate is what small models take, and what the recipes say."""

import gc
import itertools
import runpy
import weakref

import pytest
import torch
from conftest import ROOT, question
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, Qwen2Config

import dapo
from tools import memory


class Peak(TorchDispatchMode):
    """Counts the bytes of all tensors alive, those of the given models included, and keeps the most."""

    def __init__(self, *models):
        super().__init__()
        self.sizes, self.now, self.peak = {}, 0, 0
        for weights in itertools.chain(*(model.parameters() for model in models)):
            self.add(weights)

    def add(self, tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in self.sizes:
            self.sizes[storage._cdata] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.remove, storage._cdata)

    def remove(self, address):
        self.now -= self.sizes.pop(address)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.add(tensor)
        return result


NARROW = dict(hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_key_value_heads=2)
WIDE = dict(hidden_size=256, intermediate_size=512, num_hidden_layers=6, num_key_value_heads=4)


@pytest.mark.parametrize(
    "shape, constants, half",
    [
        (NARROW, {}, False),
        (WIDE, {}, True),
        (NARROW, {"GRADIENT_CHECKPOINTING": True, "KL_COEF": 0.1}, False),
        (NARROW, {"GRADIENT_CHECKPOINTING": True}, True),
    ],
    ids=["narrow, fp32", "wide, bf16", "checkpointed, fp32, KL", "checkpointed, bf16"],
)
def test_the_estimate_is_what_a_step_takes(
    shape, constants, half, set_constants, set_reward, tokenizer, tmp_path, request
):
    """In sampling and in the update, each by itself, once AdamW has its moments."""
    coin = itertools.cycle([1.0, 0.0, 0.0])
    set_reward(lambda **response: {"score": 1.0, "acc": next(coin)})
    set_constants(
        autocast=lambda model: torch.autocast("cpu", torch.bfloat16, enabled=half),
        **dict(MAX_PROMPT_LENGTH=32, MAX_RESPONSE_LENGTH=24, BATCH_SIZE=4, GROUP_SIZE=8, MINI_BATCHES=1),
        **dict(GENERATION_BATCH=32, MICRO_BATCH_TOKENS=896, LOGITS_CHUNK=2**17),
        **dict(OVERLONG_BUFFER_LENGTH=0, USE_DYNAMIC_SAMPLING=False),
        **constants,
    )
    config = Qwen2Config(**shape, num_attention_heads=4, vocab_size=len(tokenizer), tie_word_embeddings=True)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model, base = dapo.load_model(tmp_path)[0], dapo.load_model(tmp_path)[0] if dapo.KL_COEF else None
    parameters = sum(weights.numel() for weights in model.parameters())
    optimizer, peaks, update_policy = torch.optim.AdamW(model.parameters(), 1e-4, fused=True), [], dapo.update_policy

    def update(*arguments):
        peaks.append(counted.peak)
        counted.peak = counted.now
        return update_policy(*arguments)

    set_constants(update_policy=update)
    gc.disable()  # what is no longer needed has to be free at once, not only when Python next looks for cycles
    request.addfinalizer(gc.enable)
    with Peak(*filter(None, [model, base])) as counted:
        for weights in model.parameters():
            weights.grad = torch.zeros_like(weights)
        optimizer.step()
        optimizer.zero_grad()
        counted.peak = counted.now
        dapo.train_step(model, base, tokenizer, optimizer, iter([question(length=32) for _ in range(4)]), 1)
    peaks.append(counted.peak)
    estimates = map(sum, zip(*memory.memory(config, parameters, half).values()))
    ratios = [estimate / peak for estimate, peak in zip(estimates, peaks, strict=True)]
    assert all(0.95 < ratio < 1.25 for ratio in ratios), f"in sampling, in the update: {ratios}"


SHAPES = {
    "Qwen/Qwen2.5-0.5B-Instruct": dict(
        hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2
    ),
    "Qwen/Qwen2.5-1.5B": dict(
        hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12, num_key_value_heads=2
    ),
}


@pytest.mark.parametrize("recipe, gib", [("gsm8k", 24), ("dapo_math", 80)])
def test_recipes_say_what_memory_they_need(recipe, gib, tmp_path, main, capsys):
    """The table in a recipe is the one that tools.memory prints for it, given the model's configuration."""
    path = ROOT / f"recipes/{recipe}.py"
    config = Qwen2Config(**SHAPES[runpy.run_path(str(path))["MODEL"]], vocab_size=151936, tie_word_embeddings=True)
    config.save_pretrained(tmp_path)
    memory.main([str(path), f"--MODEL={tmp_path}"])
    title, *table = capsys.readouterr().out.splitlines()
    assert "\n".join(f"  {line}" for line in table) in path.read_text()
    assert all(float(figure) < 0.8 * gib for figure in table[-1].split()[1:])


def test_the_papers_memory():
    """32.8 billion parameters at 16 bytes, as recipes/paper.py says."""
    shape = dict(hidden_size=5120, intermediate_size=27648, num_hidden_layers=64, num_key_value_heads=8)
    config = Qwen2Config(**shape, num_attention_heads=40, vocab_size=152064, tie_word_embeddings=False)
    with torch.device("meta"):
        parameters = sum(weights.numel() for weights in AutoModelForCausalLM.from_config(config).parameters())
    docstring = (ROOT / "recipes/paper.py").read_text()
    assert f"{parameters / 1e9:.1f} billion" in docstring and f"{16 * parameters / 2**30:.0f} GiB" in docstring

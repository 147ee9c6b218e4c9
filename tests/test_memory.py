"""tools/memory.py: the estimate is what small models take, and what the recipes say."""

import gc
import itertools
import re
import runpy
import weakref

import pytest
import torch
import transformers as T
from architectures import ARCHITECTURES, KINDS
from conftest import ROOT, question
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM

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


SHAPE = dict(hidden_size=128, intermediate_size=512, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2)
WIDE_HEADS = SHAPE | dict(head_dim=64, sliding_window=16)  # together twice the hidden size
CHECKPOINTED, KL, LORA = {"GRADIENT_CHECKPOINTING": True}, {"KL_COEF": 0.1}, {"LORA_RANK": 8}


@pytest.mark.parametrize(
    "kind, shape, half, constants",
    [
        (T.Qwen2Config, SHAPE, False, {}),
        (T.Qwen2Config, SHAPE | dict(hidden_size=256, num_hidden_layers=6, num_key_value_heads=4), True, {}),
        (T.Qwen2Config, SHAPE, False, CHECKPOINTED | KL),
        (T.Qwen2Config, SHAPE, True, CHECKPOINTED),
        pytest.param(T.LlamaConfig, SHAPE | dict(intermediate_size=2048), True, LORA, marks=pytest.mark.lora),
        pytest.param(T.LlamaConfig, SHAPE, False, LORA | CHECKPOINTED, marks=pytest.mark.lora),
        (T.Qwen3Config, WIDE_HEADS, True, {}),
        pytest.param(T.Qwen3Config, WIDE_HEADS, False, LORA, marks=pytest.mark.lora),
        (T.GemmaConfig, WIDE_HEADS, False, {}),
        (T.Gemma2Config, WIDE_HEADS, True, KL),
        pytest.param(T.Gemma2Config, WIDE_HEADS, True, LORA | CHECKPOINTED, marks=pytest.mark.lora),
        (T.Gemma3TextConfig, WIDE_HEADS, True, CHECKPOINTED),
        (T.Gemma3TextConfig, WIDE_HEADS, False, {}),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else None,
)
def test_the_estimate_is_what_a_step_takes(
    kind, shape, half, constants, set_constants, set_reward, tokenizer, tmp_path, request
):
    """In sampling and in the update, each by itself, once AdamW has its moments. One prompt is padded."""
    coin = itertools.cycle([1.0, 0.0, 0.0])
    set_reward(lambda **response: {"score": 1.0, "acc": next(coin)})
    set_constants(
        autocast=lambda model: torch.autocast("cpu", torch.bfloat16, enabled=half),
        **dict(MAX_PROMPT_LENGTH=32, MAX_RESPONSE_LENGTH=16, BATCH_SIZE=4, GROUP_SIZE=8, MINI_BATCHES=1),
        **dict(GENERATION_BATCH=32, MICRO_BATCH_TOKENS=768, LOGITS_CHUNK=2**17),
        **dict(OVERLONG_BUFFER_LENGTH=0, USE_DYNAMIC_SAMPLING=False),
        **constants,
    )
    ids = dict(vocab_size=len(tokenizer), bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=0)
    config = kind(**shape, **ids, tie_word_embeddings=True)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model, base = dapo.load_model(tmp_path)[0], dapo.load_model(tmp_path)[0] if dapo.KL_COEF else None
    if dapo.LORA_RANK:
        dapo.add_adapters(model)
    model.generation_config.eos_token_id = [len(tokenizer)]  # no response ends before the limit
    trained = [weights for weights in model.parameters() if weights.requires_grad]
    optimizer, peaks, update_policy = torch.optim.AdamW(trained, 1e-4, fused=True), [], dapo.update_policy

    def update(*arguments):
        peaks.append(counted.peak)
        counted.peak = counted.now
        return update_policy(*arguments)

    set_constants(update_policy=update)
    gc.disable()  # what is no longer needed has to be free at once, not only when Python next looks for cycles
    request.addfinalizer(gc.enable)
    with Peak(*filter(None, [model, base])) as counted:
        for weights in trained:
            weights.grad = torch.zeros_like(weights)
        optimizer.step()
        optimizer.zero_grad()
        counted.peak = counted.now
        asked = [question(length=length) for length in (32, 32, 32, 31)]
        dapo.train_step(model, base, tokenizer, optimizer, iter(asked), 1)
    peaks.append(counted.peak)
    estimates = memory.total(memory.memory(memory.measure(config, half)))
    ratios = [estimate / peak for estimate, peak in zip(estimates, peaks, strict=True)]
    assert all(0.95 < ratio < 1.25 for ratio in ratios), f"in sampling, in the update: {ratios}"


@pytest.mark.lora
@pytest.mark.parametrize("kind", KINDS)
def test_all_architectures_are_measured(kind, tokenizer, set_constants):
    config, sizes = ARCHITECTURES[kind]
    set_constants(LORA_RANK=2, MAX_PROMPT_LENGTH=8, MAX_RESPONSE_LENGTH=8)
    measured = memory.measure(config(**sizes, vocab_size=500, bos_token_id=None, eos_token_id=[1], pad_token_id=0))
    assert 0 < measured.trained < measured.frozen and measured.kept > measured.inputs > 0 and measured.cache > 0


@pytest.mark.lora
def test_adapters_are_counted(set_constants):
    """Rank × (in + out) for each linear layer but the output layer, of 3 layers."""
    set_constants(LORA_RANK=8)
    measured = memory.measure(T.Qwen3Config(**SHAPE, head_dim=64, vocab_size=100, tie_word_embeddings=True))
    attention = 2 * (128 + 256) + 2 * (128 + 128)  # queries and output, keys and values
    assert measured.trained == 3 * 8 * (attention + 3 * (128 + 512))
    norms = 2 * 128 + 2 * 64
    matrices = 2 * 128 * 256 + 2 * 128 * 128 + 3 * 128 * 512
    assert measured.frozen == 3 * (matrices + norms) + 128 + 100 * 128
    parts = memory.memory(measured)
    assert parts["frozen weights, bf16"] == [2 * measured.frozen] * 2
    assert parts["gradients, fp32"] == [0, 4 * measured.trained]
    set_constants(KL_COEF=0.1)  # the base model is the model without its adapters
    assert memory.memory(measured) == parts


@pytest.mark.parametrize(
    "constants", [{}, pytest.param(LORA | CHECKPOINTED, marks=pytest.mark.lora)], ids=["all weights", "LoRA"]
)
def test_the_largest_batches_that_fit(constants, set_constants, capsys):
    """They fit, and a group, here of 7, or a token more does not."""
    set_constants(GROUP_SIZE=7, **constants)
    model = memory.measure(AutoConfig.from_pretrained(ROOT / "toy"))

    def say(rows, tokens):
        set_constants(GENERATION_BATCH=rows, MICRO_BATCH_TOKENS=tokens)
        memory.verdict(model, 2.7)  # (2.7 - 0.5) / 1.1 = 2
        return capsys.readouterr().out

    groups, tokens = (int(size) for size in re.findall(r"Largest \w+: (\d+)", say(7, 1)))
    assert groups % 7 == 0 and tokens > dapo.MAX_PROMPT_LENGTH + dapo.MAX_RESPONSE_LENGTH

    def left(rows, tokens):
        sampling, update = memory.total(memory.memory(model, rows, tokens))
        return 2 * 2**30 - sampling, 2 * 2**30 - update

    assert left(groups, 1)[0] >= 0 > left(groups + 7, 1)[0] and left(7, tokens)[1] >= 0 > left(7, tokens + 1)[1]
    assert "have 2.0:" in say(7, 1) and "It fits: " in say(groups, tokens) and "leaves 0.0 GiB" in say(groups, tokens)
    assert "It does not fit: sampling " in say(groups + 7, 1)
    assert "It does not fit: the update " in say(7, tokens + 1)
    assert f"lacks {-left(7, 2 * tokens)[1] / 2**30:.1f} GiB" in say(7, 2 * tokens)


@pytest.mark.lora
def test_a_gpu_that_is_too_small(main, capsys):
    """CUDA takes half a GiB. What is named as a help is not in use yet."""
    for words, helps in ([], True), (["--LORA_RANK=4", "--GRADIENT_CHECKPOINTING=True"], False):
        memory.main([f"--MODEL={ROOT / 'toy'}", "--gpu", "0.501", *words])
        said = capsys.readouterr().out.partition("together")[2]
        assert "GENERATION_BATCH: none" in said and "MICRO_BATCH_TOKENS: none" in said and "LOGITS_CHUNK" in said
        assert ("LORA_RANK" in said) == ("GRADIENT_CHECKPOINTING" in said) == helps


@pytest.mark.parametrize("value", ["", "0", "0.0", "-3", "24GB", "many", "nan", "inf", "1e3", "recipes/gsm8k.py"])
def test_a_gpu_has_a_number_of_gib(value, main, capsys):
    with pytest.raises(SystemExit) as end:
        memory.main(["--gpu", value] if value else ["--gpu"])
    said = capsys.readouterr()
    assert end.value.code == 2 and said.err.count("\n") == 1 and f"--gpu {value}".strip() in said.err and not said.out


def test_parameters_of_small_models_are_counted_one_by_one():
    counts = 853_376, 9_999_999, 494_032_768
    assert [*map(memory.number, counts)] == ["853,376", "9,999,999", "494 million"]


SHAPES = {
    "Qwen/Qwen2.5-0.5B-Instruct": dict(
        hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2
    ),
    "Qwen/Qwen2.5-1.5B": dict(
        hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12, num_key_value_heads=2
    ),
    "Qwen/Qwen2.5-3B-Instruct": dict(
        hidden_size=2048, intermediate_size=11008, num_hidden_layers=36, num_attention_heads=16, num_key_value_heads=2
    ),
    "Qwen/Qwen2.5-7B-Instruct": dict(
        hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4
    ),
}


@pytest.mark.parametrize(
    "recipe, gib",
    [
        ("gsm8k", 24),
        ("dapo_math", 80),
        pytest.param("gsm8k_3b", 24, marks=pytest.mark.lora),
        pytest.param("gsm8k_7b", 48, marks=pytest.mark.lora),
    ],
)
def test_recipes_say_what_memory_they_need(recipe, gib, tmp_path, main, capsys):
    """The table in a recipe is the one that tools.memory prints for it, given the model's configuration."""
    path = ROOT / f"recipes/{recipe}.py"
    shape, large = SHAPES[runpy.run_path(str(path))["MODEL"]], recipe == "gsm8k_7b"
    config = T.Qwen2Config(**shape, vocab_size=152064 if large else 151936, tie_word_embeddings=not large)
    config.save_pretrained(tmp_path)
    memory.main([str(path), f"--MODEL={tmp_path}", "--gpu", str(gib)])
    title, *said = capsys.readouterr().out.splitlines()
    end = next(place for place, line in enumerate(said) if "together" in line) + 1
    assert "\n".join(f"  {line}" for line in said[:end]) in path.read_text()
    assert any(line.startswith("It fits: ") for line in said[end:])


def test_the_papers_memory():
    """32.8 billion parameters at 16 bytes, as recipes/paper.py says."""
    shape = dict(hidden_size=5120, intermediate_size=27648, num_hidden_layers=64, num_key_value_heads=8)
    config = T.Qwen2Config(**shape, num_attention_heads=40, vocab_size=152064, tie_word_embeddings=False)
    with torch.device("meta"):
        parameters = sum(weights.numel() for weights in AutoModelForCausalLM.from_config(config).parameters())
    docstring = (ROOT / "recipes/paper.py").read_text()
    assert f"{parameters / 1e9:.1f} billion" in docstring and f"{16 * parameters / 2**30:.0f} GiB" in docstring

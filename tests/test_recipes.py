"""The recipes start as they are, with local stand-ins for what is on the Hub, and say what memory they need."""

import io
import itertools
import json
import runpy
import weakref

import pytest
import torch
from conftest import ROOT
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, Qwen2Config

import dapo

memory = runpy.run_path(str(ROOT / "recipes/memory.py"))
RECIPES = sorted(path.stem for path in (ROOT / "recipes").glob("*.py") if path.stem not in ("memory", "verl"))


def stand_in(folder, recipe):
    """A data set of the shape of the recipe's, as a folder like those on the Hub."""
    folder.mkdir()
    if recipe == "gsm8k":
        rows = [
            {"question": f"Tom has {n} apples.", "answer": f"He has <<{n}={n}>>{n}.\n#### {n}"} for n in range(10, 18)
        ]
    else:
        rows = [
            {
                "data_source": "math_dapo",
                "prompt": [{"content": f"Solve it. Answer: $Answer.\n\nTom has {n} apples.", "role": "user"}],
                "ability": "MATH",
                "reward_model": {"ground_truth": str(n), "style": "rule-lighteval/MATH_v2"},
                "extra_info": {"index": str(n)},
            }
            for n in range(10, 18)
        ] * 3  # questions repeat
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    files = "".join(f"  - split: {split}\n    path: {split}.jsonl\n" for split in ("train", "test"))
    (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: main\n  data_files:\n{files}---\n")
    return str(folder)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_starts(recipe, main, make_folder, set_reward, tmp_path, monkeypatch, capsys):
    """Two steps with a tiny model, an evaluation, and a saved model that eval and chat take."""
    coin = itertools.cycle([1.0, 0.0, 0.0])
    set_reward(lambda **response: {"score": 1.0, "acc": next(coin), "pred": ""})
    place, settings = stand_in(tmp_path / recipe, recipe), runpy.run_path(str(ROOT / f"recipes/{recipe}.py"))
    small = dict(
        MODEL=make_folder(),
        OUTPUT_DIR=tmp_path / "run",
        DEVICE="cpu",
        NUM_STEPS=2,
        EVAL_SAMPLES=min(2, settings.get("EVAL_SAMPLES", 1)),
        BATCH_SIZE=4,
        GROUP_SIZE=3,
        MINI_BATCHES=2,
        MAX_PROMPT_LENGTH=200,
        MAX_RESPONSE_LENGTH=16,
        OVERLONG_BUFFER_LENGTH=4,
    )
    for name in ("TRAIN_DATASETS", "EVAL_DATASETS"):
        small[name] = [source | {"path": place} for source in settings[name]]
    words = [str(ROOT / f"recipes/{recipe}.py"), *(f"--{name}={value}" for name, value in small.items())]
    main(words)
    said = capsys.readouterr().out
    assert "step 0: held-out" in said and "step 2: held-out" in said
    assert ("16 of 24 rows" in said) == (recipe != "gsm8k")
    main(["eval", *words, str(tmp_path / "run")])
    assert "8 questions" in capsys.readouterr().out
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"Tom?")))
    main(["chat", *words, str(tmp_path / "run")])
    assert "[answer: " in capsys.readouterr().out


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
SAMPLING = dict(GENERATION_BATCH=32, MICRO_BATCH_TOKENS=56, LOGITS_CHUNK=2**16)
UPDATE = dict(GENERATION_BATCH=8, MICRO_BATCH_TOKENS=896, LOGITS_CHUNK=2**17)


@pytest.mark.parametrize(
    "shape, more, half",
    [
        (NARROW, {}, False),
        (WIDE, {}, True),
        (NARROW, {"GRADIENT_CHECKPOINTING": True, "KL_COEF": 0.1}, False),
        (NARROW, {"GRADIENT_CHECKPOINTING": True}, True),
    ],
    ids=["narrow, fp32", "wide, bf16", "checkpointed, fp32, KL", "checkpointed, bf16"],
)
@pytest.mark.parametrize("phase", [SAMPLING, UPDATE], ids=["sampling", "update"])
def test_the_memory_is_what_two_steps_take(shape, more, half, phase, set_constants, set_reward, tokenizer):
    coin = itertools.cycle([1.0, 0.0, 0.0])
    set_reward(lambda **response: {"score": 1.0, "acc": next(coin)})
    set_constants(
        autocast=lambda model: torch.autocast("cpu", torch.bfloat16, enabled=half),
        **dict(MAX_PROMPT_LENGTH=32, MAX_RESPONSE_LENGTH=24, BATCH_SIZE=4, GROUP_SIZE=8, MINI_BATCHES=1, NUM_STEPS=2),
        **{"OVERLONG_BUFFER_LENGTH": 0, "USE_DYNAMIC_SAMPLING": False} | phase | more,
    )
    config = Qwen2Config(**shape, num_attention_heads=4, vocab_size=len(tokenizer), tie_word_embeddings=True)
    model, base = (AutoModelForCausalLM.from_config(config).eval() for _ in range(2))
    model.generation_config = dapo.GenerationConfig(eos_token_id=[0], pad_token_id=0)
    base = base if dapo.KL_COEF else None
    if dapo.GRADIENT_CHECKPOINTING:
        dapo.recompute_layers(model)
    optimizer, progress = torch.optim.AdamW(model.parameters(), 1e-4, fused=True), dapo.record.Progress()
    asked = [dapo.Question(str(n), "1", "test", torch.randint(1, len(tokenizer), (32,))) for n in range(8)]
    stream = dapo.question_stream(asked, progress)
    with Peak(*filter(None, [model, base])) as counted:
        for _ in range(2):
            dapo.train_step(model, base, tokenizer, optimizer, stream, progress)
    parameters = sum(weights.numel() for weights in model.parameters())
    parts = memory["memory"](config, parameters, vars(dapo), half)
    estimate = max(map(sum, zip(*parts.values())))
    assert 0.95 < estimate / counted.peak < 1.25


SHAPES = {
    "Qwen/Qwen2.5-0.5B-Instruct": dict(
        hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2
    ),
    "Qwen/Qwen2.5-1.5B": dict(
        hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12, num_key_value_heads=2
    ),
}


@pytest.mark.parametrize("recipe, gib", [("gsm8k", 24), ("dapo_math", 80)])
def test_recipes_say_what_memory_they_need(recipe, gib, monkeypatch, tmp_path, main, capsys):
    """The table in a recipe is the one that memory.py prints for it, given the model's configuration."""
    source, settings = (ROOT / f"recipes/{recipe}.py").read_text(), runpy.run_path(str(ROOT / f"recipes/{recipe}.py"))
    config = Qwen2Config(**SHAPES[settings["MODEL"]], vocab_size=151936, tie_word_embeddings=True)
    config.save_pretrained(tmp_path)
    monkeypatch.setattr("sys.argv", ["memory.py", str(ROOT / f"recipes/{recipe}.py"), f"--MODEL={tmp_path}"])
    runpy.run_path(str(ROOT / "recipes/memory.py"), run_name="__main__")
    title, *table = capsys.readouterr().out.splitlines()
    assert "\n".join(f"  {line}" for line in table) in source
    assert all(float(figure) < 0.8 * gib for figure in table[-1].split()[1:])


def test_the_papers_memory():
    """32.8 billion parameters at 16 bytes, as recipes/paper.py says."""
    shape = dict(hidden_size=5120, intermediate_size=27648, num_hidden_layers=64, num_key_value_heads=8)
    config = Qwen2Config(**shape, num_attention_heads=40, vocab_size=152064, tie_word_embeddings=False)
    with torch.device("meta"):
        parameters = sum(weights.numel() for weights in AutoModelForCausalLM.from_config(config).parameters())
    docstring = (ROOT / "recipes/paper.py").read_text()
    assert f"{parameters / 1e9:.1f} billion" in docstring and f"{16 * parameters / 2**30:.0f} GiB" in docstring

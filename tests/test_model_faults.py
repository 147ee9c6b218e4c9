"""Models as others save them are trained, or refused in one line before a run begins."""

import json

import pytest
import torch
from architectures import SIZES
from conftest import ROOT, load, rows
from safetensors.torch import load_file, save_file
from test_bad_input import stop_of
from transformers import (
    AddedToken,
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    Gemma3Config,
    GPT2Config,
    MixtralConfig,
    T5Config,
    T5ForConditionalGeneration,
)

import dapo


@pytest.fixture
def save(tmp_path, tokenizer):
    """Saves a tiny random model of a configuration, with the toy's tokenizer."""

    def save(config, kind=AutoModelForCausalLM.from_config):
        folder = tmp_path / "model"
        torch.manual_seed(0)
        kind(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return save


def refused(main, settings, folder, tmp_path, capsys):
    """The line with which a model is refused; no run has begun then."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run/notes.txt").write_text("an earlier run")
    error = stop_of(main, [*settings, f"--MODEL={folder}"], capsys)
    assert "MODEL=" in error and [path.name for path in (tmp_path / "run").iterdir()] == ["notes.txt"]
    return error


def change(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_the_text_part_of_a_model_that_sees_is_trained(save, tokenizer, main, settings, chance, no_pictures, tmp_path):
    text = SIZES | dict(vocab_size=len(tokenizer), pad_token_id=0, sliding_window=8, head_dim=8)
    vision = dict(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=28, patch_size=14
    )
    folder = save(Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4))
    main([*settings, f"--MODEL={folder}", "--NUM_STEPS=1", "--GRADIENT_CHECKPOINTING=True"])
    (norm,) = rows(tmp_path / "run", "SELECT value FROM metrics WHERE name = 'grad_norm'")
    assert norm[0] > 0


@pytest.mark.parametrize("method", ["gptq", "bitsandbytes"])
def test_a_quantized_model_is_refused_before_its_weights_are_read(
    method, make_folder, main, settings, tmp_path, capsys
):
    folder = make_folder(seed=2)
    quantized = {"quant_method": method, "load_in_4bit": True, "bits": 4}
    change(folder / "config.json", quantization_config=quantized)
    (folder / "model.safetensors").write_bytes(b"")
    assert "is quantized" in refused(main, settings, folder, tmp_path, capsys)


@pytest.mark.parametrize("values", [{"return_dict": False}, {"output_router_logits": True}, {"use_cache": False}])
def test_settings_of_a_config_do_not_get_in_the_way(values, save, tokenizer, main, settings, chance, no_pictures):
    config = MixtralConfig(**SIZES, vocab_size=len(tokenizer), num_local_experts=2, num_experts_per_tok=1)
    folder = save(config)
    change(folder / "config.json", **values)
    main([*settings, f"--MODEL={folder}", "--NUM_STEPS=1"])


@pytest.mark.parametrize("kind", ["bert", "t5"])
def test_an_encoder_is_refused(kind, save, tokenizer, main, settings, tmp_path, capsys):
    sizes = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16)
    sizes |= dict(vocab_size=len(tokenizer), pad_token_id=0)
    if kind == "bert":
        folder = save(BertConfig(**sizes, initializer_range=1.0))
    else:
        sizes = dict(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=len(tokenizer))
        folder = save(T5Config(**sizes), T5ForConditionalGeneration)
    refused(main, settings, folder, tmp_path, capsys)


def test_a_model_with_a_cache_of_its_own_kind_is_refused(make_folder, main, settings, tmp_path, capsys, monkeypatch):
    def insists(self, *parts, past_key_values=None, **others):
        raise TypeError("this model needs its own cache class")

    folder = make_folder(seed=3)
    model, _ = load(folder)
    monkeypatch.setattr(type(model.model), "forward", insists)
    assert "needs its own cache class" in refused(main, settings, folder, tmp_path, capsys)


@pytest.mark.parametrize("added", ["[PAD]", "<image_soft_token>"])
def test_one_added_token_more_than_the_model_has_is_no_obstacle(
    added, make_folder, main, settings, chance, no_pictures
):
    """As in Llama 2 with a [PAD], and in Gemma 3."""
    folder = make_folder(seed=4)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(AddedToken(added, special=True), special_tokens=True)
    tokenizer.pad_token = added if added == "[PAD]" else tokenizer.pad_token
    tokenizer.save_pretrained(folder)
    model, tokenizer = load(folder)
    assert len(tokenizer) > model.config.vocab_size > model.generation_config.pad_token_id
    main([*settings, f"--MODEL={folder}", "--NUM_STEPS=1"])


@pytest.mark.parametrize("token", ["m h", "end"])
def test_a_token_that_the_model_does_not_have_is_refused(token, make_folder, main, settings, tmp_path, capsys):
    folder = make_folder(seed=5)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([token])
    if token == "end":
        tokenizer.eos_token = token
    tokenizer.save_pretrained(folder)
    said = refused(main, settings, folder, tmp_path, capsys)
    assert ("names no end token" if token == "end" else "makes token 374 of a question") in said


@pytest.mark.parametrize("name, value", [("model.norm.weight", 1e38), ("model.embed_tokens.weight", float("inf"))])
def test_weights_or_probabilities_that_are_not_finite_are_called_so(
    name, value, make_folder, main, settings, tmp_path, capsys
):
    folder = make_folder(seed=6)
    weights = load_file(folder / "model.safetensors")
    weights[name][3:] = value
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    error = stop_of(main, [*settings, f"--MODEL={folder}"], capsys)
    assert "not finite" in error and "unusual" not in error and not (tmp_path / "run").exists()


def test_a_runs_folder_is_its_last_saved_model(main, settings, chance, no_pictures, tmp_path, capsys):
    main([*settings, "--NUM_STEPS=1"])
    again = [word for word in settings if "OUTPUT_DIR" not in word]
    main([*again, f"--MODEL={tmp_path / 'run'}", f"--OUTPUT_DIR={tmp_path / 'next'}", "--NUM_STEPS=1"])
    assert dapo.saved_model(str(tmp_path / "run")) == str(tmp_path / "run/step_1")
    for path in (tmp_path / "run").glob("step_*/*"):
        path.unlink()
    (tmp_path / "run/step_1").rmdir()
    error = stop_of(main, [*again, f"--MODEL={tmp_path / 'run'}", f"--OUTPUT_DIR={tmp_path / 'third'}"], capsys)
    assert "has not saved a model yet" in error and "Repo id" not in error


def test_a_template_that_makes_much_text_is_not_tokenized_whole(tokenizer, monkeypatch):
    seen = []
    monkeypatch.setattr(tokenizer, "chat_template", "{{ 'Tom ' * 3000000 }}")
    real = type(tokenizer).__call__
    monkeypatch.setattr(
        type(tokenizer), "__call__", lambda self, text, **others: seen.append(text) or real(self, text[:9000])
    )
    ids = dapo.read_prompt(tokenizer, [{"role": "user", "content": "Tom"}])[1]
    assert len(seen[0]) <= 1000 * dapo.MAX_PROMPT_LENGTH and len(ids) > dapo.MAX_PROMPT_LENGTH


def test_no_warning_of_a_library_comes_up_in_a_run(tmp_path):
    """Run by itself, with warnings as errors: what is deprecated today goes tomorrow."""
    import subprocess
    import sys

    run = [
        sys.executable,
        "-W",
        "error",
        "dapo.py",
        "--NUM_STEPS=1",
        "--EVAL_EVERY=1",
        "--DEVICE=cpu",
        "--MAX_GEN_BATCHES=1",
    ]
    done = subprocess.run([*run, f"--OUTPUT_DIR={tmp_path / 'run'}"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "Warning" not in done.stdout + done.stderr, done.stderr


def test_gpt_2_without_a_chat_template(save, tokenizer, main, settings, chance, no_pictures):
    folder = save(GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2))
    (folder / "chat_template.jinja").unlink()
    main([*settings, f"--MODEL={folder}", "--NUM_STEPS=1"])

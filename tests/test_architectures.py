"""Any causal language model: a run of one step, gradient checkpointing, what is saved, for many architectures."""

import json

import pytest
import torch
from architectures import ARCHITECTURES, KINDS, REFUSED
from conftest import load, response
from transformers import AutoTokenizer, OPTForCausalLM, modeling_layers
from transformers.pytorch_utils import Conv1D

import dapo

pytestmark = pytest.mark.usefixtures("no_pictures", "parity")


@pytest.fixture
def settings(tmp_path):
    """A run of one step on eight questions, each response right by chance."""
    rows = [{"question": f"Tom has {n} apples. " + "Tom buys 1. " * (n % 3), "answer": str(n)} for n in range(10, 18)]
    (tmp_path / "q.json").write_text("\n".join(map(json.dumps, rows)))
    source = [{"path": str(tmp_path / "q.json"), "type": "json", "input": "question", "output": "answer"}]
    constants = dict(
        TRAIN_DATASETS=source, EVAL_DATASETS=source, OUTPUT_DIR=str(tmp_path / "run"), DEVICE="cpu", NUM_STEPS=1,
        BATCH_SIZE=4, GROUP_SIZE=4, MINI_BATCHES=2, MAX_RESPONSE_LENGTH=10, OVERLONG_BUFFER_LENGTH=4,
        LEARNING_RATE=0.01,
    )  # fmt: skip
    return [f"--{name}={value}" for name, value in constants.items()]


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_trains_and_the_saved_folder_reloads(kind, main, settings, make_folder, tmp_path, capsys):
    folder = make_folder(kind)
    main([f"--MODEL={folder}", *settings])
    before, after = load(folder)[0], load(tmp_path / "run")[0]
    assert after.name_or_path == str(tmp_path / "run/step_1")  # the folder of a run stands for the model it saved last
    moved = [
        name for (name, old), new in zip(before.named_parameters(), after.parameters()) if not torch.equal(old, new)
    ]
    still = {name for name, _ in before.named_parameters()} - set(moved)
    # an expert that no token went to, and positions that none of these short texts has
    assert moved and all("expert" in name or "embed_positions" in name for name in still), still
    assert capsys.readouterr().out.count("eval/accuracy") == 2


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_checkpointing_changes_neither_gradients_nor_sampling(kind, make_folder, set_constants):
    """And it does not cost sampling anything: a layer is wrapped only where there will be a backward pass."""
    set_constants(MAX_RESPONSE_LENGTH=12, DECODE_STAGE=5)
    prompts = [torch.arange(20, 20 + length) for length in (4, 9)]
    folder, found, wrapped, checkpoint = make_folder(kind), [], [], dapo.checkpoint
    set_constants(
        checkpoint=lambda layer, *args, **options: wrapped.append(layer) or checkpoint(layer, *args, **options)
    )
    for on in (False, True):
        set_constants(GRADIENT_CHECKPOINTING=on)
        model, _ = load(folder)
        batch = [response(1.0, tokens=(30, 31, 32)), response(0.0, tokens=(33, 34))]
        for one, advantage in zip(batch, (1.0, -0.5)):
            one.advantage = advantage
        dapo.store_log_probs(model, batch, "old_log_probs")
        kind_of_layer, shapes = modeling_layers.GradientCheckpointingLayer, []
        layer = next(module for module in model.modules() if isinstance(module, kind_of_layer))
        part = next(module for module in layer.modules() if isinstance(module, (torch.nn.Linear, Conv1D)))
        part.register_forward_pre_hook(lambda module, inputs: shapes.append(inputs[0].shape))
        dapo.accumulate_gradients(model, batch)
        gradients, calls = [parameter.grad for parameter in model.parameters()], len(shapes)
        assert len(wrapped) > 2 if on else len(wrapped) == 2  # the logits of scoring, and of the update
        wrapped.clear()
        torch.manual_seed(0)
        tokens = dapo.sample_tokens(model, prompts, 3)
        assert not wrapped
        found.append((gradients, calls, tokens, shapes[calls:]))
    (gradients, calls, tokens, shapes), (same_gradients, twice, same_tokens, same_shapes) = found
    for gradient, same in zip(gradients, same_gradients):
        assert gradient is same is None or torch.allclose(same, gradient, atol=1e-6, rtol=1e-5)
    assert twice == 2 * calls  # each layer was computed again
    assert all(torch.equal(*pair) for pair in zip(tokens, same_tokens))
    assert shapes == same_shapes  # after the prompts a token at a time: from the cache


def test_a_model_without_such_layers_cannot_be_checkpointed(make_folder, set_constants, monkeypatch, capsys):
    set_constants(GRADIENT_CHECKPOINTING=True)
    folder = make_folder()
    monkeypatch.setattr(modeling_layers, "GradientCheckpointingLayer", type(None))
    with pytest.raises(SystemExit):
        load(folder)
    error = capsys.readouterr().err
    assert f"MODEL={folder}" in error and "GRADIENT_CHECKPOINTING=True" in error and error.count("\n") == 1


def test_heads_tied_to_the_embedding_and_heads_of_their_own(make_folder):
    tied = {load(make_folder(kind))[0].config.tie_word_embeddings for kind in ARCHITECTURES}
    assert tied == {True, False}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_sampled_right_is_refused(kind, main, settings, make_folder, tmp_path, capsys):
    folder = make_folder(kind)
    with pytest.raises(SystemExit) as end:
        main([f"--MODEL={folder}", *settings])
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.count("\n") == 1
    assert f"MODEL={folder}" in error and "cache" in error
    assert not (tmp_path / "run/step_1").exists()


def test_a_head_that_goes_past_the_replaced_decoder_is_refused(main, settings, make_folder, monkeypatch, capsys):
    """As OPT's would, were its decoder taken to be its base_model: its hidden states were decoded twice, silently."""
    folder = make_folder("opt")
    monkeypatch.setattr(OPTForCausalLM, "get_decoder", lambda model: model.base_model)
    with pytest.raises(SystemExit):
        main([f"--MODEL={folder}", *settings])
    assert "OPTForCausalLM cannot be trained here" in capsys.readouterr().err


def test_a_cache_that_forgets_is_refused(main, settings, make_folder, monkeypatch, capsys):
    """Each token is then sampled as if the prompt ended with it."""
    folder, real = make_folder(), dapo.new_cache

    def forgetful(model):
        cache = real(model)
        update = cache.update
        cache.update = lambda keys, values, *rest, **more: tuple(
            part * (torch.arange(part.shape[2]) >= part.shape[2] - 1)[:, None]
            for part in update(keys, values, *rest, **more)
        )
        return cache

    monkeypatch.setattr(dapo, "new_cache", forgetful)
    with pytest.raises(SystemExit):
        main([f"--MODEL={folder}", *settings])
    assert "Qwen2ForCausalLM cannot be trained here" in capsys.readouterr().err


@pytest.mark.parametrize("missing", ["pad_token", "chat_template"])
def test_tokenizers_without(missing, main, settings, make_folder, tmp_path):
    folder = make_folder("llama", generation={})
    if missing == "chat_template":
        (folder / "chat_template.jinja").unlink()
    else:
        config = json.loads((folder / "tokenizer_config.json").read_text())
        del config["pad_token"]
        config["tokenizer_class"] = "PreTrainedTokenizerFast"  # Qwen2Tokenizer has one by default
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        (folder / "generation_config.json").write_text("{}")
    assert not getattr(AutoTokenizer.from_pretrained(folder), missing)
    main([f"--MODEL={folder}", *settings])
    assert (tmp_path / "run/step_1/model.safetensors").exists()

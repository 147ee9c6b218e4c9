"""Any causal language model: a run of one step, gradient checkpointing, what is saved, for many architectures."""

import json

import pytest
import torch
from architectures import ARCHITECTURES, REFUSED
from conftest import load, response
from transformers import AutoTokenizer, OPTForCausalLM
from transformers.pytorch_utils import Conv1D

import dapo


@pytest.fixture
def settings(tmp_path, monkeypatch):
    """A run of one step on eight questions, each response right by chance, without pictures, which take longest."""
    monkeypatch.setattr(dapo.record, "draw", lambda folder: None)
    rows = [{"question": f"Tom has {n} apples. " + "Tom buys 1. " * (n % 3), "answer": str(n)} for n in range(10, 18)]
    (tmp_path / "q.json").write_text("\n".join(map(json.dumps, rows)))
    source = [{"path": str(tmp_path / "q.json"), "type": "json", "input": "question", "output": "answer"}]
    constants = dict(
        TRAIN_DATASETS=source,
        EVAL_DATASETS=source,
        OUTPUT_DIR=str(tmp_path / "run"),
        DEVICE="cpu",
        NUM_STEPS=1,
        BATCH_SIZE=4,
        GROUP_SIZE=4,
        MINI_BATCHES=2,
        MAX_RESPONSE_LENGTH=10,
        OVERLONG_BUFFER_LENGTH=4,
        LEARNING_RATE=0.01,
    )
    return [f"--{name}={value}" for name, value in constants.items()]


@pytest.fixture(autouse=True)
def parity(set_reward):
    def score(solution_str, **others):
        right = len(solution_str) % 2
        return {"score": 2.0 * right - 1, "acc": right, "pred": solution_str}

    set_reward(score)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_a_step_trains_and_the_saved_folder_reloads(kind, main, settings, make_folder, tmp_path, capsys):
    folder = make_folder(kind)
    main([f"--MODEL={folder}", *settings])
    before, after = load(folder)[0], load(tmp_path / "run/step_1")[0]
    moved = [
        name for (name, old), new in zip(before.named_parameters(), after.parameters()) if not torch.equal(old, new)
    ]
    still = {name for name, _ in before.named_parameters()} - set(moved)
    # an expert that no token went to, and positions that none of these short texts has
    assert moved and all("expert" in name or "embed_positions" in name for name in still), still
    assert capsys.readouterr().out.count("held-out accuracy") == 2
    main(["eval", str(tmp_path / "run"), *settings])
    assert str(tmp_path / "run/step_1") in capsys.readouterr().out


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_gradient_checkpointing_changes_neither_gradients_nor_sampling(kind, make_folder, set_constants):
    set_constants(MAX_RESPONSE_LENGTH=12, DECODE_STAGE=5)
    prompts = [torch.arange(20, 20 + length) for length in (4, 9)]
    found = []
    for on in (False, True):
        set_constants(GRADIENT_CHECKPOINTING=on)
        model, _ = load(make_folder(kind))
        layer, shapes = next(m for m in model.modules() if isinstance(m, dapo.GradientCheckpointingLayer)), []
        part = next(m for m in layer.modules() if isinstance(m, (torch.nn.Linear, Conv1D)))
        part.register_forward_pre_hook(lambda module, inputs: shapes.append(inputs[0].shape))
        batch = [response(1.0, tokens=(30, 31, 32)), response(0.0, tokens=(33, 34))]
        for one, advantage in zip(batch, (1.0, -0.5)):
            one.advantage = advantage
        dapo.accumulate_gradients(model, batch)
        gradients, calls = [parameter.grad for parameter in model.parameters()], len(shapes)
        torch.manual_seed(0)
        tokens = dapo.sample_tokens(model, prompts, 3)
        found.append((gradients, calls, tokens, shapes[calls:]))
    (gradients, calls, tokens, shapes), (same_gradients, twice, same_tokens, same_shapes) = found
    for gradient, same in zip(gradients, same_gradients):
        assert gradient is same is None or torch.allclose(same, gradient, atol=1e-6, rtol=1e-5)
    assert twice == 2 * calls  # each layer was computed again
    assert all(torch.equal(*pair) for pair in zip(tokens, same_tokens))
    assert shapes == same_shapes  # after the prompts a token at a time: from the cache


def test_a_model_without_such_layers_cannot_be_checkpointed(make_folder, set_constants, monkeypatch, capsys):
    set_constants(GRADIENT_CHECKPOINTING=True, GradientCheckpointingLayer=type(None))
    with pytest.raises(SystemExit):
        load(make_folder())
    assert "GRADIENT_CHECKPOINTING=True is not possible: Qwen2ForCausalLM" in capsys.readouterr().err


def test_heads_tied_to_the_embedding_and_heads_of_their_own(make_folder):
    tied = {load(make_folder(kind))[0].config.tie_word_embeddings for kind in ARCHITECTURES}
    assert tied == {True, False}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_sampled_right_is_refused(kind, main, settings, make_folder, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        main([f"--MODEL={make_folder(kind)}", *settings])
    assert end.value.code == 2
    assert "cannot be trained here" in capsys.readouterr().err
    assert not (tmp_path / "run/step_1").exists()


def test_a_head_that_goes_past_the_replaced_decoder_is_refused(main, settings, make_folder, monkeypatch, capsys):
    """As OPT's would, were its decoder taken to be its base_model: its hidden states were decoded twice, silently."""
    folder = make_folder("opt")
    monkeypatch.setattr(OPTForCausalLM, "get_decoder", lambda model: model.base_model)
    with pytest.raises(SystemExit):
        main([f"--MODEL={folder}", *settings])
    assert "OPTForCausalLM cannot be trained here" in capsys.readouterr().err


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

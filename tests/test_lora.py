"""LoRA: gradients by hand, sampled and scored alike, resumed to the same bytes, and merged when it is saved."""

import io
import json
import os
import random
import runpy
import signal
import subprocess
import sys

import pytest
import torch
from architectures import KINDS
from conftest import ROOT, load, rows
from safetensors.torch import load_file
from test_resume import REWARD, checkpoint, everything, fail_at
from test_update import make_groups, make_responses
from torch.nn.utils import parameters_to_vector
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.pytorch_utils import Conv1D

import dapo
from tools import chat, evaluate

peft = pytest.importorskip("peft", reason="LoRA needs peft (pip install peft)")
pytestmark = [
    pytest.mark.lora,
    pytest.mark.usefixtures("no_pictures"),
    pytest.mark.filterwarnings("ignore:.*(fan_in_fan_out|is_gradient_checkpointing):"),  # as dapo.py does
]

SCALE = 6.0 / 4  # LORA_ALPHA / LORA_RANK


@pytest.fixture
def adapted(set_constants):
    """The model in a folder with adapters of random values: at 0.3 they change all that it says, at 0.01 a little."""

    def make(folder, size=0.3):
        set_constants(LORA_RANK=4, LORA_ALPHA=6.0)
        model, _ = load(folder)
        dapo.add_adapters(model)
        torch.manual_seed(1)
        for weights in adapters(model).values():
            torch.nn.init.normal_(weights.data, std=size)
        return model

    return make


@pytest.fixture
def bfloat16(set_constants):
    """Arithmetic as on CUDA, on the CPU."""
    set_constants(autocast=lambda model: torch.autocast("cpu", torch.bfloat16))


@pytest.fixture
def save(set_constants, tmp_path):
    """Saves a model as a run does. Gives its folder."""

    def saved(model, folder):
        set_constants(OUTPUT_DIR=str(tmp_path / "run"))
        optimizer = torch.optim.AdamW(model.parameters())
        with dapo.open_run(model, AutoTokenizer.from_pretrained(folder), optimizer, [], []) as run:
            run.save_model("step_1")
        return tmp_path / "run/step_1"

    return saved


def adapters(model):
    return {name: weights for name, weights in model.named_parameters() if weights.requires_grad}


def products(model):
    """LORA_ALPHA / LORA_RANK · B A of each layer, in the form of the layer's weights, which in GPT-2 are transposed."""
    found = {}
    for name, layer in model.named_modules():
        if hasattr(layer, "lora_A"):
            product = layer.lora_B["default"].weight @ layer.lora_A["default"].weight * SCALE
            found[name] = product.T if isinstance(layer.base_layer, Conv1D) else product
    return found


def linear_layers(model):
    return {name for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear | Conv1D)}


def gradients(model, responses):
    """By dapo.py's own loss."""
    model.zero_grad()
    dapo.accumulate_gradients(model, responses)
    return {name: weights.grad for name, weights in model.named_parameters() if weights.grad is not None}


def log_probs(model, responses):
    with torch.no_grad():
        return torch.cat([dapo.token_log_probs(model, [r.question.prompt], [r.tokens])[0][0] for r in responses])


def plain_log_probs(model, responses):
    """By one plain forward pass for each response."""
    found = []
    with torch.no_grad():
        for r in responses:
            logits = model(torch.cat([r.question.prompt, r.tokens])[None]).logits[0, len(r.question.prompt) - 1 : -1]
            found.append(logits.log_softmax(-1).gather(1, r.tokens[:, None])[:, 0])
    return torch.cat(found)


# ---- Gradients ------------------------------------------------------------------------------------------------------


@pytest.fixture
def float64(monkeypatch):
    """Nothing is rounded to fp32 on the way, as norms, softmax, and the logits otherwise are."""
    monkeypatch.setattr(torch, "float32", torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


@pytest.mark.parametrize("kind", ["qwen2", "gpt2", "gemma2", "opt"])
def test_gradients_are_those_of_the_whole_weights_by_the_chain_rule(
    kind, adapted, make_folder, set_constants, monkeypatch, request
):
    """y = (W + s·B A) x, so dL/dB = s·dL/dW Aᵀ and dL/dA = s·Bᵀ dL/dW, with dL/dW from a model without adapters whose
    weights are W + s·B A; GPT-2's are transposed, and output layers are tied to the embedding or not."""
    folder = make_folder(kind)
    model = adapted(folder).double()
    set_constants(LORA_RANK=0)
    whole = load(folder)[0].double()
    request.getfixturevalue("float64")
    set_constants(KL_COEF=0.3, ENTROPY_COEF=0.02)
    with torch.no_grad():
        for name, product in products(model).items():
            whole.get_parameter(f"{name}.weight").add_(product)
    responses = make_responses()
    dapo.store_log_probs(whole, responses, "old_log_probs")
    for index, r in enumerate(responses):
        r.base_log_probs = r.old_log_probs + 0.3
        r.old_log_probs = r.old_log_probs + torch.linspace(-0.5, 0.5, len(r.tokens))
        r.advantage = (-1) ** index * 1.5
    of_adapters, of_weights = gradients(model, responses), gradients(whole, responses)
    expected = {}
    for name, layer in model.named_modules():
        if hasattr(layer, "lora_A"):
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            of_weight = of_weights[f"{name}.weight"]
            of_weight = of_weight.T if kind == "gpt2" else of_weight
            expected[f"{name}.lora_A.default.weight"] = SCALE * b.T @ of_weight
            expected[f"{name}.lora_B.default.weight"] = SCALE * of_weight @ a.T
    assert len(expected) == 2 * (len(linear_layers(whole)) - 1) and expected.keys() == of_adapters.keys()
    for name, gradient in of_adapters.items():
        assert gradient.dtype == torch.float64 and gradient.norm() > 1e-6
        torch.testing.assert_close(gradient, expected[name], rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("kind", KINDS)
def test_which_layers_have_adapters_and_what_a_step_changes(kind, adapted, make_folder, set_constants):
    """All linear layers but the output layer; in a Mixture of Experts those of attention alone. Only A and B change."""
    folder = make_folder(kind)
    model = adapted(folder, size=0.1)
    set_constants(LORA_RANK=0)
    plain, _ = load(folder)
    expected = linear_layers(plain) - {"lm_head"}
    if hasattr(plain.config, "num_experts_per_tok"):
        expected = {name for name in expected if "attn" in name}
    assert products(model).keys() == expected and len(expected) >= 4
    before = {name: weights.clone() for name, weights in model.named_parameters()}
    assert adapters(model).keys() == {f"{name}.lora_{part}.default.weight" for name in expected for part in "AB"}
    set_constants(BATCH_SIZE=3, GROUP_SIZE=4, MINI_BATCHES=2, DAPO_EPOCHS=1)
    dapo.update_policy(model, None, torch.optim.AdamW(model.parameters(), fused=True), make_groups(), 1)
    changed = {name for name, weights in model.named_parameters() if not torch.equal(weights, before[name])}
    assert changed == adapters(model).keys()


def test_adapters_change_nothing_at_first_and_depend_on_the_seed_alone(make_folder, set_constants):
    folder, responses, models = make_folder("gemma2"), make_responses(), []
    set_constants(TEMPERATURE=0.9)
    base = log_probs(load(folder)[0], responses)
    set_constants(LORA_RANK=4)
    for seed in (0, 0, 1):
        set_constants(SEED=seed)
        torch.manual_seed(len(models))
        models.append(load(folder)[0])
        dapo.add_adapters(models[-1])
    values = [adapters(model) for model in models]
    for name in values[0]:
        assert torch.equal(values[0][name], values[1][name])
        assert torch.equal(values[0][name], values[2][name]) == ("lora_B" in name)
        assert values[0][name].any() == ("lora_A" in name)
    assert all(torch.equal(log_probs(model, responses), base) for model in models)


def test_small_steps_are_not_lost_with_a_base_in_bfloat16(make_folder, set_constants, bfloat16):
    """Its weights take half the memory. A and B are fp32, so that a learning rate of 1e-6 changes each number in B."""
    set_constants(LORA_RANK=4, LEARNING_RATE=1e-6, WARMUP_STEPS=0, BATCH_SIZE=3, GROUP_SIZE=4, MINI_BATCHES=1)
    model, _ = load(make_folder("qwen2"))
    dapo.add_adapters(model)
    trained = adapters(model)
    assert {weights.dtype for weights in trained.values()} == {torch.float32}
    assert {w.dtype for name, w in model.named_parameters() if name not in trained} == {torch.bfloat16}
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    for step in (1, 2):
        before = parameters_to_vector(weights.clone() for name, weights in trained.items() if "lora_B" in name)
        dapo.update_policy(model, None, optimizer, make_groups(), step)
        after = parameters_to_vector(weights for name, weights in trained.items() if "lora_B" in name)
        assert (after != before).float().mean() > 0.99 and (after - before).abs().max() < 1e-5
    assert {moments["exp_avg"].dtype for moments in optimizer.state.values()} == {torch.float32}
    assert set(optimizer.state) == set(trained.values())


@pytest.mark.parametrize("kind", ["qwen2", "gpt2", "mixtral"])
def test_gradients_do_not_depend_on_micro_batches_or_checkpointing(kind, adapted, make_folder, set_constants):
    folder, responses, found, counts = make_folder(kind), make_responses(), [], []
    for tokens, checkpointing in ((100000, False), (40, False), (100000, True)):
        set_constants(MICRO_BATCH_TOKENS=tokens, GRADIENT_CHECKPOINTING=checkpointing)
        model = adapted(folder, size=0.1)
        if not found:
            dapo.store_log_probs(model, responses, "old_log_probs")
        layer = next(layer for layer in model.modules() if hasattr(layer, "lora_A"))
        counts.append(0)
        layer.register_forward_hook(lambda *call: counts.append(counts.pop() + 1))
        found.append(parameters_to_vector(gradients(model, responses).values()))
    whole, *others = found
    assert whole.norm() > 0.01
    assert all((other - whole).norm() / whole.norm() < 1e-4 for other in others)
    assert counts[0] < counts[1] and counts[2] == 2 * counts[0]


# ---- One policy -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_scored_is_sampled_and_without_adapters_it_would_not_be(kind, adapted, make_folder, set_constants, capsys):
    set_constants(MAX_RESPONSE_LENGTH=18, DECODE_STAGE=5, OVERLONG_BUFFER_LENGTH=0)
    model = adapted(make_folder(kind, ends=[*range(20, 60)]))
    prompts = [torch.arange(40, 40 + length) for length in (3, 17, 9, 1, 12, 7)]
    assert dapo.sampling_gap(model, prompts).max() < 1e-4
    score = dapo.token_log_probs

    def without(*batch):
        with model.adapters.disable_adapter():
            return score(*batch)

    set_constants(token_log_probs=without)
    with pytest.raises(SystemExit):
        dapo.sampling_gap(model, prompts)
    assert "cannot be trained here" in capsys.readouterr().err


def test_rounding_is_no_reason_to_refuse_a_model(adapted, make_folder, set_constants, bfloat16):
    """With a base in bf16, what one layer hands to the next is bf16, too."""
    set_constants(MAX_RESPONSE_LENGTH=20, OVERLONG_BUFFER_LENGTH=0)
    prompts, gaps = [torch.arange(40, 40 + length) for length in (3, 17, 9, 1, 12, 7)], []
    for kind, temperature in zip(("qwen2", "mixtral"), (0.1, 1.0)):
        set_constants(TEMPERATURE=temperature)
        model = adapted(make_folder(kind, seed=1), size=0.05)
        gaps.append(temperature * dapo.sampling_gap(model, prompts).mean())
    assert 0.001 < max(gaps) < 0.25, gaps


@pytest.mark.parametrize("kind", ["gpt2", "gemma2", "mixtral"])
def test_kl_to_the_model_without_adapters_is_kl_to_a_copy_of_the_base_model(kind, adapted, make_folder, set_constants):
    """Not a bit differs: neither the metrics nor the adapters after the step."""
    folder, found = make_folder(kind), []
    set_constants(KL_COEF=0.5, BATCH_SIZE=3, GROUP_SIZE=4, MINI_BATCHES=2, DAPO_EPOCHS=1, LEARNING_RATE=1e-3)
    for copies in (False, True):
        model = adapted(folder, size=0.1)
        set_constants(LORA_RANK=0)
        base = load(folder)[0] if copies else None
        random.seed(0)
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        metrics = dapo.update_policy(model, base, optimizer, make_groups(), 1)
        found.append((metrics, {name: weights.detach().clone() for name, weights in adapters(model).items()}))
    (metrics, trained), (same_metrics, same_trained) = found
    assert metrics == same_metrics and metrics["kl"] > 0.001
    assert len(trained) > 4 and trained.keys() == same_trained.keys()
    assert all(torch.equal(weights, same_trained[name]) for name, weights in trained.items())


# ---- What is saved --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_saved_model_is_the_trained_one(kind, adapted, save, make_folder, set_constants, monkeypatch):
    """For plain transformers, without peft, in the Hub's form; and the adapters for peft, with the base model."""
    folder, responses = make_folder(kind), make_responses()
    model = adapted(folder, size=0.02)
    trained = plain_log_probs(model, responses)
    place = save(model, folder)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "peft", None)
        merged = AutoModelForCausalLM.from_pretrained(place).eval()
    again = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), place / "adapters").eval()
    base = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert (plain_log_probs(base, responses) - trained).abs().max() > 0.01
    for other in (merged, again):
        torch.testing.assert_close(plain_log_probs(other, responses), trained, rtol=0, atol=5e-5)
    ours, theirs = load_file(place / "model.safetensors"), load_file(folder / "model.safetensors")
    assert ours.keys() == theirs.keys()  # a tied output layer is there once, and experts one by one
    assert all(weights.shape == theirs[name].shape for name, weights in ours.items())
    saved = load_file(place / "adapters/adapter_model.safetensors")
    assert len(saved) == len(adapters(model)) and all(".lora_" in name for name in saved)
    config = json.loads((place / "adapters/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(folder)
    assert config["target_modules"] in (".*attn.*_proj.*", sorted(config["target_modules"]))


@pytest.mark.parametrize("kind", ["qwen2", "gpt2", "gemma2", "qwen3_next"])
def test_with_a_base_in_bfloat16_the_merged_weights_are_fp32(kind, adapted, save, make_folder, set_constants, bfloat16):
    """Exactly W + s·B A, also for who loads them without a word about their type."""
    folder = make_folder(kind)
    model = adapted(folder, size=0.001)
    place = save(model, folder)
    loaded = AutoModelForCausalLM.from_pretrained(place)
    assert loaded.dtype == torch.float32
    changed = products(model)
    for name, weights in AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).named_parameters():
        layer = name.removesuffix(".weight")
        expected = weights.float() + changed.pop(layer) if layer in changed else weights.float()
        assert torch.equal(loaded.get_parameter(name), expected), name
    assert not changed


# ---- Whole runs -----------------------------------------------------------------------------------------------------


@pytest.fixture
def arguments(make_folder, tmp_path):
    """A run of 3 steps with LoRA that needs everything a checkpoint holds."""
    rows = [{"question": f"Tom has {n} apples.", "answer": str(n)} for n in range(7)]
    (tmp_path / "q.json").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "chance.py").write_text(REWARD)
    source = [{"path": str(tmp_path / "q.json"), "type": "json", "input": "question", "output": "answer"}]
    constants = dict(
        MODEL=make_folder("gpt2"), TRAIN_DATASETS=source, EVAL_DATASETS=source, DEVICE="cpu", SEED=5,
        REWARD=f"{tmp_path / 'chance.py'}:compute_score", NUM_STEPS=3, EVAL_EVERY=3, SAVE_EVERY=2, CHECKPOINT_EVERY=1,
        BATCH_SIZE=3, GROUP_SIZE=3, MINI_BATCHES=2, DAPO_EPOCHS=2, MAX_GEN_BATCHES=2, MAX_RESPONSE_LENGTH=6,
        OVERLONG_BUFFER_LENGTH=4, LEARNING_RATE=1e-3, KL_COEF=0.01, LORA_RANK=3, LORA_ALPHA=5,
        OUTPUT_DIR=tmp_path / "run",
    )  # fmt: skip
    return [f"--{name}={value}" for name, value in constants.items()]


FAST = "--LEARNING_RATE=0.1", "--WARMUP_STEPS=0"  # so that one step changes what the model says


def all_of_it(folder):
    saved = {str(path.relative_to(folder)): path.read_bytes() for path in folder.glob("*/adapters/*.safetensors")}
    return everything(folder) | {"adapters": saved}


def test_interrupted_it_ends_in_the_same_bytes(main, arguments, monkeypatch, tmp_path, capsys):
    """By a fault in the second step, Ctrl-C in that step, and a fault while the model is saved after it."""
    main([*arguments, f"--OUTPUT_DIR={tmp_path / 'undisturbed'}"])
    with monkeypatch.context() as patch, pytest.raises(ArithmeticError):
        patch.setattr(dapo, "update_policy", fail_at(2))
        main(arguments)
    assert checkpoint(tmp_path / "run")["step"] == 1

    def interrupted(*parts, update=dapo.update_policy):
        os.kill(os.getpid(), signal.SIGINT)
        return update(*parts)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(dapo, "update_policy", interrupted)
        main(arguments)
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(peft.PeftModel, "save_pretrained", lambda *words, **more: 1 / 0)
        main(arguments)
    assert not (tmp_path / "run/step_2").exists() and checkpoint(tmp_path / "run")["step"] == 2
    main(arguments)
    assert capsys.readouterr().out.count("resuming the run") == 3
    found, expected = all_of_it(tmp_path / "run"), all_of_it(tmp_path / "undisturbed")
    assert set(expected["adapters"]) == {f"step_{n}/adapters/adapter_model.safetensors" for n in (2, 3)}
    for part in expected:
        assert found[part] == expected[part], part


@pytest.fixture
def begun(main, monkeypatch):
    """Begins a run, or resumes it, and stops after it has saved a checkpoint."""

    def begin(arguments):
        with monkeypatch.context() as patch, pytest.raises(ArithmeticError):
            patch.setattr(dapo.Run, "is_over", lambda run: run.save_if_due() or 1 / 0)
            main(arguments)

    return begin


def test_a_checkpoint_holds_adapters_alone_and_is_for_them_alone(main, begun, arguments, tmp_path, capsys):
    arguments.append("--NUM_STEPS=1")
    main(arguments)
    state, saved = checkpoint(tmp_path / "run"), load_file(tmp_path / "run/step_1/adapters/adapter_model.safetensors")
    assert len(state["model"]) == len(saved) == 2 * 8
    for name, weights in state["model"].items():
        assert torch.equal(weights, saved["base_model.model." + name.replace(".default", "")])
        assert weights.untyped_storage().nbytes() == weights.nbytes  # no larger tensor comes with it
    moments = [part["exp_avg"].shape for part in state["optimizer"]["state"].values()]
    assert moments == [weights.shape for weights in state["model"].values()]
    old = (tmp_path / "run/checkpoint.pt").read_bytes()
    for word in ("LORA_RANK=2", "LORA_RANK=0", "LORA_ALPHA=6.0"):
        name, value = word.split("=")
        begun([*arguments, f"--{word}", "--NUM_STEPS=2"])
        said = capsys.readouterr().out
        assert f"{name} was" in said and f"is now {value}" in said and "resuming" not in said
        assert (tmp_path / "run_1/checkpoint.pt").read_bytes() == old
        (tmp_path / "run").rename(tmp_path / f"other_{word}")
        (tmp_path / "run_1").rename(tmp_path / "run")
    begun([*arguments, "--NUM_STEPS=2"])
    assert "resuming the run" in capsys.readouterr().out


def test_it_resumes_where_the_base_model_has_another_type(begun, arguments, monkeypatch, capsys):
    """On a CPU, say, after a GPU with bf16 arithmetic; the folder of the base model is in fp32."""
    with monkeypatch.context() as patch:
        patch.setattr(dapo, "autocast", lambda model: torch.autocast("cpu", torch.bfloat16))
        begun(arguments)
    begun(arguments)
    said = capsys.readouterr().out
    assert "resuming the run" in said and "held another run" not in said


def test_a_checkpoint_of_all_weights_is_not_for_adapters(begun, arguments, tmp_path, capsys):
    """Nor is one from before there was LoRA."""
    begun([*arguments, "--LORA_RANK=0"])
    state = checkpoint(tmp_path / "run")
    for constants in (state["constants"], {n: v for n, v in state["constants"].items() if "LORA" not in n}):
        torch.save(state | {"constants": constants}, tmp_path / "run/checkpoint.pt")
        begun(arguments)
        said = capsys.readouterr().out
        assert "resuming the run" not in said and "held another run" in said
        (tmp_path / "run").rename(tmp_path / f"other_{len(constants)}")
        (tmp_path / "run_1").rename(tmp_path / "run")


def test_a_sibling_and_a_run_that_starts_from_its_model(main, arguments, monkeypatch, tmp_path):
    for function in ("group_advantages", "aggregate_loss", "policy_loss", "probability_ratio", "clipped_tokens"):
        monkeypatch.setattr(dapo, function, getattr(dapo, function))
    runpy.run_path(str(ROOT / "siblings/rloo.py"))
    arguments += ["--NUM_STEPS=1", *FAST]
    main(arguments)
    main([*arguments, f"--OUTPUT_DIR={tmp_path / 'next'}", f"--MODEL={tmp_path / 'run'}"])
    query = "SELECT response FROM held_out WHERE step = {} ORDER BY number"
    before, after = (rows(tmp_path / "run", query.format(step)) for step in (0, 1))
    first = rows(tmp_path / "next", query.format(0))
    assert before != after == first
    config = json.loads((tmp_path / "next/step_1/adapters/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "run/step_1")


def test_the_tools_read_the_folder_of_a_run(main, arguments, parity, monkeypatch, tmp_path, capsys):
    """Also with a recipe that sets LORA_RANK."""
    arguments = [word for word in arguments if "REWARD" not in word]
    main([*arguments, "--NUM_STEPS=1", *FAST])
    accuracy, trained = rows(tmp_path / "run", "SELECT value FROM metrics WHERE name = 'eval/accuracy' ORDER BY step")
    assert accuracy != trained
    (tmp_path / "recipe.py").write_text("LORA_RANK = 3\nLORA_ALPHA = 5.0\n")
    for word in ("--LORA_RANK=0", str(tmp_path / "recipe.py")):
        words = [word for word in arguments if "LORA" not in word] + [word, str(tmp_path / "run")]
        evaluate.main(words)
        said = capsys.readouterr().out
        assert f"{trained[0]:.3f}" in said and f"{accuracy[0]:.3f}" not in said
        shown = io.TextIOWrapper(io.BytesIO())
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"What is 1 + 1?\n")))
            patch.setattr(sys, "stdout", shown)
            chat.main(words)
        shown.seek(0)
        assert "[answer: " in shown.read()


# ---- Messages -------------------------------------------------------------------------------------------------------


@pytest.fixture
def refusal(main, begun, arguments, tmp_path, capsys):
    """What is said by a run that is refused, beside an earlier one that is not touched."""

    def run(*words):
        with pytest.raises(SystemExit) as end:
            main([*arguments, *words])
        error = capsys.readouterr().err
        assert end.value.code == 2 and error.count("\n") == 1 and error.startswith("error: ")
        return error

    begun([*arguments, "--LORA_RANK=0"])
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    yield run
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_what_is_refused_touches_no_earlier_run(refusal, monkeypatch):
    for word in ("LORA_RANK=-1", "LORA_RANK=1.5", "LORA_RANK=True", "LORA_ALPHA=0", "LORA_ALPHA=-1"):
        assert word.partition("=")[0] in refusal(f"--{word}")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "peft", None)
        error = refusal()
        assert "LORA_RANK=3 needs peft" in error and "pip install peft" in error

    class Product(torch.nn.Module):
        forward = Conv1D.forward

    def without_linear_layers(path, load=dapo.load_model):
        model, tokenizer = load(path)
        for name in linear_layers(model):
            model.get_submodule(name).__class__ = Product
        return model, tokenizer

    monkeypatch.setattr(dapo, "load_model", without_linear_layers)
    assert "LORA_RANK=3" in refusal()


def test_a_rank_above_the_size_of_the_layers(make_folder, set_constants):
    set_constants(LORA_RANK=100)
    model, _ = load(make_folder())
    dapo.add_adapters(model)
    responses = make_responses()
    dapo.store_log_probs(model, responses, "old_log_probs")
    found = gradients(model, responses).values()
    assert {(100, 16), (16, 100)} < {tuple(gradient.shape) for gradient in found}
    assert all(gradient.isfinite().all() for gradient in found) and any(gradient.any() for gradient in found)


PROGRAM = """
import sys
import dapo
dapo.draw_metrics = lambda folder: None
dapo.main(sys.argv[1:])
"""


def test_the_libraries_say_nothing(arguments, tmp_path):
    """Not even of GPT-2's transposed layers, and of its output layer, which is tied to the embedding."""
    command, environment = [sys.executable, "-c", PROGRAM, *arguments], os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([*command, "--NUM_STEPS=1"], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    ours = ("step ", "  Tom ", "    ->", "the model is saved", "7 of 7 questions of EVAL_DATASETS")
    assert [line for line in done.stdout.splitlines() if not line.startswith(ours)] == []
    assert (tmp_path / "run/step_1/adapters").is_dir()

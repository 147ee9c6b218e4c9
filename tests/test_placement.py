"""Devices and types on a GPU, tested on machines without one.

torch's fake tensors have a shape, a type, and a device, but no data. Where two devices meet, they raise as real tensors
would. fake_cuda.cpp lets them be on a GPU that is not there, in a process of its own: it has to be loaded before torch.
What this cannot see: kernels, memory, speed, random numbers, and all but one way through a branch on data.
"""

import importlib.util
import itertools
import json
import shutil
import subprocess
import sys
import traceback
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from architectures import ARCHITECTURES, TELLING
from conftest import ROOT, question
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only

OTHERS = [kind for kind in ARCHITECTURES if kind not in TELLING]
LOAD = "import ctypes, sys; fake_cuda = ctypes.CDLL(sys.argv[1])"
DRIVE = f"{LOAD}; import test_placement; fake_cuda.pretend(); test_placement.drive(*sys.argv[2:])"
SABOTAGES = {  # a part of dapo.py, what replaces it, and what has to be found then
    "prompts": ('pad, "left").to(model.device)', 'pad, "left")', "devices"),
    "ids": ("ids = ids.to(model.device, non_blocking=True)", "", "devices"),
    "advantages": ("for r in micro_batch]).to(model.device, non_blocking=True)", "for r in micro_batch])", "devices"),
    "autocast": ("def autocast(", "autocast = contextlib.nullcontext\ndef _(", "Linear.forward gives torch.float32"),
    "cache": ("keys.to(dtype)", "keys", "DynamicCache.update gives torch.float32"),
    "logits": ("with autocast(model):  # one", "if True:  #", "Linear.forward gives torch.float32"),
    "entropy": (".log_softmax(-1)\n", ".log_softmax(-1).half()\n", "token_log_probs gives torch.float16"),
}


@pytest.fixture(scope="module")
def complaints(tmp_path_factory, make_folder):
    """A function: scripts like dapo.py, and kinds of models → [script, model, what was wrong] of pairs that fail."""
    library, home = tmp_path_factory.mktemp("library") / "fake_cuda.so", Path(torch.__file__).parent
    compiler = next(filter(None, map(shutil.which, ("g++", "clang++", "c++"))), None)
    if not compiler:
        pytest.skip("there is no C++ compiler")
    build = [compiler, "-std=c++20", "-O0", "-shared", "-fPIC", ROOT / "tests/fake_cuda.cpp", "-o", library]
    build += [f"-I{home}/include", f"-L{home}/lib", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{home}/lib"]
    for command in (build, [sys.executable, "-c", LOAD, library]):
        made = subprocess.run(command, capture_output=True, text=True)
        if made.returncode:
            pytest.skip(f"{command[0]} cannot build or load fake_cuda.cpp: {made.stderr.strip()[-400:]}")

    def run(scripts, kinds):
        command = [sys.executable, "-c", DRIVE, library, *scripts, *map(make_folder, kinds)]
        ended = subprocess.run(command, cwd=ROOT / "tests", capture_output=True, text=True)
        assert ended.returncode == 0, ended.stderr
        return json.loads(ended.stdout.splitlines()[-1])

    return run


@pytest.mark.parametrize("kinds", [TELLING, pytest.param(OTHERS, marks=pytest.mark.slow)], ids=["telling", "others"])
def test_tensors_are_on_the_gpu_in_their_type(kinds, complaints):
    assert complaints([ROOT / "dapo.py"], kinds) == []


def test_what_is_misplaced_is_found(complaints, tmp_path):
    text, scripts = (ROOT / "dapo.py").read_text(encoding="utf-8"), []
    for name, (part, replacement, _) in SABOTAGES.items():
        assert part in text, f"{name}: {part} is no longer in dapo.py"
        scripts.append(tmp_path / f"dapo_{name}.py")
        scripts[-1].write_text(text.replace(part, replacement), encoding="utf-8")
    found = {script: complaint for script, _, complaint in complaints(scripts, ["qwen2"])}
    for name, (*_, expected) in SABOTAGES.items():
        assert expected in found.get(f"dapo_{name}", ""), f"{name}: {found}"


# ---- What runs in the other process ---------------------------------------------------------------------------------


class Fake(FakeTensorMode):
    """Makes up the values that a program asks of its tensors: True, 0.0, and tokens, one in three of them an end."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        try:
            return super().__torch_dispatch__(function, types, args, kwargs)
        except DataDependentOutputException:
            kind = args[0].dtype
            return True if kind == torch.bool else 0.0 if kind.is_floating_point else next(self.tokens)


def drive(*paths):
    """Prints [script, model, what was wrong] of all pairs that fail. Paths are scripts, and then models' folders."""
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False  # otherwise there is no autocast
    torch.cuda.is_bf16_supported = lambda *_, **__: True
    torch.cuda.get_device_capability = lambda *_: (7, 0)  # from 8 on, experts use grouped_mm, fake in bf16 only
    torch.autograd.set_multithreading_enabled(False)  # in its threads, fake tensors cannot be indexed by a list
    fake, found, scripts = Fake(allow_non_fake_inputs=True), [], [path for path in paths if path.endswith(".py")]

    def move(model, device):
        with fake:
            return torch.nn.Module.to(model, device)

    transformers.PreTrainedModel.to = move
    watch(torch.nn.Linear, "forward", torch.bfloat16)
    watch(transformers.pytorch_utils.Conv1D, "forward", torch.bfloat16)
    watch(transformers.DynamicCache, "update", torch.bfloat16)
    for script in scripts:
        sys.path.insert(0, str(Path(script).parent))
        dapo = importlib.import_module(Path(script).stem)
        watch(dapo, "token_log_probs", torch.float32)
        for folder in paths[len(scripts) :]:
            try:
                examine(dapo, folder, fake)
            except (Exception, SystemExit) as error:
                lines = [frame.line for frame in traceback.extract_tb(error.__traceback__) if frame.filename == script]
                complaint = f"{dapo.shorten(str(error), 300)} at: {lines[-1]}"
                found.append([Path(script).stem, Path(folder).name, complaint])
    print(json.dumps(found))


def watch(owner, name, dtype):
    """Has a function raise where it gives tensors of another type, or not on the GPU."""
    function = getattr(owner, name)

    def watched(*args, **kwargs):
        result = function(*args, **kwargs)
        look(f"{owner.__name__}.{name}", result, dtype)
        return result

    setattr(owner, name, watched)


def look(name, tensors, dtype):
    for tensor in tree_leaves(tensors):
        if (tensor.dtype, tensor.device.type) != (dtype, "cuda"):
            raise TypeError(f"{name} gives {tensor.dtype} on {tensor.device}, and not {dtype} on cuda")


def examine(dapo, folder, fake):
    """Evaluates and trains; then resumes with GRADIENT_CHECKPOINTING, and trains with all terms of the loss; then, if
    peft is there, the same with adapters, for one model without experts and one with."""
    vars(dapo).update(
        DEVICE="cuda", REWARD=lambda solution_str, **others: 1.0, USE_DYNAMIC_SAMPLING=False, BATCH_SIZE=2,
        GROUP_SIZE=2, MINI_BATCHES=1, DAPO_EPOCHS=1, MAX_RESPONSE_LENGTH=2, OVERLONG_BUFFER_LENGTH=1, DECODE_STAGE=1,
    )  # fmt: skip

    def load(**constants):
        vars(dapo).update(constants)
        model, tokenizer = dapo.load_model(folder)
        fake.tokens = itertools.cycle([20, 21, *model.generation_config.eos_token_id])
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        optimizer.register_step_post_hook(look_at_optimizer)
        return model, tokenizer, optimizer

    model, tokenizer, optimizer = load(GRADIENT_CHECKPOINTING=False, KL_COEF=0.0, ENTROPY_COEF=0.0)
    questions = [question(length=length) for length in (4, 5)]
    with fake:
        dapo.evaluate(model, tokenizer, questions)
        dapo.train_step(model, None, tokenizer, optimizer, iter(questions), 1)
        state = dict(model=model.state_dict(), optimizer=optimizer.state_dict(), constants={}, finished=False)
        state = tree_map_only(torch.Tensor, torch.Tensor.cpu, state | dict(step=1, drawn=2, rests=[]))
    resumed, _, optimizer = load(GRADIENT_CHECKPOINTING=True, KL_COEF=0.1, ENTROPY_COEF=0.1)
    run = SimpleNamespace(model=resumed, optimizer=optimizer, constants={}, questions=[], left=lambda *_: 1)
    torch.save({}, f"{folder}/checkpoint.pt")
    torch.load = lambda *_, **__: state
    with fake:
        assert not dapo.Run.restore(run, f"{folder}/checkpoint.pt")
        dapo.train_step(resumed, model, tokenizer, optimizer, iter(questions), 2)
    if importlib.util.find_spec("peft") and Path(folder).name.startswith(("qwen2", "mixtral")):
        move, transformers.PreTrainedModel.to = transformers.PreTrainedModel.to, lambda model, device: model
        model, tokenizer, _ = load(LORA_RANK=2)
        dapo.add_adapters(model)  # before it is moved: peft could not move an adapter to a GPU that is not there
        transformers.PreTrainedModel.to = move
        model.to("cuda")
        with fake:
            optimizer = torch.optim.AdamW(model.parameters(), fused=True)
            optimizer.register_step_post_hook(look_at_optimizer)
            dapo.train_step(model, None, tokenizer, optimizer, iter(questions), 1)
        trained = [weights for weights in model.parameters() if weights.requires_grad]
        look("base weights", [weights for weights in model.parameters() if not weights.requires_grad], torch.bfloat16)
        assert trained and optimizer.state.keys() == {*trained}
        dapo.LORA_RANK = 0


def look_at_optimizer(optimizer, *_):
    for weights, moments in optimizer.state.items():
        look("AdamW", [weights, weights.grad, moments], torch.float32)

"""What only a CUDA GPU can show; skipped where there is none. All other tests are for the CPU, and see no GPU.

Each check is a process of its own, with memory and settings of its own: python tests/test_cuda.py resuming FOLDER
"""

import contextlib
import ctypes
import gc
import io
import itertools
import math
import os
import sqlite3
import subprocess
import sys
from functools import partial
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import dapo  # noqa: E402, I001  (first: pyarrow has to come before torch on Windows)
import pytest  # noqa: E402
import torch  # noqa: E402
from filelock import FileLock  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, Qwen2Config  # noqa: E402

from tools import chat, evaluate, memory  # noqa: E402

DEVICE = "cuda"
GIB = 2**30
SMALL = dict(BATCH_SIZE=8, MINI_BATCHES=2, DAPO_EPOCHS=1, EVAL_EVERY=2)
CARD = 21.5 * GIB  # usable memory of a GPU of 24 GB with ECC on


def said_by(main, *arguments, status=0):
    """What a program says, after which it has to end with this exit status."""
    said, ended = io.TextIOWrapper(io.BytesIO(), encoding="utf-8"), 0
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            main([*arguments])
        except SystemExit as stop:
            ended = stop.code
    said.seek(0)
    print(*arguments, text := said.read(), sep="\n")
    assert ended == status
    return text


def train(folder, status=0, **constants):
    """python dapo.py, which trains the toy."""
    constants = {"DEVICE": DEVICE, "OUTPUT_DIR": folder} | constants
    return said_by(dapo.main, *(f"--{name}={value}" for name, value in constants.items()), status=status)


def rows(folder, query):
    with contextlib.closing(sqlite3.connect(folder / "run.db")) as db:
        return db.execute(query).fetchall()


def check_training(folder):
    """Three steps of the toy on the device that dapo.py chooses, with all else as shipped."""
    train(folder, DEVICE="", NUM_STEPS=3)
    ((device,),) = rows(folder, "SELECT value FROM constants WHERE name = 'device'")
    metrics = rows(folder, "SELECT name, value FROM metrics")
    assert device.startswith(DEVICE)
    assert all(value is not None and math.isfinite(value) for _, value in metrics), metrics
    accuracies = [value for name, value in metrics if name in ("accuracy", "eval/accuracy")]
    assert len(accuracies) == 3 + 3 and all(0 <= value <= 1 for value in accuracies)
    peaks = [value for name, value in metrics if name == "memory/peak_gib"]
    assert len(peaks) == 3 and all(0 < peak <= torch.cuda.max_memory_allocated() / GIB for peak in peaks)


def toy_and_prompts():
    dapo.DEVICE = DEVICE
    model, tokenizer = dapo.load_model("toy")
    return model, tokenizer, [asked.prompt for asked in dapo.load_questions(dapo.EVAL_DATASETS, tokenizer)[:64]]


def check_sampled_as_scored(folder):
    """In bf16 and in fp32; on a CPU the largest gaps are 0.12 and 1e-5. A repetition penalty that leaks is refused."""
    model, _, prompts = toy_and_prompts()
    eights = [prompts[first : first + 8] for first in range(0, len(prompts), 8)]  # as many as are looked at in a call
    rough = torch.cat([dapo.sampling_gap(model, eight) for eight in eights])
    dapo.autocast = contextlib.nullcontext  # fp32; torch uses no TF32 unless it is asked to
    close = torch.cat([dapo.sampling_gap(model, eight) for eight in eights])
    print([(len(gaps), gaps.mean(), gaps.max()) for gaps in (rough, close)])
    assert rough.mean() < 0.01 and rough.max() < 0.5 and close.max() < 1e-3
    assert close.mean() < rough.mean() or not torch.cuda.is_bf16_supported(including_emulation=False)
    model.generation_config.repetition_penalty = 1.5
    assert "cannot be trained here" in said_by(partial(dapo.sampling_gap, model), *eights[0], status=2)


def check_greedy(folder):
    """Greedy responses are those of plain generate, which reads one prompt at a time, without padding."""
    dapo.autocast = contextlib.nullcontext
    model, tokenizer, prompts = toy_and_prompts()
    model.generation_config.eos_token_id = tokenizer("7")["input_ids"]  # after its own end token it goes on at length
    responses = dapo.sample_tokens(model, prompts, greedy=True)
    assert all(len({len(tokens) for tokens in many}) > 10 for many in (prompts, responses))
    for prompt, response in zip(prompts, responses, strict=True):
        ids = prompt[None].to(model.device)
        plain = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=96)
        assert response.tolist() == plain[0, len(prompt) :].tolist()


def check_evaluation_and_chat(folder):
    """The toy is right as often as on the CPU, or nearly, as bf16 rounds; and it answers what is typed."""
    reports = [said_by(evaluate.main, "toy", f"--DEVICE={device}") for device in ("cpu", DEVICE)]
    cpu, gpu = (float(report.split("  accuracy ")[1].split()[0]) for report in reports)
    assert cpu > 0.1 and abs(cpu - gpu) < 0.08
    sys.stdin = io.TextIOWrapper(io.BytesIO(b"Tom has 3 apples.\n"))
    assert "[answer: " in said_by(chat.main, "toy", f"--DEVICE={DEVICE}")


def check_resuming(folder):
    """To the last bit: torch's deterministic algorithms add up in a fixed order, where others use atomics."""
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.use_deterministic_algorithms(True)
    for run, steps in ("unbroken", 4), ("stopped", 2), ("stopped", 4):
        said = train(folder / run, **SMALL, NUM_STEPS=steps)
    assert f"resuming the run in {folder / 'stopped'} after step 2" in said
    for expected, found in zip(outcome(folder / "unbroken"), outcome(folder / "stopped"), strict=True):
        assert len(expected) > 60 and found == expected


def outcome(run):
    """Metrics, but for what clocks and memory say, responses, and weights."""
    metrics = rows(run, "SELECT step, name, value FROM metrics ORDER BY step, name")
    metrics = [row for row in metrics if not row[1].startswith(("time/", "tokens_per_second", "memory/"))]
    return metrics, rows(run, "SELECT * FROM responses"), (run / "step_4/model.safetensors").read_bytes()


def check_changing_the_device(folder):
    """A checkpoint that a GPU has written resumes on the CPU, and the other way round."""
    for step, device in enumerate([DEVICE, "cpu", DEVICE]):
        said = train(folder, **SMALL, NUM_STEPS=step + 1, DEVICE=device)
        assert (f"resuming the run in {folder} after step {step}" in said) == (step > 0)
    devices = rows(folder, "SELECT step, value FROM constants WHERE name = 'device' ORDER BY step")
    assert [(step, value.partition(":")[0]) for step, value in devices] == [(0, DEVICE), (1, "cpu"), (2, DEVICE)]
    norms = rows(folder, "SELECT value FROM metrics WHERE name = 'grad_norm'")
    assert len(norms) == 3 and all(0 < norm < math.inf for (norm,) in norms)


def check_lora(folder):
    """Frozen weights in bf16, adapters in fp32, and KL without a second model; resumed, and saved as a whole model."""
    for step in (1, 2):
        said = train(folder, **SMALL, NUM_STEPS=step, LORA_RANK=8, LEARNING_RATE=2e-4, KL_COEF=0.01)
    assert f"resuming the run in {folder} after step 1" in said
    kl = [value for (value,) in rows(folder, "SELECT value FROM metrics WHERE name = 'kl' ORDER BY step")]
    assert len(kl) == 2 and all(0 <= value < 1 for value in kl)
    weights = load_file(folder / "step_2/model.safetensors")
    frozen = torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    assert weights["model.norm.weight"].dtype == frozen
    assert weights["model.layers.0.self_attn.q_proj.weight"].dtype == torch.float32
    adapters = load_file(folder / "step_2/adapters/adapter_model.safetensors")
    assert len(adapters) == 2 * 4 * 7 and all(part.dtype == torch.float32 and part.any() for part in adapters.values())
    (sampled,) = rows(folder, "SELECT value FROM metrics WHERE name = 'eval/accuracy' AND step = 2")
    merged = float(said_by(evaluate.main, str(folder), f"--DEVICE={DEVICE}").split("  accuracy ")[1].split()[0])
    assert abs(sampled[0] - merged) < 0.08


def peak(most=torch.cuda.max_memory_allocated):
    """The most memory allocated (or reserved) at a time since the last call, in bytes."""
    most = most()
    torch.cuda.reset_peak_memory_stats()
    return most


def run_out(folder, constant, large):
    """With a limit midway between what runs take with a small value of the constant and with the large one."""
    small = dict(
        GENERATION_BATCH=128, MICRO_BATCH_TOKENS=1024, BATCH_SIZE=64, GROUP_SIZE=32, MINI_BATCHES=1, DAPO_EPOCHS=1,
        USE_DYNAMIC_SAMPLING=False, EVAL_EVERY=9, CHECKPOINT_EVERY=1,
    )  # fmt: skip
    peaks = []
    for run, changed in ("run", {}), ("large", {constant: large}):
        train(folder / run, **small | changed, NUM_STEPS=1)
        peaks.append(peak(torch.cuda.max_memory_reserved))  # which is what the limit is for
        gc.collect()
        torch.cuda.empty_cache()
    print("MiB:", [peak >> 20 for peak in peaks])
    assert 1.5 * peaks[0] < peaks[1]
    torch.cuda.set_per_process_memory_fraction(sum(peaks) / 2 / torch.cuda.get_device_properties(0).total_memory)
    said = train(folder / "run", status=2, **small | changed, NUM_STEPS=2)
    error = f"error: out of memory: lower {constant}, which is {large};"
    assert said.splitlines()[-1].startswith(error) and "Traceback" not in said
    gc.collect()
    torch.cuda.empty_cache()
    assert f"resuming the run in {folder / 'run'} after step 1" in train(folder / "run", **small, NUM_STEPS=2)


check_memory_runs_out_in_sampling = partial(run_out, constant="GENERATION_BATCH", large=2048)
check_memory_runs_out_in_the_update = partial(run_out, constant="MICRO_BATCH_TOKENS", large=16384)


def check_memory_of_the_gsm8k_recipe(folder):
    """One step at full size with the longest responses: it fits, and takes about what tools.memory says."""
    torch.cuda.set_per_process_memory_fraction((CARD - GIB / 2) / torch.cuda.get_device_properties(0).total_memory)
    dapo.read_command_line(["recipes/gsm8k.py", "--BATCH_SIZE=32", "--MINI_BATCHES=2", "--USE_DYNAMIC_SAMPLING=False"])
    coin = itertools.cycle([1.0, 0.0, 0.0])
    dapo.REWARD = lambda **response: {"score": 1.0, "acc": next(coin)}
    config = Qwen2Config(  # of Qwen2.5-0.5B
        hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2,
        vocab_size=151_936, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device(DEVICE):
        model = AutoModelForCausalLM.from_config(config).eval()
    model.generation_config = GenerationConfig(eos_token_id=[config.vocab_size], pad_token_id=0)  # it never ends
    optimizer = torch.optim.AdamW(model.parameters(), 1e-6, fused=True)
    for weights in model.parameters():
        weights.grad = torch.zeros_like(weights)
    optimizer.step()  # makes the moments, which only the first step of a run begins without
    optimizer.zero_grad()
    peaks, update = [], dapo.update_policy
    dapo.update_policy = lambda *arguments: (peaks.append(peak()), update(*arguments))[1]
    peak()
    asked = [dapo.Question("q", "1", "test", torch.arange(dapo.MAX_PROMPT_LENGTH)) for _ in range(dapo.BATCH_SIZE)]
    _, sampled = dapo.train_step(model, None, AutoTokenizer.from_pretrained("toy"), optimizer, iter(asked), 1)
    peaks.append(peak())
    assert [len(r.tokens) for group in sampled for r in group] == [dapo.MAX_RESPONSE_LENGTH] * dapo.GENERATION_BATCH
    half = torch.cuda.is_bf16_supported(including_emulation=False)
    estimates = memory.total(memory.memory(memory.measure(config, half)))
    ratios = [estimate / peak for estimate, peak in zip(estimates, peaks, strict=True)]
    print("GiB in sampling, in the update:", [peak / GIB for peak in peaks], "estimate / peak:", ratios)
    assert all(0.85 < ratio < 1.3 for ratio in ratios)


CHECKS = {name.removeprefix("check_"): check for name, check in globals().items() if name.startswith("check_")}


@pytest.fixture(scope="module")
def gpu(tmp_path_factory):
    """The environment of a process that sees the GPUs, the memory of the first, and a lock: one check at a time."""
    from conftest import GPUS  # which a check must not import, for it hides them

    if not torch.version.cuda:
        pytest.skip("this torch is not for CUDA")
    try:
        ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
    except OSError:
        pytest.skip("no CUDA driver is installed")
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    environment |= {} if GPUS is None else {"CUDA_VISIBLE_DEVICES": GPUS}
    lock = FileLock(tmp_path_factory.getbasetemp().parent / "gpu.lock")
    command = [sys.executable, "-c", "import torch; print(torch.cuda.get_device_properties(0).total_memory)"]
    with lock:
        asked = subprocess.run(command, env=environment, capture_output=True, text=True)
    if asked.returncode:
        pytest.skip(f"torch finds no CUDA GPU: {asked.stderr.strip()[-200:]}")
    assert not torch.cuda.is_available()  # in this process, and so in all other tests
    return environment, int(asked.stdout), lock


@pytest.mark.parametrize("check", CHECKS)
def test_on_a_gpu(check, gpu, tmp_path):
    environment, memory, lock = gpu
    if check == "lora":
        pytest.importorskip("peft", reason="LoRA needs peft (pip install peft)")
    if "recipe" in check:
        environment = environment | {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}  # as the recipe advises
        if memory < CARD:
            pytest.skip(f"the recipe is for a GPU of 24 GB, and this one has {memory / GIB:.1f} GiB")
    with lock:
        command = [sys.executable, __file__, check, str(tmp_path)]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


if __name__ == "__main__":
    CHECKS[sys.argv[1]](Path(sys.argv[2]))

"""verl trains the toy on CPUs from what tools/verl.py writes. verl needs an older transformers than we do, so that this
test runs in the project's environment, and verl in the one that VERL_PYTHON names: docs/scaling.md says how."""

import collections
import contextlib
import json
import math
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from reward import compute_score, overlong_penalty

PYTHON = os.environ.get("VERL_PYTHON", sys.executable)
TIMEOUT = 1200  # seconds; about 100 on two idle cores
CONSTANTS = dict(
    NUM_STEPS=2, BATCH_SIZE=4, GROUP_SIZE=8, MINI_BATCHES=2, WARMUP_STEPS=0, MAX_RESPONSE_LENGTH=24,
    OVERLONG_BUFFER_LENGTH=20, OVERLONG_PENALTY_FACTOR=0.7,
)  # fmt: skip
LORA = dict(LORA_RANK=4, LORA_ALPHA=16.0, LEARNING_RATE=2e-4, KL_COEF=1e-3, CHAT_TEMPLATE_KWARGS={"plain": True})
HAS_VERL = "import importlib.util, sys; sys.exit(importlib.util.find_spec('verl') is None)"


def run(*command, timeout=None):
    """A command's output; with it, its whole process group ends."""
    words = dict(cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
    process = subprocess.Popen([*map(str, command)], **words)
    try:
        output, _ = process.communicate(timeout=timeout)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
    assert process.returncode == 0, output[-20_000:]
    return output


@pytest.mark.skipif(
    not shutil.which(PYTHON) or subprocess.run([PYTHON, "-c", HAS_VERL]).returncode != 0,
    reason="verl is not installed: docs/scaling.md makes an environment for it, whose Python VERL_PYTHON then names",
)
@pytest.mark.parametrize("others", [{}, LORA])
def test_verl_trains_the_toy(others, tmp_path):
    """All of its weights, or adapters; these with a chat template that asks otherwise without its switch."""
    shutil.copytree(ROOT / "toy", model := tmp_path / "toy")
    if others:
        pytest.importorskip("peft", reason="peft is not installed: pip install peft")
        with (model / "chat_template.jinja").open("a") as file:
            file.write("{% if not plain %}####{% endif %}")
    constants = {"LEARNING_RATE": 2e-5, "CHAT_TEMPLATE_KWARGS": {}, "MODEL": model} | CONSTANTS | others
    folder, settings = tmp_path / "verl run=1", [f"--{name}={value}" for name, value in constants.items()]
    run(sys.executable, "-m", "tools.verl", *settings, "--out", folder)
    more = f'trainer.rollout_data_dir="{folder}/responses"'
    output = run(PYTHON, ROOT / "tests" / "verl_cpu.py", folder, more, timeout=TIMEOUT)

    (file,) = folder.glob("metrics_*.jsonl")
    metrics = {line["step"]: line["data"] for line in map(json.loads, file.open())}
    assert list(metrics) == [0, 1, 2]
    for step in 1, 2:
        assert metrics[step]["training/rollout_probs_diff_max"] < 1e-4
        assert metrics[step]["actor/lr"] == pytest.approx(constants["LEARNING_RATE"])
        assert metrics[step]["actor/grad_norm"] > 0
        check_responses(folder / "responses" / f"{step}.jsonl", metrics[step])

    actor = folder / "outputs" / "dapo" / "global_step_2" / "actor"
    saved = merged(model, actor, tmp_path / "adapters") if others else actor / "huggingface"
    before, after = (load_file(path / "model.safetensors") for path in (model, saved))
    assert before.keys() == after.keys()
    moved = {name: (after[name].float() - before[name]).abs().max().item() for name in before}
    kept = [name for name in before if others and not name.endswith("_proj.weight")]
    limit = 1e-2 if others else 1e-3
    assert all(moved[name] == 0 if name in kept else 0 < moved[name] < limit for name in before), moved

    run(sys.executable, "-m", "tools.verl_metrics", folder)
    with contextlib.closing(sqlite3.connect(folder / "run.db")) as db:
        accuracy = dict(db.execute("SELECT step, value FROM metrics WHERE name = 'eval/accuracy'"))
    switches = f"--CHAT_TEMPLATE_KWARGS={constants['CHAT_TEMPLATE_KWARGS']}"
    output = run(sys.executable, "-m", "tools.evaluate", f"--MODEL={saved}", switches)
    shown = float(re.search(r"accuracy +([01]\.\d+)", output)[1])
    assert accuracy.keys() == {0, 2} and shown == pytest.approx(accuracy[2], abs=0.02)


def merged(model, actor, folder):
    """A checkpoint with adapters as a model, as docs/scaling.md says."""
    run(PYTHON, "-m", "verl.model_merger", "merge", "--backend", "fsdp", "--local_dir", actor, "--target_dir", folder)
    from peft import PeftModel

    whole = AutoModelForCausalLM.from_pretrained(model, dtype="float32")
    PeftModel.from_pretrained(whole, folder / "lora_adapter").merge_and_unload().save_pretrained(folder / "merged")
    AutoTokenizer.from_pretrained(model).save_pretrained(folder / "merged")
    return folder / "merged"


def check_responses(file, metrics):
    """The rewards that verl trained on are ours, and each group has right and wrong responses."""
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "toy")
    rows, groups = [json.loads(line) for line in file.open()], collections.defaultdict(list)
    assert len(rows) == 4 * 8
    as_expected = []
    for row in rows:
        verdict = compute_score("toy", row["output"], row["gts"])
        groups[row["uid"].split("_")[0]].append(verdict["acc"])
        # The text does not tell the tokens for sure: a model may draw them in other, smaller pieces.
        length = min(24, len(tokenizer(row["output"])["input_ids"]) + 1)
        most = verdict["score"] + overlong_penalty(length, 24, 20, 0.7)
        as_expected.append(math.isclose(row["score"], most, abs_tol=1e-6))
        assert verdict["score"] - 0.7 - 1e-6 <= row["score"] <= most + 1e-6, row
    assert sum(as_expected) >= 28, as_expected
    assert {row["score"] for row in rows} - {-1, 1}, "none is penalized"
    assert len(groups) == 4 and all(len(set(group)) == 2 and len(group) == 8 for group in groups.values()), groups
    rewards = torch.tensor([row["score"] for row in rows])
    assert metrics["critic/score/mean"] == pytest.approx(rewards.mean().item(), abs=1e-6)

"""A run never mixes two settings: with another one it is a new run, and what may change is on record."""

import os
import platform
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from conftest import ROOT, load, rows

import dapo

pytestmark = pytest.mark.usefixtures("no_pictures")


@pytest.fixture
def settings(settings):
    return [*settings, "--EVAL_EVERY=100", "--CHECKPOINT_EVERY=1"]


@pytest.fixture
def interrupted(main, settings, parity, monkeypatch, tmp_path):
    """The folder of a run of two steps that Ctrl-C has stopped after the first."""
    train_step, sent = dapo.train_step, []

    def interrupted_step(*parts):
        if not sent:  # a second one would end the tests
            sent.append(os.kill(os.getpid(), signal.SIGINT))
        return train_step(*parts)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(dapo, "train_step", interrupted_step)
        main(settings)
    assert stop.value.code == 128 + signal.SIGINT
    assert recorded(tmp_path / "run") == [1]
    return tmp_path / "run"


def recorded(folder):
    """The steps that were trained."""
    return [step for (step,) in rows(folder, "SELECT step FROM metrics WHERE name = 'accuracy' ORDER BY step")]


CHANGES = {
    "LEARNING_RATE": ("2e-05", "0.001"),
    "CLIP_RANGE_HIGH": ("0.28", "0.3"),
    "SEED": ("0", "7"),
    "REST_EPOCHS": ("0", "1"),
    "PROMPT_TEMPLATE": ("'{question}'", "'Now: {question}'"),
    "WARMUP_STEPS": ("5", "6"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_constant_begins_a_new_run(name, main, settings, interrupted, tmp_path, capsys):
    old, new = CHANGES[name]
    before = rows(interrupted, "SELECT * FROM metrics"), rows(interrupted, "SELECT * FROM responses")
    capsys.readouterr()
    main([*settings, f"--{name}={new.strip(chr(39))}"])
    said, aside = capsys.readouterr().out, tmp_path / "run_1"
    (line,) = [line for line in said.splitlines() if str(aside) in line]
    assert f"{name} was {old}, is now {new}" in line
    assert f"OUTPUT_DIR={aside}" in line and f"MODEL={aside}" in line
    assert "resuming" not in said
    assert (rows(aside, "SELECT * FROM metrics"), rows(aside, "SELECT * FROM responses")) == before
    assert recorded(interrupted) == [1, 2]
    assert rows(interrupted, "SELECT step FROM metrics WHERE name = 'eval/accuracy'") == [(0,), (2,)]
    in_force = f"SELECT step, value FROM constants WHERE name = '{name}'"
    assert rows(interrupted, in_force) == [(0, new)] and rows(aside, in_force) == [(0, old)]


def test_the_line_says_how_to_return_and_how_to_go_on_from_its_model(main, settings, interrupted, tmp_path, capsys):
    main([*settings, "--LEARNING_RATE=0.001"])
    aside = f"{tmp_path / 'run_1'}"
    capsys.readouterr()
    main([*settings, f"--OUTPUT_DIR={aside}"])  # the change is undone
    assert f"resuming the run in {aside} after step 1" in capsys.readouterr().out
    assert recorded(tmp_path / "run_1") == [1, 2]

    main([*settings, f"--MODEL={aside}", f"--OUTPUT_DIR={tmp_path / 'next'}", "--NUM_STEPS=1", "--LEARNING_RATE=1e-9"])
    trained, started = load(tmp_path / "next/step_1")[0], load(tmp_path / "run_1/step_2")[0]
    for one, other in zip(trained.parameters(), started.parameters()):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=0)


def test_several_changed_constants_are_all_named(main, settings, interrupted, capsys):
    main([*settings, "--LEARNING_RATE=0.001", "--KL_COEF=0.5", "--GENERATION_BATCH=7"])
    said = capsys.readouterr().out
    assert "LEARNING_RATE was 2e-05, is now 0.001" in said and "KL_COEF was 0.0, is now 0.5" in said
    assert "GENERATION_BATCH" not in said


FREE = {
    "NUM_STEPS": 3,
    "EVAL_EVERY": 1,
    "SAVE_EVERY": 2,
    "CHECKPOINT_EVERY": 4,
    "GENERATION_BATCH": 4,
    "MICRO_BATCH_TOKENS": 64,
    "LOGITS_CHUNK": 500,
    "GRADIENT_CHECKPOINTING": True,
    "RECORDED_TOKENS": 100,
}


def test_length_evaluation_saving_and_memory_may_change_and_it_resumes(main, settings, interrupted, tmp_path, capsys):
    main([*settings, *(f"--{name}={value}" for name, value in FREE.items())])
    assert "after step 1" in capsys.readouterr().out
    assert recorded(interrupted) == [1, 2, 3] and not (tmp_path / "run_1").exists()
    assert (interrupted / "step_2").is_dir() and (interrupted / "step_3").is_dir()
    for name, value in FREE.items():
        (_, first), (step, later) = rows(interrupted, f"SELECT step, value FROM constants WHERE name = '{name}'")
        assert (step, later) == (1, repr(value)) and first != later


def test_all_other_constants_are_settings(main):
    """A constant that is added later counts as a setting unless it is named here."""
    places = {"OUTPUT_DIR", "RESUME", "DEVICE", "NUM_EPOCHS"}
    assert set(dapo.FREE) == set(FREE) | places and set(dapo.FREE) < set(dapo.CONSTANTS)


def test_a_run_that_is_to_be_no_longer_ends_where_it_is(main, settings, interrupted, tmp_path):
    main([*settings, "--NUM_STEPS=1"])
    assert recorded(interrupted) == [1] and (interrupted / "step_1").is_dir()
    assert [step for (step,) in rows(interrupted, "SELECT step FROM metrics WHERE name = 'eval/accuracy'")] == [0, 1]
    assert not (tmp_path / "run_1").exists()


def test_another_script_is_another_run(main, settings, interrupted, monkeypatch, tmp_path, capsys):
    """grpo.py with the constants of dapo.py: they could differ in anything."""
    monkeypatch.setattr(sys.modules["__main__"], "__file__", str(ROOT / "grpo.py"))
    main(settings)
    said = capsys.readouterr().out
    assert "dapo.py" in said and "grpo.py" in said and f"{tmp_path / 'run_1'}" in said
    assert recorded(interrupted) == [1, 2] and recorded(tmp_path / "run_1") == [1]
    assert (interrupted / "step_2/train_script.py").read_text() == (ROOT / "grpo.py").read_text()
    assert (interrupted / "step_2/dapo.py").read_text() == (ROOT / "dapo.py").read_text()


def test_other_questions_are_another_run(main, settings, interrupted, questions, tmp_path, capsys):
    """Although TRAIN_DATASETS says the same: the file has other rows now."""
    path = Path(questions["path"])
    whole = path.read_bytes()
    rows_now = [{"question": "1 + 1?", "answer": "2"}, {"question": "2 + 2?", "answer": "4"}]
    try:
        dapo.pyarrow.parquet.write_table(dapo.pyarrow.Table.from_pylist(rows_now), path)
        main([*settings, "--BATCH_SIZE=2"])
    finally:
        path.write_bytes(whole)
    assert "checksum" in capsys.readouterr().out
    assert recorded(tmp_path / "run_1") == [1]


def test_without_resume_it_begins_anew(main, settings, interrupted, tmp_path, capsys):
    main([*settings, "--RESUME=False"])
    said = capsys.readouterr().out
    assert "RESUME is False" in said and "resuming" not in said
    assert recorded(interrupted) == [1, 2] and recorded(tmp_path / "run_1") == [1]


def test_edited_source_is_said_and_recorded_and_resumes(main, settings, tmp_path, capsys):
    judge, text = tmp_path / "mine.py", "def score(solution_str, **others):\n    return float(len(solution_str) % 2)\n"
    judge.write_text(text)
    settings += [f"--REWARD={judge}:score"]
    main([*settings, "--NUM_STEPS=1"])
    main([*settings, "--NUM_STEPS=2"])
    assert "source of" not in capsys.readouterr().out
    judge.write_text(text + "# a remark\n")
    main([*settings, "--NUM_STEPS=3"])
    said = capsys.readouterr().out
    assert "source of mine.py" in said and "after step 2" in said and "source of dapo.py" not in said
    found = rows(tmp_path / "run", "SELECT step, value FROM constants WHERE name = 'source of mine.py' ORDER BY step")
    assert found == [(0, text), (2, text + "# a remark\n")]
    assert (tmp_path / "run/step_3/mine.py").read_text() == text + "# a remark\n"


def test_what_is_in_force_is_recorded_once(main, settings, parity, tmp_path):
    """Constants, versions, device, and source, with the step that they hold from; later only what has changed."""
    main([*settings, "--NUM_STEPS=1"])
    found = {name: (step, value) for step, name, value in rows(tmp_path / "run", "SELECT * FROM constants")}
    assert set(dapo.CONSTANTS) < set(found) and {step for step, _ in found.values()} == {0}
    for name in dapo.CONSTANTS:
        assert name == "REWARD" or found[name][1] == repr(getattr(dapo, name))
    assert found["REWARD"][1].startswith("'conftest.py:")
    assert found["source of dapo.py"][1] == (ROOT / "dapo.py").read_text()
    assert found["source of reward.py"][1] == (ROOT / "reward.py").read_text()
    assert found["torch"][1] == torch.__version__ and found["transformers"][1] == transformers.__version__
    assert found["python"][1].startswith(platform.python_version()) and found["device"][1] == "cpu"

    main([*settings, "--NUM_STEPS=2"])
    assert rows(tmp_path / "run", "SELECT step, name, value FROM constants WHERE step > 0") == [(1, "NUM_STEPS", "2")]


def test_a_device_may_change_and_is_on_record(main, settings, interrupted, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: None)  # a Mac's GPU cannot be hidden
    main([*settings, "--DEVICE="])
    assert recorded(interrupted) == [1, 2]
    assert (1, "''") in rows(interrupted, "SELECT step, value FROM constants WHERE name = 'DEVICE'")


def test_a_gpu_that_cannot_be_used_is_refused(main, settings, monkeypatch, capsys):
    """As torch for CUDA has it, where there is no driver."""
    built_for = lambda check_available=False: None if check_available else "cuda"  # noqa: E731
    monkeypatch.setattr(torch.accelerator, "current_accelerator", built_for)
    with pytest.raises(SystemExit) as stop:
        main([*settings, "--DEVICE=cuda"])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: DEVICE=cuda is out of range") and error.count("\n") == 1


SPY = """
import os, sys

class Finder:
    def find_spec(name, path, target=None):
        if name == "torch":
            print(os.environ.get("GOMP_SPINCOUNT"))

sys.meta_path.insert(0, Finder)
import dapo
"""


@pytest.mark.parametrize("own", [None, "5"])
def test_when_torch_is_imported_threads_are_told_not_to_keep_a_core_while_they_wait(own):
    environment = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
    environment |= {"GOMP_SPINCOUNT": own} if own else {}
    said = subprocess.run([sys.executable, "-c", SPY], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert said.stdout.split()[0] == (own or "1000"), said.stderr

"""Whole runs by the command line, on a tiny random model and a few questions: what a run leaves, and what it says."""

import re
import runpy
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, load, rows
from PIL import Image

import dapo

METRICS = """
reward/mean accuracy response_length/mean response_length/max truncated_fraction entropy policy_loss entropy_loss kl
clip_fraction/low clip_fraction/high grad_norm learning_rate groups/all_correct groups/all_wrong groups_trained
groups/with_gradient first_ratio_gap dynamic_resample_rate generation_batches skipped_updates time/generate time/update
time/step tokens_per_second memory/peak_gib
""".split()

FILES = "checkpoint.previous.pt checkpoint.pt run.db step_1 step_2 training_metrics.png".split()


def test_a_run_leaves_its_record(main, settings, chance, tmp_path, capsys):
    main([*settings, "--KL_COEF=0.01", "--EVAL_SAMPLES=2", "--SAVE_EVERY=1"])
    run = tmp_path / "run"
    for step in (1, 2):
        found = dict(rows(run, f"SELECT name, value FROM metrics WHERE step = {step}"))
        assert not set(METRICS) - set(found)
        assert all(value is not None and value == value for value in found.values())
        answers = rows(run, f"SELECT accuracy, reward, length, truncated, kept FROM responses WHERE step = {step}")
        assert found["accuracy"] == pytest.approx(sum(row[0] for row in answers) / len(answers))
        assert found["reward/mean"] == pytest.approx(sum(row[1] for row in answers) / len(answers))
        assert found["response_length/mean"] == pytest.approx(sum(row[2] for row in answers) / len(answers))
        assert found["truncated_fraction"] == pytest.approx(sum(row[3] for row in answers) / len(answers))
        assert found["groups_trained"] * 2 == sum(row[4] for row in answers)
        uneven = [one[0] != other[0] for one, other in zip(answers[::2], answers[1::2])]
        assert found["dynamic_resample_rate"] == pytest.approx(1 - sum(uneven) / len(uneven))
        assert found["time/step"] == pytest.approx(found["time/generate"] + found["time/update"], rel=0.1)
    evaluated = rows(run, "SELECT step, name FROM metrics WHERE name LIKE 'eval/%' ORDER BY step, name")
    names = "accuracy avg@2 questions response_length truncated_fraction".split()
    assert evaluated == [(step, f"eval/{name}") for step in (0, 2) for name in names]
    assert [step for (step,) in rows(run, "SELECT step FROM metrics WHERE name = 'sampling_gap/mean'")] == [0, 2]
    picture = Image.open(run / "training_metrics.png")
    assert min(picture.size) > 500 and len(set(picture.convert("L").tobytes())) > 50
    assert sorted(p.name for p in run.iterdir()) == FILES
    said = capsys.readouterr().out
    assert "2 of 12 questions are over MAX_PROMPT_LENGTH" in said and "Tom has 19 apples." in said

    # what made it is saved with it, and its constants are a recipe
    assert (run / "step_2/dapo.py").read_text() == (run / "step_2/train_script.py").read_text()
    for name in ("dapo.py", "reward.py"):
        assert (run / "step_2" / name).read_text() == (ROOT / name).read_text()
    recipe = runpy.run_path(str(run / "step_2/constants.py"))
    assert {name for name in recipe if name.isupper()} == set(dapo.CONSTANTS)
    assert recipe["REWARD"].startswith("conftest.py:")
    assert all(recipe[name] == getattr(dapo, name) for name in dapo.CONSTANTS if name != "REWARD")


def test_weights_move_only_where_there_is_something_to_learn(
    main, settings, chance, set_reward, no_pictures, tmp_path, capsys
):
    main([*settings, "--LEARNING_RATE=0.01"])
    before = load(dapo.MODEL)[0].state_dict()
    after = load(tmp_path / "run/step_2")[0].state_dict()
    assert all((before[name] != after[name]).float().mean() > 0.9 for name in before if "proj" in name)
    capsys.readouterr()

    set_reward(lambda **response: {"score": -1.0, "acc": False, "pred": ""})
    main([*settings, "--LEARNING_RATE=0.01"])
    after = load(tmp_path / "run/step_2")[0].state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    said = capsys.readouterr().out
    assert rows(tmp_path / "run", "SELECT value FROM metrics WHERE name = 'groups/all_wrong'") == [(1.0,), (1.0,)]
    assert rows(tmp_path / "run", "SELECT value FROM metrics WHERE name = 'groups_trained'") == [(0,), (0,)]
    assert re.search(r"^step 1: .*\b0\b.*groups", said, re.MULTILINE)
    assert re.search(r"^step 2: .*\b0\b.*groups", said, re.MULTILINE)


def test_same_seed_same_run_and_evaluation_changes_nothing(main, settings, parity, no_pictures, tmp_path):
    states = []
    for more in ([], ["--EVAL_SAMPLES=3", "--EVAL_EVERY=1"], ["--SEED=1"]):
        main([*settings, *more, f"--OUTPUT_DIR={tmp_path / str(len(states))}"])
        states.append(load(tmp_path / str(len(states)) / "step_2")[0].state_dict())
    assert all(torch.equal(one, other) for one, other in zip(states[0].values(), states[1].values()))
    assert not all(torch.equal(one, other) for one, other in zip(states[0].values(), states[2].values()))


def test_a_finished_run_is_renamed_not_overwritten(main, settings, no_pictures, tmp_path, capsys):
    for _ in range(3):
        main(settings)
    folders = sorted(p.name for p in tmp_path.iterdir() if p.is_dir())
    assert folders == ["run", "run_1", "run_2"]
    assert all((tmp_path / name / "step_2").is_dir() for name in folders)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if f"{tmp_path / 'run_2'}" in line]
    assert "it has finished" in line


def test_without_num_steps_it_goes_through_the_data(main, settings, no_pictures, tmp_path):
    main([*settings, "--NUM_STEPS=None", "--NUM_EPOCHS=2", "--USE_DYNAMIC_SAMPLING=False", "--EVAL_EVERY=5"])
    asked = rows(tmp_path / "run", "SELECT question, COUNT(*) FROM responses GROUP BY question")
    assert len(asked) == 10 and {count for _, count in asked} == {2 * 2}
    assert rows(tmp_path / "run", "SELECT step FROM metrics WHERE name = 'eval/accuracy'") == [(0,), (5,), (7,)]
    assert (tmp_path / "run/epoch_2").is_dir()


@pytest.mark.parametrize(
    "place, constant, value, failure",
    [
        ("new_cache", "GENERATION_BATCH", 1024, torch.OutOfMemoryError("CUDA out of memory.")),
        ("policy_loss", "MICRO_BATCH_TOKENS", 16384, torch.OutOfMemoryError("CUDA out of memory.")),
        ("new_cache", "GENERATION_BATCH", 1024, RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when")),
        ("policy_loss", "MICRO_BATCH_TOKENS", 16384, MemoryError()),
        ("policy_loss", "MICRO_BATCH_TOKENS", 16384, RuntimeError("DefaultCPUAllocator: can't allocate memory: you")),
        ("policy_loss", "MICRO_BATCH_TOKENS", 16384, RuntimeError("DefaultCPUAllocator: not enough memory: you")),
        ("policy_loss", "MICRO_BATCH_TOKENS", 16384, RuntimeError("MPS backend out of memory (MPS allocated: 9 GB")),
        ("policy_loss", "MICRO_BATCH_TOKENS", 16384, RuntimeError("CUDA error: out of memory")),
        ("policy_loss", "MICRO_BATCH_TOKENS", 16384, RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when")),
    ],
)
def test_when_memory_runs_out_it_names_the_constant_to_lower_and_then_resumes(
    place, constant, value, failure, main, settings, chance, no_pictures, monkeypatch, tmp_path, capsys
):
    def out_of_memory(*parts, **others):
        raise failure

    settings += ["--CHECKPOINT_EVERY=1", "--EVAL_EVERY=5"]
    main([*settings, "--NUM_STEPS=1"])
    capsys.readouterr()
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(dapo, place, out_of_memory)
        main(settings)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1
    assert error.startswith("error: ") and f"lower {constant}, which is {value}" in error
    main([*settings, f"--{constant}={value // 2}"])
    assert "resuming the run" in capsys.readouterr().out
    assert (tmp_path / "run/step_2").is_dir() and not (tmp_path / "run_1").exists()


def test_recipes_and_overrides_in_their_order(main, tmp_path):
    (tmp_path / "one.py").write_text("import math\nCLIP_RANGE_HIGH = 0.5\nGROUP_SIZE = 2 * 2\nLEARNING_RATE = 1\n")
    (tmp_path / "two.py").write_text("KL_COEF = 0.25\nCLIP_RANGE_HIGH = 0.6\nother = 5\n")
    words = ["--GROUP_SIZE=6", str(tmp_path / "one.py"), str(tmp_path / "two.py"), "--MODEL=7", "--NUM_STEPS=None"]
    assert dapo.read_command_line(words) == []
    assert (dapo.CLIP_RANGE_HIGH, dapo.GROUP_SIZE, dapo.KL_COEF) == (0.6, 6, 0.25)
    assert dapo.LEARNING_RATE == 1.0 and isinstance(dapo.LEARNING_RATE, float)
    assert (dapo.MODEL, dapo.NUM_STEPS) == ("7", None)


@pytest.mark.parametrize("word", ["-h", "--help"])
def test_help_shows_every_constant_with_its_value_and_comment(word, main, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--GROUP_SIZE=16", word])
    shown = capsys.readouterr().out
    assert stop.value.code in (None, 0) and dapo.__doc__ in shown
    for name in dapo.CONSTANTS:
        line, *_ = [line for line in shown.splitlines() if line.startswith(f"{name} = ")]
        assert "  # " in line, line
    assert "GROUP_SIZE = 8  # responses per question" in shown


def test_two_files_alone_train_and_resume_and_what_they_saved_does_it_again(tmp_path):
    """In an empty folder with the toy, without a terminal, and with warnings of what later libraries will not do."""
    for name in ("dapo.py", "reward.py"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "toy", tmp_path / "toy", ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    (tmp_path / "few.csv").write_text("question,answer\nTom has 3 eggs.,3\nAnn has 4 pens. Ann buys 2.,6\n")
    few = [{"path": "few.csv", "type": "csv", "input": "question", "output": "answer"}]
    small = "BATCH_SIZE=2 GROUP_SIZE=4 MINI_BATCHES=1 MAX_RESPONSE_LENGTH=40 EVAL_EVERY=5 DEVICE=cpu LEARNING_RATE=1e-3"
    small = [f"--EVAL_DATASETS={few}", *(f"--{setting}" for setting in small.split())]

    def python(*words):
        command = [sys.executable, "-W", "error::FutureWarning", "-W", "error::DeprecationWarning", *words]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0 and done.stderr == "", done.stderr  # not even a bar
        return done.stdout

    said = python("dapo.py", *small, "--NUM_STEPS=5")
    for line in (
        r"step 0: eval/accuracy \d",
        r"step 5: accuracy .*  reward/mean .*  entropy ",
        r"step 5: eval/accuracy \d",
    ):
        assert re.search(f"^{line}", said, re.MULTILINE)
    assert "resuming the run in outputs/dapo after step 5" in python("dapo.py", *small, "--NUM_STEPS=6")
    run = tmp_path / "outputs/dapo"
    assert min(Image.open(run / "training_metrics.png").size) > 500
    assert [step for (step,) in rows(run, "SELECT step FROM metrics WHERE name = 'eval/accuracy'")] == [0, 5, 6]

    python("outputs/dapo/step_6/train_script.py", "outputs/dapo/step_6/constants.py", "--OUTPUT_DIR=again")
    weights = [path / "step_6/model.safetensors" for path in (run, tmp_path / "again")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert weights[0].read_bytes() != (tmp_path / "toy/model.safetensors").read_bytes()

"""Metrics in TensorBoard and W&B as well: the same ones, also after a run was broken off."""

import contextlib
import json
import math
import signal
import sqlite3
import sys
from types import SimpleNamespace

import pytest

import dapo


@pytest.fixture
def settings(make_folder, set_reward, monkeypatch, tmp_path):
    monkeypatch.setattr(dapo.record, "draw", lambda folder: None)
    set_reward(lambda solution_str, **others: 2.0 * (len(solution_str) % 2) - 1)
    rows = [{"question": f"Tom has {n} apples.", "answer": str(n)} for n in range(10, 18)]
    (tmp_path / "q.json").write_text("\n".join(map(json.dumps, rows)))
    source = [{"path": str(tmp_path / "q.json"), "type": "json", "input": "question", "output": "answer"}]
    constants = dict(MODEL=make_folder(), TRAIN_DATASETS=source, EVAL_DATASETS=source, OUTPUT_DIR=tmp_path / "run")
    constants |= dict(NUM_STEPS=2, BATCH_SIZE=4, GROUP_SIZE=2, MINI_BATCHES=2, MAX_RESPONSE_LENGTH=8, DEVICE="cpu")
    constants |= dict(OVERLONG_BUFFER_LENGTH=4, CHECKPOINT_EVERY=1, EVAL_EVERY=1)
    return [f"--{name}={value}" for name, value in constants.items()]


def recorded(folder):
    with contextlib.closing(sqlite3.connect(folder / "run.db")) as db:
        return {(step, name): value for step, name, value in db.execute("SELECT step, name, value FROM metrics")}


@pytest.fixture
def wandb(monkeypatch):
    """In the place of W&B, which tests must not reach: the runs begun, each with what was logged, in order."""
    runs = []

    def init(**options):
        run = SimpleNamespace(options=options, logged=[], finished=False)
        run.log = lambda metrics, step: run.logged.append((step, dict(metrics)))
        run.finish = lambda: setattr(run, "finished", True)
        runs.append(run)
        return run

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    return runs


def test_wandb_gets_what_run_db_has(main, settings, wandb, tmp_path):
    main([*settings, "--REPORT_TO=wandb", "--LEARNING_RATE=1e-3"])
    (run,) = wandb
    assert {(step, n): value for step, metrics in run.logged for n, value in metrics.items()} == recorded(
        tmp_path / "run"
    )
    assert [step for step, _ in run.logged] == sorted(step for step, _ in run.logged)  # W&B takes no step back
    assert run.finished and run.options["config"]["LEARNING_RATE"] == 1e-3 and run.options["name"] == "run"


def test_a_run_that_goes_on_is_whole_there(main, settings, wandb, tmp_path, monkeypatch):
    real = dapo.train_step
    calls = iter([real, lambda *args: signal.raise_signal(signal.SIGTERM) or real(*args), real])
    monkeypatch.setattr(dapo, "train_step", lambda *args: next(calls)(*args))
    with pytest.raises(SystemExit):
        main([*settings, "--NUM_STEPS=3", "--REPORT_TO=wandb"])
    main([*settings, "--NUM_STEPS=3", "--REPORT_TO=wandb"])
    broken, whole = wandb
    assert broken.finished and max(step for step, _ in broken.logged) == 2
    logged = {(step, name): value for step, metrics in whole.logged for name, value in metrics.items()}
    assert logged == recorded(tmp_path / "run") and {step for step, _ in logged} == {0, 1, 2, 3}


def test_tensorboard_gets_what_run_db_has(main, settings, tmp_path):
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed: pip install tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for steps in (2, 3):  # the second goes on from the first
        main([*settings, f"--NUM_STEPS={steps}", "--REPORT_TO=tensorboard"])
        events = EventAccumulator(str(tmp_path / "run/tensorboard"))
        events.Reload()
        found = {(event.step, name): event.value for name in events.Tags()["scalars"] for event in events.Scalars(name)}
        expected = recorded(tmp_path / "run")
        assert found.keys() == expected.keys()
        assert all(math.isclose(found[key], expected[key], rel_tol=1e-5, abs_tol=1e-9) for key in found)


def test_they_are_imported_only_when_asked_for(main, settings, monkeypatch, tmp_path, capsys):
    for name in ("wandb", "tensorboard"):
        monkeypatch.setitem(sys.modules, name, None)  # an import fails
    main(settings)
    for name in ("wandb", "tensorboard"):
        with pytest.raises(SystemExit) as end:
            main([*settings, f"--OUTPUT_DIR={tmp_path / name}", f"--REPORT_TO={name}"])
        assert end.value.code == 2 and not (tmp_path / name).exists()
        assert f"REPORT_TO={name}: " in (said := capsys.readouterr().err) and f"pip install {name}" in said
    main(["eval", *settings, "--REPORT_TO=wandb"])  # nothing to mirror


def test_a_mirror_that_fails_does_not_end_a_run(main, settings, wandb, monkeypatch, tmp_path, capsys):
    """Neither while metrics are written, with whatever error, nor when it is closed."""
    init = sys.modules["wandb"].init

    def lost(*args, **kwargs):
        raise ConnectionError("connection lost")

    def failing(**options):
        run = init(**options)
        real, run.finish = run.log, lost
        run.log = lambda metrics, step: lost() if step == 1 else real(metrics, step)
        return run

    monkeypatch.setattr(sys.modules["wandb"], "init", failing)
    main([*settings, "--REPORT_TO=wandb"])
    assert capsys.readouterr().out.count("REPORT_TO=wandb failed, the run goes on without it: connection lost") == 2
    assert {step for step, _ in recorded(tmp_path / "run")} == {0, 1, 2} and (tmp_path / "run/step_2").exists()
    assert [step for step, _ in wandb[0].logged] == [0]


def test_a_mirror_that_cannot_be_opened(main, settings, wandb, monkeypatch, tmp_path, capsys):
    def init(**options):
        raise RuntimeError("No API key configured.\nmore")

    monkeypatch.setattr(sys.modules["wandb"], "init", init)
    with pytest.raises(SystemExit) as end:
        main([*settings, "--REPORT_TO=wandb"])
    assert end.value.code == 2
    assert "REPORT_TO=wandb cannot be written to: No API key configured." in capsys.readouterr().err


def test_a_mirror_that_takes_nothing_of_what_there_is(main, settings, wandb, monkeypatch, capsys):
    """Not even its end, for a run that goes on."""
    main([*settings, "--REPORT_TO=wandb"])
    init = sys.modules["wandb"].init

    def lost(*args, **kwargs):
        raise ConnectionError("connection lost")

    def failing(**options):
        run = init(**options)
        run.log = run.finish = lost
        return run

    monkeypatch.setattr(sys.modules["wandb"], "init", failing)
    with pytest.raises(SystemExit) as end:
        main([*settings, "--NUM_STEPS=3", "--REPORT_TO=wandb"])
    assert end.value.code == 2
    assert "REPORT_TO=wandb cannot be written to: connection lost" in capsys.readouterr().err

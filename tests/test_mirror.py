"""tools.mirror: TensorBoard and W&B get the metrics of run.db, each once, while a run goes on or afterwards."""

import contextlib
import json
import math
import signal
import sqlite3
import subprocess
import sys
from types import SimpleNamespace

import pytest
from conftest import ROOT
from filelock import FileLock

import dapo
from tools import mirror


@pytest.fixture
def settings(make_folder, set_reward, no_pictures, tmp_path):
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


def logged(run):
    """What a run of W&B got. It takes no step back, and here no value twice."""
    values = [((step, name), value) for step, metrics in run.logged for name, value in metrics.items()]
    steps = [step for step, _ in run.logged]
    assert steps == sorted(steps) and len(values) == len(dict(values))
    return dict(values)


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


def write(folder, step, *names):
    """Adds metrics of a step to the run.db in a folder, as a run does; their values do not matter."""
    folder.mkdir(exist_ok=True)
    with contextlib.closing(sqlite3.connect(folder / "run.db")) as db, db:
        db.execute("CREATE TABLE IF NOT EXISTS metrics (step INTEGER, name TEXT, value REAL, PRIMARY KEY (step, name))")
        db.executemany("INSERT INTO metrics VALUES (?, ?, ?)", [(step, name, step + len(name)) for name in names])


def forget(folder, step):
    """Takes back all steps after this one, as a run does that is resumed."""
    with contextlib.closing(sqlite3.connect(folder / "run.db")) as db, db:
        db.execute("DELETE FROM metrics WHERE step > ?", [step])


def test_wandb_gets_what_run_db_has(main, settings, wandb, tmp_path):
    main([*settings, "--LEARNING_RATE=1e-3"])
    mirror.main([str(tmp_path / "run"), "wandb"])
    (run,) = wandb
    assert logged(run) == recorded(tmp_path / "run") and {step for step, _ in run.logged} == {0, 1, 2}
    assert run.finished and run.options["name"] == "run" and run.options["config"].keys() == dapo.CONSTANTS.keys()
    assert run.options["config"]["LEARNING_RATE"] == 1e-3 and run.options["config"]["TRAIN_DATASETS"][0]["path"]


def test_a_resumed_run_is_whole_there(main, settings, wandb, tmp_path, monkeypatch):
    real = dapo.train_step
    calls = iter([real, lambda *args: signal.raise_signal(signal.SIGTERM) or real(*args), real])
    monkeypatch.setattr(dapo, "train_step", lambda *args: next(calls)(*args))
    with pytest.raises(SystemExit):
        main([*settings, "--NUM_STEPS=3"])
    mirror.main([str(tmp_path / "run"), "wandb"])
    main([*settings, "--NUM_STEPS=3"])
    mirror.main([str(tmp_path / "run"), "wandb"])
    broken, whole = wandb
    assert broken.finished and max(step for step, _ in broken.logged) == 2
    assert logged(whole) == recorded(tmp_path / "run") and {step for step, _ in whole.logged} == {0, 1, 2, 3}


def test_tensorboard_gets_what_run_db_has(tmp_path):
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed: pip install tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for step in (1, 2, 3):  # each time it replaces what there was
        write(tmp_path / "run", step, "accuracy", "time/update")
        mirror.main([str(tmp_path / "run"), "tensorboard"])
        events = EventAccumulator(str(tmp_path / "run/tensorboard"))
        events.Reload()
        found = {(event.step, name): event.value for name in events.Tags()["scalars"] for event in events.Scalars(name)}
        expected = recorded(tmp_path / "run")
        assert found.keys() == expected.keys()
        assert all(math.isclose(found[key], expected[key], rel_tol=1e-5, abs_tol=1e-9) for key in found)


def test_it_follows_a_run_until_it_stops(wandb, monkeypatch, tmp_path):
    """What happens between one look and the next; evaluations come after the other metrics of their step."""
    run = tmp_path / "run"
    write(run, 0, "eval/accuracy")
    lock = FileLock(tmp_path / ".run.lock")
    lock.acquire()
    happens = iter(
        [
            lambda: write(run, 1, "accuracy", "entropy"),
            lambda: None,
            lambda: [write(run, 1, "eval/accuracy"), write(run, 2, "accuracy"), write(run, 3, "accuracy")],
            lambda: [forget(run, 1), write(run, 2, "accuracy")],  # killed, and resumed from step 1
            lambda: [write(run, 3, "accuracy", "eval/accuracy"), write(run, 4, "accuracy")],
            lambda: [write(run, 5, "accuracy"), lock.release()],
        ]
    )
    monkeypatch.setattr(mirror.time, "sleep", lambda seconds: next(happens)())
    mirror.main([str(run), "wandb", "--follow"])
    assert next(happens, None) is None and logged(wandb[0]) == recorded(run) and wandb[0].finished
    assert [step for step, _ in wandb[0].logged] == [0, 1, 1, 2, 3, 3, 4, 5]


def test_ctrl_c_ends_it(wandb, monkeypatch, tmp_path):
    write(tmp_path / "run", 1, "accuracy")
    monkeypatch.setattr(mirror.time, "sleep", lambda seconds: signal.raise_signal(signal.SIGINT))
    with FileLock(tmp_path / ".run.lock"):
        mirror.main([str(tmp_path / "run"), "wandb", "--follow"])
    assert wandb[0].finished and logged(wandb[0]) == recorded(tmp_path / "run")


def test_it_sees_that_dapo_is_training(main, settings, monkeypatch, tmp_path):
    seen, real = [], dapo.train_step
    look = lambda *args: seen.append(mirror.is_training(tmp_path / "run")) or real(*args)  # noqa: E731
    monkeypatch.setattr(dapo, "train_step", look)
    main(settings)
    assert seen == [True, True] and not mirror.is_training(tmp_path / "run")
    assert not mirror.is_training(tmp_path / "elsewhere") and not (tmp_path / ".elsewhere.lock").exists()


def test_a_run_without_constants_and_with_what_is_not_a_number(wandb, tmp_path):
    """Of another trainer. SQLite holds not-a-number as NULL."""
    write(tmp_path / "mine", 1, "accuracy")
    with contextlib.closing(sqlite3.connect(tmp_path / "mine/run.db")) as db, db:
        db.execute("INSERT INTO metrics VALUES (1, 'entropy', ?)", [math.nan])
    mirror.main([str(tmp_path / "mine"), "wandb"])
    ((step, metrics),) = wandb[0].logged
    assert step == 1 and metrics["accuracy"] == 9 and math.isnan(metrics["entropy"])
    assert wandb[0].options["config"] == {}


def stop_of(capsys, *arguments):
    with pytest.raises(SystemExit) as end:
        mirror.main(list(map(str, arguments)))
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.startswith("error: ") and said.count("\n") == 1
    return said


def test_a_library_that_is_not_installed(monkeypatch, tmp_path, capsys):
    write(tmp_path / "run", 1, "accuracy")
    for name, module in (("wandb", "wandb"), ("tensorboard", "torch.utils.tensorboard")):
        monkeypatch.setitem(sys.modules, module, None)  # an import fails
        assert f"pip install {name}" in stop_of(capsys, tmp_path / "run", name)


def test_other_arguments_and_folders(wandb, tmp_path, capsys):
    for arguments in ([], ["run"], ["run", "mlflow"], ["run", "wandb", "--folow"], ["run", "other", "wandb"]):
        assert "usage: python -m tools.mirror FOLDER" in stop_of(capsys, *arguments)
    assert "there is no run in" in stop_of(capsys, tmp_path / "run", "wandb")
    assert not wandb


def test_it_takes_no_torch(tmp_path):
    write(tmp_path / "run", 1, "accuracy")
    program = f"""
import sys
from types import SimpleNamespace
run = SimpleNamespace(log=print, finish=lambda: None)
sys.modules["wandb"] = SimpleNamespace(init=lambda **options: run)
from tools import mirror
mirror.main([{str(tmp_path / "run")!r}, "wandb"])
print(sorted({{"torch", "transformers", "dapo", "matplotlib"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["{'accuracy': 9.0} 1", "[]"]


@pytest.mark.parametrize("what", ["init", "log", "finish"])
def test_a_library_that_fails(what, wandb, monkeypatch, tmp_path, capsys):
    """With whatever error: without an account, a network, or room on the disk."""
    write(tmp_path / "run", 0, "accuracy")
    write(tmp_path / "run", 1, "accuracy")
    init = sys.modules["wandb"].init

    def lost(*args, **kwargs):
        raise RuntimeError("connection lost\nmore")

    def failing(**options):
        run = init(**options)
        real = run.log
        run.log = lambda metrics, step: lost() if what == "log" and step == 1 else real(metrics, step)
        run.finish = lost if what == "finish" else run.finish
        return run

    monkeypatch.setattr(sys.modules["wandb"], "init", lost if what == "init" else failing)
    assert "wandb cannot be written to: connection lost" in stop_of(capsys, tmp_path / "run", "wandb")
    if what == "log":
        assert wandb[0].finished and [step for step, _ in wandb[0].logged] == [0]

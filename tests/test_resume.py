"""However a run is interrupted, it resumes to the very same end: the same model, numbers, and responses."""

import contextlib
import itertools
import json
import operator
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys

import pyarrow.parquet
import pytest
import torch
from conftest import ROOT, load
from torch.utils._pytree import tree_map

import dapo

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="ends processes that it has forked"),
    pytest.mark.usefixtures("no_pictures"),
]

REWARD = """
import itertools
import random
import numpy

calls = itertools.count(1)

def compute_score(solution_str, **others):
    return float((random.random() + numpy.random.rand() + len(solution_str) / 10) % 1 < 0.5)
"""


@pytest.fixture(scope="module")
def server():
    command = [sys.executable, str(ROOT / "tests/fork_runs.py")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield process
        process.stdin.close()


@pytest.fixture(scope="module")
def settings(tmp_path_factory, make_folder):
    """A run of 12 steps through several epochs that needs everything a checkpoint holds."""
    folder = tmp_path_factory.mktemp("data")
    rows = [{"question": f"Tom has {n} apples.", "answer": str(n)} for n in range(20)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "train.parquet")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows[:6]), folder / "test.parquet")
    (folder / "chance.py").write_text(REWARD)
    train, test = (
        [{"path": str(folder / name), "type": "parquet", "input": "question", "output": "answer"}]
        for name in ("train.parquet", "test.parquet")
    )
    constants = dict(
        MODEL=make_folder(), TRAIN_DATASETS=train, EVAL_DATASETS=test, DEVICE="cpu", SEED=5,
        REWARD=f"{folder / 'chance.py'}:compute_score", NUM_STEPS=12, EVAL_EVERY=6, EVAL_SAMPLES=2, SAVE_EVERY=5,
        CHECKPOINT_EVERY=2, BATCH_SIZE=4, GROUP_SIZE=3, MINI_BATCHES=3, MAX_GEN_BATCHES=3, REST_EPOCHS=1,
        MAX_RESPONSE_LENGTH=12, OVERLONG_BUFFER_LENGTH=4, LEARNING_RATE=1e-3, KL_COEF=0.01,
    )  # fmt: skip
    return [f"--{name}={value}" for name, value in constants.items()]


@pytest.fixture
def arguments(settings, tmp_path):
    return [*settings, f"--OUTPUT_DIR={tmp_path / 'run'}"]


@pytest.fixture
def run(server, arguments, tmp_path):
    """Runs dapo.py in tmp_path/run with an ending; gives the exit status and what it said."""

    def start(*ending, pictures=False):
        task = {"arguments": arguments, "ending": ending or ["none"], "pictures": pictures, "log": f"{tmp_path}/log"}
        print(json.dumps(task), file=server.stdin, flush=True)
        return int(server.stdout.readline()), (tmp_path / "log").read_text()

    return start


def checkpoint(folder):
    """What the checkpoint in a folder holds, once there is one. It can always be read."""
    paths = folder / "checkpoint.pt", folder / "checkpoint.previous.pt"
    return next((torch.load(path, weights_only=True) for path in paths if path.exists()), None)


def in_db(folder, query):
    with contextlib.closing(sqlite3.connect(folder / "run.db")) as db:
        return db.execute(query).fetchall()


def everything(folder):
    """All that has to be the same: the models, the last checkpoint, and run.db without what clocks and memory say."""
    assert in_db(folder, "PRAGMA integrity_check") == [("ok",)] and not list(folder.rglob("*unfinished*"))
    metrics = in_db(folder, "SELECT step, name, value FROM metrics ORDER BY step, name")
    state = {name: value for name, value in checkpoint(folder).items() if name != "constants"}
    return {
        "metrics": [row for row in metrics if not row[1].startswith(("time/", "tokens_per_second", "memory/"))],
        "responses": in_db(folder, "SELECT * FROM responses ORDER BY rowid"),
        "models": {path.parent.name: path.read_bytes() for path in folder.glob("*/model.safetensors")},
        "checkpoint": tree_map(lambda leaf: leaf.numpy().tobytes() if torch.is_tensor(leaf) else leaf, state),
    }


@pytest.fixture(scope="module")
def undisturbed(server, settings, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    arguments, log = [*settings, f"--OUTPUT_DIR={folder / 'run'}"], folder / "log"
    task = {"arguments": arguments, "ending": ["none"], "pictures": False, "log": str(log)}
    print(json.dumps(task), file=server.stdin, flush=True)
    assert server.stdout.readline() == "0\n", log.read_text()
    result = everything(folder / "run")
    assert set(result["models"]) == {"step_5", "step_10", "step_12"}
    assert len(result["responses"]) > 12 * 12 and len(result["metrics"]) > 12 * 15
    return result


def same(folder, expected):
    found = everything(folder)
    for part in expected:
        assert found[part] == expected[part], part


def test_killed_at_20_moments_it_ends_as_if_undisturbed(run, undisturbed, tmp_path):
    """By time, and at the moments when files are opened, renamed, or removed."""
    rng, kills, status, step = random.Random(0), 0, None, None
    while kills < 20 or status != 0:
        by_time = ["time", rng.uniform(0.0, 0.3), signal.SIGKILL]
        by_event = ["event", rng.randint(1, 60), signal.SIGKILL]
        ending = ["none"] if kills == 20 else [by_time, by_event][kills % 2]
        status, said = run(*ending, pictures=kills > 16)
        assert step is None or "held another run" not in said
        state = checkpoint(tmp_path / "run")
        assert step is None or state["step"] >= step  # once there is one, there is never an older one, or none
        step = state and state["step"]
        if state and state["finished"]:  # perhaps killed even after that
            same(tmp_path / "run", undisturbed)
            shutil.rmtree(tmp_path / "run")  # if it got there before the 20 kills: once more
            step = None
        if status != 0:
            assert status == -signal.SIGKILL, said
            kills += 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_it_after_the_step_and_nothing_is_done_twice(number, run, undisturbed, tmp_path):
    done = []
    for event in (30, 20):
        status, said = run("event", event, number)
        assert status == 128 + number and "stopping after this step" in said, said
        assert "the same command resumes the run" in said and "Traceback" not in said
        done.append(checkpoint(tmp_path / "run")["step"])
        assert in_db(tmp_path / "run", "SELECT MAX(step) FROM responses") == [(done[-1],)]
    assert 0 < done[0] < done[1] < 12
    status, said = run()
    assert status == 0 and f"resuming the run in {tmp_path / 'run'} after step {done[1]}" in said
    same(tmp_path / "run", undisturbed)


def test_a_full_disk_stops_it_and_costs_nothing(run, undisturbed, tmp_path):
    """From some moment on no file can grow beyond 8 KiB, and each that a run writes fails in turn."""
    for name, n, failing in (
        ("training_metrics.png", 1, "/training_metrics.png: "),
        ("checkpoint.pt", 1, "/checkpoint.pt: "),
        ("checkpoint.pt", 8, "/run cannot be read or written: disk I/O error"),  # run.db, two checkpoints later
        ("step_5", 1, "/step_5: "),
        ("step_12", 1, "/step_12: "),
    ):
        status, said = run("full", n, 8192, f"{name}.unfinished", pictures="png" in name)
        errors = [line for line in said.splitlines() if line.startswith("error: ")]
        assert status == 2 and len(errors) == 1 and "Traceback" not in said
        assert errors[0].startswith(f"error: OUTPUT_DIR={tmp_path / 'run'} cannot be read or written: ")
        assert failing in errors[0] and not list((tmp_path / "run").rglob("*.unfinished"))
    assert run()[0] == 0
    same(tmp_path / "run", undisturbed)


def fail_at(step, update=dapo.update_policy):
    def fails(*parts):
        if parts[-1] == step:
            raise ArithmeticError
        return update(*parts)

    return fails


def test_an_exception_leaves_the_last_checkpoint(main, arguments, undisturbed, monkeypatch, tmp_path, capsys):
    with monkeypatch.context() as patch, pytest.raises(ArithmeticError):
        patch.setattr(dapo, "update_policy", fail_at(8))
        main(arguments)
    assert checkpoint(tmp_path / "run")["step"] == 6
    main(arguments)
    assert "after step 6" in capsys.readouterr().out
    same(tmp_path / "run", undisturbed)


@pytest.mark.parametrize("n", [1, 9])
def test_killed_while_it_saves_the_last_model(n, run, undisturbed, tmp_path):
    assert run("event", n, signal.SIGKILL, "step_12.unfinished")[0] == -signal.SIGKILL
    assert list(tmp_path.glob("run/step_12*")) == [tmp_path / "run/step_12.unfinished"] * (n > 1)
    status, said = run()
    assert status == 0 and "after step 12" in said
    same(tmp_path / "run", undisturbed)


@pytest.mark.parametrize("name, call", [("evaluate", 3), ("Run.save_checkpoint", 8)])
def test_what_lacks_after_the_last_step_is_made_up_for(
    name, call, main, arguments, undisturbed, monkeypatch, tmp_path, capsys
):
    """The last evaluation, and the checkpoint that says that the run has finished."""
    real, calls = operator.attrgetter(name)(dapo), itertools.count(1)

    def fails(*parts, **others):
        if next(calls) == call:
            raise ArithmeticError
        return real(*parts, **others)

    with monkeypatch.context() as patch, pytest.raises(ArithmeticError):
        patch.setattr(f"dapo.{name}", fails)
        main(arguments)
    main(arguments)
    assert "after step 12" in capsys.readouterr().out
    same(tmp_path / "run", undisturbed)


def test_ctrl_c_in_the_last_step(main, arguments, undisturbed, monkeypatch, tmp_path, capsys):
    def interrupted(*parts, update=dapo.update_policy):
        if parts[-1] == 12:
            os.kill(os.getpid(), signal.SIGINT)
        return update(*parts)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(dapo, "update_policy", interrupted)
        main(arguments)
    assert stop.value.code == 130
    main(arguments)
    assert "after step 12" in capsys.readouterr().out
    same(tmp_path / "run", undisturbed)


@pytest.mark.parametrize("at", ["training", "evaluation"])
def test_a_reward_function_that_fails(at, main, arguments, undisturbed, tmp_path, capsys):
    """No step is lost, and once it is mended the run ends as ever."""
    evaluation = 6 * (1 + 2)
    call = {"training": evaluation + 6 * 4 * 3 + 5, "evaluation": evaluation - 5}[at]
    mine = tmp_path / "chance.py"
    mine.write_text(REWARD.replace("return", f"return 'right' if next(calls) == {call} else"))
    arguments.append(f"--REWARD={mine}:compute_score")
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    error = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and "chance.py:compute_score failed" in error
    last = checkpoint(tmp_path / "run")["step"]
    assert in_db(tmp_path / "run", "SELECT COALESCE(MAX(step), 0) FROM responses") == [(last,)]
    assert last % 2 or at == "evaluation"  # not one of the steps that have a checkpoint anyway
    mine.write_text(REWARD)
    main(arguments)
    assert f"after step {last}" in capsys.readouterr().out
    same(tmp_path / "run", undisturbed)


def test_a_finished_run_resumes_when_there_are_more_steps(main, arguments, undisturbed, tmp_path, capsys):
    main([*arguments, "--NUM_STEPS=6"])
    main(arguments)
    assert f"resuming the run in {tmp_path / 'run'} after step 6" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "run/step_6")
    same(tmp_path / "run", undisturbed)
    for number, steps in enumerate([2, 2, 1], 1):
        main([*arguments, f"--NUM_STEPS={steps}"])
        said = capsys.readouterr().out
        assert "resuming the run" not in said and "held another run" in said and "it has finished" in said
        assert f"{tmp_path / 'run'}_{number}" in said and (tmp_path / f"run_{number}").is_dir()
        assert in_db(tmp_path / "run", "SELECT MAX(step) FROM metrics") == [(steps,)]
    same(tmp_path / "run_1", undisturbed)


def test_more_epochs_resume(main, arguments, tmp_path, capsys):
    arguments.append("--NUM_STEPS=None")
    main([*arguments, "--NUM_EPOCHS=1"])
    last = checkpoint(tmp_path / "run")["step"]
    main([*arguments, "--NUM_EPOCHS=2"])
    assert f"after step {last}" in capsys.readouterr().out
    assert (tmp_path / "run/epoch_1").is_dir() and (tmp_path / "run/epoch_2").is_dir()


def test_a_shorter_length_than_it_has_reached_is_refused(main, arguments, monkeypatch, tmp_path, capsys):
    with monkeypatch.context() as patch, pytest.raises(ArithmeticError):
        patch.setattr(dapo, "update_policy", fail_at(8))
        main(arguments)
    for shorter in ["--NUM_STEPS=5"], ["--NUM_STEPS=None", "--NUM_EPOCHS=1"]:
        with pytest.raises(SystemExit) as stop:
            main([*arguments, *shorter])
        error = capsys.readouterr().err.splitlines()[-1]
        assert stop.value.code == 2 and shorter[-1].strip("-") in error and "step 6" in error
    assert checkpoint(tmp_path / "run")["step"] == 6 and sorted(tmp_path.glob("run*")) == [tmp_path / "run"]


def test_other_questions_are_another_run(main, arguments, tmp_path, capsys):
    source = tmp_path / "mine.csv"
    data = [{"path": str(source), "type": "csv", "input": "question", "output": "answer"}]
    arguments += [f"--TRAIN_DATASETS={data}", "--NUM_STEPS=1", "--BATCH_SIZE=2"]
    source.write_text("question,answer\na,1\nb,2\n")
    main(arguments)
    source.write_text("question,answer\na,1\nb,3\n")
    main(arguments)
    said = capsys.readouterr().out
    assert f"{tmp_path / 'run'}_1" in said and "the questions' checksum was" in said


@pytest.mark.parametrize("content", [b"", b"{", None])
def test_a_broken_checkpoint_is_refused(content, main, arguments, tmp_path, capsys):
    main([*arguments, "--NUM_STEPS=1"])
    path = tmp_path / "run/checkpoint.pt"
    path.write_bytes(path.read_bytes()[:-1000] if content is None else content)
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    error = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and f"{path} cannot be read; move it to resume" in error
    main([*arguments, "--NUM_STEPS=1", "--RESUME=False"])
    assert (tmp_path / "run_1/step_1").is_dir() and (tmp_path / "run/step_1").is_dir()


def test_one_run_in_a_folder_at_a_time(main, arguments, tmp_path, capsys):
    arguments.append("--NUM_STEPS=1")
    with dapo.FileLock(tmp_path / ".run.lock"), pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2 and "another process is training in OUTPUT_DIR=" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    main(arguments)


@pytest.fixture
def open_run(make_folder, set_constants, tmp_path):
    set_constants(OUTPUT_DIR=str(tmp_path / "run"))
    model, tokenizer = load(make_folder())
    return dapo.open_run(model, tokenizer, torch.optim.AdamW(model.parameters()), [], [])


def test_a_second_signal_is_not_waited_for(open_run, capfd):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stop, open_run as run:
        os.kill(os.getpid(), signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) == signal.getsignal(signal.SIGINT) == signal.SIG_DFL
        run.save_if_due()
    assert stop.value.code == 143 and signal.getsignal(signal.SIGTERM) == before
    assert "press again to stop at once" in capfd.readouterr().err


def test_who_reads_does_not_keep_it_from_writing(open_run, tmp_path):
    with open_run as run, contextlib.closing(sqlite3.connect(tmp_path / "run/run.db")) as reader:
        run.db.execute("PRAGMA busy_timeout = 100")
        run.record({"eval/accuracy": 0.5, "entropy": 1.0}, [])
        rows = reader.execute("SELECT name FROM metrics")
        assert rows.fetchone()  # one row is fetched, so its transaction is open
        run.step = 1
        run.record({"eval/accuracy": 0.75}, [])
        assert in_db(tmp_path / "run", "SELECT value FROM metrics WHERE step = 1") == [(0.75,)]


def test_three_steps_without_a_finite_gradient_stop_it(main, arguments, undisturbed, monkeypatch, tmp_path, capsys):
    def spoiled_from_4_on(*parts, update=dapo.update_policy, accumulate=dapo.accumulate_gradients):
        def spoiled(model, mini_batch):
            sums = accumulate(model, mini_batch)
            next(model.parameters()).grad.fill_(float("nan"))
            return sums

        patch.setattr(dapo, "accumulate_gradients", spoiled if parts[-1] >= 4 else accumulate)
        return update(*parts)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(dapo, "update_policy", spoiled_from_4_on)
        main([*arguments, "--CHECKPOINT_EVERY=1"])
    error = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and "3 steps in a row" in error and "LEARNING_RATE" in error
    skipped = in_db(tmp_path / "run", "SELECT step, value FROM metrics WHERE name = 'skipped_updates' ORDER BY step")
    assert [step for step, count in skipped if count] == [4, 5, 6] and skipped[-1][0] == 6
    assert checkpoint(tmp_path / "run")["step"] == 3  # from before the trouble, so the run can be resumed
    main(arguments)
    same(tmp_path / "run", undisturbed)


def test_weights_that_are_not_finite_stop_it_before_they_are_saved(main, arguments, monkeypatch, tmp_path, capsys):
    def spoils(model, *parts, update=dapo.update_policy):
        metrics = update(model, *parts)
        if parts[-1] == 2:
            next(model.parameters()).data[0] = float("inf")
        return metrics

    monkeypatch.setattr(dapo, "update_policy", spoils)
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "--CHECKPOINT_EVERY=1"])
    error = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and "after step 2 there are weights that are not finite" in error
    assert checkpoint(tmp_path / "run")["step"] == 1


def test_a_run_that_starts_from_a_model_in_its_own_folder(main, arguments, tmp_path, capsys):
    """The folder is renamed, and the model with it."""
    main([*arguments, "--NUM_STEPS=1"])
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "--NUM_STEPS=1", f"--MODEL={tmp_path / 'run/step_1'}"])
    assert stop.value.code == 2 and "lies in OUTPUT_DIR=" in capsys.readouterr().err
    assert not (tmp_path / "run_1").exists()

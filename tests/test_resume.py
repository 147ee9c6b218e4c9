"""However a run is broken off, it goes on to the very same end: the same bytes saved, the same numbers recorded."""

import contextlib
import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, load

import dapo

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="ends processes that it has forked")

REWARD = """
import random
import numpy

def compute_score(solution_str, **others):
    return float((random.random() + numpy.random.rand() + len(solution_str) / 10) % 1 < 0.5)
"""


@pytest.fixture(autouse=True)
def one_panel(monkeypatch):
    """Drawing all twelve would take most of a run's time."""
    monkeypatch.setattr(dapo.record, "PANELS", {"accuracy": ["accuracy"]})


@pytest.fixture(scope="module")
def server():
    with subprocess.Popen(
        [sys.executable, str(ROOT / "tests/fork_runs.py")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        yield process
        process.stdin.close()


@pytest.fixture(scope="module")
def settings(tmp_path_factory, make_folder):
    """A run of 24 steps through several epochs that needs everything a checkpoint holds."""
    folder = tmp_path_factory.mktemp("data")
    table = [{"question": f"Tom has {n} apples.", "answer": str(n)} for n in range(20)]
    dapo.record.datasets.Dataset.from_list(table).to_parquet(folder / "q.parquet")
    (folder / "chance.py").write_text(REWARD)
    source = [{"path": str(folder / "q.parquet"), "type": "parquet", "input": "question", "output": "answer"}]
    constants = dict(
        MODEL=make_folder(), TRAIN_DATASETS=source, EVAL_DATASETS=source, DEVICE="cpu", SEED=5,
        REWARD=f"{folder / 'chance.py'}:compute_score", NUM_STEPS=24, EVAL_EVERY=12, EVAL_SAMPLES=2, SAVE_EVERY=7,
        CHECKPOINT_EVERY=2, BATCH_SIZE=4, GROUP_SIZE=3, MINI_BATCHES=3, MAX_GEN_BATCHES=3, REST_EPOCHS=1,
        MAX_RESPONSE_LENGTH=12, OVERLONG_BUFFER_LENGTH=4, LEARNING_RATE=1e-3, KL_COEF=0.01, MAX_PROMPT_LENGTH=256,
        PROMPT_TEMPLATE="{question}",
    )  # fmt: skip
    return [f"--{name}={value}" for name, value in constants.items()]


@pytest.fixture
def run(server, settings, tmp_path):
    """Runs dapo.py in tmp_path/run with an ending; gives the exit status and what it said."""

    def start(*ending, more=()):
        arguments = [*settings, f"--OUTPUT_DIR={tmp_path / 'run'}", *more]
        task = {"arguments": arguments, "ending": ending or ["none"], "log": str(tmp_path / "log")}
        print(json.dumps(task), file=server.stdin, flush=True)
        return int(server.stdout.readline()), (tmp_path / "log").read_text()

    return start


CLOCKS = ("time/", "tokens_per_second", "memory/")


def everything(folder):
    """All that has to be the same: bytes of the saved files, rows of run.db without what clocks and memory say."""
    with contextlib.closing(sqlite3.connect(folder / "run.db")) as db:
        metrics = db.execute("SELECT step, name, value FROM metrics ORDER BY step, name").fetchall()
        responses = db.execute("SELECT * FROM responses ORDER BY rowid").fetchall()
        assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    files = {path: path.read_bytes() for name in ("step_*", "checkpoint") for path in folder.glob(f"{name}/**/*.*")}
    files = {str(path.relative_to(folder)): content for path, content in files.items() if path.is_file()}
    return {
        "metrics": [row for row in metrics if not row[1].startswith(CLOCKS)],
        "responses": responses,
        "files": {name: content for name, content in files.items() if not name.endswith("train_script.py")},
    }


@pytest.fixture(scope="module")
def undisturbed(server, settings, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    task = {"arguments": [*settings, f"--OUTPUT_DIR={folder / 'run'}"], "ending": ["none"], "log": str(folder / "log")}
    print(json.dumps(task), file=server.stdin, flush=True)
    assert server.stdout.readline() == "0\n", (folder / "log").read_text()
    assert [path.name for path in (folder / "run/checkpoint").iterdir()] == ["step_24"]  # only the last is kept
    result = everything(folder / "run")
    assert len(result["files"]) > 15 and len(result["responses"]) > 24 * 12 and len(result["metrics"]) > 24 * 15
    return result


def same(folder, expected):
    found = everything(folder)
    for part in expected:
        assert found[part] == expected[part], part


def is_whole(folder):
    """There is a checkpoint that can be read, once there has been one."""
    checkpoint = dapo.record.last_checkpoint(folder)
    if checkpoint:
        json.loads((checkpoint / "state.json").read_text())
        for name in ("model", "optimizer"):
            dapo.record.load_file(checkpoint / f"{name}.safetensors")
    return checkpoint


def test_killed_at_20_moments_it_ends_as_if_undisturbed(run, undisturbed, tmp_path):
    """By time, and at the moments when files are opened, renamed or removed."""
    rng, kills, status, step = random.Random(0), 0, None, None
    while kills < 20 or status != 0:
        by_time, by_event = (
            ["time", rng.uniform(0.0, 0.8), signal.SIGKILL],
            ["event", rng.randrange(120), signal.SIGKILL],
        )
        status, said = run(*(["none"] if kills == 20 else [by_time, by_event][kills % 2]))
        assert step is None or f"goes on from step {step}" in said or "goes on" not in said and status
        checkpoint = is_whole(tmp_path / "run")
        assert checkpoint or step is None  # once there is one, there always is one, and never an older one
        assert step is None or int(checkpoint.name[5:]) >= step
        step = int(checkpoint.name[5:]) if checkpoint else None
        if status == 0:
            same(tmp_path / "run", undisturbed)
            shutil.rmtree(tmp_path / "run")  # if it got there before the 20 kills: once more
            step = None
        else:
            assert status == -signal.SIGKILL, said
            kills += 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_after_the_step_and_nothing_is_done_twice(number, run, undisturbed, tmp_path):
    done, status = [], None
    for event in (100, 45, 77):
        status, said = run("event", event, number)
        assert status == 128 + number, said
        assert "stopping after this step" in said and "to go on from" in said and "Traceback" not in said
        done.append(int(is_whole(tmp_path / "run").name[5:]))
        with contextlib.closing(sqlite3.connect(tmp_path / "run/run.db")) as db:
            assert db.execute("SELECT MAX(step) FROM responses").fetchone() == (done[-1],)
    assert done == sorted(set(done))
    assert run()[0] == 0
    same(tmp_path / "run", undisturbed)


def test_a_full_disk_stops_it_and_costs_nothing(run, undisturbed, tmp_path):
    """No file can grow beyond a limit: the checkpoint, run.db, its log, the picture, the saved model hit it in turn."""
    largest = max(len(content) for content in undisturbed["files"].values())
    rng, failures, went_on = random.Random(1), 0, 0
    for _ in range(8):
        status, said = run("size", rng.randrange(8192, largest))
        if status == 0:
            break
        failures += 1
        assert status == 2, said
        (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
        assert "OUTPUT_DIR=" in line and "cannot be read or written" in line and "Traceback" not in said
        went_on += "goes on from step" in said
        is_whole(tmp_path / "run")
        assert not list((tmp_path / "run").rglob("*.unfinished"))
    status, said = run()
    assert failures >= 5 and went_on and status == 0 and "goes on from step" in said
    same(tmp_path / "run", undisturbed)


def test_an_exception_leaves_the_last_checkpoint(main, settings, undisturbed, monkeypatch, tmp_path, capsys):
    real, arguments = dapo.update, [*settings, f"--OUTPUT_DIR={tmp_path / 'run'}"]

    def fails(*parts):
        if parts[-1] == 8:
            raise ArithmeticError
        return real(*parts)

    monkeypatch.setattr(dapo, "update", fails)
    with pytest.raises(ArithmeticError):
        main(arguments)
    assert is_whole(tmp_path / "run").name == "step_6"
    monkeypatch.setattr(dapo, "update", real)
    main(arguments)
    assert "goes on from step 6" in capsys.readouterr().out
    same(tmp_path / "run", undisturbed)


@pytest.mark.parametrize("at", ["training", "evaluation"])
def test_a_reward_function_that_fails(at, main, settings, undisturbed, monkeypatch, tmp_path, capsys):
    """No step is lost, and once it is mended the run ends as ever."""
    calls, real = [0], dapo.record.load_reward
    asked = {"training": 20 * 3 + 9 * 4 * 3 + 5, "evaluation": 20 * 3 + 20}[at]  # in the first evaluation: 20 x 3 calls

    def load(name):
        def score(solution_str, **others):
            calls[0] += 1
            return real(name)(solution_str, **others) if calls[0] != asked else "right"

        return score

    arguments = [*settings, f"--OUTPUT_DIR={tmp_path / 'run'}"]
    monkeypatch.setattr(dapo.record, "load_reward", load)
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    said = capsys.readouterr()
    assert stop.value.code == 2 and said.err.count("\n") == 1 and "compute_score gave 'right'" in said.err
    assert "to go on from" in said.out
    last = int(is_whole(tmp_path / "run").name[5:])
    with contextlib.closing(sqlite3.connect(tmp_path / "run/run.db")) as db:
        assert db.execute("SELECT COALESCE(MAX(step), 0) FROM responses").fetchone() == (last,)
    monkeypatch.setattr(dapo.record, "load_reward", real)
    main(arguments)
    assert f"goes on from step {last}" in capsys.readouterr().out
    same(tmp_path / "run", undisturbed)


def test_a_finished_run_goes_on_when_there_are_more_steps(main, settings, undisturbed, tmp_path, capsys):
    arguments = [*settings, f"--OUTPUT_DIR={tmp_path / 'run'}"]
    main([*arguments, "--NUM_STEPS=12"])
    main(arguments)
    said = capsys.readouterr().out
    assert f"the run in {tmp_path / 'run'} goes on from step 12" in said and "changed: NUM_STEPS 12 -> 24" in said
    shutil.rmtree(tmp_path / "run/step_12")
    same(tmp_path / "run", undisturbed)
    for number, other in enumerate(["--NUM_STEPS=1", "--CLIP_RANGE_HIGH=0.2", "--SEED=1"], 1):  # these are other runs
        main([*arguments, "--NUM_STEPS=2", other])
        assert sorted(path.name for path in tmp_path.iterdir()) == ["run", *(f"run_{n + 1}" for n in range(number))]


def test_what_may_change_in_mid_run_does_and_the_rest_is_refused(main, settings, monkeypatch, tmp_path, capsys):
    arguments = [*settings, f"--OUTPUT_DIR={tmp_path / 'run'}", "--CHECKPOINT_EVERY=3"]
    real = dapo.update

    def fails(*parts):
        if parts[-1] == 5:
            raise ArithmeticError
        return real(*parts)

    monkeypatch.setattr(dapo, "update", fails)
    with pytest.raises(ArithmeticError):
        main([*arguments, "--NUM_STEPS=6", "--EVAL_EVERY=4"])
    arguments.append("--EVAL_EVERY=12")
    monkeypatch.setattr(dapo, "update", real)
    refused = {
        "--SEED=6": "cannot go on with SEED 5 -> 6: set it back, or --RESUME=False starts over",
        "--MAX_PROMPT_LENGTH=99": "MAX_PROMPT_LENGTH 256 -> 99",
        "--PROMPT_TEMPLATE={question}?": "PROMPT_TEMPLATE '{question}' -> '{question}?'",
        "--NUM_STEPS=2": "cannot go on to NUM_STEPS=2: it is at step 3",
    }
    for argument, message in refused.items():
        with pytest.raises(SystemExit) as stop:
            main([*arguments, argument])
        error = capsys.readouterr().err
        assert stop.value.code == 2 and message in error and error.count("\n") == 1

    main([*arguments, "--NUM_STEPS=5", "--LEARNING_RATE=0.5", "--WARMUP_STEPS=0", "--WEIGHT_DECAY=0.7"])
    said = capsys.readouterr().out
    assert "changed: LEARNING_RATE 0.001 -> 0.5" in said and "changed: WEIGHT_DECAY 0.1 -> 0.7" in said
    with contextlib.closing(sqlite3.connect(tmp_path / "run/run.db")) as db:
        rates = db.execute("SELECT value FROM metrics WHERE name = 'learning_rate' ORDER BY step").fetchall()
        evaluated = db.execute("SELECT step FROM metrics WHERE name = 'eval/accuracy' ORDER BY step").fetchall()
    assert evaluated == [(0,), (5,)]  # that after step 4 is gone, it was past the checkpoint
    assert rates == [(pytest.approx(rate),) for rate in (0.0002, 0.0004, 0.0006, 0.5, 0.5)]

    main([*arguments, "--SEED=6", "--NUM_STEPS=9", "--RESUME=False"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "run_1"]
    assert (tmp_path / "run_1/step_5").is_dir() and (tmp_path / "run/step_9").is_dir()


def test_new_constants_reach_the_optimizer(main, settings, monkeypatch, tmp_path):
    arguments = [*settings, f"--OUTPUT_DIR={tmp_path / 'run'}"]
    with monkeypatch.context() as patch:
        patch.setattr(dapo.record.Run, "save_model", lambda *names: 1 / 0)  # at the end
        with pytest.raises(ZeroDivisionError):
            main([*arguments, "--NUM_STEPS=2"])
    decays, real = [], dapo.update
    monkeypatch.setattr(
        dapo, "update", lambda *parts: (decays.append(parts[2].param_groups[0]["weight_decay"]), real(*parts))[1]
    )
    main([*arguments, "--NUM_STEPS=3", "--WEIGHT_DECAY=0.7"])
    assert decays == [0.7]


def test_other_data_or_a_broken_checkpoint_are_refused(main, settings, tmp_path, capsys):
    arguments = [*settings, f"--OUTPUT_DIR={tmp_path / 'run'}"]
    source = tmp_path / "mine.csv"
    source.write_text("question,answer\na,1\nb,2\n")
    data = f"--TRAIN_DATASETS={[{'path': str(source), 'type': 'csv', 'input': 'question', 'output': 'answer'}]}"
    main([*arguments, data, "--NUM_STEPS=1"])
    next((tmp_path / "run/checkpoint").glob("*/ended")).unlink()  # as if it had been broken off before the end
    source.write_text("question,answer\na,1\nb,3\n")
    state = next((tmp_path / "run/checkpoint").glob("*/state.json"))
    for message in ("TRAIN_DATASETS held other questions when it began", "state.json"):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main([*arguments, data, "--NUM_STEPS=2"])
        assert stop.value.code == 2 and message in capsys.readouterr().err
        state.write_text("{")


def test_one_run_in_a_folder_at_a_time(main, settings, tmp_path, capsys):
    arguments = [*settings, f"--OUTPUT_DIR={tmp_path / 'run'}", "--NUM_STEPS=1"]
    main(arguments)
    with contextlib.closing(dapo.record.lock(tmp_path / "run")):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
    assert stop.value.code == 2 and "another process is training in" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


@pytest.fixture
def open_run(make_folder, set_constants, tmp_path):
    set_constants(OUTPUT_DIR=str(tmp_path / "run"))
    model, tokenizer = load(make_folder())
    optimizer = torch.optim.AdamW(model.parameters())
    return dapo.record.open_run(vars(dapo), None, model, tokenizer, optimizer, dapo.record.Progress(), [])


def test_a_second_signal_is_not_waited_for(open_run, capfd):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stop, open_run as run:
        os.kill(os.getpid(), signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) == signal.getsignal(signal.SIGINT) == signal.SIG_DFL
        run.checkpoint()
    assert stop.value.code == 143 and signal.getsignal(signal.SIGTERM) == before
    assert "once more, and it stops at once" in capfd.readouterr().err


def test_who_reads_does_not_keep_it_from_writing(open_run, tmp_path):
    with open_run as run, contextlib.closing(sqlite3.connect(tmp_path / "run/run.db")) as reader:
        run.db.execute("PRAGMA busy_timeout = 100")
        run.write({"accuracy": 0.5, "entropy": 1.0})
        rows = reader.execute("SELECT name FROM metrics")
        assert rows.fetchone()  # one row is fetched, so its transaction is open
        run.progress.step = 1
        run.write({"accuracy": 0.75})
        with contextlib.closing(sqlite3.connect(tmp_path / "run/run.db")) as other:
            assert other.execute("SELECT value FROM metrics WHERE step = 1").fetchall() == [(0.75,)]


def test_three_steps_without_a_finite_gradient_stop_it(main, settings, undisturbed, monkeypatch, tmp_path, capsys):
    real, update, arguments = dapo.accumulate_gradients, dapo.update, [*settings, f"--OUTPUT_DIR={tmp_path / 'run'}"]

    def spoiled(model, mini_batch):
        sums = real(model, mini_batch)
        next(model.parameters()).grad.fill_(float("nan"))
        return sums

    def spoiled_from_4_on(model, base, optimizer, groups, step):
        monkeypatch.setattr(dapo, "accumulate_gradients", spoiled if step >= 4 else real)
        return update(model, base, optimizer, groups, step)

    monkeypatch.setattr(dapo, "update", spoiled_from_4_on)
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "--CHECKPOINT_EVERY=1"])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "3 steps in a row" in error and "LEARNING_RATE" in error and error.count("\n") == 1
    with contextlib.closing(sqlite3.connect(tmp_path / "run/run.db")) as db:
        skipped = db.execute("SELECT step, value FROM metrics WHERE name = 'skipped_updates' ORDER BY step").fetchall()
    assert [step for step, count in skipped if count] == [4, 5, 6] and skipped[-1][0] == 6
    assert is_whole(tmp_path / "run").name == "step_3"  # from before the trouble, so the run can go on
    monkeypatch.setattr(dapo, "update", update)
    monkeypatch.setattr(dapo, "accumulate_gradients", real)
    main([*arguments, "--CHECKPOINT_EVERY=2"])
    same(tmp_path / "run", undisturbed)


def test_weights_that_are_not_finite_end_it_before_they_are_saved(main, settings, monkeypatch, tmp_path, capsys):
    real = dapo.update

    def spoils(model, *parts):
        changes = real(model, *parts)
        if parts[-1] == 2:
            next(model.parameters()).data[0] = float("inf")
        return changes

    monkeypatch.setattr(dapo, "update", spoils)
    with pytest.raises(SystemExit) as stop:
        main([*settings, f"--OUTPUT_DIR={tmp_path / 'run'}", "--CHECKPOINT_EVERY=1"])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "after step 2 the weights are not finite" in error and error.count("\n") == 1
    assert is_whole(tmp_path / "run").name == "step_1"


def test_what_a_run_reads_is_not_moved_away_with_an_earlier_run(main, settings, tmp_path, capsys):
    arguments = [*settings, f"--OUTPUT_DIR={tmp_path / 'run'}"]
    main([*arguments, "--NUM_STEPS=1"])
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "--NUM_STEPS=1", f"--MODEL={tmp_path / 'run/step_1'}"])
    assert stop.value.code == 2 and "MODEL lies in OUTPUT_DIR=" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    (tmp_path / "run/run.db").unlink()
    main([*arguments, "--NUM_STEPS=1", "--RESUME=False"])  # a checkpoint alone is kept aside as well
    assert list((tmp_path / "run_1/checkpoint").glob("step_*"))


def test_fewer_epochs_are_not_gone_on_to(main, settings, tmp_path, capsys):
    arguments = [*settings, f"--OUTPUT_DIR={tmp_path / 'run'}", "--NUM_STEPS=None", "--EVAL_EVERY=100"]
    main([*arguments, "--NUM_EPOCHS=1"])
    main([*arguments, "--NUM_EPOCHS=2"])
    assert "changed: NUM_EPOCHS 1 -> 2" in capsys.readouterr().out and (tmp_path / "run/epoch_2").is_dir()
    next((tmp_path / "run/checkpoint").glob("*/ended")).unlink()
    with pytest.raises(SystemExit):
        main([*arguments, "--NUM_EPOCHS=1"])
    assert "cannot go on to NUM_EPOCHS=1" in capsys.readouterr().err

"""tools.mirror: TensorBoard and W&B get the metrics of run.db, each once, while a run goes on or afterward. W&B gets
them in one W&B run, however often the mirror or the training is interrupted, and with them a table of responses."""

import contextlib
import json
import math
import os
import shutil
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


def logged(rows):
    """What W&B has of a run, {(step, name): value}, given its rows; no value twice, and a table is none."""
    parts = [{**metrics, "held_out": None} for _, metrics in sorted(rows.items())]
    values = [((part["step"], name), part[name]) for part in parts for name in part if name not in ("step", "held_out")]
    assert len(values) == len(dict(values))
    return dict(values)


class Killed(BaseException):
    """In the place of SIGKILL: what is not uploaded yet is lost."""


class Session:
    """A run of W&B, from init to finish. A row is uploaded once a later one begins; one below the last is ignored."""

    def __init__(self, server, id, resume, offline, options):
        self.server, self.options, self.finished, self.ignored = server, options | {"resume": resume}, False, []
        self.id = id
        self.rows = {} if offline else server.runs.setdefault(self.id, {})
        if not offline and resume is None:
            self.rows.clear()
        self.starting_step = max(self.rows, default=-1) + 1
        self.current, self.pending, self.axes = self.starting_step, {}, {}
        server.sessions.append(self)

    def define_metric(self, name, step_metric=None, hidden=None):
        self.axes[name] = step_metric

    def log(self, metrics, step):
        if self.server.kill_after == 0:
            raise Killed
        self.server.kill_after -= 1
        if step < self.current:
            self.ignored.append((step, metrics))
            return
        if step > self.current:
            self.upload()
        self.current = step
        self.pending |= metrics

    def upload(self):
        if self.pending:
            self.rows[self.current] = self.pending
        self.pending = {}

    def finish(self):
        if self.server.kill_after != 0:
            self.upload()
            self.finished = True


class Server:
    """In the place of W&B, which tests must not reach: {id: {row: metrics}} of its runs, and the sessions begun."""

    def __init__(self):
        self.runs, self.sessions, self.kill_after = {}, [], -1

    def init(self, id, resume, **options):
        return Session(self, id, resume, os.environ.get("WANDB_MODE") == "offline", options)

    def sync(self, session):
        """`wandb sync` with the folder of an offline session: what has not resumed takes the place of what there is."""
        before = self.runs.get(session.id, {}) if session.options["resume"] else {}
        shift = max(before, default=-1) + 1
        self.runs[session.id] = before | {row + shift: metrics for row, metrics in session.rows.items()}


@pytest.fixture
def wandb(monkeypatch):
    server = Server()
    table = lambda columns, data: [dict(zip(columns, row, strict=True)) for row in data]  # noqa: E731
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=server.init, Table=table))
    return server


def the_one(server):
    """The rows of the only run that W&B has; none of what it was sent was ignored."""
    assert not any(session.ignored for session in server.sessions)
    (rows,) = server.runs.values()
    return rows


def write(folder, step, *names):
    """Adds metrics of a step to the run.db in a folder, as a run does; their values do not matter."""
    folder.mkdir(exist_ok=True)
    with contextlib.closing(sqlite3.connect(folder / "run.db")) as db, db:
        db.execute("PRAGMA synchronous = OFF")
        db.execute("CREATE TABLE IF NOT EXISTS metrics (step INTEGER, name TEXT, value REAL, PRIMARY KEY (step, name))")
        db.executemany(
            "INSERT OR REPLACE INTO metrics VALUES (?, ?, ?)", [(step, name, step + len(name)) for name in names]
        )


def forget(folder, step):
    """Takes back all steps after this one, as a run does that is resumed."""
    with contextlib.closing(sqlite3.connect(folder / "run.db")) as db, db:
        db.execute("DELETE FROM metrics WHERE step > ?", [step])


def test_wandb_gets_what_run_db_has(main, settings, wandb, tmp_path):
    main([*settings, "--LEARNING_RATE=1e-3"])
    mirror.main([str(tmp_path / "run"), "wandb"])
    (run,) = wandb.sessions
    assert logged(the_one(wandb)) == recorded(tmp_path / "run")
    assert {metrics["step"] for metrics in the_one(wandb).values()} == {0, 1, 2}
    assert run.finished and run.options["name"] == "run" and run.options["config"].keys() == dapo.CONSTANTS.keys()
    assert run.options["config"]["LEARNING_RATE"] == 1e-3 and run.options["config"]["TRAIN_DATASETS"][0]["path"]
    assert run.axes == {"step": None, "*": "step"}


def test_a_resumed_run_is_whole_there(main, settings, wandb, tmp_path, monkeypatch):
    """It stopped after step 2, before the evaluation there."""
    real = dapo.train_step
    calls = iter([real, lambda *args: signal.raise_signal(signal.SIGTERM) or real(*args), real])
    monkeypatch.setattr(dapo, "train_step", lambda *args: next(calls)(*args))
    with pytest.raises(SystemExit):
        main([*settings, "--NUM_STEPS=3"])
    mirror.main([str(tmp_path / "run"), "wandb"])
    assert (2, "accuracy") in logged(the_one(wandb)) and (2, "eval/accuracy") not in logged(the_one(wandb))
    main([*settings, "--NUM_STEPS=3"])
    mirror.main([str(tmp_path / "run"), "wandb"])
    assert logged(the_one(wandb)) == recorded(tmp_path / "run") and len(wandb.sessions) == 2
    assert {metrics["step"] for metrics in the_one(wandb).values()} == {0, 1, 2, 3}


PIECES = [(0, "eval/accuracy"), (1, "accuracy", "kl"), (1, "eval/accuracy", "sampling_gap/max"), (2, "accuracy")]
PIECES += [(3, "accuracy"), (3, "eval/accuracy"), (4, "accuracy", "kl"), (5, "accuracy"), (5, "eval/accuracy")]


@pytest.mark.parametrize("first", range(len(PIECES) + 1))
def test_wandb_goes_on_wherever_it_was_interrupted(first, wandb, tmp_path):
    """After so many pieces of a run, the mirror ends, or it is killed before one of its calls."""
    for place, kill_after in enumerate(range(-1, first)):
        run = tmp_path / f"run{place}"
        wandb.runs.clear()
        wandb.kill_after = kill_after
        for piece in PIECES[:first]:
            write(run, *piece)
        with contextlib.suppress(Killed, SystemExit):
            mirror.main([str(run), "wandb"])
        wandb.kill_after = -1
        for piece in PIECES[first:]:
            write(run, *piece)
        for _ in range(2):
            mirror.main([str(run), "wandb"])
            assert logged(the_one(wandb)) == recorded(run)


def test_wandb_gets_the_steps_once_that_a_killed_run_computes_again(wandb, tmp_path):
    run = tmp_path / "run"
    for last in (0, 2, -1):  # the checkpoint that it is resumed from, after it was killed in step 5
        for piece in PIECES[:7]:
            write(run, *piece)
        mirror.main([str(run), "wandb"])
        assert logged(the_one(wandb)) == recorded(run)
        forget(run, last)
        for piece in [piece for piece in PIECES if last < piece[0] < 4]:
            mirror.main([str(run), "wandb"])
            write(run, *piece)
    for piece in PIECES:
        write(run, *piece)
    mirror.main([str(run), "wandb"])
    assert logged(the_one(wandb)) == recorded(run) and len(wandb.sessions) > 15


def test_which_run_of_wandb_a_run_goes_to(wandb, tmp_path):
    """Its own, also once it is renamed; the next run in its folder gets another, and so does a run without the id."""
    run, aside = tmp_path / "run", tmp_path / "run_1"
    write(run, 1, "accuracy")
    mirror.main([str(run), "wandb"])
    run.rename(aside)
    (aside / "wandb/run_id").write_text(f"{wandb.sessions[0].id}\n")  # an editor adds the end of the line
    write(run, 1, "accuracy", "kl")
    write(aside, 2, "accuracy")
    for folder in (run, aside):
        mirror.main([str(folder), "wandb"])
    assert [logged(rows) for rows in wandb.runs.values()] == [recorded(aside), recorded(run)]
    (run / "wandb/run_id").write_text("")  # the disk was full
    mirror.main([str(run), "wandb"])
    shutil.rmtree(run / "wandb")
    mirror.main([str(run), "wandb"])
    assert [logged(rows) for rows in wandb.runs.values()] == [recorded(aside)] + 3 * [recorded(run)]


def test_offline_copies_take_the_place_of_earlier_ones(wandb, tmp_path, monkeypatch):
    """In whatever order and however often they are uploaded before the last; and online it goes on from there."""
    run = tmp_path / "run"
    monkeypatch.setenv("WANDB_MODE", "offline")
    for piece in PIECES[:5]:
        write(run, *piece)
        mirror.main([str(run), "wandb"])
    *earlier, last = wandb.sessions
    assert not wandb.runs and logged(last.rows) == recorded(run)
    for session in (earlier[1], earlier[0], earlier[3], last, last):
        wandb.sync(session)
    assert logged(the_one(wandb)) == recorded(run)
    monkeypatch.delenv("WANDB_MODE")
    for piece in PIECES[5:]:
        write(run, *piece)
    mirror.main([str(run), "wandb"])
    assert logged(the_one(wandb)) == recorded(run)


def test_wandb_gets_a_table_of_responses_at_each_evaluation(main, settings, wandb, tmp_path, monkeypatch):
    """Of the same questions each time; and it is not sent again."""
    monkeypatch.setattr(mirror, "QUESTIONS", 3)
    main([*settings, "--NUM_STEPS=3", "--EVAL_EVERY=2", "--LEARNING_RATE=0.01"])
    for _ in range(2):
        mirror.main([str(tmp_path / "run"), "wandb"])
    tables = [metrics["held_out"] for metrics in the_one(wandb).values() if "held_out" in metrics]
    assert [{row["step"] for row in table} for table in tables] == [{0}, {2}, {3}]
    questions = [(f"Tom has {n} apples.", str(n)) for n in (10, 11, 12)]
    assert all([(row["question"], row["answer"]) for row in table] == questions for table in tables)
    with contextlib.closing(sqlite3.connect(tmp_path / "run/run.db")) as db:
        db.row_factory = sqlite3.Row
        greedy = {(row["step"], row["question"]): dict(row) for row in db.execute("SELECT * FROM held_out")}
    for row in (row for table in tables for row in table):
        assert row == {name: greedy[row["step"], row["question"]][name] for name in row} and len(row) == 8
    assert len({row["response"] for table in tables for row in table}) > 3
    assert not any("held_out" in metrics for metrics in the_one(wandb).values() if "accuracy" in metrics)


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
    assert next(happens, None) is None and logged(the_one(wandb)) == recorded(run) and wandb.sessions[0].finished
    assert [metrics["step"] for metrics in the_one(wandb).values()] == [0, 1, 1, 2, 3, 3, 4, 5]


def test_ctrl_c_ends_it(wandb, monkeypatch, tmp_path):
    write(tmp_path / "run", 1, "accuracy")
    monkeypatch.setattr(mirror.time, "sleep", lambda seconds: signal.raise_signal(signal.SIGINT))
    with FileLock(tmp_path / ".run.lock"):
        mirror.main([str(tmp_path / "run"), "wandb", "--follow"])
    assert wandb.sessions[0].finished and logged(the_one(wandb)) == recorded(tmp_path / "run")


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
    (metrics,) = the_one(wandb).values()
    assert metrics.keys() == {"step", "accuracy", "entropy"}
    assert metrics["step"] == 1 and metrics["accuracy"] == 9 and math.isnan(metrics["entropy"])
    assert wandb.sessions[0].options["config"] == {}


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
    assert not wandb.sessions
    write(tmp_path / "run", 1, "accuracy")
    (tmp_path / "run/wandb").mkdir()
    with FileLock(tmp_path / "run/wandb/lock"):
        assert "another process is copying the run in" in stop_of(capsys, tmp_path / "run", "wandb")
    (tmp_path / "run/wandb/lock").unlink(missing_ok=True)
    (tmp_path / "run/wandb").rmdir()
    (tmp_path / "run/wandb").touch()
    assert "wandb cannot be written to: " in stop_of(capsys, tmp_path / "run", "wandb")
    assert not wandb.sessions


def test_it_takes_no_torch(tmp_path):
    write(tmp_path / "run", 1, "accuracy")
    program = f"""
import sys
from types import SimpleNamespace
run = SimpleNamespace(finish=lambda: None, define_metric=lambda *args, **options: None)
run.id, run.starting_step, run.log = "one", 0, lambda metrics, step: print(metrics, step)
sys.modules["wandb"] = SimpleNamespace(init=lambda **options: run)
from tools import mirror
mirror.main([{str(tmp_path / "run")!r}, "wandb"])
print(sorted({{"torch", "transformers", "dapo", "matplotlib"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["{'step': 1, 'accuracy': 9.0} 2", "[]"]


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
        run.log = lambda metrics, step: lost() if what == "log" and step == 2 else real(metrics, step)
        run.finish = lost if what == "finish" else run.finish
        return run

    monkeypatch.setattr(sys.modules["wandb"], "init", lost if what == "init" else failing)
    assert "wandb cannot be written to: connection lost" in stop_of(capsys, tmp_path / "run", "wandb")
    if what == "log":
        assert wandb.sessions[0].finished and [metrics["step"] for metrics in the_one(wandb).values()] == [0]

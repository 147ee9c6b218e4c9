"""Memory and open files of a long run do not grow, and its record is in order whenever another process looks at it."""

import contextlib
import os
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT

STEPS = 60
SETTINGS = dict(
    NUM_STEPS=STEPS, BATCH_SIZE=4, MINI_BATCHES=2, USE_DYNAMIC_SAMPLING=False, MAX_RESPONSE_LENGTH=48, EVAL_EVERY=20,
    DEVICE="cpu", LEARNING_RATE=1e-12,  # longer responses would take more memory
)  # fmt: skip
RETURN_WHAT_IS_FREED = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}  # to the system, at once


def look_into(path):
    """The last step in run.db, where every step has to have its metrics and responses, and they have to agree."""
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.execute("BEGIN")  # all that follows sees one state
        assert db.execute("PRAGMA quick_check").fetchall() == [("ok",)]
        recorded = db.execute("SELECT step, value FROM metrics WHERE name = 'accuracy' ORDER BY step").fetchall()
        answers = db.execute("SELECT step, AVG(accuracy) FROM responses GROUP BY step ORDER BY step").fetchall()
    assert recorded == [(step, pytest.approx(accuracy)) for step, accuracy in answers]
    assert [step for step, _ in recorded] == list(range(1, len(recorded) + 1))
    return len(recorded)


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="asks Linux for the memory of a process")
def test_memory_files_and_record_of_a_long_run(tmp_path):
    (tmp_path / "judge.py").write_text("def judge(solution_str, **others): return len(solution_str) % 2")
    constants = SETTINGS | {"OUTPUT_DIR": tmp_path / "run", "REWARD": f"{tmp_path / 'judge.py'}:judge"}
    command = [sys.executable, "dapo.py", *(f"--{name}={value}" for name, value in constants.items())]
    with open(tmp_path / "log", "w") as log:
        run = subprocess.Popen(command, cwd=ROOT, env=os.environ | RETURN_WHAT_IS_FREED, stdout=log, stderr=log)
    memory, files, third = [[], [], []], [[], [], []], STEPS // 3
    while run.poll() is None:
        time.sleep(0.05)
        with contextlib.suppress(OSError, sqlite3.OperationalError):  # before there is a run.db, or after the run
            step = look_into(tmp_path / "run/run.db")
            pages = int(Path(f"/proc/{run.pid}/statm").read_text().split()[1])
            if step % third:  # at the others it evaluates, draws, and ends
                memory[step // third].append(pages * os.sysconf("SC_PAGE_SIZE") / 2**20)
                files[step // third].append(len(os.listdir(f"/proc/{run.pid}/fd")))
    assert run.returncode == 0, (tmp_path / "log").read_text()
    assert look_into(tmp_path / "run/run.db") == STEPS
    print(*(f"{min(m):.0f} to {max(m):.0f} MiB, {min(f)} to {max(f)} files" for m, f in zip(memory, files)), sep="\n")
    assert min(memory[2]) < min(memory[1]) + 40  # between looks it goes up and down by as much
    assert min(files[2]) <= min(files[1]) <= min(files[0]) and max(files[2]) < min(files[0]) + 3

"""Does a long run keep its memory, its open files and its record in order? Needs Linux (/proc).

    python benchmarks/soak.py                 500 steps on the toy, 8 questions a step: about 10 minutes on 2 cores
    python benchmarks/soak.py --steps 5000    or for as long as you like

It starts dapo.py in a process of its own, and twice a second looks at that process and reads its run.db, as somebody
might who watches a run. In the end it prints resident memory and open files along the way, and what was wrong with
run.db, if anything. Exit status 1 if something was.
"""

import argparse
import contextlib
import os
import sqlite3
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = dict(BATCH_SIZE=8, MINI_BATCHES=4, EVAL_EVERY=25, RESUME=False)


def faults_in(path):
    """What does not fit together in run.db, and the last step in it."""
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.execute("BEGIN")  # all that follows sees one state
        (sound,) = db.execute("PRAGMA quick_check").fetchone()
        accuracy = dict(db.execute("SELECT step, value FROM metrics WHERE name = 'accuracy'"))
        answers = dict(db.execute("SELECT step, AVG(accuracy) FROM responses GROUP BY step"))
    last = max(accuracy, default=0)
    faults = [] if sound == "ok" else [sound]
    if list(accuracy) != list(range(1, last + 1)) or set(accuracy) != set(answers):
        faults.append(f"at step {last} not every step has metrics and responses")
    faults += [f"step {n}: accuracy" for n in accuracy if n in answers and abs(accuracy[n] - answers[n]) > 1e-9]
    return faults, last


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--out", default="outputs/soak")
    options = parser.parse_args()
    arguments = [f"--{n}={v}" for n, v in {**SETTINGS, "NUM_STEPS": options.steps, "OUTPUT_DIR": options.out}.items()]
    start = time.time()
    run = subprocess.Popen([sys.executable, "dapo.py", *arguments], cwd=ROOT, stdout=subprocess.DEVNULL)
    db, seen, faults, reads = ROOT / options.out / "run.db", {}, set(), 0
    while run.poll() is None:
        time.sleep(0.5)
        with contextlib.suppress(
            OSError, sqlite3.OperationalError
        ):  # before there is a run.db, after there is a process
            if db.stat().st_mtime > start:
                found, step = faults_in(db)
                faults.update(found)
                resident = int(Path(f"/proc/{run.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
                seen.setdefault(step, []).append((resident / 2**20, len(os.listdir(f"/proc/{run.pid}/fd"))))
                reads += 1
    faults.update(faults_in(db)[0])
    print(
        f"{options.steps} steps in {time.time() - start:.0f} s, exit status {run.returncode}, run.db read {reads} times"
    )
    print("| steps | resident memory (MiB), median | highest | open files, median | highest |\n|---|---|---|---|---|")
    edges = [1, 20, *range(100, options.steps + 1, 100)]
    for first, last in zip(edges, edges[1:]):
        looks = [look for step in seen if first <= step < last for look in seen[step]]
        if looks:
            memory, files = zip(*looks)
            figures = (
                f"{statistics.median(memory):.0f} | {max(memory):.0f} | {statistics.median(files):.0f} | {max(files)}"
            )
            print(f"| {first}-{last - 1} | {figures} |")
    print("\n".join(sorted(faults)) or "run.db was in order every time")
    sys.exit(bool(faults or run.returncode))


if __name__ == "__main__":
    main()

"""Puts the metrics that verl has recorded in a folder of tools/verl.py into run.db, by our names, for tools.plot.

python -m tools.verl_metrics verl_run
python -m tools.plot outputs/dapo verl_run
"""

import collections
import contextlib
import json
import re
import sqlite3
import sys
from pathlib import Path

from pyarrow import parquet

import dapo

METRICS = {  # verl's name: ours
    "critic/score/mean": "reward/mean",
    "response_length/mean": "response_length/mean",
    "response_length/max": "response_length/max",
    "actor/entropy": "entropy",
    "actor/pg_loss": "policy_loss",
    "actor/kl_loss": "kl",
    "actor/grad_norm": "grad_norm",
    "timing_s/gen": "time/generate",
    "timing_s/update_actor": "time/update",
    "timing_s/step": "time/step",
}


def main(argv=None):
    folders = sys.argv[1:] if argv is None else argv
    if "-h" in folders or "--help" in folders:
        print(__doc__)
    elif len(folders) != 1 or folders[0].startswith("-"):
        dapo.fail("python -m tools.verl_metrics takes a folder that verl has trained in, and nothing else")
    else:
        read(Path(*folders))


def read(folder):
    """Puts verl's metrics into run.db by our names. A run that was resumed has a metrics file for each start."""
    with dapo.explained(f"{folder}: verl's metrics cannot be read"):
        held_out = parquet.read_table(folder / "test.parquet", columns=["data_source"])["data_source"].to_pylist()
        limit = int(re.search(r"data\.max_response_length=(\d+)", (folder / "run.sh").read_text(encoding="utf-8"))[1])
        starts = [read_lines(file) for file in sorted(folder.glob("metrics_*.jsonl"))]
        if not any(starts):
            raise ValueError("there is no metrics_*.jsonl with a line in it yet")
        with contextlib.closing(sqlite3.connect(folder / "run.db")) as db:
            for lines in filter(None, starts):
                db.executescript(dapo.TABLES.format(step=lines[0]["step"]))
                rows = [
                    (line["step"], *metric) for line in lines for metric in our_metrics(line["data"], held_out, limit)
                ]
                db.executemany("INSERT OR REPLACE INTO metrics VALUES (?, ?, ?)", rows)
                db.commit()
    steps = {line["step"] for lines in starts for line in lines}
    dapo.say(f"{folder / 'run.db'}: metrics of {len(steps)} steps")


def read_lines(file):
    """The lines of one of verl's metrics files; the last one may still be in writing."""
    return [json.loads(line) for line in file.open(encoding="utf-8") if line.endswith("\n")]


def our_metrics(found, held_out, limit):
    """(name, value) of what verl has found in one step, by our names.

    verl's rewards and lengths are those of the groups trained on, ours of all groups sampled. held_out: the data source
    of each held-out question, because verl gives the accuracy on each source, and we give that on all questions.
    limit: of the response length, because what verl counts as cut off is as long as the longest response.
    """
    yield from ((METRICS[name], value) for name, value in found.items() if name in METRICS)
    if "response_length/max" in found:
        cut_off = found["response_length/max"] >= limit
        yield "truncated_fraction", found["response_length/clip_ratio"] if cut_off else 0
    accuracies = collections.defaultdict(list)
    for source, questions in collections.Counter(held_out).items():
        for name, value in found.items():
            if match := re.fullmatch(rf"val-core/{re.escape(source)}/acc/mean@(\d+)", name):
                accuracies[int(match[1])].append((value * questions, questions))
    for k, pairs in accuracies.items():
        right, questions = map(sum, zip(*pairs))
        yield "eval/accuracy" if k == 1 else f"eval/avg@{k}", right / questions


if __name__ == "__main__":
    main()

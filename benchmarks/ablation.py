"""Table 1 of the DAPO paper on the toy: what does each idea add, and what is lost without it?

    python benchmarks/ablation.py                                     all settings, 3 seeds each
    python benchmarks/ablation.py --seeds 5 --settings grpo.py dapo   some of them, 5 seeds

The first six settings are the paper's: naive GRPO, and on top of it one idea after the other. KL_COEF is 0 in all of
them, because no line of that table is about it; grpo.py, which has it, is a setting of its own. Then come DAPO as
dapo.py has it, which, like the authors' own scripts, does without overlong filtering, and the same with one idea taken
out at a time. The last two are DAPO with and without clip-higher when a batch is used for 64 updates instead of 16,
which gives the clip more to do.

Each run is dapo.py in a process of its own, on one thread, as many at a time as there are cores. A finished run is not
repeated and an interrupted one is resumed, so you can stop and start this script at will. Everything is in
outputs/ablation: a folder and a log for each run, the table in ablation.md, and the picture in ablation.png.
"""

import argparse
import math
import os
import signal
import sqlite3
import statistics
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

from matplotlib.figure import Figure
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from tools import plot  # noqa: E402

FOLDER = ROOT / "outputs" / "ablation"
STEPS, MIDDLE, LATE = 30, 20, 5  # of a run; where accuracy is also read off; the last so many make an "end" value
LOOK_EVERY = 1  # seconds between looks at the runs
RUN = {"NUM_STEPS": STEPS, "EVAL_EVERY": 2, "EVAL_SAMPLES": 4}

IDEAS = {
    "overlong filtering": {"USE_OVERLONG_FILTERING": True},
    "clip-higher": {"CLIP_RANGE_HIGH": 0.28},
    "soft overlong punishment": {"OVERLONG_BUFFER_LENGTH": 32},
    "token-level loss": {"LOSS_AGG_MODE": "token-mean"},
    "dynamic sampling": {"USE_DYNAMIC_SAMPLING": True},
}
WITHOUT = {  # the same constants where the idea is not used
    "KL_COEF": 0.0,
    "USE_OVERLONG_FILTERING": False,
    "CLIP_RANGE_HIGH": 0.2,
    "OVERLONG_BUFFER_LENGTH": 0,
    "LOSS_AGG_MODE": "seq-mean-token-mean",
    "USE_DYNAMIC_SAMPLING": False,
}
LADDER = ["naive GRPO", *(f"+ {idea}" for idea in IDEAS)]
PAPER = dict(zip(LADDER, ["30", "36", "38", "41", "42", "50"]))  # AIME 2024, avg@32, Qwen2.5-32B


def all_settings():
    """{name: (script, constants)}: grpo.py, the six of the paper's table, DAPO, DAPO with one idea taken out."""
    settings, constants = {"grpo.py": ("grpo.py", {})}, WITHOUT
    for name, changed in zip(LADDER, [{}, *IDEAS.values()]):
        constants = constants | changed
        settings[name] = "dapo.py", constants
    dapo = constants | {"USE_OVERLONG_FILTERING": False}
    settings["dapo"] = "dapo.py", dapo
    for idea, changed in list(IDEAS.items())[1:]:
        settings[f"dapo without {idea}"] = "dapo.py", dapo | {name: WITHOUT[name] for name in changed}
    for name in ("dapo", "dapo without clip-higher"):
        settings[f"{name}, 64 updates"] = "dapo.py", settings[name][1] | {"MINI_BATCHES": 64}
    return settings


def folder_of(setting, seed):
    return FOLDER / f"{setting.replace('+ ', 'with ').replace(', ', '_').replace(' ', '_')}_seed{seed}"


def done(folder):
    return (folder / f"step_{STEPS}").exists()


def finished_runs(settings):
    """{setting: the curves of each of its finished runs}, for the settings that have any."""
    runs = {}
    for name in settings:
        for path in sorted(FOLDER.glob(folder_of(name, "*").name)):
            if done(path) and path.name.rpartition("seed")[2].isdigit():  # dapo.py has renamed others: ..._seed0_1
                runs.setdefault(name, []).append(plot.with_derived(plot.read_metrics(path)))
    return runs


def start(script, constants, folder, seed):
    constants = RUN | constants | {"SEED": seed, "OUTPUT_DIR": folder}
    command = [sys.executable, script, *(f"--{name}={value}" for name, value in constants.items())]
    with open(f"{folder}.log", "a") as log:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)


def steps_done(folder):
    if not (folder / "run.db").exists():
        return 0
    with closing(sqlite3.connect(folder / "run.db")) as db:
        try:
            return db.execute("SELECT MAX(step) FROM metrics").fetchone()[0] or 0
        except sqlite3.OperationalError:  # not yet a table in it
            return 0


def train_all(settings, seeds, jobs):
    """Runs what is not done yet, seed by seed, so that all settings have equally many runs along the way."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    runs = [(folder_of(name, seed), seed, *settings[name]) for seed in range(seeds) for name in settings]
    waiting, running = [run for run in runs if not done(run[0])], {}
    bar = tqdm(total=len(runs) * STEPS, unit="step", disable=None)
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                folder, seed, script, constants = waiting.pop(0)
                running[folder] = start(script, constants, folder, seed)
            time.sleep(LOOK_EVERY)
            for folder, process in list(running.items()):
                if process.poll() is not None:
                    del running[folder]
                    if process.returncode:
                        plot.fail(f"{folder.name} ended with exit status {process.returncode}: see {folder}.log")
                    tqdm.write(f"{time.strftime('%H:%M:%S')} done: {folder.name}, {len(waiting)} wait")
            bar.n = sum(STEPS if done(run[0]) else steps_done(run[0]) for run in runs)
            bar.set_postfix_str(f"{sum(done(run[0]) for run in runs)} of {len(runs)} runs")
    finally:
        bar.close()
        for process in running.values():
            process.terminate()  # dapo.py then saves a checkpoint
        for process in running.values():
            process.wait()


def results(curves):
    """What the table says of one run."""
    at = {name: dict(zip(*curve)) for name, curve in curves.items()}
    sampled = f"eval/avg@{RUN['EVAL_SAMPLES']}"
    steps = next((step for step, value in at["eval/accuracy"].items() if value >= 0.9), math.inf)
    middle, end = range(STEPS // 2 - 2, STEPS // 2 + 3), range(STEPS - LATE + 1, STEPS + 1)

    def mean(name, steps):
        return statistics.mean(at[name][step] for step in steps if step in at[name])

    return {
        f"sampled, step {MIDDLE}": at[sampled][MIDDLE],
        f"sampled, step {STEPS}": at[sampled][STEPS],
        "sampled, mean over steps": mean(sampled, at[sampled]),
        f"greedy, step {MIDDLE}": at["eval/accuracy"][MIDDLE],
        f"greedy, step {STEPS}": at["eval/accuracy"][STEPS],
        "steps to 0.9 greedy": steps,
        "seconds to 0.9": 60 * at["minutes of training"].get(steps, math.inf),
        "entropy, mid-run": mean("entropy", middle),
        "truncated, end": mean("truncated_fraction", end),
        "groups with a gradient, end": mean("groups/with_gradient", end),
    }


def in_words(values, digits):
    """Mean ± standard error over seeds. A run that did not get there counts as none."""
    there = [value for value in values if math.isfinite(value)]
    if len(there) < len(values):
        return f"in {len(there)} of {len(values)} seeds" if there else "not reached"
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return f"{statistics.mean(values):.{digits}f} ± {error:.{digits}f}"


def table(runs):
    """The Markdown table."""
    lines, digits = [], {"steps to 0.9 greedy": 1, "seconds to 0.9": 0}
    for name, curves in runs.items():
        found = [results(run) for run in curves]
        cells = [in_words([result[column] for result in found], digits.get(column, 3)) for column in found[0]]
        lines.append([name, str(len(found)), PAPER.get(name, ""), *cells])
    head = ["setting", "seeds", "paper", *found[0]]
    return "".join(f"| {' | '.join(line)} |\n" for line in [head, ["---"] * len(head), *lines])


DRAWN = {  # title: metric
    "held-out accuracy, sampled": f"eval/avg@{RUN['EVAL_SAMPLES']}",
    "held-out accuracy, greedy": "eval/accuracy",
    "entropy (nats)": "entropy",
    "truncated responses": "truncated_fraction",
    "groups trained on that have a gradient": "groups/with_gradient",
}


def draw(runs):
    """The picture: above the paper's six settings, below DAPO and what is left of it without one idea."""
    rows = [name for name in LADDER if name in runs], [name for name in runs if name.startswith("dapo")]
    figure = Figure(figsize=(18, 7.5), layout="constrained")
    for part, names in zip(figure.subfigures(2, 1), rows):
        for axes, (title, metric) in zip(part.subplots(1, len(DRAWN)), DRAWN.items()):
            for name in names:
                x, mean, lowest, highest = plot.average(runs[name], metric, "step")
                (line,) = axes.plot(x, mean, linewidth=1.3, label=name)
                axes.fill_between(x, lowest, highest, color=line.get_color(), alpha=0.12)
            axes.set_title(title, fontsize="medium")
            axes.set_xlabel("step", fontsize="small")
            axes.grid(alpha=0.3)
        part.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=6, fontsize="small")
    figure.savefig(FOLDER / "ablation.png", dpi=75)


def count(text):
    if int(text) < 1:
        raise ValueError
    return int(text)


def main():
    settings = all_settings()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=count, default=3)
    parser.add_argument("--jobs", type=count, default=os.cpu_count(), help="runs at a time, on one thread each")
    parser.add_argument("--settings", nargs="+", choices=settings, default=list(settings), metavar="NAME")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the runs are stopped too
    try:
        train_all({name: settings[name] for name in options.settings}, options.seeds, options.jobs)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    runs = finished_runs(settings)
    draw(runs)
    (FOLDER / "ablation.md").write_text(table(runs), encoding="utf-8")
    print(table(runs))


if __name__ == "__main__":
    main()

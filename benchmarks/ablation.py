"""Table 1 of the DAPO paper on the toy: what does each idea add, and what is lost without it?

    python benchmarks/ablation.py                                     all settings, seeds 0 to 4; some, seeds 5 to 9
    python benchmarks/ablation.py --seeds 2 --settings grpo.py dapo   some of them, seeds 0 and 1

The paper's six come first: naive GRPO, and on top of it one idea after the other. KL_COEF is 0 in all of them, because
no line of that table is about it; grpo.py, which has it, is a setting of its own. Then come DAPO as dapo.py has it,
which, like the authors' own scripts, does without overlong filtering, and the same with one idea taken out at a time;
last, grpo.py and dapo.py at other learning rates. The algorithms in siblings/, and DAPO with LoRA, are run only if
they are named, as docs/siblings.md and docs/lora.md do.

The constants of dapo.py were chosen on seeds 0 to 4. FRESH settings are run on seeds 5 to 9 too, by which nothing was
chosen, and have lines of their own in the table.

Each run is dapo.py in a process of its own, on one thread, as many at a time as there are cores. A finished run is not
repeated and an interrupted one is resumed, so you can stop and start this script at will. Everything is in
outputs/ablation: a folder and a log for each run, the table in ablation.md, and the pictures ablation.png,
siblings.png, and lora.png.
"""

import argparse
import itertools
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

import numpy
from matplotlib.figure import Figure
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from tools import plot  # noqa: E402
from tools.curves import fail, read_metrics, with_derived  # noqa: E402

FOLDER = ROOT / "outputs" / "ablation"
STEPS, MIDDLE, LATE = 14, 8, 4  # of a run; where accuracy is also read off; the last so many make an "end" value
SEEDS = 5  # for each line of the table
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
RATES = ["1e-5", "5e-5"]  # other learning rates
FRESH = ["grpo.py", "dapo", "dapo without dynamic sampling"]
SIBLINGS = {
    "dr_grpo": ("-m siblings.dr_grpo", {}),
    "cispo": ("-m siblings.cispo", {}),
    "rloo": ("-m siblings.rloo", {}),
    "gspo": ("-m siblings.gspo", {}),
    "gspo, clip 0.97 to 1.04": ("-m siblings.gspo", {"CLIP_RANGE_LOW": 0.03, "CLIP_RANGE_HIGH": 0.04}),
    "gspo, four updates": ("-m siblings.gspo", {"MINI_BATCHES": 4, "DAPO_EPOCHS": 1}),
}
LORA = {
    f"LoRA, rank {rank}, learning rate {rate}": ("dapo.py", {"LORA_RANK": rank, "LEARNING_RATE": rate})
    for rank, rate in [(1, "2e-4"), (4, "2e-4"), (16, "2e-4"), (64, "2e-4"), (16, "2e-5"), (16, "1e-3")]
}
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
    for rate in RATES:
        settings[f"grpo.py, learning rate {rate}"] = "grpo.py", {"LEARNING_RATE": rate}
    settings[f"dapo, learning rate {RATES[-1]}"] = "dapo.py", {"LEARNING_RATE": RATES[-1]}
    return settings | SIBLINGS | LORA


def folder_of(setting, seed):
    return FOLDER / f"{setting.replace('+ ', 'with ').replace(', ', '_').replace(' ', '_')}_seed{seed}"


def done(folder):
    return (folder / f"step_{STEPS}").exists()


def planned(names, seeds):
    """[(setting, seed)], seed by seed, so that all settings have equally many runs along the way."""
    fresh = [(name, seed) for seed in range(SEEDS, 2 * SEEDS) for name in FRESH if name in names]
    return [(name, seed) for seed in range(seeds) for name in names] + (fresh if seeds == SEEDS else [])


def finished_runs(settings):
    """{line of the table: the curves of each of its finished runs}, for the lines that have any."""
    runs = {}
    for name, seed in planned(settings, SEEDS):
        if done(folder_of(name, seed)):
            line = name if seed < SEEDS else f"{name}, seeds {SEEDS} to {2 * SEEDS - 1}"
            runs.setdefault(line, []).append(with_derived(read_metrics(folder_of(name, seed))))
    return runs


def start(script, constants, folder, seed):
    constants = RUN | constants | {"SEED": seed, "OUTPUT_DIR": folder}
    command = [sys.executable, *script.split(), *(f"--{name}={value}" for name, value in constants.items())]
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
    """Runs what is not done yet."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    runs = [(folder_of(name, seed), seed, *settings[name]) for name, seed in planned(settings, seeds)]
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
                        fail(f"{folder.name} ended with exit status {process.returncode}: see {folder}.log")
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
    """What the table says of one run. Accuracy is that on held-out questions, of responses drawn at random."""
    at = {name: dict(zip(*curve)) for name, curve in curves.items()}
    accuracy = at[f"eval/avg@{RUN['EVAL_SAMPLES']}"]
    steps = reached(0.9, accuracy)
    policy_entropy = {step - 1: value for step, value in at["entropy"].items()}  # the samples of step 1 are the base's

    def mean(name, first=1):
        return statistics.mean(at[name][step] for step in range(first, STEPS + 1))

    return {
        f"accuracy, step {MIDDLE}": accuracy[MIDDLE],
        f"accuracy, step {STEPS}": accuracy[STEPS],
        f"greedy, step {MIDDLE}": at["eval/accuracy"][MIDDLE],
        f"greedy, step {STEPS}": at["eval/accuracy"][STEPS],
        "steps to 0.9": steps,
        "seconds to 0.9": 60 * value_at(steps, at["minutes of training"]),
        "entropy at 0.5": value_at(reached(0.5, accuracy), policy_entropy),
        "truncated, mean": mean("truncated_fraction"),
        "truncated, end": mean("truncated_fraction", STEPS - LATE + 1),
        "groups with a gradient": mean("groups/with_gradient"),
    }


def reached(level, curve):
    """The step, a fraction of one included, at which {step: value} first reaches a level, or infinity."""
    for (step, value), (next_step, next_value) in itertools.pairwise(curve.items()):
        if value < level <= next_value:
            return step + (next_step - step) * (level - value) / (next_value - value)
    return math.inf


def value_at(step, curve):
    """The value of {step: value} there, on a straight line between two steps; beyond them, infinity."""
    return float(numpy.interp(step, [*curve], [*curve.values()], right=math.inf))


def in_words(values, digits):
    """Mean ± standard error over seeds; of one seed, its value. A run that did not get there counts as none."""
    there = [value for value in values if math.isfinite(value)]
    if len(there) < len(values):
        return f"in {len(there)} of {len(values)} seeds" if there else "not reached"
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    error = statistics.stdev(values) / math.sqrt(len(values))
    return f"{statistics.mean(values):.{digits}f} ± {error:.{digits}f}"


def table(runs):
    """The Markdown table."""
    lines, digits = [], {"steps to 0.9": 1, "seconds to 0.9": 0}
    for name, curves in runs.items():
        found = [results(run) for run in curves]
        cells = [in_words([result[column] for result in found], digits.get(column, 3)) for column in found[0]]
        lines.append([name, str(len(found)), PAPER.get(name, ""), *cells])
    head = ["setting", "seeds", "paper", *found[0]]
    return "".join(f"| {' | '.join(line)} |\n" for line in [head, ["---"] * len(head), *lines])


DRAWN = {  # idea: the panel of tools/plot.py about what it changes
    "clip-higher": "entropy (nats per token)",
    "dynamic sampling": "groups with a gradient",
    "token-level loss": "response length (tokens)",
    "soft overlong punishment": "truncated responses",
}


def draw(runs):
    """The picture: a column for each idea, with DAPO and DAPO without it; above accuracy, below what it is about."""
    ideas = [idea for idea in DRAWN if {"dapo", f"dapo without {idea}"} <= runs.keys()]
    if not ideas:
        return
    figure = Figure(figsize=(3.4 * len(ideas), 6.5), layout="constrained")
    sampled = f"avg@{RUN['EVAL_SAMPLES']}"
    for column, idea in enumerate(ideas, 1):
        panels = {f"{idea}\n\naccuracy (held-out, {sampled})": (f"eval/{sampled}", "step", 0, 1)}
        panels[DRAWN[idea]] = plot.COMPARED[DRAWN[idea]]
        for place, (title, (metric, against, *limits)) in zip((column, len(ideas) + column), panels.items()):
            axes = figure.add_subplot(2, len(ideas), place)
            for number, (setting, label) in enumerate([("dapo", "with"), (f"dapo without {idea}", "without")]):
                plot.plot_runs(axes, runs[setting], metric, against, label=label, **plot.style(number))
            plot.picture.frame(axes, title, *limits, range(0, STEPS + 1, RUN["EVAL_EVERY"]))
            axes.legend(fontsize="small")
    figure.savefig(FOLDER / "ablation.png", dpi=160)


def draw_beside(runs, usual, named, picture):
    """Named settings beside the usual ones, as many as there are colors, as tools.plot compares runs; but not by time,
    as they may have run at different times, on a machine that was busy at some of them."""
    if not named.keys() & runs.keys():
        return
    names = [name for name in (*usual, *named) if name in runs][: len(plot.picture.COLORS)]
    untimed = {name: [run | {"minutes of training": ((), ())} for run in runs[name]] for name in names}
    plot.comparison_figure(untimed).savefig(FOLDER / picture, dpi=160)


def main():
    settings = all_settings()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, choices=range(1, SEEDS + 1), default=SEEDS)
    cores = range(1, os.cpu_count() + 1)
    parser.add_argument("--jobs", type=int, choices=cores, default=cores[-1], help="runs at a time, a core for each")
    usual = [name for name in settings if name not in SIBLINGS | LORA]
    parser.add_argument("--settings", nargs="+", choices=settings, default=usual, metavar="NAME")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the runs are stopped too
    try:
        train_all({name: settings[name] for name in options.settings}, options.seeds, options.jobs)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    runs = finished_runs(settings)
    draw(runs)
    draw_beside(runs, ["grpo.py", "dapo"], SIBLINGS, "siblings.png")
    draw_beside(runs, ["dapo"], LORA, "lora.png")
    (FOLDER / "ablation.md").write_text(table(runs), encoding="utf-8")
    print(table(runs))


if __name__ == "__main__":
    main()

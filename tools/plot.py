"""Draws training_metrics.png of a run again, or several runs in one picture, outputs/comparison.png.

    python -m tools.plot outputs/dapo                        one run
    python -m tools.plot outputs/grpo outputs/dapo           two runs, or any number of them
    python -m tools.plot outputs/a_seed0 outputs/a_seed1     two seeds, drawn as their mean and a band

Folders whose names differ only in seed0, seed1, ... at the end are one experiment, and the band reaches from its lowest
run to its highest. A trainer of your own takes part if it writes a table metrics(step, name, value) into run.db.
"""

import contextlib
import itertools
import math
import re
import sqlite3
import statistics
import sys
from pathlib import Path

COMPARED = {  # title: metric, x axis
    "held-out accuracy, greedy": ("eval/accuracy", "step"),
    "accuracy of the samples": ("accuracy", "step"),
    "response length (tokens)": ("response_length/mean", "step"),
    "held-out accuracy, by time": ("eval/accuracy", "minutes of training"),
    "entropy (nats)": ("entropy", "step"),
    "truncated responses": ("truncated_fraction", "step"),
    "share of groups with a gradient": ("groups/with_gradient", "step"),
    "accuracy of the samples, by time": ("accuracy", "minutes of training"),
}


def main(argv=None):
    folders = sys.argv[1:] if argv is None else argv
    if "-h" in folders or "--help" in folders:
        print(__doc__)
        return
    if not folders or any(folder.startswith("-") for folder in folders):
        fail("python -m tools.plot takes the folder of a run, or of several, and nothing else")
    for folder in folders:
        if not read_metrics(folder):
            fail(f"the run in {folder} has not recorded any metrics yet")
    try:
        print(compare(folders) if len(folders) > 1 else draw(*folders))
    except OSError as error:
        fail(f"the picture cannot be written: {error}")


def draw(folder):
    """Draws training_metrics.png of the run in a folder; returns its path."""
    import dapo  # only here, because that takes seconds

    dapo.draw_metrics(folder)
    return Path(folder, "training_metrics.png")


def compare(folders):
    """Draws several runs in one picture, outputs/comparison.png; returns its path."""
    from matplotlib.figure import Figure

    experiments = {}
    for folder in folders:
        name = re.sub(r"[-_/\\]?seed[-_]?\d+$", "", str(Path(folder)))
        experiments.setdefault(name, []).append(with_derived(read_metrics(folder)))
    figure = Figure(figsize=(15, 6.5))
    figure.subplots_adjust(left=0.04, right=0.99, bottom=0.08, top=0.87, wspace=0.2, hspace=0.45)
    for axes, (title, (metric, against)) in zip(figure.subplots(2, 4).flat, COMPARED.items()):
        for color, (name, runs) in enumerate(experiments.items()):
            x, mean, lowest, highest = average(runs, metric, against)
            label = name if len(runs) == 1 else f"{name} ({len(runs)} seeds)"
            axes.plot(x, mean, "o-" if metric == "eval/accuracy" else "-", color=f"C{color}", markersize=3, label=label)
            axes.fill_between(x, lowest, highest, color=f"C{color}", alpha=0.2)
        axes.set_title(title, fontsize="medium")
        axes.set_xlabel(against, fontsize="small")
        axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="upper center", ncols=4)
    picture = Path("outputs", "comparison.png")
    picture.parent.mkdir(exist_ok=True)
    figure.savefig(picture, dpi=80)
    return picture


def average(runs, metric, against):
    """(x, mean, lowest, highest) of a metric over the runs of one experiment, at the steps that all of them have."""
    curves = [dict(zip(*run.get(metric, ((), ())))) for run in runs]
    clocks = [dict(zip(*run.get(against, ((), ())))) for run in runs]  # none if x is the step itself
    steps = sorted(set.intersection(*map(set, curves if against == "step" else curves + clocks)))
    values = [[curve[step] for curve in curves] for step in steps]
    x = steps if against == "step" else [statistics.fmean(clock[step] for clock in clocks) for step in steps]
    return x, list(map(statistics.fmean, values)), list(map(min, values)), list(map(max, values))


def with_derived(curves):
    """Adds to read_metrics' curves the clock and, unless the run recorded it, the share of groups with a gradient."""

    def at(*names):
        """{step: the values of these metrics} at the steps that have all of them."""
        values = [dict(zip(*curves.get(name, ((), ())))) for name in names]
        return {step: [value[step] for value in values] for step in values[0] if all(step in value for value in values)}

    shares, even = {}, at("groups/all_correct", "groups/all_wrong", "dynamic_resample_rate")
    for step, (correct, wrong, dropped) in even.items():
        if dropped < 1:
            shares[step] = min(1.0, (1 - correct - wrong) / (1 - dropped))
    seconds = at("time/step") or at("time/generate", "time/update")
    minutes = itertools.accumulate(map(sum, seconds.values()), lambda total, more: total + more / 60, initial=0.0)
    derived = {"groups/with_gradient": ([*shares], [*shares.values()])}
    return derived | curves | {"minutes of training": ([0, *seconds], [*minutes])}


def read_metrics(folder):
    """{name: (steps, values)} of the run in a folder."""
    path, curves = Path(folder, "run.db"), {}
    if not path.exists():
        fail(f"there is no run in {folder}: {path} is missing")
    try:
        with contextlib.closing(sqlite3.connect(path)) as db:
            for step, name, value in db.execute("SELECT step, name, value FROM metrics ORDER BY step"):
                steps, values = curves.setdefault(name, ([], []))
                steps.append(step)
                values.append(math.nan if value is None else float(value))
    except (sqlite3.Error, ValueError) as error:
        fail(f"{path} cannot be read: {error}")
    return curves


def fail(message):
    """Ends the program for a reason that its user can mend: one line, exit status 2."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()

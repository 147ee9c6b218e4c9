"""Draws training_metrics.png of a run again, or several runs in one picture, outputs/comparison.png.

    python -m tools.plot outputs/dapo                                   one run
    python -m tools.plot outputs/grpo outputs/dapo                      two runs, or any number of them
    python -m tools.plot "GRPO=outputs/grpo" "DAPO=outputs/dapo"        the same, with names of your own
    python -m tools.plot outputs/a_seed0 outputs/a_seed1                two seeds, drawn as their mean and a band
    python -m tools.plot class                                          all runs in a folder: folders, or run.db files
    python -m tools.plot --each outputs/dapo outputs/clip outputs/sick  a column for each but the first, which is dashed

Folders whose names differ only in seed0, seed1, ... at the end are one experiment, and so are runs of the same name;
its band reaches from the lowest run to the highest. The bar at a held-out point of a single run is one standard error.
A run.db may stand alone, under a name of its own: class/dapo_seed7.db is drawn as class/dapo_seed7/run.db would be.
A trainer of your own takes part if it writes a table metrics(step, name, value) into run.db.
"""

import fnmatch
import itertools
import math
import re
import statistics
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

from tools.curves import fail, runs_in, split, with_derived

COMPARED = {  # title: metric, x axis, lowest and highest of the y axis
    "accuracy (held-out, greedy)": ("eval/accuracy", "step", 0, 1),
    "accuracy (training)": ("accuracy", "step", 0, 1),
    "response length (tokens)": ("response_length/mean", "step", 0, None),
    "accuracy by time (held-out)": ("eval/accuracy", "minutes of training", 0, 1),
    "entropy (nats per token)": ("entropy", "step", 0, None),
    "truncated responses": ("truncated_fraction", "step", 0, 1),
    "groups with a gradient": ("groups/with_gradient", "step", 0, 1),
    "accuracy by time (training)": ("accuracy", "minutes of training", 0, 1),
}
ROOM = 0.08  # for the name of a line, as a share of the height of a panel
NOTHING = "nothing that the picture shows has been recorded"
EACH = ["accuracy (training)", "response length (tokens)", "entropy (nats per token)", "truncated responses"]


def main(argv=None):
    words = sys.argv[1:] if argv is None else argv
    if "-h" in words or "--help" in words:
        return print(__doc__)
    places = [word for word in words if word != "--each"]
    if not places or any(place.startswith("-") for place in places):
        fail("python -m tools.plot takes the folder of a run, or of several, which may be NAME=FOLDER, and --each")
    experiments = read_experiments(places)
    path = Path("outputs", "comparison.png")
    if len(words) > 1 or not Path(split(*places)[1], "run.db").exists():
        figure = each_figure(experiments) if "--each" in words else comparison_figure(experiments)
    else:
        path = Path(split(*places)[1], "training_metrics.png")
        (curves,) = experiments.popitem()[1]
        patterns = [words.split()[0] for *_, metrics in picture.PANELS.values() for words in metrics.split("; ")]
        figure = picture.metrics_figure(curves) if any(fnmatch.filter(curves, p) for p in patterns) else fail(NOTHING)
    try:
        path.parent.mkdir(exist_ok=True)
        figure.savefig(path, dpi=160)
    except OSError as error:
        fail(f"the picture cannot be written: {error}")
    print(path)


def read_experiments(words):
    """{label: the curves of each of its runs}"""
    found, ends = {}, {}  # by the name that a run was given, or by its path
    for name, folder, curves in itertools.chain.from_iterable(map(runs_in, words)):
        key = name or Path(re.sub(r"([-_/\\]?seed[-_]?\d+)?(\.db)*$", "", str(Path(folder))))
        found.setdefault(key, []).append(with_derived(curves))
        ends.setdefault(key, {})[folder] = max(steps[-1] for steps, _ in curves.values())
    short = {key: key if isinstance(key, str) else key.absolute().name for key in found or fail(NOTHING)}
    count, experiments = Counter(short.values()), {}
    for key, runs in found.items():
        alike = count[short[key]] > 1 and isinstance(key, Path)
        label = (f"{key.parent}/{key.name}" if alike else short[key]).replace("$", r"\$")
        label = f" {label}" if label.startswith("_") else label  # else matplotlib would hide it
        experiments[label if len(runs) == 1 else f"{label} ({len(runs)} seeds)"] = runs
        if len({*ends[key].values()}) > 1:
            first = min(ends[key], key=ends[key].get)
            print(f"{label} is drawn up to step {ends[key][first]}, where the shortest run ends: {first}")
    return experiments


def section_of_dapo(title):
    """The names in a section of dapo.py, cut out of its text: to import all of it takes seconds, for torch and others,
    which may not even be installed where another trainer's runs are drawn."""
    text = Path(__file__).parents[1].joinpath("dapo.py").read_text(encoding="utf-8")
    names = {"math": math, "fnmatch": fnmatch}
    exec("#" + text.partition(f"\n# ---- {title}")[2].partition("\n# ---- ")[0], names)
    return SimpleNamespace(**names)


picture = section_of_dapo("The picture")


def comparison_figure(experiments):
    """All in each panel: one for each entry of COMPARED that has data."""
    from matplotlib.figure import Figure

    titles = with_data(experiments, COMPARED)
    rows = math.ceil(len(titles) / 4)
    figure = Figure(figsize=(14, 0.8 + 2.8 * rows), layout="constrained")
    for place, title in enumerate(titles, 1):
        axes = figure.add_subplot(rows, math.ceil(len(titles) / rows), place)
        for number, (label, runs) in enumerate(experiments.items()):
            plot_runs(axes, runs, *COMPARED[title][:2], label=label, **style(number))
        finish(axes, title, experiments)
        label_ends(axes)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4, handlelength=3)
    return figure


def each_figure(experiments):
    """A column for each but the first, which is drawn in all columns."""
    from matplotlib.figure import Figure

    (first, first_runs), *others = experiments.items()
    others or fail("python -m tools.plot --each takes two runs or more: it draws the first beside each of the others")
    titles = with_data(experiments, EACH)
    figure = Figure(figsize=(0.8 + 2.6 * max(2, len(others)), 0.8 + 2.2 * len(titles)), layout="constrained")
    grid = figure.subplots(len(titles), len(others), sharex=True, sharey="row", squeeze=False)
    for title, row in zip(titles, grid):
        for axes, (_, runs) in zip(row, others):
            plot_runs(axes, runs, *COMPARED[title][:2], **style(0))
            plot_runs(axes, first_runs, *COMPARED[title][:2], label=first, color="gray", linestyle="--")
        for axes, (label, _) in zip(row, others):
            finish(axes, title, experiments)
            name, below = label.replace(" (", "\n("), "step"
            axes.set(title=name if title == titles[0] else "", xlabel=below if title == titles[-1] else "")
        row[0].set_ylabel(title.replace(" (", "\n("))
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside upper center", handlelength=3)
    return figure


def style(number):
    """The dashed are drawn last, so that of lines that lie on each other both are seen."""
    color, dashes = picture.COLORS[number % 7], picture.LOOKS["linestyle"][number % 4]
    return {"color": color, "linestyle": dashes, "zorder": 2 + number % 4 / 10}


def plot_runs(axes, runs, metric, against, **style):
    """The line of an experiment: its mean with a band, or a single run, with bars at its held-out points."""
    x, mean, lowest, highest = average(runs, metric, against)
    held_out, errors = metric.startswith("eval/"), None
    if held_out and len(runs) == 1 and "eval/questions" in runs[0]:
        errors = [math.sqrt(max(0, p * (1 - p)) / runs[0]["eval/questions"][1][0]) for p in mean]
    marker = "o" if held_out or len(x) == 1 else ""
    axes.errorbar(x, mean, errors, marker=marker, markersize=3, clip_on=False, **style)
    axes.fill_between(x, lowest, highest, color=style["color"], alpha=0.15, linewidth=0)


def finish(axes, title, experiments):
    """Labels, limits, and ticks: at evaluations if there are any."""
    _, against, *limits = COMPARED[title]
    everything = [run for runs in experiments.values() for run in runs]
    curves = [run["eval/accuracy"] for run in everything if "eval/accuracy" in run] or everything[0].values()
    steps = sorted({step for steps, _ in curves for step in steps})
    locator = axes.xaxis.get_major_locator()
    picture.frame(axes, title, *limits, steps if against == "step" else [0])
    if against != "step":
        axes.set_xlabel(against)
        axes.xaxis.set_major_locator(locator)


def label_ends(axes):
    """Names the lines at their ends, moved apart if need be, unless they all end near each other."""
    bottom, top = axes.get_ylim()
    names = [re.sub(r" \(\d+ seeds\)$", "", drawn.get_label()) for drawn in axes.containers]
    names = [name if len(name) <= 16 else f"{name[:15]}…" for name in names]
    drawn = [(name, line.get_color(), line.get_ydata()) for name, (line, *_) in zip(names, axes.containers)]
    ends = sorted(((y[-1] - bottom) / (top - bottom), name, color) for name, color, y in drawn if len(y))
    if not ends or ends[-1][0] - ends[0][0] < 0.1:
        return
    heights = list(itertools.accumulate([end[0] for end in ends], lambda below, height: max(height, below + ROOM)))
    ceiling = 1 + ROOM
    for height, (_, name, color) in zip(reversed(heights), reversed(ends)):
        ceiling = min(height, ceiling - ROOM)
        axes.annotate(name, (1.02, ceiling), xycoords="axes fraction", color=color, fontsize="small", va="center")


def with_data(experiments, titles):
    """Those of the titles whose metric a run has recorded."""
    several = experiments.values()
    return [t for t in titles if any(average(runs, *COMPARED[t][:2])[0] for runs in several)] or fail(NOTHING)


def average(runs, metric, against):
    """(x, mean, lowest, highest) of a metric over the runs of one experiment, at the steps that all of them have."""
    curves = [dict(zip(*run.get(metric, ((), ())))) for run in runs]
    clocks = [dict(zip(*run.get(against, ((), ())))) for run in runs]  # none if x is the step itself
    steps = sorted(set.intersection(*map(set, curves if against == "step" else curves + clocks)))
    values = [[curve[step] for curve in curves] for step in steps]
    x = steps if against == "step" else [statistics.fmean(clock[step] for clock in clocks) for step in steps]
    return x, list(map(statistics.fmean, values)), list(map(min, values)), list(map(max, values))


if __name__ == "__main__":
    main()

"""tools.plot: runs side by side, also those of other trainers, without torch; and one run's own picture."""

import contextlib
import math
import os
import re
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from pathlib import Path

import matplotlib.figure
import pytest
from conftest import ROOT
from PIL import Image

import dapo
from tools import plot
from tools.curves import read_metrics, split, with_derived


def home_made_run(folder, metrics):
    """What a trainer of one's own has to write to be compared."""
    folder.mkdir(parents=True)
    with contextlib.closing(sqlite3.connect(folder / "run.db")) as db, db:
        db.execute("CREATE TABLE metrics (step INTEGER, name TEXT, value REAL)")
        db.executemany("INSERT INTO metrics VALUES (?, ?, ?)", metrics)
    return str(folder)


def test_seeds_are_averaged_and_clocks_added_up(tmp_path):
    """Two seeds by hand, one of them a step longer: x, mean, lowest and highest."""
    one = [(0, "eval/accuracy", 0.2), (1, "time/step", 60), (2, "eval/accuracy", 0.6), (2, "time/step", 120)]
    other = [(0, "eval/accuracy", 0.4), (1, "time/step", 120), (2, "eval/accuracy", 0.8), (2, "time/step", 180)]
    other += [(3, "eval/accuracy", 0.9), (3, "time/step", 60)]
    groups = [(2, "groups/all_correct", 0.3), (2, "groups/all_wrong", 0.2), (2, "dynamic_resample_rate", 0.0)]
    groups += [(3, "groups/all_correct", 0.3), (3, "groups/all_wrong", 0.2), (3, "dynamic_resample_rate", 0.6)]
    folders = [home_made_run(tmp_path / name, rows) for name, rows in (("a_seed0", one), ("a_seed1", other + groups))]
    runs = [with_derived(read_metrics(folder)) for folder in folders]
    expected = [0, 2], [0.3, 0.7], [0.2, 0.6], [0.4, 0.8]
    for found, right in zip(plot.average(runs, "eval/accuracy", "step"), expected):
        assert found == pytest.approx(right)
    assert plot.average(runs, "eval/accuracy", "minutes of training")[0] == pytest.approx([0, (3 + 5) / 2])
    # all groups were trained on in step 2, and in step 3 only those that differ within, less surplus ones
    assert plot.average(runs[1:], "groups/with_gradient", "step")[1] == pytest.approx([0.5, 1.0])
    assert plot.average(runs, "groups/with_gradient", "step") == ([], [], [], [])


def test_what_a_run_recorded_is_not_derived(tmp_path):
    """The share of groups with a gradient is the run's own, and a step without time/step took its two parts."""
    even = [("groups/all_correct", 0.3), ("groups/all_wrong", 0.2), ("dynamic_resample_rate", 0.0)]
    metrics = [(1, *row) for row in [*even, ("groups/with_gradient", 0.25)]]
    metrics += [(step, name, 60 * step) for step in (1, 2) for name in ("time/generate", "time/update")]
    curves = with_derived(read_metrics(home_made_run(tmp_path / "run", metrics)))
    assert curves["groups/with_gradient"] == ([1], [0.25])
    assert curves["minutes of training"] == ([0, 1, 2], [0, 2, 6])


METRICS = "accuracy response_length/mean entropy truncated_fraction groups/with_gradient time/step".split()


def full_run(folder, last=4, **constant):
    """A run with an evaluation every other step, each metric of which is a tenth of the step, but for some."""
    names = ["eval/accuracy", "eval/questions", *METRICS]
    rows = [(s, n, constant.get(n.split("/")[0], s / 10)) for s in range(last + 1) for n in names]
    rows = [(s, n, 50 if n == "eval/questions" else v) for s, n, v in rows if s % 2 == 0 or not n.startswith("eval/")]
    return home_made_run(folder, rows)


@pytest.fixture
def figures(monkeypatch):
    """The figures that are saved, for their parts to be read."""
    saved, save = [], matplotlib.figure.Figure.savefig
    monkeypatch.setattr(
        matplotlib.figure.Figure, "savefig", lambda self, *path, **how: (saved.append(self), save(self, *path, **how))
    )
    return saved


def legend(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def panels(figure):
    return {axes.get_title(): axes for axes in figure.axes}


def texts(figure):
    """Everything that is written in a figure, ticks included."""
    figure.canvas.draw()
    return [text.get_text() for text in figure.findobj(matplotlib.text.Text) if text.get_visible()]


def test_comparison(figures, monkeypatch, tmp_path, capsys):
    """Runs of any number, some of trainers with few metrics, in one picture by the last parts of their names."""
    monkeypatch.chdir(tmp_path)
    folders = [
        home_made_run(tmp_path / name, [(step, "accuracy", step / 10), (step, "time/step", 1.0)])
        for name, step in (("mine", 1), ("b_seed0", 2), ("b_seed1", 2), ("c/seed3", 4))
    ]
    plot.main(folders)
    assert capsys.readouterr().out.strip() == str(Path("outputs/comparison.png"))
    assert legend(figures[0]) == ["mine", "b (2 seeds)", "c"]
    assert [*panels(figures[0])] == ["accuracy (training)", "accuracy by time (training)"]  # no panel without data
    assert min(Image.open(tmp_path / "outputs/comparison.png").size) > 500


def test_a_class(figures, monkeypatch, tmp_path, capsys):
    """A folder of runs: each in a folder of its own, or as its run.db alone, under another name."""
    monkeypatch.chdir(tmp_path)
    for n in range(20):
        last = 2 if n == 7 else 4
        folder = full_run(tmp_path / f"class/{'dapo' if n % 2 else 'grpo'}_seed{n}", last=last, accuracy=n / 20)
        if n > 9:
            Path(folder, "run.db").rename(f"{folder}.db")
            Path(folder).rmdir()
    Path("class/notes.txt").touch()
    Path("class/empty").mkdir()
    plot.main(["class"])
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "dapo is drawn up to step 2, where the shortest run ends: class/dapo_seed7"
    assert said[1:] == ["outputs/comparison.png"] and legend(figures[0]) == ["dapo (10 seeds)", "grpo (10 seeds)"]
    dapo_line, grpo_line = panels(figures[0])["accuracy (training)"].lines[:2]
    assert (
        dapo_line.get_ydata()[-1] == pytest.approx(sum(range(1, 20, 2)) / 10 / 20) and len(grpo_line.get_xdata()) == 5
    )
    plot.main(["class/dapo_seed11.db"])  # a run.db alone has no folder for its picture
    plot.main(["GRPO=class/grpo_seed0", "others=class"])
    assert legend(figures[1]) == ["dapo"] and legend(figures[2]) == ["GRPO", "others (20 seeds)"]
    assert len(capsys.readouterr().out.splitlines()) == 3  # the shortest of "others" is told, too

    shutil.copy("class/dapo_seed3/run.db", "class/dapo_seed3.db")  # as handed in, and the folder that it comes from
    Path("class/grpo_seed18.db").rename("class/grpo_seed18.db.db")  # Windows hides the first .db
    plot.main(["class"])
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("class/dapo_seed3.db is left out: class/dapo_seed3 is drawn") and len(said) == 3
    assert legend(figures[3]) == ["dapo (10 seeds)", "grpo (10 seeds)"]
    Path("class/dapo_seed3.db").unlink()

    Path("class/dapo_seed19.db").rename("class/run.db")  # handed in under the name that all have
    plot.main(["class"])
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("class/run.db is drawn alone: give it a name of its own") and len(said) == 2
    assert Path("class/training_metrics.png").exists()


@pytest.mark.filterwarnings("ignore")
def test_a_class_with_files_that_are_no_runs(figures, monkeypatch, tmp_path, capsys):
    """Those that Windows and macOS add, and broken or empty ones, keep nobody from being drawn; but a run that was
    named has to be one."""
    monkeypatch.chdir(tmp_path)
    full_run(tmp_path / "class/dapo_seed1")
    for name in ("Thumbs.db", "._dapo_seed1.db", "broken_seed2.db"):
        Path("class", name).write_text("no database")
    home_made_run(tmp_path / "class/begun_seed3", [])
    Path("class/empty_seed4.db").touch()
    plot.main(["class"])
    said = capsys.readouterr()
    assert said.out == "outputs/comparison.png\n" and legend(figures[0]) == ["dapo"]
    assert [re.findall("class/[^ :]+", line)[0] for line in said.err.splitlines()] == [
        "class/Thumbs.db", "class/begun_seed3", "class/broken_seed2.db", "class/empty_seed4.db",
    ]  # fmt: skip
    for words in (["class/broken_seed2.db"], ["class/dapo_seed1", "class/begun_seed3"]):
        with pytest.raises(SystemExit):
            plot.main(words)
    shutil.rmtree("class/dapo_seed1")
    with pytest.raises(SystemExit):
        plot.main(["class"])
    assert plot.NOTHING in capsys.readouterr().err


@pytest.mark.skipif(os.name != "posix", reason="Windows has other permissions")
def test_a_run_in_a_folder_that_cannot_be_written():
    """In WAL mode, as every run.db of ours: SQLite would write there even to read. Root may write anywhere, so then it
    is read as nobody."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place, "shared")
        folder.mkdir()
        with contextlib.closing(sqlite3.connect(folder / "run.db")) as db, db:
            db.executescript(dapo.TABLES.format(step=0))
            db.execute("INSERT INTO metrics VALUES (1, 'accuracy', 0.5)")
        Path(place).chmod(0o755)
        folder.chmod(0o555)
        become = "import os; os.geteuid() or os.setuid(65534)\n"
        code = f"from tools.curves import read_metrics\n{become}print(read_metrics({str(folder)!r}))"
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
        folder.chmod(0o755)
    assert done.stdout.strip() == "{'accuracy': ([1], [0.5])}", done.stderr


def test_names(figures, monkeypatch, tmp_path):
    """Of one's own, with a "=" in a folder's name, of two runs, and whole paths where their last parts are alike."""
    monkeypatch.chdir(tmp_path)
    for folder in ("one", "lr=3", "a/run", "b/run", "c"):
        full_run(Path(folder))
    plot.main(["first=one", "lr=3", "rate=lr=3", "two=a/run", "two=b/run", "a/run", "b/run", "$x$_y=c", "_=c"])
    names = ["first", "lr=3", "rate", "two (2 seeds)", "a/run", "b/run", r"\$x\$_y", " _"]
    assert legend(figures[0]) == names


def test_a_name_that_is_also_that_of_a_folder(monkeypatch, tmp_path):
    """Does not make one experiment of two."""
    monkeypatch.chdir(tmp_path)
    full_run(Path("one"))
    full_run(Path("c"))
    full_run(Path("x/c"))
    assert [*plot.read_experiments(["c", "c=one", "x/c"])] == ["./c", "c", "x/c"]
    assert split("a=b=c") == ("a", "b=c") and split("one") == ("", "one")


def test_axes_tell_the_truth(figures, monkeypatch, tmp_path):
    """Shares from 0 to 1, amounts from 0, and steps of evaluations as ticks, though accuracy is between 0.3 and 0.5."""
    monkeypatch.chdir(tmp_path)
    for folder in "ab":
        full_run(Path(folder), accuracy=0.3, entropy=0.5)
    plot.main(["a", "b"])
    for title, axes in panels(figures[0]).items():
        limits = axes.get_ylim()
        assert limits[0] == 0 and (limits[1] == 1) == title.startswith(("accuracy", "truncated", "groups")), title
        if "time" not in title:
            assert list(axes.get_xticks()) == [0, 2, 4] and axes.get_xlabel() == "step"
    assert figures[0].axes[3].get_xlabel() == "minutes of training"


def test_error_bars(figures, monkeypatch, tmp_path):
    """One standard error at the held-out points of a single run, and none in the means of several or without n."""
    monkeypatch.chdir(tmp_path)
    full_run(Path("a"))
    full_run(Path("b_seed0"))
    full_run(Path("b_seed1"))
    home_made_run(Path("c"), [(step, "eval/accuracy", 0.5) for step in (0, 2)])
    plot.main(["a", "b_seed0", "b_seed1", "c"])
    single, several, without = panels(figures[0])["accuracy (held-out, greedy)"].containers
    bars = [bar[1][1] - bar[0][1] for bar in single.lines[2][0].get_segments()]
    assert bars == pytest.approx([0, 2 * 0.0565685, 2 * 0.0692820], abs=1e-6)  # of 0.2 and 0.4, with 50 questions
    assert not several.lines[2] and not without.lines[2]


def test_names_at_the_ends_of_lines(figures, monkeypatch, tmp_path):
    """Where they end apart, in the order of their values, and none above another."""
    monkeypatch.chdir(tmp_path)
    for name, length in (("a", 50), ("b", 51), ("c", 10)):
        full_run(Path(name), response_length=length, entropy=0.3)
    plot.main(["a", "b", "c"])
    named = panels(figures[0])
    found = sorted((text.xy[1], text.get_text()) for text in named["response length (tokens)"].texts)
    assert [name for _, name in found] == ["c", "a", "b"] and found[2][0] - found[1][0] > 0.07
    assert not named["entropy (nats per token)"].texts


def test_each(figures, monkeypatch, tmp_path, capsys):
    """A column for each run but the first, which is in all of them, and a row for each metric, with one scale."""
    monkeypatch.chdir(tmp_path)
    for name, length in (("a", 20), ("b", 30), ("c", 90)):
        full_run(Path(name), response_length=length)
    plot.main(["--each", "as it is=a", "b", "longer=c"])
    assert capsys.readouterr().out.strip() == str(Path("outputs/comparison.png"))
    (figure,) = figures
    assert legend(figure) == ["as it is"] and len(figure.axes) == 8
    assert [axes.get_title() for axes in figure.axes] == ["b", "longer", *[""] * 6]
    left, right = figure.axes[2:4]
    assert left.get_ylabel() == "response length\n(tokens)" and left.get_ylim() == right.get_ylim()
    assert [[line.lines[0].get_ydata()[-1] for line in axes.containers] for axes in (left, right)] == [
        [30, 20],
        [90, 20],
    ]
    assert figure.axes[0].get_ylim() == (0, 1) and list(figure.axes[6].get_xticks()) == [0, 2, 4]


IDENTIFIER = r"[a-z]_[a-z]|[a-z]/[a-z]|kl\b"  # such as groups/all_wrong, or a folder


def test_words_are_plain(figures, monkeypatch, tmp_path):
    """No picture shows a metric's identifier or a folder's path."""
    monkeypatch.chdir(tmp_path)
    for name in ("x/a", "x/b"):
        full_run(Path(name))
    plot.main(["x/a", "x/b"])
    plot.main(["--each", "x/a", "x/b"])
    plot.main(["x/a"])
    figures.append(dapo.metrics_figure(curves_of_all()))
    for figure in figures:
        written = texts(figure)
        assert len(written) > 20 and not [text for text in written if re.search(IDENTIFIER, text)]


def curves_of_all(steps=range(0, 15), questions=256):
    """A curve for each metric that a run may record."""
    names = """accuracy eval/accuracy eval/avg@4 response_length/mean response_length/max eval/response_length entropy
    reward/mean reward/timeouts groups/all_correct groups/all_wrong groups/with_gradient groups_trained kl policy_loss
    entropy_loss dynamic_resample_rate truncated_fraction eval/truncated_fraction clip_fraction/low clip_fraction/high
    grad_norm time/step time/generate time/update learning_rate sampling_gap/max memory/peak_gib""".split()
    curves = {name: ([*steps], [0.2 for _ in steps]) for name in names}
    return curves | {"eval/questions": ([*steps], [questions for _ in steps])}


def labels(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()] if axes.get_legend() else []


def test_the_panels_of_one_run():
    figure = dapo.metrics_figure(curves_of_all())
    assert [*panels(figure)] == [*dapo.PANELS]
    shown = {title: labels(axes) for title, axes in panels(figure).items()}
    assert shown["accuracy"] == ["training", "held-out, greedy", "held-out, avg@4"]
    assert shown["groups"] == ["all right", "all wrong", "with a gradient"]
    assert shown["response length (tokens)"] == ["training", "held-out, greedy"] and shown["reward"] == ["mean"]
    widths = [axes.get_position().width for axes in figure.axes]
    assert min(widths[:4]) > 1.8 * max(widths[4:])  # the first four are large
    for title, axes in panels(figure).items():
        bottom, top = axes.get_ylim()
        if title in ("accuracy", "groups", "dropped groups", "truncated responses"):
            assert (bottom, top) == (0, 1)
        else:
            assert bottom == 0 if dapo.PANELS[title][0] == 0 else bottom < 0 < top


def test_the_bars_of_one_run():
    """sqrt(0.2 * 0.8 / 256) = 0.025; none if the number of questions is not known."""
    for curves, half in ((curves_of_all(), 0.025), (curves_of_all() | {"eval/questions": ([0], [math.inf])}, 0)):
        drawn = panels(dapo.metrics_figure(curves))["accuracy"].containers
        assert not drawn[0].lines[2]  # training
        for line in drawn[1:]:
            assert [end[1] for end in line.lines[2][0].get_segments()[3]] == pytest.approx([0.2 - half, 0.2 + half])
    del curves["eval/questions"]
    (low, high), *_ = panels(dapo.metrics_figure(curves))["accuracy"].containers[1].lines[2][0].get_segments()
    assert low[1] == high[1]


@pytest.mark.parametrize(
    "steps, ticks",
    [
        ([0], [0]),
        (range(0, 15, 2), [0, 2, 4, 6, 8, 10, 12, 14]),
        (range(0, 1001, 10), [0, 200, 400, 600, 800, 1000]),
        ([0, 20, 40, 60, 80, 100, 101], [0, 20, 40, 60, 80, 100]),  # 100 and 101 would lie on each other
        (range(0, 101, 7), [0, 14, 28, 42, 56, 70, 84, 98]),
        (range(0, 21, 2), [0, 4, 8, 12, 16, 20]),  # at equal distances
    ],
)
def test_ticks_are_at_evaluations(steps, ticks):
    figure = dapo.metrics_figure({"eval/accuracy": ([*steps], [0.5 for _ in steps]), "accuracy": ([1, 2], [0.4, 0.5])})
    assert list(figure.axes[0].get_xticks()) == ticks


def test_odd_curves():
    """Names that matplotlib would take for formulas or hide, one point, and no panel without data."""
    curves = {f"reward/{name}": ([1], [0.5]) for name in ("mean", "timeouts", "$a$_{b", "_hidden", "{}")}
    figure = dapo.metrics_figure(curves)
    assert [*panels(figure)] == ["reward"] and labels(figure.axes[0]) == ["mean", r"\$a\$_{b", "hidden", "{}"]
    assert "$a$_{b" in texts(figure) or r"\$a\$_{b" in texts(figure)
    assert all(line.lines[0].get_marker() not in ("", "None") for line in figure.axes[0].containers)
    assert figure.axes[0].get_ylim()[0] < 0.01  # the line at 0 is in it


@pytest.mark.parametrize("count, picture", [(1, "a/training_metrics.png"), (2, "outputs/comparison.png")])
def test_a_picture_takes_neither_torch_nor_transformers(count, picture, tmp_path):
    for name in "ab":
        home_made_run(tmp_path / name, [(1, "accuracy", 0.5), (1, "groups/all_wrong", None)])
    folders = ["a", "b"][:count]
    program = f"import sys, runpy; sys.argv[1:] = {folders}; runpy.run_module('tools.plot', run_name='__main__')"
    program += "; print(sorted({'torch', 'transformers', 'dapo', 'datasets', 'pyarrow'} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines() == [str(Path(picture)), "[]"]
    assert (tmp_path / picture).exists()


def test_the_picture_of_one_run(figures, tmp_path, capsys):
    metrics = [(step, name, step / 10) for step in range(4) for name in ("accuracy", "reward/mean", "eval/accuracy")]
    folder = home_made_run(tmp_path / "run", [*metrics, (3, "entropy", None)])
    plot.main([folder])
    picture = Path(capsys.readouterr().out.strip())
    assert picture == Path(folder) / "training_metrics.png"
    assert [*panels(figures[0])] == ["accuracy", "reward"]  # the entropy is NULL
    image = Image.open(picture)
    assert min(image.size) > 500 and len(set(image.convert("L").tobytes())) > 50
    dapo.draw_metrics(folder)
    assert image.tobytes() == Image.open(picture).tobytes()


def make_missing(folder):
    return "there is no run in"


def make_broken(folder):
    folder.mkdir()
    (folder / "run.db").write_bytes(b"no database" * 100)
    return "run.db cannot be read: file is not a database"


def make_empty(folder):
    folder.mkdir()
    sqlite3.connect(folder / "run.db").close()
    return "run.db cannot be read: no such table"


def make_begun(folder):
    home_made_run(folder, [])
    return "has not recorded any metrics yet"


def make_text(folder):
    home_made_run(folder, [(1, "accuracy", "high")])
    return "run.db cannot be read: could not convert"


@pytest.mark.parametrize("make", [make_missing, make_broken, make_empty, make_begun, make_text])
@pytest.mark.parametrize("others", [0, 1])
def test_a_folder_that_is_no_run(make, others, tmp_path, capsys):
    message = make(tmp_path / "run")
    good = [home_made_run(tmp_path / "good", [(1, "accuracy", 0.5)])] * others
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as end:
        plot.main([*good, str(tmp_path / "run")])
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.startswith("error: ") and said.count("\n") == 1
    assert message in said and str(tmp_path / "run") in said
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("arguments", [[], ["--each"], ["--NUM_STEPS=3"], ["run", "--seeds"]])
def test_other_arguments(arguments, capsys):
    with pytest.raises(SystemExit) as end:
        plot.main(arguments)
    said = capsys.readouterr().err
    assert end.value.code == 2 and "takes the folder of a run" in said and said.count("\n") == 1


@pytest.mark.parametrize(
    "metric, arguments, message",
    [
        ("accuracy", ["--each", "run"], "--each takes two runs or more"),
        ("loss", ["run"], "nothing that the picture shows"),
        ("loss", ["run", "a=run"], "nothing that the picture shows"),
        ("loss", ["--each", "run", "a=run"], "nothing that the picture shows"),
    ],
)
def test_nothing_to_draw(metric, arguments, message, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    home_made_run(Path("run"), [(1, metric, 0.5)])
    with pytest.raises(SystemExit) as end:
        plot.main(arguments)
    said = capsys.readouterr().err
    assert end.value.code == 2 and message in said and said.count("\n") == 1
    assert not Path("outputs").exists()


def test_a_picture_that_cannot_be_written(monkeypatch, tmp_path, capsys):
    folder = home_made_run(tmp_path / "run", [(1, "accuracy", 0.5)])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs").touch()
    with pytest.raises(SystemExit) as end:
        plot.main([folder, folder])
    assert end.value.code == 2 and "the picture cannot be written" in capsys.readouterr().err


def test_the_trainer_that_the_page_shows_can_be_compared(monkeypatch, tmp_path):
    """Its code as it stands, around a step that does nothing."""
    page = (ROOT / "docs/experiments.md").read_text(encoding="utf-8")
    code = next(part for part in re.findall("```python\n(.*?)```", page, re.DOTALL) if "train_one_step()" in part)
    monkeypatch.chdir(tmp_path)
    exec(code, {"train_one_step": lambda: {"accuracy": 0.4, "response_length/mean": 12.5}})
    curves = with_derived(read_metrics("outputs/mine"))
    assert curves["accuracy"] == (list(range(1, 41)), [0.4] * 40) and len(curves["minutes of training"][0]) == 41
    plot.main(["outputs/mine", "outputs/mine"])
    assert (tmp_path / "outputs/comparison.png").exists()


def test_without_times_there_is_no_panel_by_time(tmp_path):
    """Not even for the evaluation before training, whose time would be 0."""
    folders = [home_made_run(tmp_path / name, [(0, "eval/accuracy", 0.2), (2, "eval/accuracy", 0.6)]) for name in "ab"]
    figure = plot.comparison_figure(plot.read_experiments(folders))
    assert [axes.get_title() for axes in figure.axes] == ["accuracy (held-out, greedy)"]

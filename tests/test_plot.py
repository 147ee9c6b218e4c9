"""tools.plot: runs side by side, also those of other trainers, without torch; and one run's own picture."""

import contextlib
import re
import sqlite3
import subprocess
import sys
from pathlib import Path

import matplotlib.figure
import pytest
from conftest import ROOT
from PIL import Image

from tools import plot


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
    runs = [plot.with_derived(plot.read_metrics(folder)) for folder in folders]
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
    curves = plot.with_derived(plot.read_metrics(home_made_run(tmp_path / "run", metrics)))
    assert curves["groups/with_gradient"] == ([1], [0.25])
    assert curves["minutes of training"] == ([0, 1, 2], [0, 2, 6])


def test_comparison(monkeypatch, tmp_path, capsys):
    """Runs of any number, also of other trainers with few metrics, in one picture with their names."""
    monkeypatch.chdir(tmp_path)
    folders = [
        home_made_run(tmp_path / name, [(step, "accuracy", step / 10), (step, "time/step", 1.0)])
        for name, step in (("mine", 1), ("b_seed0", 2), ("b_seed1", 2), ("c/seed3", 4))
    ]
    labels, real = [], matplotlib.figure.Figure.legend
    monkeypatch.setattr(
        matplotlib.figure.Figure,
        "legend",
        lambda self, lines, names, **o: (labels.extend(names), real(self, lines, names, **o)),
    )
    plot.main(folders)
    assert capsys.readouterr().out.strip() == str(Path("outputs/comparison.png"))
    assert labels == [str(tmp_path / "mine"), f"{tmp_path / 'b'} (2 seeds)", str(tmp_path / "c")]
    assert min(Image.open(tmp_path / "outputs/comparison.png").size) > 500


def test_a_comparison_takes_neither_torch_nor_transformers(tmp_path):
    folders = [home_made_run(tmp_path / name, [(1, "accuracy", 0.5), (1, "groups/all_wrong", None)]) for name in "ab"]
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
    assert done.stdout.splitlines() == [str(Path("outputs/comparison.png")), "[]"]
    assert (tmp_path / "outputs/comparison.png").exists()


def test_the_picture_of_one_run(tmp_path, capsys):
    metrics = [(step, name, step / 10) for step in range(4) for name in ("accuracy", "reward/mean", "eval/accuracy")]
    folder = home_made_run(tmp_path / "run", [*metrics, (3, "entropy", None)])
    plot.main([folder])
    picture = Path(capsys.readouterr().out.strip())
    assert picture == Path(folder) / "training_metrics.png"
    image = Image.open(picture)
    assert min(image.size) > 500 and len(set(image.convert("L").tobytes())) > 50


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


@pytest.mark.parametrize("arguments", [[], ["--NUM_STEPS=3"], ["run", "--seeds"]])
def test_other_arguments(arguments, capsys):
    with pytest.raises(SystemExit) as end:
        plot.main(arguments)
    said = capsys.readouterr().err
    assert end.value.code == 2 and "takes the folder of a run" in said and said.count("\n") == 1


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
    curves = plot.with_derived(plot.read_metrics("outputs/mine"))
    assert curves["accuracy"] == (list(range(1, 41)), [0.4] * 40) and len(curves["minutes of training"][0]) == 41
    plot.main(["outputs/mine", "outputs/mine"])
    assert (tmp_path / "outputs/comparison.png").exists()

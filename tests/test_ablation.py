"""benchmarks/ablation.py: are the settings what they are called, and the table's figures those of the runs?"""

import runpy
import sqlite3
import subprocess
import sys

import pytest
from conftest import ROOT

import dapo

sys.path.insert(0, str(ROOT / "benchmarks"))
import ablation  # noqa: E402

SETTINGS = {name: constants for name, (script, constants) in ablation.all_settings().items()}


@pytest.fixture
def folder(monkeypatch, tmp_path):
    monkeypatch.setattr(ablation, "FOLDER", tmp_path)
    monkeypatch.setattr(ablation, "LOOK_EVERY", 0.02)
    return tmp_path


def test_the_first_is_grpo_and_dapo_is_dapo(main):
    assert SETTINGS["dapo"] == {name: getattr(dapo, name) for name in SETTINGS["dapo"]}
    runpy.run_path(str(ROOT / "grpo.py"))  # `main` sets dapo's constants back
    changed = {name for name in dapo.CONSTANTS if getattr(dapo, name) != dapo.CONSTANTS[name]}
    changed -= {"OUTPUT_DIR", "KL_COEF", "DEVICE"}  # conftest.py sets DEVICE
    assert changed < set(SETTINGS["naive GRPO"])
    assert all(getattr(dapo, name) == value for name, value in SETTINGS["naive GRPO"].items() if name != "KL_COEF")


def test_each_setting_is_one_idea_away():
    def changed(one, other):
        return {name for name in SETTINGS[one] if SETTINGS[one][name] != SETTINGS[other][name]}

    ladder = ablation.LADDER
    assert len(ladder) == len(ablation.PAPER) == len(ablation.IDEAS) + 1
    for one, other in zip(ladder, ladder[1:]):
        assert changed(one, other) == set(ablation.IDEAS[other.removeprefix("+ ")])
    assert changed(ladder[-1], "dapo") == set(ablation.IDEAS["overlong filtering"])
    for idea, constants in list(ablation.IDEAS.items())[1:]:
        without = SETTINGS[f"dapo without {idea}"]
        assert changed("dapo", f"dapo without {idea}") == set(constants)
        assert all(without[name] == SETTINGS["naive GRPO"][name] for name in constants)


def test_each_sibling_is_its_program():
    settings = {name: ablation.all_settings()[name] for name in ablation.SIBLINGS}
    files = {script.removeprefix("-m siblings.") for script, _ in settings.values()}
    assert files <= {path.stem for path in ROOT.glob("siblings/*.py")}
    assert all(constants.keys() <= dapo.CONSTANTS.keys() for _, constants in settings.values())


def make_run(setting, seed, shift=0.0):
    """A run whose accuracy is 0.08 a step and more, up to 1, whose entropy is its step, and so on."""
    path = ablation.folder_of(setting, seed)
    (path / f"step_{ablation.STEPS}").mkdir(parents=True)
    with sqlite3.connect(path / "run.db") as db:
        db.execute("CREATE TABLE metrics (step INTEGER, name TEXT, value REAL)")
        rows = [(n, "eval/accuracy", min(1, n / 10)) for n in range(15)]
        rows += [(n, "eval/avg@4", min(1, 0.08 * n) + shift) for n in range(0, 15, 2)]
        for n in range(1, 15):
            step = {"time/generate": 1.5, "time/update": 0.5, "entropy": n, "truncated_fraction": n / 100}
            step |= {"groups/with_gradient": 2 / 3, "response_length/mean": 5}
            rows += [(n, *item) for item in step.items()]
        db.executemany("INSERT INTO metrics VALUES (?, ?, ?)", rows)
    db.close()


def test_results_of_one_run(folder):
    make_run("dapo", 0)
    expected = {
        "accuracy, step 8": 0.64,
        "accuracy, step 14": 1.0,
        "greedy, step 8": 0.8,
        "greedy, step 14": 1.0,
        "steps to 0.9": 11.25,  # between 0.8 at 10 and 0.96 at 12
        "seconds to 0.9": 22.5,
        "entropy at 0.5": 7.25,  # that after 6.25 steps: step 7 begins with the policy that 6 steps have made
        "truncated, mean": 0.075,
        "truncated, end": 0.125,  # steps 11 to 14
        "groups with a gradient": 2 / 3,
    }
    assert [ablation.results(run) for run in ablation.finished_runs(["dapo"])["dapo"]] == [pytest.approx(expected)]


def test_table_and_picture(folder, monkeypatch):
    for seed, shift in enumerate([0.0, 0.01, 0.02]):
        make_run("naive GRPO", seed, shift)
    for name in ablation.all_settings():
        if name.startswith("dapo"):
            make_run(name, 0)
    make_run("dapo", ablation.SEEDS)
    (folder / "dapo_seed1").mkdir()  # interrupted: it does not count
    (folder / f"dapo_seed0_1/step_{ablation.STEPS}").mkdir(parents=True)  # renamed by dapo.py: nor does this
    runs = ablation.finished_runs(ablation.all_settings())
    head, _, naive, full, *_, fresh = ablation.table(runs).splitlines()
    columns = head.strip("| ").split(" | ")
    cells = dict(zip(columns, naive.strip("| ").split(" | ")))
    assert (cells["setting"], cells["seeds"], cells["paper"]) == ("naive GRPO", "3", "30")
    assert cells["accuracy, step 8"] == "0.650 ± 0.006"  # 0.01 / sqrt(3)
    assert cells["steps to 0.9"] == "11.1 ± 0.1"  # 11.25, 11.125, and 11
    assert full.startswith("| dapo | 1 |  | ") and fresh.startswith("| dapo, seeds 5 to 9 | 1 |  | ")
    drawn, save = [], ablation.Figure.savefig
    monkeypatch.setattr(
        ablation.Figure, "savefig", lambda self, *path, **how: (drawn.append(self), save(self, *path, **how))
    )
    ablation.draw(runs)
    assert (folder / "ablation.png").stat().st_size > 10_000
    assert len(drawn[0].axes) == 8  # two for each of four ideas
    for axes in drawn[0].axes:
        bottom, top = axes.get_ylim()
        assert bottom == 0 and (top == 1) == any(
            word in axes.get_title() for word in ("accuracy", "groups", "truncated")
        )
        assert list(axes.get_xticks()) == [*range(0, 15, 2)]
        assert [text.get_text() for text in axes.get_legend().get_texts()] == ["with", "without"]


def test_the_picture_of_the_siblings(folder, monkeypatch):
    """Beside GRPO and DAPO, those of them that have run, and without what a busy machine would change."""
    make_run("dapo", 0)
    runs = ablation.finished_runs(ablation.all_settings())
    ablation.draw_beside(runs, ["dapo"], ablation.SIBLINGS, "siblings.png")
    assert not (folder / "siblings.png").exists()  # no sibling has run
    for name in ("rloo", "gspo, clip 0.97 to 1.04", "dapo without clip-higher"):
        make_run(name, 0)
    drawn, save = [], ablation.Figure.savefig
    monkeypatch.setattr(
        ablation.Figure, "savefig", lambda self, *path, **how: (drawn.append(self), save(self, *path, **how))
    )
    runs = ablation.finished_runs(ablation.all_settings())
    ablation.draw_beside(runs, ["dapo"], ablation.SIBLINGS, "siblings.png")
    legend = [text.get_text() for text in drawn[0].legends[0].get_texts()]
    assert legend == ["dapo", "rloo", "gspo, clip 0.97 to 1.04"]
    assert not [axes for axes in drawn[0].axes if "time" in axes.get_title()]
    assert (folder / "siblings.png").stat().st_size > 10_000


def test_a_sibling_is_started_as_a_module(folder, monkeypatch):
    commands = []
    monkeypatch.setattr(ablation.subprocess, "Popen", lambda command, **_: commands.append(command))
    for name in ("gspo, four updates", "dapo"):
        ablation.start(*ablation.all_settings()[name], ablation.folder_of(name, 3), 3)
    gspo, dapo_run = (command[1:] for command in commands)
    assert gspo[:2] == ["-m", "siblings.gspo"] and {"--MINI_BATCHES=4", "--DAPO_EPOCHS=1", "--SEED=3"} < {*gspo}
    assert dapo_run[0] == "dapo.py"


def test_runs_that_did_not_get_there():
    inf = float("inf")
    assert ablation.in_words([inf, inf], 1) == "not reached"
    assert ablation.in_words([20, inf, 22], 1) == "in 2 of 3 seeds"


def test_what_is_done_is_not_done_again(folder, monkeypatch):
    started = []

    def start(script, constants, path, seed):
        started.append((path.name, seed))
        return subprocess.Popen(
            [sys.executable, "-c", f"import os; os.makedirs({str(path / f'step_{ablation.STEPS}')!r})"]
        )

    monkeypatch.setattr(ablation, "start", start)
    settings = {"dapo": ("dapo.py", {})}
    ablation.train_all(settings, 2, jobs=1)
    ablation.train_all(settings, 3, jobs=2)
    assert started == [("dapo_seed0", 0), ("dapo_seed1", 1), ("dapo_seed2", 2)]
    ablation.train_all(settings, ablation.SEEDS, jobs=4)
    assert [seed for _, seed in started] == [*range(10)]  # dapo is among those for which fresh seeds are run, too


def test_a_run_that_fails_stops_the_others(folder, monkeypatch, capsys):
    programs = iter(["import sys; sys.exit(2)", "import time; time.sleep(60)"])
    running = []

    def start(*_):
        running.append(subprocess.Popen([sys.executable, "-c", next(programs)]))
        return running[-1]

    monkeypatch.setattr(ablation, "start", start)
    with pytest.raises(SystemExit):
        ablation.train_all({"dapo": ("dapo.py", {})}, 2, jobs=2)
    assert "dapo_seed0 ended with exit status 2" in capsys.readouterr().err
    assert all(process.poll() is not None for process in running)

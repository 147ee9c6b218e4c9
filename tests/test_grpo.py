"""grpo.py is dapo.py with other constants, and nothing else: what it trains is what dapo.py trains with them."""

import runpy
import sys

import pytest
from conftest import ROOT, rows

import dapo


@pytest.fixture
def grpo(main):
    """Sets GRPO's constants, as importing grpo.py does; `main` sets them back."""
    before = {name: getattr(dapo, name) for name in dapo.CONSTANTS}
    runpy.run_path(str(ROOT / "grpo.py"))
    return {name: getattr(dapo, name) for name in before if getattr(dapo, name) != before[name]}


def test_it_changes_what_dapo_changed(grpo):
    """Each idea of DAPO's paper is undone. The filter was one that the paper tried before it had the penalty."""
    ideas = {"CLIP_RANGE_HIGH", "USE_DYNAMIC_SAMPLING", "LOSS_AGG_MODE", "OVERLONG_BUFFER_LENGTH", "KL_COEF"}
    assert set(grpo) == ideas | {"OUTPUT_DIR"}
    assert dapo.CLIP_RANGE_HIGH == dapo.CLIP_RANGE_LOW and dapo.KL_COEF > 0 and not dapo.USE_DYNAMIC_SAMPLING
    assert dapo.LOSS_AGG_MODE == "seq-mean-token-mean" and dapo.OVERLONG_BUFFER_LENGTH == 0
    assert dapo.OUTPUT_DIR == "outputs/grpo"


def test_its_command_line_is_that_of_dapo(grpo):
    assert dapo.read_command_line(["--GROUP_SIZE=4", "--KL_COEF=0.5"]) == []
    assert (dapo.GROUP_SIZE, dapo.KL_COEF, dapo.OUTPUT_DIR) == (4, 0.5, "outputs/grpo")
    assert all(getattr(dapo, name) == value for name, value in grpo.items() if name != "KL_COEF")


def test_help_says_what_it_sets(grpo, capsys):
    with pytest.raises(SystemExit) as end:
        dapo.read_command_line(["--help"])
    listed, _, here = capsys.readouterr().out.partition("# Set by this script\n")
    assert not end.value.code and "CLIP_RANGE_HIGH = 0.28  #" in listed
    assert {f"{name} = {value!r}" for name, value in grpo.items()} <= set(here.splitlines())
    assert "GROUP_SIZE" not in here


def test_as_a_program(main, settings, parity, no_pictures, monkeypatch, tmp_path, capsys):
    """What it has trained is saved with grpo.py as the script, and with its constants."""
    monkeypatch.setattr(sys, "argv", ["grpo.py", *settings, "--KL_COEF=0.5"])
    runpy.run_path(str(ROOT / "grpo.py"), run_name="__main__")
    saved = tmp_path / "run/step_2"
    assert (saved / "train_script.py").read_text() == (ROOT / "grpo.py").read_text()
    assert (saved / "dapo.py").read_text() == (ROOT / "dapo.py").read_text()
    recipe = runpy.run_path(str(saved / "constants.py"))
    assert (recipe["KL_COEF"], recipe["CLIP_RANGE_HIGH"], recipe["USE_DYNAMIC_SAMPLING"]) == (0.5, 0.2, False)
    found = dict(rows(tmp_path / "run", "SELECT name, value FROM metrics WHERE step = 2"))
    assert found["kl"] > 0 and found["dynamic_resample_rate"] == 0 and found["groups_trained"] == 3

    monkeypatch.setattr(sys, "argv", ["grpo.py", "--KL_CEOF=1"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "grpo.py"), run_name="__main__")
    assert stop.value.code == 2 and capsys.readouterr().err.strip().endswith("did you mean KL_COEF?")

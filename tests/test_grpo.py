"""grpo.py is dapo.py with other constants, and nothing else: what it trains is what dapo.py trains with them."""

import runpy
import subprocess
import sys

import pytest
from conftest import ROOT

import dapo


@pytest.fixture
def grpo(main):
    """Sets GRPO's constants, as importing grpo.py does; `main` sets them back."""
    before = {name: value for name, value in vars(dapo).items() if name.isupper()}
    runpy.run_path(str(ROOT / "grpo.py"))
    return {name: getattr(dapo, name) for name in before if getattr(dapo, name) != before[name]}


def test_it_changes_what_dapo_changed(grpo):
    """Each idea of DAPO's paper is undone. The filter was one that the paper tried before it had the penalty."""
    ideas = {"CLIP_RANGE_HIGH", "USE_DYNAMIC_SAMPLING", "LOSS_AGG_MODE", "OVERLONG_BUFFER_LENGTH", "KL_COEF"}
    assert set(grpo) == ideas | {"OUTPUT_DIR"}
    assert dapo.CLIP_RANGE_HIGH == dapo.CLIP_RANGE_LOW and dapo.KL_COEF > 0 and not dapo.USE_DYNAMIC_SAMPLING


def test_its_command_line_is_that_of_dapo(grpo):
    program = [sys.executable, "grpo.py", "--GROUP_SIZE=4", "--KL_COEF=0.5", "--help"]
    listed = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    values = dict(line.split()[0].lstrip("-").split("=") for line in listed.splitlines() if line.startswith("  --"))
    assert values["GROUP_SIZE"] == "4" and values["KL_COEF"] == "0.5" and values["OUTPUT_DIR"] == "outputs/grpo"
    assert all(values[name] == str(value) for name, value in grpo.items() if name != "KL_COEF")
    wrong = subprocess.run([*program[:2], "--KL_CEOF=1"], cwd=ROOT, capture_output=True, text=True)
    assert wrong.returncode == 2 and wrong.stderr.strip().endswith("did you mean KL_COEF?")


def test_the_trainer_that_the_readme_shows_can_be_compared(main, monkeypatch, tmp_path, capsys):
    """Its code as it stands, around a step that does nothing."""
    code = next(part for part in (ROOT / "README.md").read_text().split("```") if "train_one_step()" in part)
    monkeypatch.chdir(tmp_path)
    exec(code.removeprefix("python"), {"train_one_step": lambda: {"accuracy": 0.4, "response_length/mean": 12.5}})
    curves = dapo.record.with_derived(dapo.record.read_metrics("outputs/mine"))
    assert curves["accuracy"] == (list(range(1, 41)), [0.4] * 40) and len(curves["minutes of training"][0]) == 41
    main(["plot", "outputs/mine", "outputs/mine"])
    assert (tmp_path / "outputs/comparison.png").exists()

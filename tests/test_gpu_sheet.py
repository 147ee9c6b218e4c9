"""benchmarks/gpu.py: whatever becomes of a part, the sheet has the others and says what became of it."""

import os
import re
import subprocess
import sys
import time

import pytest
from conftest import ROOT

if not hasattr(os, "killpg"):
    pytest.skip("benchmarks/gpu.py needs process groups, which Windows lacks", allow_module_level=True)

sys.path.insert(0, str(ROOT / "benchmarks"))
import gpu  # noqa: E402

HANGS = """
import subprocess, sys, time
print('{"": "generate", "tokens a second": 150.0}', flush=True)
print("sampling\\n{\\"message\\": \\"a library's\\"}\\n{\\"\\": \\"half a li", flush=True)
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(25); open(PATH, 'w')"])
time.sleep(60)
"""


@pytest.mark.slow
def test_a_part_that_fails_or_hangs_loses_only_its_own_figures(tmp_path, monkeypatch):
    child, sheet, copy = tmp_path / "child", tmp_path / "out/sheet.md", tmp_path / "copy"
    programs = {
        "model": (1, 60, "print(open('dapo.py').readline())"),
        "recipe": (1, 60, "import sys; sys.exit('out of luck')"),
        "sampling": (2, 20, HANGS.replace("PATH", repr(str(child)))),
        "static": (2, 60, """print('{"": "dapo.sample_tokens", "tokens a second": 450.0}')"""),
        "floor": (3, 60, f"import shutil; shutil.copy({str(sheet)!r}, {str(copy)!r})"),
    }
    parts = {part: (*rest, [sys.executable, "-c", program]) for part, (*rest, program) in programs.items()}
    monkeypatch.chdir(tmp_path)  # parts run in the repository nevertheless
    start = time.monotonic()
    gpu.measure_all(parts, gpu.MINUTES, sheet, {"GPU": "none"})
    text = sheet.read_text()
    assert "- GPU: none\n" in text and "- still running:" not in text
    assert re.search(r"\nmodel took \d+ s\n\nrecipe failed with exit status 1\n\n    out of luck\n", text)
    assert "| generate | 150 | 1 |\n| dapo.sample_tokens | 450 | 3 |\n" in text
    assert "\nsampling failed: its 20 s were over\n\n    sampling\n" in text and '    {"": "half a li\n' in text
    assert "| tokens a second: dapo.sample_tokens / generate | 3 | 4 | missed by 25% |" in text
    assert "| s a step: TRL / dapo.py |  | 2 | not measured |" in text
    assert "- still running: floor\n" in (meanwhile := copy.read_text()) and "\nstatic took " in meanwhile
    time.sleep(max(0, start + 30 - time.monotonic()))
    assert not child.exists()


def test_no_part_runs_longer_than_the_whole(tmp_path):
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    gpu.measure_all({"model": (1, 2000, command), "recipe": (1, 2000, command)}, 0.02, tmp_path / "sheet.md", {})
    assert "\nmodel failed: its 1 s were over\n\n" in (text := (tmp_path / "sheet.md").read_text())
    assert "\nrecipe failed: its 0 s were over\n" in text


@pytest.mark.parametrize("value, words", [(1.0, "missed by 50%"), (2.0, "reached"), (2.5, "reached")])
def test_goals(value, words):
    rows = {"TRL": {"s a step": value}, "dapo.py": {"s a step": 1.0}}
    assert gpu.verdict(rows, "s a step", "TRL", "dapo.py", 2)[""] == words


def test_without_a_gpu(tmp_path):
    command = [sys.executable, ROOT / "benchmarks/gpu.py", "--out", tmp_path]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2 and not result.stdout and not any(tmp_path.iterdir())
    assert result.stderr == "error: torch finds no GPU; --device cpu tries this script out without one\n"


@pytest.mark.slow
def test_everything_on_a_cpu(tmp_path):
    """Takes a minute or two, but the limits are those of an hour."""
    command = [sys.executable, ROOT / "benchmarks/gpu.py", "--device", "cpu", "--minutes", "60", "--out", tmp_path]
    subprocess.run(command, check=True)
    tests, _, figures = (tmp_path / "sheet.md").read_text().partition("## recipes/gsm8k.py")
    assert "failed" not in figures
    for name in (*gpu.METHODS.values(), "steps", "time/step", "passes of an optimizer step", "dapo.py", "floor"):
        assert f"\n| {name} | " in figures
    assert "dapo.sample_tokens / generate |  |" not in tests
    assert ("\n| TRL | " in figures) == ("- trl: not installed" not in tests)

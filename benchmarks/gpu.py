"""Measures dapo.py on a GPU in under ten minutes, and writes one file that you can send: outputs/gpu/sheet.md.

    python benchmarks/gpu.py [--minutes 9.5] [--out FOLDER]
    python benchmarks/gpu.py --device cpu   tries it out without a GPU, with tiny sizes: its figures mean nothing

It runs tests/test_cuda.py; then, with random weights in Qwen2.5-0.5B's shape, recipes/gsm8k.py at its full size, four
ways to sample, and the steps that speed.py measures: dapo.py's, TRL's if it is installed, and the model's alone. Each
part is a process of its own with a time limit of its own, so one that fails or hangs loses only its own figures: its
last lines are in the sheet, which is written again after each part. With more minutes, limits and numbers of steps
grow. It needs Linux, torch 2.11, transformers 5.24, and 5 GB for temporary files.

A machine without internet, but with torch, an older transformers 5, pyarrow, and pytest, lacks these packages. Where
there is internet, and then there, with that machine's version of Python:

    pip download --no-deps --only-binary=:all: --python-version 3.12 -d wheels transformers==5.24.0 datasets==5.2.0 \\
        dill==0.4.1 multiprocess==0.70.19 math-verify==0.9.0 latex2sympy2_extended==1.11.0 \\
        antlr4-python3-runtime==4.13.2 trl==1.16.0 peft==0.21.2
    pip install --no-index --no-deps --target site wheels/*.whl
    PYTHONPATH=site python benchmarks/gpu.py
"""

import argparse
import contextlib
import importlib.metadata
import importlib.util
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path

START = time.monotonic()
sys.path.insert(0, str(Path(__file__).parent))

import speed  # noqa: E402, I001  (it finds dapo.py, which has to come before torch)
import dapo  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402

MINUTES = 9.5
SECTIONS = "tests/test_cuda.py", "recipes/gsm8k.py, random weights", "Sampling", "A step"
PARTS = {  # in order of worth: the section of the sheet, and how many seconds of MINUTES the part may take
    "tests": (0, 170), "model": (1, 45), "recipe": (1, 75), "sampling": (2, 150), "dapo.py": (3, 90), "TRL": (3, 120),
    "static": (2, 140), "continuous": (2, 100), "floor": (3, 70),
}  # fmt: skip
TINY = dict(hidden_size=64, intermediate_size=128, num_attention_heads=2, num_key_value_heads=1, vocab_size=5_000)
SHORT = dict(BATCH_SIZE=4, MAX_RESPONSE_LENGTH=32, OVERLONG_BUFFER_LENGTH=8, NUM_STEPS=2)
SIZES = {
    "cuda": {"model": dict(num_hidden_layers=24), "recipe": dict(NUM_STEPS=20), "step": speed.SIZES["cuda"],
             "sampling": dict(BATCH_SIZE=64, MAX_RESPONSE_LENGTH=1024)},
    "cpu": {"model": TINY | dict(num_hidden_layers=2), "recipe": SHORT, "step": SHORT, "sampling": SHORT},
}  # fmt: skip
METHODS = {"plain": "generate", "staged": "dapo.sample_tokens", "static": "generate, static cache, bf16 weights",
           "continuous": "continuous batching, bf16 weights"}  # fmt: skip
NAMES = {"step": "s a step", "rate": "tokens a second", "gib": "peak GiB", "length": "mean length",
         "before": "seconds before, not counted"}  # fmt: skip
GOALS = [  # what one does, divided by what another does, has to be so much at least
    ("tokens a second", "dapo.sample_tokens", "generate", 4),
    ("s a step", "TRL", "dapo.py", 2),
    ("peak GiB", "TRL", "dapo.py", 1),
]

# ---- The parts, each in a process of its own, which prints a row of JSON for each row of a table --------------------


def show(what, **figures):
    print(json.dumps({"": what} | {NAMES.get(name, name): value for name, value in figures.items()}), flush=True)


def recipe(options):
    settings = SIZES[options.device]["recipe"] | {"DEVICE": options.device}
    seconds = PARTS["recipe"][1] * options.minutes / MINUTES - (time.monotonic() - START) - 10
    figures = speed.recipe(str(options.model), str(options.work / "run"), settings, seconds)
    for name, values in figures.items():
        show(name, median=statistics.median(values), lowest=min(values), highest=max(values))


def sample(options, *methods):
    """Four ways to sample; one that fails has a row that says why."""
    for method in methods:
        try:
            settings = SIZES[options.device]["sampling"] | {"DEVICE": options.device}
            show(METHODS[method], **speed.rollout(str(options.model), None, settings, method))
        except Exception as error:
            show(METHODS[method], failed=dapo.described(error))


def step(options, function):
    settings = speed.SAME_WORK | {"DEVICE": options.device, "NUM_STEPS": max(2, round(options.minutes / 4))}
    settings |= SIZES[options.device]["step"]
    show(options.part, **function(str(options.model), str(options.work / options.part), settings))


FUNCTIONS = {
    "model": lambda options: speed.random_model(options.model, **SIZES[options.device]["model"]),
    "recipe": recipe,
    "sampling": lambda options: sample(options, "plain", "staged"),
    "static": lambda options: sample(options, "static"),
    "continuous": lambda options: sample(options, "continuous"),
    "dapo.py": lambda options: step(options, speed.ours),
    "TRL": lambda options: step(options, speed.trl),
    "floor": lambda options: step(options, speed.floor),
}

# ---- The sheet ------------------------------------------------------------------------------------------------------


def measure_all(parts, minutes, path, facts):
    """Runs each of {part: (section, seconds, command)}, and writes the sheet anew after each."""
    start, results = time.monotonic(), {}
    path.parent.mkdir(parents=True, exist_ok=True)
    for part, (section, seconds, command) in parts.items():
        path.write_text(sheet(parts, results, facts | {"still running": part}))
        results[part] = run(command, min(seconds * minutes / MINUTES, start + 60 * minutes - time.monotonic()))
        print(part, results[part]["ending"], flush=True)
    path.write_text(sheet(parts, results, facts | {"minutes": round((time.monotonic() - start) / 60, 1)}))


def run(command, seconds):
    """What a process prints, and how it ends; when its time is over, it is killed with all that it has started."""
    start = time.monotonic()
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, cwd=speed.ROOT, process_group=0)
        try:
            status = process.wait(max(0, seconds))
            ending = f"failed with exit status {status}" if status else f"took {time.monotonic() - start:.0f} s"
        except subprocess.TimeoutExpired:
            ending = f"failed: its {max(0, seconds):.0f} s were over"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        output.seek(0)
        lines = output.read().splitlines()
    rows, others = [], []
    for line in lines:
        row = None
        with contextlib.suppress(ValueError):  # what others print, and half a line of a part that was killed
            row = json.loads(line)
        rows.append(row) if isinstance(row, dict) and "" in row else others.append(line[:300])
    return {"ending": ending, "rows": rows, "lines": others[-30:]}


def sheet(parts, results, facts):
    rows = {row[""]: row for result in results.values() for row in result["rows"]}
    lines = ["# dapo.py on a GPU", "", *(f"- {name}: {fact}" for name, fact in facts.items())]
    lines += ["", *table([verdict(rows, *goal) for goal in GOALS])]
    for number, title in enumerate(SECTIONS):
        here = {part: results[part] for part in results if parts[part][0] == number}
        lines += ["", f"## {title}", ""]
        lines += table([row | against_generate(rows, row) for result in here.values() for row in result["rows"]])
        for part, result in here.items():
            lines += ["", f"{part} {result['ending']}"]
            if number == 0 or "failed" in result["ending"]:
                lines += ["", *(f"    {line}" for line in result["lines"])]
    return "\n".join(lines) + "\n"


def verdict(rows, name, one, other, goal):
    values = [rows.get(who, {}).get(name) for who in (one, other)]
    times = values[0] / values[1] if all(values) else None
    words = "not measured" if not times else "reached" if times >= goal else f"missed by {1 - times / goal:.0%}"
    return {"goals": f"{name}: {one} / {other}", "times": times or "", "at least": goal, "": words}


def against_generate(rows, row):
    rate = rows.get("generate", {}).get("tokens a second")
    return {"times generate": row["tokens a second"] / rate} if rate and row[""] in METHODS.values() else {}


def table(rows):
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [names, ["---"] * len(names), *([as_text(row.get(name, "")) for name in names] for row in rows)]
    return [f"| {' | '.join(row)} |" for row in cells] if rows else []


def as_text(value):
    if isinstance(value, float):
        return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
    return str(value).replace("|", "\\|")


def said_by(*command):
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        output = subprocess.check_output(command, text=True, cwd=speed.ROOT, stderr=subprocess.DEVNULL)
        return "; ".join(output.strip().splitlines())
    return "unknown"


def version(package):
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return "not installed"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=SIZES)
    parser.add_argument("--minutes", type=float, default=MINUTES)
    parser.add_argument("--out", type=Path, default=speed.ROOT / "outputs/gpu")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        options.model = options.work / "model"
        FUNCTIONS[options.part](options)
    elif tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 24):
        dapo.fail(f"transformers {transformers.__version__} is too old, 5.24 is needed: --help says how to bring it")
    elif options.device == "cuda" and not torch.cuda.is_available():
        dapo.fail("torch finds no GPU; --device cpu tries this script out without one")
    else:
        measure_on(options)


def measure_on(options):
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
    facts = {
        "command": f"python benchmarks/gpu.py {' '.join(sys.argv[1:])}",
        "date": f"{datetime.now():%Y-%m-%d %H:%M}",
        "commit": said_by("git", "describe", "--always", "--dirty"),
        "GPU, memory, driver": said_by(*"nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv".split()),
        "CUDA": torch.version.cuda,
        **{package: version(package) for package in ("torch", "transformers", "trl", "flash-attn")},
    }
    with tempfile.TemporaryDirectory() as work:
        me = [sys.executable, __file__, "--device", options.device, "--minutes", str(options.minutes), "--work", work]
        tests = [sys.executable, *"-m pytest tests/test_cuda.py -v -p no:xdist -o addopts=".split()]
        commands = {part: [*me, "--part", part] for part in FUNCTIONS} | {"tests": tests}
        if facts["trl"] == "not installed":
            del commands["TRL"]
        parts = {part: (*PARTS[part], commands[part]) for part in PARTS if part in commands}
        measure_all(parts, options.minutes, options.out / "sheet.md", facts)
    print(options.out / "sheet.md")


if __name__ == "__main__":
    main()

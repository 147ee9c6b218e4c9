"""Runs dapo.py many times without importing it each time, and ends the runs in the ways that a test asks for.

Reads lines of JSON, {"arguments": [...], "ending": [...], "pictures": true or false, "log": path}, and answers each
with the exit status of a forked process that has run dapo.main with these arguments; a negative one is the signal that
killed it. Endings:

    ["none"]
    ["event", n, signal]         at the n-th time that a file in OUTPUT_DIR is opened, renamed, or removed
    ["time", seconds, signal]    so much later than the first such event
    ["full", n, bytes, name]     from the n-th such event of a file of that name on, no file can grow beyond that size
"""

import json
import os
import resource
import signal
import sys
import threading
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

import dapo  # noqa: E402, I001  (first: pyarrow has to come before torch on Windows)
import matplotlib.figure  # noqa: E402, F401  (what each run would import is imported here, once)
import torch._dynamo  # noqa: E402

torch.set_num_threads(1)
dapo.load_model(str(ROOT / "toy"))
sys.modules["__main__"].__file__ = str(ROOT / "dapo.py")  # a run of another script would be another run


def end_at_event(folder, kind, amount, number, name=""):
    events = 0

    def count(event, arguments):
        nonlocal events
        if (
            event in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir")
            and f"{folder}/{name}" in f"{arguments[0]}/"
        ):
            events += 1
            if kind == "event" and events == amount:
                os.kill(os.getpid(), number)
            if kind == "full" and events == amount:
                resource.setrlimit(resource.RLIMIT_FSIZE, (number, number))
            if kind == "time" and events == 1:
                timer = threading.Timer(amount, os.kill, (os.getpid(), number))
                timer.daemon = True
                timer.start()

    sys.addaudithook(count)


def child(arguments, ending, pictures, log):
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    if not pictures:
        dapo.draw_metrics = lambda folder: None
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    if ending[0] != "none":
        folder = next(word for word in arguments if "OUTPUT_DIR" in word).partition("=")[2]
        end_at_event(folder, *ending)
    status = 0
    try:
        dapo.main(arguments)
    except SystemExit as stop:
        status = stop.code or 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
        status = 1
    sys.stdout.flush()
    os._exit(status)


for line in sys.stdin:
    task = json.loads(line)
    process = os.fork()
    if process == 0:
        child(**task)
    print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)

"""Runs dapo.py many times without importing it each time, and ends the runs in the ways that a test asks for.

Reads lines of JSON, {"arguments": [...], "ending": [...], "log": path}, and answers each with the exit status of a
forked process that has run dapo.main with these arguments; a negative one is the signal that killed it. Endings:

    ["none"]
    ["event", n, signal]         at the n-th time that a file in OUTPUT_DIR is opened, renamed or removed
    ["time", seconds, signal]    so much later than the first such event
    ["size", bytes]              no file can be written beyond that size, as if the disk were full
"""

import json
import os
import resource
import signal
import sys
import threading
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
os.environ["HF_HUB_OFFLINE"] = "1"

import dapo  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)
dapo.record.PANELS = {"accuracy": ["accuracy"]}  # see test_resume.py


def end_by_signal(kind, amount, number, folder):
    events = 0

    def count(event, arguments):
        nonlocal events
        if event in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir") and folder in str(arguments[0]):
            events += 1
            if kind == "event" and events == amount:
                os.kill(os.getpid(), number)
            if kind == "time" and events == 1:
                timer = threading.Timer(amount, os.kill, (os.getpid(), number))
                timer.daemon = True
                timer.start()

    sys.addaudithook(count)


def child(arguments, ending, log):
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    if ending[0] in ("event", "time"):
        end_by_signal(*ending, next(a for a in arguments if "OUTPUT_DIR" in a).partition("=")[2])
    if ending[0] == "size":
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (ending[1], ending[1]))
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

"""Copies the metrics of a run to TensorBoard or W&B, during the run or afterward.

    python -m tools.mirror outputs/dapo tensorboard        then: tensorboard --logdir outputs/dapo/tensorboard
    python -m tools.mirror outputs/dapo wandb --follow     continues until the run stops, or Ctrl-C

It reads run.db and nothing else, so a run does not notice it. Each time, it copies the whole run: into the folder
tensorboard in the run's folder, in place of an earlier copy, or into a new W&B run, which gets the run's constants as
its config.
"""

import ast
import contextlib
import shutil
import sqlite3
import sys
import time
from pathlib import Path

from filelock import FileLock, Timeout

from tools.curves import fail, read_metrics

SECONDS = 2.0  # between two looks at run.db


def main(argv=None):
    words = sys.argv[1:] if argv is None else argv
    if "-h" in words or "--help" in words:
        print(__doc__)
        return
    names = [word for word in words if word != "--follow"]
    if len(names) != 2 or names[1] not in MIRRORS:
        fail("usage: python -m tools.mirror FOLDER tensorboard|wandb [--follow]")
    folder, library = Path(names[0]), names[1]
    read_metrics(folder)  # ends the program if there is no run
    try:
        with MIRRORS[library](folder) as write, contextlib.suppress(KeyboardInterrupt):
            copy(folder, write, follow="--follow" in words)
    except ImportError as error:
        fail(f"{library} is not installed: pip install {library} ({error})")
    except Exception as error:  # whatever a library raises without an account, a network, or room on the disk
        fail(f"{library} cannot be written to: {error}")


def copy(folder, write, follow):
    """Calls write(metrics, step) with each metric once, in the order of the steps.

    An interrupted run that is resumed computes some steps again, with the same result: they are not written again.
    """
    written, going_on = set(), True
    while going_on:
        going_on = follow and is_training(folder)  # before we read, so that the last step is not missed
        found = {}
        for name, curve in read_metrics(folder).items():
            for step, value in zip(*curve):
                if (step, name) not in written:
                    found.setdefault(step, {})[name] = value
        for step in sorted(found):
            write(found[step], step)
            written.update((step, name) for name in found[step])
        if going_on:
            time.sleep(SECONDS)


def is_training(folder):
    """Whether a process holds the lock of the run in a folder."""
    lock = folder.absolute().with_name(f".{folder.absolute().name}.lock")
    try:
        with FileLock(lock, timeout=0) if lock.exists() else contextlib.nullcontext():
            return False
    except Timeout:
        return True


@contextlib.contextmanager
def tensorboard(folder):
    from torch.utils.tensorboard import SummaryWriter

    def write(metrics, step):
        for name, value in metrics.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    shutil.rmtree(folder / "tensorboard", ignore_errors=True)
    with SummaryWriter(folder / "tensorboard") as writer:
        yield write


@contextlib.contextmanager
def wandb(folder):
    import wandb

    run = wandb.init(project="dapo", name=folder.absolute().name, dir=folder, config=constants(folder))
    try:
        yield run.log
    finally:
        run.finish()


MIRRORS = {"tensorboard": tensorboard, "wandb": wandb}


def constants(folder):
    """{name: value} of the constants that were in force last; empty if the run's trainer does not record them."""
    with contextlib.suppress(sqlite3.OperationalError), contextlib.closing(sqlite3.connect(folder / "run.db")) as db:
        rows = db.execute("SELECT name, value FROM constants ORDER BY step")
        return {name: ast.literal_eval(value) for name, value in rows if name.isupper()}
    return {}


if __name__ == "__main__":
    main()

"""Copies the metrics of a run to TensorBoard or W&B, during the run or afterward.

    python -m tools.mirror outputs/dapo tensorboard        then: tensorboard --logdir outputs/dapo/tensorboard
    python -m tools.mirror outputs/dapo wandb --follow     continues until the run stops, or Ctrl-C

It reads run.db and nothing else, so a run does not notice it. TensorBoard's files are in the folder tensorboard in the
run's folder, and each copy takes the place of an earlier one. In W&B, a run is one W&B run, whose id is in wandb/run_id
in the run's folder: each time, it gets what it lacks. It has the run's constants as its config and, from each
evaluation, a table of greedy responses.
"""

import ast
import contextlib
import os
import secrets
import shutil
import sqlite3
import sys
import time
from pathlib import Path

from filelock import FileLock, Timeout

from tools.curves import fail, read_metrics

SECONDS = 2.0  # between two looks at run.db
QUESTIONS = 10  # held-out questions in W&B's tables


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
    except Timeout:
        fail(f"another process is copying the run in {folder} to {library}")
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
    """W&B ignores a row whose number is below its last one. So rows have the same numbers each time: 2·step for the
    training of a step, and the next for the evaluation after it, which may come much later, in a run that is resumed.

    Online, we begin at the row after W&B's last one. Offline, nobody knows that one: each copy holds the whole run and,
    since it does not resume, takes the place of an earlier one when it is uploaded.
    """
    import wandb

    place = folder / "wandb" / "run_id"
    place.parent.mkdir(exist_ok=True)
    with FileLock(place.with_name("lock"), timeout=0):
        known = place.read_text().strip() if place.exists() else ""
        if not known:
            place.write_text(known := secrets.token_hex(4))
        which = {"id": known, "resume": None if os.environ.get("WANDB_MODE") == "offline" else "allow"}
        run = wandb.init(project="dapo", name=folder.absolute().name, dir=folder, config=constants(folder), **which)
        first = getattr(run, "starting_step", 0)
        try:
            run.define_metric("step", hidden=True)
            run.define_metric("*", step_metric="step")

            def write(metrics, step):
                evaluation = {name: metrics[name] for name in metrics if name.startswith(("eval/", "sampling_gap"))}
                training = {name: metrics[name] for name in metrics if name not in evaluation}
                if evaluation and (responses := held_out(folder, step)):
                    evaluation["held_out"] = wandb.Table(SHOWN.split(", "), responses)
                for row, part in ((2 * step, training), (2 * step + 1, evaluation)):
                    if part and row >= first:
                        run.log({"step": step} | part, step=row)

            yield write
        finally:
            run.finish()


MIRRORS = {"tensorboard": tensorboard, "wandb": wandb}


def constants(folder):
    """{name: value} of the constants that were in force last; empty if the run's trainer does not record them."""
    rows = select(folder, "SELECT name, value FROM constants ORDER BY step")
    return {name: ast.literal_eval(value) for name, value in rows if name.isupper()}


SHOWN = "step, question, answer, response, prediction, accuracy, reward, length"


def held_out(folder, step):
    """Rows of SHOWN: greedy responses, to the same questions at each evaluation; none if they are not recorded."""
    return select(folder, f"SELECT {SHOWN} FROM held_out WHERE step = {step} AND number < {QUESTIONS} ORDER BY number")


def select(folder, query):
    """The rows that a query finds in run.db; none if it lacks such a table."""
    with contextlib.suppress(sqlite3.OperationalError), contextlib.closing(sqlite3.connect(folder / "run.db")) as db:
        return db.execute(query).fetchall()
    return []


if __name__ == "__main__":
    main()

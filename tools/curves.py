"""Reads the metrics of runs, also those of other trainers; takes neither torch nor transformers."""

import contextlib
import itertools
import math
import sqlite3
import sys
from pathlib import Path


def split(word):
    """The name and the folder in NAME=FOLDER; no name in that of a folder, whose own may hold a "="."""
    name, equals, folder = word.partition("=")
    return (name, folder) if equals and not Path(word).is_dir() else ("", word)


def runs_in(word):
    """Yields (name, folder or run.db, curves) of a run, or of each run in a folder that is none itself."""
    name, folder = split(word)
    own, inside = Path(folder, "run.db"), sorted({*Path(folder).glob("[!.]*.db"), *Path(folder).glob("*/run.db")})
    if own in inside and len(inside) > 1:
        print(f"{own} is drawn alone: give it a name of its own, such as dapo_seed1.db, to draw all runs in {folder}")
    for twin in [place for place in inside if place.with_suffix("") / "run.db" in inside]:
        print(f"{twin} is left out: {twin.with_suffix('')} is drawn, a folder of the same name")
        inside.remove(twin)
    alone = own in inside or not inside
    for place in [folder] if alone else [str(path.parent if path.name == "run.db" else path) for path in inside]:
        try:
            curves = read_metrics(place) or fail(f"the run in {place} has not recorded any metrics yet")
        except SystemExit:
            if alone:
                raise
            continue  # one of those in a folder is left out, and fail has told why
        yield name, place, curves


def read_metrics(folder):
    """{name: (steps, values)} of the run in a folder."""
    curves = {}
    with opened(folder) as db:
        for step, name, value in db.execute("SELECT step, name, value FROM metrics ORDER BY step"):
            steps, values = curves.setdefault(name, ([], []))
            steps.append(step)
            values.append(math.nan if value is None else float(value))
    return curves


@contextlib.contextmanager
def opened(folder):
    """The run.db of the run in a folder, which may be going on."""
    path = Path(folder) if Path(folder).is_file() else Path(folder, "run.db")
    if not path.exists():
        fail(f"there is no run in {folder}: {path} is missing")
    # A file that nobody writes to is read as it is: SQLite would write beside it, which a shared folder may forbid.
    how = "" if Path(f"{path}-wal").exists() else "?immutable=1"
    try:
        with contextlib.closing(sqlite3.connect(path.absolute().as_uri() + how, uri=True)) as db:
            yield db
    except (sqlite3.Error, ValueError) as error:
        fail(f"{path} cannot be read: {error}")


def with_derived(curves):
    """read_metrics' curves without NaN, with the clock and, if not recorded, the share of groups with a gradient."""
    points = {name: [point for point in zip(*curve) if not math.isnan(point[1])] for name, curve in curves.items()}
    curves = {name: tuple(map(list, zip(*found))) for name, found in points.items() if found}

    def at(*names):
        """{step: the values of these metrics} at the steps that have all of them."""
        values = [dict(zip(*curves.get(name, ((), ())))) for name in names]
        return {step: [value[step] for value in values] for step in values[0] if all(step in value for value in values)}

    shares, even = {}, at("groups/all_correct", "groups/all_wrong", "dynamic_resample_rate")
    for step, (correct, wrong, dropped) in even.items():
        if dropped < 1:
            shares[step] = min(1.0, (1 - correct - wrong) / (1 - dropped))
    seconds = at("time/step") or at("time/generate", "time/update")
    minutes = itertools.accumulate(map(sum, seconds.values()), lambda total, more: total + more / 60, initial=0.0)
    derived = {"groups/with_gradient": ([*shares], [*shares.values()])} if shares else {}
    return derived | curves | ({"minutes of training": ([0, *seconds], [*minutes])} if seconds else {})


def fail(message):
    """Ends the program for a reason that its user can mend: one line, exit status 2."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)

"""Writes the responses of a run to a file, as a data set to fine-tune on, to train on, or to look at.

    python -m tools.export outputs/dapo responses.parquet                    every response sampled in training
    python -m tools.export outputs/dapo right.jsonl --steps 10-14 --right    the best of five steps, to fine-tune on

--right takes only responses that are right and not cut off, and the same response to a question only once. A row is a
response, with the columns of SCHEMA. Programs for fine-tuning read the last one, messages: the question as it was
asked, in PROMPT_TEMPLATE, and the response. run.db does not record the messages before the question, such as a system
message, so they are missing here, too.

What is written is a data set for TRAIN_DATASETS as well, with the input question and the output answer.
"""

import argparse
import ast
import itertools
import json
import re
import sqlite3
import sys
from collections import Counter
from pathlib import Path

import dapo  # isort: skip  (before torch, for Windows)
import pyarrow.parquet
from tqdm import tqdm

from tools.curves import opened

SCHEMA = {
    "step": "int64",
    "question": "string",
    "answer": "string",  # the ground truth
    "response": "string",
    "prediction": "string",  # the answer found in the response
    "accuracy": "float64",
    "reward": "float64",
    "penalty": "float64",
    "advantage": "float64",  # null: not trained on
    "length": "int64",  # tokens
    "truncated": "bool",
    "fate": "string",
    "messages": pyarrow.list_(pyarrow.struct({"role": "string", "content": "string"})),
}
ROWS = 500  # in a row group of a parquet file, and in memory


def main(argv=None):
    form = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    parser = argparse.ArgumentParser("python -m tools.export", description=__doc__, **form)
    parser.error = dapo.fail
    parser.add_argument("run", metavar="RUN")
    parser.add_argument("out", metavar="OUT", type=Path)
    parser.add_argument("--steps", metavar="FIRST-LAST")
    parser.add_argument("--right", action="store_true")
    options = parser.parse_args(argv)
    out, steps, written = options.out, read_steps(options.steps), Counter()
    if out.suffix not in WRITERS:
        dapo.fail(f"{out}: the name has to end in {' or '.join(WRITERS)}")
    if out.exists():
        dapo.fail(f"{out} exists already: remove it, or choose another name")
    if not out.parent.is_dir():
        dapo.fail(f"{out}: there is no folder {out.parent}")
    try:
        with dapo.complete(out) as unfinished, opened(options.run) as db, unfinished.open("wb") as file:
            WRITERS[out.suffix](file, responses(db, options.run, steps, options.right, written))
        dapo.say(f"{out}: {written.total()} responses to {len(written)} questions")
    except OSError as error:
        dapo.fail(f"cannot write {error}")
    except KeyboardInterrupt:
        sys.exit(130)


def read_steps(text):
    """The first and the last step of "10-14", or of "10"; None if `text` is None."""
    found = re.fullmatch("([0-9]+)(?:-([0-9]+))?", text or "")
    if text and not found:
        dapo.fail(f"--steps {text}: it has to be a step, such as 10, or the first and the last one, such as 10-14")
    return found and (int(found[1]), int(found[2] or found[1]))


def responses(db, folder, steps, right, written):
    """Yields the rows of SCHEMA in the order in which they were recorded. Counts them by question in `written`."""
    first, last = db.execute("SELECT min(step), max(step) FROM responses").fetchone()
    if first is None:
        dapo.fail(f"the run in {folder} has recorded no responses yet")
    begin, end = steps or (first, last)
    recorded = {column[1] for column in db.execute("PRAGMA table_info(responses)")}  # not all by earlier versions
    columns = ", ".join(name if name in recorded else f"NULL AS {name}" for name in [*SCHEMA][:-1])
    # By the index of the steps, SQLite would have to sort what it reads, with all texts.
    chosen = f"SELECT {columns} FROM responses NOT INDEXED WHERE step BETWEEN ? AND ? ORDER BY rowid"
    template, seen, db.row_factory = prompt_template(db), set(), sqlite3.Row
    found = map(dict, db.execute(chosen, [begin, end]))
    for row in tqdm(found, "writing", unit=" responses", leave=False, delay=5, disable=None):
        if right:
            text = hash((row["question"], row["answer"], row["response"]))  # the texts would fill the memory
            if row["accuracy"] != 1 or row["truncated"] or text in seen:
                continue
            seen.add(text)
        written[row["question"]] += 1
        asked = template.replace("{question}", row["question"])
        messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": row["response"]}]
        yield row | {"truncated": bool(row["truncated"]), "messages": messages}
    if not written:
        kind = "response that is right and not cut off" if right else "response"
        dapo.fail(f"the run in {folder} has no {kind} in the steps {begin} to {end}; it has recorded {first} to {last}")


def prompt_template(db):
    """The text of the run's PROMPT_TEMPLATE, which is the same in all its steps."""
    (value,) = db.execute("SELECT value FROM constants WHERE name = 'PROMPT_TEMPLATE'").fetchone()
    template = ast.literal_eval(value)
    return dapo.TEMPLATES.get(template, template)


def write_parquet(file, rows):
    schema = pyarrow.schema(SCHEMA)
    with pyarrow.parquet.ParquetWriter(file, schema) as writer:
        while some := list(itertools.islice(rows, ROWS)):
            writer.write_table(pyarrow.Table.from_pylist(some, schema))


def write_jsonl(file, rows):
    file.writelines(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


WRITERS = {".parquet": write_parquet, ".jsonl": write_jsonl}


if __name__ == "__main__":
    main()

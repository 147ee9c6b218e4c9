"""tools.export: a file holds what run.db holds, and TRAIN_DATASETS and other programs read it."""

import contextlib
import gc
import json
import math
import os
import sqlite3
import tempfile
from pathlib import Path

import datasets
import pyarrow.parquet
import pytest
from conftest import rows
from test_show import answer, group, make_run

import dapo
from tools import export

FORMS = pytest.mark.parametrize("form", ["parquet", "jsonl"])
COLUMNS = "step question answer response prediction accuracy reward penalty advantage length truncated fate".split()


def exported(run, out, *options):
    """The rows of the file that is written, as a reader of its own has them."""
    export.main([str(run), str(out), *options])
    if out.suffix == ".parquet":
        return pyarrow.parquet.read_table(out).to_pylist()
    return [json.loads(line) for line in out.read_text(encoding="utf-8").split("\n")[:-1]]


def stop_of(capsys, *words):
    with pytest.raises(SystemExit) as end:
        export.main([str(word) for word in words])
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.startswith("error: ") and said.count("\n") == 1, said
    return said


def test_all_that_a_run_has_recorded(main, settings, chance, no_pictures, tmp_path, monkeypatch, capsys):
    main([*settings, "--PROMPT_TEMPLATE=boxed"])
    monkeypatch.setattr(export, "ROWS", 5)
    capsys.readouterr()
    table, lines = (exported(tmp_path / "run", tmp_path / f"out.{form}") for form in ("parquet", "jsonl"))
    recorded = rows(tmp_path / "run", f"SELECT {', '.join(COLUMNS)} FROM responses ORDER BY step, number")
    assert table == lines and [tuple(row[name] for name in COLUMNS) for row in table] == recorded
    assert {row[0] for row in recorded} == {1, 2} and len(recorded) > 8
    questions = {row[1] for row in recorded}
    said = f"{tmp_path / 'out.parquet'}: {len(recorded)} responses to {len(questions)} questions"
    assert capsys.readouterr().out.splitlines() == [said, said.replace("parquet", "jsonl")]
    for row in table:
        asked = row["question"] + "\nPlease reason step by step, and put your final answer within \\boxed{}."
        chat = [("user", asked), ("assistant", row["response"])]
        assert row["messages"] == [{"role": role, "content": content} for role, content in chat]
        assert row.keys() == {*COLUMNS, "messages"} and type(row["truncated"]) is bool
    types = {field.name: str(field.type) for field in pyarrow.parquet.read_schema(tmp_path / "out.parquet")}
    assert (types["length"], types["reward"], types["truncated"]) == ("int64", "double", "bool")
    assert pyarrow.parquet.ParquetFile(tmp_path / "out.parquet").num_row_groups == math.ceil(len(recorded) / 5)


@pytest.fixture
def run(tmp_path):
    """Three steps, with all that --right leaves out: wrong, graded, cut off, and the same once more."""
    first = group(answer("7"), answer("8", 0.0), answer("7"), answer("It is 7.", penalty=-0.5))
    second = group(answer("7", truncated=1), answer("half", 0.5), answer("3"), question="1 + 2?", truth="3")
    third = group(answer("7"), answer("Now 7.", 1.0, 0.5)), group(answer("7"), question="9 - 2?")
    return make_run(tmp_path / "made", {1: [first], 2: [second], 3: [*third]}, PROMPT_TEMPLATE="Q: {question} {}")


@FORMS
def test_the_right_ones_each_once(form, run, tmp_path):
    found = exported(run, tmp_path / f"out.{form}", "--right")
    assert [(row["step"], row["question"], row["response"]) for row in found] == [
        (1, "3 + 4?", "7"), (1, "3 + 4?", "It is 7."), (2, "1 + 2?", "3"), (3, "3 + 4?", "Now 7."), (3, "9 - 2?", "7"),
    ]  # fmt: skip
    assert found[1]["reward"] == 0.5 and found[3]["advantage"] == 0.5 and found[0]["advantage"] is None
    assert found[2]["messages"][0]["content"] == "Q: 1 + 2? {}"


@pytest.mark.parametrize("steps, found", [("2", [2]), ("1-2", [1, 2]), ("2-9", [2, 3]), ("0-1", [1])])
def test_chosen_steps(steps, found, run, tmp_path):
    assert sorted({row["step"] for row in exported(run, tmp_path / "out.jsonl", "--steps", steps)}) == found


@FORMS
def test_it_is_read_back(form, tmp_path, monkeypatch, capsys):
    """By TRAIN_DATASETS, with one row a question, and by datasets, as the same text."""
    texts = ["007", "2.50", "1e3", "True", " 4 ", "a\u2028b\x85", 'x\x00\n"y"', "二 🙂", "null", "[{1}]"]
    groups = [group(answer(text), answer("8", 0.0), question=f"{text}?", truth=text) for text in texts]
    run, out = make_run(tmp_path / "run", {1: groups}), tmp_path / f"out.{form}"
    monkeypatch.setattr(export, "ROWS", 3)
    assert len(exported(run, out)) == 2 * len(texts)
    kind = {"parquet": "parquet", "jsonl": "json"}[form]
    source = {"path": str(out), "type": kind, "input": "question", "output": "answer"}
    read = [(row[0], row[1]) for row in dapo.load_rows(source)]
    assert read == [([{"role": "user", "content": f"{text}?"}], text) for text in texts]
    table = datasets.load_dataset(kind, data_files=str(out), split="train")
    assert table["answer"] == [text for text in texts for _ in range(2)]
    assert table[1]["messages"][1] == {"role": "assistant", "content": "8"} and table[1]["accuracy"] == 0.0


def test_a_run_of_an_earlier_version(tmp_path):
    """The columns of the first version that recorded responses."""
    columns = "step, question, answer, response, accuracy, reward, length, truncated, kept"
    (tmp_path / "run").mkdir()
    with contextlib.closing(sqlite3.connect(tmp_path / "run/run.db")) as db, db:
        db.execute("CREATE TABLE constants (step, name, value)")
        db.execute("INSERT INTO constants VALUES (0, 'PROMPT_TEMPLATE', '''{question}''')")
        db.execute(f"CREATE TABLE responses ({columns})")
        db.execute("INSERT INTO responses VALUES (1, '1 + 1?', '2', 'It is 2.', 1, 1, 5, 0, 1)")
    for form in ("parquet", "jsonl"):
        (row,) = exported(tmp_path / "run", tmp_path / f"out.{form}", "--right")
        assert (row["question"], row["accuracy"], row["truncated"]) == ("1 + 1?", 1.0, False)
        assert [row[name] for name in ("prediction", "penalty", "advantage", "fate")] == [None] * 4


def test_a_run_that_is_going_on(run, tmp_path, monkeypatch):
    """What it has recorded is there, also if it is only in the write-ahead log, and nothing recorded meanwhile."""
    write, insert = (
        export.write_jsonl,
        "INSERT INTO responses (step, number, question, response) VALUES (?, 0, 'q', 'r')",
    )
    with contextlib.closing(sqlite3.connect(run / "run.db", isolation_level=None)) as training:
        training.execute("PRAGMA wal_autocheckpoint = 0")
        training.execute(insert, [4])

        def slowly(file, responses):
            first = next(responses)
            training.execute(insert, [5])
            write(file, [first, *responses])

        monkeypatch.setitem(export.WRITERS, ".jsonl", slowly)
        assert {row["step"] for row in exported(run, tmp_path / "out.jsonl")} == {1, 2, 3, 4}


@pytest.mark.skipif(os.name != "posix", reason="Windows has other permissions")
def test_a_run_in_a_folder_that_cannot_be_written():
    """Root may write anywhere, so then it is read as nobody."""
    with tempfile.TemporaryDirectory() as place, contextlib.ExitStack() as back:
        run = make_run(Path(place, "shared"), {1: [group(answer())]})
        Path(place).chmod(0o777)
        run.chmod(0o555)
        back.callback(run.chmod, 0o755)
        if os.geteuid() == 0:
            back.callback(os.seteuid, 0)
            os.seteuid(65534)
        assert len(exported(run, Path(place, "out.jsonl"))) == 1
        assert [path.name for path in run.iterdir()] == ["run.db"]


REASONS = {
    "nowhere out.jsonl": "there is no run in nowhere: nowhere/run.db is missing",
    "empty out.jsonl": "the run in empty has recorded no responses yet",
    "other out.jsonl": "other/run.db cannot be read: no such table: responses",
    "text.txt out.jsonl": "text.txt cannot be read: file is not a database",
    "made out.csv": "out.csv: the name has to end in .parquet or .jsonl",
    "made out": "out: the name has to end in .parquet or .jsonl",
    "made text.jsonl": "text.jsonl exists already: remove it, or choose another name",
    "made no/out.jsonl": "no/out.jsonl: there is no folder no",
    "made out.jsonl --steps 4-9": "the run in made has no response in the steps 4 to 9; it has recorded 1 to 3",
    "made out.jsonl --steps 3-1": "the run in made has no response in the steps 3 to 1; it has recorded 1 to 3",
    "made out.jsonl --steps last": "--steps last: it has to be a step, such as 10, or the first and the last one",
    "made out.jsonl --steps=-1": "--steps -1: it has to be a step, such as 10, or the first and the last one",
    "wrong out.parquet --right": "the run in wrong has no response that is right and not cut off in the steps 1",
    "made": "the following arguments are required: OUT",
    "made out.jsonl --best": "unrecognized arguments: --best",
}


def test_what_cannot_be_written(run, tmp_path, monkeypatch, capsys):
    """Then a line says why, and no file is there that was not there before."""
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "empty", {})
    make_run(tmp_path / "wrong", {1: [group(answer("8", 0.0))]})
    Path("other").mkdir()
    sqlite3.connect("other/run.db").close()
    for name in ("text.txt", "text.jsonl"):
        Path(name).write_text("Some text of my own, which is no database. " * 9)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for words, reason in REASONS.items():
        assert reason in stop_of(capsys, *words.split()).replace(os.sep, "/")
        assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


@FORMS
@pytest.mark.filterwarnings("error")
def test_a_full_disk(form, tmp_path, capsys):
    """No file can grow beyond 8 KiB. Nothing that is closed late says more than the line."""
    resource = pytest.importorskip("resource", reason="Windows has none")
    run = make_run(tmp_path / "run", {1: [group(*(answer(f"{n} " * 20) for n in range(999)))]})
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, limit[1]))
    try:
        said = stop_of(capsys, run, tmp_path / f"out.{form}")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert said.startswith(f"error: cannot write {tmp_path}/out.{form}: ") and "File too large" in said
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    gc.collect()


def test_ctrl_c_leaves_no_part_of_a_file(run, tmp_path, monkeypatch):
    def interrupted(file, responses):
        file.write(b"a part")
        raise KeyboardInterrupt

    monkeypatch.setitem(export.WRITERS, ".jsonl", interrupted)
    with pytest.raises(SystemExit) as end:
        export.main([str(run), str(tmp_path / "out.jsonl")])
    assert end.value.code == 130 and [path.name for path in tmp_path.iterdir()] == ["made"]

"""The other columns of a question's row reach the reward function as they stand in the file, whatever its form."""

import datetime
import json
import math
from decimal import Decimal

import pyarrow
import pyarrow.parquet
import pytest
from conftest import rows
from test_bad_input import stop_of

import dapo


def source(path, question="q", answer="a"):
    return {"path": str(path), "type": path.suffix[1:] or "hub", "input": question, "output": answer}


def write(path, found):
    """Rows as a data set in the form that the name of the path asks for; a Hub data set is a folder."""
    if path.suffix == ".json":
        path.write_text("\n".join(map(json.dumps, found)), encoding="utf-8")
    elif path.suffix == ".csv":
        path.write_text("\n".join(",".join(map(str, line)) for line in [found[0], *(row.values() for row in found)]))
    else:
        table = found if isinstance(found, pyarrow.Table) else pyarrow.Table.from_pylist(found)
        path.suffix or path.mkdir()
        pyarrow.parquet.write_table(table, path if path.suffix else path / "train.parquet")
    return path


def columns(*parts):
    """The other columns of each question."""
    return [others for *_, others in dapo.load_rows(source(*parts))]


@pytest.fixture(autouse=True)
def reward_of_ones_own(set_reward):
    set_reward(lambda **others: 1.0)


FORMS = pytest.mark.parametrize("name", ["rows.parquet", "rows.json", "rows.csv", "rows"])


@FORMS
def test_of_every_form(name, tmp_path):
    found = [{"q": f"{n} + 1?", "level": n, "a": n + 1, "from": "me"} for n in range(3)]
    levels = ["0", "1", "2"] if name == "rows.csv" else [0, 1, 2]
    assert columns(write(tmp_path / name, found)) == [{"level": level, "from": "me"} for level in levels]


@pytest.mark.parametrize("name", ["rows.parquet", "rows.json", "rows"])
def test_what_surrounds_a_nested_answer_stays(name, tmp_path):
    found = [{"prompt": "1 + 1?", "reward_model": {"ground_truth": "2", "style": "rule"}, "extra_info": {"index": 7}}]
    expected = {"reward_model": {"ground_truth": "2", "style": "rule"}, "index": 7}
    assert columns(write(tmp_path / name, found), "prompt", "reward_model.ground_truth") == [expected]


def test_a_column_with_a_dot_in_its_name_is_another_than_a_nested_one(tmp_path):
    found = [{"q": "x", "m.a": "1", "m": {"a": "2"}}]
    for name in "rows.parquet", "rows.json", "rows":
        path = write(tmp_path / name, found)
        assert dapo.load_rows(source(path, "q", "m.a"))[0][1:] == ("1", {"m": {"a": "2"}})


def test_values_are_those_of_the_file(tmp_path):
    day, moment = datetime.date(2024, 1, 31), datetime.datetime(2024, 1, 31, 12, 30)
    values = {
        "none": [None, None], "list": [[1, None], []], "struct": [{"k": [2]}, None], "day": [day] * 2,
        "moment": [moment, None], "bytes": [b"\xff\xfe", b"text"], "price": [Decimal("1.50"), None], "": ["blank", ""],
        "image": [{"bytes": b"\x89PNG\xff", "path": None}] * 2, "large": [2**62 + 1, -1], "yes": [True, False],
    }  # fmt: skip
    single = {"single": pyarrow.array([0.5, float("nan")], pyarrow.float32())}
    table = pyarrow.table({"q": ["x", "y"], "a": ["1", "2"]} | values | single)
    for name in "rows.parquet", "rows":
        one, other = columns(write(tmp_path / name, table))
        assert one.pop("single") == 0.5 and math.isnan(other.pop("single"))
        assert [one, other] == [{name: column[number] for name, column in values.items()} for number in (0, 1)]


def test_json_and_csv_are_not_interpreted(tmp_path):
    """A number with a decimal point is text, as it is written; in CSV, everything is."""
    path = tmp_path / "rows.json"
    path.write_text('{"q": "x", "a": 1, "exact": 2.50, "whole": 3, "list": [1, 0.1], "no": null, "yes": true, "": ""}')
    assert columns(path) == [{"exact": "2.50", "whole": 3, "list": [1, "0.1"], "no": None, "yes": True, "": ""}]
    path = tmp_path / "rows.csv"
    path.write_text("q,a,code,,no\nx,1,007,2,\n")
    assert columns(path) == [{"code": "007", "": "2", "no": ""}]


def test_extra_info_is_spread_as_in_verl(tmp_path):
    found = [
        {"q": "1", "a": 1, "index": 5, "extra_info": {"index": 0, "split": "train"}},
        {"q": "2", "a": 2, "index": 6, "extra_info": "text"},
        {"q": "3", "a": 3, "extra_info": None},
        {"q": "4", "a": 4, "extra_info": {}},
    ]
    expected = [{"index": 0, "split": "train"}, {"index": 6, "extra_info": "text"}, {"extra_info": None}, {}]
    assert columns(write(tmp_path / "rows.json", found)) == expected
    nested = [{"extra_info": {"question": "1 + 1?", "index": 3}, "a": 2}]
    assert columns(write(tmp_path / "rows.parquet", nested), "extra_info.question") == [nested[0]["extra_info"]]


def test_of_repeated_questions_the_first_one_counts(tmp_path):
    found = [{"q": "x", "a": 1, "n": 1}, {"q": "y", "a": 1, "n": 2}, {"q": "x", "a": 1, "n": 3}, {"q": "z", "n": 4}]
    assert columns(write(tmp_path / "rows.json", found)) == [{"n": 1}, {"n": 2}]


@pytest.mark.parametrize("plural", [False, True])
def test_ours_come_before_columns_of_the_same_name(plural, tokenizer, set_reward, tmp_path):
    seen = []

    def alone(extra_info, **others):
        seen.append(extra_info)
        return 1.0

    set_reward((lambda extra_infos, solution_strs, **others: list(map(alone, extra_infos))) if plural else alone)
    found = [{"q": f"Tom has {n} apples.", "a": n, "question": "another", "prompt": "mine", "n": n} for n in (10, 11)]
    questions = dapo.load_questions([source(write(tmp_path / "rows.parquet", found))], tokenizer)
    dapo.judge([questions[1], questions[0], questions[1]], ["so", "what", "now"])
    prompts = [f"<|user|>Tom has {n} apples.<|assistant|>"[-40:] for n in (11, 10, 11)]
    assert seen == [
        {"question": f"Tom has {n} apples.", "prompt": prompt, "n": n} for n, prompt in zip((11, 10, 11), prompts)
    ]


def test_each_response_gets_a_dictionary_of_its_own(tokenizer, set_reward, tmp_path):
    """A function that takes something out of it, or puts something in, finds the next one whole."""
    set_reward(lambda extra_info, **others: extra_info.pop("n") + len(extra_info))
    path = write(tmp_path / "rows.json", [{"q": "Tom has 10 apples.", "a": 10, "n": 1}])
    (question,) = dapo.load_questions([source(path)], tokenizer)
    assert [verdict["reward"] for verdict in dapo.judge([question] * 3, ["x"] * 3)] == [3.0] * 3


def test_in_training_and_in_evaluation(main, settings, set_reward, no_pictures, tmp_path):
    """Each response is judged by the column of its own question."""
    train = [{"q": f"Tom has {n} apples.", "a": n, "extra_info": {"index": n}} for n in range(10, 20)]
    held_out = [{"q": f"Ann has {n} apples.", "a": n, "extra_info": {"index": n}} for n in range(20, 25)]
    words = [f"--TRAIN_DATASETS={[source(write(tmp_path / 'train.parquet', train))]}"]
    words += [f"--EVAL_DATASETS={[source(write(tmp_path / 'test.json', held_out))]}", "--USE_DYNAMIC_SAMPLING=False"]
    set_reward(lambda extra_info, **others: extra_info["index"])
    main([*settings, *words, "--OVERLONG_BUFFER_LENGTH=0", "--NUM_STEPS=1"])
    for table, name, count in ("responses", "Tom", 6), ("held_out", "Ann", 10):
        judged = rows(tmp_path / "run", f"SELECT question, reward FROM {table}")
        assert all(question == f"{name} has {reward:.0f} apples." for question, reward in judged)
        assert len(judged) == count


@pytest.mark.parametrize("changed", ["train", "test"])
def test_other_columns_are_another_run(changed, main, settings, chance, no_pictures, tmp_path, capsys):
    paths = {name: tmp_path / f"{name}.json" for name in ("train", "test")}
    words = [f"--{kind}_DATASETS={[source(paths[name])]}" for kind, name in (("TRAIN", "train"), ("EVAL", "test"))]

    def start(steps, levels):
        for name, path in paths.items():
            write(path, [{"q": f"Tom has {n} apples.", "a": n, "level": levels[name]} for n in range(10, 20)])
        main([*settings, *words, f"--NUM_STEPS={steps}"])
        return capsys.readouterr().out

    start(1, {"train": 1, "test": 1})
    assert "resuming the run" in start(2, {"train": 1, "test": 1})
    said = start(3, {"train": 1, "test": 1} | {changed: 2})
    assert f"the {'held-out ' if changed == 'test' else ''}questions' checksum was" in said
    assert "held another run" in said and (tmp_path / "run_1").exists()


def test_columns_of_one_name_are_refused(main, settings, tmp_path, capsys):
    table = pyarrow.table([pyarrow.array(["x"])] * 4, names=["q", "a", "level", "level"])
    path = write(tmp_path / "rows.parquet", table)
    error = stop_of(main, [*settings, f"--TRAIN_DATASETS={[source(path)]}"], capsys)
    assert "rows.parquet" in error and "duplicate field names" in error


def test_a_date_that_python_does_not_know_is_named_with_its_file(main, settings, tmp_path, capsys):
    table = pyarrow.table({"q": ["x"], "a": ["1"], "day": pyarrow.array([2**31 - 1], pyarrow.date32())})
    path = write(tmp_path / "rows.parquet", table)
    assert "rows.parquet" in stop_of(main, [*settings, f"--TRAIN_DATASETS={[source(path)]}"], capsys)


@FORMS
def test_our_own_reward_needs_none_and_gets_none(name, set_reward, tmp_path):
    set_reward(dapo.CONSTANTS["REWARD"])
    assert columns(write(tmp_path / name, [{"q": "x", "a": 1, "level": 2}])) == [{}]

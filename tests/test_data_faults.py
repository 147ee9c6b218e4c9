"""What is asked and judged is what stands in other people's files, or one line says why not."""

import datetime
import json
import os

import pyarrow
import pyarrow.parquet
import pytest
from conftest import load
from test_bad_input import stop_of

import dapo


def source(path, kind, question="q", answer="a", **others):
    return {"path": str(path), "type": kind, "input": question, "output": answer, **others}


def asked(*parts, **others):
    """The questions and answers of a data set."""
    return [(messages[-1]["content"], answer) for messages, answer, _ in dapo.load_rows(source(*parts, **others))]


def write(path, **columns):
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


@pytest.mark.parametrize("kind", ["parquet", "hub"])
def test_numbers_and_bytes_are_read_as_the_file_has_them(kind, tmp_path):
    columns = {
        "q": pyarrow.array([b"1/10?", "½?".encode()]),
        "small": pyarrow.array([0.1, 2.5], pyarrow.float32()),
        "large": pyarrow.array([2**62 + 1, -1]),
        "nested": pyarrow.array([{"a": 0.1}, {"a": 0.7}], pyarrow.struct([("a", pyarrow.float32())])),
        "date": pyarrow.array([datetime.date(2024, 1, 5)] * 2),
    }
    path = write(tmp_path / "train.parquet", **columns)
    path = tmp_path if kind == "hub" else path
    assert asked(path, kind, answer="small") == [("1/10?", "0.1"), ("½?", "2.5")]
    assert [answer for _, answer in asked(path, kind, answer="large")] == [str(2**62 + 1), "-1"]
    assert [answer for _, answer in asked(path, kind, answer="nested.a")] == ["0.1", "0.7"]
    assert [answer for _, answer in asked(path, kind, answer="date")] == ["2024-01-05"] * 2


def test_json_and_csv_are_not_interpreted(tmp_path):
    rows = [
        {"q": "when?", "a": "2024-01-05"},
        {"q": "how many?", "a": 12345678901234567891},
        {"q": "price?", "a": 2.50},
    ]
    (tmp_path / "lines.json").write_text("\n".join(map(json.dumps, rows)).replace("2.5", "2.50"))
    (tmp_path / "rows.csv").write_text(
        "q,a\nwhen?,2024-01-05\nhow many?,12345678901234567891\nprice?,2.50\ncode?,007\n"
    )
    for path, kind in (tmp_path / "lines.json", "json"), (tmp_path / "rows.csv", "csv"):
        answers = [answer for _, answer in asked(path, kind)]
        assert answers[:3] == ["2024-01-05", "12345678901234567891", "2.50"] and answers[3:] in ([], ["007"])


@pytest.mark.parametrize("row", ["1 + 1?,2,3", '1 + 1?,2,"3",'])
def test_a_csv_row_longer_than_its_heading_is_refused(row, tmp_path, capsys):
    (tmp_path / "rows.csv").write_text(f"q,a\n2 + 2?,4\n{row}\n")
    with pytest.raises(SystemExit):
        asked(tmp_path / "rows.csv", "csv")
    assert "rows.csv" in capsys.readouterr().err


def test_a_changed_file_is_read_anew_though_its_time_is_the_same(tmp_path):
    for kind, texts in ("csv", ("q,a\nx,1\n", "q,a\nx,2\n")), ("json", ('{"q": "x", "a": 1}', '{"q": "x", "a": 2}')):
        for text, answer in zip(texts, "12"):
            path = tmp_path / f"rows.{kind}"
            path.write_text(text)
            os.utime(path, (1, 1))
            assert asked(path, kind) == asked(path, kind, split="train[:1]") == [("x", answer)]


def test_a_column_nobody_asked_for_is_not_read(tmp_path):
    path = tmp_path / "train.parquet"
    columns = {"q": ["x"], "a": ["1"], "picture": [b"\xff\xfe"], "meta": [{"q": "y", "a": "2"}]}
    write(path, **columns)
    assert asked(path, "parquet") == asked(tmp_path, "hub") == [("x", "1")]
    assert asked(path, "parquet", "meta.q", "meta.a") == [("y", "2")]


@pytest.mark.parametrize("kind", ["json", "parquet"])
def test_nested_columns_that_not_every_row_has(kind, tmp_path):
    rows = [
        {"q": "first", "meta": None},
        {"q": "second", "meta": {"answer": "2"}},
        {"q": "third", "meta": {"answer": None}},
        {"q": "fourth", "meta": {"answer": "4"}},
    ]
    path = tmp_path / f"rows.{kind}"
    path.write_text("\n".join(map(json.dumps, [{"q": "zeroth"}, *rows])))
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    assert asked(path, kind, answer="meta.answer") == [("second", "2"), ("fourth", "4")]


@pytest.mark.parametrize("kind", ["json", "csv", "parquet"])
def test_a_dot_in_the_name_of_a_column(kind, tmp_path):
    path = tmp_path / f"rows.{kind}"
    path.write_text('{"q.text": "x", "a": 1}' if kind == "json" else "q.text,a\nx,1\n")
    if kind == "parquet":
        write(path, **{"q.text": ["x"], "a": ["1"], "q": [{"other": "y"}]})
    assert asked(path, kind, "q.text") == [("x", "1")]


def test_chat_messages_as_json_text(tmp_path):
    chat = [{"role": "system", "content": "Be short."}, {"role": "user", "content": '1 + "1"?'}]
    write(tmp_path / "rows.parquet", q=[json.dumps(chat), "[{x}] + 1?", '[{"a": 1}]'], a=["2", "3", "4"])
    rows = dapo.load_rows(source(tmp_path / "rows.parquet", "parquet"))
    assert [messages for messages, *_ in rows] == [
        chat,
        [{"role": "user", "content": "[{x}] + 1?"}],
        [{"role": "user", "content": '[{"a": 1}]'}],
    ]


@pytest.mark.parametrize(
    "template", ["{{ strftime_now('%d %b %Y %H:%M') }}", "{% set now = strftime_now('%A') %}{{ now }}"]
)
def test_a_prompt_does_not_depend_on_the_day(template, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", template + " {{ messages[0]['content'] }}")
    text, ids = dapo.read_prompt(tokenizer, [{"role": "user", "content": "Tom"}])
    assert text in ("01 Jan 2026 00:00 Tom", "Thursday Tom") and tokenizer.decode(ids) == text


@pytest.mark.parametrize("inserted", ["<|im_end|>", "<|user|>Tom"])
def test_a_question_with_the_text_of_a_control_token_is_left_out(inserted, tokenizer, tmp_path, capsys):
    write(tmp_path / "rows.parquet", q=["Tom has 1 apple.", f"Tom {inserted} has 2."], a=["1", "2"])
    questions = dapo.load_questions([source(tmp_path / "rows.parquet", "parquet")], tokenizer)
    assert [question.answer for question in questions] == ["1"]
    assert "1 of 2 questions hold text that is a control token" in capsys.readouterr().out


def test_a_prompt_does_not_end_in_the_end_token(tokenizer, monkeypatch):
    """T5's and many other tokenizers append it."""
    monkeypatch.setattr(tokenizer, "chat_template", None)
    plain = dapo.read_prompt(tokenizer, [{"role": "user", "content": "Tom"}])[1]
    for begin in [], [7]:
        with_end = lambda text, begin=begin, **others: {"input_ids": [*begin, *plain, tokenizer.eos_token_id]}  # noqa: E731
        proxy = type("T", (), {"__call__": lambda self, *a, **k: with_end(*a, **k), "chat_template": None})()
        proxy.eos_token_id = tokenizer.eos_token_id
        assert dapo.read_prompt(proxy, [{"role": "user", "content": "Tom"}])[1] == begin + plain


@pytest.mark.parametrize("template", ["", "{% if false %}{{ messages }}{% endif %}"])
def test_a_prompt_of_no_tokens_is_refused(template, main, settings, make_folder, capsys):
    folder = make_folder(seed=1)
    (folder / "chat_template.jinja").write_text(template or "{{ '' }}")
    assert "no tokens of a question" in stop_of(main, [*settings, f"--MODEL={folder}"], capsys)


SWITCH = "{{ messages[0]['content'] }}{% if enable_thinking is false %}<think></think>{% endif %}"


@pytest.mark.parametrize(
    "template, switches, said",
    [
        (SWITCH, "{'enable_thinknig': False}", "has no switch enable_thinknig"),
        (SWITCH, "{'thinking': False}", "has no switch thinking"),  # a part of its name
        (SWITCH, "{'enable_thinkin': False}", "has no switch enable_thinkin"),
        (SWITCH, "{'enable_thinking': False, 'ENABLE_THINKING': 0}", "has no switch ENABLE_THINKING"),
        (SWITCH, "{1: False}", "has no switch 1"),
        ("", "{'enable_thinking': False}", "has no switch enable_thinking"),
        (SWITCH, "{'messages': []}", "multiple values for keyword argument 'messages'"),
        (SWITCH, '{"enable_thinking": false}', "has to be of type dict, such as {}"),
        (SWITCH, "enable_thinking=False", "has to be of type dict, such as {}"),
    ],
)
def test_a_switch_that_the_chat_template_lacks_is_named(template, switches, said, main, settings, make_folder, capsys):
    """Or it would be ignored, and a model would think where it should not."""
    folder = make_folder()
    (folder / "chat_template.jinja").write_text(template)
    if not template:
        (folder / "chat_template.jinja").unlink()
    error = stop_of(main, [*settings, f"--MODEL={folder}", f"--CHAT_TEMPLATE_KWARGS={switches}"], capsys)
    assert said in error and ("CHAT_TEMPLATE_KWARGS=" in error or "multiple" in error)


def test_names_with_brackets_and_empty_shards(tmp_path):
    write(tmp_path / "a[1].parquet", q=["x"], a=["1"])
    write(tmp_path / "a1.parquet", q=["another"], a=["2"])
    assert asked(tmp_path / "a[1].parquet", "parquet") == [("x", "1")]
    pyarrow.parquet.write_table(pyarrow.table({"q": ["y"], "a": ["1"]}).slice(0, 0), tmp_path / "shard_0.parquet")
    write(tmp_path / "shard_1.parquet", q=["y"], a=["3"])
    assert asked(tmp_path / "shard_*.parquet", "parquet") == [("y", "3")]
    (tmp_path / "part_0.csv").touch()
    (tmp_path / "part_1.csv").write_text("q,a\nz,4\n")
    assert asked(tmp_path / "part_*.csv", "csv") == [("z", "4")]


@pytest.mark.parametrize("kind", ["json", "csv", "parquet"])
def test_what_is_no_utf_8_or_empty_is_named(kind, tmp_path, capsys):
    for content in b"q,a\n\xc4pfel?,1\n", b'{"q": "\xc4pfel?", "a": 1}', b"":
        (tmp_path / "odd").write_bytes(content)
        with pytest.raises(SystemExit) as stop:
            asked(tmp_path / "odd", kind)
        error = capsys.readouterr().err
        assert stop.value.code == 2 and error.count("\n") == 1 and "/odd'" in error


def test_a_missing_column_is_named_with_its_file(tmp_path, capsys):
    write(tmp_path / "rows.parquet", q=["x"], solution=["1"])
    (tmp_path / "rows.csv").write_text("q,solution\nx,1\n")
    for kind in "parquet", "csv":
        with pytest.raises(SystemExit):
            asked(tmp_path / f"rows.{kind}", kind)
        columns = "q: string solution: string" if kind == "parquet" else "its columns: q, solution"
        assert f"rows.{kind}" in (error := capsys.readouterr().err) and columns in error


def test_too_few_questions_for_a_batch_are_refused(main, settings, tmp_path, capsys):
    """Else one question would fill two groups of a batch."""
    error = stop_of(main, [*settings, "--BATCH_SIZE=11"], capsys)
    assert "BATCH_SIZE=11: there are only 10 questions to train on" in error and not (tmp_path / "run").exists()


def test_held_out_questions_that_are_trained_on_are_counted(main, settings, chance, no_pictures, tmp_path, capsys):
    main([*settings, "--NUM_STEPS=1"])
    assert "10 of 10 questions of EVAL_DATASETS are also trained on" in capsys.readouterr().out
    write(tmp_path / "other.parquet", q=["Tom has 10 apples.", "Tom has 3 pears."], a=["10", "3"])
    held_out = [source(tmp_path / "other.parquet", "parquet")]
    main([*settings, "--NUM_STEPS=1", f"--EVAL_DATASETS={held_out}"])
    assert "1 of 2 questions of EVAL_DATASETS are also trained on" in capsys.readouterr().out


def test_a_batch_reward_may_change_its_lists(make_folder, set_constants, set_reward):
    """What run.db says is what the model wrote."""
    model, tokenizer = load(make_folder())
    set_constants(MAX_RESPONSE_LENGTH=4)

    def judge(solution_strs, ground_truths, **others):
        for number, text in enumerate(solution_strs):
            solution_strs[number] = "changed"
        ground_truths.clear()
        return [{"score": 1.0}, {"score": 0.0}]

    set_reward(judge)
    prompt = dapo.torch.tensor(tokenizer("Tom")["input_ids"])
    ((one, other),) = dapo.sample_groups(model, tokenizer, [dapo.Question("Tom", "1", "test", prompt)], 2)
    assert one.text == tokenizer.decode(one.tokens, skip_special_tokens=True) != "changed" != other.text


@pytest.mark.parametrize("rewards", [[1 / 3, 0.333333, 1 / 3, 0.3333333], [0.1 + 0.2, 0.3, 0.3, 0.3], [1e-9, 0, 0, 0]])
def test_rewards_that_are_equal_but_for_rounding_have_no_advantage(rewards, set_constants):
    assert dapo.group_advantages(dapo.torch.tensor([rewards])).tolist() == [[0.0] * 4]
    assert dapo.group_advantages(dapo.torch.tensor([[*rewards[:3], rewards[3] + 0.01]]))[0, 3] > 1

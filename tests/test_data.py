"""Data sets: what is asked and judged is what stands in the file, in whatever form."""

import copy
import datetime
import io
import itertools
import json
import os

import pyarrow.parquet
import pytest
import torch
from transformers import AutoTokenizer, GenerationMixin

import dapo
from tools import chat, evaluate

QUESTIONS = [f"Tom has {n} apples." for n in range(10, 20)]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The same ten questions in every form; a Hub data set is a folder here."""
    folder = tmp_path_factory.mktemp("data")
    rows = [{"question": text, "answer": str(n)} for n, text in enumerate(QUESTIONS)]
    table = pyarrow.Table.from_pylist(rows)
    pyarrow.parquet.write_table(table, folder / "q.parquet")
    (folder / "hub").mkdir()
    pyarrow.parquet.write_table(table, folder / "hub/train.parquet")
    lines = "\r\n".join(f"{row['question']},{row['answer']}" for row in rows)
    (folder / "q.csv").write_bytes(f"question,answer\r\n{lines}".encode())
    (folder / "excel.csv").write_bytes(f"\ufeffquestion,answer\r\n{lines}\r\n".encode())
    (folder / "part_1.csv").write_text("question,answer\n" + "\n".join(lines.splitlines()[:6]))
    (folder / "part_2.csv").write_text("question,answer\n" + "\n".join(lines.splitlines()[6:]))
    nested = [
        {"prompt": [{"role": "user", "content": r["question"]}], "reward_model": {"ground_truth": r["answer"], "n": 1}}
        for r in rows
    ]
    (folder / "lines.json").write_text("\n".join(map(json.dumps, nested)) + "\n\n")
    (folder / "array.json").write_text(json.dumps(nested, indent=2))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(nested), folder / "nested.parquet")
    return folder


def source(path, question="question", answer="answer", **others):
    return {"path": str(path), "type": path.suffix[1:] or "hub", "input": question, "output": answer} | others


NESTED = "prompt", "reward_model.ground_truth"


@pytest.mark.parametrize(
    "name, columns",
    [
        ("q.csv", ()),
        ("excel.csv", ()),
        ("part_*.csv", ()),
        ("hub", ()),
        ("lines.json", NESTED),
        ("array.json", NESTED),
        ("nested.parquet", NESTED),
    ],
)
def test_data_of_every_form_give_the_same_questions(name, columns, data, tokenizer):
    questions = dapo.load_questions([source(data / "q.parquet")], tokenizer)
    others = dapo.load_questions([source(data / name, *columns)], tokenizer)
    assert [question.text for question in questions] == QUESTIONS and len(others) == 10
    for one, same in zip(questions, others):
        assert (one.text, one.answer) == (same.text, same.answer)
        assert same.source == str(data / name)
        assert torch.equal(one.prompt, same.prompt)
        assert tokenizer.decode(one.prompt) == f"<|user|>{one.text}<|assistant|>"


def pairs(path, question="q", answer="a", **others):
    """The last message and the answer of each row."""
    rows = dapo.load_rows(source(path, question, answer, **others))
    return [(messages[-1]["content"], answer) for messages, answer, _ in rows]


def written(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def test_csv_cells_are_taken_as_they_are_written(tmp_path):
    """pandas makes 2.0 of 2 where a cell is empty, 7 of 007, 1e16 of large numbers, and nothing of None and NA."""
    answers = ["3", "12345678901234567", "007", "", "None", "NA", "2.50", "1e3", '"1,234"', "2024-01-01", "true"]
    text = "id,q,a\n" + "".join(f"{n},{n},{answer}\n" for n, answer in enumerate(answers))
    expected = [(str(n), answer.strip('"')) for n, answer in enumerate(answers) if answer]
    assert pairs(written(tmp_path / "q.csv", text)) == expected
    text = 'q,a\n"two\nlines, and ""quoted""",5\n'
    assert pairs(written(tmp_path / "q.csv", text)) == [('two\nlines, and "quoted"', "5")]


def test_json_values_are_taken_as_they_are_written(tmp_path):
    answers = ["3", "2.50", "1e3", "12345678901234567890123", "0.1234567890123456789", '"007"', '"2024-01-01"']
    lines = [f'{{"q": "{n}", "a": {answer}}}' for n, answer in enumerate(answers)]
    expected = [(str(n), answer.strip('"')) for n, answer in enumerate(answers)]
    assert pairs(written(tmp_path / "q.json", "\n".join(lines))) == expected
    assert pairs(written(tmp_path / "q.json", f"[{', '.join(lines)}]")) == expected
    assert pairs(written(tmp_path / "q.json", '{"q": 17.50, "a": "你\u2028好"}')) == [("17.50", "你\u2028好")]


def test_parquet_keeps_dates_and_large_numbers(tmp_path):
    columns = {"q": ["1", "2"], "day": [datetime.date(2024, 1, 31), datetime.date(1812, 6, 24)], "n": [2**62 + 1, 7]}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "q.parquet")
    assert pairs(tmp_path / "q.parquet", "q", "day") == [("1", "2024-01-31"), ("2", "1812-06-24")]
    assert pairs(tmp_path / "q.parquet", "q", "n") == [("1", str(2**62 + 1)), ("2", "7")]


def test_rows_need_not_be_alike(tmp_path):
    """Columns that only later rows have, and structs that differ."""
    rows = [
        {"q": "1", "other": 1},
        {"q": "2", "meta": {"a": {"final": "20"}}},
        {"q": "3", "meta": None},
        {"q": "4", "meta": {"a": {"final": "40", "way": [1, 2]}, "b": 1}},
        {"q": "5", "meta": "none"},
        {"q": "6", "meta.a.final": "60"},
    ]
    path = written(tmp_path / "q.json", "\n".join(map(json.dumps, rows)))
    assert pairs(path, "q", "meta.a.final") == [("2", "20"), ("4", "40"), ("6", "60")]


def test_a_changed_file_is_read_anew_although_its_time_and_size_are_the_same(tmp_path):
    path = written(tmp_path / "q.csv", "q,a\n1,2\n")
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    assert pairs(path) == pairs(path, split="train[:1]") == [("1", "2")]
    os.utime(written(path, "q,a\n3,4\n"), ns=times)
    assert pairs(path) == pairs(path, split="train[:1]") == [("3", "4")]


@pytest.mark.parametrize("columns", [("q", "a"), ("q", "meta.truth")])
def test_of_parquet_only_the_named_columns_are_read(columns, tmp_path):
    """The bytes of another column are spoiled: whoever reads it fails."""
    path = tmp_path / "q.parquet"
    rows = [{"q": q, "big": q * 999, "a": a, "meta": {"truth": a}} for q, a in (("1", "3"), ("2", "4"))]
    table = pyarrow.Table.from_pylist(rows)
    pyarrow.parquet.write_table(table, path, compression="zstd")
    group = pyarrow.parquet.ParquetFile(path).metadata.row_group(0)
    big = next(group.column(i) for i in range(group.num_columns) if group.column(i).path_in_schema == "big")
    start = min(filter(None, (big.dictionary_page_offset, big.data_page_offset)))
    data = bytearray(path.read_bytes())
    data[start : start + big.total_compressed_size] = b"\0" * big.total_compressed_size
    path.write_bytes(data)
    with pytest.raises((OSError, ValueError)):
        pyarrow.parquet.read_table(path)
    assert pairs(path, *columns) == [("1", "3"), ("2", "4")]


def test_a_split_selects_rows_of_a_file_too(data, tokenizer):
    splits = {"train[:3]": QUESTIONS[:3], "train[3:10]": QUESTIONS[3:], "train[-20%:]": QUESTIONS[-2:]}
    for name, split in itertools.product(("q.csv", "q.parquet", "hub"), splits):
        found = dapo.load_questions([source(data / name, split=split)], tokenizer)
        assert [question.text for question in found] == splits[split]


def test_several_data_sets_follow_each_other(data, tokenizer):
    questions = dapo.load_questions([source(data / "part_2.csv"), source(data / "part_1.csv")], tokenizer)
    assert [question.text for question in questions] == QUESTIONS[6:] + QUESTIONS[:6]


def test_overlong_questions_are_left_out_and_counted(data, tokenizer, set_constants, tmp_path, capsys):
    length = len(tokenizer(f"<|user|>{QUESTIONS[0]}<|assistant|>")["input_ids"])
    (tmp_path / "q.csv").write_text(f"q,a\n{QUESTIONS[0]},1\n{QUESTIONS[0]} So?,2\n")
    set_constants(MAX_PROMPT_LENGTH=length)
    (question,) = dapo.load_questions([source(tmp_path / "q.csv", "q", "a")], tokenizer)
    assert question.text == QUESTIONS[0] and len(question.prompt) == length
    assert "1 of 2 questions are over MAX_PROMPT_LENGTH" in capsys.readouterr().out


def test_the_prompt_template_comes_around_the_question_and_into_the_chat_template(set_constants, tokenizer):
    set_constants(PROMPT_TEMPLATE="Solve {question}\nUse \\boxed{}, not {}.")
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    messages += [{"role": "user", "content": "Tom has {question} apples."}]
    asked = "Solve Tom has {question} apples.\nUse \\boxed{}, not {}."
    whole = [*messages[:2], {"role": "user", "content": asked}]
    with_chat = tokenizer.apply_chat_template(whole, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert dapo.read_prompt(tokenizer, messages)[1] == with_chat
    plain = copy.deepcopy(tokenizer)
    plain.chat_template = None
    assert dapo.read_prompt(plain, messages)[1] == tokenizer(asked)["input_ids"] != with_chat
    assert messages[2]["content"] == "Tom has {question} apples."


THINKING = """{%- for message in messages %}
    {{- '<|' + message.role + '|>' + message.content }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|>' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\n\n</think>\n\n' }}
    {%- endif %}
{%- endif %}
{%- if style %}{{ style }}{% endif %}"""  # as Qwen3's


@pytest.mark.parametrize("by_recipe", [True, False])
@pytest.mark.parametrize(
    "switches, end",
    [
        ({}, ""),
        ({"enable_thinking": True}, ""),
        ({"enable_thinking": False}, "<think>\n\n</think>\n\n"),
        ({"enable_thinking": False, "style": None}, "<think>\n\n</think>\n\n"),
        ({"style": "in two lines"}, "in two lines"),
    ],
)
def test_the_chat_templates_own_switches(switches, end, by_recipe, main, tokenizer, monkeypatch, tmp_path):
    """Its values come from a recipe or the command line, true and false as such; with {} the prompt is as ever."""
    (tmp_path / "mine.py").write_text(f"CHAT_TEMPLATE_KWARGS = {switches}")
    monkeypatch.setattr(dapo, "train", lambda: None)
    main([str(tmp_path / "mine.py") if by_recipe else f"--CHAT_TEMPLATE_KWARGS={switches}"])
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = THINKING
    text, ids = dapo.read_prompt(tokenizer, [{"role": "user", "content": "Tom has 10 apples."}])
    assert text == f"<|user|>Tom has 10 apples.<|assistant|>{end}"
    assert ids == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert dapo.text_of(dapo.CHAT_TEMPLATE_KWARGS) == str(switches)  # as run.db and constants.py have it


@pytest.fixture
def thinker(make_folder):
    """The folder of a model with that chat template."""
    folder = make_folder()
    (folder / "chat_template.jinja").write_text(THINKING)
    return folder


def test_switches_reach_training_evaluation_and_chat(
    thinker, main, settings, set_reward, no_pictures, monkeypatch, capsys, tmp_path
):
    """What the model reads: in a run, whose reward is told the end of it, in tools.evaluate, and in tools.chat."""
    words, ends, asked = ["--CHAT_TEMPLATE_KWARGS={'enable_thinking': False}", f"--MODEL={thinker}"], set(), []

    def judge(extra_info, solution_str, **others):
        ends.add(extra_info["prompt"][-30:])
        return float(len(solution_str) % 2)

    def sample(model, prompts, *others, real=dapo.sample_tokens, **settings):
        asked.extend(prompts)
        return real(model, prompts, *others, **settings)

    set_reward(judge)
    monkeypatch.setattr(dapo, "sample_tokens", sample)
    main([*settings, *words, "--NUM_STEPS=1"])
    run = str(tmp_path / "run")
    evaluate.main([*settings, *words, run])
    decode = AutoTokenizer.from_pretrained(run + "/step_1").decode
    assert ends == {"<|assistant|><think>\n\n</think>\n\n"[-30:]} and len(asked) > 40
    assert all(decode(prompt).endswith("apples.<|assistant|><think>\n\n</think>\n\n") for prompt in asked)

    def generate(self, ids, **others):
        asked.append(ids[0])
        return torch.cat([ids, ids[:, :1]], 1)

    monkeypatch.setattr(GenerationMixin, "generate", generate)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"Tom has 5 pears.\n")))
    chat.main([*settings, *words, run])
    assert decode(asked[-1]) == "<|user|>Tom has 5 pears.<|assistant|><think>\n\n</think>\n\n"


def test_other_switches_are_another_run(thinker, main, settings, chance, no_pictures, capsys, tmp_path):
    words = [*settings, f"--MODEL={thinker}", "--NUM_STEPS=1"]
    main([*words, "--CHAT_TEMPLATE_KWARGS={'enable_thinking': False}"])
    main([*words, "--CHAT_TEMPLATE_KWARGS={'enable_thinking': True}", "--NUM_STEPS=2"])
    said = capsys.readouterr().out
    assert "CHAT_TEMPLATE_KWARGS was {'enable_thinking': False}, is now {'enable_thinking': True}" in said
    assert "CHAT_TEMPLATE_KWARGS = {'enable_thinking': True}\n" in (tmp_path / "run/step_2/constants.py").read_text()


def test_a_response_after_an_empty_thought_is_judged(thinker, set_constants):
    """The prompt ends in </think>, so what follows it is no open thought."""
    messages = [{"role": "user", "content": "1 + 1?"}]
    set_constants(CHAT_TEMPLATE_KWARGS={"enable_thinking": False})
    text, _ = dapo.read_prompt(AutoTokenizer.from_pretrained(thinker), messages)
    assert text.endswith("<think>\n\n</think>\n\n")
    assert dapo.compute_score("", "\\boxed{2}", "2", {"question": "1 + 1?", "prompt": text[-40:]})["acc"]


@pytest.mark.parametrize("name, sign", [("boxed", "\\boxed{}"), ("answer", "Answer:")])
def test_ready_made_templates_ask_for_what_the_judge_looks_for(name, sign, set_constants, tokenizer):
    set_constants(PROMPT_TEMPLATE=name)
    prompt = dapo.read_prompt(tokenizer, [{"role": "user", "content": "1 + 1?"}])[0]
    assert prompt.startswith("<|user|>1 + 1?\n") and sign in prompt and prompt.endswith("<|assistant|>")
    answered = {"boxed": "It is \\boxed{2}", "answer": "It is even.\nAnswer: 2"}[name]
    assert dapo.compute_score("", answered, "2")["acc"]


def test_rows_without_a_question_or_an_answer_are_left_out_and_counted(tokenizer, tmp_path, capsys):
    text, chat = tmp_path / "text.csv", tmp_path / "chat.json"
    text.write_text('question,answer\n1 + 1,2\n"",3\n"  ",4\nTom,\n2 + 2,4.5\n')
    rows = [[{"role": "user", "content": content}] for content in ("Tom", "", None, "Ann")] + [[]]
    chat.write_text(
        "\n".join(json.dumps({"q": row, "a": answer}) for row, answer in zip(rows, ["1", "2", "3", " ", "5"]))
    )
    numbers = tmp_path / "numbers.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"q": [1.0, 0.0, float("nan")], "a": [float("nan"), 7.0, 8.0]}), numbers)
    questions = dapo.load_questions([source(text), source(chat, "q", "a"), source(numbers, "q", "a")], tokenizer)
    assert [(q.text, q.answer) for q in questions] == [("1 + 1", "2"), ("2 + 2", "4.5"), ("Tom", "1"), ("0.0", "7.0")]
    said = capsys.readouterr().out
    for count, path in (("3 of 5", text), ("4 of 5", chat), ("2 of 3", numbers)):
        assert f"{count} rows of {path}" in said


def test_repeated_questions_are_left_out(tmp_path, capsys):
    """As in DAPO-Math-17k on the Hub. The first answer stands, the order stays, and another system prompt is another
    question."""
    asked = [{"role": "user", "content": "6 times 7?"}]
    rows = [(asked, "42"), ([{"role": "user", "content": "2 plus 2?"}], "4"), (asked, "42"), (asked, "43")]
    rows += [([{"role": "system", "content": "Be brief."}, *asked], "42"), (asked, "")]
    lines = (json.dumps({"prompt": prompt, "reward_model": {"ground_truth": truth}}) for prompt, truth in rows)
    (tmp_path / "math.json").write_text("\n".join(lines))
    kept = dapo.load_rows(source(tmp_path / "math.json", *NESTED))
    assert [row[:2] for row in kept] == [rows[0], rows[1], rows[4]]
    assert f"3 of 6 rows of {tmp_path / 'math.json'}" in capsys.readouterr().out

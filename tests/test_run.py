"""Whole runs by the command line, on a tiny random model and a few questions: what a run leaves, and what it says."""

import contextlib
import copy
import json
import sqlite3
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet
import pytest
import torch
from conftest import ROOT, load
from PIL import Image

import dapo


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The same 12 questions in every form, some of them overlong; a Hub data set is a folder here."""
    folder = tmp_path_factory.mktemp("data")
    rows = [{"question": f"Tom has {n} apples.", "answer": f"#### {n}"} for n in range(10, 20)]
    rows += [{"question": f"Tom has {n} apples. " * 60, "answer": f"#### {n}"} for n in (8, 9)]
    table = dapo.record.datasets.Dataset.from_list(rows)
    table.to_parquet(folder / "q.parquet")
    table.to_csv(folder / "q.csv")
    (folder / "hub").mkdir()
    table.to_parquet(folder / "hub/train.parquet")
    nested = [
        {"prompt": [{"role": "user", "content": r["question"]}], "reward_model": {"ground_truth": r["answer"][5:]}}
        for r in rows
    ]
    (folder / "q.json").write_text("\n".join(map(json.dumps, nested)))
    return folder


@pytest.fixture
def settings(data, make_folder, tmp_path):
    """The command line of a run of two tiny steps."""
    source = [{"path": str(data / "q.parquet"), "type": "parquet", "input": "question", "output": "answer"}]
    return [
        f"--{name}={value}"
        for name, value in dict(
            MODEL=make_folder(),
            TRAIN_DATASETS=source,
            EVAL_DATASETS=source,
            OUTPUT_DIR=tmp_path / "run",
            DEVICE="cpu",
            NUM_STEPS=2,
            EVAL_EVERY=2,
            BATCH_SIZE=3,
            GROUP_SIZE=2,
            MINI_BATCHES=2,
            MAX_GEN_BATCHES=2,
            MAX_RESPONSE_LENGTH=8,
            OVERLONG_BUFFER_LENGTH=4,
        ).items()
    ]


@pytest.fixture
def lottery(set_reward):
    """A reward by chance, so that a random model has something to learn from."""
    coin = torch.Generator().manual_seed(0)

    def score(**response):
        right = torch.rand((), generator=coin).item() < 0.5
        return {"score": 2.0 * right - 1, "acc": right, "pred": ""}

    set_reward(score)


def rows(folder, query):
    with contextlib.closing(sqlite3.connect(folder / "run.db")) as db:
        return db.execute(query).fetchall()


METRICS = """
reward/mean accuracy response_length/mean response_length/max truncated_fraction entropy policy_loss entropy_loss
clip_fraction/low clip_fraction/high grad_norm learning_rate groups/all_correct groups/all_wrong dynamic_resample_rate
generation_batches time/generate time/update time/step tokens_per_second memory/peak_gib
""".split()


def test_a_run_leaves_its_record(main, settings, lottery, tmp_path, capsys):
    main(["train", *settings, "--KL_COEF=0.01", "--EVAL_SAMPLES=2", "--SAVE_EVERY=1"])
    run = tmp_path / "run"
    for step in (1, 2):
        found = dict(rows(run, f"SELECT name, value FROM metrics WHERE step = {step}"))
        assert not set(METRICS + ["kl"]) - set(found)
        assert all(value is not None and value == value for value in found.values())
        answers = rows(run, f"SELECT accuracy, reward, length, truncated, kept FROM responses WHERE step = {step}")
        assert found["accuracy"] == pytest.approx(sum(row[0] for row in answers) / len(answers))
        assert found["reward/mean"] == pytest.approx(sum(row[1] for row in answers) / len(answers))
        assert found["response_length/mean"] == pytest.approx(sum(row[2] for row in answers) / len(answers))
        assert found["dynamic_resample_rate"] == pytest.approx(1 - sum(row[4] for row in answers) / len(answers))
    evaluated = rows(run, "SELECT step, name FROM metrics WHERE name LIKE 'eval/%' ORDER BY step, name")
    names = "accuracy avg@2 pass@2 response_length response_length@2 truncated_fraction truncated_fraction@2".split()
    assert evaluated == [(s, f"eval/{name}") for s in (0, 2) for name in sorted(names + ["maj@2"])]
    picture = Image.open(run / "training_metrics.png")
    assert min(picture.size) > 500 and len(set(picture.convert("L").tobytes())) > 50
    left = {".lock", "checkpoint", "run.db", "step_1", "step_2", "training_metrics.png"}
    assert {p.name for p in run.iterdir()} == left
    said = capsys.readouterr().out
    assert "2 of 12 questions are over MAX_PROMPT_LENGTH" in said and "Tom has 10 apples." in said

    # the script that made it holds the values of this run, and runs beside reward.py and record.py
    script = (run / "step_2/train_script.py").read_text()
    assert "KL_COEF = 0.01  # weight" in script and "MAX_RESPONSE_LENGTH = 8  #" in script
    program = [sys.executable, str(run / "step_2/train_script.py"), "--help"]
    listed = subprocess.run(program, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True).stdout
    assert "--KL_COEF=0.01 " in listed and f"--OUTPUT_DIR={run} " in listed


def test_weights_move_only_where_there_is_something_to_learn(main, settings, lottery, set_reward, tmp_path, capsys):
    main([*settings, "--LEARNING_RATE=0.01"])
    before = load(dapo.MODEL)[0].state_dict()
    after = load(tmp_path / "run/step_2")[0].state_dict()
    assert all((before[name] != after[name]).float().mean() > 0.9 for name in before if "proj" in name)
    assert "no update" not in capsys.readouterr().out

    set_reward(lambda **response: {"score": -1.0, "acc": False, "pred": ""})
    main([*settings, "--LEARNING_RATE=0.01"])
    after = load(tmp_path / "run/step_2")[0].state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    said = capsys.readouterr().out
    assert "step 1: no update" in said and "step 2: no update" in said
    assert rows(tmp_path / "run", "SELECT value FROM metrics WHERE name = 'groups/all_wrong'") == [(1.0,), (1.0,)]


def test_same_seed_same_run_and_evaluation_changes_nothing(main, settings, set_reward, tmp_path):
    states = []

    def score(solution_str, **others):
        odd = len(solution_str) % 2
        return {"score": 2.0 * odd - 1, "acc": bool(odd), "pred": ""}

    set_reward(score)
    for more in ([], ["--EVAL_SAMPLES=3", "--EVAL_EVERY=1"], ["--SEED=1"]):
        main([*settings, *more, f"--OUTPUT_DIR={tmp_path / str(len(states))}"])
        states.append(load(tmp_path / str(len(states)) / "step_2")[0].state_dict())
    assert all(torch.equal(one, other) for one, other in zip(states[0].values(), states[1].values()))
    assert not all(torch.equal(one, other) for one, other in zip(states[0].values(), states[2].values()))


def test_an_earlier_run_is_kept_aside(main, settings, tmp_path, capsys):
    for _ in range(3):
        main(settings)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run", "run_1", "run_2"]
    assert all((tmp_path / name / "step_2").is_dir() for name in ("run", "run_1", "run_2"))
    assert f"{tmp_path / 'run'} holds an earlier run: it is now {tmp_path / 'run_2'}" in capsys.readouterr().out


def test_without_num_steps_it_goes_through_the_data(main, settings, set_constants, tmp_path):
    main([*settings, "--NUM_STEPS=None", "--NUM_EPOCHS=2", "--USE_DYNAMIC_SAMPLING=False", "--EVAL_EVERY=5"])
    asked = rows(tmp_path / "run", "SELECT question, COUNT(*) FROM responses GROUP BY question")
    assert len(asked) == 10 and {count for _, count in asked} == {2 * 2}
    assert rows(tmp_path / "run", "SELECT step FROM metrics WHERE name = 'eval/accuracy'") == [(0,), (5,), (7,)]
    assert (tmp_path / "run/epoch_2").is_dir()


@pytest.mark.parametrize(
    "name, kind, columns",
    [
        ("q.csv", "csv", ("question", "answer")),
        ("q.json", "json", ("prompt", "reward_model.ground_truth")),
        ("hub", "hub", ("question", "answer")),
    ],
)
def test_data_of_every_form_give_the_same_questions(name, kind, columns, data, tokenizer):
    source = {"path": str(data / "q.parquet"), "type": "parquet", "input": "question", "output": "answer"}
    other = {"path": str(data / name), "type": kind, "input": columns[0], "output": columns[1]}
    questions, others = dapo.load_questions([source], tokenizer), dapo.load_questions([other], tokenizer)
    assert len(questions) == len(others) == 10
    for one, same in zip(questions, others):
        assert one.text == same.text and one.answer.removeprefix("#### ") == same.answer.removeprefix("#### ")
        assert torch.equal(one.prompt, same.prompt)
        assert tokenizer.decode(one.prompt) == f"<|user|>{one.text}<|assistant|>"


def test_the_prompt_template_comes_around_the_question_and_into_the_chat_template(set_constants, tokenizer):
    set_constants(PROMPT_TEMPLATE="Solve {question}\nUse \\boxed{}, not {}.")
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    messages += [{"role": "user", "content": "Tom has {question} apples."}]
    asked = "Solve Tom has {question} apples.\nUse \\boxed{}, not {}."
    whole = [*messages[:2], {"role": "user", "content": asked}]
    with_chat = tokenizer.apply_chat_template(whole, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert dapo.read_prompt(tokenizer, messages) == with_chat
    plain = copy.deepcopy(tokenizer)
    plain.chat_template = None
    assert dapo.read_prompt(plain, messages) == tokenizer(asked)["input_ids"] != with_chat
    assert messages[2]["content"] == "Tom has {question} apples."


def test_csv_cells_are_taken_as_they_are_written(tmp_path):
    """pandas makes 2.0 of 2 where a cell is empty, 7 of 007, 1e16 of large numbers, and nothing of None and NA."""
    answers = ["3", "12345678901234567", "007", "", "None", "NA", "2.50", "1e3", '"1,234"']
    (tmp_path / "q.csv").write_text("id,q,a\n" + "".join(f"{n},{n},{answer}\n" for n, answer in enumerate(answers)))
    rows = dapo.record.load_rows({"path": str(tmp_path / "q.csv"), "type": "csv", "input": "q", "output": "a"})
    assert [answer for _, answer in rows] == [answer.strip('"') for answer in answers if answer]


def test_a_split_selects_rows_of_a_file_too(data, tokenizer):
    source = {"path": str(data / "q.csv"), "type": "csv", "input": "question", "output": "answer"}
    parts = [dapo.load_questions([source | {"split": split}], tokenizer) for split in ("train[:3]", "train[3:10]")]
    assert [[q.text for q in part] for part in parts] == [
        [f"Tom has {n} apples." for n in span] for span in (range(10, 13), range(13, 20))
    ]


def test_rows_without_a_question_or_an_answer_are_left_out_and_counted(tokenizer, tmp_path, capsys):
    text, chat = tmp_path / "text.csv", tmp_path / "chat.json"
    text.write_text('question,answer\n1 + 1,2\n"",3\n"  ",4\nTom,\n2 + 2,4.5\n')
    rows = [[{"role": "user", "content": content}] for content in ("Tom", "", None, "Ann")] + [[]]
    chat.write_text(
        "\n".join(json.dumps({"q": row, "a": answer}) for row, answer in zip(rows, ["1", "2", "3", " ", "5"]))
    )
    text = {"path": str(text), "type": "csv", "input": "question", "output": "answer"}
    chat = {"path": str(chat), "type": "json", "input": "q", "output": "a"}
    numbers = tmp_path / "numbers.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"q": [1.0, 0.0, float("nan")], "a": [float("nan"), 7.0, 8.0]}), numbers)
    numbers = {"path": str(numbers), "type": "parquet", "input": "q", "output": "a"}
    questions = dapo.load_questions([text, chat, numbers], tokenizer)
    assert [(q.text, q.answer) for q in questions] == [("1 + 1", "2"), ("2 + 2", "4.5"), ("Tom", "1"), ("0.0", "7.0")]
    said = capsys.readouterr().out
    assert f"3 of 5 rows of {text['path']} have no question or no answer" in said
    assert f"4 of 5 rows of {chat['path']} have no question or no answer" in said


def test_eval_and_plot(main, settings, make_folder, tmp_path, capsys):
    main(settings)
    capsys.readouterr()
    main(["eval", *settings])
    said = capsys.readouterr().out
    assert f" {dapo.MODEL}\n  accuracy " in said and "10 questions" in said
    (tmp_path / "run/training_metrics.png").unlink()
    main(["plot", str(tmp_path / "run")])
    assert (tmp_path / "run/training_metrics.png").exists()


def home_made_run(folder, metrics):
    """What a trainer of one's own has to write to be compared."""
    folder.mkdir(parents=True)
    with contextlib.closing(sqlite3.connect(folder / "run.db")) as db, db:
        db.execute("CREATE TABLE metrics (step INTEGER, name TEXT, value REAL)")
        db.executemany("INSERT INTO metrics VALUES (?, ?, ?)", metrics)
    return str(folder)


def test_seeds_are_averaged_and_clocks_added_up(tmp_path):
    """Two seeds by hand, one of them a step longer: x, mean, lowest and highest."""
    one = [(0, "eval/accuracy", 0.2), (1, "time/step", 60), (2, "eval/accuracy", 0.6), (2, "time/step", 120)]
    other = [(0, "eval/accuracy", 0.4), (1, "time/step", 120), (2, "eval/accuracy", 0.8), (2, "time/step", 180)]
    other += [(3, "eval/accuracy", 0.9), (3, "time/step", 60)]
    groups = [(2, "groups/all_correct", 0.3), (2, "groups/all_wrong", 0.2), (2, "dynamic_resample_rate", 0.0)]
    groups += [(3, "groups/all_correct", 0.3), (3, "groups/all_wrong", 0.2), (3, "dynamic_resample_rate", 0.6)]
    folders = [home_made_run(tmp_path / name, rows) for name, rows in (("a_seed0", one), ("a_seed1", other + groups))]
    runs = [dapo.record.with_derived(dapo.record.read_metrics(folder)) for folder in folders]
    expected = [0, 2], [0.3, 0.7], [0.2, 0.6], [0.4, 0.8]
    for found, right in zip(dapo.record.average(runs, "eval/accuracy", "step"), expected):
        assert found == pytest.approx(right)
    assert dapo.record.average(runs, "eval/accuracy", "minutes of training")[0] == pytest.approx([0, (3 + 5) / 2])
    # all groups were trained on in step 2, and in step 3 only those that differ within, less surplus ones
    assert dapo.record.average(runs[1:], "groups/with_gradient", "step")[1] == pytest.approx([0.5, 1.0])
    assert dapo.record.average(runs, "groups/with_gradient", "step") == ([], [], [], [])


def test_comparison(main, monkeypatch, tmp_path, capsys):
    """Runs of any number, also of other trainers with few metrics, in one picture with their names."""
    monkeypatch.chdir(tmp_path)
    folders = [
        home_made_run(tmp_path / name, [(step, "accuracy", step / 10), (step, "time/step", 1.0)])
        for name, step in (("mine", 1), ("b_seed0", 2), ("b_seed1", 2), ("c/seed3", 4))
    ]
    labels, real = [], dapo.record.Figure.legend
    monkeypatch.setattr(
        dapo.record.Figure,
        "legend",
        lambda self, lines, names, **o: (labels.extend(names), real(self, lines, names, **o)),
    )
    main(["plot", *folders])
    assert capsys.readouterr().out.strip() == str(Path("outputs/comparison.png"))
    assert labels == [str(tmp_path / "mine"), f"{tmp_path / 'b'} (2 seeds)", str(tmp_path / "c")]
    assert min(Image.open(tmp_path / "outputs/comparison.png").size) > 500


def test_repeated_questions_are_left_out(tmp_path, capsys):
    """As in DAPO-Math-17k on the Hub. The first answer stands, the order stays, and another system prompt is another
    question."""
    asked = [{"role": "user", "content": "6 times 7?"}]
    rows = [(asked, "42"), ([{"role": "user", "content": "2 plus 2?"}], "4"), (asked, "42"), (asked, "43")]
    rows += [([{"role": "system", "content": "Be brief."}, *asked], "42"), (asked, "")]
    lines = (json.dumps({"prompt": prompt, "reward_model": {"ground_truth": truth}}) for prompt, truth in rows)
    (tmp_path / "math.json").write_text("\n".join(lines))
    source = {"path": str(tmp_path / "math.json"), "type": "json", "input": "prompt"}
    kept = dapo.record.load_rows(source | {"output": "reward_model.ground_truth"})
    assert kept == [rows[0], rows[1], rows[4]]
    said = capsys.readouterr().out
    assert "1 of 6 rows" in said and "2 of 6 rows" in said and "repeat a question" in said


def test_recipe_and_overrides_in_their_order(main, settings, tmp_path, capsys):
    recipe = tmp_path / "recipe.py"
    recipe.write_text("import math\nCLIP_RANGE_HIGH = 0.5\nGROUP_SIZE = 2 * 2\nLEARNING_RATE = 1\n")
    main([*settings, "--NUM_STEPS=1"])
    main(["plot", str(recipe), "--GROUP_SIZE=6", str(tmp_path / "run")])
    assert (dapo.CLIP_RANGE_HIGH, dapo.GROUP_SIZE) == (0.5, 6)
    assert dapo.LEARNING_RATE == 1.0 and isinstance(dapo.LEARNING_RATE, float)


def test_help_lists_every_constant_with_its_value_and_comment():
    lines = subprocess.run(
        [sys.executable, "dapo.py", "--GROUP_SIZE=16", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    listed = {line.split("=")[0].strip(" -"): line for line in lines if line.startswith("  --")}
    assert set(listed) == {name for name in vars(dapo) if name.isupper()}
    assert listed["GROUP_SIZE"].split() == "--GROUP_SIZE=16 responses to each question".split()
    assert all(line.split("=", 1)[1].split("  ", 1)[1].strip() for line in listed.values())


def test_as_a_program_without_a_terminal(settings):
    """In a process of its own: no bar, but plain lines."""
    done = subprocess.run(
        [sys.executable, "dapo.py", *settings, "--NUM_STEPS=5"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "step 5  accuracy 0.00  reward -" in done.stdout
    assert "training:" not in done.stderr and "Traceback" not in done.stderr

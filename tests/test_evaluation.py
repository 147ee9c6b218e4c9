"""tools.evaluate: measures by hand, the report that compares two models, what it refuses; and tools.chat."""

import contextlib
import io
import itertools
import json
import os
import sqlite3
import statistics

import pytest
import torch
from conftest import load, question, response
from transformers import OPTForCausalLM

import dapo
import reward
from tools import chat, evaluate


@pytest.mark.parametrize("values", [[0, 0, 0, 1], [1, 0, 1, 1, 0], [1, 1], [0], [0.5, -1.0, 0.25, 2.0, 0.0]])
def test_pass_at_k_is_the_mean_over_all_choices(values):
    for j in range(1, len(values) + 1):
        choices = [max(choice) for choice in itertools.combinations(values, j)]
        assert evaluate.best_of(values, j) == pytest.approx(statistics.fmean(choices))


def test_pass_at_k_by_hand():
    assert evaluate.best_of([1, 0, 0, 0], 2) == pytest.approx(0.5)  # 3 of the 6 pairs have it
    assert evaluate.best_of([1, 0, 0, 1, 0], 3) == pytest.approx(1 - 1 / 10)  # all triples but one


def group(answers, truth="34", asked=None):
    """Responses that give these answers; None gives none."""
    right = [answer is not None and reward.answers_match(answer, truth) for answer in answers]
    return [response(float(r), asked=asked, prediction=answer or "") for r, answer in zip(right, answers)]


@pytest.mark.parametrize(
    "answers, expected",
    [
        (["34", "34", "12"], 1.0),
        (["34", "12", "12"], 0.0),
        (["34", "12"], 0.5),
        (["34", "12", "7"], 1 / 3),
        (["34", "34.0", "$34$", "12", "12"], 1.0),  # three spellings of one answer
        (["34", "12", "12.0", "12.00", "34"], 0.0),
        (["34", "34", "x+1", "X + 1 ", "y"], 1.0),  # formulas are told apart by their text
        (["34", "0", "0.0"], 0.0),
        (["34", None, None, None], 1.0),  # who gives no answer has no vote
        ([None, None], 0.0),
    ],
)
def test_majority_by_hand(answers, expected):
    assert evaluate.majority(group(answers)) == pytest.approx(expected)


def test_measures_by_hand():
    """Two questions, of whose four samples 1 and 3 are right, and greedily the second."""
    asked = [question("a"), question("b")]
    greedy = [[response(0.0, asked=asked[0], tokens=[1])], [response(1.0, asked=asked[1], tokens=[1, 2, 3])]]
    sampled = [group(["34", "1", "1", "2"], asked=asked[0]), group(["34", "34", "34", "2"], asked=asked[1])]
    sampled[0][3].truncated = True
    assert evaluate.measures(greedy, sampled) == {
        "accuracy": [0.0, 1.0],
        "response_length": [1.0, 3.0],
        "truncated_fraction": [0.0, 0.0],
        "avg@4": [0.25, 0.75],
        "pass@2": [0.5, 1.0],
        "pass@4": [1.0, 1.0],
        "maj@4": [0.0, 1.0],
        "response_length@4": [3.0, 3.0],
        "truncated_fraction@4": [0.25, 0.0],
    }
    assert list(evaluate.measures(greedy, [])) == ["accuracy", "response_length", "truncated_fraction"]


def test_answers_of_a_reward_of_ones_own_may_be_numbers_or_none(set_reward):
    verdicts = [{"score": 1.0, "pred": 34}, {"score": 0.0, "pred": 0}, {"score": 0.0, "pred": None}, {"score": 0.0}]
    set_reward(lambda solution_str, **others: verdicts[int(solution_str)])
    asked = [question()] * 4
    judged = dapo.judge(asked, ["0", "1", "2", "3"])
    accuracies, found = ([verdict[name] for verdict in judged] for name in ("accuracy", "prediction"))
    assert found == [34, 0, None, None]
    votes = [response(accuracy, prediction=answer) for accuracy, answer in zip(accuracies, found)]
    assert evaluate.majority(votes) == 0.5 and evaluate.majority(votes[1:]) == 0.0
    assert "0" in evaluate.report({"model": ([votes[1:2]], [])}).splitlines()[-1].split()


def test_without_answers_there_is_no_majority():
    """A reward function of one's own need not tell what it took for the answer."""
    without = [[response()]], [[response(), response()]]
    found = evaluate.measures(*without)
    assert "avg@2" in found and "maj@2" not in found
    rows = rows_of(evaluate.report({"other": ([[response()]], [group(["1", "2"], "1")]), "model": without}))
    assert "avg@2" in rows and "maj@2" not in rows


def test_avg_at_k_over_seeds_is_the_sampled_accuracy(make_folder, tokenizer, set_constants, set_reward):
    """Responses of one token, right if it is one of the first 150: their probability can be read off the logits."""
    set_constants(MAX_RESPONSE_LENGTH=1, EVAL_SAMPLES=8, OVERLONG_BUFFER_LENGTH=0, TEMPERATURE=1.5)
    right_texts = {tokenizer.decode([token], skip_special_tokens=True) for token in range(150)}
    set_reward(lambda solution_str, **others: float(solution_str in right_texts))
    model, tokenizer = load(make_folder())
    texts = [f"Tom has {n} apples." for n in range(12, 32)]
    questions = [dapo.Question(t, "1", "test", torch.tensor(tokenizer(t)["input_ids"])) for t in texts]
    right = torch.tensor(
        [tokenizer.decode([t], skip_special_tokens=True) in right_texts for t in range(model.config.vocab_size)]
    )
    with torch.no_grad():
        exact = [(model(q.prompt[None]).logits[0, -1] / 1.5).softmax(-1)[right].sum().item() for q in questions]
    means = []
    for seed in range(30):
        set_constants(SEED=seed)
        means.append(dapo.evaluate(model, tokenizer, questions)[0]["eval/avg@8"])
    error = statistics.stdev(means) / len(means) ** 0.5
    assert 0.2 < statistics.fmean(exact) < 0.8 and 0 < error < 0.02
    assert abs(statistics.fmean(means) - statistics.fmean(exact)) < 3.5 * error


def evaluated(shares, source="data"):
    """evaluate.sample's groups, ten samples each, a question for each share of right ones."""
    asked = [dapo.Question(text, "34", source, torch.tensor([1])) for text in shares]
    right = [round(10 * share) for share in shares.values()]
    greedy = [[response(float(n > 5), asked=q, prediction="34")] for q, n in zip(asked, right)]
    return greedy, [group(["34"] * n + ["7"] * (10 - n), asked=q) for q, n in zip(asked, right)]


def rows_of(text):
    return {line.split("  ")[1]: line.split() for line in text.splitlines() if line.startswith("  ")}


def test_two_models_side_by_side():
    base = evaluated({"one": 0.1, "two": 0.5, "three": 0.9, "only here": 1.0})
    trained = evaluated({"three": 0.8, "two": 1.0, "one": 0.3})  # in another order, and one was too long for it
    text = evaluate.report({"base": base, "trained": trained})
    assert "data: 3 questions" in text and "only here" not in text
    # changes of 0.2, 0.5 and -0.1: mean 0.2, standard deviation 0.3, and 0.3 / 3 ** 0.5 = 0.173
    assert rows_of(text)["avg@10"] == "avg@10 0.500 0.700 +0.200 ± 0.173".split()
    worst = text.partition("worst")[2]
    assert "2 worst of 2" in text and "two" not in worst
    assert worst.index("one") < worst.index("three") and "0.10  0.30" in worst and "0.90  0.80" in worst
    assert "34" in worst and "7" in worst


def test_one_model_and_several_data_sets():
    easy, hard = evaluated({"a": 1.0}, "easy"), evaluated({"a": 0.0, "b": 0.4}, "hard")
    text = evaluate.report({"model": tuple(one + other for one, other in zip(easy, hard))})
    first, second = text.split("hard: 2 questions")
    assert "easy: 1 questions" in first and "all of these responses are right" in first
    assert rows_of(second)["avg@10"] == ["avg@10", "0.200"] and "change" not in text


def test_questions_of_the_same_text_are_not_one_question():
    """They may differ in their system message, or stand in two parts of a data set."""
    first, second = evaluated({"a": 1.0, "b": 0.5}), evaluated({"a": 0.0})
    text = evaluate.report({"model": tuple(one + other for one, other in zip(first, second))})
    assert "data: 3 questions" in text and rows_of(text)["avg@10"] == ["avg@10", "0.500"]


def test_models_without_a_common_question():
    text = evaluate.report({"one": evaluated({"a": 1.0}), "other": evaluated({"b": 1.0})})
    assert "no question is short enough for all" in text


def test_without_samples_the_greedy_answers_are_looked_at():
    greedy, _ = evaluated({"a": 0.0, "b": 1.0})
    text = evaluate.report({"model": (greedy, [])})
    assert "accuracy" in text and "avg" not in text and "1 worst of 1" in text


@pytest.fixture
def talk(make_folder, set_constants, monkeypatch, capsys, main):
    def say(lines, *arguments):
        lines = lines if isinstance(lines, bytes) else lines.encode()
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(lines)))
        chat.main([*map(str, arguments), "--MAX_RESPONSE_LENGTH=32", "--DEVICE=cpu"])
        return capsys.readouterr().out

    return say


def a_run(folder, *models):
    folder.mkdir(parents=True)
    with contextlib.closing(sqlite3.connect(folder / "run.db")) as db, db:
        db.execute("CREATE TABLE metrics (step INTEGER, name TEXT, value REAL)")
    for name, source in models:
        source.rename(folder / name)
    return folder


def test_chat_is_streamed_and_kept_with_its_answers(talk, make_folder, tmp_path, monkeypatch):
    run = a_run(tmp_path / "run", ("step_2", make_folder()))
    printed, real = [], chat.TextStreamer.on_finalized_text
    monkeypatch.setattr(
        chat.TextStreamer,
        "on_finalized_text",
        lambda self, text, **end: (printed.append(text), real(self, text, **end)),
    )
    monkeypatch.setattr(chat, "extract_answer", lambda text: f"{len(text)} characters")
    said = talk("Tom has 12 apples.\n\n  \nTom has 13 apples.", run, "--TEMPERATURE=0.7")
    with contextlib.closing(sqlite3.connect(run / "run.db")) as db:
        kept = db.execute("SELECT model, question, response, answer FROM chat").fetchall()
    assert [row[:2] for row in kept] == [(str(run / "step_2"), f"Tom has {n} apples.") for n in (12, 13)]
    shown = [sign for row in kept for sign in row[2] if sign.isprintable() or sign in "\n\t"]
    assert len(printed) > 4 and "".join(printed) == "".join(shown)
    for _, _, text, answer in kept:
        assert answer == f"{len(text)} characters" and f"[answer: {answer}" in said
    assert "TEMPERATURE=0.7" in said and str(run / "run.db") in said


def test_chat_without_a_run_is_not_saved(talk, make_folder):
    folder = make_folder(ends=list(range(374)))  # ends at once
    assert "not saved" in (said := talk("Tom", folder)) and "[answer: none; 1 tokens]" in said
    assert not list(folder.rglob("*.db"))


def test_chat_asks_as_training_does(talk, make_folder, monkeypatch):
    """The template, the temperature and nothing of the model's own settings, which would keep 5 tokens of 374."""
    asked = []

    def generate(self, ids, **settings):
        asked.append((ids, settings))
        return torch.cat([ids, torch.tensor([[20]])], 1)

    folder = make_folder()
    monkeypatch.setattr(type(load(folder)[0]), "generate", generate)
    talk("Tom", folder, "--PROMPT_TEMPLATE=boxed")
    dapo.PROMPT_TEMPLATE = "boxed"
    ((ids, settings),) = asked
    tokenizer = load(folder)[1]
    assert ids[0].tolist() == dapo.read_prompt(tokenizer, [{"role": "user", "content": "Tom"}])[1]
    assert "boxed" in tokenizer.decode(ids[0]) and settings["top_k"] == 0 and settings["do_sample"]


def test_chat_is_greedy_at_temperature_0(talk, make_folder, tmp_path, capsys):
    """As an evaluation is; but nothing else takes that temperature, neither before nor afterward."""
    run = a_run(tmp_path / "run", ("step_2", make_folder()))
    questions = [f"Tom has {n} apples." for n in range(10, 20)]
    said = talk("\n".join(questions), run, "--TEMPERATURE=0")
    model, tokenizer = load(run / "step_2")
    prompts = [dapo.read_prompt(tokenizer, [{"role": "user", "content": text}])[1] for text in questions]
    tokens = dapo.sample_tokens(model, list(map(torch.tensor, prompts)), greedy=True, limit=32)
    with contextlib.closing(sqlite3.connect(run / "run.db")) as db:
        kept = [text for (text,) in db.execute("SELECT response FROM chat")]
    assert kept == tokenizer.batch_decode(tokens, skip_special_tokens=True) and len(set(kept)) > 5
    assert all(f"; {len(ids)} tokens" in line for ids, line in zip(tokens, said.split("[answer: ")[1:], strict=True))
    assert ", greedy; " in said and "TEMPERATURE" not in said
    for program, value in ((chat, "-0.1"), (chat, "1e999"), (evaluate, "0"), (dapo, "0")):
        with pytest.raises(SystemExit) as end:
            program.main([f"--TEMPERATURE={value}"])
        assert end.value.code == 2 and "TEMPERATURE" in (said := capsys.readouterr().err) and "out of range" in said


def test_chat_goes_on_whatever_is_typed_and_wherever_it_cannot_be_kept(talk, make_folder, tmp_path):
    run = a_run(tmp_path / "run", ("step_2", make_folder()))
    said = talk("Tom has 12 apples. ".encode() * 20 + b"\nabc \xff\xfe def\n", run, "--MAX_PROMPT_LENGTH=60")
    assert "too long: " in said and "MAX_PROMPT_LENGTH is 60" in said and said.count("[answer: ") == 1
    (run / "run.db").write_text("no database")
    said = talk("Tom?\nMia?", run)
    assert said.count("[answer: ") == 2 and said.count("[not saved in ") == 2


def test_chat_is_with_one_model(talk, make_folder, tmp_path, capsys):
    empty = a_run(tmp_path / "run")
    folder = make_folder()
    for folders, message in (([folder, empty], "one model"), ([empty], "not saved a model"), (["no/such"], "no/such")):
        with pytest.raises(SystemExit) as end:
            talk("Tom", *folders)
        said = capsys.readouterr().err
        assert end.value.code == 2 and message in said and said.count("\n") == 1


@pytest.mark.parametrize(
    "names, last",
    [
        (["step_9", "step_10", "notes", "step_11.unfinished"], "step_10"),
        (["epoch_1", "step_40", "epoch_2"], "epoch_2"),
    ],
)
def test_a_run_stands_for_the_model_that_it_saved_last(names, last, tmp_path):
    run = a_run(tmp_path / "run")
    for time, name in enumerate(names):
        (run / name).mkdir()
        (run / name / "config.json").touch()
        os.utime(run / name / "config.json", (time, time))
    assert evaluate.model_in(str(run)) == str(run / last)
    for name in ("toy", "some/name"):
        assert evaluate.model_in(name) == name


def test_it_is_said_with_what_a_model_was_trained(make_folder, set_constants, capsys):
    """A run's recipe is easily forgotten, and then the model is asked in another way than it has learned."""
    folder = make_folder()
    set_constants(PROMPT_TEMPLATE="boxed", MAX_RESPONSE_LENGTH=50)
    constants = [f"{name} = {dapo.text_of(getattr(dapo, name))}" for name in dapo.CONSTANTS]
    (folder / "constants.py").write_text("\n".join(constants))
    evaluate.note_changes(folder)
    assert not capsys.readouterr().out
    set_constants(PROMPT_TEMPLATE="{question}", MAX_RESPONSE_LENGTH=60, EVAL_SAMPLES=3)
    evaluate.note_changes(folder)
    said = capsys.readouterr().out.splitlines()
    assert said == [
        f"{folder} was trained with PROMPT_TEMPLATE='boxed', but here it is '{{question}}'",
        f"{folder} was trained with MAX_RESPONSE_LENGTH=50, but here it is 60",
    ]
    for recipe in ("MAX_RESPONSE_LENGTH = 2**6\n", "no Python"):  # edited since
        (folder / "constants.py").write_text(recipe)
        evaluate.note_changes(folder)
    assert not capsys.readouterr().out


@pytest.fixture
def settings(main, set_reward, tmp_path):
    """The command line of a tiny evaluation, whose verdicts are by chance; it sets constants, which `main` restores."""
    set_reward(lambda solution_str, **others: float(len(solution_str) % 2))
    rows = [{"question": f"Tom has {n} apples. " + "Tom buys 1. " * (n % 3), "answer": str(n)} for n in range(10, 18)]
    (tmp_path / "q.json").write_text(json.dumps(rows))
    source = [{"path": str(tmp_path / "q.json"), "type": "json", "input": "question", "output": "answer"}]
    constants = dict(TRAIN_DATASETS=source, EVAL_DATASETS=source, MAX_RESPONSE_LENGTH=8, OVERLONG_BUFFER_LENGTH=4)
    constants |= dict(DEVICE="cpu", EVAL_SAMPLES=3)
    return [f"--{name}={value}" for name, value in constants.items()]


def test_a_run_and_the_model_that_it_started_from(main, settings, make_folder, tmp_path, no_pictures, capsys):
    """Both as dapo.evaluate measures them: the figures are those in the run's record."""
    base, run = make_folder(), tmp_path / "run"
    sizes = ["--NUM_STEPS=1", "--BATCH_SIZE=4", "--GROUP_SIZE=2", "--MINI_BATCHES=2", "--LEARNING_RATE=0.01"]
    main([*settings, *sizes, f"--MODEL={base}", f"--OUTPUT_DIR={run}"])
    with contextlib.closing(sqlite3.connect(run / "run.db")) as db:
        query = "SELECT value FROM metrics WHERE name = ? ORDER BY step"
        recorded = {name: [x for (x,) in db.execute(query, [f"eval/{name}"])] for name in ("accuracy", "avg@3")}
    capsys.readouterr()
    evaluate.main([*settings, str(base), str(run)])
    said = capsys.readouterr().out
    assert f"{base} answers 8 questions" in said and f"{run}/step_1 answers 8 questions" in said
    assert "trained with" not in said
    for name, values in recorded.items():
        assert rows_of(said)[name][1:3] == [f"{value:.3f}" for value in values]
    assert recorded["avg@3"][0] != recorded["avg@3"][1]

    recipe = tmp_path / "recipe.py"
    recipe.write_text("EVAL_SAMPLES = 2 - 1\n")
    evaluate.main([*settings, str(recipe), f"--MODEL={run}", "--MAX_RESPONSE_LENGTH=7", "--EVAL_SAMPLES=1"])
    said = capsys.readouterr().out
    assert f"{run}/step_1 was trained with MAX_RESPONSE_LENGTH=8, but here it is 7" in said
    assert f"  {run}/step_1\n  accuracy" in said and "avg@" not in said and "change" not in said


def test_all_names_are_looked_at_before_the_first_is_measured(settings, make_folder, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(evaluate, "sample", lambda *args: pytest.fail("too early"))
    empty = a_run(tmp_path / "empty")
    for name, message in (
        ("no/such", "MODEL=no/such is neither"),
        (str(empty), f"the run in {empty} has not saved a model yet"),
        ("--EVAL_SAMPLE=2", "did you mean EVAL_SAMPLES?"),
        ("no_recipe.py", "no_recipe.py"),
    ):
        with pytest.raises(SystemExit) as end:
            evaluate.main([*settings, str(make_folder()), name])
        said = capsys.readouterr().err
        assert end.value.code == 2 and message in said and said.count("\n") == 1


def test_a_model_that_is_sampled_wrong_is_refused(settings, make_folder, monkeypatch, capsys):
    """OPT would be, were its decoder taken to be its base_model."""
    monkeypatch.setattr(OPTForCausalLM, "get_decoder", lambda model: model.base_model)
    with pytest.raises(SystemExit) as end:
        evaluate.main([*settings, str(folder := make_folder("opt"))])
    assert end.value.code == 2
    assert f"MODEL={folder}: OPTForCausalLM cannot be trained here" in capsys.readouterr().err


def test_a_reward_without_answers_shows_the_response():
    """As its usual error; the reward function need not tell what it took for the answer."""
    groups = [[response(0.0, asked=question("Tom?", "34"))]]
    groups[0][0].text = "It is 7, I think."
    worst = evaluate.report({"model": (groups, [])}).partition("worst")[2]
    assert "It is 7, I think" in worst

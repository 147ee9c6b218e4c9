"""tools.show: the page is one file that holds what run.db holds, and shows it in a real browser."""

import ast
import contextlib
import json
import math
import re
import shutil
import sqlite3
import subprocess
import sys
import time
import zlib
from pathlib import Path

import pytest
from conftest import ROOT, rows
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

import dapo
from tools import show

WORDS = json.loads((ROOT / "tools/show_words.json").read_text(encoding="utf-8"))
TEMPLATE = (ROOT / "tools/show.html").read_text(encoding="utf-8")
FATES = "trained", "surplus", "all correct", "all wrong", "all equal"  # of a group
END = "<|im_end|>"

# ---- Runs made by hand ----------------------------------------------------------------------------------------------


MEASURED = ("accuracy", 0.5), ("reward/mean", 0.25)  # in each step


def answer(text="7", accuracy=1.0, advantage=None, ratios=(), tokens=None, probabilities=None, penalty=0.0, **others):
    """A response as run.db has it: with an advantage, one that was trained on, and then with its tokens and ratios."""
    trained = advantage is not None
    row = dict(response=text, prediction=text, accuracy=accuracy, penalty=penalty, reward=2 * accuracy - 1 + penalty)
    row |= dict(advantage=advantage, kept=trained, fate="trained" if trained else "surplus", truncated=0, length=5)
    if ratios:
        tokens = tokens or [text, *["", END][-len(ratios) + 1 :]]
        probabilities = probabilities or [0.5] * len(tokens)
        lists = {"tokens": tokens, "probabilities": probabilities, "ratios": ratios}
        row |= {name: json.dumps(values) for name, values in lists.items()} | {"length": len(tokens)}
    return row | others


def group(*responses, question="3 + 4?", truth="7", round=1):
    return [{"question": question, "answer": truth, "round": round, **response} for response in responses]


def pair(**others):
    """A group to train on."""
    return group(answer("7", 1.0, 0.7071, [1.0, 1.0]), answer("8", 0.0, -0.7071, [1.0, 1.0]), **others)


def make_run(folder, steps, held_out=(), metrics=(), **constants):
    """Writes a run.db: `steps` is {step: groups}, `held_out` holds (step, groups), `metrics` (step, name, value)."""
    folder.mkdir(parents=True, exist_ok=True)
    values = dapo.CONSTANTS | {"GROUP_SIZE": 2} | constants
    with contextlib.closing(sqlite3.connect(folder / "run.db")) as db, db:
        db.executescript(dapo.TABLES.format(step=0, columns=", ".join(dapo.COLUMNS)))
        lists = [("responses", *item) for item in steps.items()] + [("held_out", *item) for item in held_out]
        for table, step, groups in lists:
            numbered = [(number, row) for number, group in enumerate(groups) for row in group]
            for number, (group_number, row) in enumerate(numbered):
                row = row | {"step": step, "number": number, "group_number": group_number}
                marks = ", ".join("?" * len(row))
                db.execute(f"INSERT INTO {table} ({', '.join(row)}) VALUES ({marks})", [*row.values()])
        texts = {name: value if name == "REWARD" and type(value) is str else dapo.text_of(value)
                 for name, value in values.items()} | {"the script": "dapo.py"}  # fmt: skip
        db.executemany("INSERT INTO constants VALUES (0, ?, ?)", texts.items())
        db.executemany(
            "INSERT INTO metrics VALUES (?, ?, ?)", [*metrics, *((step, *one) for step in steps for one in MEASURED)]
        )
    return folder


def data_of(page):
    """The runs in the page at a path."""
    text = page.read_text(encoding="utf-8")
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    return json.loads(data, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def shown(folder, *more):
    """The run that the page of one run holds."""
    show.main([str(folder), *more])
    (run,) = data_of(folder / "steps.html")
    return run


def made_by(folder, script, source):
    """Records which script made a run, and its text."""
    with contextlib.closing(sqlite3.connect(folder / "run.db")) as db, db:
        db.execute("DELETE FROM constants WHERE name = 'the script'")
        facts = {"the script": script, f"source of {script}": source}
        db.executemany("INSERT OR REPLACE INTO constants VALUES (0, ?, ?)", facts.items())


SCRIPTS = ["dapo.py", "grpo.py", *(f"siblings/{name}.py" for name in ("dr_grpo", "gspo", "cispo", "rloo"))]


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("again", [False, True])  # from the folder of a saved model, where its name is another one
def test_a_script_with_other_formulas_is_named(script, again, tmp_path, capsys):
    folder, name = make_run(tmp_path / "run", {1: [pair()]}), "train_script.py" if again else Path(script).name
    made_by(folder, name, (ROOT / script).read_text(encoding="utf-8"))
    other = name if script.startswith("siblings") else None
    assert shown(folder)["other"] == other
    if other:
        with pytest.raises(SystemExit) as stop:
            show.main([str(folder), "--unipo"])
        assert stop.value.code == 2 and f"{other} made the run" in capsys.readouterr().err


def test_a_trainer_that_records_no_script(tmp_path):
    folder = make_run(tmp_path / "run", {1: [pair()]})
    with contextlib.closing(sqlite3.connect(folder / "run.db")) as db, db:
        db.execute("DELETE FROM constants WHERE name = 'the script'")
    assert shown(folder)["other"] is None


def test_a_file_is_no_run(tmp_path, capsys):
    folder = make_run(tmp_path / "run", {1: [pair()]})
    with pytest.raises(SystemExit) as stop:
        show.main([str(folder / "run.db")])
    assert stop.value.code == 2 and "takes the folder of a run" in capsys.readouterr().err


# ---- The file -------------------------------------------------------------------------------------------------------


def test_the_page_holds_what_run_db_holds(main, settings, parity, no_pictures, tmp_path, capsys):
    main([*settings, "--EVAL_EVERY=1", "--MAX_GEN_BATCHES=4", "--OVERLONG_PENALTY_FACTOR=0.1"])
    capsys.readouterr()
    run = shown(tmp_path / "run")
    assert capsys.readouterr().out == f"{tmp_path / 'run/steps.html'}\n"
    assert (run["name"], run["folder"], run["recorded"]) == ("run", str(tmp_path / "run"), [1, 2])
    kinds = int, float, str
    values = {name: getattr(dapo, name) for name in dapo.CONSTANTS}
    expected = {name: value for name, value in values.items() if isinstance(value, kinds)}
    assert run["constants"] == expected | {"REWARD": ast.literal_eval(dapo.text_of(dapo.REWARD))}
    points = rows(tmp_path / "run", "SELECT name, step, value FROM metrics")
    alike, metrics = run["metrics"].pop("groups/alike"), run["metrics"]
    assert sorted((name, *point) for name, curve in metrics.items() for point in curve) == sorted(points)
    shares = zip(metrics["groups/all_correct"], metrics["groups/all_wrong"], strict=True)
    assert alike == [[step, right + wrong] for (step, right), (_, wrong) in shares] and len(alike) == 2

    columns = "question answer round prediction accuracy reward penalty advantage length truncated fate".split()
    found, trained = [], 0
    for step in run["steps"]:
        for number, one in enumerate(step["groups"]):
            for response in one["responses"]:
                found.append((step["step"], number, *({**one, **response}[name] for name in columns)))
    names = "step, group_number, " + ", ".join(columns)
    assert found == rows(tmp_path / "run", f"SELECT {names} FROM responses ORDER BY step, number")

    responses = [one for step in run["steps"] for group in step["groups"] for one in group["responses"]]
    query = "SELECT response, tokens, probabilities, ratios FROM responses ORDER BY step, number"
    for response, (text, tokens, probabilities, ratios) in zip(responses, rows(tmp_path / "run", query)):
        if tokens:
            assert len(response["tokens"]) == len(json.loads(tokens)) == response["length"] and "text" not in response
            assert response["probabilities"] == json.loads(probabilities) and response["ratios"] == json.loads(ratios)
            trained += 1
        else:
            assert response["text"] == text and "tokens" not in response
    assert 0 < trained < len(responses)

    query = "SELECT question, answer, step, response, accuracy, length, truncated FROM held_out"
    names = "step text accuracy length truncated".split()
    found = [(one["question"], one["answer"], *(response[name] for name in names))
             for one in run["held_out"] for response in one["responses"]]  # fmt: skip
    assert sorted(found) == sorted(rows(tmp_path / "run", query)) and len(found) == 3 * 10


def test_it_is_one_file_that_loads_nothing(tmp_path):
    make_run(tmp_path / "run", {1: [pair()]})
    show.main([str(tmp_path / "run")])
    text = (tmp_path / "run/steps.html").read_text(encoding="utf-8")
    assert re.findall(r"https?://[^\"'`\s)]*", text) == ["http://www.w3.org/${space}"]
    assert not re.search(r"<(link|iframe|script[^>]* src)|@import|url\(|\bfetch\(|import\(|XMLHttp", text)
    assert "{{" not in text and "{%" not in text and "default-src 'unsafe-inline'" in text


HOSTILE = [
    "</script><script>window.hacked = 1</script>",
    "<!--<script>",
    "{{ runs }}{% for x in y %}",
    "\"'`${1}\\",
    "\x00\x01\x1b[31m\u202e\u2028\x7f\t\r\n",
    "&lt;b&gt;",
]


def test_texts_cannot_leave_their_place(tmp_path):
    """Not in the JSON, whatever a model, a data set, or the name of a run holds."""
    groups = [
        group(answer(text, 1.0, 1.0, [1.0, 1.0]), answer(text, 0.0), question=text, truth=text) for text in HOSTILE
    ]
    make_run(tmp_path / "run", {1: groups}, [(0, groups)])
    for name in HOSTILE[:4]:
        show.main([f"{name.replace('=', '')}={tmp_path / 'run'}"])
        text = (tmp_path / "run/steps.html").read_text(encoding="utf-8")
        assert text.count("<script") == text.count("</script>") == 3 and "<!--" not in text
        (run,) = data_of(tmp_path / "run/steps.html")
        assert run["name"] == name.replace("=", "")
    for one, text in zip(run["steps"][0]["groups"], HOSTILE):
        assert (one["question"], one["answer"], one["responses"][0]["tokens"][0]) == (text, text, text)
        assert one["responses"][1]["text"] == text
    assert [one["question"] for one in run["held_out"]] == HOSTILE


def test_numbers_that_are_not_finite_and_half_characters(tmp_path):
    """JSON, and the browser with it, knows neither NaN nor infinity; UTF-8 knows no half of a surrogate pair."""
    strange = answer("\ud83d", 1.0, 1.0, [math.nan, math.inf], ["\ud83d", END], [0.0, math.nan], response="")
    metrics = [(1, "entropy", None), (1, "clip_fraction/low", None)]
    make_run(tmp_path / "run", {1: [group(strange | {"prediction": None, "reward": 0.0})]}, metrics=metrics)
    run = shown(tmp_path / "run")
    (response,) = run["steps"][0]["groups"][0]["responses"]
    assert response["ratios"] == [None, None] and response["probabilities"] == [0.0, None]
    assert response["tokens"] == ["\ud83d", END] and run["metrics"]["entropy"] == [[1, None]]


def test_mean_and_deviation_of_the_rewards_of_a_group(tmp_path):
    rewards = [answer(reward=reward) for reward in (1.0, -1.0, -1.0, -1.5)]
    make_run(tmp_path / "run", {1: [group(*rewards), group(answer(reward=0.25))]})
    first, alone = shown(tmp_path / "run")["steps"][0]["groups"]
    assert first["mean"] == pytest.approx(-0.625) and first["std"] == pytest.approx(1.1086779)
    assert (alone["mean"], alone["std"]) == (0.25, 0)


def test_of_a_constant_that_changed_it_knows_the_last_value(tmp_path):
    folder = make_run(tmp_path / "run", {1: [pair()]})
    with contextlib.closing(sqlite3.connect(folder / "run.db")) as db, db:
        db.execute("INSERT INTO constants VALUES (5, 'NUM_STEPS', '999'), (5, 'SEED', '[1]')")
    assert shown(folder)["constants"]["NUM_STEPS"] == 999


def test_the_step_that_it_opens_at(tmp_path):
    """The one that is asked for, else where the clip held most, of both ends together."""
    shares = [(1, "low", 0.3), (1, "high", 0.0), (2, "low", 0.2), (2, "high", 0.2), (3, "low", None), (3, "high", 0.35)]
    metrics = [(step, f"clip_fraction/{end}", share) for step, end, share in shares]
    make_run(tmp_path / "run", {step: [pair()] for step in (1, 2, 3)}, metrics=metrics)
    assert shown(tmp_path / "run")["opens"] == 2
    assert shown(tmp_path / "run", "--step=3")["opens"] == 3


def test_of_a_long_run_it_keeps_as_much_as_fits(monkeypatch, tmp_path):
    """At equal distances, and always the first, the last, and the wanted step."""
    text = "x" * 100
    groups = [group(answer(text), answer(text))]
    make_run(tmp_path / "run", {step: groups for step in range(1, 21)})
    for limit, more, kept in (
        (4000, [], [*range(1, 21)]),
        (3999, [], [*range(1, 21, 2), 20]),
        (1100, [], [1, 6, 11, 16, 20]),
        (1200, ["--step=7"], [1, 6, 7, 11, 16, 20]),
        (1, ["--step=7"], [1, 7, 20]),
    ):
        monkeypatch.setattr(show, "LIMIT", limit)
        run = shown(tmp_path / "run", *more)
        assert [step["step"] for step in run["steps"]] == kept and run["recorded"] == [*range(1, 21)]
        assert run["opens"] in kept


def test_the_limit_is_of_what_the_page_holds(monkeypatch, tmp_path):
    """Of responses with tokens their JSON counts, of others at most LONGEST characters, as they are then shortened."""
    tokens = ["中"] * 300
    groups = [
        group(answer("中" * 300, 1.0, 1.0, [1.125] * 300, tokens, prediction=""), answer("y" * 9000, prediction=""))
    ]
    make_run(tmp_path / "run", {step: groups for step in range(1, 31)})
    monkeypatch.setattr(show, "LIMIT", 100_000)
    run = shown(tmp_path / "run")
    assert 50_000 < len(json.dumps(run)) < 110_000
    assert run["steps"][0]["groups"][0]["responses"][1]["text"] == "y" * 4000 + " … (+5000)"


def test_held_out_responses_are_within_the_limit_too(monkeypatch, tmp_path):
    asked = [group(answer("z" * 1000), question=f"{number}?") for number in range(50)]
    make_run(tmp_path / "run", {1: [pair()]}, [(step, asked) for step in range(20)])
    monkeypatch.setattr(show, "LIMIT", 100_000)
    assert len(json.dumps(shown(tmp_path / "run"))) < 200_000


@pytest.mark.parametrize("words, names", [
    (["runs/one", "GRPO=runs/one", "runs/a=b"], ["one", "GRPO", "a=b"]),
    (["runs/one", "others/one", "others/two"], ["runs/one", "others/one", "two"]),
    (["runs/one", "others/one", "one=others/two"], ["runs/one", "others/one", "one"]),
])  # fmt: skip
def test_runs_side_by_side_and_their_names(words, names, monkeypatch, tmp_path, capsys):
    """Those given, or those of their folders, or where these would be the same, the folders as they were given."""
    monkeypatch.chdir(tmp_path)
    for folder in ("runs/one", "runs/a=b", "others/one", "others/two"):
        make_run(tmp_path / folder, {1: [pair()]})
    show.main(words)
    assert capsys.readouterr().out == f"{Path('outputs/comparison.html')}\n"
    assert [run["name"] for run in data_of(tmp_path / "outputs/comparison.html")] == names
    assert f"<title>{' | '.join(names)}</title>" in (tmp_path / "outputs/comparison.html").read_text(encoding="utf-8")
    assert not list(tmp_path.glob("*/*/*.html"))


def test_it_takes_neither_torch_nor_transformers(tmp_path):
    make_run(tmp_path / "run", {1: [pair()]})
    program = f"import sys, runpy; sys.argv[1:] = [{str(tmp_path / 'run')!r}, '--unipo']"
    program += "; runpy.run_module('tools.show', run_name='__main__')"
    program += "; print(sorted({'torch', 'transformers', 'dapo', 'datasets', 'pyarrow', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env={"PYTHONPATH": str(ROOT)},
                          capture_output=True, text=True, check=True)  # fmt: skip
    assert done.stdout.splitlines() == [str(tmp_path / "run/steps.html"), str(tmp_path / "run/unipo.json"), "[]"]


# ---- What it refuses ------------------------------------------------------------------------------------------------


def no_run(folder):
    (folder / "run.db").unlink()
    return [], "there is no run in"


def not_a_database(folder):
    (folder / "run.db").write_bytes(b"no database" * 100)
    return [], "file is not a database"


def metrics_alone(folder):
    """As another trainer writes it, to be compared by tools.plot."""
    with contextlib.closing(sqlite3.connect(folder / "run.db")) as db, db:
        for table in ("responses", "held_out", "constants"):
            db.execute(f"DROP TABLE {table}")
    return [], "does not hold what the page shows"


def old_columns(folder):
    with contextlib.closing(sqlite3.connect(folder / "run.db")) as db, db:
        old = "step, question, answer, response, accuracy, reward, length, truncated, kept"
        db.execute(f"CREATE TABLE old AS SELECT {old} FROM responses")
        db.execute("DROP TABLE responses")
        db.execute("ALTER TABLE old RENAME TO responses")
    return [], "does not hold what the page shows, as one of an earlier dapo.py does not"


def no_step(folder):
    with contextlib.closing(sqlite3.connect(folder / "run.db")) as db, db:
        db.execute("DELETE FROM responses")
    return [], "has recorded no responses yet, which the page needs"


def torn_json(folder):
    with contextlib.closing(sqlite3.connect(folder / "run.db")) as db, db:
        db.execute("UPDATE responses SET ratios = '[1.0'")
    return [], "does not hold what the page shows"


def unknown_step(folder):
    return ["--step=2"], f"--step 2: the run in {folder} has recorded the steps 1 to 3"


def a_step_that_is_no_number(folder):
    return ["--step=x"], "invalid int value"


def an_unknown_option(folder):
    return ["--steps", "3"], ""


@pytest.mark.parametrize("spoil", [
    no_run, not_a_database, metrics_alone, old_columns, no_step, torn_json, unknown_step, a_step_that_is_no_number,
    an_unknown_option,
])  # fmt: skip
@pytest.mark.parametrize("others", [0, 1])
def test_what_cannot_be_shown_is_one_line_and_writes_nothing(spoil, others, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    good = [str(make_run(tmp_path / "good", {1: [pair()], 2: [pair()], 3: [pair()]}))] * others
    folder = make_run(tmp_path / "run", {1: [pair()], 3: [pair()]})
    for page in (folder / "steps.html", tmp_path / "outputs/comparison.html"):
        page.parent.mkdir(exist_ok=True)
        page.write_text("mine")
    more, message = spoil(folder)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as end:
        show.main([*good, str(folder), "--unipo", *more])
    said = capsys.readouterr()
    assert end.value.code == 2 and said.err.startswith("error: ") and said.err.count("\n") == 1 and not said.out
    assert message in said.err and sorted(tmp_path.rglob("*")) == before
    assert (folder / "steps.html").read_text() == (tmp_path / "outputs/comparison.html").read_text() == "mine"


@pytest.mark.parametrize("names", [["run"], ["run", "run"]])
def test_where_nothing_can_be_written(names, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "run", {1: [pair()]})
    (tmp_path / "run/steps.html").mkdir()
    (tmp_path / "outputs").touch()
    with pytest.raises(SystemExit) as end:
        show.main(names)
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.startswith("error: the page cannot be written: ") and said.count("\n") == 1


# ---- Whole texts of tokens ------------------------------------------------------------------------------------------


def byte_level():
    """Whose tokens are bytes, and a few of English; as of models that hardly know Chinese."""
    vocabulary = {sign: number for number, sign in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges = [("i", "s"), ("Ġ", "is"), ("4", "2")]
    vocabulary |= {"".join(pair): len(vocabulary) + number for number, pair in enumerate(merges)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def metaspace():
    """As Llama 2 has it: a space is part of the word after it, and omitted at the beginning of what is decoded."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"答is42=", "▁i", "▁is", "▁4"]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    merges = [("▁", "i"), ("▁i", "s"), ("▁", "4")]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    strip = decoders.Strip(" ", 1, 0)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip])
    return tokenizer


PLAIN = ["42 is 42", "答案 is 42", "is 答4案2 = 42\n\n  is", "🙂4 is 🙂🙂42", "is=is", "4", "4 2  2", "\ufffd4"]
LONG = "答案是好的，所以我们知道它等于"


def texts_of(make, text):
    """What whole_texts gives for a text's tokens and the end token after them, and the text as it is decoded."""
    tokenizer = make()
    tokenizer.add_special_tokens([END])
    ids = tokenizer.encode(text).ids + [tokenizer.token_to_id(END)]
    tokens = tokenizer.decode_batch([[number] for number in ids], skip_special_tokens=False)
    response = tokenizer.decode(ids)
    whole = show.whole_texts(tokens, response)
    assert len(whole) == len(ids) and response == text
    return whole


@pytest.mark.parametrize("make", [byte_level, metaspace])
@pytest.mark.parametrize("text", PLAIN)
def test_texts_of_tokens_make_up_the_response(make, text):
    whole = texts_of(make, text)
    assert "".join(whole) == text + END
    assert all(any(sign in piece for piece in whole) for sign in text)  # no character is cut apart


@pytest.mark.parametrize("make", [byte_level, metaspace])
def test_a_last_character_in_parts_is_made_whole(make):
    assert "".join(texts_of(make, "42 is 🙂")) == "42 is 🙂" + END


@pytest.mark.parametrize("make", [byte_level, metaspace])
def test_many_characters_in_parts_are_made_whole(make):
    assert "".join(texts_of(make, f"{LONG[1:]} is 42")) == f"{LONG[1:]} is 42" + END


# ---- The words ------------------------------------------------------------------------------------------------------


def said_keys():
    """The keys that the page says: those written out, and those that it puts together."""
    calls = re.findall(r"\b(?:say|example|curve)\(((?:[^()]|\([^()]*\))*)", TEMPLATE)
    first = [re.split(r",\s*(?:\{|\w+\)|numbers|group|null|values|found)", call)[0] for call in calls]
    keys = {key for call in first for key in re.findall(r'"([^"]+)"', call)}
    (colors,) = re.findall(r"COLORS = (\{.*?\});", TEMPLATE)
    colors = json.loads(re.sub(r"(\w+):", r'"\1":', colors))
    keys |= {*colors} | {f"{name} {end}" for name, ends in colors.items() for end in ends}
    keys |= {f"part {number}" for number in range(1, 7)} | {"all", "token mean", "response mean"}
    keys = keys - {"free"} | {"show free", "show high", "larger"}
    lists = re.search(r"const head = \[(.*?)\];", TEMPLATE)[1] + str(re.findall(r'\["token".*?\]', TEMPLATE))
    return keys | set(re.findall(r'"([^"]+)"', lists)) | set(re.findall(r'"(is \w+)"', TEMPLATE)) | set(FATES)


def test_every_word_is_there_and_none_too_many():
    lines = {"groups/alike", "response_length/mean", "eval/accuracy"}  # the metrics of curve(...)
    assert said_keys() - lines == set(WORDS)


def test_both_languages_say_the_same_numbers():
    for key, (english, chinese) in WORDS.items():
        names = [set(re.findall(r"\{(\w+)\}", text)) for text in (english, chinese)]
        assert names[0] == names[1], key
        assert not re.search(r"[一-鿿，。：；（）]", english) or key == "language"


def test_the_template_is_short():
    assert len(TEMPLATE.splitlines()) <= 400


# ---- unipo ----------------------------------------------------------------------------------------------------------


def test_unipo(tmp_path, capsys):
    """Three groups at most, all of whose tokens are recorded, with the objective of each token."""
    one = answer("ab", 1.0, 0.5, [1.1, 1.5, 0.5], ["a", "b", END], [0.25, 0.0, 0.5])
    other = answer("c", 0.0, -2.0, [1.5, 0.5], ["c", END], [0.5, 0.5])
    groups = [group(answer(), answer()), group(one, other), group(one, answer(advantage=1.0)), *[pair()] * 4]
    metrics = [(3, "policy_loss", 0.5), (3, "entropy", None)]
    folder = make_run(tmp_path / "run", {3: groups}, metrics=metrics, MODEL="toy")
    show.main([f"DAPO={folder}", "--unipo"])
    assert capsys.readouterr().out == f"{folder / 'steps.html'}\n{folder / 'unipo.json'}\n"
    written = json.loads((folder / "unipo.json").read_text())
    header, (entry,) = written["header"], written["entries"]
    assert (header["algorithm"], header["model_name"], header["totalSteps"]) == ("DAPO", "toy", 1)
    assert entry["step"] == 3 and entry["is_first_step_after_rollout_phase"] is True
    expected = {"reward": 0.25, "reward/mean": 0.25, "policy_objective": -0.5, "policy_loss": 0.5, "accuracy": 0.5}
    assert entry["metrics"] == expected and len(entry["prompts"]) == 3
    first, second = entry["prompts"][0]["responses"]
    assert (first["response_text"], first["response_length"], first["reward"]) == (f"ab{END}", 3, 1.0)
    for response in (first, second):
        assert len({len(values) for values in response["tokens"].values()} | {response["response_length"]}) == 1
    tokens = first["tokens"]
    assert tokens["strings"] == ["a", "b", END]
    assert tokens["ids"] == [zlib.crc32(text) for text in (b"'a'", b"'b'", f"'{END}'".encode())]
    assert tokens["old_log_probs"] == pytest.approx([math.log(0.25), math.log(1e-30), math.log(0.5)])
    change = [new - old for new, old in zip(tokens["log_probs"], tokens["old_log_probs"])]
    assert change == pytest.approx([math.log(ratio) for ratio in (1.1, 1.5, 0.5)])
    assert tokens["advantages"] == [0.5] * 3
    assert tokens["token_objective"] == pytest.approx([0.5 * 1.1, 0.5 * 1.28, 0.5 * 0.5])  # inside, held, pulled back
    assert second["tokens"]["token_objective"] == pytest.approx([-2 * 1.5, -2 * 0.8])  # pulled back, held


# ---- In a browser ---------------------------------------------------------------------------------------------------

A = 0.7071
RISING = dict(ratios=[1.1, 1.29, 0.7, 1.25, 1.0], probabilities=[0.5, 0.01, 0.2, 0.02, 0.9])
SIGNS = ["<script>window.hacked = 1</script>", '<img src=x onerror="window.hacked = 1">', "\x00\x1b\t\u202e", "\n", END]
LONGEST_TOKENS = ["word "] * 3999 + [END]
GROUPS = [
    group(answer("".join(SIGNS[:4]), 1.0, A, tokens=SIGNS, **RISING),
          answer("abc", 0.0, -A, [0.7, 0.9, 1.5, 1.0], ["a", "b", "c", END]), question="<b>What?</b>\n\x1b"),
    group(answer(SIGNS[1], 0.0, fate="all wrong"), answer("", 0.0, fate="all wrong")),
    group(answer(fate="all correct"), answer(fate="all correct", truncated=1)),
    group(answer("word " * 3999, 1.0, 0.5, [1.0] * 4000, LONGEST_TOKENS, [0.9] * 4000),
          answer("no", 0.0, -0.5, [1.0, 1.0], ["no", END], penalty=-0.25, truncated=1), round=2),
    group(answer("7"), answer("8", 0.0, penalty=-0.75), round=2),
    group(answer("xy", 0.0, 0.0, [1.5, 0.5, 1.0], ["x", "y", END]), answer("z", 0.0, 0.0, length=10), round=2),
]  # fmt: skip


def held_out(*texts):
    """The answers to two questions at the evaluations after 0, 2, ... steps; right if it is 7."""
    return [
        (2 * number, [group(answer("no", 0.0), question="never?"), group(answer(text, float(text == "7")))])
        for number, text in enumerate(texts)
    ]


def two_runs(folder):
    clip = [(3, "clip_fraction/high", 0.1)]
    constants = dict(BATCH_SIZE=4, MAX_RESPONSE_LENGTH=4096, OVERLONG_BUFFER_LENGTH=96)
    steps = {1: [pair()], 3: GROUPS}
    one = make_run(folder / "dapo", steps, held_out("wrong <i>then</i>", "7"), clip, **constants)
    constants |= dict(LOSS_AGG_MODE="seq-mean-token-mean", CLIP_RANGE_HIGH=0.2, USE_DYNAMIC_SAMPLING=False)
    other = make_run(folder / "grpo", steps, held_out("5", "6 of grpo"), clip, **constants, OVERLONG_PENALTY_FACTOR=2.0)
    return one, other


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """The page of one run, and that of two."""
    folder = tmp_path_factory.mktemp("pages")
    one, other = two_runs(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        show.main([str(one)])
        show.main([str(one), f"GRPO={other}"])
    return one / "steps.html", folder / "outputs/comparison.html"


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="needs pip install playwright, and chromium")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("needs chromium on the PATH, and pip install playwright")
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def view(browser):
    """Opens a page. In the end nothing may have failed or run, or lack in its texts, and only the file been read."""
    seen = []

    def open_page(path, locale="en-US", width=1200):
        context = browser.new_context(locale=locale, viewport={"width": width, "height": 844})
        page, failed, asked = context.new_page(), [], []
        page.on("pageerror", lambda error: failed.append(str(error)))
        page.on("console", lambda message: message.type == "error" and failed.append(message.text))
        page.on("request", lambda request: asked.append(request.url))
        seen.append((context, page, failed, asked, path.as_uri()))
        page.goto(path.as_uri())
        return page

    yield open_page
    for context, page, failed, asked, address in seen:
        hacked, text = page.evaluate("window.hacked"), page.inner_text("body")
        context.close()
        assert_whole(text)
        assert (failed, asked, hacked) == ([], [address], None)


def assert_whole(text):
    """All that it says was there to be said."""
    assert not re.search(r"undefined|NaN|\[object|\{\w+\}", text)


def open_response(page, group, response):
    page.click(f'[data-key="group {group}"]')
    page.click(f'[data-key="response {response}"]')


def tab_to(page, key):
    for _ in range(100):
        if page.evaluate("document.activeElement.dataset.key") == key:
            return
        page.keyboard.press("Tab")
    pytest.fail(f"{key} is not reached by Tab")


def text_of(page, place):
    return " ".join(page.inner_text(place).split())


def texts_in(page, places):
    return [" ".join(text.split()) for text in page.locator(places).all_inner_texts()]


def said(*keys, language=0, **numbers):
    """The sentences of the page with these numbers in them, as text_of gives them."""
    return " ".join(" ".join(WORDS[key][language].format(**numbers) for key in keys).split())


def signed(value):
    return ("−" if value < 0 else "+") + f"{abs(value):.2f}"


def press(page, key):
    page.click(f'[data-key="{WORDS[key][0]}"]')


@pytest.mark.parametrize("script", ["dapo.py", "gspo.py"])
def test_of_a_script_with_other_formulas_the_page_tells_only_what_was_recorded(script, view, tmp_path):
    """Not what the clip does, as that may be another one."""
    one, other = answer("7", 1.0, 0.7071, [1.5, 1.0]), answer("8", 0.0, -0.7071, [0.5, 1.0])
    folder = make_run(tmp_path / "run", {1: [group(one, other)]})
    made_by(folder, script, "dapo.probability_ratio = probability_ratio" if script == "gspo.py" else "")
    show.main([str(folder)])
    page, sentence = view(folder / "steps.html"), said("other", other="gspo.py")
    open_response(page, 0, 0)
    page.click(".token")
    foreign = script == "gspo.py"
    assert text_of(page, "#story").count(sentence) == (3 if foreign else 0)
    assert (sentence in text_of(page, "#figures")) == foreign
    assert (said("is held") in text_of(page, "#figures")) != foreign
    assert page.locator(".token.high, .token.low").count() == (0 if foreign else 1)


def test_by_keyboard_alone(pages, view):
    page = view(pages[0])
    assert page.inner_text("#where") == said("step", n=3, last=3)
    page.focus("#slider")
    page.keyboard.press("ArrowLeft")
    assert page.inner_text("#where") == said("step", n=1, last=3) and page.locator(".group").count() == 1
    page.keyboard.press("ArrowRight")
    assert page.inner_text("#where") == said("step", n=3, last=3) and page.locator(".group").count() == 6

    tab_to(page, "group 3")
    page.keyboard.press("Enter")
    assert page.get_attribute('[data-key="group 3"]', "aria-expanded") == "true"
    tab_to(page, "response 0")
    before = time.monotonic()
    page.keyboard.press("Enter")
    assert page.locator(".token").count() == 4000 and time.monotonic() - before < 20
    tab_to(page, "tokens")
    place = 0
    for key, move in (("Right", 1), ("Right", 1), ("Down", 10), ("Left", -1), ("Up", -10), ("Up", -10)):
        page.keyboard.press(f"Arrow{key}")
        place = max(1, place + move)
        assert text_of(page, "#figures p >> nth=0") == said("token", n=place, all=4000, token="word ")
        assert page.get_attribute("[aria-selected=true]", "data-i") == str(place - 1)
    tab_to(page, "group 0")
    page.keyboard.press("Enter")
    tab_to(page, "response 1")
    page.keyboard.press("Enter")
    tab_to(page, "tokens")  # few, where a browser has no reason to put the focus of itself, since nothing scrolls
    page.keyboard.press("ArrowRight")
    assert text_of(page, "#figures p >> nth=0") == said("token", n=1, all=4, token="a")
    tab_to(page, "group 4")
    page.keyboard.press("Enter")
    assert page.locator(".opened").count() == 1 and page.locator(".token").count() == 0
    assert page.inner_text("#figures") == ""


def expected_verdict(advantage, ratio):
    """By which of the two terms of the loss is larger."""
    plain, bounded = -advantage * ratio, -advantage * min(1.28, max(0.8, ratio))
    if plain == bounded:
        return "is even" if advantage == 0 else "is up" if advantage > 0 else "is down"
    return "is held" if bounded > plain else "is back"


def test_the_figures_of_each_token(pages, view):
    page, verdicts = view(pages[0]), set()
    for group_number, response_number in ((0, 0), (0, 1), (5, 0)):
        row = GROUPS[group_number][response_number]
        if response_number == 0:
            page.click(f'[data-key="group {group_number}"]')
        page.click(f'[data-key="response {response_number}"]')
        advantage, texts = row["advantage"], page.locator(".token").all_text_contents()
        numbers = zip(json.loads(row["ratios"]), json.loads(row["probabilities"]), texts, strict=True)
        for place, (ratio, p, text) in enumerate(numbers):
            page.click(f'[data-i="{place}"]')
            verdict, bounded = expected_verdict(advantage, ratio), -advantage * min(1.28, max(0.8, ratio))
            terms = dict(plain=signed(-advantage * ratio), low="0.8", high="1.28", bounded=signed(bounded))
            assert texts_in(page, "#figures p") == [
                said("token", n=place + 1, all=len(texts), token=text),
                said("ratios", p=f"{p:.3g}", now=f"{p * ratio:.3g}", ratio=f"{ratio:.3g}", advantage=signed(advantage)),
                *[said("larger", **terms)] * (verdict in ("is held", "is back")),
                said(verdict, **terms),
                said("weight", parts=5 + 4 + 4000 + 2 + 3 + 10, LOSS_AGG_MODE="token-mean"),  # all that are trained on
            ]
            mark = ("▲" if advantage > 0 else "▼") if verdict == "is held" else ""
            after = page.evaluate(
                f"getComputedStyle(document.querySelector('[data-i=\"{place}\"]'), '::after').content"
            )
            assert after == (f'"{mark}"' if mark else "none")
            verdicts.add((verdict, advantage > 0))
    assert len(verdicts) == 7  # up, down, even, and held and pulled back of both signs
    assert all(key.split()[1] in WORDS[key][0] for key in ("is up", "is down", "is held", "is back"))


def test_a_clicked_token_shows_its_figures_until_they_are_closed(pages, view):
    page = view(pages[0])
    open_response(page, 0, 0)
    for close in (lambda: page.keyboard.press("Escape"), lambda: page.click("#figures button")):
        page.click('[data-i="2"]')
        assert text_of(page, "#figures p >> nth=0") == said("token", n=3, all=5, token="␀␛␉⟨U+202E⟩")
        assert page.get_attribute("[aria-selected=true]", "data-i") == "2"
        assert_whole(page.inner_text("#figures"))
        close()
        assert page.inner_text("#figures") == "" and page.locator("[aria-selected=true]").count() == 0
        assert page.locator(".token").count() == 5


def color_of(page, place=0):
    return page.evaluate(f"getComputedStyle(document.querySelector('[data-i=\"{place}\"]')).backgroundColor")


def opacity(color):
    return float(color.rpartition(",")[2].strip(" )")) if color.startswith("rgba") else 1.0


@pytest.mark.parametrize("mode, parts", [("token-mean", 5), ("seq-mean-token-sum", 2), ("seq-mean-token-mean", 2 * 3)])
def test_the_weight_of_a_token_in_the_loss(mode, parts, view, tmp_path):
    """With two responses, of three tokens and of two, of a token of the first."""
    groups = [group(answer("ab", 1.0, A, [1.0] * 3, ["a", "b", END]), answer("c", 0.0, -A, [1.0] * 2))]
    show.main([str(make_run(tmp_path / "run", {1: groups}, LOSS_AGG_MODE=mode))])
    page = view(tmp_path / "run/steps.html")
    open_response(page, 0, 0)
    page.click('[data-i="2"]')
    assert texts_in(page, "#figures p")[-1] == said("weight", parts=parts, LOSS_AGG_MODE=mode)


def test_coloring(pages, view):
    """By four things; and the weight in the loss shows in the shades of a long and a short response."""
    page = view(pages[0])
    open_response(page, 0, 0)
    found = {}
    for name in ("push", "probability", "ratio", "held"):
        press(page, name)
        found[name] = [opacity(color_of(page, place)) for place in range(5)]
    push = 0.7 * A**0.5 / 1.3
    assert found["push"] == pytest.approx([push, 0, push, push, push], abs=0.004)  # none where the clip holds it
    assert found["probability"] == pytest.approx([0.7 * (1 - p) for p in RISING["probabilities"]], abs=0.004)
    assert found["held"] == pytest.approx([0, 0.7, 0, 0, 0], abs=0.004)
    drift = [min(1, abs(math.log(ratio)) / math.log(1.28)) for ratio in RISING["ratios"]]
    assert found["ratio"] == pytest.approx([0.7 * share for share in drift], abs=0.004)
    assert page.locator("[aria-pressed=true]", has_text=WORDS["held"][0]).count() == 1

    shades, push = [], 0.7 * 0.5**0.5 / 1.3
    for which in pages:  # token-mean, and seq-mean-token-mean
        page = view(which)
        page.click('[data-key="group 3"]')
        for response_number in (0, 1):
            page.click(f'[data-key="response {response_number}"]')
            shades.append(color_of(page))
    assert shades[0].startswith("rgba(0, 92, 175,") and shades[1].startswith("rgba(213, 94, 0,")
    assert list(map(opacity, shades)) == pytest.approx([push, push, push * (4024 / 6 / 4000) ** 0.5, 0.7], abs=0.004)


def test_languages(pages, view):
    page = view(pages[0])
    open_response(page, 0, 1)
    page.click('[data-i="2"]')
    assert page.evaluate("document.documentElement.lang") == "en"
    english = page.inner_text("body")
    assert not re.search("[一-鿿]", english.replace("中文", ""))
    page.click("[data-key=language]")
    assert page.evaluate("document.documentElement.lang") == "zh-CN"
    chinese, where = page.inner_text("body"), said("step", language=1, n=3, last=3)
    assert page.inner_text("#where") == where and page.inner_text("[data-key=language]") == "English"
    assert texts_in(page, "#figures p")[::3] == [
        said("token", language=1, n=3, all=4, token="c"), said("is back", language=1)
    ]  # fmt: skip
    assert page.evaluate("document.activeElement.dataset.key") == "language"
    for text in (english, chinese):
        assert_whole(text)
    page.click("[data-key=language]")
    assert page.inner_text("body") == english
    page = view(pages[0], locale="zh-CN")
    assert page.evaluate("document.documentElement.lang") == "zh-CN" and page.inner_text("#where") == where


def test_texts_are_shown_and_not_run(pages, view):
    """Control characters as signs, markup as text."""
    page = view(pages[0])
    open_response(page, 0, 0)
    tokens = page.locator(".token").all_text_contents()
    assert tokens == [*SIGNS[:2], "␀␛␉⟨U+202E⟩", "↵\n", END]
    assert page.inner_text(".opened pre") == "<b>What?</b>↵\n␛"
    assert page.locator("main img, main b:not(.answers b), main i").count() == 0
    assert page.locator(".token.special").count() == 1 + 2  # and two that only look like one
    page.click('[data-i="2"]')
    assert "“␀␛␉⟨U+202E⟩”" in page.inner_text("#figures")
    open_response(page, 1, 0)
    assert page.locator(".opened > pre").last.inner_text() == SIGNS[1]
    assert not re.search("[\x00-\x08\x0b-\x1f\u202e]", page.inner_text("body"))


def test_the_story_tells_the_numbers_of_the_step(pages, view):
    page = view(pages[0])
    assert texts_in(page, "#story li") == [
        said("part 1", "sampled", questions=6, GROUP_SIZE=2, responses=12, right="42%"),
        said("part 2", "filtered", "dropped", "rounds", "surplus groups", "batch not full", "show dropped",
             dropped=2, questions=6, BATCH_SIZE=4, correct=1, wrong=1, sizes="3 + 3", surplus=1, batch=3, wanted=4),
        said("part 3", "rule", "shaped",
             start=4000, limit=4096, factor=1, responses=12, fined=2, loss=(0.25 + 0.75) / 2, cut=2),
        said("part 4", "compared", "for example", "show compared",
             GROUP_SIZE=2, right=1, size=2, plus="+0.71", minus="−0.71"),
        said("part 5", "clipped", "not all recorded", "clip-higher", "show free",
             passes=3, low=0.8, high=1.28, least=0.0128, up=1, down=1, tokens=4014, all=4024, risen=2, between=1),
        said("part 6", "token mean", "show longest", LOSS_AGG_MODE="token-mean", long=4000, short=2, times=2000),
    ]  # fmt: skip

    press(page, "show free")
    assert page.get_attribute("[aria-selected=true]", "data-i") == "3"
    assert said("ratios", p=0.02, now=0.025, ratio=1.25, advantage="+0.71") in text_of(page, "#figures")
    assert page.get_attribute(f'[data-key="{WORDS["ratio"][0]}"]', "aria-pressed") == "true"
    for key, group_number, response_number in (
        ("show dropped", 1, None), ("show longest", 3, 0), ("show compared", 0, None)
    ):  # fmt: skip
        press(page, key)
        assert page.get_attribute(f'[data-key="group {group_number}"]', "aria-expanded") == "true"
        pressed = page.locator("[data-key^=response][aria-pressed=true]").all_inner_texts()
        assert pressed == ([] if response_number is None else [str(response_number + 1)])

    page.focus("#slider")
    page.keyboard.press("Home")
    assert texts_in(page, "#story li") == [
        said("part 1", "sampled", questions=1, GROUP_SIZE=2, responses=2, right="50%"),
        said("part 2", "filtered", "none dropped", "batch not full", questions=1, batch=1, wanted=4),
        said("part 3", "rule", "shaped", start=4000, limit=4096, factor=1, responses=2, fined=0, loss=0, cut=0),
        said("part 4", "compared", "for example", "show compared",
             GROUP_SIZE=2, right=1, size=2, plus="+0.71", minus="−0.71"),
        said("part 5", "clipped", "clip-higher",
             passes=3, low=0.8, high=1.28, least=0.0128, up=0, down=0, tokens=4, risen=0, between=0),
        said("part 6", "token mean", "show longest", LOSS_AGG_MODE="token-mean", long=2, short=2, times=1),
    ]  # fmt: skip


def test_constants_choose_what_the_story_tells(view, tmp_path):
    """Of a group with two right responses, of which one lost reward, in a second round."""
    right = answer("7", 1.0, 0.3, [1.0, 1.0], penalty=-0.25), answer("7", 1.0, 0.6, [1.0, 1.0])
    groups = [pair(), group(answer("8", 0.0, fate="all wrong"), answer("9", 0.0, fate="all wrong")),
              group(*right, answer("8", 0.0, -0.9, [1.0, 1.0]), round=2)]  # fmt: skip
    changed = dict(RETRY_SAME_QUESTION=True, USE_OVERLONG_FILTERING=True, OVERLONG_BUFFER_LENGTH=0, KL_COEF=0.1)
    numbers = dict(sizes="2 + 1", BATCH_SIZE=32, start=64, limit=96, factor=1, responses=7, fined=1, loss=0.25, cut=0)
    either = [{"rounds", "shaped"}, {"retries", "unshaped", "overlong filtering", "kl"}]
    for constants, told, untold in (({}, *either), (changed, *reversed(either))):
        folder = make_run(tmp_path / f"run{len(constants)}", {1: groups}, MAX_RESPONSE_LENGTH=96, **constants)
        show.main([str(folder)])
        page = view(folder / "steps.html")
        story = text_of(page, "#story")
        assert {key for key in told | untold if said(key, **numbers) in story} == told
    assert said("fined", "show fined", fined="+0.30", unfined="+0.60") in story
    press(page, "show fined")
    assert page.get_attribute('[data-key="group 2"]', "aria-expanded") == "true"
    assert page.get_attribute('[data-key="response 0"]', "aria-pressed") == "true"
    assert "+1.00 − 0.25 = +0.75" in text_of(page, ".opened table")


@pytest.mark.parametrize("high, key, up, risen, between", [
    (0.25, "clip-higher", 1, 2, 1), (0.1, "no clip-higher", 3, 3, 2), (0.4, "clip-higher", 0, 2, 2),
])  # fmt: skip
def test_what_only_a_higher_end_would_push(high, key, up, risen, between, view, tmp_path):
    """Of tokens at 1.15, 1.25, and 1.26 or more: between GRPO's end and the run's, or the run's and DAPO's."""
    one, other = answer("abc", 1.0, A, [1.15, 1.25, 1.3], ["a", "b", "c"]), answer("d", 0.0, -A, [1.0, 1.0])
    show.main([str(make_run(tmp_path / "run", {1: [group(one, other)]}, CLIP_RANGE_HIGH=high))])
    end, least = f"{1 + high:.3g}", f"{(1 + high) / 100:.3g}"
    story = text_of(view(tmp_path / "run/steps.html"), "#story")
    assert said(key, up=up, risen=risen, between=between, high=end, least=least) in story


def test_graded_rewards_are_not_told_as_right_and_wrong(view, tmp_path):
    """No example of right against wrong where the wrong ones differ; a sign and a word for what lies in between."""
    graded = group(
        answer("a", 1.0, 1.2, [1.0, 1.0]), answer("b", 0.0, -0.1, [1.0, 1.0]), answer("c", 0.5, -1.1, [1.0, 1.0])
    )
    alike = group(answer("x", 0.5, fate="all equal"), answer("y", 0.5, fate="all equal"))
    show.main([str(make_run(tmp_path / "run", {1: [graded, alike]}))])
    page = view(tmp_path / "run/steps.html")
    assert texts_in(page, ".group > span:nth-child(2)") == ["✓✗~", "~~"]
    story = texts_in(page, "#story li")
    assert said("equal", equal=1) in story[1] and story[3] == said("part 4", "compared")


def test_a_held_out_question_without_a_verdict_is_left_out(monkeypatch, view, tmp_path):
    """At the evaluations that the page has room for."""
    monkeypatch.setattr(show, "LIMIT", 3000)
    judged = [
        (step, [group(answer("a" * 900))] + [group(answer("b"), question="rare?")] * (step == 1)) for step in range(8)
    ]
    show.main([str(make_run(tmp_path / "run", {1: [pair()]}, judged))])
    page = view(tmp_path / "run/steps.html")
    assert "rare?" not in page.inner_text("#heldOut") and page.locator(".answers > div").count() == 3


def test_groups_can_be_chosen_by_their_fate(pages, view):
    page = view(pages[0])
    counts = {"all": 6, "trained": 3, "all wrong": 1, "all correct": 1, "surplus": 1}
    for name, count in counts.items():
        page.click(f"#groups .row >> text={WORDS[name][0]} {count}")
        assert page.locator(".group").count() == count
    texts = page.locator(".group span:nth-child(3)").all_inner_texts()
    assert texts == [WORDS["surplus"][0]] and page.locator("#groups .row button").count() == len(counts)


def test_a_group_is_shown_by_the_marks_of_its_responses(pages, view):
    found = view(pages[0]).locator(".group > span:nth-child(2)").all_inner_texts()
    assert found == ["✓✗", "✗✗", "✓(✓)", "✓(✗)", "✓✗", "✗✗"]


def test_two_runs_and_their_answers(pages, view):
    """Each at each evaluation, to the question that is chosen: at first to one that was learned, if there is one."""
    assert "3 + 4?" in view(pages[0]).inner_text("#heldOut pre >> nth=0")
    page = view(pages[1])
    assert "never?" in page.inner_text("#heldOut pre >> nth=0")
    page.click("#heldOut >> text=▶")
    assert "3 + 4?" in page.inner_text("#heldOut pre >> nth=0")
    assert text_of(page, "h1") == said("title", run="GRPO")
    found = [text_of(page, f".answers >> nth={number}") for number in (0, 1)]
    first, last = (said("at", n=number) for number in (0, 2))
    assert f"{first} ✗ wrong <i>then</i>" in found[0] and f"{last} ✓ 7" in found[0]
    assert f"{first} ✗ 5" in found[1] and f"{last} ✗ 6 of grpo" in found[1]
    assert page.locator("#heldOut h3").all_inner_texts() == ["dapo", "GRPO"]
    story = text_of(page, "#story")
    assert said("static", "show alike", questions=6, alike=1, share="33%") in story
    assert said("shaped", start=4000, limit=4096, factor=2, responses=12, fined=2, loss=0.5, cut=2) in story
    assert said("no clip-higher", "show high", between=1, up=2, high=1.2) in story
    lengths = dict(long=4000, short=2, times=2000)
    assert said("response mean", "show longest", LOSS_AGG_MODE="seq-mean-token-mean", **lengths) in story
    press(page, "show alike")
    assert page.get_attribute('[data-key="group 5"]', "aria-expanded") == "true"
    page.click("button[data-key=dapo]")
    assert text_of(page, "h1") == said("title", run="dapo")
    assert said("token mean", LOSS_AGG_MODE="token-mean", **lengths) in text_of(page, "#story")
    page.select_option("#question", "0")
    assert "never?" in page.inner_text("#heldOut pre >> nth=0")


def test_it_fits_a_phone(pages, view):
    page = view(pages[1], width=390)
    for group_number, response_number in ((0, 0), (3, 0), (3, 1)):
        open_response(page, group_number, response_number)
        page.click('[data-i="1"]')
        page.click("[data-key=language]")
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        page.click(f'[data-key="group {group_number}"]')


GRADED = [group(answer("a", 1.0, A, [1.0, 1.0], reward=0.9), answer("b", 1.0, -A, [1.0, 1.0], reward=0.1))]
CUT = dict(fate="truncated", truncated=1)
NEW = "number group_number round prediction penalty advantage fate tokens probabilities ratios".split()
UNUSUAL = {
    "nothing trained": [[group(answer("x", 0.0, fate="all wrong"), answer("y", 0.0, fate="all wrong"))], {}],
    "all equal": [[group(answer("x", 0.25, fate="all equal"), answer("y", 0.25, fate="all equal")), pair()], {}],
    "no tokens": [[group(answer("x", 1.0, A), answer("y", 0.0, -A))], {"RECORDED_TOKENS": 0}],
    "a group of one": [[group(answer("x", 1.0, 0.0, [1.0, 1.0]))], {}],
    "some cut off": [[group(answer("x", 1.0, A, [1.0, 1.0]), answer("y", 0.0, **CUT))], {}],
    "no penalty": [[pair()], {"OVERLONG_BUFFER_LENGTH": 0}],
    "all cut off": [[group(answer("x", 1.0, **CUT), answer("y", 0.0, **CUT)), pair()],
                    {"USE_OVERLONG_FILTERING": True}],
    "all right, graded": [GRADED, {}],
}  # fmt: skip


@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_runs_can_be_shown(name, view, tmp_path):
    groups, constants = UNUSUAL[name]
    show.main([str(make_run(tmp_path / "run", {1: groups}, **constants))])
    assert_shown(view(tmp_path / "run/steps.html"), len(groups))


def assert_shown(page, count):
    """All groups and responses; view sees to errors."""
    drawn, responses = page.locator(".group").count(), 0
    for number in range(drawn):
        page.click(f'[data-key="group {number}"]')
        responses += page.locator("[data-key^=response]").count()
        page.locator("[data-key^=response]").last.click()
        assert_whole(page.inner_text("body"))
    assert drawn == count and responses


def test_a_group_that_is_all_cut_off_is_in_the_batch(view, tmp_path):
    """With overlong filtering, which leaves its responses out of the loss."""
    groups, constants = UNUSUAL["all cut off"]
    show.main([str(make_run(tmp_path / "run", {1: groups}, **constants, BATCH_SIZE=3))])
    page = view(tmp_path / "run/steps.html")
    assert texts_in(page, ".group > span:nth-child(3)") == [said("trained")] * 2
    assert texts_in(page, "#groups .row button") == [f"{said(name)} 2" for name in ("all", "trained")]
    told = said("filtered", "none dropped", "batch not full", questions=2, batch=2, wanted=3)
    assert texts_in(page, "#story li")[1].endswith(told)


def test_of_a_run_that_the_version_before_began_it_shows_the_steps_after(view, tmp_path, capsys):
    """dapo.py adds the columns when it resumes the run, and leaves them empty in the steps recorded before."""
    folder = make_run(tmp_path / "run", {1: [pair()], 2: [pair()], 3: [pair(), pair()]})
    with contextlib.closing(sqlite3.connect(folder / "run.db")) as db, db:
        db.execute(f"UPDATE responses SET {', '.join(f'{name} = NULL' for name in NEW)} WHERE step = 1")
    run = shown(folder, "--step=3")
    assert run["recorded"] == [step["step"] for step in run["steps"]] == [2, 3]
    assert_shown(view(folder / "steps.html"), 2)
    with pytest.raises(SystemExit):
        show.main([str(folder), "--step=1"])
    assert f"--step 1: the run in {folder} has recorded the steps 2 to 3" in capsys.readouterr().err


def test_a_ratio_that_is_not_finite_is_not_held(view, tmp_path):
    groups = [group(answer("x", 0.0, -A, [math.inf, 1.0]), answer("y", 1.0, A, [1.0, 1.0]))]
    show.main([str(make_run(tmp_path / "run", {1: groups}))])
    page = view(tmp_path / "run/steps.html")
    open_response(page, 0, 0)
    assert page.locator(".token").count() == 2 and page.locator(".token.low, .token.high").count() == 0
    assert said("clipped", passes=3, low=0.8, high=1.28, least=0.0128, up=0, down=0, tokens=4) in text_of(
        page, "#story"
    )


def test_a_question_is_chosen_by_keyboard_and_stays_in_focus(view, pages):
    page = view(pages[0])
    page.select_option("#question", "0")
    page.focus("#question")
    page.keyboard.press("ArrowDown")
    assert (page.input_value("#question"), page.evaluate("document.activeElement.id")) == ("1", "question")


@pytest.mark.parametrize("reward", ["reward.py:compute_score", "my_reward.py:compute_score"])
def test_the_rule_of_rewards_is_told_of_ours_alone(reward, view, tmp_path):
    show.main([str(make_run(tmp_path / "run", {1: [pair()]}, REWARD=repr(reward)))])
    told = said("rule") in text_of(view(tmp_path / "run/steps.html"), "#story")
    assert told == (reward == "reward.py:compute_score")

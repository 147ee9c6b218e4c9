"""What a user can get wrong ends in one line that names it, with exit status 2, and leaves every file as it was."""

import json
import sqlite3

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, Qwen2Config

import dapo

CONSTANTS = {
    "--CLIP_RANGE_HIHG=0.3": "there is no constant CLIP_RANGE_HIHG; did you mean CLIP_RANGE_HIGH?",
    "--RATE=0.3": "there is no constant RATE",
    "--GROUP_SIZE=eight": "GROUP_SIZE=eight does not fit: GROUP_SIZE is a whole number",
    "--GROUP_SIZE=8.5": "GROUP_SIZE is a whole number",
    "--NUM_STEPS=ten": "NUM_STEPS is a whole number or None",
    "--USE_DYNAMIC_SAMPLING=1": "USE_DYNAMIC_SAMPLING is True or False",
    "--LEARNING_RATE=None": "LEARNING_RATE is a number",
    "--LEARNING_RATE=nan": "LEARNING_RATE is a number",
    "--LEARNING_RATE=1e999": "LEARNING_RATE=inf is out of range",
    "--LEARNING_RATE=0": "LEARNING_RATE=0.0 is out of range",
    "--SEED": "--SEED has no value: write --SEED=VALUE",
    "--SEED=-1": "SEED=-1 is out of range",
    "--GROUP_SIZE=1": "GROUP_SIZE=1 is out of range",
    "--LOSS_AGG_MODE=mean": "LOSS_AGG_MODE=mean is out of range",
    "--TEMPERATURE=0": "TEMPERATURE=0.0 is out of range",
    "--CLIP_RANGE_LOW=0": "CLIP_RANGE_LOW=0.0 is out of range",
    "--CLIP_RANGE_LOW=1.2": "CLIP_RANGE_LOW=1.2 is out of range",
    "--CLIP_RANGE_HIGH=-0.2": "CLIP_RANGE_HIGH=-0.2 is out of range",
    "--CLIP_RANGE_HIGH=28": "CLIP_RANGE_HIGH=28.0 is out of range",
    "--MINI_BATCHES=0": "MINI_BATCHES=0 is out of range",
    "--MINI_BATCHES=257": "MINI_BATCHES=257 is out of range",
    "--KL_COEF=-1": "KL_COEF=-1.0 is out of range",
    "--NUM_STEPS=0": "NUM_STEPS=0 is out of range",
    "--OVERLONG_BUFFER_LENGTH=97": "OVERLONG_BUFFER_LENGTH=97 is out of range",
    "--DEVICE=gpu": "DEVICE=gpu is out of range: it has to be cpu",
    "--MAX_PROMPT_LENGTH=3": "none of 6000 questions is of at most MAX_PROMPT_LENGTH=3 tokens",
    "--MAX_RESPONSE_LENGTH=257": "MODEL=toy has 512 positions, MAX_PROMPT_LENGTH + MAX_RESPONSE_LENGTH are 513",
    "--OUTPUT_DIR=": "OUTPUT_DIR= is out of range",
    "--PROMPT_TEMPLATE=Solve: {}": "PROMPT_TEMPLATE=Solve: {} is out of range: it has to be a text with {question}",
    "--OUTPUT_DIR=~/run": "OUTPUT_DIR=~/run is out of range",
    "--GROUP_SIZE=0": "GROUP_SIZE=0 is out of range",
    "--MAX_GRAD_NORM=1e999": "MAX_GRAD_NORM=inf is out of range: it has to be more than 0, and finite",
    "--TRAIN_DATASETS={{'path': 'a'}}": "TRAIN_DATASETS is a list of data sets",
    "--TRAIN_DATASETS=mine.csv": "TRAIN_DATASETS is a list of data sets",
    "--TRAIN_DATASETS=[]": "TRAIN_DATASETS=[] is out of range",
    "--EVAL_DATASETS=['mine.csv']": "EVAL_DATASETS=['mine.csv'] is out of range",
    "--TRAIN_DATASETS=[{'path': 'a.csv', 'type': 'csv'}]": "TRAIN_DATASETS=",
    "--TRAIN_DATASETS=[{'path': 'a.txt', 'type': 'txt', 'input': 'q', 'output': 'a'}]": "parquet, json, csv, hub",
    "--PROMPT_TEMPLATE=box": "a text with {question} in it, or one of boxed, answer",
    "--REPORT_TO=mlflow": "REPORT_TO=mlflow is out of range: it has to be tensorboard or wandb",
    "tran": "'tran' is not a command; there are train, eval, chat, plot",
    "missing.py": "the recipe 'missing.py' cannot be read: No such file",
}


def source(path, kind, question="question", answer="answer", **others):
    return f"--TRAIN_DATASETS={[{'path': str(path), 'type': kind, 'input': question, 'output': answer, **others}]}"


def stop_of(main, arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1, error
    assert stop.value.code == 2
    return error


@pytest.fixture
def in_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("argument", CONSTANTS)
def test_constants_and_commands(main, argument, in_root, tmp_path, capsys):
    error = stop_of(main, [f"--OUTPUT_DIR={tmp_path / 'run'}", argument], capsys)
    assert CONSTANTS[argument] in error
    assert not list(tmp_path.iterdir())


@pytest.fixture
def files(tmp_path, make_folder, tokenizer):
    """A folder of files that are not what they should be."""
    folder = tmp_path / "files"
    folder.mkdir()
    rows = [{"question": f"Tom has {n} apples.", "answer": str(n)} for n in range(50)]
    table = dapo.record.datasets.Dataset.from_list(rows)
    table.to_parquet(folder / "good.parquet")
    whole = (folder / "good.parquet").read_bytes()
    (folder / "broken.parquet").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.json").touch()
    (folder / "empty.csv").touch()
    (folder / "heading.csv").write_text("question,answer\n")
    (folder / "broken.json").write_text('{"question": "a", "answer"')
    (folder / "picture.png").write_bytes((ROOT / "outputs/reference/training_metrics.png").read_bytes())
    (folder / "blank.csv").write_text('question,answer\n"","1"\n"  ","2"\n"Tom",""\n')
    (folder / "numbers.json").write_text(json.dumps({"question": [1, 2], "answer": "3"}))
    (folder / "text.py").write_text("LEARNING_RATE = 1e-6\nthis is no Python\n")
    (folder / "raises.py").write_text("LEARNING_RATE = 1 / 0\n")
    (folder / "unknown.py").write_text("LEARNING_RAT = 1e-6\n")
    (folder / "reward.py").write_text("def mine(): ...\n")
    (folder / "no_module.py").write_text("import no_such_module\n")
    (folder / "file").touch()

    for name in (
        "no_weights",
        "broken_weights",
        "broken_config",
        "no_end",
        "no_tokenizer",
        "pickled",
        "refuses",
        "nan",
    ):
        make_folder().rename(folder / name)
    (folder / "no_weights/model.safetensors").unlink()
    weights = folder / "broken_weights/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    (folder / "broken_config/config.json").write_text('{"model_type"')
    settings = json.loads((folder / "no_end/tokenizer_config.json").read_text())
    (folder / "no_end/tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": None}))
    for path in (folder / "no_tokenizer").glob("*token*"):
        path.unlink()
    torch.save({}, folder / "pickled/pytorch_model.bin")
    (folder / "pickled/model.safetensors").unlink()
    (folder / "refuses/chat_template.jinja").write_text("{{ raise_exception('No questions please') }}")
    weights = load_file(folder / "nan/model.safetensors")
    weights["model.norm.weight"][3] = float("nan")
    save_file(weights, folder / "nan/model.safetensors", {"format": "pt"})
    parts = [{"role": "user", "content": [{"type": "text", "text": "Tom"}]}]
    answered = [{"role": "user", "content": "Tom"}, {"role": "assistant", "content": "Ann"}]
    (folder / "parts.json").write_text(json.dumps({"question": parts, "answer": "3"}))
    (folder / "answered.json").write_text(json.dumps({"question": answered, "answer": "3"}))
    (folder / "nested.json").write_text(json.dumps({"q": "1 + 1?", "meta": {"a": {"final": "2", "way": "1, 2"}}}))
    (folder / "null.json").write_text('{"q": null, "answer": "1"}\n{"q": null, "answer": "2"}')
    sizes = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1)
    config = Qwen2Config(**sizes, vocab_size=len(tokenizer))
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder / "classifier")
    tokenizer.save_pretrained(folder / "classifier")
    (folder / "broken_run").mkdir()
    (folder / "broken_run/run.db").write_bytes(b"no database" * 100)
    (folder / "no_run").mkdir()
    sqlite3.connect(folder / "no_run/run.db").close()
    return folder


FILES = {
    "missing data": (lambda f: [source(f / "missing.csv", "csv")], "missing.csv"),
    "empty json": (lambda f: [source(f / "empty.json", "json")], "empty.json"),
    "empty csv": (lambda f: [source(f / "empty.csv", "csv")], "empty.csv"),
    "only a heading": (lambda f: [source(f / "heading.csv", "csv")], "heading.csv' has no rows"),
    "only a heading, split": (
        lambda f: [source(f / "heading.csv", "csv", split="train[:5]")],
        "no rows in 'train[:5]'",
    ),
    "an answer of many parts": (
        lambda f: [source(f / "nested.json", "json", "q", "meta.a")],
        "in 'meta.a' no answer but",
    ),
    "no such part": (
        lambda f: [source(f / "nested.json", "json", "q", "meta.a.b")],
        "there are: meta.a.final, meta.a.way",
    ),
    "half a file": (lambda f: [source(f / "broken.parquet", "parquet")], "broken.parquet"),
    "half a line": (lambda f: [source(f / "broken.json", "json")], "broken.json"),
    "a picture as parquet": (lambda f: [source(f / "picture.png", "parquet")], "picture.png"),
    "a picture as csv": (lambda f: [source(f / "picture.png", "csv")], "picture.png"),
    "parquet as json": (lambda f: [source(f / "good.parquet", "json")], "good.parquet"),
    "a folder as csv": (lambda f: [source(f, "csv")], "files"),
    "no such column": (lambda f: [source(f / "good.parquet", "parquet", "q")], "there are: question, answer"),
    "other parameters": (lambda f: [f"--REWARD={f / 'reward.py'}:mine"], "it is given data_source, solution_str"),
    "a template that refuses": (lambda f: [f"--MODEL={f / 'refuses'}"], "No questions please"),
    "multimodal content": (lambda f: [source(f / "parts.json", "json")], "neither text nor a list of chat messages"),
    "an answer as last message": (lambda f: [source(f / "answered.json", "json")], "the last by the user"),
    "a null in nested columns": (lambda f: [source(f / "null.json", "json", "q.text")], "no column 'q.text'"),
    "no such split": (lambda f: [source(f / "good.parquet", "parquet", split="test")], "good.parquet"),
    "weights not finite": (lambda f: [f"--MODEL={f / 'nan'}"], "weights that are not finite"),
    "data in the output": (
        lambda f: [source(f / "good.parquet", "parquet"), f"--OUTPUT_DIR={f}"],
        "lies in OUTPUT_DIR",
    ),
    "nothing nested": (lambda f: [source(f / "good.parquet", "parquet", "question.text")], "question.text"),
    "all rows blank": (lambda f: [source(f / "blank.csv", "csv")], "no row with a question and an answer"),
    "questions that are lists": (lambda f: [source(f / "numbers.json", "json")], "neither text nor a list of chat"),
    "a name not on the Hub": (lambda f: [source("nobody/nothing", "hub")], "nobody/nothing"),
    "recipe is no Python": (lambda f: [str(f / "text.py")], "text.py"),
    "recipe raises": (lambda f: [str(f / "raises.py")], "ZeroDivisionError"),
    "recipe misspelled": (lambda f: [str(f / "unknown.py")], "did you mean LEARNING_RATE?"),
    "no such model": (lambda f: [f"--MODEL={f / 'missing'}"], "MODEL="),
    "model not on the Hub": (lambda f: ["--MODEL=nobody/nothing"], "MODEL=nobody/nothing"),
    "model is a file": (lambda f: [f"--MODEL={f / 'file'}"], "MODEL="),
    "model is an empty folder": (lambda f: [f"--MODEL={f / 'no_run'}"], "MODEL="),
    "no weights": (lambda f: [f"--MODEL={f / 'no_weights'}"], "safetensors"),
    "broken weights": (lambda f: [f"--MODEL={f / 'broken_weights'}"], "broken_weights"),
    "pickled weights": (lambda f: [f"--MODEL={f / 'pickled'}"], "safetensors"),
    "weights of another kind": (lambda f: [f"--MODEL={f / 'classifier'}"], "lm_head.weight"),
    "broken config": (lambda f: [f"--MODEL={f / 'broken_config'}"], "broken_config"),
    "no tokenizer": (lambda f: [f"--MODEL={f / 'no_tokenizer'}"], "no_tokenizer"),
    "no end token": (lambda f: [f"--MODEL={f / 'no_end'}"], "names no end token"),
    "no reward file": (lambda f: [f"--REWARD={f / 'missing.py'}:score"], "write it as path:function"),
    "no reward function": (lambda f: [f"--REWARD={f / 'reward.py'}:score"], "there are: mine"),
    "a reward's import fails": (lambda f: [f"--REWARD={f / 'no_module.py'}:score"], "no_such_module"),
    "output is a file": (lambda f: [f"--OUTPUT_DIR={f / 'file'}"], "OUTPUT_DIR="),
    "output in a file": (lambda f: [f"--OUTPUT_DIR={f / 'file/run'}"], "OUTPUT_DIR="),
    "output not writable": (lambda f: ["--OUTPUT_DIR=/proc/run"], "OUTPUT_DIR=/proc/run"),
    "evaluation of no model": (lambda f: ["eval", str(f / "no_run")], "no_run"),
    "chat with two": (lambda f: ["chat", str(f / "nan"), str(f / "no_end")], "chat is with one model, not with 2"),
    "chat with no model": (lambda f: ["chat", str(f / "missing")], "missing"),
    "plot of no run": (lambda f: ["plot", str(f / "missing")], "there is no run in"),
    "plot of a broken run": (lambda f: ["plot", str(f / "broken_run")], "run.db"),
    "plot of an empty run": (lambda f: ["plot", str(f / "no_run")], "run.db"),
}


@pytest.mark.parametrize("case", FILES)
def test_files(main, case, files, in_root, tmp_path, capsys):
    arguments, message = FILES[case]
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    error = stop_of(main, [f"--OUTPUT_DIR={tmp_path / 'run'}", *arguments(files)], capsys)
    assert message in error
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before

"""What a user can get wrong ends in one line that names it, with exit status 2, and leaves every file as it was."""

import json
import sqlite3

import pyarrow.parquet
import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, Qwen2Config

import dapo

CONSTANTS = {
    "--CLIP_RANGE_HIHG=0.3": "there is no constant CLIP_RANGE_HIHG; did you mean CLIP_RANGE_HIGH?",
    "--clip_range_high=0.3": "there is no constant clip_range_high; did you mean CLIP_RANGE_HIGH?",
    "--RATE=0.3": "there is no constant RATE; --help lists them all",
    "--REPORT_TO=wandb": "there is no constant REPORT_TO",
    "--GROUP_SIZE=eight": "GROUP_SIZE=eight does not fit: it has to be of type int, such as 8",
    "--GROUP_SIZE=8.5": "GROUP_SIZE=8.5 does not fit: it has to be of type int",
    "--NUM_STEPS=ten": "NUM_STEPS=ten does not fit: it has to be of type int",
    "--NUM_EPOCHS=None": "NUM_EPOCHS=None does not fit: it has to be of type int",
    "--USE_DYNAMIC_SAMPLING=1": "USE_DYNAMIC_SAMPLING=1 does not fit: it has to be of type bool, such as True",
    "--GROUP_SIZE=True": "GROUP_SIZE=True does not fit: it has to be of type int",
    "--LEARNING_RATE=None": "LEARNING_RATE=None does not fit: it has to be of type float",
    "--LEARNING_RATE=nan": "LEARNING_RATE=nan does not fit: it has to be of type float",
    "--LEARNING_RATE=1e999": "LEARNING_RATE=inf is out of range ... 0 < LEARNING_RATE < math.inf",
    "--LEARNING_RATE=0": "LEARNING_RATE=0.0 is out of range",
    "--SEED": "SEED= does not fit: it has to be of type int",
    "--SEED=-1": "SEED=-1 is out of range ... 0 <= SEED",
    "--GROUP_SIZE=1": "GROUP_SIZE=1 is out of range ... GROUP_SIZE >= 2",
    "--LOSS_AGG_MODE=mean": "LOSS_AGG_MODE=mean is out of range ... ('token-mean', 'seq-mean-token-sum', 'seq-",
    "--TEMPERATURE=0": "TEMPERATURE=0.0 is out of range",
    "--CLIP_RANGE_LOW=0": "CLIP_RANGE_LOW=0.0 is out of range",
    "--CLIP_RANGE_LOW=1.2": "CLIP_RANGE_LOW=1.2 is out of range",
    "--CLIP_RANGE_HIGH=-0.2": "CLIP_RANGE_HIGH=-0.2 is out of range",
    "--CLIP_RANGE_HIGH=28": "CLIP_RANGE_HIGH=28.0 is out of range",
    "--MINI_BATCHES=0": "MINI_BATCHES=0 is out of range",
    "--MINI_BATCHES=257": "MINI_BATCHES=257 is out of range ... MINI_BATCHES <= BATCH_SIZE * GROUP_SIZE",
    "--KL_COEF=-1": "KL_COEF=-1.0 is out of range",
    "--NUM_STEPS=0": "NUM_STEPS=0 is out of range",
    "--EVAL_EVERY=0": "EVAL_EVERY=0 is out of range",
    "--OVERLONG_BUFFER_LENGTH=97": "OVERLONG_BUFFER_LENGTH=97 is out of range",
    "--DEVICE=gpu": "DEVICE=gpu is out of range ... 'cpu'",
    "--MAX_PROMPT_LENGTH=3": "MAX_PROMPT_LENGTH=3: none of 50 questions is that short",
    "--MAX_RESPONSE_LENGTH=257": "MODEL=toy ... 512 positions ... MAX_PROMPT_LENGTH ... MAX_RESPONSE_LENGTH",
    "--OUTPUT_DIR=": "OUTPUT_DIR= is out of range",
    "--OUTPUT_DIR=~/run": "OUTPUT_DIR=~/run is out of range",
    "--PROMPT_TEMPLATE=Solve: {}": "PROMPT_TEMPLATE=Solve: {} is out of range ... ('boxed', 'answer') or '{question}'",
    "--PROMPT_TEMPLATE=box": "PROMPT_TEMPLATE=box is out of range",
    "--GROUP_SIZE=0": "GROUP_SIZE=0 is out of range",
    "--MAX_GRAD_NORM=1e999": "MAX_GRAD_NORM=inf is out of range",
    "--TRAIN_DATASETS={{'path': 'a'}}": "TRAIN_DATASETS={{'path': 'a'}} does not fit: it has to be of type list",
    "--TRAIN_DATASETS=mine.csv": "TRAIN_DATASETS=mine.csv does not fit: it has to be of type list, such as [{'path': ",
    "--TRAIN_DATASETS=[]": "TRAIN_DATASETS=[] is out of range",
    "--EVAL_DATASETS=[]": "EVAL_DATASETS=[] is out of range",
    "--EVAL_DATASETS=['mine.csv']": "mine.csv cannot be read ... path, type (parquet, json, csv, hub), input, and",
    "--TRAIN_DATASETS=[{'path': 'a.csv', 'type': 'csv'}]": "a.csv ... path, type (parquet, json, csv, hub), input, and",
    "--TRAIN_DATASETS=[{'path': 'a.txt', 'type': 'txt', 'input': 'q', 'output': 'a'}]": "parquet, json, csv, hub",
    "--REWARD=5": "REWARD=5 does not fit",
    "tran": "'tran' is neither a recipe, such as recipes/gsm8k.py, nor --NAME=VALUE",
    "missing.py": "the recipe missing.py cannot be run ... No such file",
    "eval": "try python -m tools.NAME",
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


def assert_all(parts, error):
    """Each part of "this ... that" has to be in the error."""
    assert all(part in error for part in parts.split(" ... ")), error


@pytest.fixture
def start(main, files, monkeypatch, tmp_path):
    """The command line of a run in tmp_path/run from the toy, with few questions; what comes after it overrides it."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(dapo, "train_step", lambda *parts: pytest.fail("it has found nothing wrong, and trains"))
    good = source(files / "good.parquet", "parquet")
    return [good, good.replace("TRAIN", "EVAL"), f"--OUTPUT_DIR={tmp_path / 'run'}"]


@pytest.mark.parametrize("argument", CONSTANTS)
def test_constants_and_commands(argument, main, start, tmp_path, capsys):
    error = stop_of(main, [*start, argument], capsys)
    assert_all(CONSTANTS[argument], error)
    assert not list(tmp_path.iterdir())


REWARD = """
def mine(): ...
def none(**others):
    return len(None)
def two(solution_strs, **others): return [1.0, 0.0]
def nan(**others): return float("nan")
NUMBER = 5
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory, make_folder, tokenizer):
    """A folder of files that are not what they should be. No test changes it."""
    folder = tmp_path_factory.mktemp("files")
    rows = [{"question": f"Tom has {n} apples.", "answer": str(n)} for n in range(50)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "good.parquet")
    whole = (folder / "good.parquet").read_bytes()
    (folder / "broken.parquet").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.json").touch()
    (folder / "empty.csv").touch()
    (folder / "heading.csv").write_text("question,answer\n")
    (folder / "long_row.csv").write_text("question\nTom has 1, 2 and 3 apples.,6\n")
    (folder / "quote.csv").write_text('question,answer\n"Tom has 1 apple.,1\n')
    (folder / "latin.csv").write_bytes("question,answer\nWieviele Äpfel?,1\n".encode("latin-1"))
    (folder / "broken.json").write_text('{"question": "a", "answer"')
    (folder / "numbered.json").write_text("1\n2\n")
    (folder / "picture.png").write_bytes((ROOT / "outputs/reference/training_metrics.png").read_bytes())
    (folder / "blank.csv").write_text('question,answer\n"","1"\n"  ","2"\n"Tom",""\n')
    (folder / "numbers.json").write_text(json.dumps({"question": [1, 2], "answer": "3"}))
    (folder / "text.py").write_text("LEARNING_RATE = 1e-6\nthis is no Python\n")
    (folder / "raises.py").write_text("LEARNING_RATE = 1 / 0\n")
    (folder / "unknown.py").write_text("LEARNING_RAT = 1e-6\n")
    (folder / "reward.py").write_text(REWARD)
    (folder / "no_module.py").write_text("import no_such_module\n")
    (folder / "file").touch()

    names = "no_weights broken_weights broken_config no_end no_tokenizer pickled refuses nan".split()
    for name in names:
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
    (folder / "empty_run").mkdir()
    sqlite3.connect(folder / "empty_run/run.db").close()
    return folder


FILES = {
    "missing data": (lambda f: [source(f / "missing.csv", "csv")], "missing.csv"),
    "empty json": (lambda f: [source(f / "empty.json", "json")], "empty.json"),
    "empty csv": (lambda f: [source(f / "empty.csv", "csv")], "empty.csv"),
    "only a heading": (lambda f: [source(f / "heading.csv", "csv")], "heading.csv"),
    "only a heading, split": (lambda f: [source(f / "heading.csv", "csv", split="train[:5]")], "train[:5]"),
    "a row longer than the heading": (lambda f: [source(f / "long_row.csv", "csv")], "long_row.csv"),
    "an open quotation": (lambda f: [source(f / "quote.csv", "csv")], "quote.csv"),
    "another encoding": (lambda f: [source(f / "latin.csv", "csv")], "latin.csv"),
    "an answer of many parts": (lambda f: [source(f / "nested.json", "json", "q", "meta.a")], "an answer to be text"),
    "no such part": (lambda f: [source(f / "nested.json", "json", "q", "meta.a.b")], "its columns: q, meta"),
    "half a file": (lambda f: [source(f / "broken.parquet", "parquet")], "broken.parquet"),
    "half a line": (lambda f: [source(f / "broken.json", "json")], "broken.json"),
    "rows without columns": (lambda f: [source(f / "numbered.json", "json")], "numbered.json"),
    "a picture as parquet": (lambda f: [source(f / "picture.png", "parquet")], "picture.png"),
    "a picture as csv": (lambda f: [source(f / "picture.png", "csv")], "picture.png"),
    "parquet as json": (lambda f: [source(f / "good.parquet", "json")], "good.parquet"),
    "a folder as csv": (lambda f: [source(f, "csv")], "files"),
    "no such column": (lambda f: [source(f / "good.parquet", "parquet", "q")], "question: string answer: string"),
    "a template that refuses": (lambda f: [f"--MODEL={f / 'refuses'}"], "No questions please"),
    "multimodal content": (lambda f: [source(f / "parts.json", "json")], "parts.json"),
    "an answer as last message": (lambda f: [source(f / "answered.json", "json")], "end with the user's message"),
    "a null in nested columns": (lambda f: [source(f / "null.json", "json", "q.text")], "its columns: q, answer"),
    "no such split": (lambda f: [source(f / "good.parquet", "parquet", split="test")], "good.parquet"),
    "weights not finite": (lambda f: [f"--MODEL={f / 'nan'}"], "weights that are not finite"),
    "data in the output": (lambda f: [source(f / "good.parquet", "parquet"), f"--OUTPUT_DIR={f}"], "OUTPUT_DIR"),
    "nothing nested": (lambda f: [source(f / "good.parquet", "parquet", "question.text")], "question.text"),
    "all rows blank": (lambda f: [source(f / "blank.csv", "csv")], "has 3 rows, and none with an input and an output"),
    "questions that are lists": (lambda f: [source(f / "numbers.json", "json")], "numbers.json"),
    "a name not on the Hub": (lambda f: [source("nobody/nothing", "hub")], "nobody/nothing"),
    "recipe is no Python": (lambda f: [str(f / "text.py")], "text.py cannot be run: SyntaxError"),
    "recipe raises": (lambda f: [str(f / "raises.py")], "raises.py cannot be run: ZeroDivisionError"),
    "recipe misspelled": (lambda f: [str(f / "unknown.py")], "did you mean LEARNING_RATE?"),
    "no such model": (lambda f: [f"--MODEL={f / 'missing'}"], "missing is neither a model's folder nor"),
    "model not on the Hub": (lambda f: ["--MODEL=nobody/nothing"], "MODEL=nobody/nothing"),
    "model is a file": (lambda f: [f"--MODEL={f / 'file'}"], "MODEL="),
    "model is an empty folder": (lambda f: [f"--MODEL={f / 'empty_run'}"], "MODEL="),
    "no weights": (lambda f: [f"--MODEL={f / 'no_weights'}"], "safetensors"),
    "broken weights": (lambda f: [f"--MODEL={f / 'broken_weights'}"], "broken_weights"),
    "pickled weights": (lambda f: [f"--MODEL={f / 'pickled'}"], "safetensors"),
    "weights of another kind": (lambda f: [f"--MODEL={f / 'classifier'}"], "has no weights for lm_head.weight"),
    "broken config": (lambda f: [f"--MODEL={f / 'broken_config'}"], "broken_config"),
    "no tokenizer": (lambda f: [f"--MODEL={f / 'no_tokenizer'}"], "no_tokenizer"),
    "no end token": (lambda f: [f"--MODEL={f / 'no_end'}"], "names no end token"),
    "no reward file": (lambda f: [f"--REWARD={f / 'missing.py'}:score"], "is not a file.py:function"),
    "no reward function": (
        lambda f: [f"--REWARD={f / 'reward.py'}:score"],
        "reward.py:score is not a file.py:function",
    ),
    "a reward's import fails": (lambda f: [f"--REWARD={f / 'no_module.py'}:score"], "no_such_module"),
    "a reward that is a number": (lambda f: [f"--REWARD={f / 'reward.py'}:NUMBER"], "REWARD="),
    "output is a file": (lambda f: [f"--OUTPUT_DIR={f / 'file'}"], "file cannot be read or written: "),
    "output in a file": (lambda f: [f"--OUTPUT_DIR={f / 'file/run'}"], "file/run cannot be read or written: "),
    "output not writable": (lambda f: ["--OUTPUT_DIR=/proc/run"], "OUTPUT_DIR=/proc/run"),
}


def state_of(*folders):
    """Every file in some folders, but for locks, with the time when it was changed."""
    paths = [path for folder in folders for path in folder.rglob("*") if path.suffix != ".lock"]
    return {path: path.stat().st_mtime_ns for path in paths if path.is_file()}


@pytest.mark.parametrize("case", FILES)
def test_files(case, main, files, start, tmp_path, capsys):
    arguments, message = FILES[case]
    before = state_of(files, tmp_path)
    assert_all(message, stop_of(main, [*start, *arguments(files)], capsys))
    assert state_of(files, tmp_path) == before


REWARDS = {
    "mine": "reward.py:mine failed ... TypeError ... data_source",
    "none": "reward.py:none failed ... TypeError ... reward.py, line 4",
    "two": "reward.py:two failed ... 50 responses",
    "nan": "reward.py:nan failed ... finite",
}


@pytest.mark.parametrize("function", REWARDS)
def test_rewards_that_fail_at_the_first_evaluation(function, main, files, start, tmp_path, capsys):
    """The run has begun then, and once the function is mended, the same command resumes it."""
    before = state_of(files)
    error = stop_of(main, [*start, f"--REWARD={files / 'reward.py'}:{function}"], capsys)
    assert_all(REWARDS[function], error)
    assert state_of(files) == before and (tmp_path / "run/checkpoint.pt").exists()

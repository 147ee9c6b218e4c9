import contextlib
import importlib.util
import os
import random
import signal
import sqlite3
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
CACHE = tempfile.TemporaryDirectory()  # of data sets, so that none from an earlier session is taken for one of these
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": CACHE.name, "OMP_NUM_THREADS": "1"}
# GPUs are for test_cuda.py alone. It is told which ones by a variable, since xdist's workers are started after this.
GPUS = os.environ.setdefault("HIDDEN_GPUS", os.environ.get("CUDA_VISIBLE_DEVICES", "all"))
GPUS = None if GPUS == "all" else GPUS  # None: CUDA_VISIBLE_DEVICES was not set
os.environ["CUDA_VISIBLE_DEVICES"] = "-1"  # Windows would take "" for nothing

import dapo  # noqa: E402, I001  (first: pyarrow has to come before torch on Windows)
import pyarrow.parquet  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from architectures import ARCHITECTURES, REFUSED  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, logging  # noqa: E402

logging.disable_progress_bar()
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it in the background, and tests send it
dapo.DEVICE = "cpu"
torch.set_num_threads(1)  # faster for tensors this small

if importlib.util.find_spec("peft") is None:  # which requirements.txt does not install
    dapo.add_adapters = lambda model: pytest.skip("LoRA needs peft (pip install peft)")

HOSTILE = dict(do_sample=True, top_k=5, top_p=0.3, repetition_penalty=1.5, temperature=0.3, min_p=0.2, max_length=7)


@pytest.fixture(scope="session")
def tokenizer():
    return AutoTokenizer.from_pretrained(ROOT / "toy")


@pytest.fixture(scope="session")
def make_folder(tmp_path_factory, tokenizer):
    """Saves a tiny random model with the toy's tokenizer, as a user would find one; gives its folder."""

    def make(kind="qwen2", ends=None, generation=HOSTILE, pad=None, seed=0):
        folder = tmp_path_factory.mktemp(kind.partition(",")[0])
        torch.manual_seed(seed)
        ends = [tokenizer.eos_token_id] if ends is None else ends
        pad = tokenizer.pad_token_id if pad is None else pad
        ids = dict(vocab_size=len(tokenizer), bos_token_id=None, eos_token_id=ends, pad_token_id=pad)
        config, sizes = (ARCHITECTURES | REFUSED)[kind]
        model = AutoModelForCausalLM.from_config(config(**sizes, **ids))
        for parameter in model.parameters():  # far from uniform, so that a leak of top_k or temperature shows
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.6)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        generation_config = GenerationConfig(**generation, eos_token_id=ends, pad_token_id=pad)
        generation_config.to_json_file(folder / "generation_config.json")
        return folder

    return make


def load(folder):
    """The model in a folder, and its tokenizer."""
    return dapo.load_model(str(folder))


@pytest.fixture
def set_constants(monkeypatch):
    def set_them(**values):
        for name, value in values.items():
            monkeypatch.setattr(dapo, name, value)

    return set_them


@pytest.fixture
def set_reward(monkeypatch):
    """Puts another function in the place of REWARD."""
    return lambda function: monkeypatch.setattr(dapo, "REWARD", function)


@pytest.fixture
def main(monkeypatch):
    """dapo.main as `python dapo.py` calls it: no call sees what an earlier one has set. Afterwards all is as before."""
    for name in dapo.CONSTANTS:
        monkeypatch.setattr(dapo, name, getattr(dapo, name))
    monkeypatch.setattr(sys.modules["__main__"], "__file__", str(ROOT / "dapo.py"), raising=False)
    set_by_main = {}

    def main(argv):
        for name, (before, after) in set_by_main.items():
            if getattr(dapo, name) is after:
                setattr(dapo, name, before)
        before = {name: getattr(dapo, name) for name in dapo.CONSTANTS}
        try:
            return dapo.main(argv)
        finally:
            set_by_main.update({name: (value, getattr(dapo, name)) for name, value in before.items()})

    return main


@pytest.fixture(scope="session")
def questions(tmp_path_factory):
    """Ten questions, and two that are overlong, as a data set in parquet."""
    rows = [{"question": f"Tom has {n} apples.", "answer": f"#### {n}"} for n in range(10, 20)]
    rows += [{"question": f"Tom has {n} apples. " * 60, "answer": f"#### {n}"} for n in (8, 9)]
    path = tmp_path_factory.mktemp("data") / "questions.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return {"path": str(path), "type": "parquet", "input": "question", "output": "answer"}


@pytest.fixture
def settings(questions, make_folder, tmp_path):
    """The command line of a run of two tiny steps, in tmp_path/run."""
    constants = dict(
        MODEL=make_folder(), TRAIN_DATASETS=[questions], EVAL_DATASETS=[questions], OUTPUT_DIR=tmp_path / "run",
        DEVICE="cpu", NUM_STEPS=2, EVAL_EVERY=2, BATCH_SIZE=3, GROUP_SIZE=2, MINI_BATCHES=2, MAX_GEN_BATCHES=2,
        MAX_RESPONSE_LENGTH=8, OVERLONG_BUFFER_LENGTH=4,
    )  # fmt: skip
    return [f"--{name}={value}" for name, value in constants.items()]


@pytest.fixture
def chance(set_reward):
    """A reward by chance, so that a random model has something to learn from."""
    coin = random.Random(0)
    set_reward(lambda solution_str, **others: float(coin.random() < 0.5))


@pytest.fixture
def parity(set_reward):
    """A reward that depends on the response alone: its length has to be odd."""
    set_reward(lambda solution_str, **others: float(len(solution_str) % 2))


def rows(folder, query):
    """What run.db in a folder answers to a query."""
    with contextlib.closing(sqlite3.connect(folder / "run.db")) as db:
        return db.execute(query).fetchall()


@pytest.fixture
def no_pictures(monkeypatch):
    """Drawing takes longer than a tiny run."""
    monkeypatch.setattr(dapo, "draw_metrics", lambda folder: None)


def question(text="q", answer="1", length=5):
    return dapo.Question(text, answer, "test", torch.arange(10, 10 + length))


def response(accuracy=1.0, reward=None, tokens=(4, 5, 6), truncated=False, asked=None, prediction=None):
    reward = 2 * accuracy - 1 if reward is None else reward
    verdict = float(accuracy), float(accuracy), reward, prediction, {}
    return dapo.Response(asked or question(), torch.tensor(tokens), "", truncated, *verdict)

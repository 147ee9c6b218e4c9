import os
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
os.environ["HF_HUB_OFFLINE"] = "1"
CACHE = tempfile.TemporaryDirectory()  # of data sets, so that none from an earlier session is taken for one of these
os.environ["HF_DATASETS_CACHE"] = CACHE.name

import dapo  # noqa: E402  (first: datasets has to come before torch on Windows)
import pytest  # noqa: E402
import torch  # noqa: E402
from architectures import ARCHITECTURES, REFUSED  # noqa: E402
from transformers import AutoTokenizer, GenerationConfig  # noqa: E402
from transformers import AutoModelForCausalLM as Auto  # noqa: E402

dapo.DEVICE = "cpu"
torch.set_num_threads(1)  # faster for tensors this small

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
        model = Auto.from_config(config(**sizes, **ids))
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
    tokenizer = dapo.load_tokenizer(folder)
    return dapo.load_model(folder, tokenizer), tokenizer


@pytest.fixture
def set_constants(monkeypatch):
    def set_them(**values):
        for name, value in values.items():
            monkeypatch.setattr(dapo, name, value)

    return set_them


@pytest.fixture
def set_reward(monkeypatch):
    """Puts a function in the place of the one that REWARD names."""
    return lambda function: monkeypatch.setattr(dapo.record, "load_reward", lambda name: function)


@pytest.fixture
def main(monkeypatch):
    """dapo.main, after which every constant is what it was."""
    for name, value in vars(dapo).copy().items():
        if name.isupper():
            monkeypatch.setattr(dapo, name, value)
    return dapo.main


def question(text="q", answer="1", length=5):
    return dapo.Question(text, answer, "test", torch.arange(10, 10 + length))


def response(accuracy=1.0, reward=None, tokens=(4, 5, 6), truncated=False, asked=None, prediction=None):
    reward = 2 * accuracy - 1 if reward is None else reward
    return dapo.Response(asked or question(), torch.tensor(tokens), "", truncated, accuracy, reward, prediction)

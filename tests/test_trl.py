"""tools/trl.py: its arguments, rows, and rewards, and where TRL is installed, a run in two processes."""

import copy
import json
import os
import pickle
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from test_verl import OTHER
from transformers import AutoModelForCausalLM

import dapo
from tools import evaluate
from tools.trl import arguments, main, reward
from tools.trl import rows as trl_rows

NOT_ARGUMENTS = """MODEL MAX_PROMPT_LENGTH RESUME REWARD OVERLONG_BUFFER_LENGTH OVERLONG_PENALTY_FACTOR
USE_DYNAMIC_SAMPLING MICRO_BATCH_TOKENS GRADIENT_CHECKPOINTING LORA_RANK""".split()


def changed(**constants):
    before, after = arguments(dapo.CONSTANTS), arguments(dapo.CONSTANTS | constants)
    return {name: after[name] for name in after if before[name] != after[name]}


def test_each_constant_changes_its_own_arguments():
    """By hand, for those that are not the same number under another name. A step has 16 · 3 updates by default."""
    for name, value in OTHER.items():
        assert bool(changed(**{name: value})) == (name not in NOT_ARGUMENTS), name
    assert changed(NUM_STEPS=11) == {"max_steps": 11 * 48}
    assert changed(NUM_STEPS=None, NUM_EPOCHS=3) == {"max_steps": -1, "num_train_epochs": 3}
    assert changed(EVAL_EVERY=3) == {"eval_steps": 3 * 48}
    assert changed(EVAL_SAMPLES=4) == {"num_generations_eval": 4, "per_device_eval_batch_size": 4 * 32}
    assert changed(CHECKPOINT_EVERY=2) == {"save_steps": 2 * 48}
    assert changed(SAVE_EVERY=6) == {"save_steps": 6 * 48, "save_total_limit": None}
    assert changed(WARMUP_STEPS=9) == {"warmup_steps": 8 * 48}  # the ninth step of dapo.py has the full rate
    assert changed(WARMUP_STEPS=1) == changed(WARMUP_STEPS=0) == {"warmup_steps": 0}
    assert changed(LOSS_AGG_MODE="seq-mean-token-sum") == {"loss_type": "luspo"}
    assert changed(LOSS_AGG_MODE="seq-mean-token-mean") == {"loss_type": "grpo"}
    assert changed(KL_COEF=0.02) == {"beta": 0.02}
    switches = {"enable_thinking": False}
    assert changed(CHAT_TEMPLATE_KWARGS=switches) == {"chat_template_kwargs": switches}
    assert changed(CLIP_RANGE_LOW=0.1, CLIP_RANGE_HIGH=0.3) == {"epsilon": 0.1, "epsilon_high": 0.3}
    assert changed(GROUP_SIZE=6) == {"num_generations": 6, "per_device_train_batch_size": 12}
    assert changed(BATCH_SIZE=64) == {"per_device_train_batch_size": 32, "per_device_eval_batch_size": 64}
    counted = {"max_steps": 14 * 16, "eval_steps": 2 * 16, "save_steps": 5 * 16, "warmup_steps": 4 * 16}
    parts = {"steps_per_generation": 8, "num_iterations": 2, "logging_steps": 16, "per_device_train_batch_size": 32}
    assert changed(MINI_BATCHES=8, DAPO_EPOCHS=2) == counted | parts


def test_what_no_constant_decides():
    """So that the loss and the update are those of dapo.py: by TRL's documentation, where its defaults differ."""
    assert {
        "use_bias_correction_kl": False, "disable_dropout": True, "lr_scheduler_type": "constant_with_warmup",
        "loss_type": "dapo", "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "eval_on_start": True,
        "router_aux_loss_coef": 0.0, "eval_strategy": "steps",
    }.items() <= arguments(dapo.CONSTANTS | {"DEVICE": "cpu"}).items()  # fmt: skip


def test_the_processes_share_a_batch():
    sizes = {n: arguments(dapo.CONSTANTS, n)["per_device_train_batch_size"] for n in (1, 2, 16)}
    assert sizes == {1: 16, 2: 8, 16: 1}


@pytest.mark.parametrize("processes, constants", [(3, {}), (32, {}), (1, {"MINI_BATCHES": 7}), (2, {"BATCH_SIZE": 31})])
def test_batches_that_do_not_divide_are_refused(processes, constants, capsys):
    with pytest.raises(SystemExit) as end:
        arguments(dapo.CONSTANTS | constants, processes)
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.count("\n") == 1 and "BATCH_SIZE * GROUP_SIZE = " in said
    assert f"MINI_BATCHES * processes = {constants.get('MINI_BATCHES', 16) * processes}" in said


def refused(words, capsys):
    """What main says in its one line before it ends with status 2."""
    with pytest.raises(SystemExit) as end:
        main([*words])
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.count("\n") == 1
    return said


@pytest.fixture
def constants(monkeypatch):
    """Puts back what main sets."""
    for name in dapo.CONSTANTS:
        monkeypatch.setattr(dapo, name, getattr(dapo, name))


def test_what_cannot_begin_is_said_in_one_line(constants, monkeypatch, tmp_path, capsys):
    assert "'toy' is neither a recipe.py nor --NAME=VALUE" in refused(["toy"], capsys)
    monkeypatch.setitem(sys.modules, "trl", None)  # as if it were not installed
    assert "TRL is not installed: pip install trl==1.16.0" in refused([], capsys)
    monkeypatch.setitem(sys.modules, "trl", SimpleNamespace(GRPOConfig=None, GRPOTrainer=None))
    (tmp_path / "model.safetensors").touch()
    assert "exists already" in refused([f"--OUTPUT_DIR={tmp_path}"], capsys)
    assert [*tmp_path.iterdir()] == [tmp_path / "model.safetensors"]
    assert "has to be a multiple of" in refused(["--BATCH_SIZE=31", f"--OUTPUT_DIR={tmp_path / 'new'}"], capsys)


@pytest.mark.parametrize("template, switches", [("Solve it: {question}", {}), ("{question}", {"thinking": False})])
def test_rows_are_what_dapo_asks(template, switches, set_constants, tokenizer, tmp_path):
    """With a question twice, two that differ in the system message alone, and one that is too long."""
    set_constants(PROMPT_TEMPLATE=template, CHAT_TEMPLATE_KWARGS=switches, MAX_PROMPT_LENGTH=60)
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template += "{% if thinking is defined and not thinking %}####{% endif %}"
    chats = [[{"role": "user", "content": text}] for text in ("1+1?", "2+2?", "1+1?", "3+3? " * 40)]
    chats[1].insert(0, {"role": "system", "content": "Be brief."})
    chats.append([{"role": "system", "content": "Be long."}, chats[1][1]])
    (tmp_path / "q.json").write_text("\n".join(json.dumps({"prompt": chat, "answer": "2"}) for chat in chats))
    sources = [{"path": str(tmp_path / "q.json"), "type": "json", "input": "prompt", "output": "answer"}]
    found, questions = trl_rows(sources, tokenizer), dapo.load_questions(sources, tokenizer)
    assert len(found) == len(questions) == 3
    assert [row["prompt"][0]["content"] for row in found[1:]] == ["Be brief.", "Be long."]
    for row, question in zip(found, questions):
        kind = {"add_generation_prompt": True, "return_dict": True} | switches
        assert tokenizer.apply_chat_template([row["prompt"]], **kind)["input_ids"] == [question.prompt.tolist()]
        assert question.prompt_end.endswith("####") == bool(switches)
        assert str(pickle.loads(row["question"])) == str(question) and question.answer == "2"


def test_arrow_keeps_what_differs_from_row_to_row(set_reward, tokenizer, tmp_path):
    """No column that a question lacks, and the types of the others."""
    from datasets import Dataset

    set_reward(lambda **columns: 0.0)
    lines = ['{"q": "1+1?", "a": "2", "level": 3}', '{"q": "2+2?", "a": "4", "level": "hard", "tests": ["x", 5]}']
    (tmp_path / "q.json").write_text("\n".join(lines))
    source = {"path": str(tmp_path / "q.json"), "type": "json", "input": "q", "output": "a"}
    found = Dataset.from_list(trl_rows([source], tokenizer))
    columns = [pickle.loads(row["question"]).columns for row in found]
    assert columns == [{"level": 3}, {"level": "hard", "tests": ["x", 5]}]


@pytest.mark.parametrize("buffer, penalty", [(4, [0, -0.35, -0.7, 0]), (0, [0, 0, 0, 0])])
def test_rewards_are_scores_with_the_penalty(buffer, penalty, set_constants, set_reward, tokenizer):
    """REWARD may give no verdict, which is no reward of 0, and whatever dapo.py tells it, it is told here, too."""
    told, logged = [], []

    def judge(**columns):
        told.append(columns)
        return {"0": None, "1": {"score": 2.5, "acc": False}, "2": -1.0, "3": 0.5}[columns["ground_truth"]]

    set_constants(MAX_RESPONSE_LENGTH=10, OVERLONG_BUFFER_LENGTH=buffer, OVERLONG_PENALTY_FACTOR=0.7)
    set_reward(judge)
    ids = [tokenizer("1" * 9 + "2")["input_ids"][:length] for length in (10, 8, 10, 6)]
    asked = [dapo.Question("abcd"[n], "0123"[n], "wxyz"[n], None, {"level": n}, 0, "<think>") for n in range(4)]
    columns = {"question": [*map(pickle.dumps, asked)], "completion_ids": ids, "prompts": []}
    given = reward(tokenizer, log_metric=lambda *pair: logged.append(pair), **columns)
    assert given[0] is None
    assert given[1:] == pytest.approx([score + less for score, less in zip((2.5, -1.0, 0.5), penalty[1:])])
    assert logged == [("accuracy", 0.0), ("accuracy", 0.0), ("accuracy", 1.0)]
    info = {"level": 1, "question": "b", "prompt": "<think>"}
    assert told[1] == {"data_source": "x", "solution_str": "1" * 8, "ground_truth": "1", "extra_info": info}


@pytest.fixture
def trl():
    return pytest.importorskip("trl", reason="TRL is not installed: pip install trl==1.16.0 in its own environment")


@pytest.mark.parametrize("recipe", ["", "gsm8k", "dapo_math", "paper"])
def test_trl_accepts_the_arguments(recipe, trl, constants, tmp_path):
    others = {name: value for name, value in OTHER.items() if name != "REWARD"} | {"EVAL_SAMPLES": 3}
    words = [ROOT / f"recipes/{recipe}.py"] if recipe else [f"--{name}={value}" for name, value in others.items()]
    dapo.read_command_line([*map(str, words), "--DEVICE=cpu"])
    given = arguments(vars(dapo) | {"OUTPUT_DIR": str(tmp_path)})
    config = trl.GRPOConfig(**given)
    for name, value in given.items():
        assert getattr(config, name) == ([] if value == "none" else value), name
    assert config.generation_batch_size == dapo.BATCH_SIZE * dapo.GROUP_SIZE
    # What tools/trl.py leaves to TRL, because it is as in dapo.py
    sampling = {"top_k": 0, "top_p": 1.0, "min_p": None, "repetition_penalty": 1.0, "use_vllm": False}
    loss = {"scale_rewards": "group", "importance_sampling_level": "token", "delta": None}
    for name, value in (sampling | loss | {"shuffle_dataset": True, "gradient_accumulation_steps": 1}).items():
        assert getattr(config, name) == value, name


SCRIPT = """
import json, os, pickle, sys
import torch, trl
from tools import trl as tool

folder, *words = sys.argv[1:]
rank, ours, trains = os.environ["RANK"], tool.reward, trl.GRPOTrainer.train

def reward(tokenizer, **columns):
    given = ours(tokenizer, **columns)
    with open(f"{folder}/{rank}.jsonl", "a") as file:
        asked = [[q.text, q.answer, q.source] for q in map(pickle.loads, columns["question"])]
        file.write(json.dumps([*zip(*asked), columns["completion_ids"], given]) + "\\n")
    return given

def train(self):
    row = self.train_dataset[0]
    assert self._tokenize_prompts([row["prompt"]])[0] == [pickle.loads(row["question"]).prompt.tolist()]
    trains(self)
    assert torch.distributed.get_backend() == "gloo" and torch.distributed.get_world_size() == 2
    torch.save(self.accelerator.unwrap_model(self.model).state_dict(), f"{folder}/{rank}.pt")

tool.reward, trl.GRPOTrainer.train = reward, train
tool.main(words)
"""


def merged(weights, rank):
    """The weights of a model with adapters, by the definition of LoRA."""
    weights = {name.removeprefix("base_model.model.").replace(".base_layer", ""): w for name, w in weights.items()}
    adapters = {name: weights.pop(name) for name in [*weights] if ".lora_" in name}
    for name in adapters:
        layer, adapter, rest = name.partition(".lora_A")
        if adapter:
            weights[f"{layer}.weight"] += 32 / rank * adapters[f"{layer}.lora_B{rest}"] @ adapters[name]
    return weights


@pytest.mark.slow
@pytest.mark.parametrize("lora_rank", [0, 4])
def test_two_processes_train_the_toy(lora_rank, trl, constants, tokenizer, tmp_path, capsys):
    """Two steps: they share each batch, read the prompts and get the rewards of dapo.py, and end with the same weights;
    with LoRA, those of the linear layers. The chat template has a switch, without which the toy is asked otherwise."""
    shutil.copytree(ROOT / "toy", tmp_path / "toy")
    with (tmp_path / "toy" / "chat_template.jinja").open("a") as file:
        file.write("{% if not plain %}####{% endif %}")
    run, held_out = tmp_path / "run", tmp_path / "held_out.json"
    lines = [{"q": f"Tom has {n} apples. He eats 1. How many are left?", "a": str(n - 1)} for n in range(3, 10)]
    held_out.write_text("\n".join(map(json.dumps, lines)))
    source = [{"path": str(held_out), "type": "json", "input": "q", "output": "a"}]
    settings = dict(
        MODEL=tmp_path / "toy", EVAL_DATASETS=source, OUTPUT_DIR=run, DEVICE="cpu", NUM_STEPS=2, EVAL_EVERY=2,
        BATCH_SIZE=4, LORA_RANK=lora_rank, CHAT_TEMPLATE_KWARGS={"plain": True},
        GROUP_SIZE=4, MINI_BATCHES=2, DAPO_EPOCHS=2, LEARNING_RATE=1e-3, WARMUP_STEPS=0, MAX_RESPONSE_LENGTH=24,
        OVERLONG_BUFFER_LENGTH=20, OVERLONG_PENALTY_FACTOR=0.7, TEMPERATURE=1.3,
    )  # fmt: skip
    words = [f"--{name}={value}" for name, value in settings.items()]
    (tmp_path / "script.py").write_text(SCRIPT)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*launch, tmp_path / "script.py", tmp_path, *words], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr

    # Each process judges half of a batch, and its rewards are those of dapo.py.
    dapo.read_command_line(words)
    shape = dapo.MAX_RESPONSE_LENGTH, dapo.OVERLONG_BUFFER_LENGTH, dapo.OVERLONG_PENALTY_FACTOR
    judged = [[json.loads(line) for line in (tmp_path / f"{rank}.jsonl").read_text().splitlines()] for rank in (0, 1)]
    in_training = [[call for call in calls if len(call[0]) == 8] for calls in judged]
    assert len(in_training[0]) == len(in_training[1]) == 2
    for texts, answers, sources, ids, given in [*in_training[0], *in_training[1]]:
        assert [len(set(texts[first : first + 4])) for first in (0, 4)] == [1, 1]  # two whole groups
        asked = [dapo.Question(*row, None) for row in zip(texts, answers, sources)]
        verdicts = dapo.judge(asked, tokenizer.batch_decode(ids, skip_special_tokens=True))
        penalties = [dapo.overlong_penalty(len(row), *shape) for row in ids]
        assert given == pytest.approx([verdict["reward"] + less for verdict, less in zip(verdicts, penalties)])
    assert {reward for calls in in_training for call in calls for reward in call[-1]} - {-1, 1}  # some are penalized

    # The weights are no longer the toy's, and the same in both processes and in the saved model.
    one, other = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    saved = AutoModelForCausalLM.from_pretrained(run, dtype=torch.float32).state_dict()
    before = AutoModelForCausalLM.from_pretrained(ROOT / "toy", dtype=torch.float32).state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert all(torch.allclose(weights, saved[name], atol=1e-7) for name, weights in merged(one, lora_rank).items())
    kept = [name for name in before if torch.equal(saved[name], before[name])]
    assert kept == [name for name in before if lora_rank and not name.endswith("_proj.weight")]
    capsys.readouterr()
    evaluate.main([str(run), *words])
    assert "accuracy" in capsys.readouterr().out

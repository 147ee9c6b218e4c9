"""tools/verl.py: what it writes, and where verl is installed, what verl itself makes of it."""

import asyncio
import contextlib
import itertools
import json
import os
import shutil
import sqlite3
import subprocess
import sys

import numpy
import pyarrow.parquet
import pytest
import torch
from conftest import ROOT, load
from transformers import AutoTokenizer

import dapo
from tools.verl import GPUS, NEEDED_TOKENS, argument, hydra, missing_tokens, overrides, warnings
from tools.verl import main as hand_over_to_verl
from tools.verl_metrics import main as read_verls_metrics

RECIPES = ("gsm8k", "dapo_math", "paper")


@pytest.fixture
def rows(tmp_path):
    """Chat questions with dotted columns and a repeated one, and word problems with worked solutions."""
    chats = [
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": f"{n} plus 1?"}] for n in (1, 2, 1)
    ]
    lines = [{"prompt": chat, "reward_model": {"ground_truth": n}} for chat, n in zip(chats, ("2", "3", "2"))]
    (tmp_path / "chat.json").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "plain.csv").write_text(
        "question,answer\nTom has 5 eggs.,He has 5.\\n#### 5\nMia has $\\frac12$ egg.,0.5\n"
    )
    chat = {"path": str(tmp_path / "chat.json"), "type": "json", "input": "prompt"}
    plain = {"path": str(tmp_path / "plain.csv"), "type": "csv", "input": "question", "output": "answer"}
    return [f"--TRAIN_DATASETS={[chat | {'output': 'reward_model.ground_truth'}, plain]}", f"--EVAL_DATASETS={[plain]}"]


@pytest.fixture
def hand_over(main, tmp_path, rows, monkeypatch):
    """Runs tools/verl.py on the rows above; gives its folder, whose name has signs that shells and Hydra know."""

    def hand_over(*words):
        folder = tmp_path / "verl run=1"
        hand_over_to_verl([*map(str, words), *rows, "--out", str(folder)])
        return folder

    return hand_over


def test_data_have_the_same_questions_and_answers(hand_over, tokenizer):
    folder = hand_over("--PROMPT_TEMPLATE=boxed")
    train, test = (pyarrow.parquet.read_table(folder / name).to_pylist() for name in ("train.parquet", "test.parquet"))
    questions = dapo.load_questions(dapo.TRAIN_DATASETS, tokenizer)
    assert len(train) == len(questions) == 4 and len(test) == 2
    for index, (row, question) in enumerate(zip(train, questions)):
        assert row["extra_info"] == {"split": "train", "index": index, "question": question.text}
        assert row["data_source"] == question.source and row["reward_model"]["ground_truth"] == question.answer
        asked = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=True)["input_ids"]
        assert asked == question.prompt.tolist()
    assert train[0]["prompt"][0] == {"role": "system", "content": "Be brief."}
    assert (folder / "reward.py").read_text() == (ROOT / "reward.py").read_text()


def score(data_source, solution_str, ground_truth, extra_info=None):
    """Another reward function."""


OTHER = dict(
    MAX_PROMPT_LENGTH=100, TRUST_REMOTE_CODE=True, OUTPUT_DIR="outputs/other", RESUME=False, SEED=7, NUM_STEPS=11,
    EVAL_EVERY=3, EVAL_SAMPLES=4, SAVE_EVERY=6, CHECKPOINT_EVERY=2, BATCH_SIZE=64, GROUP_SIZE=6,
    MAX_RESPONSE_LENGTH=80, TEMPERATURE=0.9, USE_DYNAMIC_SAMPLING=False, REWARD=score,
    OVERLONG_BUFFER_LENGTH=0, OVERLONG_PENALTY_FACTOR=0.5, CLIP_RANGE_LOW=0.1, CLIP_RANGE_HIGH=0.3,
    LOSS_AGG_MODE="seq-mean-token-sum", KL_COEF=0.02, ENTROPY_COEF=0.01, LEARNING_RATE=1e-6, WARMUP_STEPS=9,
    WEIGHT_DECAY=0.2, MAX_GRAD_NORM=0.5, DAPO_EPOCHS=2, MINI_BATCHES=8, MICRO_BATCH_TOKENS=999,
    GRADIENT_CHECKPOINTING=True, MODEL="some/model", LORA_RANK=4,
    CHAT_TEMPLATE_KWARGS={"enable_thinking": False, "effort": "it's low", "budgets": {"words": [10, None]}},
)  # fmt: skip


def test_each_constant_changes_its_own_keys():
    """By hand, for those that are not the same number under another name."""
    before = overrides(dapo.CONSTANTS)

    def changed(**constants):
        after = overrides(dapo.CONSTANTS | constants)
        return {key.rpartition(".")[2]: after[key] for key in after if before.get(key) != after[key]}

    for name, value in OTHER.items():
        assert changed(**{name: value}), name
    assert changed(NUM_STEPS=None, NUM_EPOCHS=3) == {"total_training_steps": None, "total_epochs": 3}
    assert changed(MINI_BATCHES=5) == {"ppo_mini_batch_size": 7}  # questions: 32 in five parts
    assert changed(BATCH_SIZE=8, MINI_BATCHES=64) == {"train_batch_size": 8, "ppo_mini_batch_size": 1}
    assert changed(EVAL_SAMPLES=4, TEMPERATURE=0.5)["do_sample"] is True
    assert "val_kwargs.temperature" not in str(changed(TEMPERATURE=0.5))
    assert changed(SAVE_EVERY=6) == {"save_freq": 6, "max_actor_ckpt_to_keep": None}
    assert changed(MAX_PROMPT_LENGTH=100) == {"max_prompt_length": 100, "max_model_len": 100 + 96}
    assert changed(KL_COEF=0.02) == {"use_kl_loss": True, "kl_loss_coef": 0.02}
    assert changed(MICRO_BATCH_TOKENS=100) == {"ppo_max_token_len_per_gpu": 256 + 96}  # of the longest response
    short = dapo.CONSTANTS | dict(MICRO_BATCH_TOKENS=10, MAX_PROMPT_LENGTH=20, MAX_RESPONSE_LENGTH=30)
    assert overrides(short)["actor_rollout_ref.actor.ppo_max_token_len_per_gpu"] == 128  # verl's padding rows
    assert changed(OVERLONG_BUFFER_LENGTH=0) == {"enable": False, "len": 0}
    assert changed(REWARD=score) == {"path": "$here/test_verl.py", "name": "score"}
    adapters = {"lora_rank": 4, "lora_alpha": 32, "target_modules": "all-linear", "load_format": "safetensors"}
    assert changed(LORA_RANK=4) == adapters | {"save_contents": ["model", "optimizer", "extra"]}
    assert changed(LORA_RANK=4, LORA_ALPHA=8.0)["lora_alpha"] == 8 and not changed(LORA_ALPHA=8.0)
    assert changed(CHAT_TEMPLATE_KWARGS={"a": False}) == {"apply_chat_template_kwargs": {"a": False}}
    assert changed(OUTPUT_DIR="/data/x") == {"default_local_dir": "/data/x", "experiment_name": "x"}


def test_a_run_stands_for_the_model_that_it_saved_last(make_folder, tmp_path):
    shutil.copytree(make_folder(), tmp_path / "step_3")
    (tmp_path / "run.db").touch()
    found = overrides(dapo.CONSTANTS | {"MODEL": str(tmp_path)})
    assert found["actor_rollout_ref.model.path"] == str(tmp_path / "step_3")


def test_what_verl_cannot_do_is_said_or_refused(hand_over, capsys, tmp_path):
    hand_over("--USE_OVERLONG_FILTERING=True", "--REST_EPOCHS=2")
    said = capsys.readouterr().out
    assert "USE_OVERLONG_FILTERING=True has no counterpart in verl" in said and "REST_EPOCHS=2 has no" in said
    (tmp_path / "lists.py").write_text(
        "def f(data_sources, solution_strs, ground_truths, extra_infos):\n    return []\n"
    )
    with pytest.raises(SystemExit) as end:
        hand_over(f"--REWARD={tmp_path / 'lists.py'}:f")
    assert end.value.code == 2 and "takes lists" in capsys.readouterr().err


def test_other_columns_go_along(hand_over, tmp_path, monkeypatch):
    """For a reward function of one's own, of any type that parquet has; None where a data set lacks the column."""
    (tmp_path / "one.json").write_text('{"q": "1?", "a": "1", "level": 3, "extra_info": {"tests": [{"in": "x"}]}}')
    (tmp_path / "other.json").write_text('{"q": "2?", "a": "2", "unit": "kg"}')
    (tmp_path / "own.py").write_text("def score(data_source, solution_str, ground_truth, extra_info=None): 0")
    kind = {"type": "json", "input": "q", "output": "a"}
    files = [kind | {"path": str(tmp_path / name)} for name in ("one.json", "other.json")]
    words = [f"--EVAL_DATASETS={files}", f"--REWARD={tmp_path / 'own.py'}:score", "--out", str(tmp_path / "new")]
    hand_over_to_verl([f"--TRAIN_DATASETS={files}", *words])
    found = pyarrow.parquet.read_table(tmp_path / "new" / "train.parquet").to_pylist()
    one = {"level": 3, "tests": [{"in": "x"}], "unit": None, "split": "train", "index": 0, "question": "1?"}
    other = {"level": None, "tests": None, "unit": "kg", "split": "train", "index": 1, "question": "2?"}
    assert [row["extra_info"] for row in found] == [one, other]


@pytest.mark.parametrize("value", ['"Level 5"', "true", "[5]", '{"of": 5}'])
def test_columns_of_two_types_are_named(value, main, tmp_path, capsys):
    (tmp_path / "q.json").write_text('{"q": "1?", "a": "1", "level": 5}\n{"q": "2?", "a": "2", "level": %s}' % value)
    (tmp_path / "own.py").write_text("def score(data_source, solution_str, ground_truth, extra_info=None): 0")
    source = [{"path": str(tmp_path / "q.json"), "type": "json", "input": "q", "output": "a"}]
    words = [f"--TRAIN_DATASETS={source}", f"--EVAL_DATASETS={source}", f"--REWARD={tmp_path / 'own.py'}:score"]
    with pytest.raises(SystemExit) as end:
        hand_over_to_verl([*words, "--out", str(tmp_path / "new")])
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.count("\n") == 1 and "column 'level'" in said
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("words", [["--LORA_RANK=4", "--LORA_ALPHA=0.5"], ["--CHAT_TEMPLATE_KWARGS={'think': False}"]])
def test_what_verl_would_not_see_is_refused(words, hand_over, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        hand_over(*words)
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.count("\n") == 1 and words[-1][2:].partition("=")[0] in said
    assert not (tmp_path / "verl run=1").exists()


def test_what_no_constant_decides():
    """So that the loss, the advantage, the filter and the sampling are those of dapo.py: by verl's documentation."""
    found = overrides(dapo.CONSTANTS)
    A = "actor_rollout_ref."
    assert {
        "algorithm.adv_estimator": "grpo", "algorithm.norm_adv_by_std_in_grpo": True,
        "algorithm.use_kl_in_reward": False, "algorithm.filter_groups.metric": "acc",
        "reward.reward_manager.name": "dapo", "data.filter_overlong_prompts": True, A + "actor.use_dynamic_bsz": True,
        A + "actor.kl_loss_type": "low_var_kl", A + "actor.shuffle": True, A + "rollout.name": "vllm",
        A + "rollout.top_k": -1, A + "rollout.top_p": 1.0, A + "rollout.val_kwargs.top_k": -1,
        A + "rollout.val_kwargs.top_p": 1.0, A + "actor.strategy": "fsdp2", "trainer.logger": ["console", "file"],
    }.items() <= found.items()  # fmt: skip
    assert found[A + "actor.clip_ratio_c"] > 2.72**20  # past where the ratio itself is held


def said_of(questions=6000, environment=None, **constants):
    return list(warnings(dapo.CONSTANTS | constants, questions, environment or {}))


def test_sizes_that_verl_stumbles_over_are_named():
    """With the numbers of workers that would do; the defaults are fine."""
    assert said_of() == said_of(environment={"GPUS": "4", "NODES": "4"}) == []
    (line,) = said_of(environment={"GPUS": "4", "NODES": "8"})  # 2 questions of 8 responses, 32 workers
    assert "BATCH_SIZE=32, MINI_BATCHES=16, GROUP_SIZE=8: a mini-batch has 16 responses" in line
    assert "32 workers (GPUS=4, NODES=8) cannot share" in line and line.endswith("has to be one of 1, 2, 4, 8, 16")
    (line,) = said_of(GROUP_SIZE=6)
    assert "12 responses" in line and "8 workers (GPUS=8, NODES=1)" in line
    (line,) = said_of(BATCH_SIZE=30, MINI_BATCHES=4)  # 7.5 questions
    assert "verl makes 4 mini-batches of 8 questions, padded" in line
    (line,) = said_of(BATCH_SIZE=10, MINI_BATCHES=6)
    assert "verl makes 5 mini-batches of 2 questions" in line
    (line,) = said_of(questions=31)
    assert "TRAIN_DATASETS has 31 questions" in line and "BATCH_SIZE=32" in line and not said_of(questions=32)


def test_run_sh_refuses_what_would_hang(hand_over):
    """In one line and before verl is asked, which this environment need not have."""

    def refused(folder=None, **environment):
        environment |= {"PATH": os.environ["PATH"]}
        command = ["bash", str((folder or written) / "run.sh")]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 2 and not done.stdout
        (line,) = done.stderr.splitlines()
        return line.removeprefix("error: ")

    written = hand_over("--GROUP_SIZE=6")  # 12 responses in a mini-batch
    assert refused() == "GPUS=8 times NODES=1 does not divide the 12 responses of a mini-batch"
    assert refused(GPUS="5", NODES="2") == "GPUS=5 times NODES=2 does not divide the 12 responses of a mini-batch"
    assert refused(GPUS="6", NODES="2", TENSOR_PARALLEL="4") == "TENSOR_PARALLEL=4 does not divide GPUS=6"
    assert refused(GPUS="2", TENSOR_PARALLEL="4") == "TENSOR_PARALLEL=4 does not divide GPUS=2"
    for wrong in "0", "08", "-1", "two", "1.5":
        assert refused(NODES=wrong) == f"NODES={wrong} has to be a whole number above 0"
    for sign in '"', "\\", "${x}":
        shutil.copytree(written, elsewhere := written.with_name(f"a{sign}b"))
        assert "no folder may have" in refused(elsewhere, GPUS="2")


def test_numbers_of_gpus_that_are_none(hand_over, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("GPUS", "many")
    with pytest.raises(SystemExit) as end:
        hand_over()
    assert end.value.code == 2 and "GPUS=many in the environment" in capsys.readouterr().err
    assert not (tmp_path / "verl run=1").exists()


def test_a_model_without_the_tokens_that_verl_needs(hand_over, make_folder, capsys):
    folder = make_folder()
    hand_over(f"--MODEL={folder}")
    assert "<|im_end|>" not in capsys.readouterr().out
    for name in "tokenizer.json", "tokenizer_config.json", "chat_template.jinja":
        text = (folder / name).read_text()
        (folder / name).write_text(text.replace("<|im_end|>", "<|over|>"))
    hand_over(f"--MODEL={folder}")
    said = capsys.readouterr().out
    assert f"MODEL={folder} is of type qwen2" in said and "needs the token <|im_end|>" in said


@pytest.mark.parametrize(
    "value, written",
    [
        (7, "7"),
        (2e-05, "2e-05"),
        (True, "True"),
        (None, "null"),
        ("2", '"2"'),
        ("null", '"null"'),
        ("/data/模型", '"/data/模型"'),
        ('say "a"', r'"say \"a\""'),
        (r"a\b", r'"a\b"'),
        ("a\\", '"a\\\\"'),
        ("${x}", r'"\${x}"'),
        (["console", "wandb"], '["console","wandb"]'),
        ({"thinking": False, "of": {"a": "b", "c": [1]}}, '{thinking:False,of:{a:"b",c:[1]}}'),
    ],
)
def test_values_in_hydras_grammar(value, written):
    assert hydra(value) == written


def test_what_the_shell_fills_in(tmp_path):
    """The folder and the environment, and nothing else; what comes out is what Hydra reads."""
    words = [argument("a", "$here/x y"), argument("b", "it's $HOME `ls` 模型"), argument("c", GPUS)]
    script = 'here="/data/my run"; printf "%s\\n" ' + " ".join(words)
    out = subprocess.run(["bash", "-c", script], env={"GPUS": "3"}, capture_output=True, text=True, check=True).stdout
    assert out.splitlines() == ['a="/data/my run/x y"', 'b="it\'s $HOME `ls` 模型"', "c=3"]


@pytest.mark.parametrize("words", [[], ["--out"], ["--out="], ["--SEED=1"]])
def test_without_a_folder_it_says_so(words, capsys):
    with pytest.raises(SystemExit) as end:
        hand_over_to_verl(words)
    assert end.value.code == 2 and "say where to: --out FOLDER" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written(rows, main, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as end:
        hand_over_to_verl([*rows, f"--out={tmp_path / 'file'}"])
    assert end.value.code == 2 and "cannot be written" in capsys.readouterr().err


def write_metrics(folder, start, *lines):
    folder.mkdir(exist_ok=True)
    text = "".join(json.dumps({"step": step, "data": data}) + "\n" for step, data in lines)
    (folder / f"metrics_2026_{start}.jsonl").write_text(text)


def read_back(folder):
    read_verls_metrics([str(folder)])
    with contextlib.closing(sqlite3.connect(folder / "run.db")) as db:
        return {(step, name): value for step, name, value in db.execute("SELECT step, name, value FROM metrics")}


def test_verls_metrics_are_read_by_our_names(hand_over, capsys):
    """By hand: sources of 2 questions and of 1, lengths below and at the limit of 96, and a line half written."""
    folder = hand_over()
    sources = ["a", "a", "b.c/1"]
    pyarrow.parquet.write_table(pyarrow.table({"data_source": sources}), folder / "test.parquet")
    trained = {"critic/score/mean": -0.5, "response_length/clip_ratio": 0.25, "timing_s/step": 2.0, "other": 7}
    held_out = {"val-core/a/acc/mean@1": 0.5, "val-core/b.c/1/acc/mean@1": 1.0, "val-aux/a/acc/mean@1": 9}
    write_metrics(folder, 1, (0, held_out), (1, trained | {"response_length/max": 95}))
    found = read_back(folder)
    assert found[0, "eval/accuracy"] == pytest.approx(2 / 3)
    assert found[1, "truncated_fraction"] == 0 and found[1, "reward/mean"] == -0.5 and found[1, "time/step"] == 2
    assert len(found) == 5 and "metrics of 2 steps" in capsys.readouterr().out

    sampled = {"val-core/a/acc/mean@4": 0.25, "val-core/a/acc/best@4/mean": 1.0}  # b.c/1 was too long to be asked
    write_metrics(folder, 2, (1, sampled), (2, trained | {"response_length/max": 96}))
    with (folder / "metrics_2026_2.jsonl").open("a") as file:
        file.write('{"step": 3, "da')
    resumed = read_back(folder)
    assert resumed[2, "truncated_fraction"] == 0.25 and resumed[1, "eval/avg@4"] == pytest.approx(0.25)
    assert found.items() <= resumed.items() and max(step for step, _ in resumed) == 2
    write_metrics(folder, 3, (0, held_out))  # begun anew
    assert {step for step, _ in read_back(folder)} == {0}


@pytest.mark.parametrize("words", [[], ["--SEED=1"], ["folder", "--out=new"]])
def test_reading_takes_a_folder_and_nothing_else(words, capsys):
    with pytest.raises(SystemExit) as end:
        read_verls_metrics(words)
    assert end.value.code == 2 and "takes a folder that verl has trained in" in capsys.readouterr().err


def test_nothing_to_read(hand_over, tmp_path, capsys):
    for folder in tmp_path, hand_over():
        with pytest.raises(SystemExit) as end:
            read_verls_metrics([str(folder)])
        assert end.value.code == 2 and f"{folder}: verl's metrics cannot be read" in capsys.readouterr().err
        assert not (folder / "run.db").exists()


@pytest.fixture
def verl():
    return pytest.importorskip("verl", reason="verl is not installed: pip install verl==0.9.1 in its own environment")


def composed(folder, *more):
    """run.sh's settings as verl's trainer reads them: `bash run.sh --cfg job` prints them."""
    environment = os.environ | {"PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}", "GPUS": "2"}
    command = ["bash", str(folder / "run.sh"), *more, "--cfg", "job"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    from omegaconf import OmegaConf

    return OmegaConf.create(done.stdout)


@pytest.mark.parametrize("recipe", ["", *RECIPES])
def test_verl_accepts_every_key(recipe, verl, hand_over, tmp_path):
    (tmp_path / "code_reward.py").write_text("def score(data_source, solution_str, ground_truth, extra_info=None): 0")
    others = OTHER | {"REWARD": f"{tmp_path}/code_reward.py:score"}
    words = [ROOT / f"recipes/{recipe}.py"] if recipe else [f"--{name}={value}" for name, value in others.items()]
    folder = hand_over(*words)
    config = composed(folder)
    from omegaconf import OmegaConf
    from verl.trainer.ppo.utils import need_critic, need_reference_policy
    from verl.utils.config import validate_config

    for key, value in overrides(vars(dapo)).items():
        found = OmegaConf.select(config, key.lstrip("+"))
        found = OmegaConf.to_container(found) if OmegaConf.is_config(found) else found
        expected = str(value).replace("$here", str(folder)) if isinstance(value, str) else value
        assert str(value).startswith("$") and "/" not in value or found == expected, key
    assert config.trainer.n_gpus_per_node == 2 and config.trainer.nnodes == 1
    config.actor_rollout_ref.rollout.name = "other"  # for LoRA, it would ask vLLM, which is not installed here
    validate_config(config, need_reference_policy(config), need_critic(config))


@pytest.mark.parametrize("template", ["the model's", "none", "with a switch"])
def test_verl_reads_the_same_prompts(template, verl, hand_over, make_folder):
    """With its own data set class, chat template, and what its agent loop makes of a prompt."""
    from verl.utils.dataset.rl_dataset import RLHFDataset
    from verl.utils.tokenizer.continuous_token_wiring import create_continuous_token_builder

    model, switched = make_folder(), template == "with a switch"
    if template == "none":
        (model / "chat_template.jinja").unlink()
    if switched:
        with (model / "chat_template.jinja").open("a") as file:
            file.write("{% if not thinking %}{{ sign }}{% endif %}")
    switches = ["--CHAT_TEMPLATE_KWARGS={'thinking': False, 'sign': '####'}"] if switched else []
    folder = hand_over(f"--MODEL={model}", "--PROMPT_TEMPLATE=Solve it: {question}", *switches)
    config, tokenizer = composed(folder), load(model)[1]
    questions = dapo.load_questions(dapo.TRAIN_DATASETS, tokenizer)
    assert all(question.prompt_end.endswith("####") == switched for question in questions)
    if custom := config.actor_rollout_ref.model.custom_chat_template:
        tokenizer.chat_template = custom
    assert bool(custom) == (template == "none")
    switches = config.data.apply_chat_template_kwargs
    builder = create_continuous_token_builder(tokenizer, hf_model_type="qwen2", chat_template_kwargs=switches)
    config.data.max_prompt_length = max(len(question.prompt) for question in questions)
    found = RLHFDataset(str(folder / "train.parquet"), tokenizer, config.data)
    assert len(found) == len(questions)
    for row, question in zip(found, questions):
        assert builder.build_initial_tokens(row["raw_prompt"]) == question.prompt.tolist()


def test_verl_gives_the_same_rewards(verl, hand_over, make_folder):
    """Its loader of reward.py and its DAPO reward manager, on responses of every length, right and wrong."""
    from tensordict import TensorDict
    from verl import DataProto
    from verl.trainer.ppo.reward import load_reward_manager

    model, tokenizer = load(make_folder())
    folder = hand_over(
        f"--MODEL={ROOT / 'toy'}",
        "--MAX_RESPONSE_LENGTH=40",
        "--OVERLONG_BUFFER_LENGTH=16",
        "--OVERLONG_PENALTY_FACTOR=0.7",
    )
    (question, *_) = dapo.load_questions(dapo.EVAL_DATASETS, tokenizer)
    texts = ["#### 5", "#### 6", r"So it is \boxed{\frac{10}{2}}", "5", "The answer is 5"]
    tokens = []
    for length in (12, 23, 24, 25, 30, 39, 40):  # the punishment begins after 24
        for ids in map(torch.tensor, tokenizer(texts)["input_ids"]):
            if len(ids) <= length:
                tokens.append(torch.cat([ids[:1].new_full([length - len(ids)], 9), ids]))
    decoded = tokenizer.batch_decode(tokens, skip_special_tokens=True)
    asked = [question] * len(tokens)
    judged = zip(asked, tokens, decoded, itertools.repeat(False), dapo.judge(asked, decoded))
    responses = [dapo.Response(*row, **verdict) for *row, verdict in judged]
    dapo.shape_rewards([responses])
    ours = [response.reward for response in responses]

    async def verls(manager, ids):
        mask = torch.ones(1, len(question.prompt) + len(ids) + 3, dtype=torch.long)
        mask[0, -3:] = 0  # padding after the response
        tensors = {"prompts": question.prompt[None], "responses": torch.cat([ids, ids.new_zeros(3)])[None]}
        truth = {"style": "rule", "ground_truth": question.answer}
        others = {"data_source": question.source, "reward_model": truth, "extra_info": {"index": 0}}
        others = {name: numpy.array([value], dtype=object) for name, value in others.items()}
        batch = TensorDict(tensors | {"attention_mask": mask}, batch_size=1)
        return float((await manager.run_single(DataProto(batch=batch, non_tensor_batch=others)))["reward_score"])

    async def all_of_verls():
        manager = load_reward_manager(composed(folder), tokenizer)  # it binds itself to this event loop
        return [await verls(manager, ids) for ids in tokens]

    assert asyncio.run(all_of_verls()) == pytest.approx(ours)
    assert len({round(reward, 3) for reward in ours}) > 8


@pytest.mark.parametrize("steps", [0, 1, 4])
def test_verl_warms_up_as_we_do(steps, verl, hand_over, set_constants):
    """Its scheduler, as its engine makes it from run.sh."""
    from types import SimpleNamespace

    from verl.utils.config import omega_conf_to_dataclass
    from verl.workers.engine.fsdp.transformer_impl import FSDPEngine

    config = composed(hand_over(f"--WARMUP_STEPS={steps}"))
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=config.actor_rollout_ref.actor.optim.lr)
    settings = omega_conf_to_dataclass(config.actor_rollout_ref.actor.optim)
    settings.total_training_steps = 14  # verl's trainer does that
    engine = SimpleNamespace(optimizer_config=settings, rank=1)
    scheduler = FSDPEngine._build_lr_scheduler(engine, optimizer)
    rates = []
    for _ in range(8):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx([2e-5 * min(1, (step + 1) / max(1, steps)) for step in range(8)])


@pytest.mark.parametrize("absent", [None, *NEEDED_TOKENS])
def test_verl_needs_the_tokens_that_we_name(absent, verl, tmp_path):
    """Its own builders, for every type of model that it knows and that does not see."""
    from verl.utils.tokenizer import continuous_token_wiring as wiring

    for file in (ROOT / "toy").glob("*token*.json"):
        (tmp_path / file.name).write_text(file.read_text().replace("<|im_end|>", "<|over|>"))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    present = [token for token in NEEDED_TOKENS if token != absent and token not in tokenizer.get_vocab()]
    tokenizer.add_tokens(present, special_tokens=True)
    refused = set()
    for model_type, family in wiring._MODEL_TYPE_TO_FAMILY.items():
        if wiring.get_continuous_token_builder_class(family).supports_multimodal():
            continue
        try:
            wiring.create_continuous_token_builder(tokenizer, hf_model_type=model_type)
        except ValueError:
            refused.add(model_type)
        assert (model_type in refused) == bool(missing_tokens(model_type, tokenizer)), model_type
    assert bool(refused) == (absent not in (None, "<|user|>"))  # the toy has this one

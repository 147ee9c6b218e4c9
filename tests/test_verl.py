"""tools/verl.py: what it writes, and where verl is installed, what verl itself makes of it."""

import asyncio
import itertools
import json
import os
import shutil
import subprocess
import sys

import numpy
import pyarrow.parquet
import pytest
import torch
from conftest import ROOT, load

import dapo
from tools.verl import GPUS, argument, hydra, overrides
from tools.verl import main as hand_over_to_verl

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
    GRADIENT_CHECKPOINTING=True, MODEL="some/model",
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
    assert changed(WARMUP_STEPS=1) == {"lr_warmup_steps": 0}  # one step of warm-up is none
    assert changed(KL_COEF=0.02) == {"use_kl_loss": True, "kl_loss_coef": 0.02}
    assert changed(MICRO_BATCH_TOKENS=100) == {"ppo_max_token_len_per_gpu": 256 + 96}  # of the longest response
    assert changed(OVERLONG_BUFFER_LENGTH=0) == {"enable": False, "len": 0}
    assert changed(REWARD=score) == {"path": "$here/test_verl.py", "name": "score"}
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
        A + "rollout.val_kwargs.top_p": 1.0, A + "actor.optim.lr_scheduler_type": "constant",
    }.items() <= found.items()  # fmt: skip
    assert found[A + "actor.clip_ratio_c"] > 2.72**20  # past where the ratio itself is held


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
    ],
)
def test_values_in_hydras_grammar(value, written):
    assert hydra(value) == written


def test_what_the_shell_fills_in(tmp_path):
    """The folder and the environment, and nothing else; what comes out is what Hydra reads."""
    words = [argument("a", "$here/x y"), argument("b", "it's $HOME `ls` 模型"), argument("c", GPUS)]
    script = 'here="/data/my run"; printf "%s\\n" ' + " ".join(words)
    for environment, gpus in ({"GPUS": "3"}, "3"), ({}, "8"):
        out = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, check=True).stdout
        assert out.splitlines() == ['a="/data/my run/x y"', 'b="it\'s $HOME `ls` 模型"', f"c={gpus}"]


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


@pytest.fixture
def verl():
    return pytest.importorskip("verl", reason="verl is not installed: pip install verl==0.9.1 in its own environment")


def composed(folder, *more):
    """run.sh's settings as verl's trainer reads them: `bash run.sh --cfg job` prints them."""
    environment = os.environ | {"PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}", "GPUS": "3"}
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
        assert str(value).startswith("${") or found == expected, key
    assert config.trainer.n_gpus_per_node == 3 and config.trainer.nnodes == 1
    validate_config(config, need_reference_policy(config), need_critic(config))


def test_verl_reads_the_same_prompts(verl, hand_over, make_folder):
    """With its own data set class and chat template, also for a tokenizer that has none."""
    from verl.utils.dataset.rl_dataset import RLHFDataset

    for template in (True, False):
        model = make_folder()
        if not template:
            (model / "chat_template.jinja").unlink()
        folder = hand_over(f"--MODEL={model}", "--PROMPT_TEMPLATE=Solve it: {question}")
        config, tokenizer = composed(folder), load(model)[1]
        questions = dapo.load_questions(dapo.TRAIN_DATASETS, tokenizer)
        if custom := config.actor_rollout_ref.model.custom_chat_template:
            tokenizer.chat_template = custom
        assert bool(custom) != template
        found = RLHFDataset(str(folder / "train.parquet"), tokenizer, config.data)
        assert len(found) == len(questions)
        for row, question in zip(found, questions):
            ids = tokenizer.apply_chat_template(row["raw_prompt"], add_generation_prompt=True, return_dict=True)
            assert ids["input_ids"] == question.prompt.tolist()


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

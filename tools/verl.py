"""Hands a run over to verl, for more than one GPU: the same constants, data, and reward in verl's form.

    python -m tools.verl recipes/paper.py --out verl_run
    GPUS=8 NODES=16 bash verl_run/run.sh

The folder gets train.parquet and test.parquet, the reward function's file, and run.sh, which starts verl's trainer, and
with it Ray, FSDP, and vLLM. It is for verl 0.9.1: tests/test_verl.py asks verl's configuration, data set class, and
reward manager. A training run on GPUs has not been made. README lists constants, their keys, and what is left out.
"""

import argparse
import inspect
import math
import os
import re
import shlex
import shutil
from pathlib import Path

from pyarrow import Table, parquet
from transformers import AutoTokenizer

import dapo

HERE = "$here"  # in run.sh, the folder it lies in
FROM_ENVIRONMENT = GPUS, NODES, TENSOR_PARALLEL = "${GPUS:-8}", "${NODES:-1}", "${TENSOR_PARALLEL:-1}"
WITHOUT_COUNTERPART = {"RETRY_SAME_QUESTION": False, "REST_EPOCHS": 0, "USE_OVERLONG_FILTERING": False}


def verl_rows(sources, split):
    """Rows in verl's schema: what is asked as chat messages, and the ground truth for the reward manager."""
    rows, template = [], dapo.TEMPLATES.get(dapo.PROMPT_TEMPLATE, dapo.PROMPT_TEMPLATE)
    for source in sources:
        for messages, answer in dapo.load_rows(source):
            question = messages[-1]["content"]
            asked = [*messages[:-1], messages[-1] | {"content": template.replace("{question}", question)}]
            row = {
                "data_source": source["path"],
                "prompt": [{"role": message["role"], "content": message["content"]} for message in asked],
                "ability": "math",
                "reward_model": {"style": "rule", "ground_truth": answer},
                "extra_info": {"split": split, "index": len(rows), "question": question},
            }
            rows.append(row)
    return rows


def overrides(c):
    """{verl's key: value} of the constants c. A key with a + is not in verl's own configuration."""
    length = c["MAX_PROMPT_LENGTH"] + c["MAX_RESPONSE_LENGTH"]
    model = dapo.saved_model(c["MODEL"])
    found = {
        # Model and data
        "actor_rollout_ref.model.path": os.path.abspath(model) if os.path.isdir(model) else model,
        "actor_rollout_ref.model.trust_remote_code": c["TRUST_REMOTE_CODE"],
        "data.trust_remote_code": c["TRUST_REMOTE_CODE"],
        "data.train_files": f"{HERE}/train.parquet",
        "data.val_files": f"{HERE}/test.parquet",
        "data.max_prompt_length": c["MAX_PROMPT_LENGTH"],
        "data.filter_overlong_prompts": True,
        "data.seed": c["SEED"],
        "actor_rollout_ref.actor.data_loader_seed": c["SEED"],
        "actor_rollout_ref.rollout.seed": c["SEED"],
        # Length of the run. verl stops at whichever comes first; an epoch has at least one step.
        "trainer.total_training_steps": c["NUM_STEPS"],
        "trainer.total_epochs": c["NUM_STEPS"] or c["NUM_EPOCHS"],
        "trainer.test_freq": c["EVAL_EVERY"],
        "trainer.val_before_train": True,
        # One greedy response, or k samples: verl has either.
        "actor_rollout_ref.rollout.val_kwargs.n": c["EVAL_SAMPLES"],
        "actor_rollout_ref.rollout.val_kwargs.do_sample": c["EVAL_SAMPLES"] > 1,
        "actor_rollout_ref.rollout.val_kwargs.temperature": c["TEMPERATURE"] if c["EVAL_SAMPLES"] > 1 else 0,
        "actor_rollout_ref.rollout.val_kwargs.top_p": 1.0,
        "actor_rollout_ref.rollout.val_kwargs.top_k": -1,
        # A checkpoint is a saved model, too, as hf_model.
        "trainer.save_freq": c["SAVE_EVERY"] or c["CHECKPOINT_EVERY"],
        "trainer.max_actor_ckpt_to_keep": None if c["SAVE_EVERY"] else 1,
        "actor_rollout_ref.actor.checkpoint.save_contents": ["model", "optimizer", "extra", "hf_model"],
        "trainer.default_local_dir": os.path.join(HERE, c["OUTPUT_DIR"]),
        "trainer.experiment_name": Path(c["OUTPUT_DIR"]).name,
        "trainer.project_name": "dapo",
        "trainer.logger": ["console"],
        "trainer.resume_mode": "auto" if c["RESUME"] else "disable",
        # Sampling
        "data.train_batch_size": c["BATCH_SIZE"],
        "actor_rollout_ref.rollout.name": "vllm",
        "actor_rollout_ref.rollout.n": c["GROUP_SIZE"],
        "data.max_response_length": c["MAX_RESPONSE_LENGTH"],
        "actor_rollout_ref.rollout.temperature": c["TEMPERATURE"],
        "actor_rollout_ref.rollout.top_p": 1.0,
        "actor_rollout_ref.rollout.top_k": -1,
        # Dynamic sampling: by accuracy, because the shaped reward sets wrong answers apart, too
        "algorithm.filter_groups.enable": c["USE_DYNAMIC_SAMPLING"],
        "algorithm.filter_groups.metric": "acc",
        # Reward
        "reward.custom_reward_function.path": f"{HERE}/{Path(inspect.getfile(c['REWARD'])).name}",
        "reward.custom_reward_function.name": c["REWARD"].__qualname__,
        "reward.reward_manager.name": "dapo",
        "+reward.reward_kwargs.max_resp_len": c["MAX_RESPONSE_LENGTH"],
        "+reward.reward_kwargs.overlong_buffer_cfg.enable": c["OVERLONG_BUFFER_LENGTH"] > 0,
        "+reward.reward_kwargs.overlong_buffer_cfg.len": c["OVERLONG_BUFFER_LENGTH"],
        "+reward.reward_kwargs.overlong_buffer_cfg.penalty_factor": c["OVERLONG_PENALTY_FACTOR"],
        "+reward.reward_kwargs.overlong_buffer_cfg.log": False,
        # Advantage and loss
        "algorithm.adv_estimator": "grpo",
        "algorithm.norm_adv_by_std_in_grpo": True,
        "algorithm.use_kl_in_reward": False,
        "actor_rollout_ref.actor.clip_ratio_low": c["CLIP_RANGE_LOW"],
        "actor_rollout_ref.actor.clip_ratio_high": c["CLIP_RANGE_HIGH"],
        "actor_rollout_ref.actor.clip_ratio_c": 1e9,  # so verl's dual clip, which no paper here has, never bites
        "actor_rollout_ref.actor.loss_agg_mode": c["LOSS_AGG_MODE"],
        "actor_rollout_ref.actor.use_kl_loss": c["KL_COEF"] > 0,
        "actor_rollout_ref.actor.kl_loss_coef": c["KL_COEF"],
        "actor_rollout_ref.actor.kl_loss_type": "low_var_kl",
        "actor_rollout_ref.actor.entropy_coeff": c["ENTROPY_COEF"],
        # Update. In verl a mini-batch is counted in questions, and the warm-up begins with a step at a rate of 0.
        "actor_rollout_ref.actor.optim.lr": c["LEARNING_RATE"],
        "actor_rollout_ref.actor.optim.lr_scheduler_type": "constant",
        "actor_rollout_ref.actor.optim.lr_warmup_steps": c["WARMUP_STEPS"] if c["WARMUP_STEPS"] > 1 else 0,
        "actor_rollout_ref.actor.optim.weight_decay": c["WEIGHT_DECAY"],
        "actor_rollout_ref.actor.optim.clip_grad": c["MAX_GRAD_NORM"],
        "actor_rollout_ref.actor.ppo_epochs": c["DAPO_EPOCHS"],
        "actor_rollout_ref.actor.ppo_mini_batch_size": math.ceil(c["BATCH_SIZE"] / c["MINI_BATCHES"]),
        "actor_rollout_ref.actor.shuffle": True,
        "actor_rollout_ref.actor.use_dynamic_bsz": True,
        "actor_rollout_ref.actor.ppo_max_token_len_per_gpu": max(c["MICRO_BATCH_TOKENS"], length),
        "actor_rollout_ref.model.enable_gradient_checkpointing": c["GRADIENT_CHECKPOINTING"],
        "actor_rollout_ref.actor.strategy": "fsdp",
        "trainer.n_gpus_per_node": GPUS,
        "trainer.nnodes": NODES,
        "actor_rollout_ref.rollout.tensor_model_parallel_size": TENSOR_PARALLEL,
    }
    if template := chat_template(model, c["TRUST_REMOTE_CODE"]):
        found["actor_rollout_ref.model.custom_chat_template"] = template
    return found


def chat_template(model, trust_remote_code):
    """A chat template for a tokenizer without one, which gives the ids of dapo.read_prompt, because verl needs one.

    None where there is one, and for a model on the Hub, which we do not look at: nearly all have one.
    """
    if not os.path.isdir(model):
        return None
    with dapo.explained(f"MODEL={model} has no tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=trust_remote_code)
    if tokenizer.chat_template:
        return None
    begins = tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    return ("{{ bos_token }}" if begins else "") + "{{ messages[-1]['content'] }}"


def argument(key, value):
    """key=value in Hydra's grammar, quoted for the shell, which fills in the folder and the environment."""
    if value in FROM_ENVIRONMENT:
        return f'{key}="{value}"'
    return shlex.quote(f"{key}={hydra(value)}").replace(HERE, f"'\"{HERE}\"'")


def hydra(value):
    """A value in Hydra's grammar. Text is quoted, because 2 would be a number and 模型 an error; in it, we escape what
    would end it or be filled in."""
    if isinstance(value, list):
        return f"[{','.join(map(hydra, value))}]"
    if not isinstance(value, str):
        return "null" if value is None else str(value)
    value = re.sub(r'(\\*)("|$)', lambda match: match[1] * 2 + match[2].replace('"', '\\"'), value)
    return '"' + value.replace("${", "\\${") + '"'


RUN = """\
#!/usr/bin/env bash
# Written by tools/verl.py for verl 0.9.1, which every node needs:
#     pip install "verl[vllm,fsdp]==0.9.1" math-verify
# The environment sets GPUS (of each node), NODES, and TENSOR_PARALLEL (GPUs that hold one copy of the model in
# sampling), and the command line may give further settings of verl.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
python3 -m verl.trainer.main_ppo \\
"""


def main(argv=None):
    form = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    parser = argparse.ArgumentParser("python -m tools.verl", description=__doc__, **form)
    parser.add_argument("--out", nargs="?", metavar="FOLDER", help="the folder to write")
    options, words = parser.parse_known_args(argv)
    if not options.out:
        dapo.fail("say where to: --out FOLDER")
    for word in dapo.read_command_line(words):
        dapo.fail(f"{word!r} is neither a recipe.py nor --NAME=VALUE")
    if "solution_strs" in inspect.signature(dapo.REWARD).parameters:
        dapo.fail(f"REWARD={dapo.text_of(dapo.REWARD)} takes lists, but verl's reward manager gives it one response")
    for name, usual in WITHOUT_COUNTERPART.items():
        if getattr(dapo, name) != usual:
            dapo.say(f"{name}={getattr(dapo, name)} has no counterpart in verl: left out")
    with dapo.explained(f"--out {options.out} cannot be written"):
        write(Path(options.out), overrides(vars(dapo)))


def write(folder, settings):
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(inspect.getfile(dapo.REWARD), folder)
    for split, sources in ("train", dapo.TRAIN_DATASETS), ("test", dapo.EVAL_DATASETS):
        rows = verl_rows(sources, split)
        parquet.write_table(Table.from_pylist(rows), folder / f"{split}.parquet")
        dapo.say(f"{folder / split}.parquet: {len(rows)} questions")
    lines = [f"    {argument(*setting)} \\\n" for setting in settings.items()]
    (folder / "run.sh").write_text(RUN + "".join(lines) + '    "$@"\n', encoding="utf-8")
    dapo.say(f"{folder / 'run.sh'}: {len(settings)} settings; run it with bash where verl is installed")


if __name__ == "__main__":
    main()

"""Hands a run over to verl, for more than one GPU: the same constants, data and reward in verl's form.

    python recipes/verl.py recipes/paper.py --out verl_run
    GPUS=8 NODES=16 bash verl_run/run.sh

The folder gets train.parquet and test.parquet, the reward function's file, and run.sh, which starts verl's trainer, and
with it Ray, FSDP and vLLM. It is for verl 0.9.1: tests/test_verl.py asks its configuration, data set class and reward
manager. A training run on GPUs has not been made. README has the table of constants and keys, and what is left out.
"""

import math
import os
import re
import shlex
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path = [path for path in sys.path if Path(path).resolve() != ROOT / "recipes"]  # else this file would be `verl`
sys.path.insert(0, str(ROOT))

import dapo  # noqa: E402
from dapo import record  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402

HERE = "$here"  # in run.sh, the folder it lies in
FROM_ENVIRONMENT = GPUS, NODES, TENSOR_PARALLEL = "${GPUS:-8}", "${NODES:-1}", "${TENSOR_PARALLEL:-1}"
WITHOUT_COUNTERPART = {"RETRY_SAME_QUESTION": False, "REST_EPOCHS": 0, "USE_OVERLONG_FILTERING": False}


def verl_rows(sources, split, c):
    """Rows in verl's schema: what is asked as chat messages, and the ground truth for the reward manager."""
    rows = []
    for source in sources:
        for messages, answer in record.load_rows(source):
            asked = record.with_template(messages, c)
            row = {
                "data_source": source["path"],
                "prompt": [{"role": message["role"], "content": message["content"]} for message in asked],
                "ability": "math",
                "reward_model": {"style": "rule", "ground_truth": answer},
                "extra_info": {"split": split, "index": len(rows), "question": messages[-1]["content"]},
            }
            rows.append(row)
    return rows


def overrides(c):
    """{verl's key: value} of the constants c. A key with a + is not in verl's own configuration."""
    length = c["MAX_PROMPT_LENGTH"] + c["MAX_RESPONSE_LENGTH"]
    path, _, function = c["REWARD"].rpartition(":")
    found = {
        # Model and data
        "actor_rollout_ref.model.path": os.path.abspath(c["MODEL"]) if os.path.isdir(c["MODEL"]) else c["MODEL"],
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
        "trainer.logger": ["console", *record.mirrors_of(c)],
        "trainer.resume_mode": "auto" if c["RESUME"] else "disable",
        # Sampling
        "data.train_batch_size": c["BATCH_SIZE"],
        "actor_rollout_ref.rollout.name": "vllm",
        "actor_rollout_ref.rollout.n": c["GROUP_SIZE"],
        "data.max_response_length": c["MAX_RESPONSE_LENGTH"],
        "actor_rollout_ref.rollout.temperature": c["TEMPERATURE"],
        "actor_rollout_ref.rollout.top_p": 1.0,
        "actor_rollout_ref.rollout.top_k": -1,
        # Dynamic sampling: by accuracy, as the shaped reward makes a difference between wrong answers
        "algorithm.filter_groups.enable": c["USE_DYNAMIC_SAMPLING"],
        "algorithm.filter_groups.metric": "acc",
        # Reward
        "reward.custom_reward_function.path": f"{HERE}/{Path(path).name}",
        "reward.custom_reward_function.name": function,
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
        "actor_rollout_ref.actor.clip_ratio_c": 1e9,  # so that verl's dual clip, which no paper here has, never bites
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
    if template := chat_template(c):
        found["actor_rollout_ref.model.custom_chat_template"] = template
    return found


def chat_template(c):
    """verl has to have one. For a tokenizer without: one that gives the ids dapo.read_prompt gives. None where it has
    one, and for a model on the Hub, which is not looked at here: nearly all have."""
    if not os.path.isdir(c["MODEL"]):
        return None
    tokenizer = record.from_pretrained(AutoTokenizer, c["MODEL"], trust_remote_code=c["TRUST_REMOTE_CODE"])
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
    """A value in Hydra's grammar. Texts are quoted, else 2 were a number and 模型 an error; what would end a text or be
    filled in is escaped."""
    if isinstance(value, list):
        return f"[{','.join(map(hydra, value))}]"
    if not isinstance(value, str):
        return "null" if value is None else str(value)
    value = re.sub(r'(\\*)("|$)', lambda match: match[1] * 2 + match[2].replace('"', '\\"'), value)
    return '"' + value.replace("${", "\\${") + '"'


RUN = """\
#!/usr/bin/env bash
# Written by recipes/verl.py for verl 0.9.1, which needs on every node:
#     pip install "verl[vllm,fsdp]==0.9.1" math-verify
# GPUS (a node), NODES and TENSOR_PARALLEL (GPUs that hold one copy of the model in sampling) are taken from the
# environment, and further settings of verl's from the command line.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
python3 -m verl.trainer.main_ppo \\
"""


def main(argv=None):
    argv = list(sys.argv[1:] if argv is None else argv)
    with record.plain_endings():
        if {"-h", "--help"} & set(argv):
            print(__doc__)
            return
        out = next((word for word in argv if word == "--out" or word.startswith("--out=")), None)
        if out in (None, "--out=") or argv[-1] == "--out":
            record.fail("say where to: --out FOLDER")
        folder = out.partition("=")[2] if "=" in out else argv.pop(argv.index(out) + 1)
        argv.remove(out)
        record.read_command_line(argv, vars(dapo))
        write(Path(folder), vars(dapo))


def write(folder, c):
    function = record.load_reward(c["REWARD"])
    if record.takes_batches(record.inspect.signature(function)):
        record.fail(f"REWARD={c['REWARD']} takes lists, but verl's DAPO reward manager asks for one response at a time")
    for name, usual in WITHOUT_COUNTERPART.items():
        if c[name] != usual:
            record.say(f"{name}={c[name]} has no counterpart in verl: left out")
    settings = overrides(c)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(c["REWARD"].rpartition(":")[0], folder)
        for name, split, sources in (
            ("train.parquet", "train", c["TRAIN_DATASETS"]),
            ("test.parquet", "test", c["EVAL_DATASETS"]),
        ):
            rows = verl_rows(sources, split, c)
            record.datasets.Dataset.from_list(rows).to_parquet(folder / name)
            record.say(f"{folder / name}: {len(rows)} questions")
        lines = [f"    {argument(*setting)} \\\n" for setting in settings.items()]
        (folder / "run.sh").write_text(RUN + "".join(lines) + '    "$@"\n', encoding="utf-8")
    except OSError as error:
        record.fail(f"--out {folder} cannot be written: {error.strerror or error}")
    record.say(f"{folder / 'run.sh'}: {len(settings)} settings; run it with bash where verl is installed")


if __name__ == "__main__":
    main()

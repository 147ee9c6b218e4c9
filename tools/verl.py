"""Hands a run over to verl, for more than one GPU: the same constants, data, and reward in verl's form.

    python -m tools.verl recipes/paper.py --out verl_run
    GPUS=8 NODES=16 bash verl_run/run.sh
    python -m tools.verl_metrics verl_run

The folder gets train.parquet and test.parquet, the reward function's file, and run.sh, which starts verl's trainer, and
with it Ray, FSDP, and vLLM. It is for verl 0.9.1, which has run it on CPUs (tests/verl_cpu.py) and not yet on GPUs.
docs/scaling.md lists the constants, their keys, and what is left out.
"""

import argparse
import inspect
import math
import os
import re
import shlex
import shutil
from pathlib import Path

import pyarrow
from pyarrow import parquet
from transformers import AutoConfig, AutoTokenizer

import dapo

HERE = "$here"  # in run.sh, the folder it lies in
FROM_ENVIRONMENT = GPUS, NODES, TENSOR_PARALLEL = "$GPUS", "$NODES", "$TENSOR_PARALLEL"
WITHOUT_COUNTERPART = {"RETRY_SAME_QUESTION": False, "REST_EPOCHS": 0, "USE_OVERLONG_FILTERING": False}

# verl 0.9.1 looks for these in the tokenizer of a model of these types. Only tool calls and chats of several turns
# need them, but it always looks.
NEEDED_TOKENS = {
    "<|im_end|>": "qwen2 qwen3 qwen3_moe qwen3_5 qwen3_5_moe",
    "[e~[": "minimax minimax_text_01 minimax_m2",
    "<|observation|>": "glm4_moe glm_moe_dsa",
    "<|user|>": "glm4_moe glm_moe_dsa",
    "<|tool_response>": "gemma4",
    "<｜end▁of▁sentence｜>": "deepseek_v2 deepseek_v3 deepseek_v4",
}
PADDING_ROW = 128  # tokens in the rows with which verl fills a last mini-batch


def verl_rows(sources, split):
    """Rows in verl's schema: what is asked as chat messages, and the ground truth for the reward manager."""
    rows, template = [], dapo.TEMPLATES.get(dapo.PROMPT_TEMPLATE, dapo.PROMPT_TEMPLATE)
    for source in sources:
        for messages, answer, columns in dapo.load_rows(source):
            question = messages[-1]["content"]
            asked = [*messages[:-1], messages[-1] | {"content": template.replace("{question}", question)}]
            row = {
                "data_source": source["path"],
                "prompt": [{"role": message["role"], "content": message["content"]} for message in asked],
                "ability": "math",
                "reward_model": {"style": "rule", "ground_truth": answer},
                "extra_info": {"split": split, "index": len(rows)} | columns | {"question": question},
            }
            rows.append(row)
    return rows


def table(rows):
    """The rows as a table, in which each column has one type, and is None in rows that lack it."""
    for name in dict.fromkeys(name for row in rows for name in row["extra_info"]):
        column = [row["extra_info"].get(name) for row in rows]
        with dapo.explained(f"verl reads parquet, where a column has one type; the data's column {name!r} has not"):
            parquet.write_table(pyarrow.table({name: column}), pyarrow.BufferOutputStream())
    return pyarrow.Table.from_pylist(rows)


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
        # Length of the run: verl stops at whichever comes first.
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
        "trainer.logger": ["console", "file"],
        "trainer.resume_mode": "auto" if c["RESUME"] else "disable",
        # Sampling
        "data.train_batch_size": c["BATCH_SIZE"],
        "actor_rollout_ref.rollout.name": "vllm",
        "actor_rollout_ref.rollout.n": c["GROUP_SIZE"],
        "data.max_response_length": c["MAX_RESPONSE_LENGTH"],
        "actor_rollout_ref.rollout.max_model_len": length,  # without it, a shorter model would cut responses silently
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
        # Update. verl's constant rate would begin its warm-up at 0. A cosine whose lowest value is the full rate is
        # constant, and counted one step further on, it begins as ours does.
        "actor_rollout_ref.actor.optim.lr": c["LEARNING_RATE"],
        "actor_rollout_ref.actor.optim.lr_warmup_steps": c["WARMUP_STEPS"],
        "actor_rollout_ref.actor.optim.lr_scheduler_type": "cosine",
        "actor_rollout_ref.actor.optim.min_lr_ratio": 1.0,
        "actor_rollout_ref.actor.optim.zero_indexed_step": False,
        "actor_rollout_ref.actor.optim.weight_decay": c["WEIGHT_DECAY"],
        "actor_rollout_ref.actor.optim.clip_grad": c["MAX_GRAD_NORM"],
        "actor_rollout_ref.actor.ppo_epochs": c["DAPO_EPOCHS"],
        "actor_rollout_ref.actor.ppo_mini_batch_size": mini_batch(c),  # in questions
        "actor_rollout_ref.actor.shuffle": True,
        "actor_rollout_ref.actor.use_dynamic_bsz": True,
        "actor_rollout_ref.actor.ppo_max_token_len_per_gpu": max(c["MICRO_BATCH_TOKENS"], length, PADDING_ROW),
        "actor_rollout_ref.model.enable_gradient_checkpointing": c["GRADIENT_CHECKPOINTING"],
        "actor_rollout_ref.actor.strategy": "fsdp2",
        "trainer.n_gpus_per_node": GPUS,
        "trainer.nnodes": NODES,
        "actor_rollout_ref.rollout.tensor_model_parallel_size": TENSOR_PARALLEL,
    }
    if template := chat_template(model, c["TRUST_REMOTE_CODE"]):
        found["actor_rollout_ref.model.custom_chat_template"] = template
    if c["LORA_RANK"]:
        found |= {
            "actor_rollout_ref.model.lora_rank": c["LORA_RANK"],
            "actor_rollout_ref.model.lora_alpha": int(c["LORA_ALPHA"]),
            "actor_rollout_ref.model.target_modules": "all-linear",
            "actor_rollout_ref.rollout.load_format": "safetensors",  # vLLM reads MODEL, then it gets adapters alone
            "actor_rollout_ref.actor.checkpoint.save_contents": ["model", "optimizer", "extra"],
        }
    if c["CHAT_TEMPLATE_KWARGS"]:
        found["+data.apply_chat_template_kwargs"] = c["CHAT_TEMPLATE_KWARGS"]
    return found


def mini_batch(c):
    """Questions in a mini-batch of verl."""
    return math.ceil(c["BATCH_SIZE"] / c["MINI_BATCHES"])


def warnings(c, questions, environment):
    """What verl will do otherwise than dapo.py, or stumble over, with the constants c and that many questions."""
    for name, usual in WITHOUT_COUNTERPART.items():
        if c[name] != usual:
            yield f"{name}={c[name]} has no counterpart in verl: left out"
    if questions < c["BATCH_SIZE"]:
        yield f"TRAIN_DATASETS has {questions} questions: verl needs BATCH_SIZE={c['BATCH_SIZE']} of them or more"
    sizes = f"BATCH_SIZE={c['BATCH_SIZE']}, MINI_BATCHES={c['MINI_BATCHES']}, GROUP_SIZE={c['GROUP_SIZE']}"
    if c["BATCH_SIZE"] % c["MINI_BATCHES"]:
        updates = math.ceil(c["BATCH_SIZE"] / mini_batch(c))
        yield f"{sizes}: verl makes {updates} mini-batches of {mini_batch(c)} questions, padded with empty responses"
    gpus, nodes = (int(environment.get(name, usual)) for name, usual in (("GPUS", 8), ("NODES", 1)))
    responses = mini_batch(c) * c["GROUP_SIZE"]
    if responses % (gpus * nodes):
        fit = ", ".join(str(workers) for workers in range(1, responses + 1) if responses % workers == 0)
        yield (
            f"{sizes}: a mini-batch has {responses} responses, which {gpus * nodes} workers (GPUS={gpus}, "
            f"NODES={nodes}) cannot share equally: GPUS times NODES has to be one of {fit}"
        )
    if os.path.isdir(model := dapo.saved_model(c["MODEL"])):
        with dapo.explained(f"MODEL={model} has no config.json that transformers knows"):
            model_type = AutoConfig.from_pretrained(model, trust_remote_code=c["TRUST_REMOTE_CODE"]).model_type
        for token in missing_tokens(model_type, load_tokenizer(model, c["TRUST_REMOTE_CODE"])):
            yield (
                f"MODEL={model} is of type {model_type}: for these, verl 0.9.1 needs the token {token} in the "
                "tokenizer, and all responses fail without it: add it, or take another MODEL"
            )


def missing_tokens(model_type, tokenizer):
    """The tokens that verl will miss in the tokenizer of a model of this type."""
    known = tokenizer.get_vocab()
    return [token for token, types in NEEDED_TOKENS.items() if model_type in types.split() and token not in known]


def load_tokenizer(model, trust_remote_code):
    with dapo.explained(f"MODEL={model} has no tokenizer"):
        return AutoTokenizer.from_pretrained(model, trust_remote_code=trust_remote_code)


def chat_template(model, trust_remote_code):
    """A chat template for a tokenizer without one, which gives the ids of dapo.read_prompt, because verl needs one.

    None where there is one, and for a model on the Hub, which we do not look at: nearly all have one.
    """
    if not os.path.isdir(model):
        return None
    tokenizer = load_tokenizer(model, trust_remote_code)
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
    if isinstance(value, dict):
        return f"{{{','.join(f'{name}:{hydra(part)}' for name, part in value.items())}}}"
    if not isinstance(value, str):
        return "null" if value is None else str(value)
    value = re.sub(r'(\\*)("|$)', lambda match: match[1] * 2 + match[2].replace('"', '\\"'), value)
    return '"' + value.replace("${", "\\${") + '"'


RUN = r"""#!/usr/bin/env bash
# Written by tools/verl.py for verl 0.9.1, which every node needs:
#     pip install "verl[vllm,fsdp]==0.9.1" math-verify
# The environment sets GPUS (of each node), NODES, and TENSOR_PARALLEL (GPUs that hold one copy of the model in
# sampling), and the command line may give further settings of verl.
set -euo pipefail
GPUS=${GPUS:-8} NODES=${NODES:-1} TENSOR_PARALLEL=${TENSOR_PARALLEL:-1}
responses=RESPONSES  # in a mini-batch
here=$(cd "$(dirname "$0")" && pwd)
metrics="$here/metrics_$(date +%Y%m%d_%H%M%S).jsonl"
refuse() { echo "error: $1" >&2; exit 2; }
for name in GPUS NODES TENSOR_PARALLEL; do
    [[ ${!name} =~ ^[1-9][0-9]*$ ]] || refuse "$name=${!name} has to be a whole number above 0"
done
[ $((responses % (GPUS * NODES))) = 0 ] ||
    refuse "GPUS=$GPUS times NODES=$NODES does not divide the $responses responses of a mini-batch"
[ $((GPUS % TENSOR_PARALLEL)) = 0 ] || refuse "TENSOR_PARALLEL=$TENSOR_PARALLEL does not divide GPUS=$GPUS"
[[ $here != *[\"\\]* && $here != *'${'* ]] || refuse "$here: no folder may have a \", a \\ or a \${ in its name"
python3 -m verl.trainer.main_ppo \
    "+ray_kwargs.ray_init.runtime_env.env_vars.VERL_FILE_LOGGER_PATH=\"$metrics\"" \
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
    if dapo.LORA_RANK and dapo.LORA_ALPHA % 1:
        dapo.fail(f"LORA_ALPHA={dapo.LORA_ALPHA} has to be a whole number for verl")
    for name in "GPUS", "NODES":
        if not re.fullmatch("[1-9][0-9]*", os.environ.get(name, "1")):
            dapo.fail(f"{name}={os.environ[name]} in the environment has to be a whole number above 0")
    if dapo.CHAT_TEMPLATE_KWARGS and os.path.isdir(model := dapo.saved_model(dapo.MODEL)):
        tokenizer = load_tokenizer(model, dapo.TRUST_REMOTE_CODE)
        dapo.read_prompt(tokenizer, [{"role": "user", "content": "1 + 1?"}])  # refuses a switch that is none
    with dapo.explained(f"--out {options.out} cannot be written"):
        questions = write(Path(options.out), vars(dapo))
    for warning in warnings(vars(dapo), questions, os.environ):
        dapo.say(warning)


def write(folder, c):
    """Writes all files; returns the number of questions to train on."""
    sources = {"train": c["TRAIN_DATASETS"], "test": c["EVAL_DATASETS"]}
    tables = {split: table(verl_rows(sources[split], split)) for split in sources}
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(inspect.getfile(c["REWARD"]), folder)
    for split in tables:
        parquet.write_table(tables[split], folder / f"{split}.parquet")
        dapo.say(f"{folder / split}.parquet: {len(tables[split])} questions")
    settings = overrides(c)
    start = RUN.replace("RESPONSES", str(mini_batch(c) * c["GROUP_SIZE"]))
    lines = [f"    {argument(*setting)} \\\n" for setting in settings.items()]
    (folder / "run.sh").write_text(start + "".join(lines) + '    "$@"\n', encoding="utf-8")
    dapo.say(f"{folder / 'run.sh'}: {len(settings)} settings; run it with bash where verl is installed")
    return len(tables["train"])


if __name__ == "__main__":
    main()

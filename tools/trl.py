"""Trains in TRL's GRPOTrainer with the constants of dapo.py, in as many processes as torchrun starts.

    torchrun --nproc_per_node 2 -m tools.trl recipes/gsm8k.py --OUTPUT_DIR=outputs/trl

For TRL 1.16.0, which prints its metrics and saves the model in OUTPUT_DIR. docs/scaling.md says where it differs.
"""

import os
import pickle
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import dapo  # isort: skip  (before torch, for Windows)
import torch

from tools.verl import chat_template, verl_rows


def arguments(c, processes=1):
    """{argument of GRPOConfig: value} of the constants c. A step of dapo.py is `updates` steps of TRL."""
    updates, responses = c["MINI_BATCHES"] * c["DAPO_EPOCHS"], c["BATCH_SIZE"] * c["GROUP_SIZE"]
    if responses % (parts := c["MINI_BATCHES"] * processes):
        dapo.fail(f"BATCH_SIZE * GROUP_SIZE = {responses} has to be a multiple of MINI_BATCHES * processes = {parts}")
    losses = {"token-mean": "dapo", "seq-mean-token-sum": "luspo", "seq-mean-token-mean": "grpo"}
    device = torch.device(c["DEVICE"] or torch.accelerator.current_accelerator(check_available=True) or "cpu")
    return dict(
        use_cpu=device.type == "cpu", bf16=dapo.arithmetic(SimpleNamespace(device=device)) == torch.bfloat16,
        output_dir=c["OUTPUT_DIR"], seed=c["SEED"], trust_remote_code=c["TRUST_REMOTE_CODE"], report_to="none",
        max_steps=(c["NUM_STEPS"] or 0) * updates or -1, num_train_epochs=c["NUM_EPOCHS"], logging_steps=updates,
        save_steps=(c["SAVE_EVERY"] or c["CHECKPOINT_EVERY"]) * updates, eval_strategy="steps", eval_on_start=True,
        eval_steps=c["EVAL_EVERY"] * updates, save_total_limit=None if c["SAVE_EVERY"] else 1,
        num_generations_eval=c["EVAL_SAMPLES"], per_device_eval_batch_size=c["EVAL_SAMPLES"] * c["BATCH_SIZE"],
        num_generations=c["GROUP_SIZE"], steps_per_generation=c["MINI_BATCHES"], num_iterations=c["DAPO_EPOCHS"],
        per_device_train_batch_size=responses // parts, temperature=c["TEMPERATURE"],
        max_completion_length=c["MAX_RESPONSE_LENGTH"], mask_truncated_completions=c["USE_OVERLONG_FILTERING"],
        epsilon=c["CLIP_RANGE_LOW"], epsilon_high=c["CLIP_RANGE_HIGH"], loss_type=losses[c["LOSS_AGG_MODE"]],
        beta=c["KL_COEF"], use_bias_correction_kl=False, entropy_coef=c["ENTROPY_COEF"], router_aux_loss_coef=0.0,
        learning_rate=c["LEARNING_RATE"], weight_decay=c["WEIGHT_DECAY"], max_grad_norm=c["MAX_GRAD_NORM"],
        lr_scheduler_type="constant_with_warmup", warmup_steps=max(c["WARMUP_STEPS"] - 1, 0) * updates,
        disable_dropout=True, gradient_checkpointing=False,  # by dapo.load_model, if at all
        chat_template_kwargs=c["CHAT_TEMPLATE_KWARGS"],
    )  # fmt: skip


def rows(sources, tokenizer):
    """The questions, with chat messages as their prompts, because TRL does not put text into the chat template. They
    are pickled, because Arrow needs one type for each column, and fills in those that a question lacks."""
    kind = {"add_generation_prompt": True, "return_dict": True}
    read = partial(tokenizer.apply_chat_template, **kind, **dapo.CHAT_TEMPLATE_KWARGS)
    messages = {tuple(read(row["prompt"])["input_ids"]): row["prompt"] for row in verl_rows(sources, "")}
    questions = dapo.load_questions(sources, tokenizer)
    return [{"prompt": messages[tuple(q.prompt.tolist())], "question": pickle.dumps(q)} for q in questions]


def reward(tokenizer, completion_ids, question, log_metric, **others):
    """REWARD's score of each completion, with the overlong penalty (eq. 13); None where REWARD gives no verdict."""
    asked = [*map(pickle.loads, question)]
    verdicts = dapo.judge(asked, tokenizer.batch_decode(completion_ids, skip_special_tokens=True))
    for verdict in filter(None, verdicts):
        log_metric("accuracy", verdict["accuracy"])
    limits = dapo.MAX_RESPONSE_LENGTH, dapo.OVERLONG_BUFFER_LENGTH, dapo.OVERLONG_PENALTY_FACTOR
    penalties = [dapo.overlong_penalty(len(ids), *limits) for ids in completion_ids]
    return [verdict and verdict["reward"] + penalty for verdict, penalty in zip(verdicts, penalties)]


def main(argv=None):
    for word in dapo.read_command_line(argv):
        dapo.fail(f"{word!r} is neither a recipe.py nor --NAME=VALUE")
    with dapo.explained("TRL is not installed: pip install trl==1.16.0"):
        from datasets import Dataset
        from trl import GRPOConfig, GRPOTrainer
    if os.environ.get("RANK", "0") == "0" and os.path.exists(dapo.OUTPUT_DIR):
        dapo.fail(f"OUTPUT_DIR={dapo.OUTPUT_DIR} exists already: give this run a folder of its own")
    config = GRPOConfig(**arguments(vars(dapo), int(os.environ.get("WORLD_SIZE", 1))))
    policy, tokenizer = dapo.load_model(path := dapo.saved_model(dapo.MODEL))
    tokenizer.chat_template = tokenizer.chat_template or chat_template(path, dapo.TRUST_REMOTE_CODE)
    data = [Dataset.from_list(rows(sources, tokenizer)) for sources in (dapo.TRAIN_DATASETS, dapo.EVAL_DATASETS)]
    if dapo.LORA_RANK:
        dapo.add_adapters(policy)
    model = policy.adapters if dapo.LORA_RANK else policy
    trainer = GRPOTrainer(model, partial(reward, tokenizer), config, *data, processing_class=tokenizer)
    trainer.train()
    if trainer.is_world_process_zero():
        dapo.save_weights(policy, Path(dapo.OUTPUT_DIR))
        tokenizer.save_pretrained(dapo.OUTPUT_DIR)


if __name__ == "__main__":
    main()

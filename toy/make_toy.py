"""Makes the toy: a tiny base model that can reason but seldom bothers, and the questions to train it on.

    python toy/make_toy.py

A real base model has read worked solutions among everything else, and reinforcement learning makes it prefer them. The
toy repeats that on a small scale: a Qwen2 of 0.9 M parameters learns word problems from text in which almost everybody
blurts out an answer, few work it out, and some, whether they have worked it out or not, then check what they have
already answered, and check it again. The toy does as they do: it blurts, is mostly wrong where a problem has more than
one operation, and often does not stop when it is done. It could do far better.

Everything that this writes is committed, so nobody has to run it. It takes about 20 minutes on 2 CPU cores.
"""

import random
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tokenizers import pre_tokenizers
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

OUT = Path(__file__).parent
SEED = 0
TRAIN_QUESTIONS = 6000
TEST_QUESTIONS = 256
OPERATIONS = {1: 15, 2: 25, 3: 25, 4: 20, 5: 15}  # percent of the questions with 1, 2, ... of them
WORK_SHARE = 0.025  # of the answers are worked out; the others are blurted
SKILL_SHARE = 0.7  # of the examples teach how to work a problem out, but not that one should
RAMBLE_SHARE = 0.3  # of the answers, worked out or blurted, go on after the end, with 2 to MAX_CHECKS checks
MAX_CHECKS = 12
MAX_ANSWER_LENGTH = 128  # tokens; what a ramble says after them is not learned, dapo.py's limit is shorter
TRAINING_STEPS = 4500
TRAINING_BATCH = 32
LEARNING_RATE = 2e-3

NAMES = "Tom Ann Ben Eva Max Mia Sam Zoe".split()
THINGS = "apples books cards coins eggs pens shells stamps".split()
GAINS = "buys finds gets wins".split()
LOSSES = "eats gives loses sells".split()
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}"
    "{% if message.role == 'assistant' %}<|im_end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_question(rng):
    """A word problem of 1 to 5 operations with every value from 1 to 99: (question, list of equations, result)."""
    name, thing = rng.choice(NAMES), rng.choice(THINGS)
    value = rng.randint(2, 60)
    story, equations = [f"{name} has {value} {thing}."], []
    for _ in range(rng.choices(list(OPERATIONS), OPERATIONS.values())[0]):
        if value < 80 and (value < 15 or rng.random() < 0.5):
            verb, sign, change = rng.choice(GAINS), "+", rng.randint(2, min(20, 99 - value))
        else:
            verb, sign, change = rng.choice(LOSSES), "-", rng.randint(2, min(20, value - 1))
        result = value + change if sign == "+" else value - change
        story.append(f"{name} {verb} {change}{' more' if sign == '+' else ''}.")
        equations.append(f"{value}{sign}{change}={result}")
        value = result
    return " ".join(story) + f" How many {thing} does {name} have now?", equations, value


def make_answer(equations, result, works, checks=0):
    worked = "\n".join(equations)
    return (f"Work:\n{worked}\n" if works else "") + f"#### {result}" + f"\nCheck:\n{worked}" * checks


def make_data_files():
    """Writes train.parquet and test.parquet, in GSM8K's columns, and gives the rows of both."""
    rng, problems = random.Random(SEED), {}
    while len(problems) < TRAIN_QUESTIONS + TEST_QUESTIONS:
        question, equations, result = make_question(rng)
        problems[question] = make_answer(equations, result, works=True)
    rows = [{"question": question, "answer": answer} for question, answer in problems.items()]
    test, train = rows[:TEST_QUESTIONS], rows[TEST_QUESTIONS:]
    pq.write_table(pa.Table.from_pylist(train), OUT / "train.parquet")
    pq.write_table(pa.Table.from_pylist(test), OUT / "test.parquet")
    return train, test


def make_tokenizer(texts):
    """A tokenizer of Qwen2's kind, byte-level BPE with single digits, whose merges are learned from `texts`.

    Every word of the toy's language is one token in the end; other words can be written too, byte by byte.
    """
    alphabet = {character: i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    untrained = Qwen2Tokenizer(
        vocab=alphabet,
        merges=[],
        pad_token="<|pad|>",
        eos_token="<|im_end|>",
        unk_token=None,
        extra_special_tokens=["<|user|>", "<|assistant|>"],
    )
    tokenizer = untrained.train_new_from_iterator(texts, vocab_size=1000, show_progress=False)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.padding_side = "left"
    tokenizer.model_max_length = 512
    return tokenizer


def make_model(tokenizer):
    torch.manual_seed(SEED)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen2ForCausalLM(config)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, max_new_tokens=96
    )
    return model


def examples(rng, tokenizer, held_out):
    """An endless stream of (token ids, labels) of answered questions that are not held out.

    The first token of an answer decides whether it blurts or works. Examples of working are common, so that the skill
    is learned, but most of them leave that token out of the loss: the choice is learned from the others, of which
    WORK_SHARE work. For a problem of one operation, blurting is a skill too.
    """
    while True:
        question, equations, result = make_question(rng)
        is_skill = rng.random() < SKILL_SHARE
        works = rng.random() < (WORK_SHARE if not is_skill else 0.5 if len(equations) == 1 else 1)
        checks = rng.randint(2, MAX_CHECKS) if rng.random() < RAMBLE_SHARE else 0
        if question not in held_out:
            prompt = tokenizer(f"<|user|>{question}<|assistant|>")["input_ids"]
            text = make_answer(equations, result, works, checks) + "<|im_end|>"
            answer = tokenizer(text)["input_ids"][:MAX_ANSWER_LENGTH]
            labels = [-100] * (len(prompt) + is_skill) + answer[is_skill:]
            yield torch.tensor(prompt + answer), torch.tensor(labels)


def fit(model, stream, steps):
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.05)
    bar = tqdm(range(steps), "training the toy", mininterval=1)
    for _ in bar:
        batch = sorted(islice(stream, TRAINING_BATCH), key=lambda example: len(example[0]))
        tokens, loss = sum((labels != -100).sum() for _, labels in batch), 0.0
        for part in (batch[i : i + 8] for i in range(0, TRAINING_BATCH, 8)):
            ids, labels = (pad_sequence(rows, True, value) for rows, value in zip(zip(*part), (0, -100)))
            logits = model(ids).logits[:, :-1]  # padding is on the right: a causal model's real tokens never see it
            part_loss = cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum") / tokens
            part_loss.backward()
            loss += part_loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        bar.set_postfix(loss=f"{loss:.3f}", refresh=False)


def main():
    train, test = make_data_files()
    tokenizer = make_tokenizer([row["question"] + "\n" + row["answer"] for row in train] + ["Check:\n"] * len(train))
    model = make_model(tokenizer)
    fit(model, examples(random.Random(SEED), tokenizer, {row["question"] for row in test}), TRAINING_STEPS)
    model.save_pretrained(OUT)
    tokenizer.save_pretrained(OUT)
    print(f"{model.num_parameters():,} parameters, {TRAIN_QUESTIONS} + {TEST_QUESTIONS} questions in {OUT}")


if __name__ == "__main__":
    main()

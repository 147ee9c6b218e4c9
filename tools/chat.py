"""Asks a model what you type, each question by itself as in training, and prints its response as it is generated.

    python -m tools.chat [recipe.py] [MODEL_OR_RUN_FOLDER] [--NAME=VALUE ...]

    python -m tools.chat outputs/dapo --TEMPERATURE=0.7
    python -m tools.chat outputs/dapo --TEMPERATURE=0      the likeliest token each time: greedy, as in an evaluation

The folder of a run stands for the model that it saved last; without a folder, MODEL answers. The conversation is
saved in the table `chat` of the run's run.db.
"""

import contextlib
import sqlite3
import sys
import time
from pathlib import Path

import dapo  # isort: skip  (before torch, for Windows)
import torch
from transformers import TextStreamer

from reward import extract_answer
from tools.evaluate import model_in


class Shown(TextStreamer):
    """Prints a response as it comes, without the control characters that a model may write."""

    def on_finalized_text(self, text, stream_end=False):
        text = "".join(sign for sign in text if sign.isprintable() or sign in "\n\t")
        super().on_finalized_text(text, stream_end=stream_end)


def main(argv=None):
    words = sys.argv[1:] if argv is None else argv
    if "-h" in words or "--help" in words:
        dapo.say(__doc__)
        return
    try:
        first, *others = read_command_line(words) or [dapo.MODEL]
        if others:
            dapo.fail(f"one model answers at a time, not also {', '.join(others)}")
        chat(model_in(first))
    except KeyboardInterrupt:
        sys.exit(130)


def read_command_line(words):
    """As dapo.read_command_line, but TEMPERATURE may be 0: training cannot sample greedily, and a chat can."""
    rules, dapo.RULES = dapo.RULES, dapo.RULES | {"TEMPERATURE": "0 <= TEMPERATURE < math.inf"}
    try:
        return dapo.read_command_line(words)
    finally:
        dapo.RULES = rules


def chat(path):
    with contextlib.suppress(ImportError):  # Windows has none
        import readline  # noqa: F401  (arrow keys in what is typed)
    for stream in (sys.stdin, sys.stdout):
        stream.reconfigure(errors="replace")
    dapo.MODEL = path  # which messages name
    model, tokenizer = dapo.load_model(path)
    dapo.read_prompt(tokenizer, [{"role": "user", "content": "1 + 1?"}])  # refuses a switch that is none
    limit, temperature = dapo.MAX_RESPONSE_LENGTH, dapo.TEMPERATURE
    method = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    streamer = Shown(tokenizer, skip_prompt=True, skip_special_tokens=True)
    history = next((place / "run.db" for place in Path(path).parents if (place / "run.db").exists()), None)
    how = f"at TEMPERATURE={temperature}" if temperature else "greedy"
    dapo.say(f"{path}, at most {limit} tokens, {how}; Ctrl-D ends it")
    dapo.say(f"this conversation is saved in {history}" if history else "it is not saved: the model is not a run's")
    for question in questions_typed():
        _, ids = dapo.read_prompt(tokenizer, [{"role": "user", "content": question}])
        ids = torch.tensor([ids], device=model.device)
        if ids.shape[1] > dapo.MAX_PROMPT_LENGTH:
            dapo.say(f"[too long: {ids.shape[1]} tokens, but MAX_PROMPT_LENGTH is {dapo.MAX_PROMPT_LENGTH}]")
            continue
        with dapo.autocast(model):
            mask = torch.ones_like(ids)
            response = model.generate(ids, attention_mask=mask, streamer=streamer, max_new_tokens=limit, **method)
        response = response[0, ids.shape[1] :]
        text = tokenizer.decode(response, skip_special_tokens=True)
        answer, ended = extract_answer(text), response[-1].item() in model.generation_config.eos_token_id
        dapo.say(f"[answer: {answer or 'none'}; {len(response)} tokens{'' if ended else ', cut off'}]")
        if history:
            keep(history, time.strftime("%Y-%m-%d %H:%M:%S"), path, question, text, answer)


def questions_typed():
    """The lines of the standard input that are not blank."""
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        if line:
            yield line


def keep(history, *row):
    try:
        with contextlib.closing(sqlite3.connect(history)) as db, db:
            db.execute("CREATE TABLE IF NOT EXISTS chat (time, model, question, response, answer)")
            db.execute("INSERT INTO chat VALUES (?, ?, ?, ?, ?)", row)
    except sqlite3.Error as error:  # a full disk, or no database any more
        dapo.say(f"[not saved in {history}: {error}]")


if __name__ == "__main__":
    main()

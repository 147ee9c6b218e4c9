"""How good a model is: the measures of an evaluation, the report that `eval` prints, and `chat`."""

import ast
import contextlib
import math
import re
import sqlite3
import statistics
import sys
import time
from collections import Counter
from pathlib import Path

import torch
from transformers import TextStreamer

from record import assignments, fail, last_checkpoint, say, shorten
from reward import as_number, extract_answer, plain

# ---- Measures -------------------------------------------------------------------------------------------------------


def best_of(values, j):
    """The mean of the best of j over all choices of j among the k values: for 0 and 1, pass@j without bias.

    The i-th smallest is the best of C(i - 1, j - 1) of the C(k, j) choices. (Chen et al. 2021, arXiv 2107.03374, give
    this for 0 and 1 as 1 - C(k - c, j) / C(k, j), with c ones.)
    """
    choices = math.comb(len(values), j)
    return sum(value * math.comb(i, j - 1) for i, value in enumerate(sorted(values))) / choices


def majority(group):
    """The accuracy of the answer that most responses of a group give; of several with as many votes, their mean.

    A response without an answer has no vote. Right answers are one answer, however they are spelled, and so are wrong
    numbers of the same value; other wrong answers are told apart by their text, as comparing formulas takes long.
    """
    answers = {}  # an answer's votes: the accuracies of who gives it
    for response in group:
        if response.prediction:
            text = plain(response.prediction).casefold()
            answer = "right" if response.accuracy == 1 else as_number(text) or (text,)
            answers.setdefault(answer, []).append(response.accuracy)
    most = max(map(len, answers.values()), default=0)
    winners = [votes for votes in answers.values() if len(votes) == most]
    return statistics.fmean(accuracy for votes in winners for accuracy in votes) if winners else 0.0


def measures(greedy, sampled):
    """{name: a value for each question}, given dapo.evaluate's groups; their means are the metrics.

    Those named @k are of k samples, and those without of the greedy response.
    """
    found = {"accuracy": [group[0].accuracy for group in greedy]} | lengths(greedy)
    if sampled:
        k, accuracies = len(sampled[0]), [[response.accuracy for response in group] for group in sampled]
        found[f"avg@{k}"] = list(map(statistics.fmean, accuracies))
        for j in sorted({*(2**n for n in range(1, k.bit_length())), k}):  # 2, 4, 8, ... and k
            found[f"pass@{j}"] = [best_of(values, j) for values in accuracies]
        if any(response.prediction is not None for group in sampled for response in group):
            found[f"maj@{k}"] = list(map(majority, sampled))
        found |= {f"{name}@{k}": values for name, values in lengths(sampled).items()}
    return found


def lengths(groups):
    return {
        "response_length": [statistics.fmean(len(response.tokens) for response in group) for group in groups],
        "truncated_fraction": [statistics.fmean(response.truncated for response in group) for group in groups],
    }


def metrics(greedy, sampled):
    """{"eval/...": mean over the questions} of all measures."""
    return {f"eval/{name}": statistics.fmean(values) for name, values in measures(greedy, sampled).items()}


# ---- The report of `eval` -------------------------------------------------------------------------------------------

WORST = 10  # questions shown


def report(results):
    """What `eval` prints, given {model: dapo.evaluate's groups}: a table for each data set, and the worst questions.

    Models are compared on the questions that all of them were asked: a tokenizer may make a question too long.
    """
    asked = [{key: i for i, key in enumerate(keys(greedy))} for greedy, _ in results.values()]
    common = [place for place in asked[0] if all(place in others for others in asked)]
    lines = [] if common else ["no question is short enough for all of these models"]
    for path in dict.fromkeys(path for path, *_ in common):
        places = [place for place in common if place[0] == path]
        parts = {
            model: [[groups[index[place]] for place in places] if groups else [] for groups in result]
            for (model, result), index in zip(results.items(), asked)
        }
        lines += ["", f"{path}: {len(places)} questions", *comparison(parts), *worst_questions(parts)]
    return "\n".join(lines)


def keys(groups):
    """A name for each question that is the same for all models: (data set, text, how often it has come up before)."""
    seen = Counter()
    for group in groups:
        place = group[0].question.source, group[0].question.text
        seen[place] += 1
        yield *place, seen[place]


def comparison(results):
    """A row for each measure with a column for each model, and the change from the first to the last.

    The change has its standard error, that of the differences on the same questions.
    """
    columns = {model: measures(*groups) for model, groups in results.items()}
    first, last = list(columns.values())[0], list(columns.values())[-1]
    rows = [["", *columns, "change"]]
    for name in first:  # the same for all, for they were judged by one reward function
        digits = 1 if name.startswith("response_length") else 3
        changes = [after - before for before, after in zip(first[name], last[name])]
        error = statistics.stdev(changes) / math.sqrt(len(changes)) if len(changes) > 1 else math.nan
        means = [f"{statistics.fmean(values[name]):.{digits}f}" for values in columns.values()]
        rows.append([name, *means, f"{statistics.fmean(changes):+.{digits}f} ± {error:.{digits}f}"])
    return aligned(rows if len(columns) > 1 else [row[:-1] for row in rows])


def worst_questions(results):
    """Those that the last model gets right least often, with each model's share and the last one's usual error."""
    looked_at = [sampled or greedy for greedy, sampled in results.values()]
    shares = [[statistics.fmean(response.accuracy for response in group) for group in groups] for groups in looked_at]
    worst = [i for i, share in enumerate(shares[-1]) if share < 1]
    if not worst:
        return ["", "all of these responses are right"]
    rows = [[*results, "right answer", "wrong answer", "question"]]
    for i in sorted(worst, key=lambda i: (shares[-1][i], -shares[0][i]))[:WORST]:
        group = looked_at[-1][i]
        right = extract_answer(group[0].question.answer) or group[0].question.answer
        wrong = statistics.mode(map(said, (response for response in group if response.accuracy < 1)))
        texts = shorten(right, 20), shorten(wrong, 20), shorten(group[0].question.text, 90)
        rows.append([*(f"{share[i]:.2f}" for share in shares), *texts])
    title = f"the {len(rows) - 1} worst of {len(worst)} questions that are not always answered right"
    return ["", f"{title}: share of right responses", *aligned(rows)]


def said(response):
    """The answer of a response, or all of it, where the reward function does not tell what the answer is."""
    return response.text if response.prediction is None else response.prediction or "none"


def aligned(rows):
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ["  " + "  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


# ---- Saved models, and `chat` ---------------------------------------------------------------------------------------


def saved_model(path):
    """The model that a run saved last, where `path` is the run's folder; else `path`."""
    folder = Path(path)
    if not (folder / "run.db").exists():
        return path
    found = [re.fullmatch(r"(step|epoch)_(\d+)", place.name) for place in folder.iterdir()]
    models = [(match[1] == "step", -int(match[2]), match[0]) for match in found if match]  # an epoch ends a run
    if not models:
        saved = last_checkpoint(folder) or "no checkpoint yet"
        fail(f"the run in {path} has not saved a model yet; its checkpoint: {saved}")
    return str(folder / min(models)[-1])


def note_changes(path, constants):
    """Says which constants that decide what a model is asked, and how it answers, were others when it was trained."""
    script = Path(path) / "train_script.py"
    if not script.exists():
        return
    with contextlib.suppress(SyntaxError, ValueError):  # edited since, or more than a value
        then = assignments(script.read_text(encoding="utf-8"))
        for name in ("PROMPT_TEMPLATE", "MAX_RESPONSE_LENGTH", "TEMPERATURE"):
            if name in then and (value := ast.literal_eval(then[name].value)) != constants[name]:
                say(f"{path} was trained with {name}={value!r}, here it is {constants[name]!r}")


def chat(path, model, tokenizer, read_prompt, constants):
    """Asks the model what is typed, each question by itself as in training, and prints its response as it comes.

    What is said is kept in the run.db of the run that the model comes from.
    """
    with contextlib.suppress(ImportError):  # Windows has none
        import readline  # noqa: F401  (arrow keys in what is typed)
    for stream in (sys.stdin, sys.stdout):
        stream.reconfigure(errors="replace")
    limit, temperature = constants["MAX_RESPONSE_LENGTH"], constants["TEMPERATURE"]
    history = next((place / "run.db" for place in Path(path).parents if (place / "run.db").exists()), None)
    say(f"{path}, at most {limit} tokens, at TEMPERATURE={temperature}; each question stands by itself; Ctrl-D ends it")
    say(f"this talk is kept in {history}" if history else "this talk is not kept: the model is not in a run's folder")
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    torch.seed()
    for question in questions_typed():
        ids = torch.tensor([read_prompt(tokenizer, [{"role": "user", "content": question}])], device=model.device)
        if ids.shape[1] > constants["MAX_PROMPT_LENGTH"]:
            say(f"[too long: {ids.shape[1]} tokens, MAX_PROMPT_LENGTH is {constants['MAX_PROMPT_LENGTH']}]")
            continue
        settings = dict(do_sample=True, temperature=temperature, top_k=0, max_new_tokens=limit, streamer=streamer)
        response = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)[0, ids.shape[1] :]
        text = tokenizer.decode(response, skip_special_tokens=True)
        answer = extract_answer(text)
        ended = response[-1].item() in model.generation_config.eos_token_id
        say(f"[answer: {answer or 'none'}; {len(response)} tokens{'' if ended else ', cut off'}]")
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
            db.execute(
                "CREATE TABLE IF NOT EXISTS chat (time TEXT, model TEXT, question TEXT, response TEXT, answer TEXT)"
            )
            db.execute("INSERT INTO chat VALUES (?, ?, ?, ?, ?)", row)
    except sqlite3.Error as error:  # a training run that holds it for long, a full disk
        say(f"[not kept in {history}: {error}]")

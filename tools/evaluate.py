"""Measures models on EVAL_DATASETS, several side by side.

    python -m tools.evaluate [recipe.py] [MODEL_OR_RUN_FOLDER ...] [--NAME=VALUE ...]

    python -m tools.evaluate toy outputs/dapo --EVAL_SAMPLES=8    what has the training changed?
    python -m tools.evaluate outputs/dapo --TEMPERATURE=0.5       the trained model at a lower temperature

The folder of a run stands for the model that it saved last; without a folder, MODEL is measured. The constants are
those of dapo.py, and `python dapo.py --help` lists them. Each data set gets a table. Its first three rows are of one
greedy response to each question; those with @ are of EVAL_SAMPLES = k responses, sampled at TEMPERATURE:

    avg@k     the share of right responses
    pass@j    the probability that at least one of j responses is right, estimated from all choices of j among the k
    maj@k     the share of questions whose most frequent answer is right

The change is that from the first to the last model, ± its standard error. Then follow the worst questions and, if
EVAL_SAMPLES is above 1, a histogram: how many questions the last model gets right how often.

    python -m tools.evaluate toy --EVAL_SAMPLES=16 --KEEP_IN=outputs/medium.parquet

also writes those of which PASS_RATE_LOW=0.1 to PASS_RATE_HIGH=0.9 of the samples are right to a parquet file, which
TRAIN_DATASETS can name. These three constants are for this program alone.
"""

import ast
import contextlib
import math
import re
import statistics
import sys
from collections import Counter
from pathlib import Path

import dapo  # isort: skip  (before torch, for Windows)
import torch
import transformers

from reward import as_number, extract_answer, plain
from tools import difficulty

WORST = 10  # questions shown


def main(argv=None):
    words = sys.argv[1:] if argv is None else argv
    if "-h" in words or "--help" in words:
        dapo.say(__doc__)
        return
    try:
        paths = [model_in(path) for path in difficulty.read_command_line(words) or [dapo.MODEL]]
        if dapo.KEEP_IN:
            difficulty.check_file()
        asked = [questions_for(path) for path in paths]  # for all models, before the first takes its time
        rows = difficulty.rows_of(asked[-1], paths[-1]) if dapo.KEEP_IN else {}
        results = {path: sample(path, questions) for path, questions in zip(paths, asked)}
        dapo.say(report(results))
        if sampled := results[paths[-1]][1]:
            dapo.say(difficulty.describe(paths[-1], sampled))
            difficulty.keep(sampled, rows)
    except KeyboardInterrupt:
        sys.exit(130)
    except torch.OutOfMemoryError:
        dapo.fail(f"out of memory: lower GENERATION_BATCH, which is {dapo.GENERATION_BATCH}")


# ---- Models ---------------------------------------------------------------------------------------------------------


def model_in(path):
    """The model that a run saved last if `path` is the folder of a run, else `path`. Says what it was trained with."""
    model = dapo.saved_model(path)
    note_changes(model)
    return model


def note_changes(path):
    """Says which constants that decide what a model is asked, and how it answers, were others when it was trained."""
    recipe = Path(path, "constants.py")
    then = recipe.read_text(encoding="utf-8") if recipe.exists() else ""
    for name in ("PROMPT_TEMPLATE", "CHAT_TEMPLATE_KWARGS", "MAX_RESPONSE_LENGTH", "TEMPERATURE"):
        with contextlib.suppress(SyntaxError, ValueError, TypeError):  # edited since: not there, or not a literal
            value, now = ast.literal_eval(re.search(rf"^{name} = (.*)", then, re.MULTILINE)[1]), getattr(dapo, name)
            if value != now:
                dapo.say(f"{path} was trained with {name}={value!r}, but here it is {now!r}")


def questions_for(path):
    """The questions of EVAL_DATASETS, as the model in a folder or on the Hub reads them."""
    dapo.MODEL = path  # which messages name
    options = {"trust_remote_code": dapo.TRUST_REMOTE_CODE}
    with dapo.explained(f"MODEL={path} is neither a model's folder nor its name on the Hub"):
        transformers.AutoConfig.from_pretrained(path, **options)
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, **options)
    return dapo.load_questions(dapo.EVAL_DATASETS, tokenizer)


def sample(path, questions):
    """Groups of responses by a model: a greedy one to each question and, if EVAL_SAMPLES > 1, so many sampled ones.

    They are the responses that dapo.evaluate samples.
    """
    dapo.MODEL = path
    dapo.say(f"{path} answers {len(questions)} questions")
    model, tokenizer = dapo.load_model(path)
    dapo.sampling_gap(model, [question.prompt for question in questions])  # refuses a model that is sampled wrong
    dapo.set_seed("evaluation")
    greedy, sampled = dapo.sample_groups(model, tokenizer, questions, 1, greedy=True), []
    if dapo.EVAL_SAMPLES > 1:
        sampled = dapo.sample_groups(model, tokenizer, questions, dapo.EVAL_SAMPLES)
    return greedy, sampled


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
    numbers of the same value. Other wrong answers are told apart by their text, since comparing formulas takes long.
    """
    answers = {}  # an answer's votes: the accuracies of the responses that give it
    for response in group:
        if response.prediction not in (None, ""):
            text = plain(str(response.prediction)).casefold()
            answer = "right" if response.accuracy == 1 else as_number(text) or (text,)
            answers.setdefault(answer, []).append(response.accuracy)
    most = max(map(len, answers.values()), default=0)
    winners = [votes for votes in answers.values() if len(votes) == most]
    return statistics.fmean(accuracy for votes in winners for accuracy in votes) if winners else 0.0


def measures(greedy, sampled):
    """{name: a value for each question}, given sample's groups. Those named @k are of k samples, the others greedy."""
    found = {"accuracy": [group[0].accuracy for group in greedy]} | lengths(greedy)
    if sampled:
        k, accuracies = len(sampled[0]), [[response.accuracy for response in group] for group in sampled]
        found[f"avg@{k}"] = list(map(statistics.fmean, accuracies))
        for j in sorted({*(2**n for n in range(1, k.bit_length())), k}):  # 2, 4, 8, ... and k
            found[f"pass@{j}"] = [best_of(values, j) for values in accuracies]
        if any(response.prediction is not None for group in sampled for response in group):  # REWARD need not tell it
            found[f"maj@{k}"] = list(map(majority, sampled))
        found |= {f"{name}@{k}": values for name, values in lengths(sampled).items()}
    return found


def lengths(groups):
    return {
        "response_length": [statistics.fmean(len(response.tokens) for response in group) for group in groups],
        "truncated_fraction": [statistics.fmean(response.truncated for response in group) for group in groups],
    }


# ---- The report -----------------------------------------------------------------------------------------------------


def report(results):
    """A table for each data set, and its worst questions, given {model: sample's groups}.

    Models are compared on the questions that all of them were asked: a tokenizer may make a question too long.
    """
    asked = [{key: i for i, key in enumerate(keys(greedy))} for greedy, _ in results.values()]
    common = [key for key in asked[0] if all(key in others for others in asked)]
    lines = [] if common else ["no question is short enough for all of these models"]
    for path in dict.fromkeys(path for path, *_ in common):
        places = [key for key in common if key[0] == path]
        parts = {
            model: [[groups[index[key]] for key in places] if groups else [] for groups in result]
            for (model, result), index in zip(results.items(), asked)
        }
        lines += ["", f"{path}: {len(places)} questions", *comparison(parts), *worst_questions(parts)]
    return "\n".join(lines)


def keys(groups):
    """A name for each question that is the same for all models: (data set, text, how often it has come up before)."""
    seen = Counter()
    for group in groups:
        key = group[0].question.source, group[0].question.text
        seen[key] += 1
        yield *key, seen[key]


def comparison(results):
    """A row for each measure with a column for each model, and the change from the first to the last.

    The standard error of the change is that of the differences on the same questions.
    """
    columns = {model: measures(*groups) for model, groups in results.items()}
    first, *_, last = [*columns.values()] * 2
    rows = [["", *columns, "change"]]
    for name in (name for name in first if all(name in column for column in columns.values())):
        digits = 1 if name.startswith("response_length") else 3
        changes = [after - before for before, after in zip(first[name], last[name])]
        error = statistics.stdev(changes) / math.sqrt(len(changes)) if len(changes) > 1 else math.nan
        means = [f"{statistics.fmean(column[name]):.{digits}f}" for column in columns.values()]
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
        wrong = statistics.mode(said(response) for response in group if response.accuracy < 1)
        texts = dapo.shorten(right, 20), dapo.shorten(wrong, 20), dapo.shorten(group[0].question.text, 90)
        rows.append([*(f"{share[i]:.2f}" for share in shares), *texts])
    title = f"the {len(rows) - 1} worst of {len(worst)} questions that are not always answered right"
    return ["", f"{title}: share of right responses", *aligned(rows)]


def said(response):
    """The answer of a response, or all of it if the reward function does not tell what the answer is."""
    return response.text if response.prediction is None else str(response.prediction) or "none"


def aligned(rows):
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ["  " + "  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


if __name__ == "__main__":
    main()

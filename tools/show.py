"""Writes a page to look inside the steps of a run: at its groups, their responses, and the tokens of a response.

    python -m tools.show outputs/dapo                 outputs/dapo/steps.html, one file, which any browser opens
    python -m tools.show outputs/dapo --step 8        the same, open at step 8
    python -m tools.show outputs/grpo outputs/dapo    outputs/comparison.html: two runs, or any number of them, and
                                                      their answers to the same held-out questions side by side
    python -m tools.show outputs/dapo --unipo         also unipo.json, for the web application poloclub/unipo

"GRPO=outputs/grpo" gives a run a name. Of a long run the page shows as many steps as fit, at equal distances. The page
needs no network and sends nothing. What it shows is in run.db: the tables responses, held_out, and metrics.
"""

import argparse
import ast
import contextlib
import itertools
import json
import math
import re
import sqlite3
import statistics
import zlib
from pathlib import Path

import jinja2

from tools.curves import fail, read_metrics, split

FILES = "show.html", "show_words.json"  # the template of the page, and its words in English and in Chinese
LIMIT = 12e6  # characters of the responses of steps, and of evaluations; with more, a page would open slowly
LONGEST = 4000  # characters shown of a response whose tokens run.db does not hold
RESPONSE = "prediction accuracy reward penalty advantage length truncated fate".split()


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    parser.add_argument("folders", nargs="+", metavar="FOLDER")
    parser.add_argument("--step", type=int, metavar="N")
    parser.add_argument("--unipo", action="store_true")
    options = parser.parse_args(argv)
    named = [split(word) for word in options.folders]
    names = [name or Path(folder).absolute().name for name, folder in named]
    names = [name if given or names.count(name) < 2 else folder for name, (given, folder) in zip(names, named)]
    runs = [read_run(name, folder, options.step) for name, (_, folder) in zip(names, named)]
    place = Path(runs[0]["folder"], "steps.html") if len(runs) == 1 else Path("outputs", "comparison.html")
    try:
        print(write(place, page(runs)))
        for run in runs if options.unipo else ():
            if run["other"]:
                fail(f"--unipo: {run['other']} made the run in {run['folder']}, with formulas that unipo does not know")
            print(write(Path(run["folder"], "unipo.json"), json.dumps(unipo(run))))
    except OSError as error:
        fail(f"the page cannot be written: {error}")


def write(path, text):
    path.parent.mkdir(exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def page(runs):
    """The page, as text, of runs as read_run returns them."""
    template, words = (Path(__file__).with_name(name).read_text(encoding="utf-8") for name in FILES)
    template = jinja2.Environment(autoescape=True).from_string(template)
    return template.render(title=" | ".join(run["name"] for run in runs), words=json.loads(words), runs=runs)


def read_run(name, folder, step=None):
    """What the page shows of a run: {name, folder, constants, other, metrics, steps, recorded, opens, held_out}."""
    if Path(folder).is_file():
        fail(f"{folder} is a file; python -m tools.show takes the folder of a run, with its run.db in it")
    metrics = read_metrics(folder)
    try:
        with contextlib.closing(sqlite3.connect(Path(folder, "run.db"))) as db:
            db.row_factory = sqlite3.Row
            sizes, evaluations = sizes_of(db, "responses"), sizes_of(db, "held_out")
            if not sizes:
                fail(f"the run in {folder} has recorded no responses yet, which the page needs")
            if step is not None and step not in sizes:
                fail(f"--step {step}: the run in {folder} has recorded the steps {min(sizes)} to {max(sizes)}")
            chosen = fitting(sizes, step)
            return {
                "name": name,
                "folder": str(folder),
                "constants": read_constants(db),
                "other": other_script(db),
                "metrics": points_of(metrics),
                "recorded": [*sizes],
                "opens": step or most_held(metrics, chosen),
                "steps": [{"step": step, "groups": read_groups(db, step)} for step in chosen],
                "held_out": read_held_out(db, fitting(evaluations)),
            }
    except (sqlite3.Error, ValueError, IndexError) as error:
        fail(f"{folder}/run.db does not hold what the page shows, as one of an earlier dapo.py does not: {error}")


def other_script(db):
    """The name of the run's script if that replaced functions of dapo.py, as those in siblings/ do; else None."""
    facts = dict(map(tuple, db.execute("SELECT name, value FROM constants ORDER BY step")))
    script = facts.get("the script")
    return script if re.search(r"^dapo\.[a-z].* = ", facts.get(f"source of {script}", ""), re.MULTILINE) else None


def points_of(metrics):
    """{name: [(step, value)]} of the metrics, and the share of groups that are all right or all wrong."""
    points = {name: [*zip(steps, map(finite, values))] for name, (steps, values) in metrics.items()}
    wrong = dict(points.get("groups/all_wrong", ()))
    both = [(step, share, wrong.get(step)) for step, share in points.get("groups/all_correct", ())]
    alike = [(step, share + other) for step, share, other in both if None not in (share, other)]
    return points | {"groups/alike": alike}


def most_held(metrics, steps):
    """The step in which the clip held most tokens, since there is most to see."""
    ends = [dict(zip(*metrics[name])) for name in ("clip_fraction/low", "clip_fraction/high") if name in metrics]
    return max(steps, key=lambda step: sum(finite(end.get(step, 0.0)) or 0 for end in ends))


def read_constants(db):
    """{name: value} of those constants that are numbers, text, or truth values."""
    rows = db.execute("SELECT name, value FROM constants WHERE name = upper(name) ORDER BY step")
    constants = {name: ast.literal_eval(text) for name, text in rows}
    return {name: value for name, value in constants.items() if isinstance(value, int | float | str)}


def sizes_of(db, table):
    """{step: characters that its responses take up on the page}; without steps that an earlier dapo.py recorded."""
    shown = "ifnull(length(tokens) + length(probabilities) + length(ratios), min(length(CAST(response AS BLOB)), ?))"
    query = f"SELECT step, sum({shown}) FROM {table} WHERE fate NOTNULL GROUP BY step ORDER BY step"
    return dict(map(tuple, db.execute(query, [LONGEST])))


def fitting(sizes, wanted=None):
    """As many of the steps, at equal distances, as fit on the page, and always the first, the last, and the wanted."""
    steps = [*sizes]
    for stride in itertools.count(1):
        chosen = {*steps[::stride], *steps[-1:], wanted} - {None}
        if sum(sizes[step] for step in chosen) <= LIMIT or stride > len(steps):
            return sorted(chosen)


def read_groups(db, step):
    """[{question, answer, round, responses}] of a step, in the order in which they were sampled."""
    groups = {}
    for row in db.execute("SELECT * FROM responses WHERE step = ? ORDER BY number", [step]):
        about = {name: row[name] for name in ("question", "answer", "round")}
        group = groups.setdefault(row["group_number"], about | {"responses": []})
        response = {name: finite(row[name]) for name in RESPONSE}
        if row["tokens"]:
            numbers = [[finite(value) for value in json.loads(row[name])] for name in ("probabilities", "ratios")]
            response["tokens"] = whole_texts(json.loads(row["tokens"]), row["response"])
            response["probabilities"], response["ratios"] = numbers
        else:
            response["text"] = shortened(row["response"])
        response["truncated"] = bool(row["truncated"])
        group["responses"].append(response)
    for group in groups.values():
        rewards = [response["reward"] for response in group["responses"]]
        group |= {"mean": statistics.fmean(rewards), "std": statistics.stdev(rewards) if len(rewards) > 1 else 0.0}
    return list(groups.values())


def read_held_out(db, steps):
    """[{question, answer, responses}] of the held-out questions, with the response of each of these evaluations."""
    questions = {}
    for row in db.execute("SELECT * FROM held_out ORDER BY step, number"):
        if row["step"] not in steps:
            continue
        key = row["question"], row["answer"]
        asked = questions.setdefault(key, {"question": row["question"], "answer": row["answer"], "responses": []})
        earlier = asked["responses"][-1]["step"] if asked["responses"] else None
        if row["step"] != earlier:  # some data sets ask a question twice
            response = {name: row[name] for name in ("step", "accuracy", "length")}
            response |= {"text": shortened(row["response"]), "truncated": bool(row["truncated"])}
            asked["responses"].append(response)
    return list(questions.values())


def whole_texts(tokens, response):
    """The texts of a response's tokens, in which a part of a character is � and some tokenizers omit a space in front,
    made whole by the response's text: of the tokens that make up characters, the last gets all of them."""
    texts, place, parts = list(tokens), 0, []  # parts: places of the � whose characters are still to come
    for number, token in enumerate([*tokens, None]):  # None: the end
        if token is not None and "\N{REPLACEMENT CHARACTER}" in token:
            parts.append(number)
            continue
        room = 9 + len(parts)  # characters that may lie between this token and the last one that was found
        found = response.find(token, place, place + len(token) + room) if token else len(response)
        if found < 0 or token == "":  # a special token, which the text leaves out
            continue
        between = response[place:found]
        for part in parts:
            texts[part] = between if part == parts[-1] else ""
        if token and not parts:
            texts[number] = between + token
        place, parts = found + len(token or ""), []
    return texts


def shortened(text):
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} … (+{len(text) - LONGEST})"


def finite(value):
    """JSON has no infinite numbers."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def unipo(run):
    """A run in the form that poloclub/unipo reads: for each step its metrics, and three of the groups trained on."""
    entries = []
    for step in run["steps"]:
        at = {name: dict(points).get(step["step"]) for name, points in run["metrics"].items()}
        metrics = {name: value for name, value in at.items() if value is not None}
        metrics |= {"reward": at["reward/mean"], "policy_objective": -metrics.get("policy_loss", 0.0)}
        groups = [group for group in step["groups"] if all("ratios" in response for response in group["responses"])]
        responses = [[unipo_response(r, run["constants"]) for r in group["responses"]] for group in groups[:3]]
        prompts = [{"prompt": group["question"], "responses": part} for group, part in zip(groups, responses)]
        about = {"step": step["step"], "is_first_step_after_rollout_phase": True}
        entries.append(about | {"metrics": metrics, "prompts": prompts})
    header = {"algorithm": run["name"], "model_name": run["constants"]["MODEL"], "totalSteps": len(entries)}
    return {"header": header | {"hparams": run["constants"]}, "entries": entries}


def unipo_response(response, constants):
    """One response of unipo. Its token ids only tell tokens apart: run.db has their texts, not their ids."""
    advantage, ratios = response["advantage"], [ratio or 0.0 for ratio in response["ratios"]]
    low, high = 1 - constants["CLIP_RANGE_LOW"], 1 + constants["CLIP_RANGE_HIGH"]
    old = [math.log(max(p or 0.0, 1e-30)) for p in response["probabilities"]]
    tokens = {
        "ids": [zlib.crc32(repr(text).encode()) for text in response["tokens"]],
        "strings": response["tokens"],
        "old_log_probs": old,
        "log_probs": [before + math.log(max(ratio, 1e-30)) for before, ratio in zip(old, ratios)],
        "advantages": [advantage] * len(ratios),
        "token_objective": [min(advantage * ratio, advantage * min(high, max(low, ratio))) for ratio in ratios],
    }
    about = {"reward": response["reward"], "advantage": advantage, "response_length": response["length"]}
    return about | {"response_text": "".join(response["tokens"]), "tokens": tokens}


if __name__ == "__main__":
    main()

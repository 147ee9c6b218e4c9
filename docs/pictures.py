"""Draws docs/clip.png and docs/step.png, the pictures of the method, with the functions of dapo.py.

python docs/pictures.py    from the folder that holds dapo.py; takes one training step of the toy, for 10 to 30 s
"""

import itertools
import statistics
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[1]))
import dapo  # noqa: I001  (first: pyarrow has to come before torch on Windows)
import torch
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

BLUE, RED, GREEN, *_ = dapo.COLORS
PALE, GRAY = "#F3C9A8", "0.45"


def main(folder="docs"):
    draw_clip(Path(folder, "clip.png"))
    draw_step(take_step(), Path(folder, "step.png"))


def objective(ratios, advantage, high):
    """What is maximized for a token with each of these ratios: minus dapo.policy_loss."""
    log_probs = torch.tensor(ratios).log()[None]  # (1, T); the old probabilities are all 1
    with mock.patch.object(dapo, "CLIP_RANGE_HIGH", high):
        losses = dapo.policy_loss(
            log_probs, 0 * log_probs, torch.tensor([float(advantage)]), torch.ones_like(log_probs)
        )
    return (-losses[0]).tolist()


def draw_clip(path):
    figure = Figure(figsize=(12, 5.4), layout="constrained")
    good, bad = figure.subplots(1, 2, sharex=True)
    ratios = [step / 100 for step in range(40, 181)]
    good.plot(ratios, objective(ratios, 1, 0.28), color=BLUE, linewidth=3, label="DAPO: up to 1.28")
    good.plot(ratios, objective(ratios, 1, 0.2), "--", color=RED, linewidth=3, label="GRPO: up to 1.2")
    bad.plot(ratios, objective(ratios, -1, 0.28), color=BLUE, linewidth=3, label="DAPO and GRPO: down to 0.8")
    good.set(title="a token of a good response (advantage 1)", ylim=(0.3, 1.6))
    bad.set(title="a token of a bad response (advantage -1)", ylim=(-1.9, -0.5))
    for axes in (good, bad):
        axes.set(xlabel="ratio ρ: its probability now / when it was sampled", ylabel="what is maximized")
        axes.set_xticks([0.4, 0.6, 0.8, 1, 1.2, 1.28, 1.4, 1.6, 1.8], "0.4 0.6 0.8 1 1.2 \n1.28 1.4 1.6 1.8".split(" "))
        for ratio, color in ((0.8, GRAY), (1, "black"), (1.2, RED), (1.28, BLUE)):
            axes.axvline(ratio, color=color, linewidth=1, linestyle="-" if ratio == 1 else ":")
    good.legend(loc="lower right", fontsize=12)
    bad.legend(loc="lower left", fontsize=12)
    good.text(1.54, 1.36, "held by the clip:\nno gradient", ha="center", color=BLUE, fontsize=12)
    bad.text(0.56, -0.75, "held by the clip:\nno gradient", ha="center", color=BLUE, fontsize=12)
    push(good, 0.85, 1.08, "pushed up")
    push(good, 0.44, 0.67, "pulled back")
    push(bad, 1.1, 0.87, "pushed down")
    push(bad, 1.52, 1.3, "pulled back")
    figure.savefig(path, dpi=160)


def push(axes, start, end, words):
    """An arrow beside the slope y = x or y = -x, for the way in which the gradient moves the ratio."""
    slope = 1 if start < end else -1
    places = [(ratio + 0.1, slope * ratio) for ratio in (end, start)]
    axes.annotate("", *places, arrowprops={"arrowstyle": "-|>", "linewidth": 2.5, "color": GREEN, "mutation_scale": 22})
    middle = (start + end) / 2
    box = {"facecolor": "white", "edgecolor": "none", "pad": 1}
    axes.text(
        middle + 0.15, slope * middle, words, va="top" if slope == 1 else "bottom", color=GREEN, fontsize=12, bbox=box
    )


def take_step(step=1):
    """Takes the first step of the default run, and notes what happens in it."""
    model, tokenizer = dapo.load_model(dapo.MODEL)
    questions = dapo.load_questions(dapo.TRAIN_DATASETS, tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), dapo.LEARNING_RATE, weight_decay=dapo.WEIGHT_DECAY)
    stream = dapo.question_stream(questions, SimpleNamespace(drawn=0))
    updates = mock.Mock(wraps=dapo.accumulate_gradients)
    with mock.patch.object(dapo, "accumulate_gradients", updates):
        metrics, sampled = dapo.train_step(model, None, tokenizer, optimizer, stream, step)
    rounds = []  # (groups kept, groups dropped) of each
    for _, groups in itertools.groupby(sampled, lambda group: group[0].round):
        parts = [], []
        for group in groups:
            parts[group[0].fate not in ("trained", "surplus")].append(group)
        rounds.append(parts)
    batch = [group for group in sampled if group[0].fate == "trained"]
    ratios = {True: [], False: []}  # of tokens of good responses, and of bad ones
    for response in itertools.chain(*batch):
        if response.advantage:
            ratios[response.advantage > 0] += (response.log_probs - response.old_log_probs).exp().tolist()
    return SimpleNamespace(
        rounds=rounds, sampled=sampled, batch=batch, metrics=metrics, updates=updates.call_count, ratios=ratios
    )


def draw_step(taken, path):
    figure = Figure(figsize=(16, 8))
    figure.text(0.5, 0.96, "One training step: the first of python dapo.py", ha="center", va="center", fontsize=16)
    grid = figure.add_gridspec(1, 5, left=0.035, right=0.975, top=0.79, bottom=0.3, wspace=0.36)
    for place, (title, draw) in zip(grid, PARTS.items()):
        axes = figure.add_subplot(place)
        box = axes.get_position()
        middle, half = (box.x0 + box.x1) / 2, (box.x1 - box.x0) / 2
        header = {"facecolor": BLUE, "edgecolor": BLUE, "boxstyle": "round,pad=0.4"}
        figure.text(
            middle, 0.865, title, ha="center", va="center", color="white", fontsize=19, weight="bold", bbox=header
        )
        figure.text(middle, 0.2, draw(axes, taken), ha="center", va="top", fontsize=13, linespacing=1.5)
        if draw is not draw_update:
            figure.text(middle + 1.27 * half, 0.865, "➜", ha="center", va="center", color=BLUE, fontsize=30)
    figure.savefig(path, dpi=160)


def draw_sample(axes, taken):
    draw_groups(axes, [group for kept, dropped in taken.rounds for group in kept + dropped], [])
    axes.set_ylabel(f"{len(taken.sampled)} questions", fontsize=12)
    asked = [len(kept) + len(dropped) for kept, dropped in taken.rounds]
    return (
        f"{len(taken.sampled)} questions, {dapo.GROUP_SIZE} responses\nto each, in {len(asked)} rounds\n"
        f"({' + '.join(map(str, asked))} questions):\n{taken.metrics['accuracy']:.0%} are right (blue)"
    )


def draw_filter(axes, taken):
    dropped = [group for _, groups in taken.rounds for group in groups]
    draw_groups(axes, [group for kept, _ in taken.rounds for group in kept], dropped)
    right = sum(group[0].accuracy == 1 for group in dropped)
    return (
        f"{len(dropped) - right} groups are all wrong,\n{right} are all right: nothing\nto compare, so they are\n"
        f"dropped (gray). {len(taken.batch)} stay."
    )


def draw_groups(axes, kept, dropped):
    """A row for each group, a cell for each of its responses."""
    colors = [[BLUE if response.accuracy else PALE for response in group] for group in kept]
    colors += [[GRAY if response.accuracy else "0.85" for response in group] for group in dropped]
    axes.imshow([[to_rgb(color) for color in row] for row in colors], aspect="auto", interpolation="nearest")
    axes.set_xticks([column + 0.5 for column in range(len(colors[0]) - 1)], [])
    axes.set_yticks([row + 0.5 for row in range(len(colors) - 1)], [])
    axes.grid(color="white", linewidth=1)
    axes.tick_params(length=0)
    axes.set_xlabel(f"{len(colors[0])} responses", fontsize=12)


def draw_shape(axes, taken):
    responses = [*itertools.chain(*taken.sampled)]
    axes.plot(
        [len(response.tokens) for response in responses], [response.penalty for response in responses], "o", color=RED
    )
    axes.axvline(dapo.MAX_RESPONSE_LENGTH, color=GRAY, linestyle="--")
    axes.set(xlim=(0, 1.05 * dapo.MAX_RESPONSE_LENGTH), ylim=(-1.05, 0.05))
    axes.set_xlabel("length of the response (tokens)", fontsize=12)
    axes.set_ylabel("added to its reward", fontsize=12)
    fewer = [-response.penalty for response in responses if response.penalty]
    mean = sum(fewer) / max(1, len(fewer))
    return (
        f"{len(fewer)} of {len(responses)} responses come\nclose to the limit of {dapo.MAX_RESPONSE_LENGTH}\n"
        f"tokens: they lose {mean:.2f} of\nreward each, on average"
    )


def draw_compare(axes, taken):
    group = max(taken.batch, key=lambda group: len({round(response.reward, 2) for response in group}))
    group = sorted(group, key=lambda response: response.reward)
    rewards, advantages = zip(*[(response.reward, response.advantage) for response in group])
    axes.barh(range(len(group)), advantages, color=[BLUE if advantage > 0 else RED for advantage in advantages])
    axes.set_yticks(range(len(group)), [f"{reward:.2f}" for reward in rewards])
    axes.set_ylabel("rewards of one group", fontsize=12)
    axes.set_xlabel("advantages", fontsize=12)
    for row, advantage in enumerate(advantages):
        axes.text(
            0.06 if advantage < 0 else -0.06,
            row,
            f"{advantage:.2f}",
            va="center",
            ha="left" if advantage < 0 else "right",
        )
    axes.axvline(0, color="black", linewidth=0.8)
    mean, deviation = statistics.fmean(rewards), statistics.stdev(rewards)
    return (
        "advantage = (reward - mean) /\nstandard deviation; in this\n"
        f"group the mean is {mean:.2f} and\nthe deviation {deviation:.2f}"
    )


def draw_update(axes, taken):
    edges = [0.4 + 0.05 * number for number in range(35)]
    styles = {True: ("good responses", BLUE, "-"), False: ("bad responses", RED, "--")}
    for good, (label, color, dashes) in styles.items():
        axes.hist(taken.ratios[good], edges, histtype="step", linewidth=2, label=label, color=color, linestyle=dashes)
    for bound in (1 - dapo.CLIP_RANGE_LOW, 1 + dapo.CLIP_RANGE_HIGH):
        axes.axvline(bound, color=GRAY, linestyle=":")
    axes.set_yscale("log")
    axes.set_xticks([0.5, 0.8, 1.28, 2], ["0.5", "0.8", "1.28", "2"])
    axes.set_ylim(0.7, 20 * axes.get_ylim()[1])
    axes.set_xlabel("ratio ρ in the last pass", fontsize=12)
    axes.set_ylabel("tokens", fontsize=12)
    axes.legend(fontsize=10, loc="upper right")
    low, high = (taken.metrics[f"clip_fraction/{end}"] for end in ("low", "high"))
    return (
        f"{taken.updates} small updates push tokens\nof good responses up, of bad\n"
        f"ones down. The clip holds {low:.2%}\nfrom falling, {high:.2%} from rising."
    )


PARTS = {
    "1 sample": draw_sample,
    "2 filter": draw_filter,
    "3 shape": draw_shape,
    "4 compare": draw_compare,
    "5 update": draw_update,
}

if __name__ == "__main__":
    main()

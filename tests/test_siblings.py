"""siblings/: each file is its paper's algorithm, as TRL, verl, and hand calculations have it, and a program."""

import importlib
import json
import math
import runpy
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, load, rows
from test_loss import double
from test_update import gradient, make_responses

import dapo

GOLDEN = json.loads((ROOT / "tests/golden_siblings.json").read_text())
NAMES = sorted(GOLDEN)
FUNCTIONS = "group_advantages aggregate_loss policy_loss probability_ratio clipped_tokens".split()
REPLACED = {
    "dr_grpo": ["group_advantages", "aggregate_loss"],
    "gspo": ["probability_ratio"],
    "cispo": ["policy_loss"],
    "rloo": ["group_advantages"],
}
CASES = [  # of RLOO's definitions, ours
    pytest.param(name, case, id=f"{name}-{number}-{case['kind']}")
    for name in NAMES
    for number, case in enumerate(GOLDEN[name])
    if case["definition"] in ("paper", "token ratios, clipped, seq-mean-token-sum", "any", "any clipped")
]
every_sibling = pytest.mark.parametrize("name", NAMES)


@pytest.fixture
def become(main, monkeypatch):
    """Makes dapo.py the sibling of that name, as importing it does; afterwards all is as before."""
    for function in FUNCTIONS:
        monkeypatch.setattr(dapo, function, getattr(dapo, function))
    return lambda name: runpy.run_path(str(ROOT / f"siblings/{name}.py"))


def loss_and_gradient(case, parts):
    """Of the rows in `parts`, lists of rows, each divided by the count of all, as accumulate_gradients does it."""
    log_probs, mask = double(case["log_probs"]).requires_grad_(), double(case["mask"])
    old_log_probs, advantages = double(case["old_log_probs"]), double(case["advantages"])
    count, total = mask.sum().item() if dapo.LOSS_AGG_MODE == "token-mean" else len(mask), 0.0
    for part in parts:
        width = int(mask[part].sum(1).max())  # a micro-batch is as wide as its longest response
        inputs = log_probs[part, :width], old_log_probs[part, :width], advantages[part], mask[part, :width]
        loss = dapo.aggregate_loss(dapo.policy_loss(*inputs), mask[part, :width], dapo.LOSS_AGG_MODE, count)
        loss.backward()
        total += loss.item()
    return total, log_probs.grad


def set_case(case, set_constants):
    set_constants(CLIP_RANGE_HIGH=case["clip_high"], MAX_RESPONSE_LENGTH=case["max_response_length"])
    if case["clip_low"] is not None:
        set_constants(CLIP_RANGE_LOW=case["clip_low"])


@pytest.mark.parametrize("name, case", CASES)
def test_loss_and_gradient_are_those_of_trl_verl_and_by_hand(name, case, become, set_constants):
    become(name)
    set_case(case, set_constants)
    rows = range(len(case["mask"]))
    for parts in ([[*rows]], [[row] for row in rows], [[*rows[:1]], [*rows[1:]]]):
        loss, grad = loss_and_gradient(case, [part for part in parts if part])
        assert loss == pytest.approx(case["expected_loss"], abs=1e-6)
        torch.testing.assert_close(grad, double(case["expected_grad"]), atol=1e-6, rtol=0)
    inputs = (double(case[field]) for field in ("log_probs", "old_log_probs", "advantages", "mask"))
    mask = double(case["mask"])
    whole = dapo.aggregate_loss(dapo.policy_loss(*inputs), mask, dapo.LOSS_AGG_MODE)  # counts by itself
    assert whole.item() == pytest.approx(case["expected_loss"], abs=1e-6)


@pytest.mark.parametrize("name, case", [case for case in CASES if case.values[1]["rewards"]])
def test_advantages_are_those_of_trl_and_verl(name, case, become):
    become(name)
    advantages = dapo.group_advantages(double(case["rewards"]))
    torch.testing.assert_close(advantages, double(case["expected_advantages"]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("ratio", [1.0, 1.2, 2.0, 0.5])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_cispo_limits_weights_whatever_the_sign(sign, ratio, become, set_constants):
    """Above alone, unless a lower bound is asked for; the slope of -A·w·log π is -A·w."""
    become("cispo")
    set_constants(CLIP_RANGE_HIGH=0.28)
    log_probs = double([[math.log(ratio)]]).requires_grad_()
    dapo.policy_loss(log_probs, double([[0.0]]), double([sign]), double([[1.0]])).sum().backward()
    assert log_probs.grad.item() == pytest.approx(-sign * min(ratio, 1.28))
    low, high = dapo.clipped_tokens(log_probs.detach(), double([[0.0]]), double([sign]), double([[1.0]]))
    assert not low.any() and high.item() == (sign > 0 and ratio > 1.28)  # its weight is limited
    set_constants(CLIP_RANGE_LOW=0.2)  # as verl has it
    log_probs.grad = None
    dapo.policy_loss(log_probs, double([[0.0]]), double([sign]), double([[1.0]])).sum().backward()
    assert log_probs.grad.item() == pytest.approx(-sign * min(max(ratio, 0.8), 1.28))


@pytest.mark.parametrize(
    "sign, ratios, held", [(1.0, [2.0, 1.9], "high"), (-1.0, [0.5, 0.6], "low"), (1.0, [2, 0.5], "")]
)
def test_gspo_holds_whole_responses(sign, ratios, held, become):
    """And never padding."""
    become("gspo")
    log_probs = double([[*map(math.log, ratios), 9.0]]).requires_grad_()
    inputs = log_probs, double([[0.0, 0.0, -9.0]]), double([sign]), double([[1.0, 1.0, 0.0]])
    low, high = dapo.clipped_tokens(*inputs)
    assert low.tolist() == [[held == "low"] * 2 + [False]] and high.tolist() == [[held == "high"] * 2 + [False]]
    loss = dapo.aggregate_loss(dapo.policy_loss(*inputs), inputs[-1], dapo.LOSS_AGG_MODE)
    loss.backward()
    assert log_probs.grad.any() == (held == "")
    assert log_probs.grad[0, 0] == log_probs.grad[0, 1] and log_probs.grad[0, 2] == 0


@pytest.mark.filterwarnings("ignore:std")
@every_sibling
@pytest.mark.parametrize("rewards", [[[0.1] * 7], [[-1.7, -1.7, -1.7]], [[1.0]], [[0.3 + 1e-8, 0.3, 0.3]]])
def test_equal_rewards_give_exactly_zero(name, rewards, become):
    """Dynamic sampling drops a group for that, and rounding errors would keep it."""
    become(name)
    assert not dapo.group_advantages(torch.tensor(rewards)).any()


@every_sibling
def test_groups_do_not_mix_and_mixed_ones_have_advantages(name, become):
    become(name)
    groups = double([[1, -1, -1], [1, 1, -1], [0.3, -2, 1]])
    advantages = dapo.group_advantages(groups)
    assert torch.equal(advantages, torch.cat([dapo.group_advantages(group[None]) for group in groups]))
    assert advantages.all() and advantages.sum(1).abs().max() < 1e-12
    assert ((advantages > 0) == (groups > groups.mean(1, keepdim=True))).all()


@every_sibling
def test_gradient_does_not_depend_on_micro_batches_or_order(name, become, make_folder, set_constants):
    """Through the model, and with old probabilities far enough off that each clip holds some."""
    become(name)
    set_constants(CLIP_RANGE_HIGH=0.05, MICRO_BATCH_TOKENS=100000)
    if name != "cispo":
        set_constants(CLIP_RANGE_LOW=0.05)
    model, _ = load(make_folder())
    responses = make_responses()
    whole, metrics = gradient(model, responses)
    for budget in (256, 40, 1):
        responses.reverse()
        set_constants(MICRO_BATCH_TOKENS=budget)
        cut, cut_metrics = gradient(model, responses)
        assert ((cut - whole).norm() / whole.norm()).item() < 1e-5
        assert cut_metrics == pytest.approx(metrics, rel=1e-4, abs=1e-4)


@every_sibling
def test_it_replaces_what_its_page_says_and_nothing_else(name, become):
    before = {function: getattr(dapo, function) for function in vars(dapo) if callable(getattr(dapo, function))}
    become(name)
    assert [function for function in FUNCTIONS if getattr(dapo, function) is not before[function]] == sorted(
        REPLACED[name], key=FUNCTIONS.index
    )
    assert all(getattr(dapo, function) is was for function, was in before.items() if function not in REPLACED[name])


SETS = {  # GSPO's bounds are the paper's; CISPO's are none, and TRL's 5 = 1 + 4
    "dr_grpo": {"LOSS_AGG_MODE": "seq-mean-token-sum"},
    "gspo": {"CLIP_RANGE_LOW": 3e-4, "CLIP_RANGE_HIGH": 4e-4, "LOSS_AGG_MODE": "seq-mean-token-mean"},
    "cispo": {"CLIP_RANGE_LOW": 1.0, "CLIP_RANGE_HIGH": 4.0},
    "rloo": {"LOSS_AGG_MODE": "seq-mean-token-sum"},
}


@every_sibling
def test_it_sets_these_constants(name, become):
    become(name)
    changed = {constant: getattr(dapo, constant) for constant in dapo.CONSTANTS}
    changed = {constant: value for constant, value in changed.items() if value != dapo.CONSTANTS[constant]}
    assert changed == SETS[name] | {"OUTPUT_DIR": f"outputs/{name}", "DEVICE": "cpu"}


@pytest.mark.parametrize("case", [case for case in GOLDEN["rloo"] if case["definition"].startswith("REINFORCE")])
def test_the_first_gradient_of_rloo_is_that_of_reinforce(case, become, set_constants):
    """Where all ratios are 1: the paper's, with no ratio at all."""
    become("rloo")
    set_case(case, set_constants)
    on_policy = case | {"old_log_probs": case["log_probs"]}
    _, grad = loss_and_gradient(on_policy, [[*range(len(case["mask"]))]])
    torch.testing.assert_close(grad, double(case["expected_grad"]), atol=1e-6, rtol=0)


def test_gspo_far_off_and_without_tokens(become):
    become("gspo")
    mask = torch.tensor([[1.0, 1.0], [0.0, 0.0]])
    for far in (1e4, -1e4):
        ratio = dapo.probability_ratio(torch.full((2, 2), far), torch.zeros(2, 2), mask)
        assert ratio.isfinite().all() and ratio[1].tolist() == [1, 1] and (ratio[0] > 1).all() == (far > 0)


def test_the_first_gap_of_gspo_is_that_of_responses(become, make_folder):
    """Two tokens off by as much in opposite directions: no gap. That is what the page tells to watch in bf16."""
    become("gspo")
    model, _ = load(make_folder())
    responses = make_responses()
    dapo.store_log_probs(model, responses, "old_log_probs")
    for r in responses:
        r.old_log_probs[:2] += torch.tensor([0.3, -0.3])
    *_, gap = dapo.accumulate_gradients(model, responses)
    assert gap < 1e-5
    for r in responses:
        r.old_log_probs += 0.1
    *_, gap = dapo.accumulate_gradients(model, responses)
    assert gap.item() == pytest.approx(1 - math.exp(-0.1), rel=1e-3)


@every_sibling
def test_it_is_short_and_names_its_paper(name):
    page = (ROOT / f"siblings/{name}.py").read_text(encoding="utf-8")
    assert len(page.splitlines()) <= 30 and "arXiv" in page and max(map(len, page.splitlines())) <= 120


@every_sibling
def test_as_a_program(name, become, settings, parity, no_pictures, monkeypatch, tmp_path, capsys):
    """python -m siblings.NAME takes what dapo.py takes, trains, and saves itself with the model."""
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *settings, "--SEED=3"])
    runpy.run_path(str(ROOT / f"siblings/{name}.py"), run_name="__main__")
    saved = tmp_path / "run/step_2"
    assert (saved / "train_script.py").read_text() == (ROOT / f"siblings/{name}.py").read_text()
    assert (saved / "dapo.py").read_text() == (ROOT / "dapo.py").read_text()
    found = dict(rows(tmp_path / "run", "SELECT name, value FROM metrics WHERE step = 2"))
    assert math.isfinite(found["policy_loss"]) and found["grad_norm"] > 0

    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--CLIP_RANGE_HIHG=1"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / f"siblings/{name}.py"), run_name="__main__")
    assert stop.value.code == 2 and capsys.readouterr().err.strip().endswith("did you mean CLIP_RANGE_HIGH?")


def test_the_noise_of_bf16_is_far_above_that_of_fp32():
    """The benchmark, on few responses. In a process of its own, as it replaces parts of dapo."""
    few = ["--BATCH_SIZE=4", "--GROUP_SIZE=4", "--MINI_BATCHES=8", "--MAX_RESPONSE_LENGTH=32", "--DEVICE=cpu"]
    command = [sys.executable, "benchmarks/gspo_noise.py", *few, "--OVERLONG_BUFFER_LENGTH=0"]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    lines = [line.strip("| ").split(" | ") for line in said.splitlines() if "float" in line]
    assert [line[0] for line in lines] == [
        f"{what}, {kind}" for kind in ("float32", "bfloat16") for what in ("responses", "tokens")
    ]
    largest = [float(line[3]) for line in lines]
    assert largest[0] < 1e-4 < largest[2] < 1 and largest[1] < 1e-4 < largest[3]
    assert [line[4] for line in lines] == ["0.0003", "0.2"] * 2 and lines[0][5] == "0.0%"


def test_the_folder_holds_these():
    found = {path.stem for path in ROOT.glob("siblings/*.py")} - {"__init__"}
    assert found >= set(NAMES) and importlib.import_module("siblings").__doc__  # one of your own may be there, too

"""Advantages, losses and their aggregation, against verl's own numbers, hand calculations and plain loops."""

import json
import math
from pathlib import Path

import pytest
import torch

import dapo

GOLDEN = json.loads((Path(__file__).parent / "golden_verl.json").read_text())


def double(values):
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("case", GOLDEN["advantages"])
def test_advantages_are_verls(case):
    torch.testing.assert_close(
        dapo.group_advantages(double(case["rewards"])), double(case["advantages"]), atol=1e-6, rtol=0
    )


def test_advantage_by_hand():
    # mean 0, unbiased variance (1 + 1 + 1 + 1) / 3
    expected = [[math.sqrt(3) / 2, -math.sqrt(3) / 2, -math.sqrt(3) / 2, math.sqrt(3) / 2]]
    torch.testing.assert_close(dapo.group_advantages(double([[1, -1, -1, 1]])), double(expected), atol=1e-5, rtol=0)


@pytest.mark.filterwarnings("ignore:std")  # torch warns of a deviation of one number
@pytest.mark.parametrize("rewards", [[[0.1] * 7], [[-1.7, -1.7, -1.7]], [[1.0]], [[1.0], [-1.0]]])
def test_even_groups_and_groups_of_one_give_zeros(rewards):
    rewards = torch.tensor(rewards)
    assert torch.equal(dapo.group_advantages(rewards), torch.zeros_like(rewards))


def test_groups_do_not_mix():
    groups = double([[1, -1, -1], [1, 1, -1], [0.3, -2, 1]])
    alone = torch.cat([dapo.group_advantages(group[None]) for group in groups])
    assert torch.equal(dapo.group_advantages(groups), alone)


@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-sum", "seq-mean-token-mean"])
@pytest.mark.parametrize("case", GOLDEN["policy_loss"])
def test_loss_and_gradient_are_verls(case, mode, set_constants):
    set_constants(CLIP_RANGE_LOW=case["clip_low"], CLIP_RANGE_HIGH=case["clip_high"])
    log_probs, mask = double(case["log_probs"]).requires_grad_(), double(case["mask"])
    losses = dapo.policy_loss(log_probs, double(case["old_log_probs"]), double(case["advantages"]), mask)
    loss = dapo.aggregate_loss(losses, mask, mode)
    loss.backward()
    expected = case["expected"][mode]
    assert loss.item() == pytest.approx(expected["loss"], abs=1e-6)
    torch.testing.assert_close(log_probs.grad, double(expected["grad"]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("case", GOLDEN["policy_loss"])
def test_clipped_tokens_are_verls(case, set_constants):
    set_constants(CLIP_RANGE_LOW=case["clip_low"], CLIP_RANGE_HIGH=case["clip_high"])
    *inputs, mask = (double(case[name]) for name in ("log_probs", "old_log_probs", "advantages", "mask"))
    low, high = dapo.clipped_tokens(*inputs, mask)
    assert (((low | high) * mask).sum() / mask.sum()).item() == pytest.approx(case["clip_fraction"], abs=1e-6)


@pytest.mark.parametrize(
    "ratio, advantage, loss, slope",  # slope: of the loss by the ratio; 0 where the token is held
    [
        (1.5, 1.0, -1.28, 0.0),  # good and already much likelier: held at the upper end
        (1.2, 1.0, -1.20, -1.0),  # good, within the range
        (0.5, 1.0, -0.50, -1.0),  # good but much less likely: pulled back
        (0.5, -1.0, 0.80, 0.0),  # bad and already much less likely: held at the lower end
        (0.9, -1.0, 0.90, 1.0),
        (1.5, -1.0, 1.50, 1.0),  # bad but much likelier: pushed back
    ],
)
def test_clip_by_hand(ratio, advantage, loss, slope, set_constants):
    set_constants(CLIP_RANGE_LOW=0.2, CLIP_RANGE_HIGH=0.28)
    log_probs = double([[math.log(ratio)]]).requires_grad_()
    inputs = log_probs, double([[0.0]]), double([advantage]), double([[1.0]])
    value = dapo.policy_loss(*inputs)
    value.sum().backward()
    assert value.item() == pytest.approx(loss)
    assert log_probs.grad.item() == pytest.approx(slope * ratio)  # dρ / dlog π = ρ
    held = [mask.item() for mask in dapo.clipped_tokens(*inputs)]
    assert held == [slope == 0 and advantage < 0, slope == 0 and advantage > 0]


@pytest.mark.parametrize("log_ratio", [1e4, -1e4, 25.0])
@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_far_off_policy_stays_finite(log_ratio, advantage):
    log_probs = torch.tensor([[log_ratio]], requires_grad=True)
    loss = dapo.policy_loss(log_probs, torch.zeros(1, 1), torch.tensor([advantage]), torch.ones(1, 1))
    loss.sum().backward()
    assert loss.isfinite().all() and log_probs.grad.isfinite().all()
    assert dapo.kl_to_base(torch.zeros(1, 1), torch.tensor([[log_ratio]])).isfinite().all()


def test_the_ratio_is_one_where_there_is_no_token():
    log_probs, old_log_probs = double([[math.log(0.3), 5.0]]), double([[math.log(0.2), -5.0]])
    ratio = dapo.probability_ratio(log_probs, old_log_probs, double([[1, 0]]))
    torch.testing.assert_close(ratio, double([[1.5, 1.0]]))


def test_kl_by_hand_and_never_negative():
    base, now = double([[math.log(0.5)]]), double([[math.log(0.25)]])
    assert dapo.kl_to_base(now, base).item() == pytest.approx(2 - 1 - math.log(2))
    torch.manual_seed(0)
    one, other = torch.randn(2, 9, 9, dtype=torch.float64)
    assert (dapo.kl_to_base(one, other) >= 0).all() and dapo.kl_to_base(one, one).abs().max() == 0


LOSSES = double([[1, 2, 3, 9], [4, 9, 9, 9], [9, 9, 9, 9]])
MASK = double([[1, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]])


@pytest.mark.parametrize(
    "mode, expected",
    [
        ("token-mean", (1 + 2 + 3 + 4) / 4),
        ("seq-mean-token-sum", (6 + 4) / 2),
        ("seq-mean-token-mean", (2 + 4) / 2),
    ],
)
def test_aggregation_by_hand(mode, expected):
    assert dapo.aggregate_loss(LOSSES, MASK, mode).item() == pytest.approx(expected)
    wider = torch.nn.functional.pad(LOSSES, (0, 3), value=77.0), torch.nn.functional.pad(MASK, (0, 3))
    assert dapo.aggregate_loss(*wider, mode).item() == pytest.approx(expected)


@pytest.mark.parametrize("mode, whole", [("token-mean", 4), ("seq-mean-token-sum", 2), ("seq-mean-token-mean", 2)])
def test_parts_add_up_to_the_whole(mode, whole):
    parts = sum(dapo.aggregate_loss(LOSSES[i : i + 1], MASK[i : i + 1], mode, whole) for i in range(3))
    assert parts.item() == pytest.approx(dapo.aggregate_loss(LOSSES, MASK, mode).item())

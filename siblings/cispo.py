"""CISPO, Clipped Importance Sampling Policy Optimization: dapo.py with the clipped ratio as a weight, so that no token
loses its gradient.

    python -m siblings.cispo       trains into outputs/cispo; takes all that dapo.py takes

The paper is "MiniMax-M1: Scaling Test-Time Compute Efficiently with Lightning Attention", arXiv 2506.13585, equations
4 and 5; the loss of a token is -A · clip(ρ) · log π, with no gradient through clip(ρ), its weight.
"""

import dapo

dapo.OUTPUT_DIR = "outputs/cispo"
dapo.CLIP_RANGE_LOW = 1.0  # no lower bound: no ratio is below 0
dapo.CLIP_RANGE_HIGH = 4.0  # weights up to 5, as TRL recommends; the paper gives no value


def policy_loss(log_probs, old_log_probs, advantages, mask):
    """PPO's clip drops the tokens that have moved most, often rare ones at which reasoning turns, such as "Wait". Here
    they keep a gradient, and only its weight is limited: clip_fraction/high counts them, if A > 0."""
    ratio = dapo.probability_ratio(log_probs, old_log_probs, mask)
    weight = ratio.clamp(1 - dapo.CLIP_RANGE_LOW, 1 + dapo.CLIP_RANGE_HIGH).detach()
    return -advantages[:, None] * weight * log_probs


dapo.policy_loss = policy_loss
if __name__ == "__main__":
    dapo.main()

"""Dr. GRPO ("GRPO done right"): dapo.py with two divisions removed, whose biases this paper points out.

    python -m siblings.dr_grpo     trains into outputs/dr_grpo; takes all that dapo.py takes

The paper is "Understanding R1-Zero-Like Training: A Critical Perspective", arXiv 2503.20783, section 3.2; its loss is
1 / (responses · MAX_RESPONSE_LENGTH) · Σ max(-A·ρ, -A·clip(ρ)) over all tokens, with A = r - mean(r).
"""

import dapo

dapo.OUTPUT_DIR = "outputs/dr_grpo"
dapo.LOSS_AGG_MODE = "seq-mean-token-sum"  # below, this is divided by a constant
dapo_group_advantages, dapo_aggregate_loss = dapo.group_advantages, dapo.aggregate_loss


def group_advantages(rewards):
    """(n, G) → (n, G), not divided by the std: that raises the weight of questions that are very easy or very hard."""
    advantages = rewards - rewards.mean(1, keepdim=True)
    return advantages.masked_fill(dapo_group_advantages(rewards) == 0, 0.0)  # equal rewards: exactly 0, as in DAPO


def aggregate_loss(token_losses, mask, mode, denominator=None):
    """Divided by a constant. A response's length in its place (GRPO) would make long wrong responses cheap."""
    loss = dapo_aggregate_loss(token_losses, mask, mode, denominator)
    return loss / dapo.MAX_RESPONSE_LENGTH if mode == "seq-mean-token-sum" else loss


dapo.group_advantages, dapo.aggregate_loss = group_advantages, aggregate_loss
if __name__ == "__main__":
    dapo.main()

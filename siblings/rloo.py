"""RLOO, REINFORCE Leave-One-Out: dapo.py with the mean of the other responses as the yardstick of each.

    python -m siblings.rloo        trains into outputs/rloo; takes all that dapo.py takes

The paper is "Back to Basics: Revisiting REINFORCE Style Optimization for Learning from Human Feedback in LLMs", arXiv
2402.14740. With G responses to a question, A = r - mean(r of the other G - 1).

The paper has plain REINFORCE, without ratios, for one update per batch. Here there are 48, so we keep DAPO's clipped
token ratios: at the first update they are 1, and the gradient is the paper's. TRL clips one ratio for each response.
"""

import dapo

dapo.OUTPUT_DIR = "outputs/rloo"
dapo.LOSS_AGG_MODE = "seq-mean-token-sum"  # -A·log π of a whole response, as in REINFORCE: the sum over its tokens
dapo_group_advantages = dapo.group_advantages


def group_advantages(rewards):
    """(n, G) → (n, G): r - mean of the others. A response's own reward in the mean would make advantages too small."""
    others = (rewards.sum(1, keepdim=True) - rewards) / (rewards.shape[1] - 1)
    return (rewards - others).masked_fill(dapo_group_advantages(rewards) == 0, 0.0)  # equal rewards: exactly 0


dapo.group_advantages = group_advantages
if __name__ == "__main__":
    dapo.main()

"""GSPO, Group Sequence Policy Optimization: dapo.py with one ratio for a whole response, as it has one reward.

    python -m siblings.gspo        trains into outputs/gspo; takes all that dapo.py takes

The paper is "Group Sequence Policy Optimization", arXiv 2507.18071, equations 5 to 7. The ratio of a response y is
s = (π(y) / π_old(y))^(1/|y|), the geometric mean of its tokens' ratios; its loss, max(-A·s, -A·clip(s)).
"""

import dapo

dapo.OUTPUT_DIR = "outputs/gspo"
# The paper's range (5.1), for long responses and four updates per batch, not 48 as here: the mean over a response moves
# far less than one token. The toy's responses are short: there, 0.03 and 0.04 suit it.
dapo.CLIP_RANGE_LOW = 3e-4
dapo.CLIP_RANGE_HIGH = 4e-4
dapo.LOSS_AGG_MODE = "seq-mean-token-mean"  # all tokens of a response have its loss: this is the mean over responses


def probability_ratio(log_probs, old_log_probs, mask):
    """(B, T) → (B, T): s of each response at all of its tokens, 1 at padding. The ratio of one token, drawn only once,
    is mostly noise. The clip then holds whole responses, or none of their tokens."""
    log_ratios = ((log_probs - old_log_probs) * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
    return (log_ratios.clamp(-20, 20) * mask).exp()  # exp must not overflow


dapo.probability_ratio = probability_ratio
if __name__ == "__main__":
    dapo.main()

"""GRPO, the algorithm that DAPO started from: dapo.py with each of its changes undone.

    python grpo.py                                    trains into outputs/grpo; takes all that dapo.py takes
    python -m tools.plot outputs/grpo outputs/dapo    compares the two

The paper is "DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models", arXiv 2402.03300. The
sections below are those of the DAPO paper, which say why it changed what.
"""

import dapo

dapo.OUTPUT_DIR = "outputs/grpo"
dapo.CLIP_RANGE_HIGH = 0.2  # as far up as down: that holds back tokens that are rare yet, and entropy collapses (3.1)
dapo.USE_DYNAMIC_SAMPLING = False  # groups that are all right or all wrong take up the batch and teach nothing (3.2)
dapo.LOSS_AGG_MODE = "seq-mean-token-mean"  # a token of a long response counts for less than one of a short one (3.3)
dapo.OVERLONG_BUFFER_LENGTH = 0  # no warning before the limit: what is cut off there is wrong if it has no answer (3.4)
dapo.USE_OVERLONG_FILTERING = False  # nor is it left out
# The GRPO paper has a KL weight of 0.04 and makes one update for each batch of responses, not 48 as here.
dapo.KL_COEF = 0.01  # ties the policy to the base model, from which long reasoning has to move away (2.3)

if __name__ == "__main__":
    dapo.main()

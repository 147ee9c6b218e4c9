"""What the paper did, in its own numbers, as a record and for tools/verl.py, because no single GPU holds it.

    python -m tools.verl recipes/paper.py --out verl_run

Weights, gradients, and AdamW's moments of 32.8 billion parameters, 16 bytes each, take 488 GiB by themselves; the
authors' script asks for 16 machines of 8 GPUs. Comments say where the numbers are the script's, not the paper's
(section 4.1). Three things in the script have no constant here: it samples three batches of questions at a time
(gen_prompt_bsz = 3 * train_prompt_bsz), it ends with an error if MAX_GEN_BATCHES such rounds do not fill a batch, and
it clips bad responses a second time, at a ratio of 10 (dual clip: clip_ratio_c). docs/deviations.md lists more.
"""

MODEL = "Qwen/Qwen2.5-32B"
rows = {"type": "hub", "input": "prompt", "output": "reward_model.ground_truth"}
TRAIN_DATASETS = [rows | {"path": "BytedTsinghua-SIA/DAPO-Math-17k"}]
EVAL_DATASETS = [rows | {"path": "BytedTsinghua-SIA/AIME-2024"}]
OUTPUT_DIR = "outputs/paper"

NUM_STEPS = None
NUM_EPOCHS = 100  # the script makes one pass over a file that has each question a hundred times
EVAL_EVERY = 5  # the script's
EVAL_SAMPLES = 32  # with top-p 0.7 in the paper, without it here
CHECKPOINT_EVERY = 5  # the script's

BATCH_SIZE = 512
GROUP_SIZE = 16
MAX_PROMPT_LENGTH = 2048  # the script's
MAX_RESPONSE_LENGTH = 20480
TEMPERATURE = 1.0

USE_DYNAMIC_SAMPLING = True
MAX_GEN_BATCHES = 10  # the script's
OVERLONG_BUFFER_LENGTH = 4096
OVERLONG_PENALTY_FACTOR = 1.0
USE_OVERLONG_FILTERING = False  # a line of Table 1, but not in the script

CLIP_RANGE_LOW = 0.2
CLIP_RANGE_HIGH = 0.28
LOSS_AGG_MODE = "token-mean"
KL_COEF = 0.0
ENTROPY_COEF = 0.0

LEARNING_RATE = 1e-6
WARMUP_STEPS = 20  # in the script 10
WEIGHT_DECAY = 0.1  # the script's
MAX_GRAD_NORM = 1.0  # the script's
DAPO_EPOCHS = 1
MINI_BATCHES = 16
GRADIENT_CHECKPOINTING = True  # the script's

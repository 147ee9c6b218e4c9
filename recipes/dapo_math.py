"""Qwen2.5-1.5B, a base model, on DAPO-Math-17k, for one GPU of 80 GB.

    python dapo.py recipes/dapo_math.py
    python -m tools.evaluate recipes/dapo_math.py Qwen/Qwen2.5-1.5B outputs/dapo_math

The data set has 1.79 million rows of 17 thousand questions: we leave out repeated ones, and reading takes about a
minute. Its prompts already say how to announce the answer. Its test set has each of the 30 problems of AIME 2024 32
times; EVAL_SAMPLES does the same here. Not yet run with real weights or on a GPU. Memory, by
python -m tools.memory recipes/dapo_math.py:

    GiB                                 sampling  update
    weights, fp32                       5.8       5.8
    gradients, fp32                     0.0       5.8
    two moments of AdamW, fp32          11.5      11.5
    weights once more, in bf16          2.9       2.9
    key-value cache                     36.2      0.0
    layers, kept for the backward pass  0.0       4.7
    logits, or one layer at work        0.4       6.0
    together                            56.8      36.6

Without GRADIENT_CHECKPOINTING, the layers alone would keep 58 GiB. The cache is what limits GENERATION_BATCH.
On Linux, PYTORCH_ALLOC_CONF=expandable_segments:True in the environment leaves less memory unused.
"""

MODEL = "Qwen/Qwen2.5-1.5B"
math_questions = {"type": "hub", "input": "prompt", "output": "reward_model.ground_truth"}
TRAIN_DATASETS = [math_questions | {"path": "BytedTsinghua-SIA/DAPO-Math-17k"}]
EVAL_DATASETS = [math_questions | {"path": "BytedTsinghua-SIA/AIME-2024"}]
OUTPUT_DIR = "outputs/dapo_math"

NUM_STEPS = 200
EVAL_EVERY = 20
EVAL_SAMPLES = 32

MAX_PROMPT_LENGTH = 1024
MAX_RESPONSE_LENGTH = 4096
OVERLONG_BUFFER_LENGTH = 1024

BATCH_SIZE = 64
GROUP_SIZE = 16
LEARNING_RATE = 1e-6
DAPO_EPOCHS = 1
WARMUP_STEPS = 10

GENERATION_BATCH = 256
MICRO_BATCH_TOKENS = 16384
LOGITS_CHUNK = 2**28
GRADIENT_CHECKPOINTING = True

"""Qwen2.5-0.5B-Instruct on GSM8K, for one GPU of 24 GB.

    python dapo.py recipes/gsm8k.py
    python -m tools.evaluate recipes/gsm8k.py Qwen/Qwen2.5-0.5B-Instruct outputs/gsm8k
    python -m tools.chat recipes/gsm8k.py outputs/gsm8k

Not yet run with real weights or on a GPU. Memory, by python -m tools.memory recipes/gsm8k.py:

    GiB                                 sampling  update
    weights, fp32                       1.8       1.8
    gradients, fp32                     0.0       1.8
    two moments of AdamW, fp32          3.7       3.7
    weights once more, in bf16          0.9       0.9
    key-value cache                     3.1       0.0
    layers, kept for the backward pass  0.0       6.6
    logits, or one layer at work        0.4       3.0
    together                            10.0      17.9

The cache grows with GENERATION_BATCH and with the lengths, the layers with MICRO_BATCH_TOKENS.
On Linux, PYTORCH_ALLOC_CONF=expandable_segments:True in the environment leaves less memory unused.
"""

MODEL = "Qwen/Qwen2.5-0.5B-Instruct"
gsm8k = {"path": "openai/gsm8k", "name": "main", "type": "hub", "input": "question", "output": "answer"}
TRAIN_DATASETS = [gsm8k]
EVAL_DATASETS = [gsm8k | {"split": "test[:500]"}]
PROMPT_TEMPLATE = "boxed"
OUTPUT_DIR = "outputs/gsm8k"

NUM_STEPS = 200
EVAL_EVERY = 20

MAX_RESPONSE_LENGTH = 768
OVERLONG_BUFFER_LENGTH = 256

LEARNING_RATE = 1e-6
DAPO_EPOCHS = 1
GENERATION_BATCH = 256
MICRO_BATCH_TOKENS = 4096
LOGITS_CHUNK = 2**27

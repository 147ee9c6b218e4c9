"""Qwen2.5-7B-Instruct on GSM8K by LoRA, for one GPU of 48 GB.

    python dapo.py recipes/gsm8k_7b.py
    python -m tools.evaluate recipes/gsm8k_7b.py Qwen/Qwen2.5-7B-Instruct outputs/gsm8k_7b
    python -m tools.chat recipes/gsm8k_7b.py outputs/gsm8k_7b

The data are those of recipes/gsm8k.py. LoRA trains an adapter, two small matrices, beside each weight matrix, which it
leaves as it is. Only the adapters have gradients and moments, and the other weights can be bf16. The learning rate is
ten times that of recipes/gsm8k.py, which trains all weights; this is the usual factor. Not yet run with real weights
or on a GPU. Memory, by python -m tools.memory recipes/gsm8k_7b.py --gpu 48:

    GiB                                 sampling  update
    frozen weights, bf16                14.2      14.2
    adapters, fp32                      0.3       0.3
    gradients, fp32                     0.0       0.3
    two moments of AdamW, fp32          0.6       0.6
    adapters once more, in bf16         0.2       0.2
    key-value cache                     14.5      0.0
    layers, kept for the backward pass  0.0       13.6
    logits, or one layer at work        0.4       3.0
    together                            30.2      32.1

With GRADIENT_CHECKPOINTING, the layers would keep 0.9 GiB, but each step would take longer.
On Linux, PYTORCH_ALLOC_CONF=expandable_segments:True in the environment leaves less memory unused.
"""

MODEL = "Qwen/Qwen2.5-7B-Instruct"
gsm8k = {"path": "openai/gsm8k", "name": "main", "type": "hub", "input": "question", "output": "answer"}
TRAIN_DATASETS = [gsm8k]
EVAL_DATASETS = [gsm8k | {"split": "test[:500]"}]
PROMPT_TEMPLATE = "boxed"
OUTPUT_DIR = "outputs/gsm8k_7b"

NUM_STEPS = 200
EVAL_EVERY = 20

MAX_RESPONSE_LENGTH = 768
OVERLONG_BUFFER_LENGTH = 256

LORA_RANK = 32
LORA_ALPHA = 32.0  # the adapters' product is multiplied by LORA_ALPHA / LORA_RANK, here 1
LEARNING_RATE = 1e-5
DAPO_EPOCHS = 1
GENERATION_BATCH = 256
MICRO_BATCH_TOKENS = 2048
LOGITS_CHUNK = 2**27

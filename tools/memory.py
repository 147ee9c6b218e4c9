"""How much GPU memory a run needs, and for what:

    python -m tools.memory recipes/gsm8k.py
    python -m tools.memory recipes/gsm8k.py --GENERATION_BATCH=512

We estimate it from the model's configuration alone, for models built like Llama and Qwen2, on a GPU with bf16
arithmetic. Others (T4, V100) need more; Qwen3 and Gemma, with more norms and wider heads, keep more for the backward
pass. tests/test_memory.py holds the estimate against what a step of small models really allocates (CPU, fp32 and bf16).
CUDA itself takes about half a GiB more, and torch leaves some 10 % between its tensors.
"""

import sys  # noqa: I001  (dapo first: it imports pyarrow, which has to come before torch on Windows)

import dapo
import torch
from transformers import AutoConfig, AutoModelForCausalLM


def memory(config, parameters, half=True):
    """{what: (bytes while sampling, bytes while updating)}, at the longest prompts and responses.

    `half` is for bf16 arithmetic, as on CUDA. A layer keeps for the backward pass, for each token: what its two norms
    and their neighbors work on (a multiple of the hidden size H), four results of its MLP (of the intermediate size),
    and keys and values. Norms stay in fp32, so the multiple of H hardly falls with bf16.
    """
    hidden, layers, width = config.hidden_size, config.num_hidden_layers, 2 if half else 4
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    pair = 2 * heads * head * width  # bytes of a token's key and value in one layer
    length = dapo.MAX_PROMPT_LENGTH + dapo.MAX_RESPONSE_LENGTH
    tokens, rows = max(dapo.MICRO_BATCH_TOKENS, length), dapo.GENERATION_BATCH
    layer = (30 if half else 32) * hidden + 4 * config.intermediate_size * width + pair
    kept = 4 * hidden * layers + layer if dapo.GRADIENT_CHECKPOINTING else layer * layers
    return {
        "weights, fp32": (4 * parameters, 4 * parameters),
        "gradients, fp32": (0, 4 * parameters),
        "two moments of AdamW, fp32": (8 * parameters, 8 * parameters),
        "base model, fp32": (4 * parameters, 4 * parameters) if dapo.KL_COEF else (0, 0),
        "weights once more, in bf16": (2 * parameters, 2 * parameters) if half else (0, 0),
        "key-value cache": (rows * length * pair * (layers + 1), 0),  # one layer's twice, as it gets more room
        "layers, kept for the backward pass": (0, tokens * kept),
        "logits": (12 * rows * config.vocab_size, 24 * dapo.LOGITS_CHUNK),
    }


def main(argv=None):
    words = sys.argv[1:] if argv is None else argv
    if {"-h", "--help"} & {*words}:
        print(__doc__)
        return
    for word in dapo.read_command_line(words):
        dapo.fail(f"{word!r} is neither a recipe.py nor --NAME=VALUE")
    path, options = dapo.saved_model(dapo.MODEL), {"trust_remote_code": dapo.TRUST_REMOTE_CODE}
    with dapo.explained(f"MODEL={path} cannot be read, or is not built like Llama"):
        config = AutoConfig.from_pretrained(path, **options)
        with torch.device("meta"):  # without weights
            model = AutoModelForCausalLM.from_config(config, **options)
        parameters = sum(weights.numel() for weights in model.parameters())
        parts = memory(config.get_text_config(), parameters)
    print(f"{path}: {parameters / 1e6:,.0f} million parameters")
    print(f"  {'GiB':34}  {'sampling':8}  update")
    for name, sizes in (parts | {"together": [*map(sum, zip(*parts.values()))]}).items():
        if any(sizes):
            print(f"  {name:34}  {sizes[0] / 2**30:<8.1f}  {sizes[1] / 2**30:.1f}")


if __name__ == "__main__":
    main()

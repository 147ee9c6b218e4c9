"""How much GPU memory a run needs, and for what:

    python recipes/memory.py recipes/gsm8k.py
    python recipes/memory.py recipes/gsm8k.py --GENERATION_BATCH=512

An estimate for models built like Llama and Qwen2, from their configuration alone; Qwen3 and Gemma, with more norms and
wider heads, keep more for the backward pass. tests/test_recipes.py holds it against what steps of small models really
allocate (CPU, fp32 and bf16). CUDA itself takes about half a GiB more, and torch leaves some 10 % between its tensors.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import dapo  # noqa: E402
import torch  # noqa: E402
from evaluation import aligned  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM  # noqa: E402


def memory(config, parameters, constants, half=True):
    """{what: (bytes while sampling, bytes while updating)}, at the longest prompts and responses.

    `half` is for bf16 arithmetic, as on CUDA. A layer keeps for the backward pass, for each token: what its two norms
    and their neighbours work on (a multiple of the hidden size H), four results of its MLP (of the intermediate size),
    and keys and values. Norms stay in fp32, so that the multiple of H hardly falls with bf16.
    """
    c, hidden, layers, width = constants, config.hidden_size, config.num_hidden_layers, 2 if half else 4
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    pair = 2 * heads * head * width  # bytes of a token's key and value in one layer
    length = c["MAX_PROMPT_LENGTH"] + c["MAX_RESPONSE_LENGTH"]
    tokens, rows = max(c["MICRO_BATCH_TOKENS"], length), c["GENERATION_BATCH"]
    layer = (30 if half else 32) * hidden + 4 * config.intermediate_size * width + pair
    kept = 4 * hidden * layers + layer if c["GRADIENT_CHECKPOINTING"] else layer * layers
    return {
        "weights, fp32": (4 * parameters, 4 * parameters),
        "gradients, fp32": (0, 4 * parameters),
        "two moments of AdamW, fp32": (8 * parameters, 8 * parameters),
        "base model, fp32": (4 * parameters, 4 * parameters) if c["KL_COEF"] else (0, 0),
        "weights once more, in bf16": (2 * parameters, 2 * parameters) if half else (0, 0),
        "key-value cache": (rows * length * pair * (layers + 1), 0),  # one layer's twice, when a token is added
        "layers, kept for the backward pass": (0, tokens * kept),
        "logits": (12 * rows * config.vocab_size, 24 * c["LOGITS_CHUNK"]),
    }


def table(parts):
    rows = [["GiB", "sampling", "update"]]
    for name, sizes in [*parts.items(), ("together", [sum(part) for part in zip(*parts.values())])]:
        if any(sizes):
            rows.append([name, *(f"{size / 2**30:.1f}" for size in sizes)])
    return "\n".join(aligned(rows))


def main():
    with dapo.record.plain_endings():
        if {"-h", "--help"} & set(sys.argv):
            print(__doc__)
            return
        dapo.record.read_command_line(None, vars(dapo))
        config = dapo.record.from_pretrained(AutoConfig, dapo.MODEL, trust_remote_code=dapo.TRUST_REMOTE_CODE)
        try:
            with torch.device("meta"):  # without weights
                model = AutoModelForCausalLM.from_config(config, trust_remote_code=dapo.TRUST_REMOTE_CODE)
            parameters = sum(weights.numel() for weights in model.parameters())
            parts = memory(config.get_text_config(), parameters, vars(dapo))
        except (AttributeError, ValueError) as error:
            dapo.record.fail(f"MODEL={dapo.MODEL} is not built like Llama: {dapo.record.first_line(error)[:200]}")
        print(f"{dapo.MODEL}: {parameters / 1e6:,.0f} million parameters")
        print(table(parts))


if __name__ == "__main__":
    main()

"""Architectures as tiny models. How each differs from the others is made to bite: windows shorter than the prompts,
dropout that would show, caps, scales, experts."""

import pytest
import transformers as T

FEW = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
PLAIN = FEW | dict(intermediate_size=32, max_position_embeddings=512)
SIZES = PLAIN | dict(num_key_value_heads=1)
HEADS = SIZES | dict(head_dim=8)
WINDOWS = dict(sliding_window=6, layer_types=["sliding_attention", "full_attention"])
EXPERTS = dict(num_experts_per_tok=2, num_experts=4)
LOCAL_EXPERTS = dict(num_experts_per_tok=2, num_local_experts=4)
LATENT = dict(
    num_key_value_heads=2, q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8
)
GROUPS = dict(num_experts_per_tok=2, n_routed_experts=4, n_group=2, topk_group=1, first_k_dense_replace=1)
LINEAR = dict(
    layer_types=["linear_attention", "full_attention"],
    linear_key_head_dim=8,
    linear_value_head_dim=8,
    linear_num_key_heads=2,
    linear_num_value_heads=2,
)

ARCHITECTURES = {
    "bloom": (T.BloomConfig, dict(hidden_size=16, n_layer=2, n_head=2, hidden_dropout=0.3)),
    "cohere": (T.CohereConfig, SIZES | dict(logit_scale=0.5, use_qk_norm=True)),
    "cohere2": (T.Cohere2Config, SIZES | WINDOWS | dict(logit_scale=0.5)),
    "deepseek_v3": (T.DeepseekV3Config, SIZES | LATENT | GROUPS | dict(moe_intermediate_size=8)),
    "falcon": (T.FalconConfig, FEW | dict(max_position_embeddings=512, hidden_dropout=0.3)),
    "falcon, alibi": (T.FalconConfig, FEW | dict(max_position_embeddings=512, alibi=True)),
    "gemma": (T.GemmaConfig, HEADS),
    "gemma2": (T.Gemma2Config, HEADS | dict(sliding_window=6, final_logit_softcapping=1.5, attn_logit_softcapping=2.0)),
    "gemma3": (T.Gemma3TextConfig, HEADS | WINDOWS),
    "glm4": (T.Glm4Config, HEADS),
    "gpt2": (T.GPT2Config, dict(n_embd=16, n_layer=2, n_head=2, n_positions=512, resid_pdrop=0.3)),
    "gpt_neox": (T.GPTNeoXConfig, PLAIN | dict(hidden_dropout=0.3)),
    "gpt_oss": (T.GptOssConfig, HEADS | LOCAL_EXPERTS | dict(sliding_window=6)),
    "granite": (
        T.GraniteConfig,
        SIZES | dict(logits_scaling=3.0, embedding_multiplier=2.0, residual_multiplier=0.5, attention_multiplier=0.4),
    ),
    "jamba": (
        T.JambaConfig,
        SIZES | EXPERTS | dict(attn_layer_period=2, attn_layer_offset=1, use_mamba_kernels=False),
    ),
    "lfm2": (T.Lfm2Config, SIZES | dict(layer_types=["conv", "full_attention"])),
    "llama": (T.LlamaConfig, SIZES),
    "mistral": (T.MistralConfig, SIZES | dict(sliding_window=6)),
    "mixtral": (T.MixtralConfig, SIZES | LOCAL_EXPERTS | dict(sliding_window=6)),
    "olmo2": (T.Olmo2Config, SIZES),
    "opt": (T.OPTConfig, FEW | dict(ffn_dim=32, max_position_embeddings=512, dropout=0.3)),
    "phi": (T.PhiConfig, SIZES | dict(qk_layernorm=True, resid_pdrop=0.3)),
    "phi3": (T.Phi3Config, SIZES | dict(sliding_window=6, resid_pdrop=0.3)),
    "qwen2": (T.Qwen2Config, SIZES),
    "qwen3": (T.Qwen3Config, HEADS),
    "qwen3_moe": (T.Qwen3MoeConfig, HEADS | EXPERTS | dict(moe_intermediate_size=8)),
    "qwen3_next": (
        T.Qwen3NextConfig,
        HEADS | EXPERTS | LINEAR | dict(moe_intermediate_size=8, shared_expert_intermediate_size=8),
    ),
    "smollm3": (T.SmolLM3Config, SIZES | dict(no_rope_layer_interval=2)),
    "stablelm": (T.StableLmConfig, SIZES | dict(qk_layernorm=True, hidden_dropout=0.3)),
    "starcoder2": (T.Starcoder2Config, SIZES | dict(sliding_window=6, residual_dropout=0.3)),
}
REFUSED = {"mamba": (T.MambaConfig, dict(hidden_size=16, num_hidden_layers=2, state_size=4))}

# Those that differ most are tested in each run, the others by pytest -m slow.
TELLING = "qwen2", "cohere2", "falcon, alibi", "gemma2", "mistral", "mixtral", "opt", "qwen3_next"
KINDS = [pytest.param(kind, marks=() if kind in TELLING else pytest.mark.slow) for kind in ARCHITECTURES]

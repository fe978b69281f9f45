"""The configs of the models that the recipes train, as their authors publish them."""

from transformers import Qwen2Config, Qwen3Config, Qwen3MoeConfig

QWEN3 = {
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "rope_theta": 1_000_000,
}
R1_DISTILL = Qwen2Config(
    hidden_size=1536,
    intermediate_size=8960,
    num_hidden_layers=28,
    num_attention_heads=12,
    num_key_value_heads=2,
    vocab_size=151936,
    max_position_embeddings=131072,
    tie_word_embeddings=False,
)
# Of each recipe: the model's config as its authors publish it, and its parameters in units of 10^9.
MODELS = {
    "math_1.5b": (R1_DISTILL, 1.777),
    "code_1.5b": (R1_DISTILL, 1.777),
    "qwen3_4b": (
        Qwen3Config(hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, tie_word_embeddings=True, **QWEN3),
        4.022,
    ),
    "qwen3_8b": (
        Qwen3Config(
            hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, tie_word_embeddings=False, **QWEN3
        ),
        8.191,
    ),
    "qwen3_30b_a3b": (
        Qwen3MoeConfig(
            hidden_size=2048,
            intermediate_size=6144,
            moe_intermediate_size=768,
            num_hidden_layers=48,
            num_experts=128,
            num_experts_per_tok=8,
            norm_topk_prob=True,
            tie_word_embeddings=False,
            **{**QWEN3, "num_key_value_heads": 4},
        ),
        30.532,
    ),
}

"""Tiny random models on disk, with a tokenizer that knows characters and a chat template."""

from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def save_tokenizer(folder: Path, words: Sequence[str] = (), chat_template: str = CHAT_TEMPLATE) -> None:
    """Of characters; ``words`` are further tokens, which are only ever sampled."""
    special = ["<pad>", "</s>", "<|user|>", "<|assistant|>", "<|system|>"]
    characters = [chr(c) for c in range(32, 127)]
    vocabulary = {token: i for i, token in enumerate([*special, *characters, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=special[2:],
        chat_template=chat_template,
    ).save_pretrained(folder)


def save_model(folder: Path, **overrides) -> None:
    """A Llama: 128 tokens, two layers, tied head, but for ``overrides`` of its config."""
    torch.manual_seed(0)
    settings = {
        "vocab_size": 128,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": 1,
        "pad_token_id": 0,
        "initializer_range": 0.2,
    }
    LlamaForCausalLM(LlamaConfig(**{**settings, **overrides})).save_pretrained(folder)


def save_experts(folder: Path) -> None:
    """A mixture of experts, which transformers keeps as one weight a layer and the hub as one an expert."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=128,
        hidden_size=64,
        moe_intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        num_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=128,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
        initializer_range=0.2,
    )
    Qwen3MoeForCausalLM(config).save_pretrained(folder)


BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"


def save_experts_with_bias(folder: Path) -> Glm4MoeForCausalLM:
    """GLM's, whose router has a bias that chooses the experts: a buffer that is among the weights."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 128}
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
    config = Glm4MoeConfig(**sizes, **heads, **experts, eos_token_id=1, pad_token_id=0)
    model = Glm4MoeForCausalLM(config)
    model.get_buffer(BIAS).copy_(torch.tensor([1.0, -1.0, 0.5, 0.3]))
    model.save_pretrained(folder)
    return model

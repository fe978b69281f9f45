"""Shared by the tests: a tiny random model on disk, with a tokenizer that knows digits and a chat template."""

import os
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import Phase, settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

settings.register_profile("tests", deadline=None)  # how long an example takes is the machine's business
settings.load_profile("tests")
# For scripts/mutants.sh: an example that fails is all it wants.
settings.register_profile("mutants", phases=[Phase.explicit, Phase.generate], database=None, deadline=None)

SLOW = (
    "test_faults",
    "test_fsdp",
    "test_recipes_run",
    "test_servers",
    "test_docs",
    "test_evaluation",
    "test_runs",
)  # by file, the slowest first


def pytest_collection_modifyitems(items):
    """Slow files first: otherwise one process waits at the end while the other works through the last of them."""
    items.sort(key=lambda item: SLOW.index(item.path.stem) if item.path.stem in SLOW else len(SLOW))


CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def save_tokenizer(folder: Path, words: Sequence[str] = (), chat_template: str = CHAT_TEMPLATE) -> None:
    """Of characters; ``words`` are further tokens, which are only ever sampled."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

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
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

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


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> str:
    """A Llama with random weights: 128 tokens, two layers, tied head."""
    folder = tmp_path_factory.mktemp("tiny_model")
    save_model(folder)
    save_tokenizer(folder)
    return str(folder)

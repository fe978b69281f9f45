"""What shipped configs name on the hub, as a Hugging Face cache: tiny random models, and a few rows of each dataset.

With HF_HOME set to the cache's folder and HF_HUB_OFFLINE, names are found there.
"""

from pathlib import Path

import torch
from datasets import DatasetInfo, Features, SplitDict, SplitInfo
from datasets.arrow_writer import ArrowWriter
from datasets.naming import camelcase_to_snakecase
from pyarrow import Table
from transformers import AutoModelForCausalLM, PreTrainedConfig

from tests.support.models import save_tokenizer

REVISION = "0" * 40
TINY = {
    "vocab_size": 192,  # more than the tokenizer has, as published
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": 1,
}
TINY_HEADS = {"head_dim": 64}  # where it isn't hidden_size / num_attention_heads
TINY_EXPERTS = {"num_local_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64}


def add_model(home: Path, name: str, published: PreTrainedConfig, **tokenizer) -> None:
    """A random model of the published one's architecture: what makes it large is small, all else as published."""
    repository = home / "hub" / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(REVISION)
    settings = published.to_dict()
    shrunk = {key: value for key, value in {**TINY_HEADS, **TINY_EXPERTS}.items() if settings.get(key)}
    settings.pop("layer_types", None)  # by layer
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(type(published)(**{**settings, **TINY, **shrunk}), dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norms and biases begin as ones and zeros, which can't be told from missing ones
                parameter += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(repository / "snapshots" / REVISION)
    save_tokenizer(repository / "snapshots" / REVISION, **tokenizer)


def add_dataset(home: Path, name: str, subset: str | None, split: str, rows: list[dict]) -> None:
    """As `datasets` keeps what it has loaded once."""
    owner, own_name = name.split("/")
    own_name = camelcase_to_snakecase(own_name)
    subset = subset or "default"
    folder = home / "datasets" / f"{owner}___{own_name}" / subset / "0.0.0" / REVISION
    folder.mkdir(parents=True)
    with ArrowWriter(path=str(folder / f"{own_name}-{split}.arrow")) as writer:
        writer.write_table(table := Table.from_pylist(rows))
        count, size = writer.finalize()
    features = Features.from_arrow_schema(table.schema)
    info = DatasetInfo(features=features, dataset_name=own_name, config_name=subset, version="0.0.0")
    info.splits = SplitDict({split: SplitInfo(split, size, count, dataset_name=own_name)}, dataset_name=own_name)
    info.write_to_directory(str(folder))

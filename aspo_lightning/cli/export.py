"""``aspo export RUN_OR_CKPT OUT_DIR``: the policy of a checkpoint as a Hugging Face folder."""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.distributed import checkpoint as dcp
from transformers import GenerationConfig

from aspo_lightning.cli.card import model_card
from aspo_lightning.errors import ConfigError
from aspo_lightning.policy.causal_lm import ScoredCausalLM
from aspo_lightning.policy.hub import load_tokenizer
from aspo_lightning.policy.settings import ModelSettings
from aspo_lightning.policy.weights import full_weights, without_frozen
from aspo_lightning.run.checkpoints import metadata, trained_from
from aspo_lightning.run.disk import check_writable
from aspo_lightning.run.folder import find_checkpoint


def export(source: Path, target: Path, dtype: torch.dtype | None = None) -> None:
    """Writes the policy's weights (adapters merged), configs, tokenizer and model card; all of it or nothing.

    Args:
        source: a run's folder (its newest checkpoint is taken), or a checkpoint: a file, or a sharded one's folder.
        target: the folder to make.
        dtype: of the weights written. None: as they were trained.

    Raises:
        ConfigError: if ``source`` isn't a checkpoint, or ``target`` isn't empty.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"{target} exists and is not an empty folder. Choose another place.")
    target = target.resolve()
    check_writable(target.parent, "another OUT_DIR")
    checkpoint = find_checkpoint(source)
    policy, name = load_policy(checkpoint)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as temporary:
        folder = Path(temporary) / target.name
        weights = dict(full_weights(policy.lm, dtype))
        # As the model was published: transformers refuses to save some that it has read.
        generation, policy.lm.generation_config = policy.lm.generation_config, GenerationConfig()
        policy.lm.save_pretrained(folder, state_dict=weights)
        generation.to_json_file(folder / "generation_config.json")
        config = type(policy.lm.config).from_pretrained(name)  # the policy's own is without dropout
        config.architectures, config.dtype = [type(policy.lm).__name__], dtype or policy.lm.dtype
        config.save_pretrained(folder)
        load_tokenizer(name).save_pretrained(folder)
        card = model_card(target.name, checkpoint, dtype or policy.lm.dtype)
        (folder / "README.md").write_text(card)
        folder.rename(target)


def load_policy(checkpoint: Path) -> tuple[ScoredCausalLM, str]:
    """The policy of a checkpoint on the CPU, and the model that it was trained from.

    Raises:
        ConfigError: if it was not written by ``aspo fit``.
    """
    sharded = checkpoint.is_dir()
    settings = trained_from(checkpoint)
    name = settings.pop("model_name_or_path")
    policy = ScoredCausalLM.from_pretrained(name, ModelSettings(**settings))
    trained = without_frozen(policy, policy.state_dict())
    if sharded:
        state = {f"policy.{name}": value for name, value in trained.items()}
        dcp.load({"state_dict": state}, checkpoint_id=checkpoint, no_dist=True)  # into the policy's own tensors
    else:
        state = {k.removeprefix("policy."): v for k, v in metadata(checkpoint)["state_dict"].items()}
        missing, unknown = policy.load_state_dict(state, strict=False)
        if wrong := [*unknown, *(set(missing) & set(trained))]:
            raise ConfigError(f"The weights in {checkpoint} are not those of {name}: see {', '.join(wrong[:3])}.")
    return policy, name


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="aspo export", description=__doc__)
    parser.add_argument("source", type=Path, metavar="RUN_OR_CKPT", help="a run's folder, or one of its checkpoints")
    parser.add_argument("target", type=Path, metavar="OUT_DIR", help="the folder to make")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: as trained")
    options = parser.parse_args(arguments)
    export(options.source, options.target, getattr(torch, options.dtype) if options.dtype else None)
    print(f"Exported to {options.target}")

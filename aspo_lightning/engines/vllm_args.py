"""vLLM's own arguments: those that a user may hand it, and those that adapters need."""

import difflib
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, get_args

from aspo_lightning.errors import ConfigError

OURS = {
    "model": "model.model_name_or_path",
    "tokenizer": "model.model_name_or_path",
    "seed": "seed_everything",
    "max_model_len": "data.max_prompt_length and data.max_completion_length",
    **{name: f"data.engine.{name}" for name in ("dtype", "max_num_seqs", "gpu_memory_utilization", "enforce_eager")},
    "tensor_parallel_size": "data.engine.tensor_parallel_size",
    "kv_cache_memory_bytes": "data.engine.kv_cache_gib",
    "hf_overrides": "",
    "logprobs_mode": "",
    "max_logprobs": "",
    "enable_sleep_mode": "",
    "enable_chunked_prefill": "",
    "max_num_batched_tokens": "",
    "block_size": "",
    "distributed_executor_backend": "",
    "worker_extension_cls": "",
    **dict.fromkeys(("enable_lora", "max_loras", "max_lora_rank"), "model.lora_rank"),
    "weight_transfer_config": "",
}
"""What engine_args can't have, since this engine sets it or relies on it; and the setting that does, if one does."""


def check_engine_args(engine_args: Mapping[str, object]) -> None:
    """Raises ConfigError for arguments that vLLM doesn't have, or that aren't free."""
    from vllm.engine.arg_utils import EngineArgs

    known = {field.name for field in fields(EngineArgs)}
    for name in engine_args:
        if name in OURS:
            set_by = f"{OURS[name]} sets it" if OURS[name] else "sampling and syncs rely on how it is set"
            raise ConfigError(f"data.engine.engine_args has {name}, but {set_by}. Leave it out.")
        if name not in known:
            close = difflib.get_close_matches(name, known, n=3)
            hint = f" Close to it are {', '.join(close)}." if close else ""
            raise ConfigError(f"data.engine.engine_args has {name}, which isn't an argument of vLLM.{hint}")


def adapter_args(rank: int) -> dict[str, Any]:
    """What has vLLM take adapters of that rank."""
    from vllm.config.lora import MaxLoRARanks

    ranks: tuple[int, ...] = get_args(MaxLoRARanks)
    if rank > max(ranks):
        raise ConfigError(
            f"model.lora_rank is {rank}, and vLLM takes adapters up to {max(ranks)}. Lower it, or set "
            "data.engine.merge_adapters to true."
        )
    return {"enable_lora": True, "max_loras": 1, "max_lora_rank": min(r for r in ranks if r >= rank)}

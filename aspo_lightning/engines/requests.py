"""What vLLM is asked for a completion, and how it says that one has ended."""

from collections.abc import Mapping
from typing import Any

from aspo_lightning.engines.base import SamplingRequest
from aspo_lightning.errors import ConfigError


def request_body(request: SamplingRequest, extra: Mapping[str, Any]) -> dict[str, Any]:
    """What a server is asked, with what else it is to be told."""
    sampling = {
        "max_tokens": request.max_tokens,
        "temperature": request.temperature,
        "top_p": request.top_p,
        "seed": request.seed,
        "logprobs": 0,
        "detokenize": False,
    }
    return {
        **extra,
        "token_ids": list(request.prompt_ids),
        "sampling_params": {**extra.get("sampling_params", {}), **sampling},
    }


def is_truncated(finish_reason: str | None) -> bool:
    """Whether a completion was cut before it ended by itself.

    Raises:
        RuntimeError: for one that vLLM gave up, as it does where it is shut down or paused.
    """
    if finish_reason not in ("stop", "length", "repetition"):
        raise RuntimeError(f"it gave up a completion: {finish_reason}")
    return finish_reason != "stop"


def check_extra_body(extra: Mapping[str, Any]) -> None:
    """Raises ConfigError for fields that a request has anyway, or that would change what its answer looks like."""
    ours = request_body(SamplingRequest((), 1, 0), {})
    sampling = extra.get("sampling_params", {})
    if not isinstance(sampling, Mapping):
        raise ConfigError(f"VLLMServers.extra_body has sampling_params {sampling!r}; they must be names with values.")
    taken = [name for name in extra if name in ours and name != "sampling_params"]
    taken += [f"sampling_params.{name}" for name in sampling if name in ours["sampling_params"] or name == "n"]
    taken += [name for name in extra if name in ("model", "stream")]
    if taken:
        raise ConfigError(
            f"VLLMServers.extra_body has {taken[0]}, which each request sets itself, from data.* and model.*. Leave it "
            "out."
        )

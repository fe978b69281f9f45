"""The protocol between a rollout phase and whatever samples for it."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from aspo_lightning.engines.watchdog import end_process
from aspo_lightning.errors import AspoError, ConfigError, EngineError
from aspo_lightning.types import Completion

FULL, HALF = 4, 2  # bytes of a 32-bit and of a 16-bit number


@dataclass(frozen=True)
class SamplingRequest:
    """One completion to sample."""

    prompt_ids: tuple[int, ...]
    max_tokens: int
    seed: int
    """Fixes the completion, given the weights."""
    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0


@dataclass(frozen=True)
class Adapters:
    """Low-rank adapters (LoRA, arXiv 2106.09685), apart from the weights that they belong to."""

    rank: int
    alpha: float
    """Their product is scaled by alpha / rank."""
    tensors: Iterable[tuple[str, Tensor]]
    """(name as peft saves it, full tensor) of each."""


@dataclass(frozen=True)
class EngineMemory:
    """What an engine takes of a GPU's memory, or of a process's on CPUs, in bytes."""

    sampling: dict[str, float] = field(default_factory=dict)
    """By part; what it holds while it samples, beyond ``asleep``."""
    asleep: float | None = None
    """What stays while the trainer works. None: it never sleeps, and all of ``sampling`` stays."""
    cache_tokens: float = float("inf")
    """Tokens that its KV cache has room for."""
    share: float | None = None
    """Of a GPU's memory: what it is set to take in all. None: it takes what it needs."""


def kv_bytes(config: PreTrainedConfig, itemsize: int, split: int = 1) -> float:
    """Bytes of the KV cache that a token takes on each of ``split`` GPUs."""
    head: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    kv_heads: int = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    layers: int = config.num_hidden_layers
    return 2 * layers * kv_heads * head * itemsize / min(split, kv_heads)


class Engine(ABC):
    """Samples completions. Made cheaply from its settings; the model is loaded by ``start``.

    One of your own is a subclass with the abstract methods; ``data.engine`` takes its import path.
    """

    tensor_parallel_size: int = 1
    """Neighbouring ranks that share an engine: they get the same requests and return the same completions."""
    takes_adapters: bool = False
    """Whether adapters come by ``sync_adapters``; otherwise merged, by ``sync_weights``."""

    apart: bool = False
    """Whether it samples on devices of its own, so that the trainer can work meanwhile (``data.lag``)."""

    _on_hang: Callable[[str], None] = staticmethod(end_process)

    def when_it_hangs(self, on_hang: Callable[[str], None]) -> None:
        """Has ``on_hang`` called, with the reason, instead of ending this process. Not all engines notice."""
        self._on_hang = on_hang

    @property
    def weights_dtype(self) -> torch.dtype | None:
        """What ``sync_weights`` is best given: what it would cast them to. None: as they were trained."""
        return None

    @property
    def copies(self) -> int:
        """Copies of the weights that a rank's requests go to, in turn."""
        return 1

    def memory(
        self,
        config: PreTrainedConfig,
        parameters: int,
        *,
        context_length: int,
        gpu_memory: float | None,
        share: float | None = None,
    ) -> EngineMemory:
        """What it will take on this machine; by default nothing, like an engine elsewhere.

        Args:
            config: of the (text) model.
            parameters: their number.
            context_length: as for ``start``.
            gpu_memory: of each GPU, in bytes; None on CPUs.
            share: of a GPU, to look at instead of the one that is set.
        """
        return EngineMemory()

    @abstractmethod
    def check(self) -> None:
        """Raises ConfigError if this engine can't run here."""

    @abstractmethod
    def start(self, model_name_or_path: str, *, context_length: int) -> None:
        """Loads the model, for prompts and completions of together at most ``context_length`` tokens."""

    def expect_adapters(self, rank: int) -> None:  # noqa: B027 (engines may leave it: adapters come merged)
        """Says, before ``start``, that adapters of this rank will be trained; 0: the weights."""

    def sync_adapters(self, adapters: Adapters) -> None:
        """Takes over the policy's adapters, on the weights of ``start``; nothing cached of the old ones stays."""
        raise NotImplementedError(f"{type(self).__name__} takes no adapters")

    @abstractmethod
    def generate(self, requests: Sequence[SamplingRequest]) -> Iterator[tuple[int, Completion]]:
        """Samples one completion per request and yields each as soon as it is finished, in any order.

        Nothing starts before the first is asked for; leaving the iteration early cancels the others.

        Yields:
            (index of the request in ``requests``, its completion)
        """

    @abstractmethod
    def sync_weights(self, named_tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Takes over the policy's weights (Hugging Face names, full tensors); nothing cached of the old ones stays."""

    def sleep(self) -> bool:
        """Frees memory between samplings. Returns whether the weights went too: then ``sync_weights`` comes next."""
        return False

    @abstractmethod
    def stop(self) -> None:
        """Frees what ``start`` took. May be called at any time, more than once."""


@contextmanager
def engine_errors(*, at_start: bool = False) -> Iterator[None]:
    """Turns what an engine raises in here into EngineError.

    What it raises ``at_start`` into ConfigError: it would be the same after a restart, like too little memory.
    """
    try:
        yield
    except AspoError:
        raise
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:400]
        if at_start:
            raise ConfigError(f"The engine can't be started ({reason}).") from error
        raise EngineError(f"The engine broke ({reason}). Nothing of this phase was trained on.") from error


def generate(engine: Engine, requests: Sequence[SamplingRequest]) -> Iterator[tuple[int, Completion]]:
    """``engine.generate``; what the engine raises becomes EngineError, what the caller raises meanwhile doesn't."""
    with engine_errors():
        yield from engine.generate(requests)

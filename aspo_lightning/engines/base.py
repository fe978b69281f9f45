"""The protocol between a rollout phase and whatever samples for it."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from aspo_lightning.engines.watchdog import end_process
from aspo_lightning.errors import AspoError, ConfigError, EngineError
from aspo_lightning.types import Completion


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


Finished = Callable[[int, Completion], None]
"""Is told of a request, by its place among all, that its completion is there."""


def ignore(index: int, completion: Completion) -> None:
    """For those who wait for all completions."""


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


class Generator(ABC):
    """Samples completions. Made cheaply from its settings; the model is loaded by ``start``."""

    tensor_parallel_size: int = 1
    """Neighbouring ranks that share an engine: they get the same requests and return the same completions."""

    _on_hang: Callable[[str], None] = staticmethod(end_process)

    def when_it_hangs(self, on_hang: Callable[[str], None]) -> None:
        """Has ``on_hang`` called, with the reason, instead of ending this process. Not all engines can tell."""
        self._on_hang = on_hang

    @property
    def weights_dtype(self) -> torch.dtype | None:
        """What ``sync_weights`` is best given: what it would cast them to. None: as they were trained."""
        return None

    @property
    def copies(self) -> int:
        """Copies of the weights that a rank's requests go to, in turn."""
        return 1

    @abstractmethod
    def check(self) -> None:
        """Raises ConfigError if this engine can't run here."""

    @abstractmethod
    def start(self, model_name_or_path: str, *, context_length: int) -> None:
        """Loads the model, for prompts and completions of together at most ``context_length`` tokens."""

    @abstractmethod
    def generate(
        self, requests: Sequence[SamplingRequest], *, description: str, finished: Finished = ignore
    ) -> list[Completion]:
        """Samples one completion a request, behind a progress bar.

        Args:
            requests: what to sample.
            description: of the bar.
            finished: is told of each completion as soon as it is there.

        Returns:
            The completions in the order of their requests.
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

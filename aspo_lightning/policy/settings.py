"""How a model is loaded and computed with: ``model.*`` on the command line, documented and checked in place."""

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import torch

from aspo_lightning.errors import ConfigError
from aspo_lightning.identity import INCIDENTAL


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """What policy and reference share."""

    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    """of the weights that are trained; compute precision is ``trainer.precision``."""
    gradient_checkpointing: Annotated[bool, INCIDENTAL] = False
    """recompute activations in backward: less memory, about a third more time."""
    chunk_size: Annotated[int | None, INCIDENTAL] = None
    """vocabulary entries whose logits the scorer holds at a time. None: 4096; on a CPU
    fewer where there are many tokens."""
    lora_rank: int = 0
    """trains low-rank adapters of this rank instead of the weights. 0: the weights."""
    lora_alpha: float = 32.0
    """the adapters' product is scaled by lora_alpha / lora_rank."""

    def __post_init__(self) -> None:
        if not 0 <= self.lora_alpha < math.inf:
            raise ConfigError(f"model.lora_alpha is {self.lora_alpha}; it must be finite and at least 0.")
        if self.chunk_size is not None and self.chunk_size < 1:
            raise ConfigError(f"model.chunk_size is {self.chunk_size}; it must be at least 1.")
        if self.lora_rank < 0:
            raise ConfigError(
                f"model.lora_rank is {self.lora_rank}; it must be at least 0 (0 trains the weights themselves)."
            )

    @property
    def torch_dtype(self) -> torch.dtype:
        """``dtype`` as torch has it."""
        return getattr(torch, self.dtype)

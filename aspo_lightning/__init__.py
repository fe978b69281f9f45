"""ASPO (Asymmetric Importance Sampling Policy Optimization) for language models, in PyTorch Lightning."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from aspo_lightning.datamodule import RolloutDataModule
    from aspo_lightning.module import ASPOModule
    from aspo_lightning.training import trainer_settings

__all__ = ["ASPOModule", "RolloutDataModule", "trainer_settings"]
__version__ = "0.1.0"

_HOMES = {"ASPOModule": "module", "RolloutDataModule": "datamodule", "trainer_settings": "training"}


def __getattr__(name: str):
    # On first use: reward workers import this package too, and must not load torch for it.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)

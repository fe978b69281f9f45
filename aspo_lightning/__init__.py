"""ASPO (Asymmetric Importance Sampling Policy Optimization) for language models, in PyTorch Lightning."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from aspo_lightning.datamodule import RolloutDataModule
    from aspo_lightning.module import ASPOModule

__all__ = ["ASPOModule", "RolloutDataModule"]
__version__ = "0.1.0"


def __getattr__(name: str):
    # On first use: reward workers import this package too, and must not load torch for it.
    if name == "ASPOModule":
        from aspo_lightning.module import ASPOModule

        return ASPOModule
    if name == "RolloutDataModule":
        from aspo_lightning.datamodule import RolloutDataModule

        return RolloutDataModule
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

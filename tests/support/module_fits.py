"""Fits of an ASPOModule on given groups, without an engine."""

import torch
from lightning.pytorch import Trainer

from tests.support.one_step import MAX_LENGTH, OneStep
from tests.support.phases import build_phase


class Phases(OneStep):
    """Two optimizer steps, with the log-probs that the module itself gives."""

    def __init__(self, groups):
        super().__init__()
        self.groups = groups

    def train_dataloader(self):
        self.phase = build_phase(
            self.groups,
            self.trainer.lightning_module,
            epoch=0,
            optimizer_steps=2,
            max_completion_length=MAX_LENGTH,
            token_budget=60,
        )
        self.trainer.accumulate_grad_batches = self.phase.accumulate
        return self.phase


def fit(module, data, **settings):
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"logger": False, "enable_checkpointing": False, **settings},
    )
    trainer.fit(module, data)
    return {key: float(value) for key, value in trainer.callback_metrics.items()}


def adam(lr):
    return lambda p: torch.optim.AdamW(p, lr=lr, weight_decay=0.1)

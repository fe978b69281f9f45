"""Loads a model sharded, as one of two `Ranks`; writes how many MB that took at its peak, and the weights."""

import re
import sys
from pathlib import Path

import torch
from lightning.pytorch import Trainer

from aspo_lightning import ASPOModule
from aspo_lightning.fsdp import FSDP2Strategy
from aspo_lightning.policy.weights import full_weights


def megabytes(field: str) -> float:
    return int(re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)[1]) / 1e3


def main() -> None:
    model, out = sys.argv[1:]
    strategy = Trainer(accelerator="cpu", devices=2, strategy=FSDP2Strategy(), logger=False).strategy
    module = ASPOModule(model)
    strategy.connect(module)
    strategy.setup_environment()
    before = megabytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # starts the peak anew
    sharded = strategy.load(module.model_name_or_path, module.settings)
    (Path(out) / f"peak_{strategy.global_rank}").write_text(str(megabytes("VmHWM") - before))
    torch.save(dict(full_weights(sharded.lm)), f"{out}/rank_{strategy.global_rank}.pt")

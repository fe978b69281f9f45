"""One optimizer step by Lightning for many ways to split it; writes the gradients, as one of `Ranks`."""

import math
import os
import sys
from dataclasses import replace
from functools import cache

import torch
from lightning.pytorch import Callback, LightningDataModule, Trainer

from aspo_lightning import ASPOModule
from aspo_lightning.fsdp import FSDP2Strategy
from aspo_lightning.objectives import ASPO
from aspo_lightning.policy.weights import full_tensor
from aspo_lightning.rollouts.packing import plan_phase
from aspo_lightning.types import Prompt, Rollout, RolloutGroup
from tests.support.phases import build_phase

TEMPERATURE, KL_COEF, ENTROPY_COEF, MAX_LENGTH = 0.7, 0.1, 0.01, 12
SHARDED = {
    "sharded": {},
    "sharded, reduced each time": {"reduce_each_micro_batch": True},
    "sharded, on the host": {"cpu_offload": True},
}
LORA = {"lora_rank": 2, "lora_alpha": 8.0}
AVERAGING = ("token_mean", "sequence_mean", "sequence_sum")


def make_groups():
    """Eight groups of four completions, of 1 to 12 tokens."""
    groups = []
    for g in range(8):
        rollouts = []
        for s in range(4):
            length = 1 + (5 * g + 7 * s) % MAX_LENGTH
            ids = tuple(5 + (11 * g + 17 * s + 3 * t) % 100 for t in range(length))
            rollouts.append(Rollout(ids, (-1.0,) * length, False, "", float((g + s) % 3), False))
        prompt = Prompt(f"p{g}", tuple(6 + (g + 13 * t) % 90 for t in range(2 + g % 3)), "", "", {}, {})
        groups.append(RolloutGroup(prompt, tuple(rollouts)))
    return groups


def drift(token: int, factor: float) -> float:
    """Stands for what several updates did to a token's log-prob; puts tokens on both sides of every clip edge."""
    return 0.4 * math.sin(factor * token)


def drifted(batch, old):
    """As if several updates had come since the policy and the reference scored ``batch``."""

    def drifts(factor):
        return torch.tensor([drift(token, factor) for token in batch.targets.tolist()], dtype=old.dtype)

    return replace(batch, old_logprobs=old + drifts(7), ref_logprobs=batch.ref_logprobs + drifts(3))


@cache
def budgets(shared):
    """A token budget for each number of micro-batches, on one rank and on two, with prompts shared or repeated."""
    lengths = [(len(g.prompt.prompt_ids), [len(r.completion_ids) for r in g.rollouts]) for g in make_groups()]
    longest = max(prompt + max(completions) for prompt, completions in lengths)
    total = sum(prompt * len(completions) + sum(completions) for prompt, completions in lengths)
    found = {}
    for budget in range(longest, total + 1):
        for world_size in (1, 2):
            plan = plan_phase(lengths, optimizer_steps=1, world_size=world_size, token_budget=budget, shared=shared)
            found[world_size, plan.accumulate] = budget
    return found


class OneStep(LightningDataModule):
    def __init__(self, **settings):
        super().__init__()
        self.settings = settings

    def train_dataloader(self):
        module = self.trainer.lightning_module
        phase = build_phase(
            make_groups(),
            module,
            epoch=0,
            optimizer_steps=1,
            max_completion_length=MAX_LENGTH,
            rank=self.trainer.global_rank,
            world_size=self.trainer.world_size,
            **self.settings,
        )
        self.trainer.accumulate_grad_batches = phase.accumulate
        self.accumulate = phase.accumulate
        scores = zip(phase, module.score(phase.micro_batches), strict=True)
        return replace(phase, micro_batches=[drifted(batch, old) for batch, old in scores])

    def transfer_batch_to_device(self, batch, device, dataloader_idx):
        return batch.to(device)


@torch.no_grad()
def move_adapters(lm):
    """From their beginning, where one of their gradients is zero, to the same place each time."""
    for parameter in lm.parameters():
        if parameter.requires_grad:
            parameter.copy_(torch.arange(parameter.numel(), dtype=parameter.dtype).sin().view_as(parameter) / 10)


class Gradients(Callback):
    def __init__(self, packs):
        self.packs = packs

    def on_fit_start(self, trainer, pl_module):
        for model in (pl_module.policy, pl_module.reference):
            if model is not None:  # adapters need no reference
                model.packs = self.packs
        if pl_module.settings.lora_rank:
            move_adapters(pl_module.policy)

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        trained = [p for p in pl_module.parameters() if p.requires_grad]
        self.gradients = torch.cat([full_tensor(p.grad).flatten() for p in trained]).clone()

    def on_train_end(self, trainer, pl_module):
        self.mismatch = [trainer.callback_metrics[f"mismatch/logprob_abs_{kind}"].item() for kind in ("mean", "max")]


def gradient(
    model: str, ranks: int, k: int, *, packs: bool = True, averaging: str = "token_mean", strategy=None, **settings
):
    """Of one optimizer step of k micro-batches; and its mismatch with the engine, mean and maximum."""
    module = ASPOModule(
        model,
        objective=ASPO(),
        temperature=TEMPERATURE,
        kl_coef=KL_COEF,
        entropy_coef=ENTROPY_COEF,
        optimizer=lambda p: torch.optim.SGD(p, lr=0.0),
        **settings,
    )
    data = OneStep(averaging=averaging, token_budget=budgets(packs)[ranks, k])
    capture = Gradients(packs)
    Trainer(
        accelerator="cpu",
        devices=ranks,
        strategy=strategy or ("ddp" if ranks > 1 else "auto"),
        max_epochs=1,
        logger=False,
        callbacks=[capture],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    ).fit(module, data)
    assert data.accumulate == k
    return capture.gradients, capture.mismatch


def main() -> None:
    model, experts, out, ranks = *sys.argv[1:4], int(sys.argv[4])

    def step(*args, **settings):
        return gradient(model, ranks, *args, **settings)[0]

    results = {
        (dtype, averaging, k, packs): step(k, packs=packs, averaging=averaging, dtype=dtype)
        for dtype in ("float64", "float32")
        for averaging in AVERAGING
        for k in (1, 2, 4, 8)
        for packs in (True, False)
    }
    for k in (1, 4):
        results["recomputed", k] = step(k, dtype="float64", gradient_checkpointing=True)
        for name, strategy in SHARDED.items():
            results[name, k] = step(k, dtype="float64", strategy=FSDP2Strategy(**strategy))
        name = "sharded, recomputed"
        results[name, k] = step(k, dtype="float64", strategy=FSDP2Strategy(), gradient_checkpointing=True)
        results["adapters", k] = step(k, dtype="float64", **LORA)
        results["experts", k], results["mismatch", k] = gradient(experts, ranks, k, dtype="float64")
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:
        torch.save(results, out)

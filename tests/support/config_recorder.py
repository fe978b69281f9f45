"""A callback that writes down what of a config has arrived in a run, and what its phases were. Used by `aspo fit`."""

import json
from pathlib import Path

import torch
from lightning.pytorch import Callback
from torch.distributed.tensor import DTensor


class ConfigRecorder(Callback):
    """Writes FOLDER/rank_R.json."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)
        self.phases: list[dict] = []
        self.inputs: list[str] = []  # dtypes of what the first layer is given, since the last micro-batch

    def on_train_start(self, trainer, pl_module):
        layer = pl_module.policy.lm.base_model.layers[0]
        layer.register_forward_pre_hook(lambda _, inputs: self.inputs.append(str(inputs[0].dtype)))

    def on_train_epoch_start(self, trainer, pl_module):
        phase = trainer.datamodule.phase
        self.phases.append(
            {
                "epoch": trainer.current_epoch,
                "first_step": trainer.global_step,
                "accumulate": phase.accumulate,
                "micro_batches": len(phase),
                "groups": [
                    {
                        "id": group.prompt.id,
                        "prompt": group.prompt.text,
                        "rewards": dict(group.prompt.rewards),
                        "texts": [rollout.text for rollout in group.rollouts],
                        "scores": [rollout.reward for rollout in group.rollouts],
                        "failed": sum(rollout.failed for rollout in group.rollouts),
                    }
                    for group in phase.groups
                ],
                # Of its median token: in a mixture of experts single tokens go to other experts in the engine. Of the
                # first step the canary alone is scored.
                "mismatch": torch.cat(
                    [
                        phase.canary - phase.micro_batches[0].generator_logprobs[: len(phase.canary)],
                        *(old - b.generator_logprobs for b in phase if (old := b.old_logprobs) is not None),
                    ]
                )
                .abs()
                .median()
                .item(),
                "losses": [],
                "inputs": [],
            }
        )

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.inputs = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        phase = self.phases[-1]
        phase["losses"].append(outputs["loss"].item())
        if batch_idx == 0:
            scored = trainer.datamodule.phase.canary
            phase["canary"] = (outputs["logprobs"][: len(scored)] - scored).abs().max().item()
        phase["inputs"].append(self.inputs.copy())

    def on_train_epoch_end(self, trainer, pl_module):
        metrics = {tag: value.item() for tag, value in trainer.callback_metrics.items()}
        self.phases[-1] |= {"last_step": trainer.global_step, "metrics": metrics}

    def on_train_end(self, trainer, pl_module):
        weights, config = list(pl_module.policy.parameters()), pl_module.policy.lm.config
        record = {
            "ranks": trainer.world_size,
            "strategy": type(trainer.strategy).__name__,
            "reduce_each_micro_batch": trainer.strategy.reduce_each_micro_batch,
            "precision": trainer.precision,
            "model": config.model_type,
            "tied": config.tie_word_embeddings,
            "objective": type(pl_module.objective).__name__,
            "tensor_parallel_size": trainer.datamodule.engine.tensor_parallel_size,
            "sharded": all(isinstance(weight, DTensor) for weight in weights),
            "dtypes": sorted({str(weight.dtype) for weight in weights}),
            "phases": self.phases,
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / f"rank_{trainer.global_rank}.json").write_text(json.dumps(record))

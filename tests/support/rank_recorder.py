"""A callback that writes down what each rank of a run saw, and can make a rank fail. Used through `aspo fit`."""

import os
import signal
import time
from pathlib import Path
from unittest import mock

import torch
from lightning.pytorch import Callback
from torch import distributed as dist

from aspo_lightning.engines import SamplingRequest
from aspo_lightning.policy.weights import full_tensor
from aspo_lightning.types import MicroBatch

PROBE = [tuple(range(40, 40 + n)) for n in (3, 8, 5)]


class RankRecorder(Callback):
    """Writes FOLDER/rank_R.pt: completions, gradients and the engine's log-probs less the trainer's, and the
    final weights and log-probs.

    ``fault`` is ``raise`` or ``kill``, on ``fault_rank`` in the second epoch. With ``stuck`` the other ranks then do
    nothing ever after: over NCCL they don't notice.
    """

    def __init__(self, folder: str, fault: str | None = None, fault_rank: int = 1, stuck: bool = False) -> None:
        self.folder, self.fault, self.fault_rank, self.stuck = Path(folder), fault, fault_rank, stuck
        self.phases, self.gradients, self.probes, self.synced = [], [], [], []

    def on_fit_start(self, trainer, pl_module):
        def fsync(descriptor):
            self.synced.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
            original(descriptor)

        original, os.fsync = os.fsync, fsync

    def on_train_epoch_start(self, trainer, pl_module):
        phase = trainer.datamodule.phase
        self.phases.append(
            {
                "completions": [(g.prompt.id, r.completion_ids, r.reward) for g in phase.groups for r in g.rollouts],
                "accumulate": phase.accumulate,
                "tokens": sum(len(batch.targets) for batch in phase.micro_batches),
                "kl": max(
                    (
                        (b.old_logprobs - b.ref_logprobs).abs().max().item()
                        for b in phase
                        if b.old_logprobs is not None and len(b.targets)
                    ),
                    default=0.0,
                ),
            }
        )
        requests = [SamplingRequest(prompt, 8, seed=5) for prompt in PROBE]
        completions = [c for _, c in sorted(trainer.datamodule.engine.generate(requests))]
        batch = MicroBatch.from_sequences(
            [(r.prompt_ids, c.completion_ids) for r, c in zip(requests, completions, strict=True)],
            generator_logprobs=[c.generator_logprobs for c in completions],
        )
        self.probes.append((pl_module.score([batch])[0] - batch.generator_logprobs).abs().max().item())

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if self.fault and trainer.current_epoch == 1:
            while self.stuck and trainer.global_rank != self.fault_rank:
                time.sleep(1)
            if trainer.global_rank != self.fault_rank:
                return
            if self.fault == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise RuntimeError(f"rank {self.fault_rank} was told to fail")

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.gradients.append(
            torch.cat([full_tensor(p.grad).flatten() for p in pl_module.parameters() if p.requires_grad])
        )

    def on_train_end(self, trainer, pl_module):
        record = {key: getattr(self, key) for key in ("phases", "gradients", "probes", "synced")}
        batch = MicroBatch.from_sequences([(prompt, range(60, 70)) for prompt in PROBE])
        record["logprobs"] = pl_module.score([batch])[0]
        record["weights"] = {name: tensor.clone() for name, tensor in pl_module.policy_weights()}
        with mock.patch.object(dist, "broadcast", wraps=dist.broadcast) as broadcast:
            record["half"] = {name: tensor.clone() for name, tensor in pl_module.policy_weights(torch.bfloat16)}
        record["sent"] = [call.args[0].dtype for call in broadcast.call_args_list]
        self.folder.mkdir(parents=True, exist_ok=True)
        torch.save(record, self.folder / f"rank_{trainer.global_rank}.pt")

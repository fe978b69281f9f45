"""How long an epoch takes on GPUs, by arithmetic, and what sampling ahead of the training would bring.

Rules of thumb, to compare ways of using the same GPUs: n completions with lengths evenly spread from 0 to the limit L,
which all fit into the engines at once.

    training     6 P FLOP a token (4 with adapters), P the weights that it goes through; 2 more for each forward pass:
                 to recompute, and to score by policy and reference. Attention adds L/3 / (6 hidden) of that: by token,
                 a completion has 2L/3 on average, of which a token sees half. At ``FLOPS`` a GPU
    sampling     L steps, in each of which an engine reads its weights W and the keys and values, k a token, of the
                 n (1 - t/L) completions that it still samples: L W + n k L^2 / 6 bytes; at ``BANDWIDTH`` a GPU

Loading, syncs and prompts aren't in it.
"""

from dataclasses import dataclass

from aspo_lightning.cli.memory import Run, meta_model
from aspo_lightning.engines.base import HALF, kv_bytes
from aspo_lightning.rollouts.corrections import Bypass
from aspo_lightning.rollouts.settings import RolloutSettings
from aspo_lightning.run.throughput import flops_per_token

FLOPS = 0.4 * 989e12
"""Reached in bfloat16: 40% of an H100's."""
BANDWIDTH = 0.6 * 3.35e12
"""Bytes a second reached: 60% of an H100's."""


@dataclass(frozen=True)
class Epoch:
    """What the time of an epoch depends on."""

    training_flops: float
    weights: float
    """Bytes that an engine reads in each step."""
    kv: float
    """Bytes of the keys and values of all completions, in all steps."""
    steps: int
    engine_gpus: int
    """GPUs of an engine."""

    @staticmethod
    def of(run: Run, settings: RolloutSettings, *, reference: bool) -> "Epoch":
        """That of a run, in which a reference is scored or not."""
        lm = meta_model(run.model_name_or_path, run.dtype, run.lora_rank).lm
        config = lm.config.get_text_config()
        length, updates = settings.max_completion_length, settings.updates(settings.prompts_per_phase)
        tokens = run.completions * length / 2
        update = sum(flops_per_token(lm)) * (1 + length / 3 / (6 * config.hidden_size))
        forward = update / (2 if run.lora_rank else 3)
        if isinstance(settings.mismatch, Bypass):
            scored = 0.0
        else:  # the first step's old log-probs are its own, where nothing else needs them
            scored = 1 - 1 / updates if settings.passes == 1 and settings.mismatch is None else 1.0
        passes = settings.passes * (update + run.gradient_checkpointing * forward) + (reference + scored) * forward
        return Epoch(
            training_flops=tokens * passes,
            weights=HALF * sum(p.numel() for p in lm.parameters()),
            kv=run.completions * kv_bytes(config, HALF) * length**2 / 6,
            steps=length,
            engine_gpus=run.engine.tensor_parallel_size,
        )

    def training_s(self, gpus: int) -> float:
        return self.training_flops / (gpus * FLOPS)

    def sampling_s(self, gpus: int) -> float:
        return (self.steps * self.weights / self.engine_gpus + self.kv / gpus) / BANDWIDTH


def time_lines(run: Run, settings: RolloutSettings, *, reference: bool) -> list[str]:
    """What a person reads; nothing for a run on CPUs."""
    if not run.on_gpu:
        return []
    epoch, gpus = Epoch.of(run, settings, reference=reference), run.world_size
    training, sampling = epoch.training_s(gpus), epoch.sampling_s(gpus)
    lines = [
        f"Time, by rules of thumb for H100s (aspo_lightning/cli/times.py): an epoch trains for {minutes(training)} on "
        f"{count(gpus)}, and samples for {minutes(sampling)} on as many",
    ]
    if run.engine.apart:
        enough = next((n for n in range(1, 64 * gpus) if epoch.sampling_s(n) <= training), None)
        servers = f"they need {count(enough)}" if enough else "no number of GPUs is enough"
        return [*lines, f"With data.lag 1 or more servers sample while it trains; to be done as soon, {servers}"]
    splits = range(epoch.engine_gpus, gpus, epoch.engine_gpus)
    if not splits:
        return lines
    best = min(splits, key=lambda n: max(epoch.sampling_s(n), epoch.training_s(gpus - n)))
    ahead = max(epoch.sampling_s(best), epoch.training_s(gpus - best))
    return [
        *lines,
        f"With vLLM servers on {best} of them and --data.lag 1 an epoch would take {minutes(ahead)} in place of "
        f"{minutes(training + sampling)}: {ahead / (training + sampling):.2f}",
    ]


def count(gpus: int) -> str:
    return f"{gpus} GPU" + "s" * (gpus > 1)


def minutes(seconds: float) -> str:
    return f"{seconds / 60:.1f} min"

"""Guards: what ends a run that has gone wrong, or warns about it. All are on; each looks at one thing.

A run that a guard ends has lost nothing but what came after its last checkpoint, by default the phase in the making.
"""

import math
import signal
import statistics
import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict
from types import FrameType

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.distributed.tensor import DTensor

from aspo_lightning.errors import RESUME, ConfigError, RunError
from aspo_lightning.run.callbacks import measured_since
from aspo_lightning.run.folder import run_folder
from aspo_lightning.run.lightning import keep_signal_handlers, phase_of
from aspo_lightning.types import State


class NonFiniteGuard(Callback):
    """Ends a run in which several optimizer steps in a row have a loss or gradient that isn't finite.

    The module skips each such step: weights and optimizer state stay as they were. What the last of them was computed
    from is kept in the run's folder. Weights that aren't finite end a run before a checkpoint has them.

    Args:
        patience: this many steps in a row.
    """

    def __init__(self, patience: int = 3) -> None:
        if patience < 1:
            raise ConfigError(f"NonFiniteGuard.patience is {patience}; it must be at least 1.")
        self.patience, self.in_a_row = patience, 0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        k = trainer.accumulate_grad_batches
        if (batch_idx + 1) % k:
            return
        self.in_a_row = 0 if pl_module.step_is_finite else self.in_a_row + 1
        if not self.in_a_row and not trainer.is_last_batch:
            return
        mine = (p.to_local() if isinstance(p, DTensor) else p for p in pl_module.parameters())
        finite = all(bool(p.sum().isfinite()) for p in mine)  # the sum of what is, is; and it is quickly made
        if not trainer.strategy.reduce_boolean_decision(finite, all=True):
            raise RunError(
                f"The policy's weights aren't finite, found in step {trainer.global_step}; no checkpoint has them. "
                f"{RESUME}."
            )
        if not self.in_a_row:
            return
        if self.in_a_row < self.patience:
            rank_zero_warn(f"The loss or gradient of step {trainer.global_step} isn't finite; the step was skipped.")
            return
        kept = ""
        if folder := run_folder(trainer):
            path = folder.not_finite(trainer.global_step, trainer.global_rank)
            batches = phase_of(trainer).micro_batches[batch_idx + 1 - k : batch_idx + 1]
            torch.save([asdict(b) for b in batches], path)
            kept = f" Its micro-batches are in {path}."
        raise RunError(
            f"The loss or gradient wasn't finite in {self.patience} optimizer steps in a row, up to step "
            f"{trainer.global_step}; they were skipped.{kept} {RESUME}, with a lower learning rate if it was too high."
        )


class RatioCanary(Callback):
    """Ends a run whose first ratios of a phase aren't 1: before an update the policy is the one that was scored.

    They aren't if temperature, mask or dropout differ between scoring and training.

    Args:
        tolerance: of the mean |log ratio| of the first group of the first micro-batch. None: 1e-3 in float32, 0.1 in
            bfloat16, where the same tokens in another row, through other kernels, have come out 0.02 apart.
    """

    def __init__(self, tolerance: float | None = None) -> None:
        self.tolerance = tolerance

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        if batch_idx > 0:
            return
        assert isinstance(outputs, Mapping)
        scored, trained = phase_of(trainer).canary, outputs["logprobs"]
        if not len(scored):
            return
        tolerance = self.tolerance or (1e-3 if trainer.precision == "32-true" else 0.1)
        mean = (trained[: len(scored)].to(scored.device) - scored).abs().mean().item()
        if tolerance < mean < math.inf:  # what isn't finite is NonFiniteGuard's
            raise RunError(
                f"The first ratios of a phase must be 1, but their mean |log ratio| in epoch {trainer.current_epoch} "
                f"is {mean:.3g} (allowed: {tolerance:g}). Training and scoring disagree about the policy: "
                f"look for a temperature, a mask or a dropout that differs. {RESUME} when that is found."
            )


class CollapseGuard(Callback):
    """Warns when the curves look like the local optimum of the paper's appendix D.

    - Entropy rushes to zero while accuracy no longer rises.
    - Clip fractions surge and stay high.
    - Repetition rises.

    Means of the last ``window`` epochs are compared with those of the first.

    Args:
        window: epochs.
        entropy: of the first entropy that must be left, unless accuracy rises or most completions are right.
        clip: a clip fraction that is too high, if it is also ``clip_growth`` times the first.
        clip_growth: see ``clip``.
        repetition: rise of the repetition rate that is too much.
        stop: end the run instead of warning.
    """

    TAGS = (
        "policy/entropy",
        "rollout/accuracy",
        "policy/clip_fraction_positive",
        "policy/clip_fraction_negative",
        "rollout/repetition_rate",
    )

    def __init__(
        self,
        window: int = 5,
        entropy: float = 0.1,
        clip: float = 0.2,
        clip_growth: float = 5.0,
        repetition: float = 0.1,
        stop: bool = False,
    ) -> None:
        self.window, self.entropy, self.clip, self.clip_growth = window, entropy, clip, clip_growth
        self.repetition, self.stop = repetition, stop
        self.curves: dict[str, list[float]] = {tag: [] for tag in self.TAGS}
        self._told: set[str] = set()
        self._before: dict[str, Tensor] = {}

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._before = dict(trainer.callback_metrics)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        measured = measured_since(self._before, trainer)
        for tag, curve in self.curves.items():
            if tag in measured:
                curve.append(measured[tag])
        signs = self.signs()
        for sign, message in signs.items():
            if self.stop:
                raise RunError(f"{message} {RESUME}, or leave CollapseGuard.stop out.")
            if sign not in self._told:  # and again only when it has gone and come back
                rank_zero_warn(message)
        self._told = set(signs)

    def signs(self) -> dict[str, str]:
        """What looks wrong, by name."""
        first, last = (
            {t: statistics.fmean(c[s]) for t, c in self.curves.items() if len(c) >= 2 * self.window}
            for s in (slice(self.window), slice(-self.window, None))
        )
        before = {t: statistics.fmean(c[-2 * self.window : -self.window]) for t, c in self.curves.items() if t in last}
        found = {}
        accuracy, entropy = "rollout/accuracy", "policy/entropy"
        if entropy in last and accuracy in last:
            stalls = last[accuracy] <= before[accuracy] and last[accuracy] < 0.5
            if last[entropy] < self.entropy * first[entropy] and stalls:
                found["entropy"] = (
                    f"Entropy has fallen from {first[entropy]:.3g} to {last[entropy]:.3g} while accuracy stays at "
                    f"{last[accuracy]:.2f}: the policy no longer explores (paper, appendix D)."
                )
        for sign in ("positive", "negative"):
            tag = f"policy/clip_fraction_{sign}"
            if tag in last and last[tag] > max(self.clip, self.clip_growth * first[tag]):
                found[tag] = (
                    f"{last[tag]:.0%} of the tokens with {sign} advantage are clipped, {first[tag]:.0%} at first: the "
                    "policy moves too far in a phase (paper, appendix D). Lower the learning rate or the passes."
                )
        tag = "rollout/repetition_rate"
        if tag in last and last[tag] > first[tag] + self.repetition:
            found[tag] = (
                f"The repetition rate has risen from {first[tag]:.2f} to {last[tag]:.2f}: completions go round in "
                "circles (paper, appendix D)."
            )
        return found

    def state_dict(self) -> State:
        return {"curves": self.curves, "told": sorted(self._told)}

    def load_state_dict(self, state_dict: State) -> None:
        self.curves, self._told = state_dict["curves"], set(state_dict["told"])


class GracefulStop(Callback):
    """SIGTERM, SIGUSR1 (SLURM) and Ctrl-C end a run when its epoch has ended, with a checkpoint; again: at once.

    In the middle of an epoch there is nothing to keep: the phase is sampled again, to the same completions.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._previous: dict[signal.Signals, Callable[[int, FrameType | None], object] | int | None] = {}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.received = None
        if threading.current_thread() is not threading.main_thread():
            return
        self._previous = {number: signal.signal(number, self._handle) for number in self.SIGNALS}
        keep_signal_handlers(trainer)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self.received is not None:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.received = signal.Signals(number)
        print(
            f"\n{name}: stopping when this epoch has ended and its checkpoint is written. Again: at once.", flush=True
        )

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.strategy.reduce_boolean_decision(self.received is not None, all=False):
            self.received = self.received or signal.SIGTERM  # another rank's
            trainer.should_stop = True

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.teardown(trainer, pl_module, "fit")  # which doesn't come

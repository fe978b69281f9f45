"""ASPOModule: Lightning hooks around policy, frozen reference and objective."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torchmetrics import MaxMetric, MeanMetric, Metric

from aspo_lightning.engines.base import Adapters
from aspo_lightning.errors import ConfigError
from aspo_lightning.fsdp import FSDP2Strategy
from aspo_lightning.objectives import ASPO, KLEstimator, Objective, TokenMean, kl_to_reference, policy_loss, token_mean
from aspo_lightning.policy.causal_lm import ScoredCausalLM, score_batches
from aspo_lightning.policy.hub import resolve_model
from aspo_lightning.policy.settings import ModelSettings
from aspo_lightning.policy.weights import adapter_tensors, full_tensor, full_weights, set_adapters, without_frozen
from aspo_lightning.rollouts.corrections import EffectiveSampleSize
from aspo_lightning.run.checkpoints import check_between_phases
from aspo_lightning.run.lightning import trainer_of
from aspo_lightning.types import Evaluation, MicroBatch, State

TOKEN_MEANS = [
    "policy/entropy",
    "policy/kl",
    *(
        f"policy/{name}_{sign}"
        for name in ("clip_fraction", "dual_clip_fraction", "ratio")
        for sign in ("positive", "negative")
    ),
    "mismatch/logprob_abs_mean",
    "mismatch/kl",
]
TOKEN_MAXIMA = ["mismatch/logprob_abs_max"]
SAMPLE_SIZES = ["policy/effective_sample_size", "mismatch/effective_sample_size"]

PRECISIONS = ("32-true", "bf16-mixed")


class ASPOModule(LightningModule):
    """Trains a causal LM on planned, scored micro-batches of rollouts.

    Args:
        model_name_or_path: policy and reference: a Hugging Face hub name or a local folder.
        objective: turns ratios and advantages into token weights, by class name: ASPO, GRPO, DAPO, ...
        temperature: divides the logits everywhere; the one that the rollouts are sampled with.
        kl_coef: weight of the KL term to the reference. 0 loads no reference.
        kl_estimator: k1, k2 or k3; see ``objectives.kl_to_reference`` for the gradient of each.
        entropy_coef: weight of an entropy bonus.
        optimizer: AdamW with the paper's learning rate and the released script's weight decay.
        lr_scheduler: stepped with every optimizer step. None keeps the learning rate.
        settings: of the model, see ``ModelSettings``.
    """

    def __init__(
        self,
        model_name_or_path: str,
        objective: Objective = ASPO(),
        temperature: float = 1.0,
        kl_coef: float = 0.001,
        kl_estimator: KLEstimator = "k3",
        entropy_coef: float = 0.0,
        optimizer: OptimizerCallable = lambda p: torch.optim.AdamW(p, lr=1e-6, weight_decay=0.1),
        lr_scheduler: LRSchedulerCallable | None = None,
        **settings: Any,
    ) -> None:
        super().__init__()
        self.settings = ModelSettings(**settings)
        if not 0 < temperature < math.inf:
            raise ConfigError(
                f"model.temperature = data.temperature is {temperature}; training divides logits by it, so it must be "
                "above 0 (the paper uses 1.0)."
            )
        if not 0 <= kl_coef < math.inf:
            raise ConfigError(f"model.kl_coef is {kl_coef}; it must be finite and at least 0 (the paper uses 0.001).")
        if not math.isfinite(entropy_coef):
            raise ConfigError(f"model.entropy_coef is {entropy_coef}; it must be a finite number (0: no bonus).")
        self.model_name_or_path = resolve_model(model_name_or_path)
        self.objective = objective
        self.temperature = temperature
        self.kl_coef = kl_coef
        self.kl_estimator: KLEstimator = kl_estimator
        self.entropy_coef = entropy_coef
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.strict_loading = self.settings.lora_rank == 0  # a frozen base is in no checkpoint
        self.step_is_finite = True
        """Whether the last optimizer step was taken: its loss and gradient were finite, on all ranks."""
        self._loss_is_finite = torch.tensor(True)
        self.policy: ScoredCausalLM | None = None
        # In a tuple, which hides it from torch: it is in no checkpoint and no optimizer, and train() leaves it alone.
        self._reference: tuple[ScoredCausalLM, ...] = ()
        self.token_metrics = nn.ModuleDict(
            {tag: MeanMetric(nan_strategy="ignore") for tag in TOKEN_MEANS}
            | {tag: MaxMetric(nan_strategy="ignore") for tag in TOKEN_MAXIMA}
            | {tag: EffectiveSampleSize() for tag in SAMPLE_SIZES}
        )

    @property
    def reference(self) -> ScoredCausalLM | None:
        """The frozen reference, once it is loaded."""
        return self._reference[0] if self._reference else None

    def setup(self, stage: str) -> None:
        if self.trainer.precision not in PRECISIONS:
            raise ConfigError(
                f"trainer.precision is {self.trainer.precision}; it must be one of {', '.join(PRECISIONS)}. The "
                "weights themselves are kept in model.dtype."
            )

    def configure_model(self) -> None:
        """Loads the policy, and the reference as soon as there is a fit: from the original weights, both of them."""
        trainer = trainer_of(self)
        fits = trainer is None or trainer.state.fn == TrainerFn.FITTING
        if self.policy is None:
            self.policy = self._load()
        # With adapters the reference is the policy without them.
        if fits and self.kl_coef > 0 and not self.settings.lora_rank:
            # FSDP2 has a dtype of its own for what it gathers.
            sharded = trainer is not None and isinstance(trainer.strategy, FSDP2Strategy)
            half = trainer is not None and trainer.precision == "bf16-mixed" and not sharded
            dtype = torch.bfloat16 if half else self.settings.torch_dtype
            # An earlier fit may have been in another precision.
            if self.reference is None or any(layer.weight.dtype != dtype for layer in self.reference.layers()):
                self._reference = (self._load().freeze(dtype),)

    def _load(self) -> ScoredCausalLM:
        trainer = trainer_of(self)
        strategy = trainer.strategy if trainer else None
        load = strategy.load if isinstance(strategy, FSDP2Strategy) else ScoredCausalLM.from_pretrained
        return load(self.model_name_or_path, self.settings)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = self.optimizer(p for p in self.parameters() if p.requires_grad)
        if self.lr_scheduler is None:
            return optimizer
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": self.lr_scheduler(optimizer), "interval": "step"},
        }

    def on_fit_start(self) -> None:
        for metric in self.token_metrics.values():  # of a phase that an earlier fit has broken off
            assert isinstance(metric, Metric)
            metric.reset()
        self._loss_is_finite = torch.tensor(True)
        if self.reference is not None and not isinstance(self.reference, FSDPModule):
            self.reference.to(self.device)

    def shares_prompts(self) -> bool:
        """Whether a prompt is computed once for its completions in a micro-batch, see ``ScoredCausalLM.packs``."""
        assert self.policy is not None
        return self.policy.packs

    def score(self, batches: Sequence[MicroBatch]) -> list[Tensor]:
        """The policy's log-probs[N] of each micro-batch, on the CPU. Collective where it is sharded."""
        assert self.policy is not None
        return self._logprobs(self.policy, batches, "score")

    def score_reference(self, batches: Sequence[MicroBatch]) -> list[Tensor]:
        """The reference's log-probs[N] of each micro-batch, on the CPU; zeros where no loss needs them. Collective."""
        if self.kl_coef == 0:
            return [batch.ref_logprobs for batch in batches]
        if not self.settings.lora_rank:
            assert self.reference is not None
            return self._logprobs(self.reference, batches, "score reference")
        assert self.policy is not None
        set_adapters(self.policy, False)
        try:
            return self._logprobs(self.policy, batches, "score reference")
        finally:
            set_adapters(self.policy, True)

    def _logprobs(self, model: ScoredCausalLM, batches: Sequence[MicroBatch], description: str) -> list[Tensor]:
        strategy = self.trainer.strategy
        gathered = strategy.gathered(model) if isinstance(strategy, FSDP2Strategy) else nullcontext()
        # In the precision of training_step: otherwise the first ratio isn't 1.
        with gathered, self.trainer.precision_plugin.forward_context():
            return score_batches(
                model, batches, temperature=self.temperature, device=self.device, description=description
            )

    def training_step(self, batch: MicroBatch, batch_idx: int) -> dict[str, Tensor]:
        assert self.policy is not None
        logprobs, entropy = self.policy(batch, temperature=self.temperature, entropy_grad=self.entropy_coef != 0)
        old = logprobs.detach() if batch.old_logprobs is None else batch.old_logprobs
        loss, metrics = policy_loss(
            self.objective,
            logprobs,
            old,
            batch.advantages,
            batch.loss_weights,
            sequence_index=batch.sequence_index,
            token_entropy=entropy,
            generator_logprobs=batch.generator_logprobs,
            ref_logprobs=batch.ref_logprobs,
        )
        metrics["entropy"] = token_mean(entropy)
        if self.kl_coef:
            kl = kl_to_reference(logprobs, batch.ref_logprobs, self.kl_estimator)
            metrics["kl"] = token_mean(kl)
            loss = loss + self.kl_coef * (batch.loss_weights * kl).sum()
        if self.entropy_coef:
            loss = loss - self.entropy_coef * (batch.loss_weights * entropy).sum()
        mismatch = old - batch.generator_logprobs
        self._log("policy/loss", loss)
        self._log_tokens({f"policy/{name}": mean for name, mean in metrics.items()})
        self._log_tokens(
            {
                "policy/effective_sample_size": (logprobs.detach() - old,),
                "mismatch/logprob_abs_mean": token_mean(mismatch.abs()),
                "mismatch/logprob_abs_max": (mismatch.abs(),),
                "mismatch/kl": token_mean(kl_to_reference(batch.generator_logprobs, old)),
                "mismatch/effective_sample_size": (mismatch,),
            }
        )
        self._loss_is_finite = self._loss_is_finite.to(loss.device) & loss.detach().isfinite()
        return {"loss": loss, "logprobs": logprobs.detach(), "entropy": entropy.detach()}

    def _log_tokens(self, metrics: Mapping[str, TokenMean | tuple[Tensor]]) -> None:
        """Logs means and maxima over the tokens of all micro-batches and ranks, at the end of the epoch."""
        for tag, measured in metrics.items():
            metric = self.token_metrics[tag]
            assert isinstance(metric, Metric)
            metric.update(*measured)
            if self.trainer.is_last_batch:
                value = metric.compute()  # over all ranks
                metric.reset()
                if value > -math.inf:  # a phase without a useful group measures nothing: NaN, or -inf for a maximum
                    self._log(tag, value)

    def _log(self, tag: str, value: Tensor | float, *, reduce_fx: str = "mean", sync_dist: bool = True) -> None:
        """Logs a measurement of the epoch."""
        self.log(
            tag,
            value,
            on_step=False,
            on_epoch=True,
            batch_size=1,
            reduce_fx=reduce_fx,
            sync_dist=sync_dist,
        )

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None) -> None:
        parameters = [p for p in self.parameters() if p.grad is not None]
        gradients = [p.grad for p in parameters if p.grad is not None]
        if gradient_clip_algorithm == "value":
            norm = nn.utils.get_total_norm(gradients)
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        else:
            norm = nn.utils.clip_grad_norm_(parameters, gradient_clip_val or float("inf"))
        norm = full_tensor(norm)  # over all ranks
        self.step_is_finite = self.trainer.strategy.reduce_boolean_decision(
            bool(norm.isfinite() & self._loss_is_finite.to(norm.device)), all=True
        )
        self._loss_is_finite = torch.ones_like(self._loss_is_finite)
        if norm == 0 or not self.step_is_finite:
            # No group was informative in this phase, or none usable. Without gradients AdamW leaves the weights alone;
            # with zeros it would move them, by momentum and decay.
            optimizer.zero_grad(set_to_none=True)
        # Not over ranks, which skip together.
        self._log("policy/skipped_steps", float(not self.step_is_finite), reduce_fx="sum", sync_dist=False)
        self._log("policy/grad_norm", norm)

    @property
    def adapter_rank(self) -> int:
        """Of the adapters that are trained; 0: the weights are."""
        return self.settings.lora_rank

    def policy_adapters(self) -> Adapters:
        """The adapters that are trained, for an engine that takes them without the weights."""
        assert self.policy is not None
        return Adapters(self.settings.lora_rank, self.settings.lora_alpha, adapter_tensors(self.policy.lm))

    def policy_weights(self, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
        """(Hugging Face name, full tensor) of each weight, one at a time; tied weights once. For the engine."""
        assert self.policy is not None
        return full_weights(self.policy.lm, dtype)

    def on_save_checkpoint(self, checkpoint: State) -> None:
        checkpoint["state_dict"] = without_frozen(self, checkpoint["state_dict"])
        # For aspo export.
        checkpoint["model"] = {"model_name_or_path": self.model_name_or_path, **asdict(self.settings)}

    def on_load_checkpoint(self, checkpoint: State) -> None:
        if self.trainer.state.fn == TrainerFn.FITTING:
            check_between_phases(checkpoint)

    def validation_step(self, batch: Evaluation, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log_dict(
            batch.metrics, on_epoch=True, batch_size=len(batch.groups), sync_dist=True, add_dataloader_idx=False
        )

    def test_step(self, batch: Evaluation, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.validation_step(batch, batch_idx, dataloader_idx)

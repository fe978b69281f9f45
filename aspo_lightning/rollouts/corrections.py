"""What is done about the engine's log-probs not being the trainer's: ``data.mismatch``.

Tokens are sampled from mu, the engine's distribution, and the objective takes them for samples of pi_old, the
trainer's. A correction weighs each token's advantage by c = pi_old / mu, or by what it makes of that; c stays the same
for all updates of a phase. By ``level`` c is

    token            pi_old(t) / mu(t) of the token itself: little variance, but biased for all tokens before it
    sequence         the product over the response's tokens: unbiased, and of a variance that grows with length
    geometric_mean   that product to the power of 1 / length: how far the response is off on average

Without bounds, the mean of c * f over samples of mu is that of f over pi_old (importance sampling); a bound trades
variance for bias. "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training" (TIS); IcePop; arXiv
2510.01171 compares them.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torchmetrics import Metric

from aspo_lightning.collectives import gather
from aspo_lightning.errors import ConfigError
from aspo_lightning.objectives.rule import LOG_RATIO_LIMIT, segment_mean, segment_sum
from aspo_lightning.types import MicroBatch

Level = Literal["token", "sequence", "geometric_mean"]


class Correction(ABC):
    """A rule that weighs tokens by how far the engine was from the trainer."""

    @abstractmethod
    def weigh(self, log_ratio: Tensor, sequence_index: Tensor) -> tuple[Tensor, Tensor]:
        """The weight[N] of each token, and whether a bound changed it, [N] bool.

        Args:
            log_ratio: [N] old minus generator log-probs.
            sequence_index: [N] which response a token is of.
        """


@dataclass(frozen=True)
class TruncatedRatio(Correction):
    """min(c, high): truncated importance sampling (TIS)."""

    high: float = 2.0
    level: Level = "token"

    def __post_init__(self) -> None:
        if not self.high >= 1:
            raise ConfigError(f"TruncatedRatio.high is {self.high}; it must be at least 1, like 2.")

    def weigh(self, log_ratio: Tensor, sequence_index: Tensor) -> tuple[Tensor, Tensor]:
        ratio = at_level(log_ratio, sequence_index, self.level)
        return ratio.clamp(max=self.high), ratio > self.high


@dataclass(frozen=True)
class MaskedRatio(Correction):
    """c where it is within the bounds, 0 elsewhere (IcePop; by sequence a rejection of whole responses)."""

    low: float = 0.5
    high: float = 2.0
    level: Level = "token"

    def __post_init__(self) -> None:
        if not 0 <= self.low <= 1 <= self.high:
            raise ConfigError(
                f"MaskedRatio.low is {self.low} and high {self.high}; they must enclose 1, like 0.5 and 2."
            )

    def weigh(self, log_ratio: Tensor, sequence_index: Tensor) -> tuple[Tensor, Tensor]:
        ratio = at_level(log_ratio, sequence_index, self.level)
        within = (ratio >= self.low) & (ratio <= self.high)
        return ratio * within, ~within


@dataclass(frozen=True)
class Bypass(Correction):
    """The engine's log-probs are the old ones: the objective's ratio and clip range then run against the engine.

    Saves the pass that scores old log-probs. ``mismatch/*`` measures nothing then; ``policy/ratio_*`` starts at what
    the engine is off by.
    """

    def weigh(self, log_ratio: Tensor, sequence_index: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(log_ratio), torch.zeros_like(log_ratio, dtype=torch.bool)


class EffectiveSampleSize(Metric):
    """(sum r)^2 / (N sum r^2) over all tokens, r their ratios: which share of them, equally weighted, says as much."""

    def __init__(self) -> None:
        super().__init__()
        self.sums: Tensor
        self.add_state("sums", torch.zeros(3, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, log_ratio: Tensor) -> None:
        """Takes [N] log r; those that aren't numbers are left out."""
        ratio = log_ratio.double().clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
        self.sums += torch.stack([ratio.nansum(), ratio.square().nansum(), (~ratio.isnan()).sum()])

    def compute(self) -> Tensor:
        """NaN without tokens."""
        total, squares, tokens = self.sums
        return total.square() / (tokens * squares)


def at_level(log_ratio: Tensor, sequence_index: Tensor, level: Level) -> Tensor:
    """[N] c; log-ratios beyond +-20 are taken as +-20."""
    if level == "sequence":
        log_ratio = segment_sum(log_ratio, sequence_index)
    elif level == "geometric_mean":
        log_ratio = segment_mean(log_ratio, sequence_index)
    return log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()


def correct(batches: Sequence[MicroBatch], correction: Correction | None) -> tuple[list[MicroBatch], dict[str, float]]:
    """The micro-batches with corrected advantages, and what that did, over all ranks. Collective.

    ``mismatch/cut_fraction`` is the share of tokens whose weight a bound changed; ``mismatch/corrected_sample_size``
    that of equally weighted tokens with as much variance, (sum w)^2 / (N sum w^2).
    """
    if correction is None:
        return list(batches), {}
    corrected, sums = [], torch.zeros(4, dtype=torch.float64)
    for batch in batches:
        assert batch.old_logprobs is not None
        weights, cut = correction.weigh(batch.old_logprobs - batch.generator_logprobs, batch.sequence_index)
        corrected.append(replace(batch, advantages=batch.advantages * weights))
        each = (weights, weights.square(), cut, torch.ones_like(weights))
        sums += torch.stack([values.sum(dtype=torch.float64) for values in each])
    total, squares, cut_tokens, tokens = (math.fsum(column) for column in zip(*gather(sums.tolist()), strict=True))
    if not tokens:
        return corrected, {}
    return corrected, {
        "mismatch/cut_fraction": cut_tokens / tokens,
        "mismatch/corrected_sample_size": total * total / (tokens * squares) if squares else 0.0,
    }

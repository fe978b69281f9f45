"""ASPO, the baselines and ablations of its paper (arXiv 2510.06062), and ASPO's relatives for study.

The gradient of each is ``sum_t loss_weight_t * w_t * A_t * grad log pi(token_t)`` (Proposition 4.1 there), with the
weights ``w_t`` that are given here in terms of r_t = pi / pi_old and A_t; ``m_t`` is the mask (``mask.py``).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from aspo_lightning.objectives.mask import TokenMask, check_dual_clip, check_positive, soft_gate
from aspo_lightning.objectives.rule import Objective, Tokens, TokenWeights, segment_mean


@dataclass(frozen=True)
class ASPO(TokenMask):
    """Asymmetric Importance Sampling Policy Optimization (arXiv 2510.06062).

        A > 0:  w = [r <= 1 + eps_high] * min(1/r, dual_clip)
        A < 0:  w = [r >= 1 - eps_low]  * min(r,   dual_clip)

    1. Token masking: as in GRPO.
    2. Weight flipping: a positive token that lags behind (r < 1) is pushed more, one already reinforced less.
    3. Dual clipping, soft: a weight above ``dual_clip`` is set to it and keeps its gradient. None switches it off.
    """

    dual_clip: float | None = 3.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_dual_clip(self, self.dual_clip)

    def weigh(self, tokens: Tokens) -> TokenWeights:
        keep = self.keep(tokens)  # step 1
        weights = torch.where(tokens.advantages > 0, _reciprocal(tokens.ratio), tokens.ratio)  # step 2
        weights, limited = _dual_clip(weights, self.dual_clip)  # step 3
        return self.masked(weights, tokens, keep, keep & limited)


@dataclass(frozen=True)
class GRPO(TokenMask):
    """PPO's clipped objective: ``w = m_t * r_t``.

    ``dual_clip`` is verl's hard one: a token with A < 0 and r > dual_clip gets no gradient (off by default).
    """

    dual_clip: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_dual_clip(self, self.dual_clip)

    def weigh(self, tokens: Tokens) -> TokenWeights:
        keep = self.keep(tokens)
        if self.dual_clip is None:
            return self.masked(tokens.ratio, tokens, keep)
        dual_clipped = (tokens.advantages < 0) & (tokens.ratio > self.dual_clip)
        return self.masked(tokens.ratio * ~dual_clipped, tokens, keep, dual_clipped)


@dataclass(frozen=True)
class DAPO(GRPO):
    """GRPO with clip-higher (arXiv 2503.14476); its token mean and overlong shaping are settings of the data."""

    clip_eps_high: float = 0.28


@dataclass(frozen=True)
class GRPOWithoutIS(TokenMask):
    """The paper's ablation without importance sampling: every weight is 1, the mask is kept."""

    def weigh(self, tokens: Tokens) -> TokenWeights:
        return self.masked(torch.ones_like(tokens.ratio), tokens, self.keep(tokens))


@dataclass(frozen=True)
class GRPOPositiveMean(TokenMask):
    """The paper's ablation: for A > 0 every token is weighted by the mean ratio of its response.

    The mask still looks at the token's own ratio.
    """

    def weigh(self, tokens: Tokens) -> TokenWeights:
        mean = segment_mean(tokens.ratio, tokens.sequence_index)
        return self.masked(torch.where(tokens.advantages > 0, mean, tokens.ratio), tokens, self.keep(tokens))


@dataclass(frozen=True)
class ASPOWithoutMask(Objective):
    """ASPO without its step 1, for study: ``w = min(1/r, dual_clip)`` for A > 0, ``min(r, dual_clip)`` for A < 0."""

    dual_clip: float | None = 3.0

    def __post_init__(self) -> None:
        check_dual_clip(self, self.dual_clip)

    def weigh(self, tokens: Tokens) -> TokenWeights:
        weights = torch.where(tokens.advantages > 0, _reciprocal(tokens.ratio), tokens.ratio)
        weights, limited = _dual_clip(weights, self.dual_clip)
        active = tokens.advantages != 0
        return TokenWeights(weights * active, torch.zeros_like(active), active & limited)


@dataclass(frozen=True)
class ASPOResponseMean(ASPO):
    """ASPO that flips the response's mean ratio, for study: ``w = m_t * min(1/mean(r), dual_clip)`` for A > 0."""

    def weigh(self, tokens: Tokens) -> TokenWeights:
        keep = self.keep(tokens)
        flipped = _reciprocal(segment_mean(tokens.ratio, tokens.sequence_index))
        weights, limited = _dual_clip(torch.where(tokens.advantages > 0, flipped, tokens.ratio), self.dual_clip)
        return self.masked(weights, tokens, keep, keep & limited)


@dataclass(frozen=True)
class ASPOSoftGate(Objective):
    """ASPO with the gate of SAPO in place of its mask, for study.

        w = 4 p (1 - p) * min(1/r, dual_clip) for A > 0,   4 p (1 - p) * min(r, dual_clip) for A < 0

    with ``p = sigmoid(tau * (r - 1))``. No token loses its gradient at once.
    """

    tau_positive: float = 1.0
    tau_negative: float = 1.05
    dual_clip: float | None = 3.0

    def __post_init__(self) -> None:
        check_positive(self, "tau_positive", "tau_negative")
        check_dual_clip(self, self.dual_clip)

    def weigh(self, tokens: Tokens) -> TokenWeights:
        ungated = ASPOWithoutMask(dual_clip=self.dual_clip).weigh(tokens)
        gate = soft_gate(tokens, self.tau_positive, self.tau_negative)
        return ungated._replace(weights=gate * ungated.weights)


def _dual_clip(weights: Tensor, limit: float | None) -> tuple[Tensor, Tensor]:
    """[N] each: the weights, at most ``limit``, and whether it limited them."""
    if limit is None:
        return weights, torch.zeros_like(weights, dtype=torch.bool)
    return weights.clamp(max=limit), weights > limit


def _reciprocal(ratio: Tensor) -> Tensor:
    return 1 / ratio.clamp(min=torch.finfo(ratio.dtype).tiny)

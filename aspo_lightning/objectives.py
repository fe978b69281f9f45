"""Objectives of the GRPO family, each as a rule that weighs tokens.

By Proposition 4.1 of the ASPO paper (arXiv 2510.06062) the gradient of every objective here is that of

    loss = - sum_t  loss_weight_t * w_t * A_t * log pi(token_t)            (w_t detached)

so an objective only says how the weights ``w_t`` follow from the ratio ``r_t = pi / pi_old`` and the advantage ``A_t``.
How tokens are averaged is not its concern: that is in ``loss_weight_t`` (see ``rollouts/packing.py``).

To add one: subclass ``Objective`` (or ``TokenMask``), return ``TokenWeights``, and test it. Nothing else changes.

Everything is flat over the N response tokens of a micro-batch; ``sequence_index[N]`` says which response a token is of.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from aspo_lightning.errors import ConfigError

# exp(20) = 4.9e8: far outside every trust region, and far from overflow in float32.
LOG_RATIO_LIMIT = 20.0


class TokenWeights(NamedTuple):
    """What an objective makes of N tokens: detached, in the dtype of the ratio."""

    weights: Tensor
    """[N], >= 0; how strongly each token is pushed along its advantage."""
    clipped: Tensor
    """[N] bool; the token left the trust region (its gradient is zero, or bounded for CISPO)."""
    dual_clipped: Tensor
    """[N] bool; the weight was limited by ``dual_clip``."""


class Objective(ABC):
    """A rule that turns ratios and advantages into token weights."""

    @abstractmethod
    def token_weights(
        self, ratio: Tensor, advantages: Tensor, *, sequence_index: Tensor, token_entropy: Tensor | None = None
    ) -> TokenWeights:
        """Weighs N tokens.

        Args:
            ratio: [N] pi / pi_old, > 0.
            advantages: [N].
            sequence_index: [N] integers, equal for tokens of the same response, in any order.
            token_entropy: [N] entropy in nats of the policy at each token; only for adaptive clip ranges.

        Tokens without advantage get weight 0 and count as neither clipped nor dual-clipped.
        """


@dataclass(frozen=True)
class TokenMask(Objective):
    """Step 1 of the paper: tokens that have moved far enough along their advantage get no gradient.

        m_t = [r_t <= 1 + clip_eps_high] if A_t > 0,   [r_t >= 1 - clip_eps_low] if A_t < 0

    With ``high_entropy_clip_eps`` the range adapts as in the authors' released code: in each response, tokens whose
    entropy is above the response's ``entropy_quantile`` use that value on both sides.

    Raises:
        ConfigError: for a clip range below 0, a lower range above 1, or a quantile outside [0, 1].
    """

    clip_eps_low: float = 0.2
    clip_eps_high: float = 0.2
    high_entropy_clip_eps: float | None = field(default=None, kw_only=True)
    entropy_quantile: float = field(default=0.8, kw_only=True)

    def __post_init__(self) -> None:
        _check_clip_range(self, "clip_eps_low", "clip_eps_high", "high_entropy_clip_eps")
        if not 0 <= self.entropy_quantile <= 1:
            raise ConfigError(
                f"{type(self).__name__}.entropy_quantile is {self.entropy_quantile}; it must be from 0 to 1."
            )

    def keep(
        self, ratio: Tensor, advantages: Tensor, *, sequence_index: Tensor, token_entropy: Tensor | None
    ) -> Tensor:
        """m_t as a [N] bool; False where the advantage is 0."""
        low, high = ratio.new_tensor(1 - self.clip_eps_low), ratio.new_tensor(1 + self.clip_eps_high)
        if self.high_entropy_clip_eps is not None:
            if token_entropy is None:
                raise ValueError("adaptive clip ranges need token_entropy")
            forking = token_entropy > segment_quantile(token_entropy, sequence_index, self.entropy_quantile)
            low = torch.where(forking, ratio.new_tensor(1 - self.high_entropy_clip_eps), low)
            high = torch.where(forking, ratio.new_tensor(1 + self.high_entropy_clip_eps), high)
        return ((advantages > 0) & (ratio <= high)) | ((advantages < 0) & (ratio >= low))


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
        _check_dual_clip(self)

    def token_weights(self, ratio, advantages, *, sequence_index, token_entropy=None) -> TokenWeights:
        keep = self.keep(ratio, advantages, sequence_index=sequence_index, token_entropy=token_entropy)  # step 1
        weights = torch.where(advantages > 0, _reciprocal(ratio), ratio)  # step 2
        dual_clipped = torch.zeros_like(keep)
        if self.dual_clip is not None:  # step 3
            dual_clipped = keep & (weights > self.dual_clip)
            weights = weights.clamp(max=self.dual_clip)
        return TokenWeights(weights * keep, ~keep & (advantages != 0), dual_clipped)


@dataclass(frozen=True)
class GRPO(TokenMask):
    """PPO's clipped objective: ``w = m_t * r_t``.

    ``dual_clip`` is verl's hard one: a token with A < 0 and r > dual_clip gets no gradient (off by default).
    """

    dual_clip: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_dual_clip(self)

    def token_weights(self, ratio, advantages, *, sequence_index, token_entropy=None) -> TokenWeights:
        keep = self.keep(ratio, advantages, sequence_index=sequence_index, token_entropy=token_entropy)
        dual_clipped = torch.zeros_like(keep)
        if self.dual_clip is not None:
            dual_clipped = (advantages < 0) & (ratio > self.dual_clip)
        return TokenWeights(ratio * (keep & ~dual_clipped), ~keep & (advantages != 0), dual_clipped)


@dataclass(frozen=True)
class DAPO(GRPO):
    """GRPO with clip-higher (arXiv 2503.14476); its token mean and overlong shaping are settings of the data."""

    clip_eps_high: float = 0.28


@dataclass(frozen=True)
class GRPOWithoutIS(TokenMask):
    """The paper's ablation without importance sampling: every weight is 1, the mask is kept."""

    def token_weights(self, ratio, advantages, *, sequence_index, token_entropy=None) -> TokenWeights:
        keep = self.keep(ratio, advantages, sequence_index=sequence_index, token_entropy=token_entropy)
        return TokenWeights(keep.to(ratio.dtype), ~keep & (advantages != 0), torch.zeros_like(keep))


@dataclass(frozen=True)
class GRPOPositiveMean(TokenMask):
    """The paper's ablation: for A > 0 every token is weighted by the mean ratio of its response.

    The mask still looks at the token's own ratio.
    """

    def token_weights(self, ratio, advantages, *, sequence_index, token_entropy=None) -> TokenWeights:
        keep = self.keep(ratio, advantages, sequence_index=sequence_index, token_entropy=token_entropy)
        weights = torch.where(advantages > 0, segment_mean(ratio, sequence_index), ratio)
        return TokenWeights(weights * keep, ~keep & (advantages != 0), torch.zeros_like(keep))


@dataclass(frozen=True)
class CISPO(Objective):
    """Clipped IS weights without a mask (MiniMax-M1, arXiv 2506.13585): ``w = clip(r, 1 - eps_low, 1 + eps_high)``.

    No token loses its gradient. The default only bounds the weight from above, at 5 (arXiv 2510.13786).
    """

    clip_eps_low: float = 1.0
    clip_eps_high: float = 4.0

    def __post_init__(self) -> None:
        _check_clip_range(self, "clip_eps_low", "clip_eps_high")

    def token_weights(self, ratio, advantages, *, sequence_index, token_entropy=None) -> TokenWeights:
        weights = ratio.clamp(1 - self.clip_eps_low, 1 + self.clip_eps_high)
        active = advantages != 0
        return TokenWeights(weights * active, active & (weights != ratio), torch.zeros_like(active))


@dataclass(frozen=True)
class GSPO(TokenMask):
    """Group Sequence Policy Optimization (arXiv 2507.18071): GRPO on the response's length-normalised ratio.

        s = exp(mean_t log r_t),   w_t = m(s) * s

    Its paper averages over sequences (``averaging: sequence_mean``) and uses the narrow ranges that are the defaults.
    """

    clip_eps_low: float = 3e-4
    clip_eps_high: float = 4e-4

    def token_weights(self, ratio, advantages, *, sequence_index, token_entropy=None) -> TokenWeights:
        ratio = segment_mean(ratio.clamp(min=torch.finfo(ratio.dtype).tiny).log(), sequence_index).exp()
        keep = self.keep(ratio, advantages, sequence_index=sequence_index, token_entropy=token_entropy)
        return TokenWeights(ratio * keep, ~keep & (advantages != 0), torch.zeros_like(keep))


@dataclass(frozen=True)
class REINFORCE(Objective):
    """Every weight is 1: no ratio, no mask."""

    def token_weights(self, ratio, advantages, *, sequence_index, token_entropy=None) -> TokenWeights:
        active = advantages != 0
        return TokenWeights(active.to(ratio.dtype), torch.zeros_like(active), torch.zeros_like(active))


class TokenMean(NamedTuple):
    """A mean over tokens that can be merged exactly with that of other micro-batches."""

    value: Tensor
    """Scalar; NaN where ``tokens`` is 0."""
    tokens: Tensor
    """Scalar; how many tokens it is over."""


def policy_loss(
    objective: Objective,
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    loss_weights: Tensor,
    *,
    sequence_index: Tensor,
    token_entropy: Tensor | None = None,
) -> tuple[Tensor, dict[str, TokenMean]]:
    """The weighted log-likelihood whose gradient is that of ``objective`` (paper, Proposition 4.1).

    Args:
        objective: gives the token weights.
        logprobs: [N] of the policy, with gradient.
        old_logprobs: [N] of the policy before the phase's first update.
        advantages: [N].
        loss_weights: [N] the averaging rule (``rollouts.packing.loss_weights``).
        sequence_index: [N] which response a token is of.
        token_entropy: [N] nats, for adaptive clip ranges.

    Returns:
        The scalar loss, and the measurements ``clip_fraction_*``, ``dual_clip_fraction_*`` and ``ratio_*`` over the
        tokens with a positive and with a negative advantage. Log-ratios beyond +-20 are taken as +-20.
    """
    with torch.no_grad():
        ratio = token_ratio(logprobs, old_logprobs)
        entropy = None if token_entropy is None else token_entropy.detach()
        token_weights = objective.token_weights(ratio, advantages, sequence_index=sequence_index, token_entropy=entropy)
        metrics = {}
        for sign, where in (("positive", advantages > 0), ("negative", advantages < 0)):
            metrics[f"clip_fraction_{sign}"] = token_mean(token_weights.clipped, where)
            metrics[f"dual_clip_fraction_{sign}"] = token_mean(token_weights.dual_clipped, where)
            metrics[f"ratio_{sign}"] = token_mean(ratio, where)
    loss = -(loss_weights * token_weights.weights * advantages * logprobs).sum()
    return loss, metrics


def token_ratio(logprobs: Tensor, old_logprobs: Tensor) -> Tensor:
    """[N] pi / pi_old; log-ratios beyond +-20 are taken as +-20."""
    return (logprobs - old_logprobs).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()


KLEstimator = Literal["k1", "k2", "k3"]


def kl_to_reference(logprobs: Tensor, ref_logprobs: Tensor, estimator: KLEstimator = "k3") -> Tensor:
    """[N] estimates of KL(policy || reference) at each token, with gradient (Schulman, "Approximating KL divergence").

    With d = log pi_ref - log pi, and the mean over tokens that the policy itself sampled:

    - ``k1``: -d. Its mean is the KL. Its own gradient is zero in the mean, so it has that of k2 (straight-through).
    - ``k2``: d^2 / 2. Its mean isn't the KL; its gradient is, in the mean, exactly that of the KL.
    - ``k3``: e^d - d - 1, the paper's. Its mean is the KL; its gradient is, in the mean, that of the reverse,
      KL(reference || policy).

    Nothing corrects for tokens that an older policy sampled: once the policy has moved within a phase, all are biased.
    Beyond d = 20, e^d continues as its tangent, so that k3 stays finite and its gradient keeps its sign.

    Args:
        logprobs: [N] of the policy, with gradient.
        ref_logprobs: [N] of the reference.
    """
    d = (ref_logprobs - logprobs).detach()
    if estimator == "k1":
        value, slope = -d, -d
    elif estimator == "k2":
        value, slope = d.square() / 2, -d
    else:
        bounded = d.clamp(max=LOG_RATIO_LIMIT)
        slope = -bounded.expm1()  # by log pi
        value = (-slope * (1 + d - bounded) - bounded).clamp(min=0)  # below 0 by rounding only
    return value + slope * (logprobs - logprobs.detach())


def token_mean(values: Tensor, where: Tensor | None = None) -> TokenMean:
    """The mean of ``values[N]`` over the tokens ``where[N]`` (all if None)."""
    values = values.detach().to(torch.float64 if values.dtype == torch.float64 else torch.float32)
    count = values.new_tensor(values.numel()) if where is None else where.sum()
    total = values.sum() if where is None else values[where].sum()
    return TokenMean(total / count, count)


def segment_mean(values: Tensor, sequence_index: Tensor) -> Tensor:
    """[N] the mean of each token's response, spread back over its tokens."""
    size = int(sequence_index.max()) + 1 if sequence_index.numel() else 0
    total = values.new_zeros(size).index_add_(0, sequence_index, values)
    count = values.new_zeros(size).index_add_(0, sequence_index, torch.ones_like(values))
    return (total / count)[sequence_index]


def segment_quantile(values: Tensor, sequence_index: Tensor, quantile: float) -> Tensor:
    """[N] the quantile of each token's response (linear interpolation), spread back over its tokens."""
    if not values.numel():
        return values.clone()
    by_value = values.argsort(stable=True)
    order = by_value[sequence_index[by_value].argsort(stable=True)]
    ordered = values[order]  # ascending within each response, responses in order of their index
    count = torch.bincount(sequence_index)
    start = count.cumsum(0) - count
    position = quantile * (count - 1).clamp(min=0).to(values.dtype)
    below = start + position.floor().long()
    above = (below + 1).clamp(max=len(ordered) - 1)  # in the next response only where its share is 0
    return torch.lerp(ordered[below], ordered[above], position.frac())[sequence_index]


def _reciprocal(ratio: Tensor) -> Tensor:
    return 1 / ratio.clamp(min=torch.finfo(ratio.dtype).tiny)


def _check_clip_range(objective: TokenMask | CISPO, *keys: str) -> None:
    name = type(objective).__name__
    for key in keys:
        value = getattr(objective, key)
        if value is not None and not value >= 0:
            raise ConfigError(f"{name}.{key} is {value}; a clip range must be at least 0 (the paper uses 0.2).")
    if objective.clip_eps_low > 1:
        raise ConfigError(f"{name}.clip_eps_low is {objective.clip_eps_low}; it must be at most 1: a ratio is above 0.")


def _check_dual_clip(objective: ASPO | GRPO) -> None:
    if objective.dual_clip is not None and not objective.dual_clip > 1:
        raise ConfigError(
            f"{type(objective).__name__}.dual_clip is {objective.dual_clip}; it bounds a weight from above and must be "
            "> 1 (the paper uses 3), or null to switch it off."
        )

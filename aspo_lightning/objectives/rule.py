"""The weight rule: what an objective is given, what it returns, and the loss that is made of it.

By Proposition 4.1 of the ASPO paper (arXiv 2510.06062) the gradient of every objective of the GRPO family is that of

    loss = - sum_t  loss_weight_t * w_t * A_t * log pi(token_t)            (w_t detached)

so an objective only says how the weights ``w_t`` follow from what is known of N response tokens:
``Tokens`` in, ``TokenWeights`` out. How tokens are averaged is not its concern: that is in ``loss_weight_t`` (see
``rollouts/packing.py``).
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import Literal, NamedTuple

import torch
from torch import Tensor

# exp(20) = 4.9e8: far outside every trust region, and far from overflow in float32.
LOG_RATIO_LIMIT = 20.0


@dataclass(frozen=True)
class Tokens:
    """N response tokens of a micro-batch as an objective sees them: flat, detached, all floats of one dtype.

    What isn't known is None; ``known`` asks for it by name.

    Raises:
        ValueError: unless all fields are [N], the floats of the ratio's dtype and without gradient, and the
            sequence index integers.
    """

    ratio: Tensor
    """[N] pi / pi_old, > 0."""
    advantages: Tensor
    """[N]."""
    sequence_index: Tensor
    """[N] integers, equal for tokens of the same response, in any order."""
    logprobs: Tensor | None = None
    """[N] of the policy in training."""
    old_logprobs: Tensor | None = None
    """[N] of the policy before the phase's first update."""
    generator_logprobs: Tensor | None = None
    """[N] of the engine, as it sampled the tokens."""
    ref_logprobs: Tensor | None = None
    """[N] of the frozen reference; zeros in a run without one."""
    token_entropy: Tensor | None = None
    """[N] nats, of the policy in training at each token."""

    def __post_init__(self) -> None:
        for f in fields(self):
            value: Tensor | None = getattr(self, f.name)
            if value is None:
                continue
            if value.shape != self.ratio.shape or value.ndim != 1:
                raise ValueError(
                    f"{f.name} is {list(value.shape)} and the ratio {list(self.ratio.shape)}; all are [N], a number "
                    "for each response token."
                )
            if f.name == "sequence_index":
                if value.is_floating_point() or value.dtype == torch.bool:
                    raise ValueError(f"{f.name} is {value.dtype}; it must hold integers.")
            elif value.dtype != self.ratio.dtype or not value.is_floating_point():
                raise ValueError(f"{f.name} is {value.dtype} and the ratio {self.ratio.dtype}; both must be one float.")
            if value.requires_grad:
                raise ValueError(f"{f.name} has a gradient; a weight must not: detach it.")

    @staticmethod
    def of(
        logprobs: Tensor,
        old_logprobs: Tensor,
        advantages: Tensor,
        sequence_index: Tensor,
        *,
        token_entropy: Tensor | None = None,
        generator_logprobs: Tensor | None = None,
        ref_logprobs: Tensor | None = None,
    ) -> "Tokens":
        """Tokens with their ratio; without gradient, in the dtype of ``logprobs``."""

        def alike(values: Tensor) -> Tensor:  # rows are float32, whatever the model computes in
            return values.detach().to(logprobs.dtype) if values.is_floating_point() else values

        return Tokens(
            token_ratio(logprobs.detach(), alike(old_logprobs)),
            alike(advantages),
            sequence_index,
            logprobs=logprobs.detach(),
            old_logprobs=alike(old_logprobs),
            generator_logprobs=None if generator_logprobs is None else alike(generator_logprobs),
            ref_logprobs=None if ref_logprobs is None else alike(ref_logprobs),
            token_entropy=None if token_entropy is None else alike(token_entropy),
        )

    @property
    def position(self) -> Tensor:
        """[N] which of its response's trained tokens each one is, from 0, in the order given."""
        order = self.sequence_index.argsort(stable=True)
        count = torch.bincount(self.sequence_index)
        start = (count.cumsum(0) - count)[self.sequence_index[order]]
        within = torch.arange(len(order), device=order.device) - start
        return torch.empty_like(within).scatter_(0, order, within)

    def known(self, name: str) -> Tensor:
        """The field of that name.

        Raises:
            ValueError: if it isn't known here.
        """
        value: Tensor | None = getattr(self, name)
        if value is None:
            raise ValueError(f"the objective needs {name}, which policy_loss was not given")
        return value


class TokenWeights(NamedTuple):
    """What an objective makes of N tokens: detached, in the dtype of the ratio."""

    weights: Tensor
    """[N], >= 0; how strongly each token is pushed along its advantage."""
    clipped: Tensor
    """[N] bool; the token left the trust region (its gradient is zero, or bounded for CISPO)."""
    dual_clipped: Tensor
    """[N] bool; the weight was limited by ``dual_clip``."""


class Objective(ABC):
    """A rule that gives tokens their weights."""

    @abstractmethod
    def weigh(self, tokens: Tokens) -> TokenWeights:
        """Weighs N tokens. Those without advantage get weight 0 and count as neither clipped nor dual-clipped."""

    def token_weights(
        self, ratio: Tensor, advantages: Tensor, *, sequence_index: Tensor, token_entropy: Tensor | None = None
    ) -> TokenWeights:
        """``weigh``, where no more than this is known of the tokens: [N] each, see ``Tokens``."""
        return self.weigh(Tokens(ratio, advantages, sequence_index, token_entropy=token_entropy))


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
    generator_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
) -> tuple[Tensor, dict[str, TokenMean]]:
    """The weighted log-likelihood whose gradient is that of ``objective`` (paper, Proposition 4.1).

    Args:
        objective: gives the token weights.
        logprobs: [N] of the policy, with gradient.
        old_logprobs: [N] of the policy before the phase's first update.
        advantages: [N].
        loss_weights: [N] the averaging rule (``rollouts.packing.loss_weights``).
        sequence_index: [N] which response a token is of.
        token_entropy: [N] nats, for objectives that look at it.
        generator_logprobs: [N] as the engine sampled the tokens, for objectives that look at them.
        ref_logprobs: [N] of the reference, likewise.

    Returns:
        The scalar loss, and the measurements ``clip_fraction_*``, ``dual_clip_fraction_*`` and ``ratio_*`` over the
        tokens with a positive and with a negative advantage. Log-ratios beyond +-20 are taken as +-20.

    Raises:
        ValueError: for tensors that don't go together, see ``Tokens``, or if the objective needs one that isn't given.
    """
    with torch.no_grad():
        tokens = Tokens.of(
            logprobs,
            old_logprobs,
            advantages,
            sequence_index,
            token_entropy=token_entropy,
            generator_logprobs=generator_logprobs,
            ref_logprobs=ref_logprobs,
        )
        token_weights = objective.weigh(tokens)
        metrics = {}
        for sign, where in (("positive", advantages > 0), ("negative", advantages < 0)):
            metrics[f"clip_fraction_{sign}"] = token_mean(token_weights.clipped, where)
            metrics[f"dual_clip_fraction_{sign}"] = token_mean(token_weights.dual_clipped, where)
            metrics[f"ratio_{sign}"] = token_mean(tokens.ratio, where)
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
    return segment_sum(values, sequence_index) / segment_sum(torch.ones_like(values), sequence_index)


def segment_sum(values: Tensor, sequence_index: Tensor) -> Tensor:
    """[N] the sum over each token's response, spread back over its tokens."""
    size = int(sequence_index.max()) + 1 if sequence_index.numel() else 0
    return values.new_zeros(size).index_add_(0, sequence_index, values)[sequence_index]


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

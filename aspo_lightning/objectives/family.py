"""Other objectives of the family, each by its paper; ``m_t`` is the mask (``mask.py``), r_t = pi / pi_old."""

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from aspo_lightning.errors import ConfigError
from aspo_lightning.objectives.mask import TokenMask, check_clip_range, check_positive, check_share, soft_gate
from aspo_lightning.objectives.paper import DAPO
from aspo_lightning.objectives.rule import (
    Objective,
    Tokens,
    TokenWeights,
    segment_mean,
    segment_quantile,
    token_ratio,
)


@dataclass(frozen=True)
class REINFORCE(Objective):
    """Every weight is 1: no ratio, no mask."""

    def weigh(self, tokens: Tokens) -> TokenWeights:
        active = tokens.advantages != 0
        return TokenWeights(active.to(tokens.ratio.dtype), torch.zeros_like(active), torch.zeros_like(active))


@dataclass(frozen=True)
class CISPO(Objective):
    """Clipped IS weights without a mask (MiniMax-M1, arXiv 2506.13585): ``w = clip(r, 1 - eps_low, 1 + eps_high)``.

    No token loses its gradient. The default only bounds the weight from above, at 5 (arXiv 2510.13786).
    """

    clip_eps_low: float = 1.0
    clip_eps_high: float = 4.0

    def __post_init__(self) -> None:
        check_clip_range(self, "clip_eps_low", "clip_eps_high")

    def weigh(self, tokens: Tokens) -> TokenWeights:
        weights = tokens.ratio.clamp(1 - self.clip_eps_low, 1 + self.clip_eps_high)
        active = tokens.advantages != 0
        return TokenWeights(weights * active, active & (weights != tokens.ratio), torch.zeros_like(active))


@dataclass(frozen=True)
class SAPO(Objective):
    """Soft Adaptive Policy Optimization (arXiv 2511.20347): a gate that closes slowly in place of the mask.

        w = 4 p (1 - p) * r,   p = sigmoid(tau * (r - 1))

    with a larger ``tau`` for A < 0, whose gradient raises many other tokens. At r = 1 the weight is 1.
    """

    tau_positive: float = 1.0
    tau_negative: float = 1.05

    def __post_init__(self) -> None:
        check_positive(self, "tau_positive", "tau_negative")

    def weigh(self, tokens: Tokens) -> TokenWeights:
        weights = soft_gate(tokens, self.tau_positive, self.tau_negative) * tokens.ratio
        active = tokens.advantages != 0
        return TokenWeights(weights * active, torch.zeros_like(active), torch.zeros_like(active))


@dataclass(frozen=True)
class GSPO(TokenMask):
    """Group Sequence Policy Optimization (arXiv 2507.18071): GRPO on the response's length-normalised ratio.

        s = exp(mean_t log r_t),   w_t = m(s) * s

    Its paper averages over sequences (``averaging: sequence_mean``) and uses the narrow ranges that are the defaults.
    """

    clip_eps_low: float = 3e-4
    clip_eps_high: float = 4e-4

    def weigh(self, tokens: Tokens) -> TokenWeights:
        ratio = segment_mean(_log(tokens.ratio), tokens.sequence_index).exp()
        return self.masked(ratio, tokens, self.keep(tokens, ratio))


@dataclass(frozen=True)
class GMPO(Objective):
    """Geometric-Mean Policy Optimization (arXiv 2507.20673, eq. 4): the response's ratio, with each token's clipped.

        g   = exp(mean_t of min(log r_t, clip_eps_high))  for A > 0,   of max(log r_t, -clip_eps_low)  for A < 0
        w_t = g, but 0 for tokens that are clipped in it

    where A is the response's: a token whose own was set to 0 by a mask counts in g like the others.

    The clip ranges are of log r. Its paper averages over sequences (``averaging: sequence_mean``).
    """

    clip_eps_low: float = 0.4
    clip_eps_high: float = 0.4

    def __post_init__(self) -> None:
        check_positive(self, "clip_eps_low", "clip_eps_high")

    def weigh(self, tokens: Tokens) -> TokenWeights:
        log_ratio, advantages = _log(tokens.ratio), tokens.advantages
        positive = segment_mean(advantages, tokens.sequence_index) > 0
        bounded = torch.where(
            positive, log_ratio.clamp(max=self.clip_eps_high), log_ratio.clamp(min=-self.clip_eps_low)
        )
        clipped = (bounded != log_ratio) & (advantages != 0)
        weights = segment_mean(bounded, tokens.sequence_index).exp() * (~clipped & (advantages != 0))
        return TokenWeights(weights, clipped, torch.zeros_like(clipped))


@dataclass(frozen=True)
class DPPO(Objective):
    """Divergence Proximal Policy Optimization (arXiv 2602.04879): a mask by probabilities, not by their ratio.

        r = pi / mu,   w = [D <= delta or the token moves back towards mu] * min(r, ratio_cap)

    where mu is the engine's probability of the token, and D the total variation |pi - mu| (``tv``) or the binary KL
    divergence of mu from pi (``kl``). A token moves away if r > 1 with A > 0, or r < 1 with A < 0. The paper has
    delta = 0.2 for tv, 0.05 for kl. A rare token may multiply its probability; a likely one may not lose its.
    """

    divergence: Literal["tv", "kl"] = "tv"
    delta: float = 0.2
    ratio_cap: float = 20.0

    def __post_init__(self) -> None:
        check_positive(self, "delta", "ratio_cap")

    def weigh(self, tokens: Tokens) -> TokenWeights:
        logpi, logmu, advantages = tokens.known("logprobs"), tokens.known("generator_logprobs"), tokens.advantages
        pi, mu = logpi.exp(), logmu.exp()
        away = ((advantages > 0) & (logpi > logmu)) | ((advantages < 0) & (logpi < logmu))
        divergence = (pi - mu).abs() if self.divergence == "tv" else _binary_kl(logmu, logpi)
        clipped = away & (divergence > self.delta)
        weights = token_ratio(logpi, logmu).clamp(max=self.ratio_cap) * (~clipped & (advantages != 0))
        return TokenWeights(weights, clipped, torch.zeros_like(clipped))


@dataclass(frozen=True)
class EntropyTopFraction(DAPO):
    """DAPO on the tokens of highest entropy alone, "beyond the 80/20 rule" (arXiv 2506.01939, eq. 6).

        w = [H_t >= the response's (1 - top_fraction) quantile of H] * m_t * r_t

    Its paper takes the quantile over a batch; here it is the response's, so that the gradient doesn't depend on how a
    step is split into micro-batches.
    """

    top_fraction: float = field(default=0.2, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share(self, "top_fraction")

    def weigh(self, tokens: Tokens) -> TokenWeights:
        entropy = tokens.known("token_entropy")
        forking = entropy >= segment_quantile(entropy, tokens.sequence_index, 1 - self.top_fraction)
        weighed = super().weigh(tokens)
        return weighed._replace(weights=weighed.weights * forking)


@dataclass(frozen=True)
class ClipCov(TokenMask):
    """Clip-Cov (arXiv 2505.22617, eq. 11 and 12): GRPO, but a few tokens that would cost much entropy get no gradient.

        cov_t = (log pi_t - mean log pi) * (A_t - mean A)
        w     = m_t * r_t, but 0 for up to max(1, fraction * N) tokens with m_t = 1 and cov_low < cov_t < cov_high

    Means and choice are over the N tokens of a micro-batch, as in its authors' code, so the gradient depends on how a
    step is split. The choice is drawn from a seed that follows from how many there are to choose from: a resumed run
    makes the same.
    """

    fraction: float = field(default=2e-4, kw_only=True)
    cov_low: float = field(default=1.0, kw_only=True)
    cov_high: float = field(default=5.0, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share(self, "fraction")
        if not self.cov_low < self.cov_high:
            raise ConfigError(f"ClipCov.cov_low is {self.cov_low} and cov_high {self.cov_high}; it must be the lower.")

    def weigh(self, tokens: Tokens) -> TokenWeights:
        keep = self.keep(tokens)
        logprobs, advantages = tokens.known("logprobs"), tokens.advantages
        covariance = (logprobs - logprobs.mean()) * (advantages - advantages.mean())
        found = (keep & (covariance > self.cov_low) & (covariance < self.cov_high)).nonzero().flatten()
        drawn = torch.randperm(len(found), generator=torch.Generator().manual_seed(len(found)))
        count = max(1, int(self.fraction * len(keep)))
        keep[found[drawn[:count].to(found.device)]] = False
        return self.masked(tokens.ratio, tokens, keep)


def _binary_kl(logp: Tensor, logq: Tensor) -> Tensor:
    """KL(p || q) of a token against all others together."""
    rest_p, rest_q = (-x.clamp(max=-1e-7).expm1() for x in (logp, logq))  # 1 - p, never 0
    return logp.exp() * (logp - logq) + rest_p * (rest_p.log() - rest_q.log())


def _log(ratio: Tensor) -> Tensor:
    return ratio.clamp(min=torch.finfo(ratio.dtype).tiny).log()

"""The trust region that most objectives share, as a mask over tokens, and the checks of their settings."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from aspo_lightning.errors import ConfigError
from aspo_lightning.objectives.rule import Objective, Tokens, TokenWeights, segment_quantile


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
        check_clip_range(self, "clip_eps_low", "clip_eps_high", "high_entropy_clip_eps")
        check_share(self, "entropy_quantile")

    def keep(self, tokens: Tokens, ratio: Tensor | None = None) -> Tensor:
        """m_t as a [N] bool, by another ratio[N] if one is given; False where the advantage is 0."""
        ratio = tokens.ratio if ratio is None else ratio
        low, high = ratio.new_tensor(1 - self.clip_eps_low), ratio.new_tensor(1 + self.clip_eps_high)
        if self.high_entropy_clip_eps is not None:
            entropy = tokens.known("token_entropy")
            forking = entropy > segment_quantile(entropy, tokens.sequence_index, self.entropy_quantile)
            low = torch.where(forking, ratio.new_tensor(1 - self.high_entropy_clip_eps), low)
            high = torch.where(forking, ratio.new_tensor(1 + self.high_entropy_clip_eps), high)
        return ((tokens.advantages > 0) & (ratio <= high)) | ((tokens.advantages < 0) & (ratio >= low))

    def masked(self, weights: Tensor, tokens: Tokens, keep: Tensor, dual_clipped: Tensor | None = None) -> TokenWeights:
        """``weights``[N] where ``keep``[N], none elsewhere."""
        dual_clipped = torch.zeros_like(keep) if dual_clipped is None else dual_clipped
        return TokenWeights(weights * keep, ~keep & (tokens.advantages != 0), dual_clipped)


def check_clip_range(objective: Objective, *keys: str) -> None:
    """Checks the clip ranges of these names, the lower one first."""
    name = type(objective).__name__
    for key in keys:
        if (value := getattr(objective, key)) is not None and not value >= 0:
            raise ConfigError(f"{name}.{key} is {value}; a clip range must be at least 0 (the paper uses 0.2).")
    if (low := getattr(objective, keys[0])) > 1:
        raise ConfigError(f"{name}.clip_eps_low is {low}; it must be at most 1: a ratio is above 0.")


def check_dual_clip(objective: Objective, limit: float | None) -> None:
    if limit is not None and not limit > 1:
        raise ConfigError(
            f"{type(objective).__name__}.dual_clip is {limit}; it bounds a weight from above and must be > 1 (the "
            "paper uses 3), or null to switch it off."
        )


def check_positive(objective: Objective, *keys: str) -> None:
    for key in keys:
        if not 0 < (value := getattr(objective, key)) < math.inf:
            raise ConfigError(f"{type(objective).__name__}.{key} is {value}; it must be above 0 and finite.")


def check_share(objective: Objective, key: str) -> None:
    if not 0 <= (value := getattr(objective, key)) <= 1:
        raise ConfigError(f"{type(objective).__name__}.{key} is {value}; it must be from 0 to 1.")


def soft_gate(tokens: Tokens, tau_positive: float, tau_negative: float) -> Tensor:
    """[N] 4 p (1 - p), p = sigmoid(tau * (r - 1)): 1 at r = 1, and falling to both sides."""
    ratio = tokens.ratio
    tau = torch.where(tokens.advantages > 0, ratio.new_tensor(tau_positive), ratio.new_tensor(tau_negative))
    p = (tau * (ratio - 1)).sigmoid()
    return 4 * p * (1 - p)

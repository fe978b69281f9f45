"""What ASPO, GRPO and a run's own objective make of the tokens of a kept completion."""

import importlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from aspo_lightning.errors import ConfigError
from aspo_lightning.objectives import ASPO, GRPO, Objective, TokenWeights
from aspo_lightning.run.rollout_files import RolloutRecord

Weighed = dict[str, TokenWeights]
"""What each objective makes of a completion's tokens, by its name. Empty where there is nothing to weigh."""

COMPARED: dict[str, Objective] = {"ASPO": ASPO(), "GRPO": GRPO()}


def objectives(config: Mapping[str, object] | None) -> dict[str, Objective]:
    """ASPO and GRPO as they are by default, and the objective of a run's config where it is neither.

    Raises:
        ConfigError: if that can't be made here.
    """
    own = own_objective(config or {})
    if own is None or own in COMPARED.values():
        return COMPARED
    return {**COMPARED, f"this run's {type(own).__name__}": own}


def own_objective(config: Mapping[str, object]) -> Objective | None:
    """The objective of a run's config; None if it has none.

    Raises:
        ConfigError: if it can't be made here, or needs more than a kept token's ratio, advantage and entropy.
    """
    model = config.get("model")
    described = model.get("objective") if isinstance(model, dict) else None
    if not isinstance(described, dict):
        return None
    path = str(described.get("class_path"))
    module, _, name = path.rpartition(".")
    try:
        kind = getattr(importlib.import_module(module), name)
        if not (isinstance(kind, type) and issubclass(kind, Objective)):
            raise TypeError("it isn't an Objective")
        objective = kind(**(described.get("init_args") or {}))
        one = torch.ones(1)
        objective.token_weights(one, one, sequence_index=torch.zeros(1, dtype=torch.long), token_entropy=one)
        return objective
    except Exception as error:  # of a module that a user wrote, which may be gone or be another by now
        raise ConfigError(
            f"The run's own objective {path} can't weigh the tokens here: {' '.join(str(error).split())}"
        ) from error


def weigh(record: RolloutRecord, by: Mapping[str, Objective]) -> Weighed:
    """The weights of a completion's tokens."""
    tokens, advantage = record["tokens"], record["advantage"]
    if tokens is None or not tokens["text"] or not advantage:
        return {}
    ratio, entropy = (torch.tensor(tokens[key], dtype=torch.float64) for key in ("ratio", "entropy"))
    advantages, index = torch.full_like(ratio, advantage), torch.zeros(len(ratio), dtype=torch.long)
    return {
        name: objective.token_weights(ratio, advantages, sequence_index=index, token_entropy=entropy)
        for name, objective in by.items()
    }


SHOWN = 1e-3
"""Weights that differ by less are the same number on the page."""


class Standout(NamedTuple):
    """The token that ASPO weighs most differently from GRPO."""

    completion: int
    """Which of those that were looked at."""
    token: int
    difference: float


def standout(weighed: Sequence[Weighed]) -> Standout | None:
    """The first of those with the largest difference; None if all have the same weight under both, as shown."""
    found = None
    for number, weights in enumerate(weighed):
        if weights:
            difference = (weights["ASPO"].weights - weights["GRPO"].weights).abs().nan_to_num(0)
            token = int(difference.argmax())
            if difference[token] > (found.difference if found else SHOWN):
                found = Standout(number, token, float(difference[token]))
    return found

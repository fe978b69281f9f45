"""Phases of given groups, without an engine."""

from types import SimpleNamespace

from aspo_lightning.curriculum import Shuffled
from aspo_lightning.rollouts.ahead import PhaseSampler
from aspo_lightning.rollouts.loop import Rollouts
from aspo_lightning.rollouts.settings import RolloutSettings
from aspo_lightning.types import Phase


def build_phase(
    groups,
    scorer,
    *,
    epoch,
    token_budget,
    max_completion_length,
    rank=0,
    world_size=1,
    max_groups=None,
    quadratic_cost=0.0,
    **settings,
) -> Phase:
    """What a rank trains on, of given groups."""
    settings = RolloutSettings(
        prompts_per_phase=max_groups or len(groups),
        max_prompt_length=max(1, token_budget - max_completion_length),
        max_completion_length=max_completion_length,
        token_budget=token_budget,
        **settings,
    )
    sampler = SimpleNamespace(rank=rank, world_size=world_size)
    rollouts = Rollouts(PhaseSampler(sampler, Shuffled(), [], settings), quadratic_cost=quadratic_cost)
    return rollouts.train_on(groups, scorer, epoch)

"""Objectives of the GRPO family, each as a rule that weighs tokens: ``rule.py`` says why that is enough.

``paper.py`` has ASPO with the baselines and ablations of its paper, ``family.py`` the others.

To add one: subclass ``Objective`` (or ``TokenMask``), return ``TokenWeights`` from ``weigh``, and give its weights by
hand in ``tests/test_family.py``. Nothing else changes.
"""

from aspo_lightning.objectives.family import (
    CISPO,
    DPPO,
    GMPO,
    GSPO,
    REINFORCE,
    SAPO,
    ClipCov,
    EntropyTopFraction,
)
from aspo_lightning.objectives.mask import TokenMask
from aspo_lightning.objectives.paper import (
    ASPO,
    DAPO,
    GRPO,
    ASPOResponseMean,
    ASPOSoftGate,
    ASPOWithoutMask,
    GRPOPositiveMean,
    GRPOWithoutIS,
)
from aspo_lightning.objectives.rule import (
    KLEstimator,
    Objective,
    TokenMean,
    Tokens,
    TokenWeights,
    kl_to_reference,
    policy_loss,
    segment_mean,
    segment_quantile,
    segment_sum,
    token_mean,
    token_ratio,
)

__all__ = [
    "ASPO",
    "CISPO",
    "DAPO",
    "DPPO",
    "GMPO",
    "GRPO",
    "GSPO",
    "REINFORCE",
    "SAPO",
    "ASPOResponseMean",
    "ASPOSoftGate",
    "ASPOWithoutMask",
    "ClipCov",
    "EntropyTopFraction",
    "GRPOPositiveMean",
    "GRPOWithoutIS",
    "KLEstimator",
    "Objective",
    "TokenMask",
    "TokenMean",
    "TokenWeights",
    "Tokens",
    "kl_to_reference",
    "policy_loss",
    "segment_mean",
    "segment_quantile",
    "segment_sum",
    "token_mean",
    "token_ratio",
]

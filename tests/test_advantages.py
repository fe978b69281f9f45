"""Advantages by hand, and the law that groups without spread carry none."""

import itertools
import math
import re
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aspo_lightning import advantages as module
from aspo_lightning.advantages import (
    OPO,
    SPREAD_TOLERANCE,
    Advantage,
    BatchStd,
    GroupMean,
    GroupStd,
    LeaveOneOut,
    LitePPO,
    MaxRL,
    group_advantages,
    has_spread,
)
from tests.support.commands import ROOT

REWARDS = [[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.5]]


LENGTHS = [[10.0, 20.0, 30.0, 40.0], [5.0, 1.0, 1.0, 3.0]]
ALL = [GroupStd(), GroupMean(), LeaveOneOut(), BatchStd(), LitePPO(), MaxRL(), OPO()]


def by_hand(advantage):
    name, rows, centred = type(advantage).__name__, [], []
    for group, lengths in zip(REWARDS, LENGTHS, strict=True):
        mean = sum(group) / 4
        centred += [r - mean for r in group]
        std = math.sqrt(sum((r - mean) ** 2 for r in group) / 3)
        weighted = sum(n * r for n, r in zip(lengths, group, strict=True)) / sum(lengths)
        rows.append(
            {
                "GroupStd": [(r - mean) / (std + 1e-6) for r in group],
                "LeaveOneOut": [r - (sum(group) - r) / 3 for r in group],
                "MaxRL": [(r - mean) / (mean + 1e-6) for r in group],
                "OPO": [r - weighted for r in group],
            }.get(name, [r - mean for r in group])
        )
    if name in ("BatchStd", "LitePPO"):
        values = centred if name == "BatchStd" else [r for group in REWARDS for r in group]
        average = sum(values) / 8
        std = math.sqrt(sum((c - average) ** 2 for c in values) / 7)
        rows = [[a / (std + 1e-6) for a in row] for row in rows]
    return torch.tensor(rows, dtype=torch.float64)


def names(advantage):
    return type(advantage).__name__


def test_each_is_by_hand_here():
    defined = {kind for kind in vars(module).values() if isinstance(kind, type) and issubclass(kind, Advantage)}
    assert {type(advantage) for advantage in ALL} == defined - {Advantage}


@pytest.mark.parametrize("advantage", ALL, ids=names)
def test_by_hand(advantage):
    spread, lengths = torch.tensor([True, True]), torch.tensor(LENGTHS)
    result = group_advantages(torch.tensor(REWARDS), advantage, spread=spread, lengths=lengths)
    torch.testing.assert_close(result, by_hand(advantage), rtol=1e-12, atol=1e-12)


def test_a_group_whose_mean_is_not_above_zero_is_only_centred_by_maxrl():
    rewards = torch.tensor([[0.0, -1.0], [1.0, -1.0], [1.0, 0.0]])
    result = group_advantages(rewards, MaxRL(), spread=torch.tensor([True] * 3))
    assert result.tolist() == [[0.5, -0.5], [1.0, -1.0], pytest.approx([1.0, -1.0], abs=1e-5)]


def test_the_readmes_advantage_is_opo():
    """Run as printed."""
    section = (ROOT / "README.md").read_text().partition("## Add an objective")[2]
    code = re.search(r"```python\n(@dataclass\(frozen=True\)\nclass \w+\(Advantage\).*?)```", section, re.DOTALL)[1]
    space = {"dataclass": dataclass, **vars(module)}
    exec(code, space)
    printed = space["LengthWeighted"]()
    rewards, lengths = torch.tensor(REWARDS).double(), torch.tensor(LENGTHS).double()
    assert torch.equal(printed.estimate(rewards, lengths), OPO().estimate(rewards, lengths))


def test_spread_is_max_minus_min_and_not_a_deviation_above_zero():
    rewards = torch.full((1, 3), 0.1, dtype=torch.float64)
    assert rewards.std() > 0  # by rounding: the reason for not asking it
    assert not has_spread(rewards[0].tolist())
    assert has_spread([0.0, 1e-3])


@given(
    st.lists(st.floats(0, 1), min_size=2, max_size=8).filter(has_spread),
    st.sampled_from([a for a in ALL if not isinstance(a, OPO)]),
)
def test_advantages_of_a_group_sum_to_zero_and_keep_its_order(rewards, advantage):
    rewards_of_one_group = torch.tensor([rewards], dtype=torch.float64)
    advantages = group_advantages(rewards_of_one_group, advantage, spread=torch.tensor([True]))[0]
    assert advantages.sum().item() == pytest.approx(0, abs=1e-6)
    order = sorted(range(len(rewards)), key=lambda i: rewards[i])
    assert all(advantages[a] <= advantages[b] + 1e-12 for a, b in itertools.pairwise(order))


@pytest.mark.parametrize("advantage", ALL, ids=names)
def test_groups_without_spread_get_zeros_and_change_nothing_for_the_others(advantage):
    shaped = torch.tensor([REWARDS[0], [0.0, -0.25, -0.5, -1.0], REWARDS[1]])  # the second by length alone
    lengths = torch.tensor([LENGTHS[0], [1.0, 2.0, 3.0, 4.0], LENGTHS[1]])
    result = group_advantages(shaped, advantage, spread=torch.tensor([True, False, True]), lengths=lengths)
    torch.testing.assert_close(result[[0, 2]], by_hand(advantage), rtol=1e-12, atol=1e-12)
    assert result[1].tolist() == [0.0] * 4


@pytest.mark.parametrize("advantage", ALL, ids=names)
@pytest.mark.filterwarnings("error")
def test_where_no_group_has_spread_all_get_zeros(advantage):
    result = group_advantages(torch.tensor(REWARDS), advantage, spread=torch.tensor([False, False]))
    assert result.tolist() == [[0.0] * 4] * 2


def test_rewards_must_differ_by_more_than_the_tolerance():
    assert not has_spread([0.0, SPREAD_TOLERANCE])
    assert has_spread([0.0, math.nextafter(SPREAD_TOLERANCE, 1)])
    assert not has_spread([0.5, 0.5 + 0.9e-9, 0.5])
    assert has_spread([0.5, 0.5 + 1.1e-9, 0.5])


def test_a_batch_of_two_completions_has_their_unbiased_deviation():
    result = group_advantages(torch.tensor([[1.0, 0.0]]), BatchStd(), spread=torch.tensor([True]))
    assert result.tolist() == [pytest.approx([0.5 / (0.5**0.5 + 1e-6), -0.5 / (0.5**0.5 + 1e-6)], rel=1e-12)]


def test_the_deviation_of_the_group_is_the_default():
    spread = torch.tensor([True, True])
    rewards = torch.tensor(REWARDS)
    assert torch.equal(group_advantages(rewards, spread=spread), group_advantages(rewards, GroupStd(), spread=spread))

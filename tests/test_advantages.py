"""Advantages by hand, and the law that groups without spread carry none."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aspo_lightning.advantages import SPREAD_TOLERANCE, group_advantages, has_spread

REWARDS = [[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.5]]


def by_hand(estimator):
    rows, centred = [], []
    for group in REWARDS:
        mean = sum(group) / 4
        centred += [r - mean for r in group]
        std = math.sqrt(sum((r - mean) ** 2 for r in group) / 3)
        rows.append(
            {
                "group_std": [(r - mean) / (std + 1e-6) for r in group],
                "group_mean": [r - mean for r in group],
                "leave_one_out": [r - (sum(group) - r) / 3 for r in group],
                "batch_std": [r - mean for r in group],
            }[estimator]
        )
    if estimator == "batch_std":
        average = sum(centred) / 8
        std = math.sqrt(sum((c - average) ** 2 for c in centred) / 7)
        rows = [[a / (std + 1e-6) for a in row] for row in rows]
    return rows


@pytest.mark.parametrize("estimator", ["group_std", "group_mean", "leave_one_out", "batch_std"])
def test_by_hand(estimator):
    result = group_advantages(torch.tensor(REWARDS), estimator, spread=torch.tensor([True, True]))
    torch.testing.assert_close(result, torch.tensor(by_hand(estimator), dtype=torch.float64), rtol=1e-12, atol=1e-12)


def test_spread_is_max_minus_min_and_not_a_deviation_above_zero():
    rewards = torch.full((1, 3), 0.1, dtype=torch.float64)
    assert rewards.std() > 0  # by rounding: the reason for not asking it
    assert not has_spread(rewards[0].tolist())
    assert has_spread([0.0, 1e-3])


@given(st.lists(st.floats(0, 1), min_size=2, max_size=8), st.sampled_from(["group_std", "group_mean", "leave_one_out"]))
def test_advantages_of_a_group_sum_to_zero_and_keep_its_order(rewards, estimator):
    rewards_of_one_group = torch.tensor([rewards], dtype=torch.float64)
    advantages = group_advantages(rewards_of_one_group, estimator, spread=torch.tensor([True]))[0]
    assert advantages.sum().item() == pytest.approx(0, abs=1e-6)
    order = sorted(range(len(rewards)), key=lambda i: rewards[i])
    assert all(advantages[a] <= advantages[b] + 1e-12 for a, b in itertools.pairwise(order))


@pytest.mark.parametrize("estimator", ["group_std", "group_mean", "leave_one_out", "batch_std"])
def test_groups_without_spread_get_zeros_and_change_nothing_for_the_others(estimator):
    shaped = torch.tensor([REWARDS[0], [0.0, -0.25, -0.5, -1.0], REWARDS[1]])  # the second by length alone
    result = group_advantages(shaped, estimator, spread=torch.tensor([True, False, True]))
    expected = torch.tensor(by_hand(estimator), dtype=torch.float64)
    torch.testing.assert_close(result[[0, 2]], expected, rtol=1e-12, atol=1e-12)
    assert result[1].tolist() == [0.0] * 4


@pytest.mark.parametrize("estimator", ["group_std", "group_mean", "leave_one_out", "batch_std"])
@pytest.mark.filterwarnings("error")
def test_where_no_group_has_spread_all_get_zeros(estimator):
    result = group_advantages(torch.tensor(REWARDS), estimator, spread=torch.tensor([False, False]))
    assert result.tolist() == [[0.0] * 4] * 2


def test_rewards_must_differ_by_more_than_the_tolerance():
    assert not has_spread([0.0, SPREAD_TOLERANCE])
    assert has_spread([0.0, math.nextafter(SPREAD_TOLERANCE, 1)])
    assert not has_spread([0.5, 0.5 + 0.9e-9, 0.5])
    assert has_spread([0.5, 0.5 + 1.1e-9, 0.5])


def test_a_batch_of_two_completions_has_their_unbiased_deviation():
    result = group_advantages(torch.tensor([[1.0, 0.0]]), "batch_std", spread=torch.tensor([True]))
    assert result.tolist() == [pytest.approx([0.5 / (0.5**0.5 + 1e-6), -0.5 / (0.5**0.5 + 1e-6)], rel=1e-12)]


def test_the_deviation_of_the_group_is_the_default():
    spread = torch.tensor([True, True])
    rewards = torch.tensor(REWARDS)
    assert torch.equal(group_advantages(rewards, spread=spread), group_advantages(rewards, "group_std", spread=spread))

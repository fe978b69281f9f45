"""Plans and loss weights, by their laws and by hand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aspo_lightning.errors import ConfigError
from aspo_lightning.rollouts.packing import loss_weights, plan_phase

groups = st.tuples(st.integers(1, 30), st.lists(st.integers(0, 30), min_size=1, max_size=6))
phases = st.lists(groups, min_size=1, max_size=12)


def alone(*groups):
    """Groups whose prompts take no place."""
    return [(0, lengths) for lengths in groups]


def tokens(groups, members, shared):
    """Of a micro-batch, by hand."""
    owner = [g for g, (_, lengths) in enumerate(groups) for _ in lengths]
    lengths = [n for _, lengths in groups for n in lengths]
    prompts = [owner[i] for i in members]
    return sum(groups[g][0] for g in (set(prompts) if shared else prompts)) + sum(lengths[i] for i in members)


@given(phases, st.integers(1, 6), st.integers(1, 4), st.integers(60, 200), st.sampled_from([0.0, 0.01]), st.booleans())
def test_every_sequence_has_one_place_within_the_budget(
    groups, optimizer_steps, world_size, token_budget, quadratic, shared
):
    settings = {
        "optimizer_steps": optimizer_steps,
        "world_size": world_size,
        "token_budget": token_budget,
        "quadratic_cost": quadratic,
        "shared": shared,
    }
    plan = plan_phase(groups, **settings)
    owner = [g for g, (_, lengths) in enumerate(groups) for _ in lengths]
    placed = [i for step in plan.steps for rank in step for micro in rank for i in micro]
    assert sorted(placed) == list(range(len(owner)))
    assert len(plan.steps) == min(optimizer_steps, len(groups))
    for step in plan.steps:
        assert len(step) == world_size
        for rank in step:
            assert len(rank) == plan.accumulate
            assert all(tokens(groups, micro, shared) <= token_budget for micro in rank)
    # Groups stay together, in order.
    step_of = [{owner[i] for rank in step for micro in rank for i in micro} for step in plan.steps]
    assert [g for groups_of in step_of for g in sorted(groups_of)] == list(range(len(groups)))
    assert plan == plan_phase(groups, **settings)


@given(phases, st.integers(1, 4), st.integers(60, 200))
def test_sharing_prompts_never_takes_more_micro_batches(groups, world_size, token_budget):
    settings = {"optimizer_steps": 1, "world_size": world_size, "token_budget": token_budget}
    assert plan_phase(groups, **settings).accumulate <= plan_phase(groups, **settings, shared=False).accumulate


def test_accumulate_is_the_smallest_that_fits():
    assert plan_phase(alone([50, 50], [50, 50]), optimizer_steps=2, token_budget=100).accumulate == 1
    assert plan_phase(alone([50, 51], [50, 50]), optimizer_steps=2, token_budget=100).accumulate == 2
    assert plan_phase(alone([60, 60, 60]), optimizer_steps=1, token_budget=100).accumulate == 3
    assert plan_phase(alone([60, 60, 60, 60]), optimizer_steps=1, token_budget=120, world_size=2).accumulate == 1


def test_a_shared_prompt_counts_once_in_each_micro_batch():
    assert plan_phase([(40, [10, 10, 10])], optimizer_steps=1, token_budget=70).accumulate == 1
    assert plan_phase([(40, [10, 10, 10])], optimizer_steps=1, token_budget=69).accumulate == 2
    assert plan_phase([(40, [10, 10, 10])], optimizer_steps=1, token_budget=70, shared=False).accumulate == 3


def test_groups_are_divided_only_as_far_as_that_evens_the_micro_batches():
    whole = plan_phase([(10, [5, 5]), (10, [5, 5])], optimizer_steps=1, token_budget=20, world_size=2)
    assert whole.steps == [[[[0, 1]], [[2, 3]]]]
    halves = plan_phase([(10, [5, 5, 5, 5])], optimizer_steps=1, token_budget=40, world_size=2)
    assert halves.steps == [[[[0, 2]], [[1, 3]]]]
    # Whole groups take 42 beside 6, halves 22 + 6 beside 22, single completions 12 + 12 + 6 beside 12 + 12.
    uneven = plan_phase([(2, [10, 10, 10, 10]), (2, [4])], optimizer_steps=1, token_budget=50, world_size=2)
    assert uneven.steps == [[[[0, 2, 4]], [[1, 3]]]]


def test_ranks_get_equal_work():
    groups = alone(*([3 + (7 * i * j) % 50 for i in range(8)] for j in range(8)))
    lengths = [n for _, group in groups for n in group]
    plan = plan_phase(groups, optimizer_steps=2, world_size=4, token_budget=80)
    for step in plan.steps:
        loads = [sum(lengths[i] for micro in rank for i in micro) for rank in step]
        assert max(loads) / (sum(loads) / len(loads)) <= 1.05


def test_no_groups_make_no_steps():
    assert plan_phase([], optimizer_steps=4, token_budget=10).steps == []


def test_a_sequence_beyond_the_budget_is_refused():
    with pytest.raises(ConfigError, match="11 tokens, more than token_budget 10"):
        plan_phase(alone([11]), optimizer_steps=1, token_budget=10)


@pytest.mark.parametrize(
    ("averaging", "expected"),
    [
        ("token_mean", [6 / 10, 6 / 10, 6 / 10]),
        ("sequence_mean", [6 / (3 * 2), 6 / (3 * 3), 6 / (3 * 5)]),
        ("sequence_sum", [6 / (3 * 40)] * 3),
    ],
)
def test_loss_weights_by_hand(averaging, expected):
    assert loss_weights([2, 3, 5], averaging, scale=6, max_completion_length=40) == pytest.approx(expected)


@pytest.mark.parametrize("averaging", ["token_mean", "sequence_mean", "sequence_sum"])
def test_empty_responses_are_in_no_denominator(averaging):
    full = loss_weights([2, 3], averaging, scale=1, max_completion_length=40)
    assert loss_weights([2, 0, 3], averaging, scale=1, max_completion_length=40)[::2] == full


def test_ranks_wait_for_neighbours_in_snake_order():
    plan = plan_phase(alone([9, 8, 7, 6, 5, 4]), optimizer_steps=1, world_size=2, token_budget=9)
    assert plan.steps == [[[[0], [3], [4]], [[1], [2], [5]]]]
    plan = plan_phase(alone([6, 5, 4, 3, 2, 1]), optimizer_steps=1, world_size=3, token_budget=6)
    assert plan.steps == [[[[0], [5]], [[1], [4]], [[2], [3]]]]


@pytest.mark.parametrize(
    ("averaging", "one_token", "none"),
    [("token_mean", 3, 3), ("sequence_mean", 3, 3), ("sequence_sum", 3 / 40, 3 / 40)],
)
def test_the_smallest_denominators_are_of_one_sequence_and_one_token(averaging, one_token, none):
    assert loss_weights([1], averaging, scale=3, max_completion_length=40) == [one_token]
    assert loss_weights([0], averaging, scale=3, max_completion_length=40) == [none]
    if averaging != "token_mean":
        assert loss_weights([1, 5], averaging, scale=3, max_completion_length=40)[0] == one_token / 2


def test_a_group_of_no_sequences_takes_no_place():
    assert plan_phase(alone([], [3]), optimizer_steps=1, token_budget=10).steps == [[[[0]]]]


def test_the_heaviest_are_placed_first_each_into_the_lightest_bin():
    assert plan_phase(alone([1, 1, 1, 4]), optimizer_steps=1, token_budget=4).steps == [[[[3], [0, 1, 2]]]]


def test_bins_are_dealt_by_falling_cost():
    assert plan_phase(alone([5, 4, 3]), optimizer_steps=1, token_budget=7).steps == [[[[1, 2], [0]]]]


def test_a_full_bin_is_passed_over_and_takes_what_still_fits():
    # Costs 42, 20, 20, 12, 6, 2. The 3 finds the lighter bin (4, 4) full, the 2 fits into it, the 1 doesn't any more.
    plan = plan_phase(alone([6, 4, 4, 3, 2, 1]), optimizer_steps=1, token_budget=10, quadratic_cost=1.0)
    assert plan.steps == [[[[0, 3, 5], [1, 2, 4]]]]

"""The phase with a scripted engine: what is sampled, kept, weighed and scored; and the same gradient however split."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aspo_lightning.batching import Plan
from aspo_lightning.engines.base import Generator
from aspo_lightning.errors import ConfigError
from aspo_lightning.rewards import RewardPool
from aspo_lightning.rollouts import (
    Sampling,
    build_phase,
    check_phase,
    correct_mismatch,
    draw_prompts,
    evaluation_metrics,
    held_out,
    pack,
    sample_groups,
    sampling_seed,
)
from aspo_lightning.types import Completion, MicroBatch, Prompt, Rollout, RolloutGroup


def prompt(i, length=3):
    return Prompt(f"p{i}", tuple(range(10, 10 + length)), f"text {i}", "tests.hostile_rewards.number", {"scale": 1})


def group(i, rewards, lengths=None, **kwargs):
    lengths = lengths or [2] * len(rewards)
    rollouts = [
        Rollout(tuple(range(40, 40 + n)), tuple(-0.1 * (j + 1) for j in range(n)), False, "a b", r, **kwargs)
        for r, n in zip(rewards, lengths, strict=True)
    ]
    return RolloutGroup(prompt(i), tuple(rollouts))


def minus_one(batch: MicroBatch):
    return torch.full_like(batch.advantages, -1.0), torch.full_like(batch.advantages, -2.0)


SETTINGS = {"epoch": 0, "optimizer_steps": 2, "token_budget": 40, "max_completion_length": 8}


def test_groups_without_spread_are_in_no_numerator_and_no_denominator():
    useful = [group(0, [1.0, 0.0], [2, 5]), group(1, [0.0, 0.5], [1, 3])]
    useless = [group(2, [1.0, 1.0]), group(3, [0.0, 0.0]), group(4, [0.1, 0.1])]
    mixed = build_phase([useless[0], useful[0], useless[1], useful[1], useless[2]], minus_one, **SETTINGS)
    alone = build_phase(useful, minus_one, **SETTINGS)
    assert len(mixed.micro_batches) == len(alone.micro_batches) == 2
    for ours, theirs in zip(mixed, alone, strict=True):
        for field in MicroBatch.__dataclass_fields__:
            assert torch.equal(getattr(ours, field), getattr(theirs, field))
    assert mixed.metrics["rollout/kept_groups"] == 2
    assert mixed.metrics["rollout/reward"] == pytest.approx((1 + 0.5 + 2 + 0.2) / 10)
    assert mixed.metrics["rollout/accuracy"] == pytest.approx(3 / 10)
    assert mixed.metrics["rollout/length"] == pytest.approx((2 + 5 + 1 + 3 + 12) / 10)


def test_the_loss_weights_of_a_step_are_a_mean_over_its_tokens():
    phase = build_phase([group(0, [1.0, 0.0], [2, 5]), group(1, [0.0, 1.0], [1, 4])], minus_one, **SETTINGS)
    assert [b.loss_weights.sum().item() / phase.accumulate for b in phase] == pytest.approx([1, 1])
    first = phase.micro_batches[0]
    assert first.loss_weights.tolist() == pytest.approx([1 / 7] * 7)
    std = 0.5 * 2**0.5 + 1e-6  # of (1, 0), unbiased
    expected = {2: 0.5 / std, 5: -0.5 / std}
    for i, n in enumerate(torch.bincount(first.sequence_index).tolist()):
        assert first.advantages[first.sequence_index == i].tolist() == pytest.approx([expected[n]] * n)


def test_old_and_reference_log_probs_come_from_the_scorer_and_the_mismatch_is_measured():
    phase = build_phase([group(0, [1.0, 0.0], [2, 5])], minus_one, **SETTINGS)
    (batch,) = phase
    assert batch.old_logprobs.tolist() == [-1.0] * 7
    assert batch.ref_logprobs.tolist() == [-2.0] * 7
    assert sorted(batch.generator_logprobs.tolist()) == pytest.approx(
        sorted([-0.1, -0.2, -0.1, -0.2, -0.3, -0.4, -0.5])
    )
    differences = [0.9, 0.8, 0.9, 0.8, 0.7, 0.6, 0.5]
    assert phase.metrics["mismatch/logprob_abs_mean"] == pytest.approx(sum(differences) / 7, rel=1e-6)
    assert phase.metrics["mismatch/logprob_abs_max"] == pytest.approx(0.9)


def test_a_phase_without_a_useful_group_is_one_empty_micro_batch():
    phase = build_phase([group(0, [1.0, 1.0])], minus_one, **SETTINGS)
    assert len(phase) == 1
    assert phase.accumulate == 1
    assert phase.micro_batches[0].targets.numel() == 0
    assert phase.micro_batches[0].input_ids.numel() == 1


@pytest.mark.parametrize(
    ("correction", "expected"),
    [("off", [1, 1, 1, 1]), ("truncate", [0.2, 1.0, 1.8, 2.0]), ("mask", [0.0, 1.0, 1.8, 0.0])],
)
def test_mismatch_correction(correction, expected):
    batch = MicroBatch.from_sequences([([1], [2, 3, 4, 5])], advantages=[-3.0], generator_logprobs=[[-1.0] * 4])
    batch = replace(batch, old_logprobs=torch.tensor([0.2, 1.0, 1.8, 5.0]).log() - 1)
    assert correct_mismatch(batch, correction, (0.5, 2.0)).advantages.tolist() == pytest.approx(
        [-3 * w for w in expected]
    )


class Script(Generator):
    """Answers request i of prompt p with p's number of tokens; keeps what it was asked."""

    def __init__(self):
        self.requests = []

    def check(self):
        pass

    def start(self, model_name_or_path, *, context_length):
        pass

    def generate(self, requests, *, description):
        self.requests += requests
        return [Completion((7,) * len(r.prompt_ids), (-0.5,) * len(r.prompt_ids), truncated=True) for r in requests]

    def sync_weights(self, named_tensors):
        pass

    def stop(self):
        pass


def test_groups_are_sampled_with_their_own_seeds_and_scored():
    engine, pool = Script(), RewardPool(workers=1)
    prompts = [prompt(0, 2), prompt(1, 4)]
    try:
        groups, times = sample_groups(
            engine, pool, lambda ids: str(len(ids)), prompts, Sampling(3, 9, 0.7, 0.9, seed=5), epoch=2
        )
    finally:
        pool.close()
    assert [g.prompt for g in groups] == prompts
    assert [[r.reward for r in g.rollouts] for g in groups] == [[2.0] * 3, [4.0] * 3]
    assert [r.seed for r in engine.requests] == [sampling_seed(5, 2, f"p{p}", s) for p in (0, 1) for s in range(3)]
    assert {(r.temperature, r.top_p, r.max_tokens) for r in engine.requests} == {(0.7, 0.9, 9)}
    assert all(r.truncated for g in groups for r in g.rollouts)
    assert set(times) == {"time/generate_s", "time/reward_s"}


def test_seeds_differ_in_each_of_their_four_parts_and_stay_the_same():
    seeds = {sampling_seed(s, e, p, i) for s in (0, 1) for e in (0, 1, -1) for p in ("a", "b") for i in (0, 1, 2)}
    assert len(seeds) == 36
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert sampling_seed(0, 3, "chain_sum/1/5", 2) == 4341009945434545905


@given(st.integers(1, 30), st.integers(1, 30), st.integers(0, 50))
def test_epochs_go_through_the_prompts_without_repeats_in_a_pass(size, count, seed):
    prompts = [prompt(i) for i in range(max(size, count))]
    phases = len(prompts) // count
    for number in range(2):
        drawn = [
            p.id
            for epoch in range(phases)
            for p in draw_prompts(prompts, count=count, epoch=number * phases + epoch, seed=seed)
        ]
        assert max(Counter(drawn).values()) == 1
        assert len(drawn) == phases * count


def test_prompts_of_an_evaluation_are_not_trained_on():
    prompts = [prompt(0, 2), prompt(1, 3), prompt(2, 4)]
    assert held_out(prompts, [[prompt(9, 3)], []]) == [prompts[0], prompts[2]]


def test_evaluation_metrics():
    groups = [group(0, [1.0, 0.99, 1.0]), group(1, [0.0, 0.0, 0.0]), group(2, [0.0, 1.0, 0.0])]
    assert evaluation_metrics(groups, "eval/x") == {
        "eval/x/avg@3": pytest.approx(3 / 9),
        "eval/x/pass@3": pytest.approx(2 / 3),
    }


def test_a_phase_that_cannot_be_filled_is_refused():
    with pytest.raises(ConfigError, match="has 7 prompts, fewer than data.prompts_per_phase 8"):
        check_phase(7, 8, 2)
    with pytest.raises(ConfigError, match="optimizer_steps is 9"):
        check_phase(20, 8, 9)


def test_ranks_share_a_step_and_may_be_empty():
    plan = Plan([[[[0, 2]], [[1]]], [[[3]], [[]]]], accumulate=1)
    groups = [group(0, [1.0, 0.0], [2, 5]), group(1, [0.0, 1.0], [1, 4])]
    zero = pack(groups, plan, "group_mean", "token_mean", 8, rank=0, world_size=2)
    one = pack(groups, plan, "group_mean", "token_mean", 8, rank=1, world_size=2)
    assert zero[0].loss_weights.tolist() == pytest.approx([2 / 8] * 3)  # 3 tokens here, 5 on the other rank
    assert one[0].loss_weights.tolist() == pytest.approx([2 / 8] * 5)
    assert one[1].targets.numel() == 0

"""The phase of given groups: what is kept, shaped, weighed, packed and scored."""

import time
from dataclasses import replace

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from aspo_lightning.advantages import BatchStd, GroupMean
from aspo_lightning.errors import ConfigError
from aspo_lightning.rollouts import loop
from aspo_lightning.rollouts.corrections import Bypass, MaskedRatio, TruncatedRatio
from aspo_lightning.rollouts.packing import Plan, pack
from aspo_lightning.rollouts.settings import PhaseSettings, RewardSettings, check_phase
from aspo_lightning.rollouts.shaping import is_informative, shaped_reward, trained_sequences
from aspo_lightning.types import MicroBatch, Prompt, Rollout, RolloutGroup
from tests.support.commands import ROOT
from tests.support.phases import build_phase
from tests.support.ranks import in_forks


def prompt(i, length=3):
    return Prompt(f"p{i}", tuple(range(10, 10 + length)), f"text {i}", f"text {i}", {"x.reward": 1.0}, {})


def group(i, rewards, lengths=None, **kwargs):
    lengths = lengths or [2] * len(rewards)
    rollouts = [
        Rollout(tuple(range(40, 40 + n)), tuple(-0.1 * (j + 1) for j in range(n)), False, "a b", r, r == 1, **kwargs)
        for r, n in zip(rewards, lengths, strict=True)
    ]
    return RolloutGroup(prompt(i), tuple(rollouts))


class Constant:
    """Scores -1 by the policy and -2 by the reference."""

    def shares_prompts(self):
        return True

    def score(self, batches):
        return [torch.full_like(b.advantages, -1.0) for b in batches]

    def score_reference(self, batches):
        return [torch.full_like(b.advantages, -2.0) for b in batches]


SETTINGS = {"epoch": 0, "optimizer_steps": 2, "token_budget": 40, "max_completion_length": 8}


def test_groups_without_spread_are_in_no_numerator_and_no_denominator():
    useful = [group(0, [1.0, 0.0], [2, 5]), group(1, [0.0, 0.5], [1, 3])]
    useless = [group(2, [1.0, 1.0]), group(3, [0.0, 0.0]), group(4, [0.1, 0.1])]
    mixed = build_phase([useless[0], useful[0], useless[1], useful[1], useless[2]], Constant(), **SETTINGS)
    alone = build_phase(useful, Constant(), **SETTINGS)
    assert len(mixed.micro_batches) == len(alone.micro_batches) == 2
    for ours, theirs in zip(mixed, alone, strict=True):
        for field, value in vars(ours).items():
            other = getattr(theirs, field)
            assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other
    assert mixed.metrics["rollout/kept_groups"] == 2
    assert mixed.metrics["rollout/reward"] == pytest.approx((1 + 0.5 + 2 + 0.2) / 10)
    assert mixed.metrics["rollout/accuracy"] == pytest.approx(3 / 10)
    assert mixed.metrics["rollout/length"] == pytest.approx((2 + 5 + 1 + 3 + 12) / 10)


def test_the_loss_weights_of_a_step_are_a_mean_over_its_tokens():
    phase = build_phase([group(0, [1.0, 0.0], [2, 5]), group(1, [0.0, 1.0], [1, 4])], Constant(), **SETTINGS)
    assert [b.loss_weights.sum().item() / phase.accumulate for b in phase] == pytest.approx([1, 1])
    first = phase.micro_batches[0]
    assert first.loss_weights.tolist() == pytest.approx([1 / 7] * 7)
    std = 0.5 * 2**0.5 + 1e-6  # of (1, 0), unbiased
    expected = {2: 0.5 / std, 5: -0.5 / std}
    for i, n in enumerate(torch.bincount(first.sequence_index).tolist()):
        assert first.advantages[first.sequence_index == i].tolist() == pytest.approx([expected[n]] * n)


def test_old_and_reference_log_probs_come_from_the_scorer():
    phase = build_phase([group(0, [1.0, 0.0], [2, 5])], Constant(), **SETTINGS, passes=2)
    batch, _ = phase
    assert batch.old_logprobs.tolist() == [-1.0] * 7
    assert batch.ref_logprobs.tolist() == [-2.0] * 7
    assert sorted(batch.generator_logprobs.tolist()) == pytest.approx(
        sorted([-0.1, -0.2, -0.1, -0.2, -0.3, -0.4, -0.5])
    )


def test_a_phase_without_a_useful_group_is_one_empty_micro_batch():
    phase = build_phase([group(0, [1.0, 1.0])], Constant(), **SETTINGS)
    assert len(phase) == 1
    assert phase.accumulate == 1
    assert phase.micro_batches[0].targets.numel() == 0
    assert phase.micro_batches[0].input_ids.numel() == 1


def test_a_phase_that_cannot_be_filled_is_refused():
    with pytest.raises(ConfigError, match="has 7 prompts, fewer than data.prompts_per_phase 8"):
        check_phase(7, PhaseSettings(prompts_per_phase=8))
    with pytest.raises(ConfigError, match="optimizer_steps is 9, more than data.prompts_per_phase 8; each step needs"):
        check_phase(20, PhaseSettings(prompts_per_phase=8, optimizer_steps=9))
    with pytest.raises(ConfigError, match="groups_per_step is 9, more than data.prompts_per_phase 8; no step would be"):
        check_phase(20, PhaseSettings(prompts_per_phase=8, optimizer_steps=None, groups_per_step=9))


@pytest.mark.parametrize(("steps", "groups"), [(4, 16), (None, None)])
def test_the_size_of_a_step_is_given_in_one_way(steps, groups):
    with pytest.raises(ConfigError, match="Give one of them, and null for the other"):
        PhaseSettings(optimizer_steps=steps, groups_per_step=groups)


def test_the_released_scripts_phase_by_hand():
    """configs/objectives/archer2.yaml: 35 groups that are kept make steps of 16, 16 and 3, three times.

    The limit is 8 tokens and the penalty starts after 4.
    """
    overlay = yaml.safe_load((ROOT / "configs/objectives/archer2.yaml").read_text())["data"]
    mixed = [group(i, [1.0, 0.0], [1 + i % 4, 2]) for i in range(31)]
    long = [group(100 + i, [0.0, 0.0], [2, 8]) for i in range(4)]  # all wrong, one of them too long
    useless = [group(200 + i, [r, r], [3, 3]) for i, r in enumerate((0.0, 1.0, 1.0, 0.0, 0.0))]
    groups = [*useless[:2], *long[:3], *mixed, *useless[2:], long[3]]
    settings = {**SETTINGS, **overlay, "token_budget": 400}
    phase = build_phase(groups, Constant(), **settings, overlong_buffer=4, advantage=GroupMean())
    assert phase.metrics["rollout/kept_groups"] == 35
    assert phase.accumulate == 1
    assert len(phase) == 3 * 3
    kept = [*long[:3], *mixed, long[3]]
    for step, first in zip(phase, [0, 16, 32] * 3, strict=True):
        of_step = [r for g in kept[first : first + 16] for r in g.rollouts]
        lengths = sorted(len(r.completion_ids) for r in of_step)
        assert sorted(torch.bincount(step.sequence_index).tolist()) == lengths
        for i, n in enumerate(torch.bincount(step.sequence_index).tolist()):
            weights = step.loss_weights[step.sequence_index == i].tolist()
            assert weights == pytest.approx([1 / (32 * n)] * n)  # of a full step of 16 x 2, in the last one too
    first = phase.micro_batches[0]
    lengths = torch.bincount(first.sequence_index).tolist()
    advantages = [first.advantages[first.sequence_index == i][0].item() for i in range(32)]
    found = set(zip(lengths, advantages, strict=True))
    assert {(2, 0.5), (8, -0.5), (1, 0.5), (2, -0.5)} <= found  # of 0 and 0 - 1, and of 1 and 0


def test_ranks_share_a_step_and_may_be_empty():
    plan = Plan([[[[0, 2]], [[1]]], [[[3]], [[]]]], accumulate=1)
    groups = [group(0, [1.0, 0.0], [2, 5]), group(1, [0.0, 1.0], [1, 4])]
    sequences = [s for g in trained_sequences(groups, RewardSettings(advantage=GroupMean()), 8) for s in g]
    zero = pack(sequences, plan, "token_mean", 8, rank=0, world_size=2)
    one = pack(sequences, plan, "token_mean", 8, rank=1, world_size=2)
    assert zero[0].loss_weights.tolist() == pytest.approx([2 / 8] * 3)  # 3 tokens here, 5 on the other rank
    assert one[0].loss_weights.tolist() == pytest.approx([2 / 8] * 5)
    assert one[1].targets.numel() == 0


def advantages(phase):
    """By length of the completion."""
    found = {}
    for batch in phase:
        for i, n in enumerate(torch.bincount(batch.sequence_index).tolist()):
            found[n] = batch.advantages[batch.sequence_index == i].unique().tolist()
    return found


def test_kept_groups_without_spread_count_in_the_denominator_only():
    groups = [group(0, [1.0, 0.0], [2, 5]), group(1, [1.0, 1.0], [3, 6])]
    settings = {**SETTINGS, "optimizer_steps": 1, "advantage": GroupMean()}
    phase = build_phase(groups, Constant(), **settings, no_spread="keep")
    weights = [w for b in phase for w in b.loss_weights.tolist()]
    assert weights == pytest.approx([phase.accumulate / 16] * 16)
    assert advantages(phase) == {2: [0.5], 5: [-0.5], 3: [0.0], 6: [0.0]}
    assert phase.metrics["rollout/kept_groups"] == 2


def test_what_a_truncated_completion_gets():
    def truncated(first, rewards, lengths):
        g = group(first, rewards, lengths)
        return replace(g, rollouts=(replace(g.rollouts[0], truncated=True), *g.rollouts[1:]))

    groups = [truncated(0, [1.0, 0.0, 0.0], [7, 1, 2]), truncated(1, [1.0, 1.0, 1.0], [8, 3, 4])]
    settings = {**SETTINGS, "optimizer_steps": 1, "advantage": GroupMean()}

    def built(rule):
        return build_phase(groups, Constant(), **settings, truncated=rule)

    # Its score: the first group has spread, the second has none.
    assert advantages(built("score")) == {
        7: [pytest.approx(2 / 3)],
        1: [pytest.approx(-1 / 3)],
        2: [pytest.approx(-1 / 3)],
    }
    # Zero: the first group has none any more, and the second has.
    assert advantages(built("zero")) == {
        8: [pytest.approx(-2 / 3)],
        3: [pytest.approx(1 / 3)],
        4: [pytest.approx(1 / 3)],
    }
    # Masked: in the group's mean and not in the loss, so that the denominator is the 1 + 2 tokens of the others.
    masked = built("mask")
    assert advantages(masked) == {1: [pytest.approx(-1 / 3)], 2: [pytest.approx(-1 / 3)]}
    assert [w for b in masked for w in b.loss_weights.tolist()] == pytest.approx([1 / 3] * 3)
    for rule in ("score", "zero", "mask"):  # what is logged is what the model did
        assert built(rule).metrics["rollout/reward"] == pytest.approx(4 / 6)


@pytest.mark.parametrize(("length", "penalty"), [(1, 0), (4, 0), (5, -0.25), (6, -0.5), (7, -0.75), (8, -1), (9, -1)])
def test_the_overlong_penalty_falls_evenly_over_its_buffer(length, penalty):
    (rollout,) = group(0, [1.0], [length]).rollouts
    assert shaped_reward(rollout, RewardSettings(overlong_buffer=4), 8) == pytest.approx(1 + penalty)
    half = RewardSettings(overlong_buffer=4, overlong_penalty=0.5)
    assert shaped_reward(rollout, half, 8) == pytest.approx(1 + penalty / 2)
    assert shaped_reward(rollout, RewardSettings(), 8) == 1


def test_replies_count_for_the_overlong_penalty_as_for_the_limit():
    rollout = replace(group(0, [1.0], [8]).rollouts[0], sampled=(True, False, False, False) * 2)
    assert shaped_reward(rollout, RewardSettings(overlong_buffer=4), 8) == 0


def test_kept_groups_without_task_spread_get_no_advantage_from_their_lengths():
    groups = [group(0, [0.0, 0.0], [2, 8])]
    phase = build_phase(groups, Constant(), **SETTINGS, no_spread="keep", overlong_buffer=4)
    assert advantages(phase) == {2: [0.0], 8: [0.0]}


def test_spread_is_more_than_rounding_and_knows_the_rule_of_truncation():
    assert not is_informative(group(0, [0.1 + 0.2, 0.3]), RewardSettings(), 8)
    solved = group(0, [1.0, 0.0])
    cut = replace(solved, rollouts=(replace(solved.rollouts[0], truncated=True), solved.rollouts[1]))
    assert is_informative(cut, RewardSettings(), 8)
    assert not is_informative(cut, RewardSettings(truncated="zero"), 8)


def test_spread_is_judged_before_shaping():
    groups = [group(0, [1.0, 1.0], [2, 8]), group(1, [1.0, 0.0], [3, 7])]
    settings = {**SETTINGS, "optimizer_steps": 1, "advantage": GroupMean()}
    phase = build_phase(groups, Constant(), **settings, overlong_buffer=4)
    assert advantages(phase) == {3: [pytest.approx(0.875)], 7: [pytest.approx(-0.875)]}  # of 1 and 0 - 0.75


def test_a_phase_trains_on_no_more_groups_than_it_is_for_and_as_often_as_it_is_told():
    groups = [
        group(0, [1.0, 0.0], [1, 2]),
        group(1, [1.0, 1.0]),
        group(2, [0.0, 1.0], [3, 4]),
        group(3, [0.0, 1.0], [5, 6]),
    ]
    phase = build_phase(groups, Constant(), **SETTINGS, max_groups=2, passes=3)
    once = build_phase(groups[:3], Constant(), **SETTINGS)
    assert len(phase) == 3 * len(once)
    assert advantages(phase).keys() == {1, 2, 3, 4}
    for i, batch in enumerate(phase):
        assert torch.equal(batch.targets, once.micro_batches[i % len(once)].targets)


def test_tokens_of_an_environment_are_context_and_have_no_loss_weight():
    rollout = replace(group(0, [1.0], [6]).rollouts[0], sampled=(True, True, False, False, True, True), truncated=False)
    other = group(0, [0.0], [3]).rollouts[0]
    phase = build_phase([RolloutGroup(prompt(0), (rollout, other))], Constant(), **SETTINGS)
    (batch,) = phase
    assert batch.input_ids.tolist() == [10, 11, 12, 40, 41, 42, 43, 44, 40, 41]  # one prompt for both
    assert batch.targets.tolist() == [40, 41, 44, 45, 40, 41, 42]
    assert batch.response_index.tolist() == [2, 3, 6, 7, 2, 8, 9]
    assert batch.generator_logprobs.tolist() == pytest.approx([-0.1, -0.2, -0.5, -0.6, -0.1, -0.2, -0.3])
    assert batch.loss_weights.tolist() == pytest.approx([1 / 7] * 7)


@given(st.lists(st.lists(st.booleans(), min_size=1, max_size=12), min_size=1, max_size=6))
def test_only_sampled_tokens_are_targets(masks):
    sequences = [((1, 2), tuple(range(100 * i, 100 * i + len(m)))) for i, m in enumerate(masks)]
    batch = MicroBatch.from_sequences(sequences, sampled=masks, loss_weights=[1.0] * len(masks))
    expected = [t for (_, ids), m in zip(sequences, masks, strict=True) for t, s in zip(ids, m, strict=True) if s]
    assert batch.targets.tolist() == expected
    assert batch.loss_weights.sum() == len(expected)
    before = batch.input_ids[batch.response_index].tolist()
    assert before == [2 if target % 100 == 0 else target - 1 for target in expected]  # 2 is the prompt's end


def test_kept_groups_without_task_spread_change_no_advantage_of_the_others():
    useful = [group(0, [1.0, 0.0], [2, 5]), group(1, [0.0, 0.5], [1, 3])]
    settings = {**SETTINGS, "advantage": BatchStd(), "overlong_buffer": 4}
    alone = advantages(build_phase(useful, Constant(), **settings))
    kept = advantages(build_phase([*useful, group(2, [0.0, 0.0], [4, 8])], Constant(), **settings, no_spread="keep"))
    assert kept == {**alone, 4: [0.0], 8: [0.0]}
    # Shaped: 1, 0 - 0.25 and 0, 0.5; centred: +-0.625 and +-0.25.
    deviation = ((2 * 0.625**2 + 2 * 0.25**2) / 3) ** 0.5 + 1e-6
    expected = {2: 0.625, 5: -0.625, 1: -0.25, 3: 0.25}
    assert alone == {n: [pytest.approx(a / deviation)] for n, a in expected.items()}


def test_ranks_share_a_phase(tmp_path):
    groups = [group(0, [1.0, 0.0], [2, 5]), group(1, [0.0, 1.0], [1, 4])]

    def built(rank):
        phase = build_phase(groups, Constant(), **{**SETTINGS, "token_budget": 9}, rank=rank, world_size=2)
        return {
            "targets": [len(b.targets) for b in phase],
            "loss_weights": [sum(b.loss_weights.tolist()) for b in phase],
        }

    zero, one = in_forks(tmp_path, 2, built)
    assert (zero["targets"], one["targets"]) == ([5, 4], [2, 1])
    assert zero["loss_weights"] == pytest.approx([2 * 5 / 7, 2 * 4 / 5])
    assert one["loss_weights"] == pytest.approx([2 * 2 / 7, 2 * 1 / 5])


def test_a_renamed_prompt_is_the_same_problem():
    assert prompt(0).renamed("other") == replace(prompt(0), id="other")


def test_a_phase_may_take_all_prompts_and_a_step_for_each_group():
    check_phase(8, PhaseSettings(prompts_per_phase=8, optimizer_steps=8))


def test_what_is_known_of_a_phase():
    cut = replace(group(0, [1.0, 0.0], [20, 4]).rollouts[0], truncated=True, repetition_rate=0.5)
    failed = replace(group(0, [0.0], [5]).rollouts[0], failed=True, sampled=(True, True, False, False, True))
    groups = [RolloutGroup(prompt(0), (cut, failed)), group(1, [0.5, 0.5], [2, 1])]
    before = time.perf_counter()
    phase = build_phase(groups, Constant(), **{**SETTINGS, "epoch": 7})
    elapsed = time.perf_counter() - before
    assert (phase.epoch, phase.groups) == (7, groups)
    assert 0 < (score_s := phase.metrics.pop("time/score_s")) <= elapsed
    tokens = sum(len(row.input_ids) for row in phase)
    assert phase.metrics.pop("throughput/score_tokens_s") == pytest.approx(tokens / score_s)
    assert phase.metrics == {
        "rollout/reward": 0.5,
        "rollout/accuracy": 0.25,
        "rollout/length": (20 + 3 + 2 + 1) / 4,
        "rollout/truncated_fraction": 0.25,
        "rollout/length_right": 20,
        "rollout/length_wrong": (3 + 2 + 1) / 3,
        "rollout/repetition_rate": 0.5 / 4,
        "rollout/repetition_rate_right": 0.5,
        "rollout/repetition_rate_wrong": 0.0,
        "rollout/failed_rewards": 1.0,
        "rollout/kept_groups": 1.0,
    }


def test_the_seconds_of_scoring_are_those_of_the_scorer_alone(monkeypatch):
    clock = [0.0]
    measure = loop.rollout_metrics

    def takes(seconds, result):
        clock[0] += seconds
        return result

    monkeypatch.setattr(loop.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(loop, "rollout_metrics", lambda groups: takes(100, measure(groups)))

    class Slow(Constant):
        def score(self, batches):
            return takes(7, super().score(batches))

    phase = build_phase([group(0, [1.0, 0.0])], Slow(), **SETTINGS)
    assert phase.metrics["time/score_s"] == 7


@pytest.mark.parametrize(("settings", "sizes"), [({}, [2, 3]), ({"quadratic_cost": 1.0}, [1, 4])])
def test_micro_batches_are_balanced_by_cost_within_the_budget(settings, sizes):
    groups = [group(0, [1.0, 0.0, 0.0, 0.0, 0.0], [5, 2, 2, 2, 1])]  # after a prompt of 3
    phase = build_phase(groups, Constant(), **{**SETTINGS, "token_budget": 12}, **settings)
    assert phase.accumulate == 2
    assert sorted(int(b.sequence_index.max()) + 1 for b in phase) == sizes


def test_a_scorer_that_leaves_micro_batches_out_is_noticed():
    for part in ("score", "score_reference"):
        scorer = Constant()
        setattr(scorer, part, lambda batches: [])
        with pytest.raises(ValueError, match="shorter|not enough"):
            build_phase([group(0, [1.0, 0.0])], scorer, **SETTINGS)


@pytest.mark.parametrize(
    ("settings", "scored", "tokens"),
    [
        ({}, [False, False, False, True, True, True], 6 + 3 * 6),
        ({"passes": 2}, [True] * 12, 6 * 6),
        ({"mismatch": TruncatedRatio()}, [True] * 6, 6 * 6),
        ({"mismatch": Bypass()}, [True] * 6, 6),
        ({"mismatch": Bypass(), "passes": 2}, [True] * 12, 6),
    ],
)
def test_what_the_first_step_computes_itself_is_not_scored(settings, scored, tokens):
    """But its first group, and what a later pass or a correction needs."""

    class Counting(Constant):
        tokens = 0

        def score(self, batches):
            self.tokens += sum(len(b.targets) for b in batches)
            return super().score(batches)

    groups = [group(i, [1.0, 0.0, 0.0], [6, 6, 6]) for i in range(2)]
    scorer = Counting()
    phase = build_phase(groups, scorer, **{**SETTINGS, "token_budget": 11, **settings})
    assert phase.accumulate == 3
    assert [b.old_logprobs is not None for b in phase] == scored
    assert all((b.ref_logprobs == -2).all() and len(b.targets) == 6 for b in phase)
    assert phase.canary.tolist() == [-1] * 6
    assert scorer.tokens == tokens  # nothing twice


def test_a_phase_takes_the_settings_of_averaging_and_mismatch():
    settings = {**SETTINGS, "averaging": "sequence_sum", "advantage": GroupMean()}
    (plain,) = build_phase([group(0, [1.0, 0.0], [2, 5])], Constant(), **settings)
    assert plain.loss_weights.tolist() == pytest.approx([1 / (2 * 8)] * 7)
    mismatch = MaskedRatio(0.42, 1.0)
    (masked,) = build_phase([group(0, [1.0, 0.0], [2, 5])], Constant(), **settings, mismatch=mismatch)
    ratios = (masked.old_logprobs - masked.generator_logprobs).exp()  # e^-0.9 ... e^-0.5
    expected = plain.advantages * ratios * (ratios > 0.42)
    assert 0 < expected.count_nonzero() < 7
    assert masked.advantages.tolist() == pytest.approx(expected.tolist())


def test_advantages_are_computed_in_float64():
    ((first, second),) = trained_sequences([group(0, [0.1, 0.7])], RewardSettings(advantage=GroupMean()), 8)
    assert (first.advantage, second.advantage) == pytest.approx((-0.3, 0.3), rel=1e-15)

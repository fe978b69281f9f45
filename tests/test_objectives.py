"""Weights and gradients against values derived by hand from the paper's equations, in plain Python float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aspo_lightning.errors import ConfigError
from aspo_lightning.objectives import (
    ASPO,
    CISPO,
    DAPO,
    GRPO,
    GSPO,
    REINFORCE,
    GRPOPositiveMean,
    GRPOWithoutIS,
    kl_to_reference,
    policy_loss,
    segment_quantile,
    token_mean,
)

ALL = [ASPO(), GRPO(), DAPO(), GRPOWithoutIS(), GRPOPositiveMean(), CISPO(), GSPO(), REINFORCE()]
RATIOS = [math.exp(-20), 0.1, 1 / 3, 0.79, 0.8, 0.9, 1.0, 1.1, 1.2, 1.21, 1.28, 1.29, 2.9, 3.0, 3.1, 7.0, math.exp(20)]
NO_DUAL = math.inf


def weigh(objective, ratio, advantages, sequence_index=None, token_entropy=None):
    ratio = torch.tensor(ratio, dtype=torch.float64)
    index = torch.arange(len(ratio)) if sequence_index is None else torch.tensor(sequence_index, dtype=torch.long)
    entropy = None if token_entropy is None else torch.tensor(token_entropy, dtype=torch.float64)
    return objective.token_weights(
        ratio, torch.tensor(advantages, dtype=torch.float64), sequence_index=index, token_entropy=entropy
    )


def aspo_by_hand(r, a, low=0.2, high=0.2, c=3.0):
    if a > 0:
        return min(1 / r, c) if r <= 1 + high else 0.0
    if a < 0:
        return min(r, c) if r >= 1 - low else 0.0
    return 0.0


def grpo_by_hand(r, a, low=0.2, high=0.2, c=NO_DUAL):
    if a > 0:
        return r if r <= 1 + high else 0.0
    if a < 0:
        return r if 1 - low <= r <= c else 0.0
    return 0.0


# One response a token here, so a response's mean ratio and sequence ratio are the token's own.
BY_HAND = {
    "ASPO": (ASPO(), aspo_by_hand),
    "ASPO without dual clip": (ASPO(dual_clip=None), lambda r, a: aspo_by_hand(r, a, c=NO_DUAL)),
    "ASPO wide": (ASPO(0.3, 0.28, 2.0), lambda r, a: aspo_by_hand(r, a, 0.3, 0.28, 2.0)),
    "GRPO": (GRPO(), grpo_by_hand),
    "GRPO hard dual clip": (GRPO(dual_clip=3.0), lambda r, a: grpo_by_hand(r, a, c=3.0)),
    "DAPO": (DAPO(), lambda r, a: grpo_by_hand(r, a, high=0.28)),
    "GRPOWithoutIS": (GRPOWithoutIS(), lambda r, a: float(grpo_by_hand(r, a) > 0)),
    "GRPOPositiveMean": (GRPOPositiveMean(), grpo_by_hand),
    "CISPO": (CISPO(0.2, 0.2), lambda r, a: min(max(r, 0.8), 1.2) if a else 0.0),
    "CISPO default": (CISPO(), lambda r, a: min(r, 5.0) if a else 0.0),
    "GSPO": (GSPO(0.2, 0.2), grpo_by_hand),
    "REINFORCE": (REINFORCE(), lambda r, a: 1.0 if a else 0.0),
}


@pytest.mark.parametrize("name", BY_HAND)
@pytest.mark.parametrize("advantage", [1.7, -0.6, 0.0])
def test_weights_and_gradients_on_every_branch(name, advantage):
    objective, by_hand = BY_HAND[name]
    expected = torch.tensor([by_hand(r, advantage) for r in RATIOS], dtype=torch.float64)
    # GSPO goes through log and exp: an edge ratio may come back one ulp beyond it.
    keep = [abs(r - e) > 1e-9 for r in RATIOS for e in [0.8 if advantage < 0 else 1.2]] if name == "GSPO" else None
    select = torch.tensor(keep if keep else [True] * len(RATIOS))
    weights = weigh(objective, RATIOS, [advantage] * len(RATIOS)).weights
    torch.testing.assert_close(weights[select], expected[select], rtol=1e-12, atol=0)

    old = torch.linspace(-3, -0.1, len(RATIOS), dtype=torch.float64)
    logprobs = (old + torch.tensor(RATIOS, dtype=torch.float64).log()).requires_grad_()
    loss_weights = torch.linspace(0.5, 2, len(RATIOS), dtype=torch.float64)
    loss, _ = policy_loss(
        objective,
        logprobs,
        old,
        torch.full_like(old, advantage),
        loss_weights,
        sequence_index=torch.arange(len(RATIOS)),
    )
    loss.backward()
    # At the very edge, exp(log r) rounds to either side; those ratios are held exactly by the test above.
    inner = torch.tensor([min(abs(r - e) for e in (0.7, 0.8, 1.2, 1.28, 2.0, 3.0)) > 1e-9 for r in RATIOS])
    expected_grad = -loss_weights * expected * advantage
    torch.testing.assert_close(logprobs.grad[inner], expected_grad[inner], rtol=1e-9, atol=1e-9)


def test_flags_on_every_branch():
    ratio = [0.1, 0.5, 1.0, 1.2, 1.3, 0.7, 0.8, 1.0, 2.0, 4.0, 9.0, 0.1]
    advantages = [1, 1, 1, 1, 1, -1, -1, -1, -1, -1, 0, 0]
    _, clipped, dual = weigh(ASPO(), ratio, [float(a) for a in advantages])
    assert clipped.tolist() == [False] * 4 + [True, True] + [False] * 6
    assert dual.tolist() == [True] + [False] * 8 + [True, False, False]
    _, clipped, dual = weigh(GRPO(dual_clip=3.0), ratio, [float(a) for a in advantages])
    assert clipped.tolist() == [False] * 4 + [True, True] + [False] * 6
    assert dual.tolist() == [False] * 9 + [True, False, False]
    for objective in (ASPO(dual_clip=None), GRPO(), GRPOWithoutIS(), GRPOPositiveMean(), GSPO(0.2, 0.2 + 1e-12)):
        _, clipped, dual = weigh(objective, ratio, [float(a) for a in advantages])
        assert clipped.tolist() == [False] * 4 + [True, True] + [False] * 6
        assert not dual.any()
    _, clipped, dual = weigh(CISPO(0.2, 0.2), ratio, [float(a) for a in advantages])
    assert clipped.tolist() == [True, True, False, False, True, True, False, False, True, True, False, False]
    assert not dual.any()


def textbook_surrogate(name, logp, old, a):
    ratio = (logp - old).exp()
    if name == "GRPO":
        return torch.minimum(ratio * a, ratio.clamp(0.8, 1.2) * a)
    if name == "DAPO":
        return torch.minimum(ratio * a, ratio.clamp(0.8, 1.28) * a)
    # ASPO: masked as PPO-clip masks, r-hat = pi_old pi / sg(pi^2) for A > 0, soft dual clip.
    pi, pi_old = logp.exp(), old.exp()
    flipped = torch.where(a > 0, pi_old * pi / pi.detach().square(), ratio)
    bounded = torch.where(flipped.detach() > 3, flipped / flipped.detach() * 3, flipped)
    masked = ((a > 0) & (ratio > 1.2)) | ((a < 0) & (ratio < 0.8))
    return torch.where(masked, 0.0, bounded) * a


@pytest.mark.parametrize("name", ["ASPO", "GRPO", "DAPO"])
def test_gradient_equals_autograd_of_the_textbook_surrogate(name):
    objective = {"ASPO": ASPO(), "GRPO": GRPO(), "DAPO": DAPO()}[name]
    generator = torch.Generator().manual_seed(0)
    old = -3 * torch.rand(4000, dtype=torch.float64, generator=generator)
    logprobs = (old + 1.5 * torch.randn(4000, dtype=torch.float64, generator=generator)).requires_grad_()
    advantages = torch.randn(4000, dtype=torch.float64, generator=generator)
    ones = torch.ones(4000, dtype=torch.float64)
    loss, _ = policy_loss(objective, logprobs, old, advantages, ones, sequence_index=torch.arange(4000))
    (ours,) = torch.autograd.grad(loss, logprobs)
    (textbook,) = torch.autograd.grad(-textbook_surrogate(name, logprobs, old, advantages).sum(), logprobs)
    torch.testing.assert_close(ours, textbook, rtol=1e-9, atol=1e-9)


def test_response_level_rules_look_at_whole_responses():
    ratio, index = [0.5, 1.1, 2.0, 0.9, 4.0, 1.0], [3, 3, 3, 1, 1, 0]  # response 2 is empty, 0 has one token
    weights = weigh(GRPOPositiveMean(), ratio, [1.0] * 6, index).weights.tolist()
    mean_3, mean_1 = (0.5 + 1.1 + 2.0) / 3, (0.9 + 4.0) / 2
    assert weights == pytest.approx([mean_3, mean_3, 0, mean_1, 0, 1.0], rel=1e-12)
    weights = weigh(GSPO(0.2, 0.2), ratio, [1.0] * 3 + [-1.0] * 2 + [1.0], index).weights.tolist()
    s_3, s_1 = (0.5 * 1.1 * 2.0) ** (1 / 3), (0.9 * 4.0) ** (1 / 2)
    assert weights == pytest.approx([s_3] * 3 + [s_1] * 2 + [1.0], rel=1e-12)


def test_adaptive_clip_range_follows_the_entropy_quantile_of_each_response():
    entropy = [0.0, 1.0, 2.0, 3.0, 4.0, 9.0, 1.0]
    index = [0, 0, 0, 0, 0, 1, 1]  # 0.8 quantiles: 3.2, and 1 + 0.8 * 8 = 7.4
    high = [False, False, False, False, True, True, False]
    for r, a, kept_low, kept_high in [(1.3, 1.0, False, True), (1.5, 1.0, False, False), (0.7, -1.0, False, True)]:
        for kind in (ASPO, GRPO, GRPOWithoutIS, GRPOPositiveMean, GSPO):
            objective = kind(0.2, 0.2, high_entropy_clip_eps=0.4)
            clipped = weigh(objective, [r] * 7, [a] * 7, index, entropy).clipped.tolist()
            assert clipped == [not (kept_high if h else kept_low) for h in high]
    with pytest.raises(ValueError, match="token_entropy"):
        weigh(ASPO(high_entropy_clip_eps=0.4), [1.0], [1.0])


@given(st.lists(st.tuples(st.integers(0, 4), st.floats(-5, 5)), max_size=40), st.floats(0, 1))
def test_segment_quantile_equals_torch_quantile_of_each_segment(tokens, q):
    index = torch.tensor([i for i, _ in tokens], dtype=torch.long)
    values = torch.tensor([v for _, v in tokens], dtype=torch.float64)
    result = segment_quantile(values, index, q)
    for i in set(index.tolist()):
        expected = torch.quantile(values[index == i], q)
        torch.testing.assert_close(result[index == i], expected.expand(int((index == i).sum())), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("objective", ALL, ids=lambda o: type(o).__name__)
def test_without_tokens_there_is_nothing(objective):
    weights, clipped, dual = weigh(objective, [], [], [])
    assert len(weights) == len(clipped) == len(dual) == 0
    logprobs = torch.zeros(0, requires_grad=True)
    empty = torch.zeros(0)
    loss, metrics = policy_loss(
        objective, logprobs, empty, empty, empty, sequence_index=torch.zeros(0, dtype=torch.long)
    )
    loss.backward()
    assert loss.item() == 0
    assert metrics["ratio_positive"].tokens == 0


@pytest.mark.parametrize("advantage", [2.0, -2.0, 0.0])
def test_on_policy_aspo_grpo_and_reinforce_agree(advantage):
    weights = [weigh(o, [1.0] * 3, [advantage] * 3, [0, 0, 1]).weights for o in (ASPO(), GRPO(), REINFORCE())]
    assert torch.equal(weights[0], weights[1])
    assert torch.equal(weights[0], weights[2])
    assert weights[0].tolist() == [float(advantage != 0)] * 3


@given(st.floats(1e-9, 1.2), st.floats(1e-9, 1.2))
def test_aspo_pushes_a_positive_token_less_the_more_it_has_risen(one, other):
    low, high = sorted((one, other))
    weights = weigh(ASPO(), [low, high], [1.0, 1.0]).weights.tolist()
    assert weights[0] >= weights[1]


@settings(max_examples=200)
@given(st.data())
def test_permuting_tokens_permutes_the_result(data):
    n = data.draw(st.integers(1, 12))
    ratio = data.draw(st.lists(st.floats(1e-4, 50), min_size=n, max_size=n))
    advantages = data.draw(st.lists(st.floats(-3, 3), min_size=n, max_size=n))
    index = data.draw(st.lists(st.integers(0, 3), min_size=n, max_size=n))
    entropy = data.draw(st.lists(st.floats(0, 9), min_size=n, max_size=n, unique=True))
    order = data.draw(st.permutations(range(n)))
    relabel = data.draw(st.permutations(range(4)))
    for objective in [*ALL, ASPO(high_entropy_clip_eps=0.4)]:
        plain = weigh(objective, ratio, advantages, index, entropy)
        shuffled = weigh(
            objective,
            [ratio[i] for i in order],
            [advantages[i] for i in order],
            [relabel[index[i]] for i in order],
            [entropy[i] for i in order],
        )
        for before, after in zip(plain, shuffled, strict=True):
            torch.testing.assert_close(before[list(order)], after, rtol=1e-9, atol=0)


finite = st.floats(
    allow_nan=False, allow_infinity=False, width=32, min_value=-(2.0**99), max_value=2.0**99, allow_subnormal=False
)


@settings(max_examples=300)
@given(st.lists(st.tuples(finite, finite, st.floats(-10, 10, width=32, allow_subnormal=False)), min_size=1, max_size=8))
def test_no_finite_input_gives_nan_or_infinity(tokens):
    logprobs, old, advantages = (torch.tensor(column) for column in zip(*tokens, strict=True))
    logprobs, old = -logprobs.abs().clamp(max=1e4), -old.abs()
    index = torch.arange(len(tokens)) // 2
    for objective in [*ALL, ASPO(dual_clip=None), GRPO(dual_clip=2.0)]:
        leaf = logprobs.clone().requires_grad_()
        loss, metrics = policy_loss(
            objective, leaf, old, advantages, torch.ones_like(old), sequence_index=index, token_entropy=-old
        )
        loss.backward()
        assert loss.isfinite()
        assert leaf.grad.isfinite().all()
        assert all(m.value.isfinite() for m in metrics.values() if m.tokens > 0)


@given(
    st.lists(st.floats(2.0**-126, 2.0**99, width=32), min_size=1, max_size=8),
    st.floats(-5, 5, width=32, allow_subnormal=False),
)
def test_no_finite_ratio_gives_nan_or_infinity(ratios, advantage):
    ratio = torch.tensor(ratios)
    for objective in [*ALL, ASPO(dual_clip=None)]:
        weights = objective.token_weights(
            ratio, torch.full_like(ratio, advantage), sequence_index=torch.zeros(len(ratio), dtype=torch.long)
        ).weights
        assert weights.isfinite().all()
        assert weights.dtype == torch.float32


def test_metrics_are_means_over_tokens_of_each_sign():
    ratio = torch.tensor([0.1, 1.0, 1.3, 0.5, 4.0, 1.0, 1.0], dtype=torch.float64)
    advantages = torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0, -1.0, 0.0], dtype=torch.float64)
    zeros = torch.zeros(7, dtype=torch.float64)
    _, metrics = policy_loss(
        ASPO(), ratio.log(), zeros, advantages, torch.ones(7), sequence_index=torch.zeros(7, dtype=torch.long)
    )
    values = {name: (m.value.item(), m.tokens.item()) for name, m in metrics.items()}
    assert values == {
        "clip_fraction_positive": (pytest.approx(1 / 3), 3),
        "dual_clip_fraction_positive": (pytest.approx(1 / 3), 3),
        "ratio_positive": (pytest.approx(0.8), 3),
        "clip_fraction_negative": (pytest.approx(1 / 3), 3),
        "dual_clip_fraction_negative": (pytest.approx(1 / 3), 3),
        "ratio_negative": (pytest.approx(5.5 / 3), 3),
    }


@pytest.mark.parametrize(
    ("estimator", "value", "slope"),
    [
        ("k1", lambda d: -d, lambda d: -d),
        ("k2", lambda d: d * d / 2, lambda d: -d),
        ("k3", lambda d: math.exp(d) - d - 1, lambda d: 1 - math.exp(d)),
    ],
)
def test_kl_estimators(estimator, value, slope):
    ref = torch.tensor([-1.0, -2.0, -0.5], dtype=torch.float64)
    logprobs = torch.tensor([-1.0, -0.7, -3.0], dtype=torch.float64, requires_grad=True)
    kl = kl_to_reference(logprobs, ref, estimator)
    kl.sum().backward()
    d = [0.0, -1.3, 2.5]  # log pi_ref - log pi
    assert kl.tolist() == pytest.approx([value(x) for x in d], abs=1e-12)
    assert logprobs.grad.tolist() == pytest.approx([slope(x) for x in d], abs=1e-12)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ASPO(clip_eps_low=-0.1), "ASPO.clip_eps_low is -0.1"),
        (lambda: ASPO(clip_eps_high=float("nan")), "clip_eps_high is nan"),
        (lambda: GRPO(clip_eps_low=1.1), "at most 1"),
        (lambda: ASPO(dual_clip=1.0), "dual_clip is 1.0"),
        (lambda: GRPO(dual_clip=0.5), "dual_clip is 0.5"),
        (lambda: ASPO(entropy_quantile=1.5), "0 to 1"),
        (lambda: DAPO(high_entropy_clip_eps=-1.0), "high_entropy_clip_eps is -1.0"),
        (lambda: CISPO(clip_eps_high=-1.0), "clip_eps_high is -1.0"),
        (lambda: CISPO(clip_eps_low=-1.0), "clip_eps_low is -1.0"),
    ],
)
def test_impossible_settings_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def expected_kl(estimator, seed):
    """Value and gradient by the logits of an estimator's mean over the policy's own samples, all tokens enumerated."""
    generator = torch.Generator().manual_seed(seed)
    logits, ref_logits = (2 * torch.randn(2, 11, dtype=torch.float64, generator=generator)).unbind()
    logits.requires_grad_()
    logp, ref = logits.log_softmax(0), ref_logits.log_softmax(0)
    mean = (logp.detach().exp() * kl_to_reference(logp, ref, estimator)).sum()
    (gradient,) = torch.autograd.grad(mean, logits)
    # By hand: dKL(p || q)/dl_v = p_v (log p_v - log q_v - KL), and dKL(q || p)/dl_v = p_v - q_v.
    p, q = logp.detach().exp(), ref.exp()
    kl = (p * (p / q).log()).sum()
    return mean.item(), gradient, kl.item(), p * ((p / q).log() - kl), p - q


@pytest.mark.parametrize("seed", range(3))
def test_k1_and_k2_have_the_gradient_of_the_kl_on_policy_and_k3_that_of_the_reverse_one(seed):
    for estimator in ("k1", "k2", "k3"):
        mean, gradient, kl, of_kl, of_reverse = expected_kl(estimator, seed)
        assert (of_kl - of_reverse).abs().max() > 0.01
        torch.testing.assert_close(gradient, of_reverse if estimator == "k3" else of_kl, rtol=1e-9, atol=1e-12)
        if estimator != "k2":  # k2's value is biased
            assert mean == pytest.approx(kl, rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(d=st.floats(-1000, 1000) | st.floats(-1e-6, 1e-6) | st.sampled_from([-1000.0, 0.0, 19.9, 20.0, 20.1, 1000.0]))
def test_the_kl_gradient_always_points_to_the_reference(dtype, d):
    logprobs = torch.zeros(1, dtype=dtype, requires_grad=True)
    d = torch.tensor([d], dtype=dtype)
    for estimator in ("k1", "k2", "k3"):
        kl = kl_to_reference(logprobs, d, estimator)
        (gradient,) = torch.autograd.grad(kl.sum(), logprobs)
        assert kl.isfinite()
        assert gradient.isfinite()
        assert gradient.sign() == -d.sign()
        assert kl >= 0 or estimator == "k1"


def test_k3_goes_on_evenly_beyond_its_limit():
    d = torch.tensor([20.0, 21.0, 25.0, 1000.0], dtype=torch.float64)
    logprobs = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    kl = kl_to_reference(logprobs, d)
    kl.sum().backward()
    e = math.exp(20)
    assert kl.tolist() == pytest.approx([e - 21, 2 * e - 22, 6 * e - 26, 981 * e - 1001], rel=1e-14)
    assert logprobs.grad.tolist() == pytest.approx([1 - e] * 4, rel=1e-14)


def test_segment_quantiles_at_the_ends():
    values, index = (
        torch.tensor([5.0, 1.0, 9.0, 7.0, 3.0]),
        torch.tensor([0, 2, 4, 2, 5]),
    )  # responses 1 and 3 are empty
    assert segment_quantile(values, index, 0.0).tolist() == [5, 1, 9, 1, 3]
    assert segment_quantile(values, index, 1.0).tolist() == [5, 7, 9, 7, 3]
    assert segment_quantile(values, index, 0.25).tolist() == [5, 2.5, 9, 2.5, 3]
    assert segment_quantile(values, index, 0.25).dtype == torch.float32


def test_the_loss_hands_the_entropy_to_the_objective_and_gives_it_no_gradient():
    entropy = torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0], requires_grad=True)
    logprobs = torch.full((5,), math.log(1.3)).requires_grad_()
    loss, metrics = policy_loss(
        GRPO(high_entropy_clip_eps=0.4),
        logprobs,
        torch.zeros(5),
        torch.ones(5),
        torch.ones(5),
        sequence_index=torch.zeros(5, dtype=torch.long),
        token_entropy=entropy,
    )
    loss.backward()
    assert metrics["clip_fraction_positive"].value.item() == pytest.approx(4 / 5)
    assert logprobs.grad.tolist() == pytest.approx([0, 0, 0, 0, -1.3])
    assert entropy.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.bool])
def test_a_mean_over_tokens_is_at_least_in_float32(dtype):
    values = torch.tensor([1, 0, 1, 1]).to(dtype)
    every, some = token_mean(values), token_mean(values, torch.tensor([True, True, False, False]))
    assert (every.value.item(), every.tokens.item()) == (0.75, 4)
    assert (some.value.item(), some.tokens.item()) == (0.5, 2)
    assert every.value.dtype == some.value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert not token_mean(torch.ones(2, requires_grad=True)).value.requires_grad


def test_what_lies_on_an_edge_is_within():
    for objective in (ASPO(dual_clip=2.0), GRPO(dual_clip=2.0)):
        assert not weigh(objective, [2.0], [-1.0]).dual_clipped.any()
    # No entropy is above the greatest, nor above that of all.
    for quantile, entropy in ((1.0, [1.0, 2.0]), (0.0, [1.0, 1.0]), (0.5, [1.0, 1.0])):
        objective = GRPO(high_entropy_clip_eps=0.4, entropy_quantile=quantile)
        assert weigh(objective, [1.3, 1.3], [1.0, 1.0], [0, 0], entropy).clipped.all()


def test_the_narrowest_and_the_widest_ranges_are_allowed():
    assert weigh(GRPO(0.0, 0.0), [1.0, 1.01], [1.0, 1.0]).clipped.tolist() == [False, True]
    assert weigh(GRPO(1.0, 0.2), [0.0], [-1.0]).clipped.tolist() == [False]

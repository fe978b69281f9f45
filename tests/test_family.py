"""Every objective, in one test: the gradient of an optimizer step against float64 by hand, however the step is split.

By hand: the Jacobian of each token's log-prob by plain transformers, one unshared sequence at a time, and the weights
below, in plain Python from each paper's equation. An objective that isn't listed here makes this file fail.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from aspo_lightning import objectives
from aspo_lightning.advantages import group_advantages
from aspo_lightning.errors import ConfigError
from aspo_lightning.objectives import (
    ASPO,
    CISPO,
    DAPO,
    DPPO,
    GMPO,
    GRPO,
    GSPO,
    REINFORCE,
    SAPO,
    ASPOResponseMean,
    ASPOSoftGate,
    ASPOWithoutMask,
    ClipCov,
    EntropyTopFraction,
    GRPOPositiveMean,
    GRPOWithoutIS,
    Objective,
    Tokens,
    policy_loss,
)
from aspo_lightning.policy.causal_lm import ScoredCausalLM
from aspo_lightning.policy.settings import ModelSettings
from aspo_lightning.rollouts.packing import pack, plan_phase
from aspo_lightning.types import TrainedSequence
from tests.support.commands import ROOT
from tests.support.one_step import AVERAGING, MAX_LENGTH, TEMPERATURE, budgets, drift, make_groups


class Token(NamedTuple):
    """What is known of a token, in float64."""

    sequence: int
    logpi: float
    logold: float
    logmu: float
    advantage: float
    entropy: float

    @property
    def r(self) -> float:
        return math.exp(self.logpi - self.logold)


def mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def masked(weight: Callable[[Token], float], low=0.2, high=0.2) -> Callable[[Token, list[Token]], float]:
    def by_hand(t: Token, response: list[Token]) -> float:
        inside = t.r <= 1 + high if t.advantage > 0 else t.r >= 1 - low
        return weight(t) if inside else 0.0

    return by_hand


def flipped(t: Token) -> float:
    return min(1 / t.r if t.advantage > 0 else t.r, 3.0)


def gate(t: Token) -> float:
    p = 1 / (1 + math.exp(-(1.0 if t.advantage > 0 else 1.05) * (t.r - 1)))
    return 4 * p * (1 - p)


def response_mean(t: Token, response: list[Token], flip: bool) -> float:
    if t.advantage < 0:
        return masked(lambda t: min(t.r, 3.0) if flip else t.r)(t, response)
    r = mean([s.r for s in response])
    return masked(lambda _: min(1 / r, 3.0) if flip else r)(t, response)


def gspo(t: Token, response: list[Token]) -> float:
    s = math.exp(mean([math.log(x.r) for x in response]))
    return s if (s <= 1.05 if t.advantage > 0 else s >= 0.95) else 0.0


def gmpo(t: Token, response: list[Token]) -> float:
    def bounded(x: Token) -> float:
        return min(math.log(x.r), 0.2) if t.advantage > 0 else max(math.log(x.r), -0.2)

    return math.exp(mean([bounded(x) for x in response])) if bounded(t) == math.log(t.r) else 0.0


def dppo(t: Token, kind: str) -> float:
    pi, mu = math.exp(t.logpi), math.exp(t.logmu)
    kl = mu * math.log(mu / pi) + (1 - mu) * math.log((1 - mu) / (1 - pi))
    far = (abs(pi - mu) if kind == "tv" else kl) > 0.003
    away = pi > mu if t.advantage > 0 else pi < mu
    return 0.0 if far and away else min(pi / mu, 1.3)


def quantile(values: list[float], q: float) -> float:
    ordered = sorted(values)
    place = q * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def top_entropy(t: Token, response: list[Token]) -> float:
    high = t.entropy >= quantile([s.entropy for s in response], 0.8)
    return masked(lambda t: t.r, high=0.28)(t, response) if high else 0.0


def clip_cov(batch: list[Token]) -> list[float]:
    """All that may be chosen are: nothing is left to the draw."""
    logpi, advantage = mean([t.logpi for t in batch]), mean([t.advantage for t in batch])
    covariances = [(t.logpi - logpi) * (t.advantage - advantage) for t in batch]
    weights = [masked(lambda t: t.r)(t, []) for t in batch]
    return [0.0 if 0.1 < c < 0.5 else w for c, w in zip(covariances, weights, strict=True)]


def each(rule: Callable[[Token, list[Token]], float]) -> Callable[[list[Token]], list[float]]:
    """Of a rule that looks at a token and its response: the weights of a micro-batch."""

    def by_hand(batch: list[Token]) -> list[float]:
        return [rule(t, [s for s in batch if s.sequence == t.sequence]) if t.advantage else 0.0 for t in batch]

    return by_hand


# The settings put tokens of ``drift`` on both sides of each edge.
BY_HAND: dict[str, tuple[Objective, Callable[[list[Token]], list[float]]]] = {
    "ASPO": (ASPO(), each(masked(flipped))),
    "ASPO, dual clip at 1.2": (
        ASPO(dual_clip=1.2),
        each(masked(lambda t: min(1 / t.r if t.advantage > 0 else t.r, 1.2))),
    ),
    "ASPOWithoutMask": (ASPOWithoutMask(), each(lambda t, _: flipped(t))),
    "ASPOResponseMean": (ASPOResponseMean(), each(lambda t, s: response_mean(t, s, True))),
    "ASPOSoftGate": (ASPOSoftGate(), each(lambda t, _: gate(t) * flipped(t))),
    "GRPO": (GRPO(), each(masked(lambda t: t.r))),
    "DAPO": (DAPO(), each(masked(lambda t: t.r, high=0.28))),
    "GRPOWithoutIS": (GRPOWithoutIS(), each(masked(lambda t: 1.0))),
    "GRPOPositiveMean": (GRPOPositiveMean(), each(lambda t, s: response_mean(t, s, False))),
    "CISPO": (CISPO(0.2, 0.2), each(lambda t, _: min(max(t.r, 0.8), 1.2))),
    "SAPO": (SAPO(), each(lambda t, _: gate(t) * t.r)),
    "GSPO": (GSPO(0.05, 0.05), each(gspo)),
    "GMPO": (GMPO(0.2, 0.2), each(gmpo)),
    "DPPO": (DPPO(delta=0.003, ratio_cap=1.3), each(lambda t, _: dppo(t, "tv"))),
    "DPPO, KL": (DPPO("kl", 0.003, 1.3), each(lambda t, _: dppo(t, "kl"))),
    "EntropyTopFraction": (EntropyTopFraction(), each(top_entropy)),
    "ClipCov": (ClipCov(fraction=1.0, cov_low=0.1, cov_high=0.5), clip_cov),
    "REINFORCE": (REINFORCE(), each(lambda t, _: 1.0)),
}


def concrete(kind: type) -> set[type]:
    found = {kind} if kind.__module__.startswith(objectives.__name__) and not kind.__abstractmethods__ else set()
    return found.union(*(concrete(sub) for sub in kind.__subclasses__()))


def test_every_objective_has_its_weights_by_hand():
    assert {type(objective) for objective, _ in BY_HAND.values()} == concrete(Objective)
    assert {kind.__name__ for kind in concrete(Objective)} <= set(objectives.__all__)


@pytest.fixture(scope="module")
def truth(tiny_model):
    """Each sequence's tokens and the Jacobian of their log-probs by all weights, in float64, unshared."""
    lm = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float64)
    groups = make_groups()
    rewards = torch.tensor([[r.reward for r in g.rollouts] for g in groups])
    advantages = group_advantages(rewards, spread=torch.ones(len(groups), dtype=torch.bool))
    tokens, jacobian = [], []
    rollouts = [(g, s) for g in range(len(groups)) for s in range(len(groups[g].rollouts))]
    for sequence, (g, s) in enumerate(rollouts):
        prompt, completion = groups[g].prompt.prompt_ids, groups[g].rollouts[s].completion_ids
        logits = lm(input_ids=torch.tensor([[*prompt, *completion]])).logits[0, len(prompt) - 1 : -1] / TEMPERATURE
        logp = logits.log_softmax(-1)
        for t, token in enumerate(completion):
            gradients = torch.autograd.grad(logp[t, token], list(lm.parameters()), retain_graph=True)
            jacobian.append(torch.cat([gradient.flatten() for gradient in gradients]))
            logpi, entropy = logp[t, token].item(), -(logp[t].exp() * logp[t]).sum().item()
            old, mu = logpi + drift(token, 7), logpi + drift(token, 5)
            tokens.append(Token(sequence, logpi, old, mu, advantages[g, s].item(), entropy))
    return tokens, torch.stack(jacobian)


@pytest.fixture(scope="module")
def steps(tiny_model):
    """By (ranks, k, shared): the micro-batches of each rank, with the Jacobian of their log-probs by the model here."""
    model = ScoredCausalLM.from_pretrained(tiny_model, ModelSettings(dtype="float64"))
    parameters = list(model.parameters())
    groups, made = make_groups(), {}
    rewards = torch.tensor([[r.reward for r in g.rollouts] for g in groups])
    advantages = group_advantages(rewards, spread=torch.ones(len(groups), dtype=torch.bool))
    sequences = [
        TrainedSequence(g.prompt.prompt_ids, r, advantages[i, s].item())
        for i, g in enumerate(groups)
        for s, r in enumerate(g.rollouts)
    ]
    lengths = [(len(g.prompt.prompt_ids), [len(r.completion_ids) for r in g.rollouts]) for g in groups]
    for shared in (True, False):
        model.packs = shared
        for ranks in (1, 2):
            for k in (1, 2, 4, 8):
                plan = plan_phase(
                    lengths,
                    optimizer_steps=1,
                    world_size=ranks,
                    token_budget=budgets(shared)[ranks, k],
                    shared=shared,
                )
                assert plan.accumulate == k
                rows = [pack(sequences, plan, "token_mean", MAX_LENGTH, rank, ranks) for rank in range(ranks)]
                found = []
                for row in (row for of_rank in rows for row in of_rank):
                    logprobs, entropy = model(row, temperature=TEMPERATURE)
                    jacobian = torch.stack(
                        [
                            torch.cat([g.flatten() for g in torch.autograd.grad(x, parameters, retain_graph=True)])
                            for x in logprobs
                        ]
                    )
                    found.append((row, logprobs.detach(), entropy.detach(), jacobian))
                made[ranks, k, shared] = (sequences, plan, found)
    return made


def weights_of(averaging: str, lengths: Sequence[int]) -> list[float]:
    return {
        "token_mean": [1 / sum(lengths)] * len(lengths),
        "sequence_mean": [1 / (len(lengths) * n) for n in lengths],
        "sequence_sum": [1 / (len(lengths) * MAX_LENGTH)] * len(lengths),
    }[averaging]


@pytest.mark.parametrize("name", BY_HAND)
def test_the_gradient_is_that_by_hand_however_the_step_is_split(name, truth, steps):
    objective, by_hand = BY_HAND[name]
    tokens, jacobian = truth
    lengths = [sum(t.sequence == i for t in tokens) for i in range(tokens[-1].sequence + 1)]
    rows_of = [[n for n, t in enumerate(tokens) if t.sequence == i] for i in range(len(lengths))]
    for averaging in AVERAGING:
        loss_weights = weights_of(averaging, lengths)
        for (ranks, k, shared), (sequences, plan, rows) in steps.items():
            packed = [pack(sequences, plan, averaging, MAX_LENGTH, rank, ranks) for rank in range(ranks)]
            ours, expected = 0, 0
            for row, (_, logprobs, entropy, own) in zip([r for of in packed for r in of], rows, strict=True):
                drifts = torch.tensor([[drift(t, f) for t in row.targets.tolist()] for f in (7, 5)]).double()
                leaf = logprobs.clone().requires_grad_()
                loss, _ = policy_loss(
                    objective,
                    leaf,
                    logprobs + drifts[0],
                    row.advantages,
                    row.loss_weights,
                    sequence_index=row.sequence_index,
                    token_entropy=entropy,
                    generator_logprobs=logprobs + drifts[1],
                )
                (gradient,) = torch.autograd.grad(loss, leaf)
                ours = ours + gradient @ own / (k * ranks)  # as Lightning divides by k, and averages over ranks
                there = [n for member in row.members for n in rows_of[member]]
                weights = by_hand([tokens[n] for n in there])
                each = [
                    -loss_weights[tokens[n].sequence] * w * tokens[n].advantage
                    for n, w in zip(there, weights, strict=True)
                ]
                expected = expected + torch.tensor(each, dtype=torch.float64) @ jacobian[there]
            assert expected.norm() > 1e-4
            error = ((ours - expected).norm() / expected.norm()).item()
            assert error <= 1e-6, (averaging, ranks, k, shared, error)


def test_the_settings_put_tokens_on_both_sides_of_every_edge(truth):
    tokens, _ = truth
    fields = {
        name: torch.tensor([getattr(t, of) for t in tokens], dtype=torch.float64)
        for name, of in (
            ("logprobs", "logpi"),
            ("old_logprobs", "logold"),
            ("generator_logprobs", "logmu"),
            ("advantages", "advantage"),
            ("token_entropy", "entropy"),
        )
    }
    index = torch.tensor([t.sequence for t in tokens])
    for name, (objective, _) in BY_HAND.items():
        weights, clipped, dual = objective.weigh(Tokens.of(**fields, sequence_index=index))
        for sign in (1, -1):
            of_sign = fields["advantages"] * sign > 0
            if name not in ("ASPOWithoutMask", "ASPOSoftGate", "SAPO", "REINFORCE"):  # which have no edge but a limit
                assert 0 < clipped[of_sign].double().mean() < 1, (name, sign)
            assert len(set(weights[of_sign].tolist())) > 1 or name == "REINFORCE"
        if name == "ASPO, dual clip at 1.2":
            assert dual.any()


def surrogate(name: str, logp, old, mu, a, index):
    """The papers' own objectives, whose gradient autograd makes; None where the paper gives the gradient itself."""
    r = (logp - old).exp()

    def of_response(values):
        return torch.stack([values[index == i].mean() for i in range(int(index.max()) + 1)])

    def over_tokens(values):  # a sum over tokens of what is a mean over each response's tokens
        return (values * torch.bincount(index)).sum()

    if name == "SAPO":
        tau = torch.where(a > 0, 1.0, a.new_tensor(1.05))
        return ((4 / tau) * (tau * (r - 1)).sigmoid() * a).sum()
    if name == "GSPO":
        s = of_response(logp - old).exp()
        of = of_response(a)
        return over_tokens(torch.minimum(s * of, s.clamp(0.95, 1.05) * of))
    if name == "GMPO":
        sign = a.sign()
        bounded = sign * torch.minimum(sign * (logp - old), (sign * (logp - old)).clamp(-0.2, 0.2))
        return over_tokens(of_response(bounded).exp() * of_response(a))
    if name.startswith("DPPO"):
        pi, p, q = (logp - mu).exp(), mu.exp(), logp.exp().detach()
        kl = torch.distributions.kl_divergence(torch.distributions.Bernoulli(p), torch.distributions.Bernoulli(q))
        far = ((p - q).abs() if name == "DPPO" else kl) > 0.003
        away = ((a > 0) & (pi > 1)) | ((a < 0) & (pi < 1))
        return (~(far & away) * pi.detach().clamp(max=1.3) * logp * a).sum()
    if name == "CISPO":
        return (r.clamp(0.8, 1.2).detach() * logp * a).sum()
    if name == "ClipCov":
        covariance = ((logp - logp.mean()) * (a - a.mean())).detach()
        chosen = (covariance > 0.1) & (covariance < 0.5)
        return (~chosen * torch.minimum(r * a, r.clamp(0.8, 1.2) * a)).sum()
    if name in ("GRPO", "DAPO"):
        return torch.minimum(r * a, r.clamp(0.8, 1.2 if name == "GRPO" else 1.28) * a).sum()
    if name == "ASPO":
        pi, old = logp.exp(), old.exp()
        flip = torch.where(a > 0, old * pi / pi.detach().square(), r)
        soft = torch.where(flip.detach() > 3, flip / flip.detach() * 3, flip)
        return torch.where(((a > 0) & (r > 1.2)) | ((a < 0) & (r < 0.8)), 0.0, soft * a).sum()
    return None


SURROGATES = ("ASPO", "GRPO", "DAPO", "CISPO", "SAPO", "GSPO", "GMPO", "DPPO", "DPPO, KL", "ClipCov")


def test_of_a_completion_the_tokens_of_highest_entropy_are_never_none():
    """As its authors' code takes ceil(fraction * N) of them; a fraction of 1 is DAPO."""
    index = torch.tensor([0, 1, 1, 1, 2, 2, 2, 2, 2, 2])
    entropy = torch.tensor([0.3, 0.0, 0.0, 0.0, 0.1, 0.6, 0.2, 0.5, 0.4, 0.3], dtype=torch.float64)
    ones = torch.ones(10, dtype=torch.float64)
    weights = EntropyTopFraction().token_weights(ones, ones, sequence_index=index, token_entropy=entropy).weights
    assert weights.tolist() == [1, 1, 1, 1, 0, 1, 0, 1, 0, 0]
    whole = EntropyTopFraction(top_fraction=1.0)
    assert whole.token_weights(ones, ones, sequence_index=index, token_entropy=entropy).weights.tolist() == [1] * 10


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_token_that_a_mask_has_cut_counts_in_gmpos_ratio_by_the_side_of_its_completion(sign):
    ratio = torch.tensor([1.0, 2.0], dtype=torch.float64).log().mul(sign).mul(3).exp()
    advantages = torch.tensor([sign, 0.0], dtype=torch.float64)
    weights = GMPO().token_weights(ratio, advantages, sequence_index=torch.zeros(2, dtype=torch.long)).weights
    assert weights.tolist() == pytest.approx([math.exp(sign * 0.4 / 2), 0])


@pytest.mark.parametrize("name", SURROGATES)
def test_the_gradient_is_that_of_the_papers_surrogate_by_autograd(name):
    generator = torch.Generator().manual_seed(0)
    index = torch.arange(400).repeat_interleave(10)
    draw = lambda *size: torch.randn(*size, dtype=torch.float64, generator=generator)  # noqa: E731
    old = -3 * torch.rand(4000, dtype=torch.float64, generator=generator) - 0.05
    mu = (old + 0.1 * draw(4000)).clamp(max=-1e-3)
    logprobs = (old + (0.3 if name != "ASPO" else 1.5) * draw(4000)).clamp(max=-1e-3).requires_grad_()
    advantages = draw(400)[index]
    ones = torch.ones(4000, dtype=torch.float64)
    loss, _ = policy_loss(
        BY_HAND[name][0], logprobs, old, advantages, ones, sequence_index=index, generator_logprobs=mu
    )
    (ours,) = torch.autograd.grad(loss, logprobs)
    (theirs,) = torch.autograd.grad(-surrogate(name, logprobs, old, mu, advantages, index), logprobs)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@given(st.floats(0.05, 20), st.floats(-3, 3))
def test_a_soft_gate_weighs_most_near_a_ratio_of_1_and_never_nothing(ratio, advantage):
    def weight(objective, r):
        one = torch.tensor([r], dtype=torch.float64)
        return objective.token_weights(
            one, one.new_tensor([advantage]), sequence_index=torch.tensor([0])
        ).weights.item()

    assert weight(SAPO(), 1.0) == (advantage != 0)
    assert weight(ASPOSoftGate(), 1.0) == (advantage != 0)
    assert weight(SAPO(), ratio) <= ratio * (1 + 1e-12)
    if advantage:
        assert weight(SAPO(), ratio) > 0
        assert weight(ASPOSoftGate(), ratio) <= weight(ASPOWithoutMask(), ratio)


@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=8), st.sampled_from([1.0, -1.0]))
def test_gmpo_weighs_no_token_beyond_its_range(ratios, advantage):
    ratio = torch.tensor(ratios, dtype=torch.float64)
    weights, clipped, _ = GMPO().token_weights(
        ratio, torch.full_like(ratio, advantage), sequence_index=torch.zeros(len(ratios), dtype=torch.long)
    )
    beyond = ratio.log() > 0.4 if advantage > 0 else ratio.log() < -0.4
    assert torch.equal(clipped, beyond)
    assert (weights[beyond] == 0).all()
    if advantage > 0:  # the geometric mean of clipped ratios
        assert (weights <= math.exp(0.4) * (1 + 1e-12)).all()


def test_a_likely_token_leaves_dppos_region_at_a_ratio_at_which_a_rare_one_stays():
    mu = torch.tensor([0.001, 0.5], dtype=torch.float64)
    weights = DPPO().weigh(
        Tokens.of((1.6 * mu).log(), mu.log(), torch.ones(2).double(), torch.tensor([0, 1]), generator_logprobs=mu.log())
    )
    assert weights.clipped.tolist() == [False, True]
    assert weights.weights.tolist() == [pytest.approx(1.6), 0]


def test_clip_cov_chooses_so_many_and_the_same_again():
    count = 5000
    generator = torch.Generator().manual_seed(0)
    logprobs = -5 * torch.rand(count, dtype=torch.float64, generator=generator)
    advantages = torch.randn(count, dtype=torch.float64, generator=generator)
    tokens = Tokens.of(logprobs, logprobs, advantages, torch.arange(count))
    objective = ClipCov(fraction=0.002, cov_low=0.5, cov_high=1.5)
    covariance = (logprobs - logprobs.mean()) * (advantages - advantages.mean())
    weights, clipped, _ = objective.weigh(tokens)
    assert clipped.sum() == 10
    assert ((covariance[clipped] > 0.5) & (covariance[clipped] < 1.5)).all()
    assert torch.equal(objective.weigh(tokens).clipped, clipped)
    assert (weights[clipped] == 0).all()
    assert ClipCov(fraction=0.0, cov_low=0.5, cov_high=1.5).weigh(tokens).clipped.sum() == 1  # at least one


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"advantages": torch.zeros(2)}, r"advantages is \[2\] and the ratio \[3\]"),
        ({"advantages": torch.zeros(3, 1)}, r"advantages is \[3, 1\]"),
        ({"advantages": torch.tensor([1, 0, -1])}, "advantages is torch.int64"),
        ({"sequence_index": torch.zeros(3)}, "sequence_index is torch.float32; it must hold integers"),
        ({"token_entropy": torch.zeros(4)}, r"token_entropy is \[4\]"),
        ({"generator_logprobs": torch.zeros(3, 3)}, r"generator_logprobs is \[3, 3\]"),
    ],
)
def test_what_doesnt_fit_is_refused_at_the_door(change, message):
    fits = {
        "logprobs": torch.zeros(3),
        "old_logprobs": torch.zeros(3),
        "advantages": torch.ones(3),
        "loss_weights": torch.ones(3),
        "sequence_index": torch.zeros(3, dtype=torch.long),
    }
    policy_loss(ASPO(), **fits)
    with pytest.raises(ValueError, match=message):
        policy_loss(ASPO(), **fits | change)


def test_tokens_know_their_place_in_their_response_and_carry_no_gradient():
    index = torch.tensor([1, 0, 1, 1, 0])
    logprobs = torch.zeros(5, requires_grad=True)
    tokens = Tokens.of(logprobs, torch.zeros(5), torch.ones(5), index)
    assert tokens.position.tolist() == [0, 0, 1, 2, 1]
    assert not tokens.logprobs.requires_grad
    with pytest.raises(ValueError, match="a weight must not"):
        Tokens(logprobs.exp(), torch.ones(5), index)


@pytest.mark.parametrize("objective", [DPPO(), EntropyTopFraction(), ClipCov()], ids=lambda o: type(o).__name__)
def test_what_an_objective_needs_is_named(objective):
    one = torch.ones(1)
    with pytest.raises(ValueError, match="needs (generator_logprobs|token_entropy|logprobs), which"):
        objective.token_weights(one, one, sequence_index=torch.zeros(1, dtype=torch.long))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SAPO(tau_negative=0.0), "SAPO.tau_negative is 0.0; it must be above 0"),
        (lambda: ASPOSoftGate(dual_clip=1.0), "ASPOSoftGate.dual_clip is 1.0"),
        (lambda: ASPOWithoutMask(dual_clip=0.5), "ASPOWithoutMask.dual_clip is 0.5"),
        (lambda: GMPO(clip_eps_low=-1.0), "GMPO.clip_eps_low is -1.0"),
        (lambda: DPPO(delta=math.inf), "DPPO.delta is inf"),
        (
            lambda: EntropyTopFraction(top_fraction=1.5),
            "EntropyTopFraction.top_fraction is 1.5; it must be from 0 to 1",
        ),
        (lambda: ClipCov(cov_low=5.0), "ClipCov.cov_low is 5.0 and cov_high 5.0"),
    ],
)
def test_impossible_settings_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_the_readmes_objective_is_sapo():
    """Run as printed, on tokens of both signs."""
    section = (ROOT / "README.md").read_text().partition("## Add an objective")[2]
    code = re.search(r"```python\n(.*?)```", section, re.DOTALL)[1]
    names = {"torch": torch, "dataclass": dataclass, **vars(objectives)}
    exec(code, names)
    generator = torch.Generator().manual_seed(0)
    logprobs, old, advantages = torch.randn(3, 200, dtype=torch.float64, generator=generator)
    tokens = Tokens.of(logprobs, old, advantages, torch.arange(200))
    for ours, printed in zip(SAPO().weigh(tokens), names["SoftGate"]().weigh(tokens), strict=True):
        torch.testing.assert_close(printed, ours, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", BY_HAND)
@given(
    tokens=st.lists(
        st.tuples(*[st.floats(-1e4, 0, width=32)] * 3, st.floats(-10, 10, width=32, allow_subnormal=False)), max_size=8
    )
)
def test_no_finite_tokens_and_no_missing_ones_give_nan_or_infinity(name, tokens):
    logprobs, old, mu, advantages = torch.tensor(tokens).reshape(-1, 4).unbind(1)
    leaf = logprobs.clone().requires_grad_()
    loss, _ = policy_loss(
        BY_HAND[name][0],
        leaf,
        old,
        advantages,
        torch.ones_like(old),
        sequence_index=torch.arange(len(tokens)) // 2,
        token_entropy=-old,
        generator_logprobs=mu,
    )
    loss.backward()
    assert loss.isfinite()
    assert leaf.grad.isfinite().all()

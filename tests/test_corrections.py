"""Corrections of the mismatch: weights by hand, and their bias and variance where all completions can be enumerated."""

import math
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from aspo_lightning.engines import TransformersEngine
from aspo_lightning.engines.base import SamplingRequest
from aspo_lightning.errors import ConfigError
from aspo_lightning.rollouts.corrections import (
    Bypass,
    Correction,
    EffectiveSampleSize,
    MaskedRatio,
    TruncatedRatio,
    correct,
)
from aspo_lightning.types import MicroBatch
from tests.support.ranks import in_forks

LOG_RATIOS = [[math.log(c) for c in (0.2, 1.0, 1.8, 5.0)], [math.log(c) for c in (0.5, 1.5)]]
SEQUENCE = [0.2 * 1.8 * 5.0, 0.75]
MEAN = [SEQUENCE[0] ** (1 / 4), SEQUENCE[1] ** (1 / 2)]

WEIGHTS = {
    TruncatedRatio(): [0.2, 1.0, 1.8, 2.0, 0.5, 1.5],
    TruncatedRatio(1.7): [0.2, 1.0, 1.7, 1.7, 0.5, 1.5],
    TruncatedRatio(1.5, "sequence"): [1.5] * 4 + [SEQUENCE[1]] * 2,
    TruncatedRatio(1.1, "geometric_mean"): [1.1] * 4 + [MEAN[1]] * 2,
    MaskedRatio(): [0.0, 1.0, 1.8, 0.0, 0.5, 1.5],
    MaskedRatio(0.5, 1.75, "sequence"): [0.0] * 4 + [SEQUENCE[1]] * 2,
    MaskedRatio(0.9, 2.0, "geometric_mean"): [MEAN[0]] * 4 + [0.0] * 2,
    Bypass(): [1.0] * 6,
}
CUT = {
    TruncatedRatio(): 1,
    TruncatedRatio(1.7): 2,
    TruncatedRatio(1.5, "sequence"): 4,
    TruncatedRatio(1.1, "geometric_mean"): 4,
    MaskedRatio(): 2,
    MaskedRatio(0.5, 1.75, "sequence"): 4,
    MaskedRatio(0.9, 2.0, "geometric_mean"): 2,
    Bypass(): 0,
}


def batch(log_ratios, advantages):
    """Responses whose tokens the trainer and the engine see so far apart."""
    made = MicroBatch.from_sequences(
        [([1], [2] * len(r)) for r in log_ratios],
        advantages=advantages,
        generator_logprobs=[[-1.0] * len(r) for r in log_ratios],
    )
    old = torch.tensor([x for r in log_ratios for x in r]) - 1
    return replace(made, old_logprobs=old)


def test_every_correction_is_by_hand_here():
    assert {type(correction) for correction in WEIGHTS} == set(Correction.__subclasses__())


@pytest.mark.parametrize("correction", WEIGHTS, ids=str)
def test_advantages_are_weighed_and_what_that_did_is_measured(correction):
    weights, n = WEIGHTS[correction], 6
    (corrected,), effect = correct([batch(LOG_RATIOS, [-3.0, 2.0])], correction)
    expected = [a * w for a, w in zip([-3.0] * 4 + [2.0] * 2, weights, strict=True)]
    assert corrected.advantages.tolist() == pytest.approx(expected, rel=1e-5)
    assert effect == {
        "mismatch/cut_fraction": pytest.approx(CUT[correction] / n),
        "mismatch/corrected_sample_size": pytest.approx(
            sum(weights) ** 2 / (n * sum(w * w for w in weights)), rel=1e-5
        ),
    }


def test_without_a_correction_nothing_changes_and_nothing_is_measured():
    rows = [batch(LOG_RATIOS, [1.0, 1.0])]
    assert correct(rows, None) == (rows, {})


def test_without_tokens_nothing_is_measured():
    empty = MicroBatch.from_sequences([])
    _, effect = correct([replace(empty, old_logprobs=torch.zeros(0))], TruncatedRatio())
    assert effect == {}


def test_the_effect_is_that_of_all_ranks(tmp_path):
    rows = [batch([ratios], [1.0]) for ratios in LOG_RATIOS]
    _, together = correct(rows, MaskedRatio())
    found = in_forks(tmp_path, 2, lambda rank: correct([rows[rank]], MaskedRatio())[1])
    assert found == [together] * 2


def test_differences_beyond_any_bound_stay_finite():
    (far,), _ = correct([batch([[-25.0], [25.0]], [1.0, 1.0])], TruncatedRatio(high=1e30))
    assert far.advantages.tolist() == pytest.approx([math.exp(-20), math.exp(20)], rel=1e-5)
    (one,), effect = correct([batch([[0.0]], [1.0])], MaskedRatio(1.0, 1.0))
    assert (one.advantages.tolist(), effect["mismatch/cut_fraction"]) == ([1.0], 0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TruncatedRatio(high=0.9), "TruncatedRatio.high is 0.9"),
        (lambda: TruncatedRatio(high=math.nan), "TruncatedRatio.high is nan"),
        (lambda: MaskedRatio(low=1.1), "MaskedRatio.low is 1.1 and high 2.0"),
        (lambda: MaskedRatio(high=0.5), "must enclose 1"),
    ],
)
def test_impossible_bounds_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


PROMPT = (5, 9, 17)
SAMPLES = 6000
TRIED = [
    TruncatedRatio(math.inf),
    TruncatedRatio(math.inf, "sequence"),
    TruncatedRatio(math.inf, "geometric_mean"),
    *(TruncatedRatio(1.01, level) for level in ("token", "sequence", "geometric_mean")),
    *(MaskedRatio(0.985, 1.02, level) for level in ("token", "sequence", "geometric_mean")),
    Bypass(),
]


@pytest.fixture(scope="module")
def known(tiny_model):
    """Log-probs of all completions of two tokens, [first, second, token], by a float32 trainer and a 16-bit engine."""
    found = {}
    prompts = [[*PROMPT, first] for first in range(128)]
    for name, dtype in (("trainer", torch.float32), ("engine", torch.bfloat16)):
        lm = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=dtype)
        with torch.no_grad():
            logits = lm(input_ids=torch.tensor(prompts)).logits[:, -2:].double()
        first, second = (3 * logits).log_softmax(-1).unbind(1)  # sharper than a random model is
        found[name] = torch.stack([first[0].unsqueeze(1).expand(-1, 128), second], -1)
    return found


VALUE = torch.tensor([[((7 * a + 3 * b) % 11) / 11 for b in range(128)] for a in range(128)], dtype=torch.float64)


def expectation(correction, known):
    """Mean, variance and fourth central moment of weight x value over the engine's completions.

    By the definition, of the last token's weight.
    """
    old, mu = known["trainer"], known["engine"]
    ratio = old - mu
    level = getattr(correction, "level", "token")
    c = {"token": ratio[..., 1], "sequence": ratio.sum(-1), "geometric_mean": ratio.mean(-1)}[level].exp()
    if isinstance(correction, TruncatedRatio):
        weight = torch.minimum(c, torch.full_like(c, correction.high))
    elif isinstance(correction, MaskedRatio):
        weight = torch.where((c < correction.low) | (c > correction.high), 0.0, c)
    else:
        weight = torch.ones_like(c)
    p = mu.sum(-1).exp()
    mean = (p * weight * VALUE).sum()
    apart = weight * VALUE - mean
    return mean.item(), (p * apart**2).sum().item(), (p * apart**4).sum().item()


def estimates(correction, completions, known):
    """What ``correct`` makes of the values of these completions."""
    first, second = completions.unbind(1)
    logprobs = {name: values[first, second].float().tolist() for name, values in known.items()}
    made = MicroBatch.from_sequences(
        [(PROMPT, pair) for pair in completions.tolist()],
        advantages=VALUE[first, second].tolist(),
        generator_logprobs=logprobs["engine"],
    )
    old = torch.tensor([x for pair in logprobs["trainer"] for x in pair])
    (corrected,), _ = correct([replace(made, old_logprobs=old)], correction)
    return corrected.advantages[1::2].double()


def test_an_effective_sample_size_is_that_of_all_tokens_whose_ratio_is_a_number():
    size = EffectiveSampleSize()
    for ratios in ([1.0, 2.0, math.nan], [0.0, 1.0]):
        size.update(torch.tensor(ratios).log())
    assert size.compute() == pytest.approx(4**2 / (4 * 6))


@pytest.mark.parametrize("correction", TRIED, ids=str)
def test_over_all_completions_the_estimate_has_the_bias_that_its_definition_says(correction, known):
    mean, variance, _ = expectation(correction, known)
    every = torch.cartesian_prod(torch.arange(128), torch.arange(128))
    p = known["engine"].sum(-1).exp().flatten()
    estimate = estimates(correction, every, known)
    assert (p * estimate).sum().item() == pytest.approx(mean, rel=1e-5)
    assert (p * (estimate - mean).square()).sum().item() == pytest.approx(variance, rel=1e-4)
    truth = (known["trainer"].sum(-1).exp() * VALUE).sum().item()
    unbiased = correction == TruncatedRatio(math.inf, "sequence")
    assert (abs(mean - truth) < 1e-9) == unbiased  # importance sampling; all others are biased, by as much as said


@pytest.mark.parametrize("correction", TRIED, ids=str)
def test_over_drawn_completions_the_estimate_has_that_mean_and_variance(correction, known):
    mean, variance, fourth = expectation(correction, known)
    p = known["engine"].sum(-1).exp().flatten()
    drawn = torch.multinomial(p, SAMPLES, replacement=True, generator=torch.Generator().manual_seed(0))
    estimate = estimates(correction, torch.stack([drawn // 128, drawn % 128], 1), known)
    assert estimate.mean().item() == pytest.approx(mean, abs=4 * math.sqrt(variance / SAMPLES))
    assert estimate.var().item() == pytest.approx(variance, abs=4 * math.sqrt((fourth - variance**2) / SAMPLES))


def test_a_16_bit_engine_is_corrected_to_the_trainers_expectation(tiny_model):
    """Completions from the engine itself, with its own log-probs."""
    engine = TransformersEngine(dtype="bfloat16", batch_size=500)
    engine.start(tiny_model, context_length=16)
    completions = dict(engine.generate([SamplingRequest(PROMPT, 1, seed, temperature=1.0) for seed in range(3000)]))
    trainer = AutoModelForCausalLM.from_pretrained(tiny_model)
    with torch.no_grad():
        old = trainer(input_ids=torch.tensor([PROMPT])).logits[0, -1].log_softmax(-1)
    tokens = torch.tensor([completions[i].completion_ids[0] for i in range(3000)])
    made = MicroBatch.from_sequences(
        [(PROMPT, [token]) for token in tokens.tolist()],
        advantages=VALUE[0, tokens].tolist(),
        generator_logprobs=[completions[i].generator_logprobs for i in range(3000)],
    )
    (corrected,), effect = correct([replace(made, old_logprobs=old[tokens])], TruncatedRatio(math.inf))
    truth = (old.exp() * VALUE[0]).sum().item()
    error = corrected.advantages.std().item() / math.sqrt(3000)
    assert corrected.advantages.mean().item() == pytest.approx(truth, abs=4 * error)
    assert 0.99 < effect["mismatch/corrected_sample_size"] < 1  # near, and not the same

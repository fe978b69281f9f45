"""The gradient of an optimizer step is the same however it is split, and is the one derived by hand in float64."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from aspo_lightning.advantages import group_advantages
from tests.support.one_step import (
    AVERAGING,
    ENTROPY_COEF,
    KL_COEF,
    MAX_LENGTH,
    SHARDED,
    TEMPERATURE,
    drift,
    make_groups,
)
from tests.support.ranks import Ranks


def gradient_by_hand(model: str, averaging: str) -> torch.Tensor:
    """ASPO + k3 + entropy bonus from the paper's equations, one sequence at a time, in float64."""
    lm = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)
    groups = make_groups()
    rewards = torch.tensor([[r.reward for r in g.rollouts] for g in groups])
    advantages = group_advantages(rewards, spread=torch.ones(len(groups), dtype=torch.bool))
    lengths = [len(r.completion_ids) for g in groups for r in g.rollouts]
    total = 0
    for g, group in enumerate(groups):
        for s, rollout in enumerate(group.rollouts):
            prompt, completion = list(group.prompt.prompt_ids), list(rollout.completion_ids)
            logits = lm(input_ids=torch.tensor([prompt + completion])).logits[0] / TEMPERATURE
            logp = logits.log_softmax(-1)[len(prompt) - 1 : -1]
            per_token = 0
            for t, token in enumerate(completion):
                # old = current + drift, so r = exp(-drift); likewise for the reference
                r, a = float(torch.tensor(-drift(token, 7)).exp()), advantages[g, s].item()
                w = (min(1 / r, 3) if r <= 1.2 else 0) if a > 0 else (min(r, 3) if r >= 0.8 else 0)
                d = logp[t, token].detach() + drift(token, 3) - logp[t, token]
                k3 = d.exp() - d - 1
                entropy = -(logp[t].exp() * logp[t]).sum()
                per_token = per_token - w * a * logp[t, token] + KL_COEF * k3 - ENTROPY_COEF * entropy
            weight = {
                "token_mean": 1 / sum(lengths),
                "sequence_mean": 1 / (len(lengths) * len(completion)),
                "sequence_sum": 1 / (len(lengths) * MAX_LENGTH),
            }[averaging]
            total = total + weight * per_token
    total.backward()
    return torch.cat([p.grad.flatten() for p in lm.parameters()])


@pytest.fixture(scope="module")
def gradients(tiny_model, tmp_path_factory):
    folder, results = tmp_path_factory.mktemp("gradients"), {}
    with Ranks(2, folder) as ranks:
        for number in (1, 2):
            out = folder / f"{number}.pt"
            arguments = [tiny_model, str(out), str(number)]
            ranks.run(f"ranks_{number}", arguments, module="tests.support.one_step", first=number)
            results[number] = torch.load(out)
    return results


@pytest.mark.parametrize("averaging", AVERAGING)
@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-6), ("float32", 1e-4)])
def test_the_gradient_does_not_depend_on_the_split(gradients, tiny_model, averaging, dtype, tolerance):
    expected = gradient_by_hand(tiny_model, averaging)
    assert expected.norm() > 1e-3
    for ranks in (1, 2):
        for k in (1, 2, 4, 8):
            for packs in (True, False):
                gradient = gradients[ranks][dtype, averaging, k, packs].double()
                error = ((gradient - expected).norm() / expected.norm()).item()
                assert error <= tolerance, (ranks, k, packs, error)


@pytest.mark.parametrize("way", ["recomputed", *SHARDED, "sharded, recomputed"])
def test_the_gradient_does_not_depend_on_how_memory_is_saved(gradients, tiny_model, way):
    expected = gradient_by_hand(tiny_model, "token_mean")
    for ranks in (1, 2):
        for k in (1, 4):
            error = ((gradients[ranks][way, k] - expected).norm() / expected.norm()).item()
            assert error <= 1e-6, (ranks, k, error)

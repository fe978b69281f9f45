"""The gradient of an optimizer step is the same however it is split, and is the one derived by hand in float64."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from aspo_lightning.advantages import group_advantages
from aspo_lightning.policy.weights import add_lora
from tests.support.models import save_experts
from tests.support.one_step import (
    AVERAGING,
    ENTROPY_COEF,
    KL_COEF,
    LORA,
    MAX_LENGTH,
    SHARDED,
    TEMPERATURE,
    drift,
    make_groups,
    move_adapters,
)
from tests.support.ranks import Ranks


def gradient_by_hand(model: str, averaging: str, lora: bool = False) -> torch.Tensor:
    """ASPO + k3 + entropy bonus from the paper's equations, one sequence at a time, in float64."""
    reference, lm = (AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64) for _ in range(2))
    for each in (reference, lm):
        each.set_experts_implementation("eager")  # the other one takes no float64
    if lora:
        add_lora(lm, LORA["lora_rank"], LORA["lora_alpha"])
        move_adapters(lm)
    groups = make_groups()
    rewards = torch.tensor([[r.reward for r in g.rollouts] for g in groups])
    advantages = group_advantages(rewards, spread=torch.ones(len(groups), dtype=torch.bool))
    lengths = [len(r.completion_ids) for g in groups for r in g.rollouts]
    total = 0
    for g, group in enumerate(groups):
        for s, rollout in enumerate(group.rollouts):
            prompt, completion = list(group.prompt.prompt_ids), list(rollout.completion_ids)
            ids = torch.tensor([prompt + completion])
            logp = (lm(input_ids=ids).logits[0] / TEMPERATURE).log_softmax(-1)[len(prompt) - 1 : -1]
            with torch.no_grad():
                ref = (reference(input_ids=ids).logits[0] / TEMPERATURE).log_softmax(-1)[len(prompt) - 1 : -1]
            per_token = 0
            for t, token in enumerate(completion):
                # old = current + drift, so r = exp(-drift); likewise for the reference
                r, a = float(torch.tensor(-drift(token, 7)).exp()), advantages[g, s].item()
                w = (min(1 / r, 3) if r <= 1.2 else 0) if a > 0 else (min(r, 3) if r >= 0.8 else 0)
                d = ref[t, token] + drift(token, 3) - logp[t, token]
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
    return torch.cat([p.grad.flatten() for p in lm.parameters() if p.requires_grad])


@pytest.fixture(scope="module")
def experts(tmp_path_factory) -> str:
    """A mixture of experts."""
    folder = tmp_path_factory.mktemp("experts")
    save_experts(folder)
    return str(folder)


@pytest.fixture(scope="module")
def gradients(tiny_model, experts, tmp_path_factory):
    folder, results = tmp_path_factory.mktemp("gradients"), {}
    with Ranks(2, folder) as ranks:
        for number in (1, 2):
            out = folder / f"{number}.pt"
            arguments = [tiny_model, experts, str(out), str(number)]
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


@pytest.mark.parametrize("kind", ["adapters", "experts"])
def test_the_gradient_does_not_depend_on_the_split_for_adapters_and_experts(gradients, tiny_model, experts, kind):
    lora = kind == "adapters"
    expected = gradient_by_hand(tiny_model if lora else experts, "token_mean", lora)
    for ranks in (1, 2):
        for k in (1, 4):
            error = ((gradients[ranks][kind, k] - expected).norm() / expected.norm()).item()
            assert error <= 1e-6, (ranks, k, error)


def test_the_mismatch_with_the_engine_is_that_of_all_micro_batches_and_ranks(gradients, experts):
    lm, differences = AutoModelForCausalLM.from_pretrained(experts), []
    for group in make_groups():
        prompt = list(group.prompt.prompt_ids)
        for rollout in group.rollouts:
            completion = list(rollout.completion_ids)
            logits = lm(input_ids=torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
            logprobs = (logits / TEMPERATURE).log_softmax(-1).gather(1, torch.tensor(completion)[:, None]).squeeze(1)
            differences.append(
                logprobs + torch.tensor([drift(token, 7) for token in completion]) + 1
            )  # the engine's: -1
    differences = torch.cat(differences).abs()
    for ranks in (1, 2):
        for k in (1, 4):
            expected = [differences.mean().item(), differences.max().item()]
            assert gradients[ranks]["mismatch", k] == pytest.approx(expected, rel=1e-4)

"""ASPOModule under a real Trainer: what it computes, what it leaves alone."""

from dataclasses import replace

import pytest
import torch
from lightning.pytorch import Callback
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForCausalLM

from aspo_lightning import ASPOModule
from aspo_lightning.errors import ConfigError
from aspo_lightning.objectives import GRPO
from aspo_lightning.types import Rollout, RolloutGroup
from tests.support.module_fits import Phases, adam, fit
from tests.support.one_step import make_groups


class Recorded(ASPOModule):
    """Keeps how far the log-probs that training sees are from those that were scored, where they were."""

    def training_step(self, batch, batch_idx):
        with torch.no_grad():
            logprobs, _ = self.policy(batch, temperature=self.temperature)
        old = batch.old_logprobs
        difference = None if old is None else (logprobs - old).abs().max().item()
        self.differences = [*getattr(self, "differences", []), difference]
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_without_updates_every_ratio_is_exactly_one(tiny_model, precision):
    # The narrowest trust region there is: a ratio one bit off would be clipped.
    module = Recorded(tiny_model, objective=GRPO(0.0, 0.0), temperature=0.7, optimizer=adam(0.0))
    data = Phases(make_groups())
    metrics = fit(module, data, precision=precision)
    k = data.phase.accumulate
    assert k > 1
    assert module.differences == [*[None] * k, *[0.0] * k]
    for sign in ("positive", "negative"):
        assert metrics[f"policy/ratio_{sign}"] == 1
        assert metrics[f"policy/clip_fraction_{sign}"] == 0
    assert metrics["policy/kl"] == 0
    assert metrics["policy/grad_norm"] > 0


def test_in_mixed_precision_the_references_layers_are_kept_as_autocast_takes_them(tiny_model):
    """That they score as the policy's do is shown above: the KL is 0."""
    module = ASPOModule(tiny_model)
    fit(module, Phases(make_groups()), precision="bf16-mixed")
    halved = {name for name, p in module.reference.lm.named_parameters() if p.dtype == torch.bfloat16}
    layers = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    depth = module.reference.lm.config.num_hidden_layers
    assert len(halved) == depth * len(layers)
    assert all(name.split(".")[-2] in layers for name in halved)
    assert all(p.dtype == torch.float32 for p in module.parameters())


@pytest.mark.parametrize("precisions", [("bf16-mixed", "32-true"), ("32-true", "bf16-mixed")])
def test_a_module_may_be_fitted_again_in_another_precision(tiny_model, precisions):
    module = ASPOModule(tiny_model, optimizer=adam(0.0))
    for precision in precisions:
        assert fit(module, Phases(make_groups()), precision=precision)["policy/kl"] == 0


def test_a_fit_that_broke_in_a_phase_leaves_nothing_in_the_next_one_s_curves(tiny_model):
    class Breaks(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            raise RuntimeError("as told")

    fresh = fit(ASPOModule(tiny_model, optimizer=adam(0.0)), Phases(make_groups()))
    module = ASPOModule(tiny_model, optimizer=adam(0.0))
    with pytest.raises(RuntimeError, match="as told"):
        fit(module, Phases(make_groups()), callbacks=[Breaks()])
    assert fit(module, Phases(make_groups())) == fresh


def test_scoring_the_reference_that_failed_leaves_the_adapters_on(tiny_model, monkeypatch):
    def fails(*args, **kwargs):
        raise MemoryError

    module = ASPOModule(tiny_model, lora_rank=2)
    module.configure_model()
    monkeypatch.setattr(module, "_logprobs", fails)
    with pytest.raises(MemoryError):
        module.score_reference([])
    layers = [layer for layer in module.policy.lm.modules() if isinstance(layer, LoraLayer)]
    assert layers
    assert not any(layer.disable_adapters for layer in layers)


def test_with_updates_the_policy_moves_and_the_reference_does_not(tiny_model):
    module = Recorded(tiny_model, optimizer=adam(1e-2))
    module.configure_model()
    before = {name: p.clone() for name, p in module.reference.state_dict().items()}
    data = Phases(make_groups())
    metrics = fit(module, data)
    k = data.phase.accumulate
    assert module.differences[:k] == [None] * k  # the first optimizer step
    assert min(module.differences[k:]) > 1e-3  # the second
    assert metrics["policy/ratio_positive"] != 1
    for name, parameter in module.reference.state_dict().items():
        assert torch.equal(parameter, before[name])
        assert not torch.equal(parameter, module.policy.state_dict()[name]) or "norm" in name
    assert not module.reference.training
    assert not any(p.requires_grad for p in module.reference.parameters())
    assert all(key.startswith("policy.") for key in module.state_dict())


def test_how_much_of_a_sample_the_updates_leave_is_measured(tiny_model):
    moved = []

    class Kept(ASPOModule):
        def training_step(self, batch, batch_idx):
            outputs = super().training_step(batch, batch_idx)
            old = outputs["logprobs"] if batch.old_logprobs is None else batch.old_logprobs
            moved.append((outputs["logprobs"] - old).double())
            return outputs

    metrics = fit(Kept(tiny_model, optimizer=adam(1e-2)), Phases(make_groups()))
    ratios = torch.cat(moved).exp()  # of all updates, the first among them, where they are 1
    size = ratios.sum() ** 2 / (len(ratios) * ratios.square().sum())
    assert 0 < size < 0.99
    assert metrics["policy/effective_sample_size"] == pytest.approx(size.item(), rel=1e-5)


def test_a_first_step_that_was_not_scored_goes_as_if_it_was(tiny_model):
    class Scored(Phases):
        def train_dataloader(self):
            phase, module = super().train_dataloader(), self.trainer.lightning_module
            k = phase.accumulate
            assert [b.old_logprobs is None for b in phase] == [True] * k + [False] * k
            scores = zip(phase, module.score(phase.micro_batches), strict=True)
            return replace(phase, micro_batches=[replace(batch, old_logprobs=old) for batch, old in scores])

    found = []
    for phases in (Phases, Scored):
        module = ASPOModule(tiny_model, optimizer=adam(1e-2))
        metrics = fit(module, phases(make_groups()))
        found.append((metrics, list(module.parameters())))
    (ours, weights), (theirs, expected) = found
    assert ours == theirs
    assert all(map(torch.equal, weights, expected))


def test_the_mismatch_with_the_engine_is_measured_over_all_tokens(tiny_model):
    lm = AutoModelForCausalLM.from_pretrained(tiny_model)
    differences = []
    for group in make_groups():
        prompt = list(group.prompt.prompt_ids)
        for rollout in group.rollouts:
            ids = torch.tensor(prompt + list(rollout.completion_ids))
            logprobs = lm(input_ids=ids[None]).logits[0].log_softmax(-1)[len(prompt) - 1 : -1]
            differences.append(logprobs.gather(1, ids[len(prompt) :, None]).squeeze(1) - -1.0)  # as the engine had it
    differences = torch.cat(differences).double()  # log pi_old - log mu
    metrics = fit(ASPOModule(tiny_model, optimizer=adam(0.0)), Phases(make_groups()))
    assert metrics["mismatch/logprob_abs_mean"] == pytest.approx(differences.abs().mean().item(), rel=1e-5)
    assert metrics["mismatch/logprob_abs_max"] == pytest.approx(differences.abs().max().item(), rel=1e-5)
    ratios = differences.exp()
    assert metrics["mismatch/kl"] == pytest.approx((ratios - 1 - differences).mean().item(), rel=1e-5)
    size = ratios.sum() ** 2 / (len(ratios) * ratios.square().sum())
    assert 0 < size < 0.99
    assert metrics["mismatch/effective_sample_size"] == pytest.approx(size.item(), rel=1e-5)


def test_a_phase_that_tells_nothing_changes_nothing(tiny_model):
    module = ASPOModule(tiny_model, optimizer=adam(1e-2))
    module.configure_model()
    before = {name: p.clone() for name, p in module.policy.state_dict().items()}
    rollouts = (Rollout((7, 8), (-1.0, -1.0), False, "", 1.0, True),) * 2
    metrics = fit(module, Phases([RolloutGroup(make_groups()[0].prompt, rollouts)]))
    measured = ("policy/clip", "policy/effective", "mismatch/")
    assert not any(tag.startswith(measured) for tag in metrics)  # nor is anything measured
    assert all(torch.equal(p, before[name]) for name, p in module.policy.state_dict().items())


def test_gradients_are_clipped_and_their_norm_is_logged_unclipped(tiny_model):
    def norm(**settings):
        seen = []

        class Watched(ASPOModule):
            def configure_gradient_clipping(self, *args, **kwargs):
                super().configure_gradient_clipping(*args, **kwargs)
                seen.append(torch.nn.utils.get_total_norm([p.grad for p in self.parameters()]).item())

        metrics = fit(Watched(tiny_model, optimizer=adam(0.0)), Phases(make_groups()), **settings)
        return metrics["policy/grad_norm"], seen

    free, unclipped = norm()
    assert free == pytest.approx(sum(unclipped) / 2)
    limit = min(unclipped) / 2
    logged, clipped = norm(gradient_clip_val=limit)
    assert logged == pytest.approx(free)
    assert clipped == pytest.approx([limit, limit], rel=1e-4)
    _, by_value = norm(gradient_clip_val=1e-6, gradient_clip_algorithm="value")
    assert max(by_value) < 1e-2


def test_without_kl_there_is_no_reference(tiny_model):
    module = ASPOModule(tiny_model, kl_coef=0.0)
    module.configure_model()
    assert module.reference is None
    assert "policy/kl" not in fit(module, Phases(make_groups()))


def test_the_scheduler_moves_with_every_optimizer_step(tiny_model):
    module = ASPOModule(
        tiny_model,
        optimizer=adam(1.0),
        lr_scheduler=lambda o: torch.optim.lr_scheduler.LinearLR(o, start_factor=0.1, total_iters=10),
    )
    module.configure_model()
    rates = []

    class Watched(Phases):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])
            return batch

    data = Watched(make_groups())
    fit(module, data)
    k = data.phase.accumulate
    assert rates == pytest.approx([0.1] * k + [0.19] * k)


@pytest.mark.parametrize(
    ("settings", "message"), [({"kl_coef": -1.0}, "kl_coef is -1"), ({"chunk_size": 0}, "chunk_size is 0")]
)
def test_impossible_settings_are_refused(tiny_model, settings, message):
    with pytest.raises(ConfigError, match=message):
        ASPOModule(tiny_model, **settings)

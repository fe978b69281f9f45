"""Guards, each with the fault that it is there for."""

import warnings
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from aspo_lightning import ASPOModule
from aspo_lightning.engines import VLLMEngine
from aspo_lightning.errors import ConfigError, RunError
from aspo_lightning.policy.causal_lm import ScoredCausalLM
from aspo_lightning.rollouts.mismatch import Probe
from aspo_lightning.run.folder import RunFolder, RunRecord
from aspo_lightning.run.guards import CollapseGuard, NonFiniteGuard, RatioCanary
from aspo_lightning.types import MicroBatch
from tests.support.models import save_model, save_tokenizer
from tests.support.module_fits import Phases, adam, fit
from tests.support.one_step import make_groups


class Poison(Callback):
    """Makes gradients not finite, in the optimizer steps given."""

    def __init__(self, *steps):
        self.steps, self.at = steps, 0
        self.before = {}

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if self.at in self.steps:
            pl_module.policy.lm.model.norm.weight.grad[3] = float("nan")
            self.before[self.at] = [p.detach().clone() for p in pl_module.parameters()]
        self.at += 1


class Watch(Callback):
    """Keeps the weights behind each optimizer step."""

    def __init__(self):
        self.weights = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self.weights.append([p.detach().clone() for p in pl_module.parameters()])


def test_a_step_that_is_not_finite_is_skipped(tiny_model):
    module, poison, watch = ASPOModule(tiny_model, optimizer=adam(1e-2)), Poison(1), Watch()
    with pytest.warns(UserWarning, match="isn't finite; the step was skipped"):
        metrics = fit(module, Phases(make_groups()), callbacks=[poison, NonFiniteGuard(2), watch])
    for before, after in zip(poison.before[1], watch.weights[1], strict=True):
        assert torch.equal(before, after)
    assert not torch.equal(watch.weights[0][0], torch.zeros_like(watch.weights[0][0]))
    assert metrics["policy/skipped_steps"] == 1
    optimizer = module.trainer.optimizers[0]
    assert all(state["step"] == 1 and state["exp_avg"].isfinite().all() for state in optimizer.state.values())


def test_a_loss_that_is_not_finite_counts_too(tiny_model):
    class Overflows(ASPOModule):
        def training_step(self, batch, batch_idx):
            outputs = super().training_step(batch, batch_idx)
            self._loss_is_finite = torch.tensor(False)  # as an infinite constant: its gradient is zero
            return outputs

    module = Overflows(tiny_model, optimizer=adam(1e-2))
    module.configure_model()
    before = [p.detach().clone() for p in module.parameters()]
    with pytest.raises(RunError, match="wasn't finite in 2 optimizer steps in a row, up to step 2"):
        fit(module, Phases(make_groups()), callbacks=[NonFiniteGuard(2)])
    for old, new in zip(before, module.parameters(), strict=True):
        assert torch.equal(old, new)


def test_after_some_such_steps_the_run_ends_with_the_batch_saved(tiny_model, tmp_path):
    module, data = ASPOModule(tiny_model, optimizer=adam(1e-2)), Phases(make_groups())
    record = RunRecord(RunFolder(tmp_path), "")
    with pytest.raises(RunError, match=r"Its micro-batches are in (.*\.pt)\. Resume from the last"):
        fit(module, data, callbacks=[Poison(0, 1), NonFiniteGuard(2), record])
    (path,) = tmp_path.glob("*.pt")
    saved = torch.load(path)
    assert len(saved) == data.phase.accumulate
    assert torch.equal(saved[0]["targets"], data.phase.micro_batches[-data.phase.accumulate].targets)


def test_weights_that_are_not_finite_end_a_run_before_its_checkpoint(tiny_model, tmp_path):
    class LastStep(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.is_last_batch:
                pl_module.policy.lm.model.norm.weight.data[3] = float("nan")

    def run(*callbacks):
        saved = ModelCheckpoint(tmp_path, save_on_train_epoch_end=True)
        module = ASPOModule(tiny_model, optimizer=adam(1e-2))
        fit(module, Phases(make_groups()), callbacks=[*callbacks, NonFiniteGuard(), saved], enable_checkpointing=True)

    with pytest.raises(RunError, match="The policy's weights aren't finite"):
        run(LastStep())
    assert not list(tmp_path.iterdir())
    run()
    assert list(tmp_path.glob("*.ckpt"))


def test_weights_that_are_not_finite_are_told_as_such(tiny_model):
    module, data = ASPOModule(tiny_model, optimizer=adam(1e-2)), Phases(make_groups())
    module.configure_model()
    module.policy.lm.model.norm.weight.data[3] = float("nan")
    with pytest.raises(RunError, match=r"The policy's weights aren't finite, found in step 1; no checkpoint"):
        fit(module, data, callbacks=[RatioCanary(), NonFiniteGuard()])
    assert data.phase.accumulate > 1  # the canary looked before the step was known to be one


class OtherTemperature(ASPOModule):
    def training_step(self, batch, batch_idx):
        temperature, self.temperature = self.temperature, 0.9
        outputs = super().training_step(batch, batch_idx)
        self.temperature = temperature
        return outputs


class OtherMask(ASPOModule):
    def training_step(self, batch, batch_idx):
        return super().training_step(replace(batch, response_index=(batch.response_index - 1).clamp(min=0)), batch_idx)


class Dropout(ASPOModule):
    def configure_model(self):
        super().configure_model()
        for layer in self.policy.lm.model.layers:
            layer.mlp = torch.nn.Sequential(layer.mlp, torch.nn.Dropout(0.1))


@pytest.mark.parametrize("kind", [OtherTemperature, OtherMask, Dropout])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_the_ratio_canary_ends_a_run_that_trains_another_policy(tiny_model, kind, precision):
    canary = RatioCanary()
    fit(ASPOModule(tiny_model, optimizer=adam(1e-2)), Phases(make_groups()), callbacks=[canary], precision=precision)
    with pytest.raises(RunError, match="first ratios of a phase must be 1"):
        fit(kind(tiny_model, optimizer=adam(1e-2)), Phases(make_groups()), callbacks=[canary], precision=precision)


@pytest.fixture(scope="module")
def engine(tiny_model):
    engine = VLLMEngine(kv_cache_gib=0.05)
    engine.start(tiny_model, context_length=64)
    return engine


@pytest.fixture
def probed(engine, tiny_model):
    """A policy that has moved since the engine has its weights, and a probe that saw them agree."""
    policy = ScoredCausalLM.from_pretrained(tiny_model)
    engine.sync_weights(policy.lm.named_parameters())
    probe = Probe(128, 64, 0.8, factor=20.0)
    look(probe, engine, policy)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in policy.lm.parameters():  # as a phase of AdamW at lr 1e-3: every weight by that much
            parameter += 1e-3 * torch.randn(parameter.shape, generator=generator).sign()
    return probe, policy


@torch.no_grad()
def look(probe, engine, policy):
    batch = probe.sample(engine)
    probe.check(batch, policy(batch, temperature=0.8)[0])


def test_the_probe_passes_a_sync_and_catches_one_left_out(probed, engine):
    probe, policy = probed
    with pytest.raises(RunError, match="doesn't sample from the policy's weights"):
        look(probe, engine, policy)
    engine.sync_weights(policy.lm.named_parameters())
    look(probe, engine, policy)


def test_the_probe_catches_any_tensor_left_out(probed, engine):
    probe, policy = probed
    names = [name for name, _ in policy.lm.named_parameters()]
    stale = ScoredCausalLM.from_pretrained(policy.lm.config._name_or_path)
    for missing in names:
        old = dict(stale.lm.named_parameters())
        engine.sync_weights((n, old[n] if n == missing else p) for n, p in policy.lm.named_parameters())
        with pytest.raises(RunError, match="doesn't sample"):
            look(probe, engine, policy)


def test_the_probe_catches_a_prefix_cache_that_is_not_emptied(probed, engine, monkeypatch):
    probe, policy = probed
    with monkeypatch.context() as patch:
        patch.setattr(engine._running(), "reset_prefix_cache", lambda: True)
        engine.sync_weights(policy.lm.named_parameters())
        with pytest.raises(RunError, match="doesn't sample"):
            look(probe, engine, policy)
    engine.sync_weights(policy.lm.named_parameters())
    look(probe, engine, policy)


def test_the_probe_catches_weights_that_are_not_finite(probed, engine):
    probe, policy = probed
    batch = MicroBatch.from_sequences([((5, 6), (7, 8))], generator_logprobs=[[-1.0, -1.0]])
    with pytest.raises(RunError, match="not finite"):
        probe.check(batch, torch.tensor([-1.0, float("nan")]))
    norm = torch.full((64,), float("nan"))
    engine.sync_weights((n, norm if n == "model.norm.weight" else p) for n, p in policy.lm.named_parameters())
    with pytest.raises(RunError, match="not finite"):  # in the engine alone
        look(probe, engine, policy)
    engine.sync_weights(policy.lm.named_parameters())
    look(probe, engine, policy)


@pytest.fixture(scope="module", params=[{}, {"num_hidden_layers": 8, "initializer_range": 0.1}], ids=["2", "8"])
def in_bfloat16(request, tmp_path_factory):
    """Models of two layers and of eight, the engine in bfloat16."""
    folder = tmp_path_factory.mktemp("model")
    save_model(folder, max_position_embeddings=256, **request.param)
    save_tokenizer(folder)
    engine = VLLMEngine(dtype="bfloat16", kv_cache_gib=0.05)
    engine.start(str(folder), context_length=160)
    return str(folder), engine


def test_in_bfloat16_no_first_look_is_so_lucky_that_a_later_one_ends_the_run(in_bfloat16):
    """50 looks, each at weights that differ a little: what rounding does to them is drawn anew."""
    folder, engine = in_bfloat16
    policy, base = ScoredCausalLM.from_pretrained(folder), ScoredCausalLM.from_pretrained(folder)
    probe, looks = Probe(128, 160, 1.0, factor=20.0), []
    for seed in range(50):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter, at_first in zip(policy.lm.parameters(), base.lm.parameters(), strict=True):
                parameter.copy_(at_first + 1e-2 * torch.randn(at_first.shape, generator=generator).sign())
        engine.sync_weights(policy.lm.named_parameters())
        batch = probe.sample(engine)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            looks.append((batch, policy(batch, temperature=1.0)[0]))
    for look in looks:
        probe.first = None
        probe.check(*look)
        for later in looks:
            probe.check(*later)
    differences = [(logprobs - batch.generator_logprobs).abs().mean() for batch, logprobs in looks]
    assert max(differences) < 4 * min(differences)
    assert min(differences) > 1e-3  # the engine does compute in bfloat16


def test_in_bfloat16_the_probe_catches_the_weights_of_another_model(in_bfloat16):
    folder, engine = in_bfloat16
    policy, probe = ScoredCausalLM.from_pretrained(folder), Probe(128, 160, 1.0, factor=20.0)
    weights = dict(policy.lm.named_parameters())
    for swapped in (None, "model.layers.0.mlp.down_proj.weight", "model.layers.1.self_attn.o_proj.weight"):
        engine.sync_weights((n, p.flip(0) if n == swapped else p) for n, p in weights.items())
        batch = probe.sample(engine)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            logprobs = policy(batch, temperature=1.0)[0]
        if swapped is None:
            probe.check(batch, logprobs)
        else:
            with pytest.raises(RunError, match="doesn't sample from the policy's weights"):
                probe.check(batch, logprobs)


def curves(entropy, accuracy, clip=0.01, repetition=0.0):
    guard = CollapseGuard()
    for epoch in range(20):
        x = epoch / 19
        values = (entropy(x), accuracy(x), clip if x > 0.5 else 0.01, 0.01, repetition if x > 0.5 else 0.0)
        for tag, value in zip(CollapseGuard.TAGS, values, strict=True):
            guard.curves[tag].append(value)
    return guard


@pytest.mark.parametrize(
    ("guard", "signs"),
    [
        # The quickstart's own: entropy 1.3 -> 0.07 while accuracy goes to 0.9. And one not yet long enough.
        (curves(lambda x: 1.3 * 0.05**x, lambda x: 0.3 + 0.6 * x), set()),
        (curves(lambda x: 1.3 * 0.01**x, lambda x: 0.3), {"entropy"}),
        (curves(lambda x: 1.3 * 0.01**x, lambda x: 0.3 + 0.05 * x), set()),  # still learning
        (curves(lambda x: 1.0, lambda x: 0.3, clip=0.3), {"policy/clip_fraction_positive"}),
        (curves(lambda x: 1.0, lambda x: 0.3, clip=0.15), set()),
        (curves(lambda x: 1.0, lambda x: 0.3, repetition=0.2), {"rollout/repetition_rate"}),
        (CollapseGuard(), set()),
    ],
)
def test_the_signs_of_a_collapse(guard, signs):
    assert set(guard.signs()) == signs
    again = CollapseGuard()
    again.load_state_dict(guard.state_dict())
    assert set(again.signs()) == signs


def test_a_collapse_is_told_once_and_may_end_the_run():
    guard = curves(lambda x: 1.3 * 0.01**x, lambda x: 0.25)
    last = {tag: curve[-1] for tag, curve in guard.curves.items()}
    trainer = SimpleNamespace(callback_metrics={tag: torch.tensor(value) for tag, value in last.items()})
    with pytest.warns(UserWarning, match="the policy no longer explores"):
        guard.on_train_epoch_end(trainer, None)
    assert all(curve[-1] == pytest.approx(last[tag]) and len(curve) == 21 for tag, curve in guard.curves.items())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        guard.on_train_epoch_end(trainer, None)
    guard.stop = True
    with pytest.raises(RunError, match=r"no longer explores .* or leave CollapseGuard\.stop out"):
        guard.on_train_epoch_end(trainer, None)


def test_patience_is_checked():
    with pytest.raises(ConfigError, match="patience is 0"):
        NonFiniteGuard(0)

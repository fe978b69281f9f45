"""The modules from plain Python, under Trainers of all kinds: what is refused, what is waited for."""

import gc
import json
import signal
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EarlyStopping, GradientAccumulationScheduler, ModelCheckpoint, Timer
from lightning.pytorch.callbacks.weight_averaging import WeightAveraging
from torch import distributed as dist
from torch.optim.swa_utils import get_ema_avg_fn

from aspo_lightning import ASPOModule, RolloutDataModule, trainer_settings
from aspo_lightning.collectives import thread_group
from aspo_lightning.engines import TransformersEngine, VLLMEngine
from aspo_lightning.errors import ConfigError, EngineError
from aspo_lightning.evaluation.callbacks import EvaluationResults
from aspo_lightning.fsdp import FSDP2Strategy
from aspo_lightning.identity import describe, incidental
from aspo_lightning.policy.weights import full_weights
from aspo_lightning.rollouts.checks import check_engine_devices
from aspo_lightning.rollouts.corrections import Bypass, TruncatedRatio
from aspo_lightning.run.callbacks import PhaseReport
from aspo_lightning.run.folder import RunFolder
from aspo_lightning.run.guards import CollapseGuard, GracefulStop
from aspo_lightning.run.lightning import time_limit
from aspo_lightning.tasks import Dataset


@pytest.fixture(scope="module")
def sums(tmp_path_factory):
    def task(first: int, size: int) -> Dataset:
        path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
        rows = [json.dumps({"question": f"{i}+1", "answer": i + 1}) for i in range(first, first + size)]
        path.write_text("\n".join(rows))
        return Dataset(str(path), reward="tests.support.rewards.parity")

    return task


@pytest.fixture
def parts(tiny_model, sums):
    """Makes a module and a data module: two optimizer steps a phase, of three micro-batches each."""

    def make(module: dict | None = None, **data) -> tuple[ASPOModule, RolloutDataModule]:
        settings = {
            "train": sums(10, 40),
            "val": {"sums": sums(60, 5)},
            "engine": TransformersEngine(),
            "prompts_per_phase": 4,
            "group_size": 4,
            "optimizer_steps": 2,
            "max_prompt_length": 16,
            "max_completion_length": 16,
            "token_budget": 64,
            "no_spread": "keep",
            "reward_workers": 1,
        }
        return (
            ASPOModule(tiny_model, optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2), **(module or {})),
            RolloutDataModule(tiny_model, **{**settings, **data}),
        )

    return make


class Curves(Callback):
    """What each epoch measured, but times; and the phases and weights behind it."""

    def __init__(self) -> None:
        self.epochs: list[dict[str, float]] = []
        self.phases = []

    def on_train_epoch_end(self, trainer, pl_module):
        tags = ("policy/", "rollout/", "mismatch/")
        metrics = trainer.callback_metrics.items()
        self.epochs.append({tag: float(value) for tag, value in metrics if tag.startswith(tags)})
        self.phases.append(trainer.datamodule.phase)


def trainer(*callbacks: Callback, **settings) -> Trainer:
    return Trainer(
        **{
            "accelerator": "cpu",
            "max_epochs": 2,
            "reload_dataloaders_every_n_epochs": 1,
            "num_sanity_val_steps": 0,
            "logger": False,
            "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks),
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "callbacks": list(callbacks),
            **settings,
        }
    )


def kept(root: Path, *callbacks: Callback, run: str | None = None, **settings) -> Trainer:
    """One as in the README's program, whose run is kept: a new one, or that of this name again."""
    ours = trainer_settings(root)
    if run:
        ours["callbacks"][0].folder = RunFolder(root / run)
    quiet = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    return Trainer(**{**ours, **quiet, **settings, "callbacks": [*ours["callbacks"], *callbacks]})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_engine_is_sent_weights_in_its_own_dtype(parts, dtype):
    class Engine(TransformersEngine):
        def sync_weights(self, named_tensors):
            sent.update({name: tensor.clone() for name, tensor in named_tensors})
            super().sync_weights(sent.items())

    sent: dict[str, torch.Tensor] = {}
    module, data = parts(engine=Engine(dtype=dtype))
    trainer().validate(module, data, verbose=False)
    data.close()
    weights = {name: tensor.to(getattr(torch, dtype)) for name, tensor in full_weights(module.policy.lm)}
    assert list(sent) == list(weights)
    for name, tensor in sent.items():
        assert tensor.dtype == weights[name].dtype
        assert torch.equal(tensor, weights[name])


def test_validating_first_changes_nothing(parts):
    found = []
    for validates in (False, True):
        module, data = parts()
        curves = Curves()
        runner = trainer(curves)
        if validates:
            runner.validate(module, data, verbose=False)
            assert module.reference is None
        runner.fit(module, data)
        assert all(
            torch.equal(p, q)
            for p, q in zip(module.reference.parameters(), parts()[0]._load().parameters(), strict=True)
        )
        (result,) = runner.test(module, data, verbose=False)
        found.append((curves.epochs, result, [p.detach().clone() for p in module.parameters()]))
        data.close()
    (ours, our_scores, our_weights), (theirs, their_scores, their_weights) = found
    assert ours == theirs
    assert our_scores == their_scores
    assert all(map(torch.equal, our_weights, their_weights))
    assert ours[1]["policy/kl"] > 1e-3  # to the weights as they were, not to those of the moment


def test_what_is_scored_as_the_reference_is_not_the_policy(parts):
    module, data = parts()
    runner, curves = trainer(Curves()), Curves()
    runner.validate(module, data, verbose=False)
    trainer(curves).fit(module, data)
    batch = next(b for b in curves.phases[1] if len(b.targets) and b.old_logprobs is not None)
    assert (batch.ref_logprobs - batch.old_logprobs).abs().max() > 1e-2
    data.close()


def test_the_engine_starts_before_the_model_is_loaded_and_sleeps_until_weights_come(parts):
    """It asks for a share of the whole GPU. What it draws at random isn't taken from the adapters' beginnings.

    Garbage is not looked for in all that is imported and loaded by then.
    """
    order, draws, frozen = [], [], []
    gc.unfreeze()

    class Watched(TransformersEngine):
        def start(self, *args, **kwargs):
            order.append("start")
            torch.manual_seed(5)  # as vLLM does
            super().start(*args, **kwargs)

        def sleep(self):
            order.append("sleep")
            return super().sleep()

        def sync_weights(self, named_tensors):
            order.append("sync")
            super().sync_weights(named_tensors)

    class Module(ASPOModule):
        def configure_model(self):
            order.append("load")
            frozen.append(gc.get_freeze_count())
            draws.append(torch.rand(1))
            super().configure_model()

    _, data = parts(engine=Watched())
    module = Module(data.model_name_or_path, optimizer=lambda p: torch.optim.SGD(p, lr=0.1), lora_rank=2)
    torch.manual_seed(7)
    trainer(max_epochs=1).fit(module, data)
    assert order[:4] == ["start", "sleep", "load", "sync"]
    assert order.count("start") == 1
    assert frozen[0] > 500_000 > gc.get_freeze_count()
    assert draws[0] == torch.rand(1, generator=torch.Generator().manual_seed(7))
    data.close()
    order.clear()
    trainer(max_epochs=1).validate(module, data, verbose=False)
    assert order[0] == "start"  # again: it was stopped
    data.close()


def test_an_engine_that_stays_follows_a_module_with_adapters_and_then_one_without(parts):
    """vLLM would go on sampling from the weights below the adapters."""
    _, data = parts(engine=VLLMEngine(kv_cache_gib=0.05), probe_factor=None)
    for settings in ({"lora_rank": 2}, {}, {"lora_rank": 3}):
        module = ASPOModule(data.model_name_or_path, optimizer=lambda p: torch.optim.SGD(p, lr=0.5), **settings)
        curves = Curves()
        trainer(curves).fit(module, data)
        assert data.engine.takes_adapters == bool(settings)
        assert [epoch["mismatch/logprob_abs_max"] < 1e-3 for epoch in curves.epochs] == [True, True]
    data.close()


def test_a_run_on_a_cpu_keeps_the_memory_that_it_frees(parts, monkeypatch):
    kept = []
    monkeypatch.setattr("aspo_lightning.datamodule.keep_freed_memory", lambda: kept.append(True))
    module, data = parts()
    trainer(max_epochs=1).fit(module, data)
    assert kept
    data.close()


def test_after_a_fit_that_failed_garbage_is_looked_for_everywhere(parts):
    class Failing(ASPOModule):
        def training_step(self, batch, batch_idx):
            assert gc.get_freeze_count() > 0
            raise ValueError("as told")

    _, data = parts()
    with pytest.raises(ValueError, match="as told"):
        trainer(max_epochs=1).fit(Failing(data.model_name_or_path), data)
    assert gc.get_freeze_count() == 0
    data.close()


def test_an_engine_that_cannot_start_is_told_in_one_line(parts):
    module, data = parts(engine=VLLMEngine(kv_cache_gib=1e-5))
    message = r"The engine can't be started \(ValueError: No available memory for the cache blocks"
    with pytest.raises(ConfigError, match=message) as error:
        trainer().fit(module, data)
    assert "\n" not in str(error.value)
    assert not isinstance(error.value, EngineError)  # which has a run start again, to end alike
    assert module.policy is None
    data.close()


def test_gpus_that_the_engine_would_not_take_are_refused(parts):
    _, data = parts(engine=VLLMEngine())
    check_engine_devices(data.engine, [0, 1])
    check_engine_devices(TransformersEngine(), [4, 5])  # is where the trainer is
    with pytest.raises(ConfigError, match="chooses GPU 4, 5, but VLLMEngine .* CUDA_VISIBLE_DEVICES, like 4,5, .*, 2"):
        check_engine_devices(data.engine, [4, 5])
    module, data = parts(engine=VLLMEngine())
    runner = trainer()
    runner.strategy._root_device = torch.device("cuda:1")  # of a machine with two
    data.trainer, runner.strategy._lightning_module = runner, module
    with pytest.raises(ConfigError, match="trainer.devices chooses GPU 1, but VLLMEngine takes"):
        data.setup("fit")
    data.close()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"reload_dataloaders_every_n_epochs": 0}, "reload_dataloaders_every_n_epochs is 0: all epochs would train on"),
        ({"limit_train_batches": 3}, "limit_train_batches is 3: an optimizer step would have part"),
        ({"limit_train_batches": 0.5}, "limit_train_batches is 0.5"),
        ({"overfit_batches": 1}, "overfit_batches is 1"),
        ({"accumulate_grad_batches": 2}, "accumulate_grad_batches is 2, but each phase plans its own"),
        ({"callbacks": [GradientAccumulationScheduler({0: 2})]}, "but each phase plans its own"),
        ({"val_check_interval": 15}, "val_check_interval is 15"),
        ({"val_check_interval": 0.5}, "val_check_interval is 0.5"),
        ({"check_val_every_n_epoch": None, "val_check_interval": 9}, "check_val_every_n_epoch None"),
        ({"precision": "bf16-true"}, "precision is bf16-true"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_a_trainer_that_would_train_something_else_is_refused(parts, settings, message):
    module, data = parts()
    with pytest.raises(ConfigError, match=message) as error:
        trainer(**settings).fit(module, data)
    assert "\n" not in str(error.value)
    assert module.policy is None  # before anything is loaded
    data.close()


def test_a_look_at_whether_anything_runs_may_use_part_of_a_phase(parts):
    module, data = parts()
    trainer(fast_dev_run=True).fit(module, data)
    assert module.global_step <= 1
    data.close()


def test_a_second_fit_with_the_same_parts_is_not_taken_for_a_setting(parts):
    module, data = parts()
    runner = trainer(max_epochs=1)
    runner.fit(module, data)
    assert runner.accumulate_grad_batches == 1
    runner.fit_loop.max_epochs = 2
    runner.fit(module, data)
    assert runner.global_step == 4
    data.close()


def test_module_and_data_must_agree(parts, tmp_path, tiny_model):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    AutoModelForCausalLM.from_pretrained(tiny_model).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path)
    module, data = parts(temperature=0.5)
    with pytest.raises(ConfigError, match=r"trains at temperature 1\.0 and the data module samples at 0\.5"):
        trainer().fit(module, data)
    module, data = parts()
    for use in ("fit", "validate", "test"):
        with pytest.raises(ConfigError, match="give both the same model_name_or_path"):
            getattr(trainer(), use)(ASPOModule(str(tmp_path)), data)
    with pytest.raises(ConfigError, match="data.temperature is 0;"):
        ASPOModule(tiny_model, temperature=0)


class Averaged(WeightAveraging):
    """Swaps weights for evaluations, as EMAWeightAveraging does; the average is far from the current weights."""

    def __init__(self) -> None:
        super().__init__(avg_fn=get_ema_avg_fn(0.99))


def test_after_weights_were_swapped_for_an_evaluation_the_engine_samples_from_those_that_train(parts):
    module, data = parts(probe_factor=None)
    curves = Curves()
    trainer(PhaseReport(), Averaged(), curves, max_epochs=3).fit(module, data)
    assert len(curves.epochs) == 3
    assert all(epoch["mismatch/logprob_abs_max"] < 1e-3 for epoch in curves.epochs)
    data.close()


class StopAt(Callback):
    """Asks for a stop in the middle of a phase."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.current_epoch == 1 and batch_idx == 1:
            trainer.should_stop = True


@pytest.mark.parametrize(
    ("callbacks", "settings"),
    [
        ([], {"max_steps": 3}),
        ([StopAt()], {}),
        ([StopAt()], {"min_steps": 2}),
        ([Timer(duration={"seconds": 0})], {"min_epochs": 2}),
        ([EarlyStopping("eval/sums/avg@1", stopping_threshold=-1.0, mode="max")], {"min_epochs": 2}),
    ],
    ids=["max_steps", "should_stop", "min_steps", "timer", "early_stopping"],
)
def test_a_stop_waits_for_the_end_of_the_phase(parts, tmp_path, callbacks, settings):
    module, data = parts()
    saved = ModelCheckpoint(tmp_path, save_top_k=-1, save_on_train_epoch_end=True, filename="{step}")
    runner = trainer(*callbacks, saved, max_epochs=9, **settings)
    runner.fit(module, data)
    assert runner.global_step == 4  # the end of the second phase
    assert runner.current_epoch == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step=2.ckpt", "step=4.ckpt"]
    data.close()


def test_what_was_written_within_a_phase_cannot_be_resumed_from(parts, tmp_path):
    module, data = parts()
    within = ModelCheckpoint(tmp_path, every_n_train_steps=3, save_top_k=-1, filename="{step}")
    trainer(within).fit(module, data)
    assert [p.name for p in tmp_path.iterdir()] == ["step=3.ckpt"]
    path = str(tmp_path / "step=3.ckpt")
    module, data = parts()
    with pytest.raises(ConfigError, match="was written within epoch 1, whose phase was sampled by weights"):
        trainer(max_epochs=4).fit(module, data, ckpt_path=path)
    module, data = parts()
    trainer().test(module, data, ckpt_path=path, verbose=False)  # its weights are as good as any
    data.close()


class NothingLearned(Callback):
    """Takes all groups out of the second phase, as one without spread does."""

    def on_train_epoch_end(self, trainer, pl_module):
        rollouts = trainer.datamodule.rollouts
        rollouts.settings = replace(rollouts.settings, no_spread="drop", truncated="zero")


def test_what_a_phase_did_not_measure_is_not_shown_again(parts, capsys):
    module, data = parts(max_completion_length=1)  # every completion is cut off
    guard = CollapseGuard()
    stops_on_entropy = EarlyStopping("policy/entropy", patience=9, check_on_train_epoch_end=True)
    trainer(guard, PhaseReport(), stops_on_entropy, NothingLearned()).fit(module, data)
    assert len(guard.curves["rollout/accuracy"]) == 2
    assert len(guard.curves["policy/entropy"]) == len(guard.curves["policy/clip_fraction_positive"]) == 1
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch ")]
    assert ["entropy" in line for line in lines] == [True, False]
    assert ["clipped" in line for line in lines] == [True, False]
    data.close()


class Fails(Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        raise RuntimeError("in the middle of a phase")


def test_after_a_fit_that_failed_the_next_one_samples_its_own_phase(parts):
    failed, data = parts()
    with pytest.raises(RuntimeError, match="in the middle of a phase"):
        trainer(Fails()).fit(failed, data)
    phase = data.phase
    module, _ = parts()
    curves = Curves()
    trainer(curves, max_epochs=1).fit(module, data)
    assert curves.phases[0] is not phase
    assert module.trainer.global_step == 2
    data.close()


def test_after_a_fit_that_failed_its_folder_and_signals_are_free_and_servers_are_met_anew(parts, tmp_path):
    class Servers(TransformersEngine):
        apart = True

        def start(self, *args, **kwargs):
            starts.append("start")
            super().start(*args, **kwargs)

    starts: list[str] = []
    failed, data = parts(engine=Servers())
    before = [signal.getsignal(number) for number in GracefulStop.SIGNALS]
    with pytest.raises(RuntimeError, match="in the middle of a phase"):
        kept(tmp_path, Fails()).fit(failed, data)
    assert [signal.getsignal(number) for number in GracefulStop.SIGNALS] == before
    module, _ = parts()
    runner = kept(tmp_path, max_epochs=1, run="version_0")
    runner.fit(module, data)
    assert module.trainer.global_step == 2
    assert starts == ["start", "start"]
    data.close()


def test_a_trainer_that_a_signal_has_stopped_goes_on_in_its_next_fit(parts, tmp_path):
    class Stops(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 0:
                signal.raise_signal(signal.SIGTERM)

    module, data = parts()
    runner = kept(tmp_path, Stops(), max_epochs=3)
    runner.fit(module, data)
    assert module.trainer.global_step == 2
    runner.fit(module, data)
    assert module.trainer.global_step == 6
    data.close()


def test_an_evaluation_that_failed_leaves_the_next_one_its_own_completions(parts, tmp_path):
    class Breaks(TransformersEngine):
        broken = False

        def generate(self, requests):
            for answered, completion in enumerate(super().generate(requests)):
                if self.broken and answered:
                    raise OSError("the engine is gone")
                sampled.append(completion)
                yield completion

    class Break(Callback):
        def on_validation_start(self, trainer, pl_module):
            data.engine.broken = True

    sampled: list[object] = []
    module, data = parts(engine=Breaks())
    with pytest.raises(EngineError, match="the engine is gone"):
        kept(tmp_path, Break()).fit(module, data)
    (journal,) = [path for path in tmp_path.rglob("journal/*") if path.is_file()]
    before, sampled[:] = journal.read_bytes(), []
    data.engine.broken = False
    other, _ = parts()
    trainer(EvaluationResults()).validate(other, data, verbose=False)
    assert len(sampled) == len(data.val_prompts["sums"]) == 5
    assert journal.read_bytes() == before
    assert not list(tmp_path.rglob("result.json"))
    data.close()


def test_the_probe_s_measure_is_of_each_fit(parts):
    """Another one may be in a coarser precision."""
    module, data = parts(probe_factor=20.0)
    trainer(max_epochs=1).fit(module, data)
    assert data.probe.first < 1e-4
    trainer(max_epochs=1, precision="bf16-mixed").fit(module, data)
    assert data.probe.first > 1e-4
    data.close()


def test_what_there_is_nothing_of_is_told_in_every_stage(parts, tiny_model):
    module, data = parts(train=None)
    trainer().validate(module, data, verbose=False)
    with pytest.raises(ConfigError, match="There is nothing to train on"):
        trainer().fit(module, data)
    module, data = parts(val=None)
    trainer(max_epochs=1).fit(module, data)
    with pytest.raises(ConfigError, match="There is nothing to evaluate"):
        trainer().test(module, data)
    data.close()


def test_marks_hold_for_classes_that_inherit_them():
    class Sub(VLLMEngine):
        def __init__(self, extra: int = 0, timeout_s: float = 1.0, **settings) -> None:
            super().__init__(timeout_s=timeout_s, **settings)
            self.extra = extra

    assert "max_num_seqs" in incidental(Sub)
    assert "timeout_s" not in incidental(Sub)  # it says otherwise
    assert "extra" not in incidental(Sub)
    assert describe(Path("here")) == "here"


def test_what_belongs_to_a_machine_is_not_in_a_checkpoint(parts):
    _, data = parts()
    assert set(data.state_dict()) == {"curriculum", "ahead"}  # and not how far an engine and a trainer are apart there


@pytest.mark.parametrize("strategy", ["ddp", "auto", "fsdp2"])
def test_ranks_wait_for_one_another_as_long_with_every_strategy(strategy):
    assert time_limit(trainer(strategy=strategy, devices=2).strategy) == timedelta(minutes=120)


def test_threads_of_ranks_wait_for_one_another_as_long_as_the_ranks(parts, monkeypatch):
    asked = []
    monkeypatch.setattr("aspo_lightning.collectives.world_size", lambda: 2)
    monkeypatch.setattr(dist, "new_group", lambda **settings: asked.append(settings))
    limit = time_limit(trainer(strategy=FSDP2Strategy(timeout_minutes=300), devices=2).strategy)
    thread_group(limit)
    assert asked == [{"backend": "gloo", "timeout": timedelta(minutes=300)}]
    assert time_limit(trainer(devices=1).strategy) is None
    monkeypatch.undo()
    monkeypatch.setattr("aspo_lightning.datamodule.time_limit", lambda strategy: limit)
    monkeypatch.setattr("aspo_lightning.datamodule.thread_group", asked.append)
    module, data = parts(engine=Elsewhere(), lag=1, probe_factor=None)
    trainer(max_epochs=1).fit(module, data)
    assert asked[1:] == [limit]
    data.close()


def test_data_modules_share_no_engine_and_no_curriculum(tiny_model):
    first, second = RolloutDataModule(tiny_model), RolloutDataModule(tiny_model)
    assert first.engine is not second.engine
    assert first.curriculum is not second.curriculum


def test_an_evaluation_does_not_depend_on_how_fast_its_engine_is():
    assert describe(VLLMEngine(timeout_s=5, max_num_seqs=2)) == describe(VLLMEngine())
    assert describe(VLLMEngine(dtype="float16")) != describe(VLLMEngine())
    assert describe(TransformersEngine()) != describe(VLLMEngine())


def test_corrections_of_a_mismatch_need_the_log_probs_of_all_tokens(parts):
    for correction in (TruncatedRatio(), Bypass()):
        with pytest.raises(ConfigError, match=r"data.mismatch is \w+ and data.top_p 0.7"):
            parts(top_p=0.7, mismatch=correction)
    _, data = parts(top_p=0.7, eval_top_p=0.9)
    assert data.settings.top_p == 0.7
    assert data.evaluations["sums"].top_p == 0.9


class Elsewhere(TransformersEngine):
    """Samples in the process, and takes its time; notes when it samples and when it gets weights."""

    apart = True

    def __init__(self) -> None:
        super().__init__()
        self.notes: list[str] = []

    def generate(self, requests):
        self.notes.append("begins")
        for found in super().generate(requests):
            time.sleep(0.05)
            yield found
        self.notes.append("ends")

    def sync_weights(self, named_tensors):
        super().sync_weights(named_tensors)
        self.notes.append("weights")


def test_an_engine_that_samples_ahead_gets_no_weights_meanwhile(parts, tmp_path):
    """Neither for an evaluation, after each epoch here, nor for the next phase; and a checkpoint waits as well."""

    class Saved(ModelCheckpoint):
        def on_train_epoch_end(self, trainer, pl_module):
            super().on_train_epoch_end(trainer, pl_module)
            engine.notes.append("saved")

    module, data = parts(engine=(engine := Elsewhere()), lag=1, probe_factor=None)
    trainer(Saved(tmp_path), max_epochs=3, limit_val_batches=1).fit(module, data)
    data.close()
    phases = ["begins", "ends"]
    first = ["weights", *phases, "begins"]  # the phase of epoch 0, and that of epoch 1 while 0 trains
    evaluation = ["weights", *phases]
    after = ["ends", *evaluation, "saved"]
    assert engine.notes == [*first, *after, "weights", "begins", *after, *evaluation, "saved"]

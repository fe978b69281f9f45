"""RolloutDataModule: Lightning hooks that make each epoch's data by sampling from the policy."""

import gc
import os
from collections.abc import Iterator
from itertools import chain
from typing import Any, TypeVar

import torch
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.seed import isolate_rng

from aspo_lightning.collectives import thread_group
from aspo_lightning.curriculum import Curriculum, Shuffled, resume, saved
from aspo_lightning.engines import Engine, VLLMEngine
from aspo_lightning.engines.base import engine_errors
from aspo_lightning.errors import ConfigError
from aspo_lightning.evaluation.metrics import measure
from aspo_lightning.evaluation.results import Conditions, Results
from aspo_lightning.identity import describe, prompts_digest, weights_digest
from aspo_lightning.policy.hub import load_config, load_tokenizer, resolve_model
from aspo_lightning.rewards import RewardPool
from aspo_lightning.rollouts.ahead import PhaseSampler
from aspo_lightning.rollouts.checks import (
    check_agreement,
    check_engine_devices,
    check_lag,
    check_shared_engines,
    check_trainer,
)
from aspo_lightning.rollouts.loop import Policy, Rollouts, sync
from aspo_lightning.rollouts.mismatch import Probe
from aspo_lightning.rollouts.sampling import Sampler
from aspo_lightning.rollouts.settings import RolloutSettings, check_phase
from aspo_lightning.run.lightning import accumulate, next_epoch, no_stop_before, time_limit
from aspo_lightning.run.memory import keep_freed_memory
from aspo_lightning.tasks.base import Task, training_prompts, without_long
from aspo_lightning.types import Evaluation, MicroBatch, Phase, Prompt, State

EVALUATION_EPOCH = -1  # evaluations draw with the same seeds each time, so that they compare


Batch = TypeVar("Batch", MicroBatch, Evaluation)


class RolloutDataModule(LightningDataModule):
    """Samples a phase of rollouts for every epoch, on policy but for ``data.lag``, and plans its micro-batches.

    Args:
        model_name_or_path: the policy (set by ``model.model_name_or_path`` on the command line).
        train: where training prompts come from, by class name: Dataset, ReasoningGym, MultipleChoice, Mixture. None:
            nothing to train on, only to evaluate.
        val: held-out tasks by the name they have in TensorBoard. Their problems are taken out of ``train``, whatever
            templates are around them.
        engine: what samples, by class name: VLLMEngine (None is one with its defaults), VLLMServers,
            TransformersEngine.
        curriculum: which prompts an epoch draws, by class name: Shuffled (None), PassRate, RisingLevels.
        settings: all numbers, see ``RolloutSettings``.
    """

    def __init__(
        self,
        model_name_or_path: str,
        train: Task | None = None,
        val: dict[str, Task] | None = None,
        engine: Engine | None = None,
        curriculum: Curriculum | None = None,
        **settings: Any,
    ) -> None:
        super().__init__()
        self.settings = RolloutSettings(**settings)
        self.model_name_or_path = resolve_model(model_name_or_path)
        self.train_task, self.val_tasks = train, val or {}
        self.evaluations = self.settings.evaluations(self.val_tasks)
        self.curriculum = curriculum or Shuffled()
        self.engine = engine or VLLMEngine()
        self.engine.check()
        check_lag(self.settings.lag, self.engine)
        lengths = (self.settings.max_completion_length if train else 0, self.settings.eval_length if val else 0)
        self.context_length = self.settings.max_prompt_length + max(lengths)
        self.pool = RewardPool(self.settings.reward_workers, self.settings.reward_timeout_s)
        self.phase: Phase | None = None
        self.train_prompts: list[Prompt] = []
        self.val_prompts: dict[str, list[Prompt]] = {}
        self.results: Results | None = None  # where an evaluation is kept, set before it starts
        self.probe: Probe | None = None
        self._sampler: Sampler | None = None
        self.rollouts: Rollouts | None = None
        self._started_for: int | None = None  # the rank of adapters that the engine has been started for

    @property
    def _policy(self) -> Policy:
        assert self.trainer is not None
        policy = self.trainer.lightning_module
        assert isinstance(policy, Policy)
        return policy

    def setup(self, stage: str) -> None:
        if self.trainer is not None:  # None: called by hand, for a look at the prompts
            check_agreement(self._policy, self.model_name_or_path, self.settings.temperature)
            check_shared_engines(self.engine, self.trainer.world_size)
            check_engine_devices(self.engine, self.trainer.device_ids)
            if stage == "fit":
                check_trainer(self.trainer, self.phase)
        if self.train_task is None and stage == "fit":
            raise ConfigError("There is nothing to train on: data.train isn't set. `aspo configs` lists tasks: data/…")
        if not self.val_tasks and stage != "fit":
            raise ConfigError(
                "There is nothing to evaluate: data.val isn't set. `aspo configs` lists benchmarks: eval/…"
            )
        self._stop_sampling()  # of a fit that failed
        self._forget_phase()
        self.results = None  # of an evaluation that failed
        if self.probe:
            self.probe.first = None  # an earlier fit may have been in another precision
        if not (self.train_prompts or self.val_prompts):
            self._prepare()
        if self.trainer is None:
            return
        if self.trainer.strategy.root_device.type == "cpu":
            keep_freed_memory()
        rank, world_size = self.trainer.global_rank, self.trainer.world_size
        group = thread_group(time_limit(self.trainer.strategy)) if self.settings.lag and stage == "fit" else None
        self._sampler = Sampler(
            self.engine,
            self.pool,
            self.tokenizer,
            rank=rank,
            world_size=world_size,
            process_group=group,
            repetition_ngram=self.settings.repetition_ngram,
        )
        self.rollouts = Rollouts(
            PhaseSampler(self._sampler, self.curriculum, self.train_prompts, self.settings),
            probe=self.probe,
            quadratic_cost=self._quadratic_cost,
        )
        if self._started_for != self._policy.adapter_rank:
            self.engine.stop()  # of another module's fit
            self._start_engine(self.trainer)
        # All that is loaded by now stays for as long. Searches for garbage would go through it again and again: most of
        # what a completion costs here.
        gc.freeze()

    def _prepare(self) -> None:
        """Makes everything that the model's config and the prompts determine."""
        config = load_config(self.model_name_or_path)
        context = getattr(config, "max_position_embeddings", None)
        if context is not None and self.context_length > context:
            raise ConfigError(
                f"data.max_prompt_length {self.settings.max_prompt_length} and the longest completion make "
                f"{self.context_length} tokens, more than the {context} that {self.model_name_or_path} was made for. "
                "Lower max_prompt_length, max_completion_length or eval_max_completion_length."
            )
        # Attention costs about n / (6 hidden_size) of what the linear layers do for a sequence of n tokens.
        self._quadratic_cost = 1 / (6 * config.hidden_size)
        tasks = [*([self.train_task] if self.train_task else []), *self.val_tasks.values()]
        self.pool.load(f for task in tasks for f in sorted(task.functions()))
        self.tokenizer = load_tokenizer(self.model_name_or_path)
        self.val_prompts = {name: self._prompts(task, f"data.val.{name}") for name, task in self.val_tasks.items()}
        if self.train_task:
            prompts = self._prompts(self.train_task, "data.train")
            self.train_prompts = training_prompts(prompts, self.val_prompts.values())
            settings = self.settings
            check_phase(len(self.train_prompts), settings)
            self.curriculum.check(self.train_prompts, settings.prompts_per_phase)
            if settings.probe_factor is not None:
                self.probe = Probe(config.vocab_size, self.context_length, settings.temperature, settings.probe_factor)
        size = self.engine.tensor_parallel_size
        if size > 1 and any(p.environment for p in chain(self.train_prompts, *self.val_prompts.values())):
            raise ConfigError(
                "An environment's replies are made on each rank, and ranks that share an engine (tensor_parallel_size "
                f"{size}) need the same ones. Set tensor_parallel_size to 1, or leave the environment out of the tasks."
            )

    def _start_engine(self, trainer: Trainer) -> None:
        """While the GPU is still empty: an engine takes its share of the whole, and then sleeps until weights come."""
        rank = self._policy.adapter_rank
        if trainer.world_size > 1:
            # vLLM looks for them; Lightning leaves out the first with its own launcher, under SLURM both.
            os.environ.update(RANK=str(trainer.global_rank), LOCAL_RANK=str(trainer.local_rank))
        with engine_errors(at_start=True), isolate_rng():  # vLLM seeds torch, and adapters aren't drawn yet
            self.engine.expect_adapters(rank)
            self.engine.start(self.model_name_or_path, context_length=self.context_length)
            self.engine.sleep()
        self._started_for = rank

    def train_dataloader(self) -> Phase:
        """The micro-batches of the epoch that comes next; sampled once, however often this is called."""
        trainer = self.trainer
        assert trainer is not None
        epoch = next_epoch(trainer)
        if trainer.max_epochs is not None and 0 <= trainer.max_epochs <= epoch:
            return Phase(epoch, [], accumulate=1, groups=[])  # resumed after it had finished
        if self.phase is None or self.phase.epoch != epoch:
            assert self.rollouts is not None
            limited = trainer.max_epochs is not None and trainer.max_epochs >= 0
            self.phase = self.rollouts.phase(self._policy, epoch, end=trainer.max_epochs if limited else None)
            no_stop_before(trainer, trainer.global_step + len(self.phase) // self.phase.accumulate)
        accumulate(trainer, self.phase.accumulate)
        return self.phase

    def val_dataloader(self) -> list["_EvaluationLoader"]:
        return [_EvaluationLoader(self, name) for name in self.val_prompts]

    def test_dataloader(self) -> list["_EvaluationLoader"]:
        return self.val_dataloader()

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        return batch.to(device)  # our own: Lightning's refuses frozen dataclasses

    def teardown(self, stage: str) -> None:
        self._stop_sampling()
        self.pool.close()
        self._forget_phase()
        gc.unfreeze()

    def on_exception(self, exception: BaseException) -> None:
        gc.unfreeze()  # teardown doesn't come
        if self.engine.apart:
            self._started_for = None  # what has gone wrong may be a server, which is to be met anew then
        if self.rollouts:
            self.rollouts.phases.cancel()  # without waiting: another rank may be gone

    def _stop_sampling(self) -> None:
        if self.rollouts:
            self.rollouts.phases.stop()

    def _forget_phase(self) -> None:
        self.phase = None  # what comes next may be another model
        if self.trainer is not None:
            accumulate(self.trainer, 1)

    def close(self) -> None:
        """Frees the engine, which otherwise stays for another fit, validate or test."""
        self._stop_sampling()
        self.pool.close()
        self.engine.stop()
        self._started_for = None

    def state_dict(self) -> State:
        # First: the curriculum may still learn from what is being sampled.
        ahead = self.rollouts.phases.state_dict() if self.rollouts else []
        return {"curriculum": saved(self.curriculum), "ahead": ahead}

    def load_state_dict(self, state_dict: State) -> None:
        if self.train_task is None:
            return  # only evaluates
        resume(self.curriculum, state_dict["curriculum"])
        if self.rollouts and self.trainer is not None and self.trainer.state.fn == TrainerFn.FITTING:
            self.rollouts.phases.load_state_dict(state_dict.get("ahead", []))

    def evaluate(self, name: str) -> Evaluation:
        """Samples and scores the held-out task ``name`` with the current policy."""
        assert self._sampler is not None
        assert self.rollouts is not None
        self.rollouts.phases.wait()  # the engine gets other weights
        sync(self.engine, self._policy)
        groups, _ = self._sampler.groups(
            self.val_prompts[name],
            self.evaluations[name],
            epoch=EVALUATION_EPOCH,
            description=f"evaluate {name}",
            vote=self.evaluations[name].group_size > 1,
            journal=self.results.journal(name) if self.results else None,
        )
        self.engine.sleep()
        measurements = measure(groups, self.settings.eval_k or ())
        if self.results:
            self.results.add(name, groups, measurements)
        return Evaluation(groups, {f"eval/{name}/{key}": m.value for key, m in measurements.items()})

    def evaluation_settings(self) -> Conditions:
        """All that the numbers of an evaluation depend on, as plain data; the policy's weights too (collective)."""
        assert self.trainer is not None
        return {
            "model": self.model_name_or_path,
            "weights": weights_digest(self._policy.policy_weights()),
            "max_prompt_length": self.settings.max_prompt_length,
            "k": self.settings.eval_k or [],
            "reward_timeout_s": self.settings.reward_timeout_s,
            "engine": describe(self.engine),
            "benchmarks": {
                name: {
                    "sampling": self.evaluations[name]._asdict(),
                    "prompts": prompts_digest(self.val_prompts[name]),
                    "task": describe(task),
                }
                for name, task in self.val_tasks.items()
            },
        }

    def _prompts(self, task: Task, name: str) -> list[Prompt]:
        return without_long(task.prompts(self.tokenizer), self.settings.max_prompt_length, name)


class _EvaluationLoader:
    """One batch: a benchmark, sampled when it is asked for."""

    def __init__(self, data: RolloutDataModule, name: str) -> None:
        self._data, self._name = data, name

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Iterator[Evaluation]:
        yield self._data.evaluate(self._name)

"""RolloutDataModule: Lightning hooks that make each epoch's data by sampling from the current policy."""

import os
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any, TypeVar

import torch
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.utilities.seed import isolate_rng

from aspo_lightning.curriculum import Curriculum, Shuffled, resume, saved
from aspo_lightning.engines import Engine, VLLMEngine
from aspo_lightning.engines.base import engine_errors
from aspo_lightning.errors import ConfigError
from aspo_lightning.evaluation.metrics import measure
from aspo_lightning.evaluation.results import Conditions, Results
from aspo_lightning.identity import describe, prompts_digest, weights_digest
from aspo_lightning.policy.hub import load_config, load_tokenizer, resolve_model
from aspo_lightning.rewards import RewardPool
from aspo_lightning.rollouts.loop import Policy, Rollouts, sync
from aspo_lightning.rollouts.mismatch import Probe
from aspo_lightning.rollouts.sampling import Sampler
from aspo_lightning.rollouts.settings import RolloutSettings, check_phase
from aspo_lightning.run.lightning import accumulate, callback_of, next_epoch, no_stop_before
from aspo_lightning.tasks.base import Task, training_prompts, without_long
from aspo_lightning.types import Evaluation, MicroBatch, Phase, Prompt, State

EVALUATION_EPOCH = -1  # evaluations draw with the same seeds each time, so that they compare


Batch = TypeVar("Batch", MicroBatch, Evaluation)


class RolloutDataModule(LightningDataModule):
    """Samples a phase of rollouts for every epoch, on policy, and plans its micro-batches.

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
        self._forget_phase()  # of a fit that failed
        if not (self.train_prompts or self.val_prompts):
            self._prepare()
        if self.trainer is None:
            return
        rank, world_size = self.trainer.global_rank, self.trainer.world_size
        self._sampler = Sampler(self.engine, self.pool, self.tokenizer, rank=rank, world_size=world_size)
        self.rollouts = Rollouts(
            self._sampler,
            self.curriculum,
            self.train_prompts,
            self.settings,
            probe=self.probe,
            quadratic_cost=self._quadratic_cost,
        )
        if self._started_for != self._policy.adapter_rank:
            self.engine.stop()  # of another module's fit
            self._start_engine(self.trainer)

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
            self.phase = self.rollouts.phase(self._policy, epoch)
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
        self.pool.close()
        self._forget_phase()

    def _forget_phase(self) -> None:
        self.phase = None  # what comes next may be another model
        if self.trainer is not None:
            accumulate(self.trainer, 1)

    def close(self) -> None:
        """Frees the engine, which otherwise stays for another fit, validate or test."""
        self.pool.close()
        self.engine.stop()
        self._started_for = None

    def state_dict(self) -> State:
        return {"curriculum": saved(self.curriculum)}

    def load_state_dict(self, state_dict: State) -> None:
        if self.train_task is None:
            return  # only evaluates
        resume(self.curriculum, state_dict["curriculum"])

    def evaluate(self, name: str) -> Evaluation:
        """Samples and scores the held-out task ``name`` with the current policy."""
        assert self._sampler is not None
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


def check_shared_engines(engine: Engine, ranks: int) -> None:
    """Raises ConfigError unless the ranks can be shared out among engines."""
    if ranks % engine.tensor_parallel_size:
        raise ConfigError(
            f"data.engine shares an engine among tensor_parallel_size {engine.tensor_parallel_size} ranks, but there "
            f"are {ranks}; it must divide them."
        )


def check_engine_devices(engine: Engine, device_ids: Sequence[int]) -> None:
    """Raises ConfigError if vLLM, which takes this machine's GPUs in their order, would be on others than the trainer.

    Args:
        engine: what samples.
        device_ids: of the trainer's GPUs on this machine, by rank.
    """
    if isinstance(engine, VLLMEngine) and list(device_ids) != list(range(len(device_ids))):
        raise ConfigError(
            f"trainer.devices chooses GPU {', '.join(map(str, device_ids))}, but VLLMEngine takes a machine's GPUs "
            "from the first on. Name those you want in the environment variable CUDA_VISIBLE_DEVICES, like 4,5, and "
            f"give trainer.devices their number, {len(device_ids)}."
        )


def check_agreement(policy: Policy, model_name_or_path: str, temperature: float) -> None:
    """Raises ConfigError unless what trains is what is sampled from."""
    if policy.model_name_or_path != model_name_or_path:
        raise ConfigError(
            f"The module has the model {policy.model_name_or_path} and the data module {model_name_or_path}: give both "
            "the same model_name_or_path."
        )
    if policy.temperature != temperature:
        raise ConfigError(
            f"The module trains at temperature {policy.temperature} and the data module samples at {temperature}: give "
            "both the same temperature."
        )


def check_trainer(trainer: Trainer, phase: Phase | None) -> None:
    """Raises ConfigError for a Trainer that would train on anything but whole phases, one each epoch."""
    settings = vars(trainer)  # not all of them are declared
    if settings["reload_dataloaders_every_n_epochs"] != 1:
        raise ConfigError(
            f"trainer.reload_dataloaders_every_n_epochs is {settings['reload_dataloaders_every_n_epochs']}: all epochs "
            "would train on the rollouts of the first. Set it to 1."
        )
    if trainer.accumulate_grad_batches not in (1, phase.accumulate if phase else 1) or callback_of(
        trainer, GradientAccumulationScheduler
    ):
        raise ConfigError(
            f"trainer.accumulate_grad_batches is {trainer.accumulate_grad_batches}, but each phase plans its own "
            "micro-batches. Leave it out; data.token_budget bounds a micro-batch, data.optimizer_steps says how many "
            "updates a phase is for."
        )
    if trainer.val_check_interval != 1.0 or trainer.check_val_every_n_epoch is None:
        raise ConfigError(
            f"trainer.val_check_interval is {trainer.val_check_interval} and trainer.check_val_every_n_epoch "
            f"{trainer.check_val_every_n_epoch}, but evaluations come between phases, whose batches differ in number. "
            "Leave the first out, and set the second to a number of epochs."
        )
    if settings["fast_dev_run"]:
        return  # a look at whether anything runs at all
    for name, usual in (("limit_train_batches", 1.0), ("overfit_batches", 0)):
        if settings[name] != usual:
            raise ConfigError(
                f"trainer.{name} is {settings[name]}: an optimizer step would have part of its micro-batches, under "
                "loss weights meant for all of them. Leave it out; data.prompts_per_phase and data.optimizer_steps "
                "make a phase smaller."
            )

"""RolloutDataModule: Lightning hooks that make each epoch's data by sampling from the current policy."""

import math
import os
import time
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Annotated, Any, cast

import torch
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from aspo_lightning.advantages import AdvantageEstimator
from aspo_lightning.curriculum import Curriculum, Shuffled, resume, saved
from aspo_lightning.engines import Generator, VLLMEngine
from aspo_lightning.engines.base import engine_errors
from aspo_lightning.errors import ConfigError
from aspo_lightning.evaluation.metrics import measure
from aspo_lightning.evaluation.results import Results
from aspo_lightning.identity import INCIDENTAL, describe, prompts_digest, weights_digest
from aspo_lightning.policy.hub import load_config, load_tokenizer, resolve_model
from aspo_lightning.rewards import RewardPool
from aspo_lightning.rollouts.loop import Policy, build_phase, sample_phase
from aspo_lightning.rollouts.mismatch import Probe
from aspo_lightning.rollouts.sampling import sample_groups
from aspo_lightning.rollouts.settings import (
    Averaging,
    MismatchCorrection,
    NoSpread,
    Sampling,
    Shaping,
    TruncatedRule,
    check_phase,
    check_sampling,
    sizes_by_task,
)
from aspo_lightning.rollouts.shaping import has_task_spread
from aspo_lightning.tasks.base import Task, without_held_out, without_long
from aspo_lightning.types import Evaluation, MicroBatch, Phase, Prompt, RolloutGroup

EVALUATION_EPOCH = -1  # evaluations draw with the same seeds each time, so that they compare


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
        prompts_per_phase: prompts of an epoch.
        group_size: completions of each prompt, compared with each other.
        optimizer_steps: updates of a pass through the phase; the kept groups are shared among them.
        passes: how often an epoch goes through its phase (1; the released script of the paper: 3).
        no_spread: groups whose completions all have one reward are dropped (the released script), kept (their zeros
            count in the average), or replaced by sampling more prompts (refill: DAPO's dynamic sampling).
        max_refills: how many more times refill may sample in an epoch.
        truncated: a completion that ran into the length limit gets its score, zero, or is left out of the loss (mask).
        overlong_buffer: tokens before max_completion_length over which a penalty rises (DAPO). 0: none.
        overlong_penalty: that penalty at full length.
        max_prompt_length: tokens; longer prompts are dropped.
        max_completion_length: tokens; a longer completion is cut off there.
        temperature: of sampling; the trainer divides its logits by the same.
        top_p: nucleus of sampling. Below 1 there is no mismatch correction: the engine's log-probs are then of the
            nucleus, the trainer's of all tokens.
        token_budget: the most tokens of a micro-batch; bounds the trainer's memory. None: one longest sequence.
        advantage: group_std (GRPO), group_mean (Dr. GRPO), leave_one_out (RLOO), batch_std (REINFORCE++ baseline).
        averaging: token_mean (the paper's), sequence_mean (GRPO), sequence_sum (Dr. GRPO).
        mismatch_correction: off, truncate (TIS) or mask (IcePop) by the ratio of old to generator log-probs.
        mismatch_bounds: that ratio's bounds.
        eval_group_size: completions of each held-out prompt: k of avg@k; a number, or one for each task of ``val``.
        eval_k: further k, up to that number, to give pass@k and maj@k for.
        eval_temperature: of sampling in evaluations; 0 is greedy.
        eval_top_p: nucleus of sampling in evaluations.
        eval_max_completion_length: tokens in evaluations. None: max_completion_length.
        probe_factor: how much further engine and trainer may get apart, on a probe after each sync, than they are at
            first. None: no probe.
        reward_workers: processes that score completions, on each rank.
        reward_timeout_s: wall-clock limit of one score.
        seed: of prompts and sampling (set by ``seed_everything`` on the command line).
    """

    def __init__(
        self,
        model_name_or_path: str,
        train: Task | None = None,
        val: dict[str, Task] | None = None,
        engine: Generator | None = None,
        curriculum: Curriculum | None = None,
        prompts_per_phase: int = 64,
        group_size: int = 16,
        optimizer_steps: int = 4,
        passes: int = 1,
        no_spread: NoSpread = "drop",
        max_refills: int = 3,
        truncated: TruncatedRule = "score",
        overlong_buffer: int = 0,
        overlong_penalty: float = 1.0,
        max_prompt_length: int = 2048,
        max_completion_length: int = 8192,
        temperature: float = 1.0,
        top_p: float = 1.0,
        token_budget: Annotated[int | None, INCIDENTAL] = None,
        advantage: AdvantageEstimator = "group_std",
        averaging: Averaging = "token_mean",
        mismatch_correction: MismatchCorrection = "off",
        mismatch_bounds: tuple[float, float] = (0.5, 2.0),
        eval_group_size: Annotated[int | dict[str, int], INCIDENTAL] = 1,
        eval_k: Annotated[list[int] | None, INCIDENTAL] = None,
        eval_temperature: Annotated[float, INCIDENTAL] = 0.8,
        eval_top_p: Annotated[float, INCIDENTAL] = 1.0,
        eval_max_completion_length: Annotated[int | None, INCIDENTAL] = None,
        probe_factor: Annotated[float | None, INCIDENTAL] = 20.0,
        reward_workers: Annotated[int, INCIDENTAL] = 2,
        reward_timeout_s: float = 5.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.model_name_or_path = resolve_model(model_name_or_path)
        self.eval_group_sizes = sizes_by_task(eval_group_size, val or {})
        self.eval_k = eval_k or []
        if probe_factor is not None and not 1 <= probe_factor < math.inf:
            raise ConfigError(f"data.probe_factor is {probe_factor}; it is at least 1, or null for no probe.")
        eval_length = max_completion_length if eval_max_completion_length is None else eval_max_completion_length
        self.sampling = Sampling(group_size, max_completion_length, temperature, top_p, seed)
        self.eval_sampling = {
            name: Sampling(size, eval_length, eval_temperature, eval_top_p, seed)
            for name, size in self.eval_group_sizes.items()
        }
        check_sampling(self.sampling, "data.group_size", "data.")
        for name, sampling in self.eval_sampling.items():
            check_sampling(sampling, f"data.eval_group_size of {name}", "data.eval_")
            if wrong := [k for k in self.eval_k if not 1 <= k <= sampling.group_size]:
                raise ConfigError(
                    f"data.eval_k has {wrong[0]}, but {name} is sampled {sampling.group_size} times a problem. Allowed "
                    f"are 1 to {sampling.group_size}; raise data.eval_group_size for more."
                )
        if group_size < 2:
            raise ConfigError(
                f"data.group_size is {group_size}; completions are judged against each other, so it must be at least 2."
            )
        for name, value in (
            ("eval_max_completion_length", eval_length),
            ("prompts_per_phase", prompts_per_phase),
            ("optimizer_steps", optimizer_steps),
            ("passes", passes),
            ("max_prompt_length", max_prompt_length),
            ("max_completion_length", max_completion_length),
        ):
            if value < 1:
                raise ConfigError(f"data.{name} is {value}; it must be at least 1.")
        self.longest_sequence = longest = max_prompt_length + max_completion_length
        token_budget = longest if token_budget is None else token_budget
        if token_budget < longest:
            raise ConfigError(
                f"data.token_budget is {token_budget}, less than the longest sequence: max_prompt_length "
                f"{max_prompt_length} + max_completion_length {max_completion_length} = {longest}. Raise it."
            )
        if not 0 <= mismatch_bounds[0] <= 1 <= mismatch_bounds[1]:
            raise ConfigError(f"data.mismatch_bounds are {mismatch_bounds}; they must enclose 1, like 0.5 and 2.")
        if mismatch_correction != "off" and top_p < 1:
            raise ConfigError(
                f"data.mismatch_correction is {mismatch_correction} and data.top_p {top_p}: the engine's log-probs are "
                "then of the nucleus and the trainer's of all tokens, so their ratio corrects nothing. Set top_p to 1, "
                "or mismatch_correction to off."
            )
        if not 0 <= overlong_buffer <= max_completion_length:
            raise ConfigError(
                f"data.overlong_buffer is {overlong_buffer}; allowed are 0 (no penalty) to max_completion_length "
                f"{max_completion_length}."
            )
        if max_refills < 0 or not 0 <= overlong_penalty < math.inf:
            raise ConfigError(
                f"data.max_refills is {max_refills} and data.overlong_penalty {overlong_penalty}; both are at least 0."
            )
        self.train_task, self.val_tasks = train, val or {}
        self.curriculum = curriculum or Shuffled()
        self.engine = engine or VLLMEngine()
        self.engine.check()
        self.prompts_per_phase = prompts_per_phase
        self.max_refills = max_refills if no_spread == "refill" else 0
        self.optimizer_steps = optimizer_steps
        self.max_prompt_length = max_prompt_length
        self.context_length = max_prompt_length + max(max_completion_length if train else 0, eval_length if val else 0)
        self.phase_settings: dict[str, Any] = {
            "optimizer_steps": optimizer_steps,
            "token_budget": token_budget,
            "max_completion_length": max_completion_length,
            "advantage": advantage,
            "averaging": averaging,
            "shaping": Shaping(truncated, overlong_buffer, overlong_penalty),
            "no_spread": no_spread,
            "passes": passes,
            "mismatch_correction": mismatch_correction,
            "mismatch_bounds": mismatch_bounds,
        }
        self.reward_timeout_s = reward_timeout_s
        self.pool = RewardPool(reward_workers, reward_timeout_s)
        self.phase: Phase | None = None
        self.train_prompts: list[Prompt] = []
        self.val_prompts: dict[str, list[Prompt]] = {}
        self.results: Results | None = None  # where an evaluation is kept, set before it starts
        self.probe_factor = probe_factor
        self.probe: Probe | None = None
        self._started = False

    @property
    def _policy(self) -> Policy:
        assert self.trainer is not None
        return cast(Policy, self.trainer.lightning_module)

    def setup(self, stage: str) -> None:
        if self.trainer is not None:  # None: called by hand, for a look at the prompts
            check_agreement(self._policy, self.model_name_or_path, self.sampling.temperature)
            check_shared_engines(self.engine, self.trainer.world_size)
            check_engine_devices(self.engine, self.trainer.device_ids)
            if stage == "fit":
                check_trainer(self.trainer, self.phase)
        if self.train_task is None and stage == "fit":
            raise ConfigError("There is nothing to train on: data.train isn't set. See configs/data and the README.")
        if not self.val_tasks and stage != "fit":
            raise ConfigError("There is nothing to evaluate: data.val isn't set. See configs/eval and the README.")
        self._forget_phase()  # of a fit that failed
        if not (self.train_prompts or self.val_prompts):
            self._prepare()
        if self.trainer is not None and not self._started:
            self._start_engine(self.trainer)

    def _prepare(self) -> None:
        """Makes all that the model's config and the prompts decide."""
        config = load_config(self.model_name_or_path)
        context = getattr(config, "max_position_embeddings", None)
        if context is not None and self.context_length > context:
            raise ConfigError(
                f"data.max_prompt_length {self.max_prompt_length} and the longest completion make "
                f"{self.context_length} tokens, more than the {context} that {self.model_name_or_path} was made for. "
                "Lower max_prompt_length, max_completion_length or eval_max_completion_length."
            )
        # Attention costs about n / (6 hidden_size) of what the linear layers do for a sequence of n tokens.
        self.phase_settings["quadratic_cost"] = 1 / (6 * config.hidden_size)
        tasks = [*([self.train_task] if self.train_task else []), *self.val_tasks.values()]
        self.pool.load(f for task in tasks for f in sorted(task.functions()))
        self.tokenizer = load_tokenizer(self.model_name_or_path)
        self.val_prompts = {name: self._prompts(task, f"data.val.{name}") for name, task in self.val_tasks.items()}
        if self.train_task:
            prompts = self._prompts(self.train_task, "data.train")
            self.train_prompts = without_held_out(prompts, self.val_prompts.values())
            check_phase(len(self.train_prompts), self.prompts_per_phase, self.optimizer_steps)
            self.curriculum.check(self.train_prompts, self.prompts_per_phase)
            if self.probe_factor is not None:
                self.probe = Probe(config.vocab_size, self.context_length, self.sampling.temperature, self.probe_factor)
        size = self.engine.tensor_parallel_size
        if size > 1 and any(p.environment for p in chain(self.train_prompts, *self.val_prompts.values())):
            raise ConfigError(
                "An environment's replies are made on each rank, and ranks that share an engine (tensor_parallel_size "
                f"{size}) need the same ones. Set tensor_parallel_size to 1, or leave the environment out of the tasks."
            )

    def _start_engine(self, trainer: Trainer) -> None:
        """While the GPU still is empty: an engine takes its share of the whole, and then sleeps until weights come."""
        if trainer.world_size > 1:
            # vLLM looks for them; Lightning leaves out the first with its own launcher, under SLURM both.
            os.environ.update(RANK=str(trainer.global_rank), LOCAL_RANK=str(trainer.local_rank))
        with engine_errors(at_start=True), isolate_rng():  # vLLM seeds torch, and adapters aren't drawn yet
            self.engine.start(self.model_name_or_path, context_length=self.context_length)
            self.engine.sleep()
        self._started = True

    def train_dataloader(self) -> Phase:
        """The micro-batches of the epoch that comes next; sampled once, however often this is called."""
        trainer = self.trainer
        assert trainer is not None
        # Not current_epoch: on resume Lightning asks first while that still is the epoch already finished.
        epoch = trainer.fit_loop.epoch_progress.current.processed  # type: ignore[attr-defined]
        if trainer.max_epochs is not None and 0 <= trainer.max_epochs <= epoch:
            return Phase(epoch, [], accumulate=1, groups=[])  # a run resumed behind its end
        if self.phase is None or self.phase.epoch != epoch:
            self.phase = self._run_phase(epoch)
            no_stop_before(trainer, trainer.global_step + len(self.phase) // self.phase.accumulate)
        trainer.accumulate_grad_batches = self.phase.accumulate
        return self.phase

    def val_dataloader(self) -> list["_EvaluationLoader"]:
        return [_EvaluationLoader(self, name) for name in self.val_prompts]

    def test_dataloader(self) -> list["_EvaluationLoader"]:
        return self.val_dataloader()

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        return batch.to(device)  # our own: Lightning's refuses frozen dataclasses

    def teardown(self, stage: str) -> None:
        self.pool.close()
        self._forget_phase()

    def _forget_phase(self) -> None:
        self.phase = None  # what comes next may be another model
        if self.trainer is not None:
            self.trainer.accumulate_grad_batches = 1

    def close(self) -> None:
        """Frees the engine, which otherwise stays for another fit, validate or test."""
        self.pool.close()
        self.engine.stop()
        self._started = False

    def state_dict(self) -> dict[str, Any]:
        return {"curriculum": saved(self.curriculum)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self.train_task is None:
            return  # only evaluates
        resume(self.curriculum, state_dict["curriculum"])

    def evaluate(self, name: str) -> Evaluation:
        """Samples and scores the held-out task ``name`` with the current policy."""
        self._sync_engine()
        groups, _ = self._sample(
            self.val_prompts[name],
            self.eval_sampling[name],
            EVALUATION_EPOCH,
            f"evaluate {name}",
            vote=self.eval_sampling[name].group_size > 1,
            journal=self.results.journal(name) if self.results else None,
        )
        self.engine.sleep()
        measurements = measure(groups, self.eval_k)
        if self.results:
            self.results.add(name, groups, measurements)
        return Evaluation(groups, {f"eval/{name}/{key}": m.value for key, m in measurements.items()})

    def evaluation_settings(self) -> dict[str, Any]:
        """All that the numbers of an evaluation depend on, as plain data; the policy's weights too (collective)."""
        assert self.trainer is not None
        sampling = next(iter(self.eval_sampling.values()))
        return {
            "model": self.model_name_or_path,
            "weights": weights_digest(self._policy.policy_weights()),
            "seed": sampling.seed,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_prompt_length": self.max_prompt_length,
            "max_completion_length": sampling.max_tokens,
            "k": self.eval_k,
            "reward_timeout_s": self.reward_timeout_s,
            "engine": describe(self.engine),
            "benchmarks": {
                name: {
                    "samples": self.eval_group_sizes[name],
                    "prompts": prompts_digest(self.val_prompts[name]),
                    "task": describe(task),
                }
                for name, task in self.val_tasks.items()
            },
        }

    def _run_phase(self, epoch: int) -> Phase:
        assert self.trainer is not None
        sync_s = self._sync_engine()
        probe = self.probe.sample(self.engine) if self.probe else None
        groups, times = sample_phase(
            lambda attempt, missing, so_far: self._draw(epoch, attempt, missing, so_far),
            lambda prompts: self._sample(prompts, self.sampling, epoch, "generate"),
            lambda group: has_task_spread(group, self.phase_settings["shaping"]),
            self.prompts_per_phase,
            max_refills=self.max_refills,
        )
        self.engine.sleep()
        learned = self.curriculum.update(groups)
        phase = build_phase(
            groups,
            lambda batches: self._score(batches, probe),
            epoch=epoch,
            max_groups=self.prompts_per_phase,
            rank=self.trainer.global_rank,
            world_size=self.trainer.world_size,
            **self.phase_settings,
        )
        phase.metrics.update(times, **{"time/sync_s": sync_s}, **learned)
        return phase

    def _score(self, batches: Sequence[MicroBatch], probe: MicroBatch | None) -> list[tuple[Tensor, Tensor]]:
        """Scores the phase, and the probe with it: a sharded model is gathered once for both."""
        if self.probe is None or probe is None:
            return self._policy.score(batches)
        *scored, (logprobs, _) = self._policy.score(batches, without_reference=[probe])
        self.probe.check(probe, logprobs)
        return scored

    def _draw(self, epoch: int, attempt: int, missing: int, so_far: Sequence[RolloutGroup]) -> list[Prompt]:
        if attempt == 0:
            return self.curriculum.draw(
                self.train_prompts, self.prompts_per_phase, epoch=epoch, seed=self.sampling.seed
            )
        drawn = {group.prompt.id for group in so_far}
        left = [p for p in self.train_prompts if p.id not in drawn]
        return self.curriculum.draw_more(left, missing, epoch=epoch, seed=self.sampling.seed, attempt=attempt)

    def _sample(
        self, prompts: Sequence[Prompt], sampling: Sampling, epoch: int, description: str, **options: Any
    ) -> tuple[list[RolloutGroup], dict[str, float]]:
        assert self.trainer is not None
        return sample_groups(
            self.engine,
            self.pool,
            self.tokenizer,
            prompts,
            sampling,
            epoch=epoch,
            rank=self.trainer.global_rank,
            world_size=self.trainer.world_size,
            description=description,
            **options,
        )

    def _sync_engine(self) -> float:
        """Gives the engine the policy's weights as they are now. Returns the seconds that took.

        Before every sampling: what changes weights (a step, a callback that averages them, a checkpoint) can't be told
        from the outside.
        """
        start = time.perf_counter()
        with engine_errors():
            self.engine.sync_weights(self._policy.policy_weights(self.engine.weights_dtype))
        return time.perf_counter() - start

    def _prompts(self, task: Task, name: str) -> list[Prompt]:
        return without_long(task.prompts(self.tokenizer), self.max_prompt_length, name)


class _EvaluationLoader:
    """One batch: a benchmark, sampled when it is asked for."""

    def __init__(self, data: RolloutDataModule, name: str) -> None:
        self._data, self._name = data, name

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Iterator[Evaluation]:
        yield self._data.evaluate(self._name)


def check_shared_engines(engine: Generator, ranks: int) -> None:
    """Raises ConfigError unless the ranks can be shared out among engines."""
    if ranks % engine.tensor_parallel_size:
        raise ConfigError(
            f"data.engine shares an engine among tensor_parallel_size {engine.tensor_parallel_size} ranks, but there "
            f"are {ranks}; it must divide them."
        )


def check_engine_devices(engine: Generator, device_ids: Sequence[int]) -> None:
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


def check_trainer(trainer: Any, phase: Phase | None) -> None:
    """Raises ConfigError for a Trainer that would train on something else than whole phases, one each epoch."""
    if trainer.reload_dataloaders_every_n_epochs != 1:
        raise ConfigError(
            f"trainer.reload_dataloaders_every_n_epochs is {trainer.reload_dataloaders_every_n_epochs}: all epochs "
            "would train on the rollouts of the first. Set it to 1."
        )
    if trainer.accumulate_grad_batches not in (1, phase.accumulate if phase else 1) or any(
        isinstance(callback, GradientAccumulationScheduler) for callback in trainer.callbacks
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
    if trainer.fast_dev_run:
        return  # a look at whether anything runs at all
    for name, value, whole in (
        ("limit_train_batches", trainer.limit_train_batches, 1.0),
        ("overfit_batches", trainer.overfit_batches, 0),
    ):
        if value != whole:
            raise ConfigError(
                f"trainer.{name} is {value}: an optimizer step would have part of its micro-batches, under loss "
                "weights meant for all of them. Leave it out; data.prompts_per_phase and data.optimizer_steps make a "
                "phase smaller."
            )


def no_stop_before(trainer: Trainer, step: int) -> None:
    """Has whatever stops a run (max_steps, max_time, EarlyStopping) wait for the end of the phase, at ``step``.

    A phase stopped within could not be resumed: it is sampled by weights that are gone.
    """
    loop = trainer.fit_loop.epoch_loop
    loop.min_steps = max(loop.min_steps or 0, step)
    if trainer.global_step < loop.max_steps < step:
        loop.max_steps = step

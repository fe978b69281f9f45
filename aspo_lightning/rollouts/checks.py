"""What has to fit together before anything is trained: module, data module, engine and Trainer."""

from collections.abc import Sequence

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler

from aspo_lightning.engines import Engine, VLLMEngine
from aspo_lightning.errors import ConfigError
from aspo_lightning.rollouts.loop import Policy
from aspo_lightning.run.lightning import callback_of
from aspo_lightning.types import Phase


def check_lag(lag: int, engine: Engine) -> None:
    """Raises ConfigError for an engine that can't sample while the trainer works."""
    if lag and not engine.apart:
        raise ConfigError(
            f"data.lag is {lag}, but {type(engine).__name__} samples on the trainer's own devices, which can't do two "
            "things at a time. Set lag to 0, or sample on others: data.engine VLLMServers, see docs/clusters.md."
        )


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

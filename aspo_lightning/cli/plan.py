"""``aspo plan --config ...``: what a run takes, before anyone rents a GPU for it."""

import os
from dataclasses import replace
from typing import Any

import torch
from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser

from aspo_lightning.cli.fit import ASPOCLI, check_checkpoints, check_strategy
from aspo_lightning.cli.memory import DEFAULT_GPU_MEMORY, GB, MemoryPlan, Run, optimizer_states, plan_memory
from aspo_lightning.cli.times import time_lines
from aspo_lightning.datamodule import RolloutDataModule
from aspo_lightning.fsdp import FSDP2Strategy
from aspo_lightning.module import ASPOModule
from aspo_lightning.rollouts.checks import check_shared_engines


def changes(run: Run, share: float | None) -> dict[str, Run]:
    """Settings that take less memory, and the run that each makes of this one; ``share`` is free for the engine."""
    found: dict[str, Run] = {}
    if share:
        found[f"--data.engine.gpu_memory_utilization {share:g}"] = replace(run, engine_share=share)
    strategy = "--trainer.strategy FSDP2Strategy " * run.strategy_by_name + "--trainer.strategy"
    if not run.gradient_checkpointing:
        found["--model.gradient_checkpointing true"] = replace(run, gradient_checkpointing=True)
    if run.token_budget > run.longest_sequence:
        found[f"--data.token_budget {run.longest_sequence}"] = replace(run, token_budget=run.longest_sequence)
    if not run.half and run.on_gpu:
        found["--trainer.precision bf16-mixed"] = replace(run, half=True)
    if not run.sharded and run.world_size > 1:
        found["--trainer.strategy fsdp2"] = replace(run, sharded=True, strategy_by_name=True)
    if run.sharded and not run.reduces_each:
        found[f"{strategy}.reduce_each_micro_batch true"] = replace(run, reduces_each=True)
    if run.on_gpu and run.sharded and not run.cpu_offload:
        found[f"{strategy}.cpu_offload true"] = replace(run, cpu_offload=True)
    if not run.lora_rank:
        found["--model.lora_rank 32"] = replace(run, lora_rank=32, reference=False)
    if run.on_gpu:
        found[f"--trainer.num_nodes {2 * run.nodes}"] = replace(run, nodes=2 * run.nodes)
    return found


def problems(run: Run, plan: MemoryPlan) -> list[str]:
    """Why a plan doesn't fit, one line each."""
    found = []
    for name, peak in zip(("an update", "sampling"), plan.peaks, strict=True):
        if peak > run.gpu_memory:
            found.append(f"{name} takes {peak:.1f} GB, {peak - run.gpu_memory:.1f} more than there are")
    if plan.full_length_completions < 1:
        found.append(
            "the KV cache has no room for one sequence of full length. Raise --data.engine.gpu_memory_utilization, "
            "--data.engine.tensor_parallel_size or --data.engine.kv_cache_gib"
        )
    return list(dict.fromkeys(found))


def report(run: Run, plan: MemoryPlan, epoch: list[str]) -> tuple[str, bool]:
    """(what a person reads, whether it fits)."""
    where = ("GPU" if run.on_gpu else "CPU process") + "s" * (run.world_size > 1)
    strategy = ", fsdp2" if run.sharded else ""
    lines = [f"{run.model_name_or_path} on {run.world_size} {where}{strategy}", ""]
    lines.append(f"{'GB of each':<24}{'update':>9}{'sampling':>10}")
    for part, in_update, in_sampling in (
        (plan.always, True, True),
        (plan.update, True, not plan.engine_sleeps),
        (plan.sampling, not plan.engine_sleeps, True),
    ):
        for name, value in part.items():
            cells = (f"{value:.2f}" if there else "-" for there in (in_update, in_sampling))
            lines.append("{:<24}{:>9}{:>10}".format(name, *cells))
    lines.append("{:<24}{:>9.2f}{:>10.2f}".format("together", *plan.peaks))
    lines += ["", *epoch]
    if plan.full_length_completions < float("inf"):
        asked = run.completions * run.engine.tensor_parallel_size / run.world_size
        lines.append(
            f"KV cache: room for {plan.full_length_completions:,.1f} sequences of full length at a time; an engine is "
            f"asked for {asked:,.0f} completions"
        )
    if (share := plan.free_share) and share != plan.engine_share:
        room = plan_memory(replace(run, engine_share=share)).full_length_completions
        lines.append(
            f"While the engine samples it can have {share:g} of the GPU (--data.engine.gpu_memory_utilization "
            f"{share:g}, now {plan.engine_share:g}): room for {room:,.1f}"
        )
    wrong = problems(run, plan)
    if not wrong:
        return "\n".join([*lines, "", f"Fits: {max(plan.peaks):.1f} of {run.gpu_memory:.1f} GB."]), True
    lines += ["", *(f"Doesn't fit: {problem}." for problem in wrong)]
    better = {change: plan_memory(other) for change, other in changes(run, share).items()}
    lines += [
        f"  {change:<80} {max(other.peaks):.1f} GB" + (", fits" if not problems(run, other) else "")
        for change, other in sorted(better.items(), key=lambda item: max(item[1].peaks))
        if max(other.peaks) < max(plan.peaks)
    ]
    return "\n".join(lines), False


class Planner:
    """Takes the place of a Trainer: ``fit`` prints the plan."""

    def __init__(self, settings: Namespace, gpu_memory: float | None) -> None:
        self.settings, self.gpu_memory = settings, gpu_memory

    def fit(self, model: ASPOModule, datamodule: RolloutDataModule, **_: object) -> None:
        run = run_of(model, datamodule, self.settings, self.gpu_memory)
        check_shared_engines(run.engine, run.world_size)
        times = time_lines(run, datamodule.settings, reference=model.kl_coef > 0)
        text, fits = report(run, plan_memory(run), epoch_lines(datamodule, run.world_size) + times)
        print(text)
        if not fits:
            raise SystemExit(1)


def run_of(module: ASPOModule, data: RolloutDataModule, trainer: Namespace, gpu_memory: float | None) -> Run:
    """The run that these settings make. Nothing is loaded."""
    on_gpu = trainer.accelerator in ("gpu", "cuda") or (
        trainer.accelerator == "auto" and (gpu_memory is not None or torch.cuda.is_available())
    )
    devices = trainer.devices
    if devices in ("auto", -1, "-1"):
        devices = torch.cuda.device_count() or 8 if on_gpu else 1
    devices = len(devices) if isinstance(devices, list) else int(devices)
    strategy = trainer.strategy
    if gpu_memory is None:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GB
        gpu_memory = DEFAULT_GPU_MEMORY if on_gpu else memory / devices
    settings = module.settings
    return Run(
        model_name_or_path=module.model_name_or_path,
        on_gpu=on_gpu,
        nodes=trainer.num_nodes,
        devices=devices,
        sharded=strategy == "fsdp2" or isinstance(strategy, FSDP2Strategy),
        strategy_by_name=strategy == "fsdp2",
        reduces_each=getattr(strategy, "reduce_each_micro_batch", False),
        cpu_offload=getattr(strategy, "cpu_offload", False),
        half=trainer.precision == "bf16-mixed",
        dtype=settings.torch_dtype,
        gradient_checkpointing=settings.gradient_checkpointing,
        chunk_size=settings.chunk_size,
        lora_rank=settings.lora_rank,
        reference=module.kl_coef > 0 and not settings.lora_rank,
        optimizer_states=optimizer_states(module.optimizer),
        token_budget=data.settings.micro_batch_tokens,
        longest_sequence=data.settings.longest_sequence,
        completions=data.settings.prompts_per_phase * data.settings.group_size,
        context_length=data.context_length,
        engine=data.engine,
        gpu_memory=gpu_memory,
    )


def epoch_lines(data: RolloutDataModule, world_size: int) -> list[str]:
    """What an epoch consists of."""
    settings = data.settings
    completions = settings.prompts_per_phase * settings.group_size
    tokens = completions * settings.longest_sequence
    steps = settings.updates(settings.prompts_per_phase) * settings.passes
    micro_batches = -(-tokens * settings.passes // (settings.micro_batch_tokens * world_size))
    return [
        f"An epoch: {settings.prompts_per_phase} prompts x {settings.group_size} completions of up to "
        f"{settings.max_completion_length:,} tokens: up to {tokens:,} tokens with their prompts",
        f"{steps} optimizer steps; up to {max(micro_batches, steps)} micro-batches of {settings.micro_batch_tokens:,} "
        f"tokens on each of {world_size} ranks",
    ]


class PlanCLI(ASPOCLI):
    """``aspo plan``: takes what ``aspo fit`` takes, and shows what that would need."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        parser.add_argument("--gpu-memory", type=float | None, default=None, help="GB (decimal) of a GPU; 80 if unset")

    def before_instantiate_classes(self) -> None:
        check_checkpoints(self.config.fit.checkpoint)
        check_strategy(self.config.fit.trainer.strategy)

    def instantiate_trainer(self, **kwargs: object) -> Any:
        return Planner(self.config_init.fit.trainer, self.config_init.fit.gpu_memory)

    def before_fit(self) -> None:
        pass

    def after_fit(self) -> None:
        pass

"""FSDP2: policy and reference sharded block by block. ``--trainer.strategy fsdp2``.

Lightning's ModelParallelStrategy with one dimension, data parallel, and what it leaves open: no communication between
the micro-batches of an optimizer step, checkpoints written whole or not at all, and a model that no rank but the first
ever holds unsharded.
"""

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Generator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path

import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, StrategyRegistry
from lightning.pytorch.utilities import rank_zero_info
from torch import distributed as dist
from torch import nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from transformers import PreTrainedModel

from aspo_lightning.policy.causal_lm import ScoredCausalLM
from aspo_lightning.policy.hub import load_config
from aspo_lightning.policy.settings import ModelSettings
from aspo_lightning.policy.weights import without_frozen
from aspo_lightning.run.checkpoints import DIGESTS, METADATA, check_whole, load
from aspo_lightning.run.disk import file_digest, not_written, sync_to_disk, write_text
from aspo_lightning.run.lightning import started_ranks
from aspo_lightning.types import State

TIMEOUT_MINUTES = 120
"""Ranks wait for the longest completion of a phase, and for the longest evaluation."""


class FSDP2Strategy(ModelParallelStrategy):
    """Shards weights, gradients and optimizer state over all ranks.

    Args:
        reduce_each_micro_batch: reduces gradients and frees gathered weights after every micro-batch. Otherwise that
            happens once per optimizer step, and once for all of a phase's scoring; it takes less communication and
            holds the whole gradient in float32 on every rank until then.
        cpu_offload: weights, gradients and optimizer state stay in the host's memory; layers visit the GPU.
        timeout_minutes: how long ranks wait for one another, e.g. for the longest completion of a phase.
    """

    def __init__(
        self, reduce_each_micro_batch: bool = False, cpu_offload: bool = False, timeout_minutes: int = TIMEOUT_MINUTES
    ) -> None:
        super().__init__(timeout=timedelta(minutes=timeout_minutes))
        self.reduce_each_micro_batch = reduce_each_micro_batch
        self.cpu_offload = cpu_offload

    def setup_environment(self) -> None:
        self._data_parallel_size, self._tensor_parallel_size = self.num_nodes * self.num_processes, 1
        super().setup_environment()

    def _get_process_group_backend(self) -> str:
        # What stays on the host (rollouts; with cpu_offload gradients too) is exchanged there.
        return "cpu:gloo,cuda:nccl" if self.root_device.type == "cuda" else "gloo"

    def load(self, model_name_or_path: str, settings: ModelSettings) -> ScoredCausalLM:
        """A sharded model. Rank 0 reads it, the others get their shards tensor by tensor."""
        source = None
        if self.global_rank == 0:
            dtype = source_dtype(model_name_or_path, settings)
            source = ScoredCausalLM.from_pretrained(model_name_or_path, settings, dtype=dtype)
        precision = MixedPrecisionPolicy(reduce_dtype=torch.float32)
        if self.precision_plugin.precision == "bf16-mixed":
            precision = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        if settings.torch_dtype == torch.float64:
            precision = MixedPrecisionPolicy()
        offload = CPUOffloadPolicy(pin_memory=torch.cuda.is_available()) if self.cpu_offload else OffloadPolicy()
        return load_sharded(
            source,
            model_name_or_path,
            settings,
            mesh=self.device_mesh["data_parallel"],
            device=torch.device("cpu") if self.cpu_offload else self.root_device,
            mp_policy=precision,
            offload_policy=offload,
        )

    def model_to_device(self) -> None:
        assert self.lightning_module is not None
        for child in self.lightning_module.children():
            if not isinstance(child, FSDPModule):  # those are where they belong
                child.to(self.root_device)

    @contextmanager
    def block_backward_sync(self) -> Generator[None, None, None]:
        """Entered by Lightning for all micro-batches of an optimizer step but the last."""
        if self.reduce_each_micro_batch:
            yield
            return
        assert self.lightning_module is not None
        roots = [m for m in self.lightning_module.children() if isinstance(m, FSDPModule)]

        def set_communication(enabled: bool) -> None:
            for root in roots:
                root.set_requires_gradient_sync(enabled)
                root.set_reshard_after_backward(enabled)
                root.set_reshard_after_forward(enabled)

        set_communication(False)
        try:
            yield
        finally:
            set_communication(True)

    @contextmanager
    def gathered(self, model: nn.Module) -> Generator[None, None, None]:
        """Gathers each layer of ``model`` once for all forward passes within, instead of once for each."""
        if self.reduce_each_micro_batch:
            yield
            return
        layers = [module for module in model.modules() if isinstance(module, FSDPModule)]
        for layer in layers:
            layer.set_reshard_after_forward(False, recurse=False)
        try:
            yield
        finally:
            for layer in layers:
                layer.set_reshard_after_forward(True, recurse=False)
                layer.reshard()

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> State:
        """Of any number of ranks; or a file written without this strategy."""
        path = Path(self.broadcast(checkpoint_path))
        if self.is_global_zero:
            check_whole(path)
        if not path.is_dir():
            return super().load_checkpoint(path, weights_only)
        assert self.model is not None
        state: State = {"state_dict": without_frozen(self.model, get_model_state_dict(self.model))}
        for i, optimizer in enumerate(self.optimizers):
            state[f"optimizer_{i}"] = get_optimizer_state_dict(self.model, optimizer)
        dcp.load(state, checkpoint_id=path)
        # Not strict: a frozen base is in no checkpoint. What is trained was found, or dcp.load would have raised.
        set_model_state_dict(self.model, state["state_dict"], options=StateDictOptions(strict=False))
        for i, optimizer in enumerate(self.optimizers):
            set_optimizer_state_dict(self.model, optimizer, state[f"optimizer_{i}"])
        return load(path / METADATA)

    def on_exception(self, exception: BaseException) -> None:
        """Reports which other rank ended first: what is raised here then only says that a connection was lost."""
        for rank, process in enumerate(started_ranks(self), start=1):
            with suppress(subprocess.TimeoutExpired):
                code = process.wait(timeout=1)
                reason = f"it was killed by {signal.Signals(-code).name}" if code < 0 else "see its own error"
                rank_zero_info(f"Rank {rank} of this machine ended: {reason}.")
        super().on_exception(exception)

    def save_checkpoint(self, checkpoint: State, filepath: str | Path, storage_options: object = None) -> None:
        """A folder in torch's distributed format, which gets its name when all ranks have written to it."""
        path = Path(self.broadcast(filepath))
        temporary = path.with_name(f".{path.name}.tmp")
        if self.is_global_zero:
            shutil.rmtree(temporary, ignore_errors=True)  # of a run that was killed here
        self.barrier()
        try:
            super().save_checkpoint(checkpoint, temporary)
        except (OSError, RuntimeError, CheckpointException) as error:
            raise not_written(path, error) from error
        own = [f for f in temporary.iterdir() if f.name.startswith(f"__{self.global_rank}_")]
        shares: list[dict[str, str]] = [{}] * self.world_size
        dist.all_gather_object(shares, {file.name: file_digest(file) for file in own})
        if self.is_global_zero:
            digests = {name: digest for share in shares for name, digest in share.items()}
            rest = [file for file in temporary.iterdir() if file.name not in digests]
            for file in rest:
                sync_to_disk(file)  # torch has had each rank do so with its own
            digests |= {file.name: file_digest(file) for file in rest}
            write_text(temporary / DIGESTS, json.dumps(digests))
            if path.is_dir():
                shutil.rmtree(path)
            os.replace(temporary, path)  # noqa: PTH105
            sync_to_disk(path.parent)
        self.barrier()


StrategyRegistry.register("fsdp2", FSDP2Strategy, description="FSDP2: everything sharded over all ranks")
# Lightning's own, which it also takes for several devices without a strategy: its ranks must wait for one another's
# completions just as long.
StrategyRegistry.register(
    "ddp",
    DDPStrategy,
    description="DDP: everything on each rank",
    override=True,
    start_method="popen",
    timeout=timedelta(minutes=TIMEOUT_MINUTES),
)


def load_sharded(
    source: ScoredCausalLM | None,
    model_name_or_path: str,
    settings: ModelSettings,
    *,
    mesh: DeviceMesh,
    device: torch.device,
    mp_policy: MixedPrecisionPolicy = MixedPrecisionPolicy(),
    offload_policy: OffloadPolicy = OffloadPolicy(),
) -> ScoredCausalLM:
    """A sharded copy of ``source``, which only rank 0 has, in the dtype of ``settings``. Collective."""
    model = ScoredCausalLM.from_pretrained(model_name_or_path, settings, weights=False)
    # The root holds embedding, last norm and head. It is resharded as well: then weights are always sharded between
    # forward passes, whatever comes next.
    for part in (*blocks(model.lm), model):
        fully_shard(part, mesh=mesh, reshard_after_forward=True, mp_policy=mp_policy, offload_policy=offload_policy)
    model.to_empty(device=device)
    model.lm.tie_weights()
    set_model_state_dict(
        model,
        source.state_dict() if source else {},
        options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True),
    )
    # Buffers that are in no state dict: a rotary embedding's frequencies and the like. FSDP leaves buffers unsharded.
    persistent = set(model.state_dict())
    buffers = dict(source.named_buffers()) if source else {}
    # How names and shapes of the hub become transformers': what is made without weights doesn't know.
    conversions = getattr(source.lm, "_weight_conversions", None) if source else None
    shared = [
        (source.packs if source else True, conversions, {n: b.cpu() for n, b in buffers.items() if n not in persistent})
    ]
    dist.broadcast_object_list(shared, src=0)
    ((model.packs, conversions, buffers),) = shared
    if conversions is not None:
        model.lm._weight_conversions = conversions
    device = torch.device("cuda", torch.cuda.current_device()) if mesh.device_type == "cuda" else torch.device("cpu")
    for name, value in {**dict(model.named_buffers()), **buffers}.items():  # offloaded shards don't take theirs along
        module, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(module), attribute, value.to(device))
    return model


def source_dtype(model_name_or_path: str, settings: ModelSettings) -> torch.dtype:
    """The dtype to read a model in that becomes shards of another: its own, if that takes less memory."""
    own, wanted = load_config(model_name_or_path).dtype, settings.torch_dtype
    if not isinstance(own, torch.dtype) or own.itemsize >= wanted.itemsize:
        return wanted
    # Buffers aren't read but computed, and the shards have them from there: they mustn't be rounded (Gemma's scale is).
    model = ScoredCausalLM.from_pretrained(model_name_or_path, settings, dtype=own, weights=False)
    return wanted if any(buffer.dtype == own for buffer in model.buffers()) else own


def blocks(lm: PreTrainedModel) -> list[nn.Module]:
    """The layers that are gathered one at a time: those that transformers keeps on one device."""
    names = set(lm._no_split_modules or ())
    return [module for module in lm.modules() if type(module).__name__ in names]

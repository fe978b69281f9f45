"""The policy's weights as the hub names them: full tensors with adapters merged, one at a time."""

from collections.abc import Iterator

import torch
from peft import LoraConfig, TaskType, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.tensor import DTensor, Shard
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.pytorch_utils import Conv1D

from aspo_lightning.types import State

ADAPTER = "default"  # peft's name for a single adapter


def add_lora(lm: PreTrainedModel, rank: int, alpha: float) -> None:
    """Freezes ``lm`` and puts a low-rank adapter at every linear layer but the head (LoRA, arXiv 2106.09685).

    The adapters' product is zero at first: nothing changes until they are trained.
    """
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules="all-linear", task_type=TaskType.CAUSAL_LM)  # type: ignore[arg-type]
    inject_adapter_in_model(config, lm, ADAPTER)


def set_adapters(lm: nn.Module, enabled: bool) -> None:
    """Switches adapters on or off; off, the model is its base."""
    for module in lm.modules():
        if isinstance(module, LoraLayer):
            module._disable_adapters = not enabled  # enable_adapters() would also switch requires_grad


@torch.inference_mode(False)  # in which a sharded parameter can't be detached
@torch.no_grad()
def full_weights(lm: PreTrainedModel, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
    """(hub name, full tensor) of each weight, tied weights once; collective where the model is sharded.

    Only one full tensor exists at a time, if the caller keeps none. With ``dtype`` they are cast to it, shards before
    they are gathered; but not the buffers that some models have among their weights, a router's bias in float32.
    """
    adapted = {name: module for name, module in lm.named_modules() if isinstance(module, LoraLayer)}
    for name, parameter in lm.named_parameters():
        if ".lora_" in name:
            continue
        owner, _, attribute = name.rpartition(".")
        tensor = parameter.detach()
        if owner.endswith(".base_layer"):
            owner = owner.removesuffix(".base_layer")
            name = f"{owner}.{attribute}"
            if attribute == "weight":
                layer = adapted[owner]
                low, high = (
                    full_tensor(part.get_parameter(f"{ADAPTER}.weight").detach())
                    for part in (layer.lora_A, layer.lora_B)
                )
                base = full_tensor(tensor)
                if isinstance(layer.get_base_layer(), Conv1D):  # GPT-2's, which is transposed
                    tensor = torch.addmm(base.T, high, low, alpha=layer.scaling[ADAPTER]).T.contiguous()
                else:
                    tensor = torch.addmm(base, high, low, alpha=layer.scaling[ADAPTER])
        tensor = full_tensor(tensor.to(dtype or tensor.dtype))
        # transformers keeps some weights in other shapes than the hub, e.g. the experts of a layer as one.
        yield from revert_weight_conversion(lm, {name: tensor}).items()
    saved = lm.state_dict()
    for name, buffer in lm.named_buffers():
        if name in saved:
            yield from revert_weight_conversion(lm, {name: buffer}).items()


@torch.inference_mode(False)  # as in full_weights
@torch.no_grad()
def adapter_tensors(lm: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """(name as peft saves it, full tensor) of each part of the adapters; collective where the model is sharded."""
    for name, parameter in lm.named_parameters():
        if ".lora_" in name:
            yield f"base_model.model.{name.replace(f'.{ADAPTER}.', '.')}", full_tensor(parameter.detach())


def without_frozen(module: nn.Module, state_dict: State) -> State:
    """A state dict of ``module`` without the parameters that aren't trained, under any of their names."""
    frozen = {name for name, p in module.named_parameters(remove_duplicate=False) if not p.requires_grad}
    return {name: value for name, value in state_dict.items() if name not in frozen}


def full_tensor(tensor: Tensor) -> Tensor:
    """The full tensor of a sharded one (collective); any other unchanged."""
    if not isinstance(tensor, DTensor):
        return tensor
    if tensor.placements != (Shard(0),):
        return tensor.full_tensor()
    # Not with DTensor's own: gloo's gather holds all of it twice, and so does a gather of shards that differ in size.
    local, group = tensor.to_local(), tensor.device_mesh.get_group()
    full = torch.empty(tensor.shape, dtype=local.dtype, device=local.device)
    for rank, part in enumerate(full.chunk(dist.get_world_size(group))):
        if rank == dist.get_rank(group):
            part.copy_(local)
        dist.broadcast(part, group=group, group_src=rank)
    return full

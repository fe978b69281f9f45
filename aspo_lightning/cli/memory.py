"""The memory of a run, counted before it starts.

Weights, gradients and optimizer state are counted on a model without memory (the meta device); activations by letting
that model run its forward pass and noting what it would keep for backward.
"""

import functools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NoReturn

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from aspo_lightning.engines import Engine
from aspo_lightning.engines.base import FULL, HALF
from aspo_lightning.fsdp import blocks
from aspo_lightning.policy.causal_lm import ScoredCausalLM
from aspo_lightning.policy.settings import ModelSettings
from aspo_lightning.scorer import CHUNK_SIZE, KEPT_LOGITS

GB = 1e9

# GB of a process without a model. cuda: context and NCCL's buffers, as a rule of thumb; cpu: torch, vLLM, transformers
# and Lightning, measured.
RUNTIME = {"cuda": 3.0, "cpu": 0.95}

DEFAULT_GPU_MEMORY = 80.0

# As a rule of thumb: over the trainer's memory, what its allocator has in pieces too small to use or give back.
# cpu: what runs took beyond the other parts, on glibc's heap.
FRAGMENTATION = {"cuda": 0.1, "cpu": 0.4}
MOST_OF_A_GPU = 0.9
"""The largest share of it that is suggested for the engine."""


@dataclass(frozen=True)
class Run:
    """The settings that determine a run's memory."""

    model_name_or_path: str
    on_gpu: bool
    nodes: int
    devices: int
    """Processes of a node: one for each GPU."""
    sharded: bool
    strategy_by_name: bool
    """Given as fsdp2, without settings of its own."""
    reduces_each: bool
    cpu_offload: bool
    half: bool
    """Computes in bfloat16."""
    dtype: torch.dtype
    gradient_checkpointing: bool
    chunk_size: int | None
    lora_rank: int
    reference: bool
    optimizer_states: int
    token_budget: int
    longest_sequence: int
    """Tokens of the longest sequence that is trained on."""
    context_length: int
    """Tokens that the engine is made for: evaluations may have longer sequences."""
    completions: int
    """Of a phase."""
    engine: Engine
    gpu_memory: float
    """GB."""
    engine_share: float | None = None
    """Share of a GPU, in place of the one that the engine has set."""

    @property
    def world_size(self) -> int:
        return self.nodes * self.devices


@dataclass(frozen=True)
class MemoryPlan:
    """GB of a process (one GPU, or one process on CPUs) by part; decimal."""

    always: dict[str, float] = field(default_factory=dict)
    """What the trainer holds all the time."""
    update: dict[str, float] = field(default_factory=dict)
    """What scoring and updates add."""
    sampling: dict[str, float] = field(default_factory=dict)
    """What the engine holds."""
    engine_sleeps: bool = True
    """While the trainer works."""
    full_length_completions: float = float("inf")
    """How many of the longest sequences the KV cache has room for."""
    engine_share: float | None = None
    """Of a GPU's memory: what the engine is set to take. None: no share."""
    free_share: float | None = None
    """What is free for it while it samples."""

    @property
    def peaks(self) -> tuple[float, float]:
        """GB of (updates, sampling)."""
        always, update, sampling = (sum(part.values()) for part in (self.always, self.update, self.sampling))
        return (always + update, always + sampling) if self.engine_sleeps else (always + update + sampling,) * 2


def plan_memory(run: Run) -> MemoryPlan:
    """The memory of a run."""
    model = meta_model(run.model_name_or_path, run.dtype, run.lora_rank)
    config = model.lm.config.get_text_config()
    hidden, vocabulary = config.hidden_size, config.vocab_size
    parameters = list(model.parameters())
    count = sum(p.numel() for p in parameters)
    weights = count * run.dtype.itemsize
    trained = sum(p.numel() * p.element_size() for p in parameters if p.requires_grad)
    largest = max(p.numel() * p.element_size() for p in parameters if p.requires_grad)
    shards = run.world_size if run.sharded else 1
    compute_bytes = HALF if run.half else run.dtype.itemsize

    device = "cuda" if run.on_gpu else "cpu"
    always = {"libraries and runtime": RUNTIME[device] * GB}
    if not run.cpu_offload:
        always["weights"] = weights / shards
        always["gradients"] = trained / shards
        always["optimizer"] = run.optimizer_states * trained / shards
        if run.reference:
            always["reference"] = weights / shards
            if run.half and not run.sharded:
                in_layers = sum(p.numel() for layer in model.layers() for p in layer.parameters())
                always["reference"] -= in_layers * (run.dtype.itemsize - HALF)

    update: dict[str, float] = {}
    if run.sharded and (run.half or shards > 1):
        # FSDP gathers a layer and the next, and the root; or keeps all of them until the optimizer step.
        layers = [sum(p.numel() for p in block.parameters()) for block in blocks(model.lm)]
        held = 2 * max(layers) + count - sum(layers) if run.reduces_each else count
        update["gathered weights"] = held * compute_bytes
        if not run.reduces_each:
            update["unreduced gradients"] = trained / run.dtype.itemsize * FULL
    elif run.half:
        update["16-bit weights"] = count * HALF  # autocast keeps them for the backward pass
    if not run.sharded and run.world_size > 1:
        update["buckets of gradients"] = trained
    # A tied head's gradient, and the embedding's, before they are added to what is there.
    update["gradients in flight"] = 2 * largest
    depth, tokens = config.num_hidden_layers, run.token_budget
    kept = activations(run.model_name_or_path, tokens, compute_bytes)
    # Backward makes a layer's gradients beside what it kept.
    update["activations"] = kept / depth * 2 + (depth - 2) * (
        tokens * hidden * compute_bytes if run.gradient_checkpointing else kept / depth
    )
    update["scorer"] = tokens * (3 * min(run.chunk_size or CHUNK_SIZE, vocabulary) + 2 * hidden) * FULL
    if not run.on_gpu and tokens * vocabulary <= KEPT_LOGITS:
        update["kept logits"] = tokens * vocabulary * FULL

    allocated = sum(always.values()) + sum(update.values()) - always["libraries and runtime"]
    always["fragmentation"] = FRAGMENTATION[device] * allocated
    engine = run.engine.memory(
        config,
        count,
        context_length=run.context_length,
        gpu_memory=run.gpu_memory * GB if run.on_gpu else None,
        share=run.engine_share,
    )
    free = 1 - sum(always.values()) / (run.gpu_memory * GB)
    if engine.asleep is not None:
        always["asleep engine"] = engine.asleep
    return MemoryPlan(
        always=in_gb(always),
        update=in_gb(update),
        sampling=in_gb(engine.sampling),
        engine_sleeps=engine.asleep is not None,
        full_length_completions=engine.cache_tokens / run.context_length,
        engine_share=engine.share,
        free_share=None if engine.share is None else max(0.0, min(MOST_OF_A_GPU, math.floor(20 * free) / 20)),
    )


def in_gb(parts: dict[str, float]) -> dict[str, float]:
    return {name: size / GB for name, size in parts.items()}


def optimizer_states(make: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]) -> int:
    """Tensors that an optimizer keeps for each parameter, as many as it makes for one."""
    parameter = nn.Parameter(torch.zeros(2))
    optimizer = make([parameter])
    parameter.grad = torch.ones(2)
    optimizer.step()
    return sum(1 for value in optimizer.state[parameter].values() if isinstance(value, Tensor) and value.numel() == 2)


class _Attention(torch.autograd.Function):
    """Stands for an attention kernel that keeps its inputs and its output, and no scores."""

    @staticmethod
    def forward(ctx: FunctionCtx, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = torch.empty_like(query).transpose(1, 2).contiguous()
        ctx.save_for_backward(query, key, value, output)
        return output

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> NoReturn:
        raise NotImplementedError("only planned with")


MEMORYLESS = "planned_with"

AttentionInterface.register(MEMORYLESS, lambda module, q, k, v, mask, **kwargs: (_Attention.apply(q, k, v), None))

AttentionMaskInterface.register(MEMORYLESS, lambda *args, **kwargs: None)


@functools.cache
def meta_model(model_name_or_path: str, dtype: torch.dtype, lora_rank: int) -> ScoredCausalLM:
    """The model, without memory."""
    model = ScoredCausalLM.from_pretrained(
        model_name_or_path, ModelSettings(lora_rank=lora_rank), dtype=dtype, weights=False
    )
    model.lm.set_attn_implementation(MEMORYLESS)
    return model


@functools.cache
def activations(model_name_or_path: str, tokens: int, compute_bytes: int) -> float:
    """Bytes that a forward pass over ``tokens`` keeps for backward, without gradient checkpointing."""
    # bfloat16 whatever the run computes in: without memory, a mixture's grouped products know no other.
    model = meta_model(model_name_or_path, torch.bfloat16, 0)
    parameters = {p.untyped_storage() for p in model.parameters()}
    kept: set[torch.UntypedStorage] = set()

    def keep(tensor: Tensor) -> Tensor:
        kept.add(tensor.untyped_storage())
        return tensor

    with torch.device("meta"), torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        ids = torch.zeros(1, tokens, dtype=torch.long)
        # With a mask nothing asks the position ids' values, which the meta device doesn't have.
        model.lm.base_model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    return sum(storage.nbytes() for storage in kept - parameters) * compute_bytes / HALF

"""The memory of a run, counted before it starts.

Weights, gradients and optimizer state are counted on a model without memory (the meta device); activations by letting
that model run its forward pass and noting what it would keep for backward.
"""

import copy
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from aspo_lightning.engines import Generator, TransformersEngine, VLLMEngine
from aspo_lightning.fsdp import blocks
from aspo_lightning.policy.causal_lm import ScoredCausalLM
from aspo_lightning.policy.settings import ModelSettings
from aspo_lightning.scorer import CHUNK_SIZE

GB = 1e9

FULL, HALF = 4, 2  # bytes of a 32-bit and of a 16-bit number

# GB of a process without a model. cuda: context and NCCL's buffers, by rule of thumb; cpu: torch, vLLM, transformers
# and Lightning, measured.
RUNTIME = {"cuda": 3.0, "cpu": 0.95}

DEFAULT_GPU_MEMORY = 80.0

CPU_BATCHED_TOKENS = 4096  # of a prefill by vLLM's CPU build


# By rule of thumb: what a sleeping engine keeps on a GPU (CUDA graphs, and the workspaces of kernels and sampler), in
# GB; and the part of its memory that the trainer's allocator has in pieces too small to use or to give back.
ASLEEP, ASLEEP_EAGER = 2.0, 1.0
FRAGMENTATION = 0.1
MOST_OF_A_GPU = 0.9
"""The largest share of it that is suggested for the engine."""


@dataclass(frozen=True)
class Run:
    """What of a run's settings decides how much memory it takes."""

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
    """That is trained."""
    context_length: int
    """That the engine is made for: evaluations may have longer ones."""
    completions: int
    """Of a phase."""
    engine: Generator
    gpu_memory: float

    @property
    def world_size(self) -> int:
        return self.nodes * self.devices

    @property
    def shares_gpu(self) -> bool:
        """The engine has a share of each GPU, in which it sleeps while the trainer works."""
        return self.on_gpu and isinstance(self.engine, VLLMEngine)


@dataclass(frozen=True)
class Plan:
    """GB of a process (one GPU, or one process on CPUs) by part; decimal."""

    always: dict[str, float] = field(default_factory=dict)
    """What the trainer holds all the time."""
    update: dict[str, float] = field(default_factory=dict)
    """What scoring and updates add."""
    sampling: dict[str, float] = field(default_factory=dict)
    """What the engine holds. On a GPU it sleeps while the trainer works."""
    engine_sleeps: bool = True
    full_length_completions: float = float("inf")
    """How many of the longest sequences the KV cache has room for."""
    engine_share: float | None = None
    """Of a GPU's memory: what is free for the engine while it samples. None: it takes none."""

    @property
    def peaks(self) -> tuple[float, float]:
        """GB of (updates, sampling)."""
        always, update, sampling = (sum(part.values()) for part in (self.always, self.update, self.sampling))
        return (always + update, always + sampling) if self.engine_sleeps else (always + update + sampling,) * 2


def make_plan(run: Run) -> Plan:
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

    always = {"libraries and runtime": RUNTIME["cuda" if run.on_gpu else "cpu"] * GB}
    if not run.cpu_offload:
        always["weights"] = weights / shards
        always["gradients"] = trained / shards
        always["optimizer"] = run.optimizer_states * trained / shards
        if run.reference:
            always["reference"] = weights / shards

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

    if run.on_gpu:
        allocated = sum(always.values()) + sum(update.values()) - always["libraries and runtime"]
        always["fragmentation"] = FRAGMENTATION * allocated
    share = None
    if run.shares_gpu:
        if cast(VLLMEngine, run.engine).kv_cache_gib is None:
            free = 1 - sum(always.values()) / (run.gpu_memory * GB)
            share = max(0.0, min(MOST_OF_A_GPU, math.floor(20 * free) / 20))
        always["asleep engine"] = asleep(run.engine)
    sampling, cache, per_token = engine_memory(run, config, count)
    return Plan(
        always=in_gb(always),
        update=in_gb(update),
        sampling=in_gb(sampling),
        engine_sleeps=run.shares_gpu,
        full_length_completions=cache / (per_token * run.context_length),
        engine_share=share,
    )


def in_gb(parts: dict[str, float]) -> dict[str, float]:
    return {name: size / GB for name, size in parts.items()}


def engine_memory(run: Run, config: Any, count: int) -> tuple[dict[str, float], float, float]:
    """(bytes by part, bytes of the KV cache, bytes of it that a token takes) of an engine."""
    engine = run.engine
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    per_token = 2 * config.num_hidden_layers * kv_heads * head * (HALF if run.on_gpu else FULL)
    if isinstance(engine, TransformersEngine):
        cache = float(per_token * engine.batch_size * run.context_length)
        logits = 4 * FULL * engine.batch_size * config.vocab_size
        return {"engine's weights": count * FULL, "KV cache": cache, "sampler": logits}, cache, per_token
    if not isinstance(engine, VLLMEngine):
        return {}, float("inf"), per_token  # a user's own, or elsewhere
    split = engine.tensor_parallel_size
    per_token = per_token / min(split, kv_heads)
    parts = {"engine's weights": count * (HALF if run.on_gpu else FULL) / split}
    if not run.on_gpu and config.tie_word_embeddings:
        parts["engine's packed head"] = config.vocab_size * config.hidden_size * FULL
    prefill = CPU_BATCHED_TOKENS * config.intermediate_size * 3
    parts["sampler"] = 3 * FULL * engine.max_num_seqs * config.vocab_size + prefill * (HALF if run.on_gpu else FULL)
    if engine.kv_cache_gib is not None or not run.on_gpu:
        cache = (engine.kv_cache_gib or 1.0) * 2**30
    else:  # vLLM takes what is left of its share
        rest = engine.gpu_memory_utilization * run.gpu_memory * GB - asleep(engine)
        cache = max(0.0, rest - sum(parts.values()))
    return {**parts, "KV cache": cache}, cache, per_token


def optimizer_states(make: Callable[[Any], torch.optim.Optimizer]) -> int:
    """Tensors that an optimizer keeps for each parameter, as many as it makes for one."""
    parameter = nn.Parameter(torch.zeros(2))
    optimizer = make([parameter])
    parameter.grad = torch.ones(2)
    optimizer.step()
    return sum(1 for value in optimizer.state[parameter].values() if isinstance(value, Tensor) and value.numel() == 2)


class _Attention(torch.autograd.Function):
    """Stands for an attention kernel that keeps its inputs and its output, and no scores."""

    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = torch.empty_like(query).transpose(1, 2).contiguous()
        ctx.save_for_backward(query, key, value, output)
        return output

    @staticmethod
    def backward(ctx, grad: Tensor) -> Any:
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
    parameters = {p.untyped_storage()._cdata for p in model.parameters()}
    kept: dict[int, int] = {}
    alive = []  # so that no storage gets the address of another

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in parameters:
            kept[storage._cdata] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.device("meta"), torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        ids = torch.zeros(1, tokens, dtype=torch.long)
        # With a mask nothing asks the position ids' values, which the meta device doesn't have.
        model.lm.base_model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    return sum(kept.values()) * compute_bytes / HALF


def asleep(engine: Generator) -> float:
    """Bytes that vLLM keeps on a GPU while it sleeps. They count in its share."""
    return (ASLEEP_EAGER if getattr(engine, "enforce_eager", False) else ASLEEP) * GB


def with_share(run: Run, share: float) -> Run:
    """With another ``gpu_memory_utilization``."""
    engine = copy.copy(run.engine)
    cast(VLLMEngine, engine).gpu_memory_utilization = share
    return replace(run, engine=engine)

"""``aspo plan --config ...``: what a run takes, before anyone rents a GPU for it.

Weights, gradients and optimizer state are counted on a model without memory (the meta device); activations by letting
that model run its forward pass and noting what it would keep for backward.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from aspo_lightning.datamodule import RolloutDataModule
from aspo_lightning.engines import VLLMEngine
from aspo_lightning.fsdp import FSDP2Strategy, blocks
from aspo_lightning.module import ASPOModule
from aspo_lightning.scorer import ScoredCausalLM

GB = 1e9
HALF = 2  # bytes of a 16-bit number
RUNTIME = {"cuda": 2.0, "cpu": 0.0}  # GB: CUDA's context, communication buffers, fragmentation


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


@dataclass
class Plan:
    """GB per process (one GPU, or one process on CPUs), by part."""

    always: dict[str, float] = field(default_factory=dict)
    """What the trainer holds in both halves of an epoch."""
    training: dict[str, float] = field(default_factory=dict)
    """What scoring and updates add."""
    sampling: dict[str, float] = field(default_factory=dict)
    """What the engine adds; on a GPU it sleeps while the trainer works."""
    counts: dict[str, str] = field(default_factory=dict)
    """What an epoch consists of."""
    engine_sleeps: bool = True

    @property
    def peak(self) -> float:
        """GB at the worst moment."""
        always, training, sampling = (sum(part.values()) for part in (self.always, self.training, self.sampling))
        return always + (max(training, sampling) if self.engine_sleeps else training + sampling)


def make_plan(module: ASPOModule, data: RolloutDataModule, trainer: dict[str, Any], world_size: int) -> Plan:
    """The plan of a run.

    Args:
        module: the model's settings; nothing is loaded.
        data: the settings of sampling and batching.
        trainer: ``accelerator``, ``precision`` and ``strategy`` (a name or a strategy).
        world_size: GPUs, or processes on CPUs, of all nodes.
    """
    on_gpu = trainer["accelerator"] not in ("cpu", "auto") or torch.cuda.is_available()
    strategy = trainer["strategy"]
    sharded = strategy == "fsdp2" or isinstance(strategy, FSDP2Strategy)
    reduces_late = sharded and not getattr(strategy, "reduce_each_micro_batch", False)
    offload = getattr(strategy, "cpu_offload", False)
    half = trainer["precision"] == "bf16-mixed"
    shards = world_size if sharded else 1
    checkpointing = module.load_settings["gradient_checkpointing"]
    settings = {**module.load_settings, "attn_implementation": MEMORYLESS, "gradient_checkpointing": False}
    model = ScoredCausalLM.from_pretrained(module.model_name_or_path, weights=False, **settings)
    total = sum(p.numel() * p.element_size() for p in model.parameters())
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    count = sum(p.numel() for p in model.parameters())
    compute_bytes = HALF if half else module.load_settings["dtype"].itemsize
    tokens = data.phase_settings["token_budget"]

    plan = Plan(engine_sleeps=on_gpu and isinstance(data.engine, VLLMEngine))
    plan.always["libraries and runtime"] = RUNTIME["cuda" if on_gpu else "cpu"]
    if not offload:
        plan.always["weights"] = total / shards / GB
        plan.always["gradients"] = trained / shards / GB
        plan.always["optimizer"] = optimizer_states(module) * trained / shards / GB
        if module.kl_coef and not settings["lora_rank"]:
            plan.always["reference"] = total / shards / GB
    if sharded or half:
        # FSDP gathers a layer and the next, and the root; or keeps all until the optimizer step. Autocast keeps all.
        sizes = [sum(p.numel() for p in block.parameters()) for block in blocks(model.lm)]
        held = count if reduces_late or not sharded else 2 * max(sizes) + count - sum(sizes)
        plan.training["gathered weights"] = held * compute_bytes / GB
    if reduces_late:
        plan.training["unreduced gradients"] = trained / GB
    config = model.lm.config.get_text_config()
    kept = activations(model, tokens, torch.bfloat16 if half else module.load_settings["dtype"])
    layers, hidden = config.num_hidden_layers, config.hidden_size
    if checkpointing:
        kept = kept / layers + layers * tokens * hidden * compute_bytes
    # Backward makes gradients of one layer's activations beside them.
    plan.training["activations"] = (kept + kept / layers * (not checkpointing)) / GB
    chunk = min(module.load_settings["chunk_size"], config.vocab_size)
    plan.training["scorer"] = tokens * (3 * 4 * chunk + 2 * 4 * hidden) / GB

    engine_bytes = HALF if on_gpu else 4
    if isinstance(data.engine, VLLMEngine):
        split = data.engine.tensor_parallel_size
        head_dim = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
        per_token = 2 * layers * max(1, config.num_key_value_heads // split) * head_dim * engine_bytes
        plan.sampling["engine's weights"] = count * engine_bytes / split / GB
        cache = data.engine.kv_cache_bytes(on_gpu)
        plan.counts["KV cache"] = ""
        if cache is not None:
            plan.sampling["KV cache"] = cache / GB
        plan.sampling["sampler's logits"] = 3 * 4 * data.engine.max_num_seqs * config.vocab_size / GB
        plan.counts["KV cache"] = f"{per_token / 1e3:.0f} kB a token"
    else:
        plan.sampling["KV cache and logits"] = 0.0
    sampling, optimizer_steps = data.sampling, data.phase_settings["optimizer_steps"] * data.phase_settings["passes"]
    completions = data.prompts_per_phase * sampling.group_size
    plan.counts |= {
        "completions": f"{completions:,} of up to {sampling.max_tokens:,} tokens",
        "tokens": f"up to {completions * data.context_length:,}",
        "optimizer steps": f"{optimizer_steps}",
        "micro-batches": f"up to {-(-completions * data.context_length // (tokens * world_size)):,} a rank",
    }
    return plan


def optimizer_states(module: ASPOModule) -> int:
    """Tensors that the optimizer keeps for each parameter, as many as it makes for one."""
    parameter = nn.Parameter(torch.zeros(2))
    optimizer = module.optimizer([parameter])
    parameter.grad = torch.ones(2)
    optimizer.step()
    return sum(1 for value in optimizer.state[parameter].values() if isinstance(value, Tensor) and value.numel() == 2)


def activations(model: ScoredCausalLM, tokens: int, dtype: torch.dtype) -> float:
    """Bytes that a forward pass over ``tokens`` keeps for backward, without gradient checkpointing."""
    parameters = {p.untyped_storage()._cdata for p in model.parameters()}
    seen: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in parameters:
            seen[storage._cdata] = storage.nbytes()
            held.append(tensor)  # so that no other storage gets its address
        return tensor

    held: list[Tensor] = []
    model.lm.to(dtype)
    parameters |= {p.untyped_storage()._cdata for p in model.parameters()}
    with torch.device("meta"), torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        ids = torch.zeros(1, tokens, dtype=torch.long)
        # With a mask nothing asks the position ids' values, which the meta device doesn't have.
        model.lm.base_model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    return float(sum(seen.values()))

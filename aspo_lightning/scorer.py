"""Log-probs and entropies of response tokens, without ever holding all their logits.

Axes: N response tokens, H hidden size, V vocabulary, B vocabulary entries of a chunk.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")

CHUNK_SIZE = 4096
"""Vocabulary entries, unless given: on a GPU few large kernels. See also ``_chunk_size``."""

KEPT_LOGITS = 2**27
"""The most logits that a CPU keeps for backward, 512 MiB, instead of computing them again."""


def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    chunk_size: int | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    entropy_grad: bool = False,
) -> tuple[Tensor, Tensor]:
    """Log-probs of ``targets`` and entropies in nats, under softmax(logits / temperature).

    With logits = hidden weight^T + bias. Under autocast both factors are rounded to its dtype; the logits stay float32.

    The vocabulary is passed through in chunks, as an online softmax; backward computes each chunk's logits again. So
    memory beyond the gradients is a few [N, chunk_size] buffers instead of several [N, V]. But a CPU keeps logits up to
    ``KEPT_LOGITS``.

    Args:
        hidden: [N, H] last hidden states at the positions that predict the targets.
        weight: [V, H] output embedding.
        targets: [N] token ids.
        temperature: divides the logits, as it did when the tokens were sampled.
        chunk_size: vocabulary entries whose logits are held at a time. None: ``_chunk_size``.
        bias: [V] of the output head.
        softcap: logits become softcap * tanh(logits / softcap) (Gemma), before the temperature.
        entropy_grad: whether the entropy carries gradient; costs time, needed only for an entropy bonus.

    Returns:
        (logprobs[N], entropy[N]), float32 (float64 for float64 input), whatever the dtype of ``hidden``.
    """
    if chunk_size is None:
        chunk_size = _chunk_size(len(hidden), hidden.device)
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and hidden.dtype == torch.float32:
        hidden = hidden.to(torch.get_autocast_dtype(device))
    keeps = device == "cpu" and torch.is_grad_enabled() and softcap is None and len(hidden) * len(weight) <= KEPT_LOGITS
    with torch.autocast(device, enabled=False):
        return _TokenLogprobs.apply(
            hidden, weight, bias, targets, temperature, softcap, chunk_size, entropy_grad, keeps
        )


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, temperature, softcap, chunk_size, entropy_grad, keeps):
        dtype, n = _logit_dtype(hidden), len(hidden)
        zeros = hidden.new_zeros(n, dtype=dtype)
        sums = Sums(zeros, hidden.new_full((n,), torch.finfo(dtype).min, dtype=dtype), zeros, zeros)
        add = _compiled(_add) if hidden.is_cuda else _add
        kept = []
        for v in _chunks(len(weight), chunk_size):
            logits, _ = _logits(hidden, weight[v], None if bias is None else bias[v], temperature, softcap)  # [N, B]
            sums = add(sums, logits, targets - v.start)
            if keeps:
                kept.append((logits, sums.top))  # less the top
        lse = sums.top + sums.total.log()
        entropy = sums.total.log() - sums.moment / sums.total
        ctx.save_for_backward(hidden, weight, bias, targets, lse, entropy)
        ctx.settings = (temperature, softcap, chunk_size, entropy_grad)
        ctx.kept = iter(kept)
        if not entropy_grad:
            ctx.mark_non_differentiable(entropy)
        return sums.target - lse, entropy

    @staticmethod
    def backward(ctx, grad_logprobs, grad_entropy):
        hidden, weight, bias, targets, lse, entropy = ctx.saved_tensors
        temperature, softcap, chunk_size, entropy_grad = ctx.settings
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.zeros_like(hidden, dtype=lse.dtype) if need_hidden else None
        grad_weight = torch.empty_like(weight) if need_weight else None
        grad_bias = torch.empty_like(bias) if need_bias else None
        if not entropy_grad:
            grad_entropy = None
        gradient = _compiled(_gradient) if hidden.is_cuda else _gradient
        hidden_t = hidden.T.contiguous() if need_weight else hidden.T  # once, not for each chunk's product
        for v in _chunks(len(weight), chunk_size):
            logits, top = next(ctx.kept, (None, 0))  # used up: a second backward computes them again
            slope = None
            if logits is None:
                logits, slope = _logits(hidden, weight[v], None if bias is None else bias[v], temperature, softcap)
            grad = gradient(logits, targets - v.start, lse - top, entropy, grad_logprobs, grad_entropy)
            if slope is not None:
                grad.mul_(slope)
            if temperature != 1:
                grad.div_(temperature)
            if grad.is_cuda or not HAS_AMX:
                grad = grad.to(hidden.dtype)  # once for both products
            if grad_hidden is not None:
                grad_hidden += _gradient_matmul(grad, weight[v], hidden.dtype)
            if grad_weight is not None:
                grad_weight[v] = _gradient_matmul(grad.T, hidden_t.T, hidden.dtype)
            if grad_bias is not None:
                grad_bias[v] = grad.sum(0)
        if grad_hidden is not None:
            grad_hidden = grad_hidden.to(hidden.dtype)
        return grad_hidden, grad_weight, grad_bias, None, None, None, None, None, None


def _logits(hidden, weight, bias, temperature, softcap) -> tuple[Tensor, Tensor | None]:
    """Logits[N, B] of a chunk of the vocabulary, and the soft cap's slope[N, B] where there is a cap."""
    logits = matmul(hidden, weight.T, hidden.dtype)
    if bias is not None:
        logits += bias
    slope = None
    if softcap is not None:
        bounded = logits.div_(softcap).tanh_()
        slope = 1 - bounded.square()
        logits = bounded.mul_(softcap)
    return (logits.div_(temperature) if temperature != 1 else logits), slope


class Sums(NamedTuple):
    """What is known of each token's softmax after some chunks of the vocabulary; all [N]."""

    target: Tensor
    """Logit of the target, 0 until its chunk has come."""
    top: Tensor
    """Maximum m of the logits l."""
    total: Tensor
    """Sum of e^(l - m)."""
    moment: Tensor
    """Sum of (l - m) e^(l - m)."""


def _add(sums: Sums, logits: Tensor, column: Tensor) -> Sums:
    """The sums with a chunk's logits[N, B], whose buffer is used up.

    ``column``[N] is where each target is from the chunk's beginning: within the chunk, before or after it.
    """
    at, inside = _place(column, logits.shape[1])
    target = torch.where(inside, logits.gather(1, at).squeeze(1), sums.target)
    top = torch.maximum(sums.top, logits.amax(1))
    shift = sums.top - top
    exp = logits.sub_(top[:, None]).exp()
    moment = shift.exp() * (sums.moment + shift * sums.total) + torch.linalg.vecdot(exp, logits)
    return Sums(target, top, shift.exp() * sums.total + exp.sum(1), moment)


def _gradient(
    logits: Tensor, column: Tensor, lse: Tensor, entropy: Tensor, grad_logprobs: Tensor, grad_entropy: Tensor | None
) -> Tensor:
    """The gradient[N, B] of a chunk's logits, whose buffer it takes.

    d logp[target] / d logit_v = [v = target] - p_v;   d entropy / d logit_v = -p_v (log p_v + entropy)
    """
    at, inside = _place(column, logits.shape[1])
    logits.sub_(lse[:, None])
    scale = grad_logprobs[:, None]
    if grad_entropy is not None:
        scale = scale + grad_entropy[:, None] * (logits + entropy[:, None])
    return logits.exp_().mul_(-scale).scatter_add_(1, at, (grad_logprobs * inside)[:, None])


def _place(column: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """(columns[N, 1] that are within a chunk of ``size``, whether they were[N]).

    Those outside get some column inside: picking them out would make the host wait for the device.
    """
    return column.clamp(0, size - 1)[:, None], (column >= 0) & (column < size)


@cache
def _compiled(body: Callable[P, R]) -> Callable[P, R]:
    """Each pass over a chunk's logits becomes one kernel. On a CPU compiling takes longer than it saves."""
    return torch.compile(body, dynamic=True)


def _chunk_size(n: int, device: torch.device) -> int:
    """On a CPU logits [N, B] of about 8 MiB: they stay in its caches, and their memory is reused."""
    return CHUNK_SIZE if device.type != "cpu" else min(CHUNK_SIZE, max(512, 2**21 // max(n, 1)))


def _chunks(n: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, n)) for start in range(0, n, size)]


def _logit_dtype(hidden: Tensor) -> torch.dtype:
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


HAS_ONEDNN = torch.backends.mkldnn.is_available()
_CPU = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}  # an older torch can't tell
HAS_BFLOAT16 = HAS_ONEDNN and bool(_CPU.get("avx512_bf16"))
"""Whether this CPU multiplies 16 bits, and adds up 32."""
HAS_AMX = HAS_ONEDNN and bool(_CPU.get("amx_bf16"))
"""Whether oneDNN rounds float32 factors to bfloat16 as it reads them, where it may: in tiles alone."""


def matmul(a: Tensor, b: Tensor, factors: torch.dtype | None = None) -> Tensor:
    """a[M, K] @ b[K, N] in float32 (float64 for float64 input), of factors rounded to that dtype, unless it is None.

    Sums of 16-bit factors are never rounded: a GPU gives its float32 accumulator, and a CPU widens them, or rounds wide
    ones as it reads them where it has tiles.
    """
    if a.dtype == torch.float64:
        return a @ b
    if a.device.type == "cuda":
        a, b = (x.to(factors or a.dtype) for x in (a, b))
        return a @ b if a.dtype == torch.float32 else torch.mm(a, b, out_dtype=torch.float32)
    if factors == torch.bfloat16 and HAS_AMX and min(*a.shape, *b.shape) > 16:  # torch itself takes smaller ones
        with _bfloat16_products():
            return a.float() @ b.float()
    a, b = (x.to(factors or x.dtype).float() for x in (a, b))
    if HAS_ONEDNN and a.numel() and b.numel():
        if not a.is_contiguous() and b.numel() < a.numel():  # oneDNN would copy the first factor: let it be the other
            return torch.ops.mkldnn._linear_pointwise(b.T, a, None, "none", [], "").T
        return torch.ops.mkldnn._linear_pointwise(a, b.T, None, "none", [], "")
    return a @ b


def _gradient_matmul(a: Tensor, b: Tensor, factors: torch.dtype) -> Tensor:
    """``matmul`` for gradients, whose sums may be rounded, as those of other layers are, where that is faster."""
    if a.device.type == "cpu" and factors == torch.bfloat16 and HAS_BFLOAT16 and not HAS_AMX:
        return a.to(factors) @ b.to(factors)
    return matmul(a, b, factors)


@contextmanager
def _bfloat16_products() -> Iterator[None]:
    """Within, products of float32 on a CPU are of factors rounded to bfloat16, with float32 sums."""
    settings = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]  # the module is replaced when it is imported
    before, settings.fp32_precision = settings.fp32_precision, "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before

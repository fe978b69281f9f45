"""Attention over a packed row, in which each sequence sees itself alone; no mask of T x T is ever made.

Registered with transformers as ``packed``. On a GPU 16-bit rows go through torch's variable-length flash kernel; all
others, and every CPU, take SDPA over the sequences, those of like length in one batch.

Axes: T tokens of a row, S sequences of it, A attention heads, K heads of keys and values, D head size.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

NAME = "packed"

_sdpa_of_transformers: Callable[..., tuple[Tensor, None]] = AttentionInterface()["sdpa"]

_NAMES_GROUPED_HEADS = "enable_gqa" in inspect.signature(varlen_attn).parameters
"""torch 2.11 takes fewer key heads than query heads without being asked to."""

_LIKE = 0.75
"""The shortest sequence of an SDPA batch over its longest: the rest of a sequence's place there is wasted work."""


@dataclass(frozen=True)
class Packing:
    """Where the sequences of a row are, in the form the kernels need."""

    bounds: Tensor
    """[S + 1] int32; the first token of each sequence, then T."""
    longest: int
    """Tokens."""
    batches: tuple["Batch", ...]
    place: Tensor
    """[T]; where each token of the row is among the outputs of all batches."""

    @staticmethod
    def of(lengths: Sequence[int], device: torch.device | str = "cpu") -> "Packing":
        """The packing of a row of sequences of ``lengths`` tokens, one after the other."""
        starts = [0]
        for length in lengths:
            starts.append(starts[-1] + length)
        order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
        batches = []
        while order:
            longest = lengths[order[0]]
            like = [i for i in order if lengths[i] >= _LIKE * longest]
            order = order[len(like) :]
            batches.append(Batch.of([(starts[i], lengths[i]) for i in like], longest))
        tokens = torch.cat([batch.index.flatten()[batch.real] for batch in batches])
        return Packing(
            bounds=torch.tensor(starts, dtype=torch.int32).to(device, non_blocking=True),
            longest=max(lengths),
            batches=tuple(batch.to(device) for batch in batches),
            place=tokens.argsort().to(device, non_blocking=True),
        )


@dataclass(frozen=True)
class Batch:
    """Sequences of like length, B of up to L tokens."""

    index: Tensor
    """[B, L]; the tokens' places in the row. What comes after a sequence's end is any token: causal attention doesn't
    look there."""
    real: Tensor
    """[tokens of these sequences]; their places in the batch, flat."""

    @staticmethod
    def of(sequences: Sequence[tuple[int, int]], longest: int) -> "Batch":
        """Of (first token, length) of each sequence."""
        within = torch.arange(longest)
        starts, lengths = torch.tensor(sequences).T[:, :, None]
        return Batch(starts + within.clamp(max=lengths - 1), (within < lengths).flatten().nonzero().squeeze(1))

    def to(self, device: torch.device | str) -> "Batch":
        return Batch(self.index.to(device, non_blocking=True), self.real.to(device, non_blocking=True))


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    packing: Packing,
    *,
    scale: float | None = None,
    window: int | None = None,
) -> Tensor:
    """Causal attention within each sequence of a row: softmax(scale * query key^T) value.

    Args:
        query: [T, A, D].
        key: [T, K, D]; each of the K heads is for A / K neighbouring heads of queries.
        value: [T, K, D].
        packing: of the row.
        scale: of the products. None: 1 / sqrt(D).
        window: how many tokens a token sees, itself included. None: all before it.

    Returns:
        [T, A, D].
    """
    device = query.device.type
    if torch.is_autocast_enabled(device):  # rotary embeddings turn queries and keys into float32 there, not values
        query, key, value = (x.to(torch.get_autocast_dtype(device)) for x in (query, key, value))
    if _has_kernel(query):
        kernel = partial(varlen_attn, enable_gqa=True) if _NAMES_GROUPED_HEADS else varlen_attn
        output = kernel(
            query,
            key,
            value,
            packing.bounds,
            packing.bounds,
            packing.longest,
            packing.longest,
            scale=scale,
            window_size=(-1 if window is None else window - 1, 0),
        )
        assert isinstance(output, Tensor)  # a pair only where the log-sum-exp is asked for
        return output
    outputs = [_sdpa(query, key, value, batch, scale, window) for batch in packing.batches]
    return torch.cat(outputs)[packing.place]


def _has_kernel(query: Tensor) -> bool:
    return query.device.type == "cuda" and query.dtype in (torch.bfloat16, torch.float16)


def _sdpa(query: Tensor, key: Tensor, value: Tensor, batch: Batch, scale: float | None, window: int | None) -> Tensor:
    """The outputs of a batch's sequences, one after the other."""
    length = batch.index.shape[1]
    mask = None
    if window is not None and window < length:
        mask = torch.ones(length, length, dtype=torch.bool, device=query.device).tril().triu(1 - window)
    # As many key heads as query heads, [B, A, L, D]: for fewer, a GPU's only 32-bit kernel is the one that computes all
    # scores, [B, A, L, L].
    heads = query.shape[1]
    query, key, value = (
        x[:, :, None].expand(-1, -1, heads // x.shape[1], -1)[batch.index].flatten(2, 3).transpose(1, 2)
        for x in (query, key, value)
    )
    output = scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=mask is None, scale=scale)
    return output.transpose(1, 2).flatten(0, 1)[batch.real]


def _for_transformers(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packing: Packing | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **settings: object,
) -> tuple[Tensor, None]:
    """``packed_attention`` as transformers' layers call it, with query [1, A, T, D], key and value [1, K, T, D].

    Without a packing it is transformers' own SDPA.
    """
    if packing is None:
        return _sdpa_of_transformers(
            module,
            query,
            key,
            value,
            attention_mask,
            scaling=scaling,
            sliding_window=sliding_window,
            **settings,
        )
    unknown = ("softcap", "s_aux", "position_bias")
    dropout = settings.get("dropout") or 0.0
    if dropout or any(settings.get(key) is not None for key in unknown) or not getattr(module, "is_causal", True):
        raise NotImplementedError(f"packed attention is causal, without dropout ({dropout}) and {', '.join(unknown)}")
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
    return packed_attention(query, key, value, packing, scale=scaling, window=sliding_window)[None], None


AttentionInterface.register(NAME, _for_transformers)

AttentionMaskInterface.register(NAME, sdpa_mask)

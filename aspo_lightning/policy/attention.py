"""Attention over a packed row, in which each completion sees its prompt and itself; no mask of T x T is ever made.

Registered with transformers as ``packed``. On a GPU 16-bit rows go through torch's variable-length flash kernel; all
others, and every CPU, take SDPA over the segments, those of like length in one batch.

Axes: T tokens of a row, S segments of it, A attention heads, K heads of keys and values, D head size.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, chain

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

_GROUPS_HEADS = ("cpu",)
"""Devices whose SDPA takes fewer key heads. A GPU's only 32-bit kernel for them computes all scores, [B, A, L, S]."""

_LIKE = 0.75
"""The shortest segment of an SDPA batch over its longest: the rest of a segment's place there is computed in vain."""

_LARGEST_MASK = 2**22
"""Entries of the mask of an SDPA batch: 16 MiB as the kernel takes it."""


@dataclass(frozen=True)
class Segment:
    """Neighbouring tokens of a row that attend to a prompt, all of it, and among themselves causally."""

    start: int
    """The first token."""
    length: int
    prompt: slice | None = None
    """None: what is in the segment is all that its tokens see."""

    @property
    def before(self) -> int:
        """Tokens of the prompt."""
        return self.prompt.stop - self.prompt.start if self.prompt else 0

    @property
    def keys(self) -> range | list[int]:
        """The tokens that are seen from here."""
        own = range(self.start, self.start + self.length)
        return [*range(self.prompt.start, self.prompt.stop), *own] if self.prompt else own


def segments(row_lengths: Sequence[Sequence[int]]) -> list[Segment]:
    """The segments of a row, in its order, see ``MicroBatch.row_lengths``. They cover it."""
    found, start = [], 0
    for prompt_length, *lengths in row_lengths:
        if len(lengths) == 1:  # a prompt that nobody shares is the beginning of its completion
            prompt_length, lengths = prompt_length + lengths[0], []
        prompt = slice(start, start + prompt_length)
        found.append(Segment(start, prompt_length))
        start += prompt_length
        for length in lengths:
            if length:
                found.append(Segment(start, length, prompt))
            start += length
    return found


@dataclass(frozen=True)
class Packing:
    """Where the sequences of a row are, in the form the kernels need."""

    query_bounds: Tensor
    """[S + 1] int32; the first token of each segment, then T."""
    longest_query: int
    """Tokens of the longest segment."""
    keys: Tensor | None
    """[tokens that the segments see]; their places in the row, segment by segment. None: those of the row."""
    key_bounds: Tensor
    """[S + 1] int32; the first of each segment's among these."""
    longest_keys: int
    """The most tokens that a segment sees."""
    batches: tuple["Batch", ...]
    place: Tensor
    """[T]; where each token of the row is among the outputs of all batches."""

    @staticmethod
    def of(row_lengths: Sequence[Sequence[int]], device: torch.device | str = "cpu") -> "Packing":
        """The packing of a row of prompts and their completions, see ``MicroBatch.row_lengths``."""
        parts = segments(row_lengths)
        keys = [part.keys for part in parts]
        batches = _batches(parts)
        tokens = torch.cat([batch.queries.flatten()[batch.real] for batch in batches])

        def moved(values: list[int], dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.tensor(values, dtype=dtype).to(device, non_blocking=True)

        query_bounds = moved([*(part.start for part in parts), parts[-1].start + parts[-1].length])
        shared = any(part.prompt for part in parts)
        return Packing(
            query_bounds=query_bounds,
            longest_query=max(part.length for part in parts),
            keys=moved(list(chain.from_iterable(keys)), torch.long) if shared else None,
            key_bounds=moved([0, *accumulate(map(len, keys))]) if shared else query_bounds,
            longest_keys=max(map(len, keys)),
            batches=tuple(batch.to(device) for batch in batches),
            place=tokens.argsort().to(device, non_blocking=True),
        )


@dataclass(frozen=True)
class Batch:
    """Segments of like length, B of up to L queries that see up to S keys."""

    queries: Tensor
    """[B, L]; their tokens."""
    keys: Tensor
    """[B, S]; each segment's prompt and its own tokens. What comes after them is any token: nothing looks there."""
    first: Tensor
    """[B, 1]; where the first query of each is among its keys."""
    masked: bool
    """Whether the first queries come after the first keys: then a mask lets them see what is before them."""
    real: Tensor
    """[tokens of these segments]; their places among the queries, flat."""

    @staticmethod
    def of(parts: Sequence[Segment], masked: bool) -> "Batch":
        """Queries of the segments' own tokens if ``masked``, and of their prompts too if not."""
        places = [(p.start, p.length, p.prompt.start if p.prompt else 0, p.before) for p in parts]
        start, length, prompt, before = torch.tensor(places).T[:, :, None]
        at = torch.arange(int((before + length).max()))
        keys = torch.where(at < before, prompt + at, start + (at - before).clamp(max=length - 1))
        if not masked:
            real = (at >= before) & (at < before + length)
            return Batch(keys, keys, torch.zeros_like(before), masked, _places(real))
        own = torch.arange(int(length.max()))
        return Batch(start + own.clamp(max=length - 1), keys, before, masked, _places(own < length))

    def to(self, device: torch.device | str) -> "Batch":
        queries, keys, first, real = (
            x.to(device, non_blocking=True) for x in (self.queries, self.keys, self.first, self.real)
        )
        return Batch(queries, keys, first, self.masked, real)

    def mask(self, window: int | None) -> Tensor | None:
        """[B, 1, L, S] bool; which keys each query sees. None: those up to its own place."""
        length = self.keys.shape[1]
        if not self.masked and (window is None or window >= length):
            return None
        query = (self.first + torch.arange(self.queries.shape[1], device=self.keys.device))[:, :, None]
        key = torch.arange(length, device=self.keys.device)
        seen = key <= query
        return (seen if window is None else seen & (key > query - window))[:, None]


def _places(real: Tensor) -> Tensor:
    return real.flatten().nonzero().squeeze(1)


def _batches(parts: Sequence[Segment]) -> list[Batch]:
    """All segments, those of like length together.

    Without a mask a completion's prompt attends again, in vain: that is less where the completion is the longer one,
    and a mask of all that it sees could be large.
    """

    def masked(part: Segment) -> bool:
        return part.length < part.before and part.length * (part.before + part.length) <= _LARGEST_MASK

    whole = _like([part for part in parts if not masked(part)], lambda part: (part.before + part.length,))
    batches = [Batch.of(like, masked=False) for like in whole]
    for like in _like([part for part in parts if masked(part)], lambda part: (part.before, part.length)):
        length = max(part.length for part in like)
        most = max(1, _LARGEST_MASK // (length * (length + max(part.before for part in like))))
        batches += [Batch.of(like[i : i + most], masked=True) for i in range(0, len(like), most)]
    return batches


def _like(parts: Sequence[Segment], sizes: Callable[[Segment], tuple[int, ...]]) -> Iterator[list[Segment]]:
    """Segments in lists of like sizes, the largest first."""
    left = sorted(parts, key=sizes, reverse=True)
    while left:
        like: list[Segment] = []
        rest: list[Segment] = []
        for part in left:
            pairs = zip(sizes(part), sizes(left[0]), strict=True)
            (like if all(min(pair) >= _LIKE * max(pair) for pair in pairs) else rest).append(part)
        yield like
        left = rest


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    packing: Packing,
    *,
    scale: float | None = None,
    window: int | None = None,
) -> Tensor:
    """Causal attention within each prompt and each completion after it: softmax(scale * query key^T) value.

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
        query, key, value = (x.to(_autocast_dtype(device)) for x in (query, key, value))
    if _has_kernel(query, value):
        if packing.keys is not None:
            key, value = (x.index_select(0, packing.keys) for x in (key, value))
        kernel = partial(varlen_attn, enable_gqa=True) if _NAMES_GROUPED_HEADS else varlen_attn
        output = kernel(
            query,
            key,
            value,
            packing.query_bounds,
            packing.key_bounds,
            packing.longest_query,
            packing.longest_keys,
            scale=scale,
            window_size=(-1 if window is None else window - 1, 0),
        )
        assert isinstance(output, Tensor)  # a pair only where the log-sum-exp is asked for
        return output
    with torch.autocast(device, enabled=False):
        outputs = [_sdpa(query, key, value, batch, scale, window) for batch in packing.batches]
    return torch.cat(outputs).index_select(0, packing.place)  # indexing would take long in backward


def _autocast_dtype(device: str) -> torch.dtype:
    """Not 16 bits on a CPU, whose kernel then takes three times as long for backward."""
    return torch.float32 if device == "cpu" else torch.get_autocast_dtype(device)


def _has_kernel(query: Tensor, value: Tensor) -> bool:
    """Whether flash attention takes them: heads of queries and values alike, of at most 256 and a multiple of 8."""
    size = query.shape[-1]
    fits = size == value.shape[-1] and size <= 256 and size % 8 == 0
    return fits and query.device.type == "cuda" and query.dtype in (torch.bfloat16, torch.float16)


def _sdpa(query: Tensor, key: Tensor, value: Tensor, batch: Batch, scale: float | None, window: int | None) -> Tensor:
    """The outputs of a batch's segments, one after the other."""

    def gather(x: Tensor, index: Tensor) -> Tensor:
        return x.index_select(0, index.flatten()).unflatten(0, index.shape).transpose(1, 2)  # [B, heads, tokens, D]

    query, key, value = gather(query, batch.queries), gather(key, batch.keys), gather(value, batch.keys)
    grouped = query.device.type in _GROUPS_HEADS
    if not grouped:
        shared_by = query.shape[1] // key.shape[1]
        key, value = (x[:, :, None].expand(-1, -1, shared_by, -1, -1).flatten(1, 2) for x in (key, value))
    mask = batch.mask(window)
    output = scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=grouped
    )
    return output.transpose(1, 2).flatten(0, 1).index_select(0, batch.real)


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

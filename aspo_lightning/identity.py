"""What a run, and an evaluation, computes: the settings that its numbers depend on, and digests of what they name.

A setting that changes no number says so where it is defined, by its type: ``token_budget: Annotated[int, INCIDENTAL]``.
All others count. Two configs are the same run if they agree in what counts; so are two evaluations.
"""

import contextlib
import hashlib
import pkgutil
import typing
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from aspo_lightning.types import Prompt

INCIDENTAL = "incidental"
"""Marks a setting of speed, memory, or of what is measured alongside the computation."""

TRAINER = (
    "precision",
    "gradient_clip_val",
    "gradient_clip_algorithm",
    "limit_train_batches",
    "limit_val_batches",
    "overfit_batches",
)
"""The settings of Lightning's own class that count; they can't be marked."""


def incidental(owner: type) -> set[str]:
    """Names of the settings of a class that are marked that way."""
    hints: dict[str, object] = {}
    for base in reversed(owner.__mro__):
        annotated = vars(base).get("__init__")
        with contextlib.suppress(NameError, TypeError):  # of a library that names what it doesn't import
            hints |= typing.get_type_hints(annotated, include_extras=True)
    return {name for name, hint in hints.items() if INCIDENTAL in getattr(hint, "__metadata__", ())}


def describe(part: object) -> object:
    """A part (task, engine) with the settings that count, as plain data."""
    if isinstance(part, Mapping):
        return {str(key): describe(value) for key, value in part.items()}
    if isinstance(part, (list, tuple)):
        return [describe(value) for value in part]
    if part is None or isinstance(part, (str, int, float, bool)):
        return part
    if not hasattr(part, "__dict__"):
        return str(part)
    left_out = incidental(type(part))
    settings = {k: v for k, v in vars(part).items() if not k.startswith("_") and k not in left_out}
    return {"class": type(part).__name__, **{k: describe(v) for k, v in settings.items()}}


def counting(config: object, *owners: type) -> object:
    """A config, as read from YAML, with the settings that count. ``owners`` are the classes that it is of."""
    if isinstance(config, list):
        return [counting(value) for value in config]
    if not isinstance(config, Mapping):
        return config
    if "class_path" in config:
        owner = None
        with contextlib.suppress(ImportError, ValueError, AttributeError):  # of code that isn't there: all of it counts
            owner = pkgutil.resolve_name(config["class_path"])
        owners = (owner,) if isinstance(owner, type) else ()
        return {**config, "init_args": counting(config.get("init_args") or {}, *owners)}
    left_out = set().union(*(incidental(owner) for owner in owners))
    return {key: counting(value) for key, value in config.items() if key not in left_out}


def flat(settings: object, key: str = "") -> dict[str, object]:
    """Nested settings by dotted keys."""
    if not isinstance(settings, Mapping):
        return {key: settings}
    return {k: v for name, part in settings.items() for k, v in flat(part, f"{key}.{name}" if key else name).items()}


def differences(before: Mapping[str, object], now: Mapping[str, object]) -> dict[str, tuple[object, object]]:
    """(before, now) of all that differs between two nested settings, by dotted keys."""
    one, other = flat(before), flat(now)
    return {key: (one.get(key), other.get(key)) for key in sorted({*one, *other}) if one.get(key) != other.get(key)}


def prompts_digest(prompts: Iterable[Prompt]) -> str:
    """Changes with any problem: its tokens, its row, how it is scored."""
    digest = hashlib.blake2b(digest_size=8)
    for p in prompts:
        digest.update(repr((p.id, p.prompt_ids, list(p.rewards.items()), p.row, p.environment)).encode())
    return digest.hexdigest()


@torch.no_grad()
def weights_digest(named_tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Changes with any bit of any weight; the same for a checkpoint and the folder exported from it."""
    digest = hashlib.blake2b(digest_size=8)
    for name, tensor in named_tensors:
        bits = tensor.flatten().view(torch.int16)
        # A sum alone wouldn't notice two weights exchanged. In parts: whole tensors as integers would take much memory.
        sums = [
            (int(part.sum(dtype=torch.int64)), int((part.long() * torch.arange(len(part), device=part.device)).sum()))
            for part in bits.split(1 << 20)
        ]
        digest.update(repr((name, tuple(tensor.shape), str(tensor.dtype), sums)).encode())
    return digest.hexdigest()

"""What ranks do together, through torch.distributed. A process on its own is rank 0 of one."""

from datetime import timedelta
from typing import TypeVar

from torch import distributed as dist

T = TypeVar("T")


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def gather(value: T, process_group: dist.ProcessGroup | None = None) -> list[T]:
    """The ``value`` of each rank, in their order, on all of them. Collective; values are pickled."""
    values = [value] * world_size()
    if len(values) > 1:
        dist.all_gather_object(values, value, group=process_group)
    return values


def thread_group(time_limit: timedelta | None) -> dist.ProcessGroup | None:
    """A group of all ranks for a thread, whose collectives don't mix with those of the usual one. Collective.

    Args:
        time_limit: how long its ranks wait for one another. None: torch's default.
    """
    return dist.new_group(backend="gloo", timeout=time_limit) if world_size() > 1 else None


def barrier() -> None:
    """Returns when all ranks are here."""
    if dist.is_initialized():
        dist.barrier()

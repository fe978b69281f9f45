"""The device of the tests of GPUs, sizes for it, and the memory that work takes on it."""

import os

import torch
from torch.profiler import ProfilerActivity, profile

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TWIN = os.environ.get("ASPO_GPU_TWIN") == "1"
# Above what a count gives: allocations are rounded up, and so is a kernel's scratch.
ROOM = 32 * 2**20 if DEVICE.type == "cuda" else 2**18


def on(gpu, cpu):
    """One size for a GPU, another for a CPU."""
    return gpu if DEVICE.type == "cuda" else cpu


def peak(work) -> int:
    """Bytes that ``work()`` takes beyond what there was, at its peak; the second time, when all is compiled."""
    work()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = highest = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        highest = max(highest, held)
    return highest

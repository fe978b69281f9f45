"""The memory that a run takes."""

import ctypes
import os
import resource
import sys
from pathlib import Path

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # as in glibc's malloc.h

MALLOC_SETTINGS = {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_"}
"""What glibc takes from the environment about the same."""


def peak_memory() -> int:
    """The most bytes that this process (trainer and engine) ever held. A reward process adds some 10^8.

    On Linux not from getrusage: that reports the peak of the process that started this one, where that was higher.
    """
    status = Path("/proc/self/status")
    if status.exists():
        return int(status.read_text().partition("VmHWM:")[2].split()[0]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def keep_freed_memory() -> None:
    """Has this process keep what it frees for what comes next, instead of giving it back to the system.

    The system clears each page before it hands it out again, and an update on a CPU could wait for that a tenth of its
    time. With an allocator other than glibc's, or under ``MALLOC_SETTINGS``, nothing changes.
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option and not MALLOC_SETTINGS & os.environ.keys():
        set_option(M_MMAP_MAX, 0)  # large tensors come from the heap too
        set_option(M_TRIM_THRESHOLD, -1)  # and it doesn't shrink

"""The memory that a run took."""

import resource
import sys
from pathlib import Path


def peak_memory() -> int:
    """The most bytes that this process (trainer and engine) ever held. A reward process adds some 10^8.

    On Linux not from getrusage: that reports the peak of the process that started this one, where that was higher.
    """
    status = Path("/proc/self/status")
    if status.exists():
        return int(status.read_text().partition("VmHWM:")[2].split()[0]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024

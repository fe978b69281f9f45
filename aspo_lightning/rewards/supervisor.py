"""A process that nothing below it outlives, whatever session that is in and however often it has forked.

Linux hands an orphan to its nearest ancestor that has asked for them, a subreaper (see prctl(2)), so all that was ever
started below the supervisor stays below it. That takes no privileges.
"""

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

from aspo_lightning.rewards.inside_sandbox import die_with_parent, prctl

_PR_SET_CHILD_SUBREAPER = 36


def supervise(fd: int) -> None:
    """Forks, and returns in the child, which alone keeps ``fd``.

    The parent waits until the child ends, its own parent ends, or it gets a SIGTERM. It then kills everything below it,
    and exits when nothing is left.
    """
    events = {signal.SIGTERM, signal.SIGCHLD}
    unblocked = signal.pthread_sigmask(signal.SIG_BLOCK, events)
    prctl(_PR_SET_CHILD_SUBREAPER, 1)
    die_with_parent(signal.SIGTERM)
    if not (child := os.fork()):
        die_with_parent()
        signal.pthread_sigmask(signal.SIG_SETMASK, unblocked)
        return
    os.close(fd)
    with contextlib.suppress(ChildProcessError):
        while signal.sigwait(events) != signal.SIGTERM and child not in _ended():
            pass
        while True:
            for pid in _children():
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
            _ended()
            time.sleep(0.001)  # the orphans of those killed come up next
    os._exit(0)


def _ended() -> list[int]:
    """Children that have ended. Raises ChildProcessError when none are left, and so nothing below them either."""
    pids = []
    while pid := os.waitpid(-1, os.WNOHANG)[0]:
        pids.append(pid)
    return pids


def _children() -> Iterator[int]:
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it may have ended by now
            parent = path.read_bytes().rpartition(b")")[2].split()[1]
            if int(parent) == os.getpid():
                yield int(path.parent.name)

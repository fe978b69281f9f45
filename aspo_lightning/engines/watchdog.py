"""Ends a process whose engine hangs: nothing else can, since no Python then runs in its main thread."""

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


def end_process(reason: str) -> None:
    """The last words of a process that hangs."""
    print(f"aspo: error: {reason}. Resume with the command that the run printed.", file=sys.stderr, flush=True)
    os._exit(1)


class Watchdog:
    """Calls ``on_hang``, from a thread, when a ``step`` within it takes more than ``timeout_s`` seconds.

    Args:
        timeout_s: measured by a clock that never jumps.
        reason: what to say.
        on_hang: ends the process, or replaces it.
    """

    def __init__(self, timeout_s: float, reason: str, on_hang: Callable[[str], None] = end_process) -> None:
        self.timeout_s, self.reason, self.on_hang = timeout_s, reason, on_hang
        self._deadline: float | None = None  # of the step that runs
        self._done = threading.Event()

    @contextmanager
    def step(self) -> Iterator[None]:
        """What runs in here is watched."""
        self._deadline = time.monotonic() + self.timeout_s
        try:
            yield
        finally:
            self._deadline = None

    def __enter__(self) -> "Watchdog":
        threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()

    def _watch(self) -> None:
        left = self.timeout_s
        while not self._done.wait(left):
            deadline = self._deadline
            left = self.timeout_s if deadline is None else deadline - time.monotonic()
            if left <= 0:
                faulthandler.dump_traceback(all_threads=True)  # where it hangs
                self.on_hang(self.reason)
                return

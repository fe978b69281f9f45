"""Ends a process whose engine hangs: nothing else can, since no Python runs then in its main thread."""

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable


def end_process(reason: str) -> None:
    """The last words of a process that hangs."""
    print(f"aspo: error: {reason}. Resume with the command that the run printed.", file=sys.stderr, flush=True)
    os._exit(1)


class Watchdog:
    """Within it, ``alive`` must be called at least every ``timeout_s`` seconds; else ``on_hang`` is, by a thread.

    Args:
        timeout_s: measured by a clock that never jumps.
        reason: what to say.
        on_hang: ends the process, or replaces it.
    """

    def __init__(self, timeout_s: float, reason: str, on_hang: Callable[[str], None] = end_process) -> None:
        self.timeout_s, self.reason, self.on_hang = timeout_s, reason, on_hang
        self._last = time.monotonic()
        self._done = threading.Event()

    def alive(self) -> None:
        self._last = time.monotonic()

    def __enter__(self) -> "Watchdog":
        self.alive()
        threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()

    def _watch(self) -> None:
        while not self._done.wait(max(0.0, self._last + self.timeout_s - time.monotonic())):
            if time.monotonic() >= self._last + self.timeout_s:
                faulthandler.dump_traceback(all_threads=True)  # where it hangs
                self.on_hang(self.reason)
                return

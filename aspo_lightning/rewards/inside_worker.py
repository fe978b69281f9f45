"""Runs inside a worker process of the pool, and runs reward functions and environments there.

``python -m aspo_lightning.rewards.inside_worker FD MEMORY_BYTES``, started by ``pool.py`` below a supervisor, so that
it can be killed with all it started. What it receives is pickled (the pool is trusted); what it sends is JSON (it
isn't).
"""

import importlib
import json
import os
import pickle
import resource
import sys
from collections.abc import Callable
from functools import cache
from multiprocessing.connection import Connection
from typing import Protocol, runtime_checkable

from aspo_lightning.rewards.supervisor import supervise


@runtime_checkable
class Checked(Protocol):
    """A function that may need something from the machine."""

    def check(self) -> None:
        """Raises an error if it can't be used."""
        ...


@cache
def load(path: str) -> Callable[..., object]:
    """The function ``module.name``; with ``:attribute`` after it, that of the function, or one that returns None."""
    path, _, attribute = path.partition(":")
    module, _, name = path.rpartition(".")
    function = getattr(importlib.import_module(module), name)
    return getattr(function, attribute, lambda *args: None) if attribute else function


def main(fd: int, memory_bytes: int) -> None:
    supervise(fd)
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    connection = Connection(fd)
    pid, number = os.getpid(), -1

    def send(**message: object) -> None:
        if os.getpid() != pid:
            os._exit(0)  # a copy that a function forked off: not for it to send
        connection.send_bytes(json.dumps({"call": number, **message}).encode())

    while True:
        try:
            number, path, subject, row = pickle.loads(connection.recv_bytes())
        except EOFError:
            return
        try:
            function = load(path)
            if subject is None and isinstance(function, Checked):
                function.check()
        except Exception as error:
            send(unusable=f"{type(error).__name__}: {error}")
            continue
        if subject is None:  # only asked whether it can be used
            send(value=None)
            continue
        send(started=True)  # the clock of the time limit starts here, after the imports
        try:
            value = function(subject, row)
            send(value=value.item() if hasattr(value, "item") else value)
        except (Exception, SystemExit) as error:
            send(error=f"{type(error).__name__}: {error}"[:500])


if __name__ == "__main__":
    sys.setrecursionlimit(10_000)
    sys.set_int_max_str_digits(0)  # the time limit is enough
    main(int(sys.argv[1]), int(sys.argv[2]))

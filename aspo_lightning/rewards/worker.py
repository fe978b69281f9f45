"""The process that runs reward functions and environments: ``python -m aspo_lightning.rewards.worker FD MEMORY_BYTES``.

Started by ``pool.py`` in a session of its own, so that it can be killed with all it started. What it is sent is
pickled (the pool is trusted); what it answers is JSON (it isn't).
"""

import importlib
import json
import pickle
import resource
import sys
from functools import cache
from multiprocessing.connection import Connection
from typing import Any


@cache
def load(path: str) -> Any:
    """The function, ready to work: one that needs something of the machine says so by its attribute ``check``."""
    module, _, name = path.rpartition(".")
    function = getattr(importlib.import_module(module), name)
    if check := getattr(function, "check", None):
        check()
    return function


def main(fd: int, memory_bytes: int) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    connection = Connection(fd)

    def answer(**message: Any) -> None:
        connection.send_bytes(json.dumps(message).encode())

    while True:
        try:
            path, subject, row = pickle.loads(connection.recv_bytes())
        except EOFError:
            return
        try:
            function = load(path)
        except Exception as error:
            answer(unusable=f"{type(error).__name__}: {error}")
            continue
        if subject is None:  # only the import was asked for
            answer(value=None)
            continue
        answer(started=True)  # the clock of the time limit starts here, behind the imports
        try:
            value = function(subject, row)
            answer(value=value.item() if hasattr(value, "item") else value)
        except (Exception, SystemExit) as error:
            answer(error=f"{type(error).__name__}: {error}"[:500])


if __name__ == "__main__":
    sys.setrecursionlimit(10_000)
    main(int(sys.argv[1]), int(sys.argv[2]))

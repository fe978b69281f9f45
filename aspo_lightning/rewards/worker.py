"""The process that runs reward functions: ``python -m aspo_lightning.rewards.worker FD MEMORY_BYTES``.

Started by ``pool.py`` in a session of its own, so that it can be killed with all it started. What it is sent is
pickled (the pool is trusted); what it answers is JSON (it isn't).
"""

import importlib
import json
import math
import pickle
import resource
import sys
from functools import cache
from multiprocessing.connection import Connection
from typing import Any


@cache
def load(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def main(fd: int, memory_bytes: int) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    connection = Connection(fd)

    def answer(**message: Any) -> None:
        connection.send_bytes(json.dumps(message).encode())

    while True:
        try:
            path, completion, row = pickle.loads(connection.recv_bytes())
        except EOFError:
            return
        try:
            reward = load(path)
        except Exception as error:
            answer(unusable=f"{type(error).__name__}: {error}")
            continue
        answer(started=True)  # the clock of the time limit starts here, behind the imports
        try:
            score = float(reward(completion, row))
            if not math.isfinite(score):
                raise ValueError(f"the reward is {score}")
        except (Exception, SystemExit) as error:
            answer(error=f"{type(error).__name__}: {error}"[:500])
        else:
            answer(score=score)


if __name__ == "__main__":
    sys.setrecursionlimit(10_000)
    main(int(sys.argv[1]), int(sys.argv[2]))

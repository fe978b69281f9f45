"""A pool of killable processes for reward functions and environments.

What hangs or crashes is killed with all that it started, and the run continues.
"""

import contextlib
import json
import math
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from multiprocessing.connection import Connection, wait
from typing import NamedTuple

from tqdm.auto import tqdm

from aspo_lightning.errors import ConfigError

# From the start of a process until the reward's module is imported; not part of a reward's own time limit.
IMPORT_TIMEOUT_S = 120.0
_KILL_TIMEOUT_S = 10.0
SOLVED = 1.0 - 1e-6  # a reward from here on is a full solution
_LOAD_ONLY = None  # the subject of a call that only imports its function


class Call(NamedTuple):
    """``function(subject, row)``, to be run in the pool."""

    function: str
    """Its import path; ``path:name`` is a function that is its attribute, or one that returns None if there is none."""
    subject: object
    """A completion's text, or what else the function judges."""
    row: Mapping[str, object]


class Result(NamedTuple):
    """What became of a call."""

    value: object
    failed: bool
    """The function hung, crashed or raised; the value is then None."""
    died: bool = False
    """Its process ended before the result came."""


class RewardItem(NamedTuple):
    """One completion to judge."""

    rewards: Mapping[str, float]
    """Import paths of functions ``reward(completion: str, row: dict) -> float``, and their weights."""
    completion: str
    row: Mapping[str, object]


class RewardResult(NamedTuple):
    """What the rewards say about a completion."""

    reward: float
    """Their weighted sum."""
    solved: bool
    """The first of them says that it is a full solution; so whatever the weights, and whatever the others say."""
    failed: bool
    """One of the functions failed; the reward is 0, and nothing is solved."""


class RewardPool:
    """Runs functions that judge completions in ``workers`` processes.

    Args:
        workers: processes, each with one call at a time.
        timeout_s: wall-clock limit of a call.
        memory_gib: address space of a process.
    """

    def __init__(self, workers: int = 2, timeout_s: float = 5.0, memory_gib: float = 4.0) -> None:
        if workers < 1 or not 0 < timeout_s < math.inf or not 0 < memory_gib < math.inf:
            raise ConfigError(
                f"Rewards need at least one worker, a time limit > 0 and memory > 0; given are {workers} workers, "
                f"{timeout_s} s and {memory_gib} GiB."
            )
        self._timeout_s = timeout_s
        self._memory_bytes = int(memory_gib * 2**30)
        self._workers: list[_Worker | None] = [None] * workers

    def load(self, functions: Iterable[str]) -> None:
        """Imports the functions, so that a wrong path is found before a run has done any work.

        Raises:
            ConfigError: if one can't be imported, or refuses to work on this machine.
        """
        for function in functions:
            (result,) = self.run([Call(function, _LOAD_ONLY, {})])
            if result.failed:
                raise ConfigError(f"{function} can't be used: its process ended, or took too long, while importing it.")

    def rewards(self, items: Sequence[RewardItem]) -> list[RewardResult]:
        """The rewards of the items, in their order.

        Raises:
            ConfigError: if a function can't be imported.
        """
        calls = [Call(function, item.completion, item.row) for item in items for function in item.rewards]
        results = iter(self.run(calls))
        rewarded = []
        for item in items:
            found = [_finite(next(results)) for _ in item.rewards]
            values = [value for value in found if value is not None]
            if len(values) < len(found):
                rewarded.append(RewardResult(0.0, solved=False, failed=True))
            else:
                reward = math.fsum(w * v for w, v in zip(item.rewards.values(), values, strict=True))
                rewarded.append(RewardResult(reward, solved=values[0] >= SOLVED, failed=False))
        return rewarded

    def run(self, calls: Sequence[Call], description: str = "reward") -> list[Result]:
        """The results of the calls, in their order.

        A call whose process dies is made once more: it may have been killed from outside, as by a machine short of
        memory, and a reward must not depend on that.

        Raises:
            ConfigError: if a function can't be imported.
        """
        results: list[Result | None] = [None] * len(calls)
        waiting = deque(range(len(calls)))
        running: dict[int, int] = {}  # slot -> call
        repeated: set[int] = set()
        with tqdm(total=len(calls), desc=description, leave=False, disable=None) as bar:
            while waiting or running:
                for slot in range(len(self._workers)):
                    if waiting and slot not in running:
                        running[slot] = waiting.popleft()
                        self._worker(slot).send(calls[running[slot]])
                for slot, call in list(running.items()):
                    result = self._result(slot, calls[call])
                    if result is None:
                        continue
                    if result.died and call not in repeated:
                        repeated.add(call)
                        self._worker(slot).send(calls[call])
                        continue
                    results[call] = result
                    del running[slot]
                    bar.update()
                if running:
                    workers = [self._worker(slot) for slot in running]
                    soonest = min(worker.deadline for worker in workers)
                    wait([worker.connection for worker in workers], max(0.0, soonest - time.monotonic()))
        return [result for result in results if result is not None]

    def _result(self, slot: int, call: Call) -> Result | None:
        """The slot's result if it is decided by now."""
        worker, died = self._worker(slot), False
        try:
            while worker.connection.poll():
                message = json.loads(worker.connection.recv_bytes(1 << 20))
                if message["call"] != worker.calls:
                    raise ValueError("a message about another call")
                if "unusable" in message:
                    raise ConfigError(f"{call.function} can't be used: {message['unusable']}")
                if "started" in message:
                    worker.deadline = time.monotonic() + self._timeout_s
                elif "error" in message:
                    return Result(None, failed=True)
                else:
                    return Result(message["value"], failed=False)
            if time.monotonic() < worker.deadline:
                return None
        except ConfigError:
            raise
        except (EOFError, ConnectionError):
            died = True
        except (OSError, ValueError, TypeError, KeyError, RecursionError):
            pass  # what it said makes no sense
        worker.kill()
        self._workers[slot] = None
        return Result(None, failed=True, died=died)

    def _worker(self, slot: int) -> "_Worker":
        worker = self._workers[slot]
        if worker is None:
            worker = self._workers[slot] = _Worker(self._memory_bytes)
        return worker

    def close(self) -> None:
        """Kills the processes. The pool may be used again; it then starts new ones."""
        for slot, worker in enumerate(self._workers):
            if worker is not None:
                worker.kill()
                self._workers[slot] = None


def _finite(result: Result) -> float | None:
    try:
        value = float(result.value) if isinstance(result.value, (int, float)) else math.nan
    except OverflowError:  # a whole number beyond all floats
        return None
    return value if math.isfinite(value) else None


class _Worker:
    def __init__(self, memory_bytes: int) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "aspo_lightning.rewards.inside_worker", str(theirs.fileno()), str(memory_bytes)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # a Ctrl-C in the terminal is for the run alone
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
            )
        self.connection = Connection(ours.detach())
        self.deadline = 0.0
        self.calls = 0

    def send(self, call: Call) -> None:
        self.deadline = time.monotonic() + IMPORT_TIMEOUT_S
        self.calls += 1
        with contextlib.suppress(OSError):  # a dead process shows at the next look
            self.connection.send_bytes(pickle.dumps((self.calls, *call)))

    def kill(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(_KILL_TIMEOUT_S)
        except subprocess.TimeoutExpired:  # the supervisor was stopped, or something can't be killed
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self.connection.close()

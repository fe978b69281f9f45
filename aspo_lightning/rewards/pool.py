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
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import NamedTuple

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
        self._idle: SimpleQueue[int] = SimpleQueue()  # slots of workers
        for slot in range(workers):
            self._idle.put(slot)
        self._threads: ThreadPoolExecutor | None = None
        """Each waits for a worker."""

    def load(self, functions: Iterable[str]) -> None:
        """Imports the functions, so that a wrong path is found before a run has done any work.

        Raises:
            ConfigError: if one can't be imported, or refuses to work on this machine.
        """
        for function in functions:
            if self.submit(Call(function, _LOAD_ONLY, {})).result().failed:
                raise ConfigError(f"{function} can't be used: its process ended, or took too long, while importing it.")

    def submit(self, call: Call) -> "Future[Result]":
        """The call's result, in time; calls start in the order in which they are submitted.

        A call whose process dies is made once more: it may have been killed from outside, as by a machine short of
        memory, and a reward must not depend on that.

        The result raises ConfigError if the function can't be imported.
        """
        if self._threads is None:
            self._threads = ThreadPoolExecutor(len(self._workers), "rewards")
        return self._threads.submit(self._run, call, self._threads)

    def judge(self, item: RewardItem) -> "Judgement":
        """Submits what judges a completion."""
        return Judgement(
            item.rewards,
            {function: self.submit(Call(function, item.completion, item.row)) for function in item.rewards},
        )

    def _run(self, call: Call, threads: ThreadPoolExecutor) -> Result:
        slot = self._idle.get()
        try:
            result = self._attempt(slot, call)
            return self._attempt(slot, call) if result.died and threads is self._threads else result
        finally:
            self._idle.put(slot)

    def _attempt(self, slot: int, call: Call) -> Result:
        worker, died = self._workers[slot], False
        if worker is None:
            worker = self._workers[slot] = _Worker(self._memory_bytes)
        try:
            worker.send(call)
            while worker.connection.poll(max(0.0, worker.deadline - time.monotonic())):
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
        except ConfigError:
            raise
        except (EOFError, ConnectionError):
            died = True
        except (OSError, ValueError, TypeError, KeyError, RecursionError):
            pass  # what it said makes no sense
        worker.kill()
        worker.connection.close()
        self._workers[slot] = None
        return Result(None, failed=True, died=died)

    def close(self) -> None:
        """Kills the processes; what was submitted is dropped. The pool may be used again, and then starts new ones."""
        threads, self._threads = self._threads, None
        if threads is None:
            return
        threads.shutdown(wait=False, cancel_futures=True)
        for worker in filter(None, list(self._workers)):
            worker.kill()
        threads.shutdown()  # those that waited for one of them have seen its end
        for worker in filter(None, self._workers):
            worker.connection.close()
        self._workers = [None] * len(self._workers)


class Judgement(NamedTuple):
    """The rewards of a completion, in the making."""

    weights: Mapping[str, float]
    calls: "dict[str, Future[Result]]"

    def values(self) -> dict[str, float]:
        """What each function said, by its path; without those that failed. Waits for them.

        Raises:
            ConfigError: if one can't be imported.
        """
        found = {function: _finite(call.result()) for function, call in self.calls.items()}
        return {function: value for function, value in found.items() if value is not None}

    def result(self) -> RewardResult:
        """What they say together. Waits for them, and raises as ``values`` does."""
        values = self.values()
        if len(values) < len(self.calls):
            return RewardResult(0.0, solved=False, failed=True)
        reward = math.fsum(self.weights[function] * value for function, value in values.items())
        return RewardResult(reward, solved=next(iter(values.values())) >= SOLVED, failed=False)


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

"""A pool of killable processes for reward functions: what hangs, crashes or forks is killed, and the run goes on."""

import contextlib
import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

from tqdm.auto import tqdm

from aspo_lightning.errors import ConfigError

# From the start of a process until the reward's module is imported; not part of a reward's own time limit.
IMPORT_TIMEOUT_S = 120.0


class RewardItem(NamedTuple):
    """One completion to score."""

    reward: str
    """Import path of ``reward(completion: str, row: dict) -> float``."""
    completion: str
    row: dict[str, Any]


class Score(NamedTuple):
    """What became of it."""

    reward: float
    failed: bool
    """The function hung, crashed or raised; the reward is 0."""


class RewardPool:
    """Scores completions in ``workers`` processes.

    Args:
        workers: processes, each with one completion at a time.
        timeout_s: wall-clock limit for one completion.
        memory_gib: address space of a process.
    """

    def __init__(self, workers: int = 2, timeout_s: float = 5.0, memory_gib: float = 4.0) -> None:
        if workers < 1 or timeout_s <= 0 or memory_gib <= 0:
            raise ConfigError(
                f"Rewards need at least one worker, a time limit > 0 and memory > 0; given are {workers} workers, "
                f"{timeout_s} s and {memory_gib} GiB."
            )
        self._timeout_s = timeout_s
        self._memory_bytes = int(memory_gib * 2**30)
        self._workers: list[_Worker | None] = [None] * workers

    def score(self, items: Sequence[RewardItem]) -> list[Score]:
        """The scores of the items, in their order.

        Raises:
            ConfigError: if a reward function can't be imported.
        """
        scores: list[Score | None] = [None] * len(items)
        waiting = deque(range(len(items)))
        running: dict[int, int] = {}  # slot -> item
        with tqdm(total=len(items), desc="reward", leave=False, disable=None) as bar:
            while waiting or running:
                for slot in range(len(self._workers)):
                    if waiting and slot not in running:
                        running[slot] = waiting.popleft()
                        self._worker(slot).send(items[running[slot]])
                for slot, item in list(running.items()):
                    if (score := self._result(slot, items[item])) is not None:
                        scores[item] = score
                        del running[slot]
                        bar.update()
                if running:
                    workers = [self._worker(slot) for slot in running]
                    soonest = min(worker.deadline for worker in workers)
                    wait([worker.connection for worker in workers], max(0.0, soonest - time.monotonic()))
        return [score for score in scores if score is not None]

    def _result(self, slot: int, item: RewardItem) -> Score | None:
        """The slot's score if it is decided by now."""
        worker = self._worker(slot)
        try:
            while worker.connection.poll():
                message = json.loads(worker.connection.recv_bytes(1 << 16))
                if "unusable" in message:
                    raise ConfigError(f"The reward {item.reward} can't be used: {message['unusable']}.")
                if "started" in message:
                    worker.deadline = time.monotonic() + self._timeout_s
                elif "error" in message:
                    return Score(0.0, failed=True)
                else:
                    return Score(float(message["score"]), failed=False)
            if time.monotonic() < worker.deadline:
                return None
        except (OSError, EOFError, ValueError, TypeError, KeyError) as error:
            if isinstance(error, ConfigError):
                raise
        worker.kill()
        self._workers[slot] = None
        return Score(0.0, failed=True)

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


class _Worker:
    def __init__(self, memory_bytes: int) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "aspo_lightning.rewards.worker", str(theirs.fileno()), str(memory_bytes)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # a process group of its own: killed as a whole
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
            )
        self.connection = Connection(ours.detach())
        self.deadline = 0.0

    def send(self, item: RewardItem) -> None:
        self.deadline = time.monotonic() + IMPORT_TIMEOUT_S
        with contextlib.suppress(OSError):  # a dead process shows at the next look
            self.connection.send_bytes(pickle.dumps(tuple(item)))

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self.connection.close()

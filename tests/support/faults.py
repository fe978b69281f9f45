"""Callbacks that make a run fail at a chosen place, and that write down what it sampled. Used through `aspo fit`."""

import itertools
import json
import os
import signal
import time
from pathlib import Path

from lightning.pytorch import Callback
from lightning.pytorch.plugins import Precision

from aspo_lightning.run import checkpoints


class Completions(Callback):
    """Writes FOLDER/epoch_N.json: all completions and rewards of that phase. What is sampled again must be the same."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.global_rank:
            return
        groups = trainer.datamodule.phase.groups
        text = json.dumps([(g.prompt.id, r.completion_ids, r.reward) for g in groups for r in g.rollouts])
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"epoch_{trainer.current_epoch}.json"
        if path.exists() and path.read_text() != text:
            raise AssertionError(f"other completions than before in {path}")
        checkpoints.write_text(path, text)


class Late(Callback):
    """Logs something when an epoch ends."""

    def on_train_epoch_end(self, trainer, pl_module):
        pl_module.log("late", float(trainer.current_epoch))


class Fault(Callback):
    """Strikes in an epoch: once, or ``times`` if it is reached again.

    ``part`` is where: generate, engine (in a step of vLLM), broken
    (any engine, when it takes weights), reward, score, update, checkpoint (when the temporary file
    has been written), saved (behind it). ``kind`` is what: a signal's name, raise, hang, nan (in a weight), pool (its
    processes are killed), or clock (it jumps a day to and fro). The file ``struck`` remembers it across restarts.
    """

    def __init__(self, part: str, kind: str, struck: str, times: int = 1, epoch: int = 1) -> None:
        self.part, self.kind, self.struck, self.times, self.epoch = part, kind, Path(struck), times, epoch

    def on_fit_start(self, trainer, pl_module):
        data = trainer.datamodule
        owner, name = {
            "generate": (data.engine, "generate"),
            "reward": (data.pool, "judge"),
            "score": (pl_module, "score"),
            "checkpoint": (checkpoints, "digest_path"),
            "saved": (trainer._logger_connector, "on_epoch_end"),
            "update": (None, ""),
            "engine": (getattr(data.engine, "_llm", None) and data.engine._llm.llm_engine, "step"),
            "broken": (data.engine, "sync_weights"),
        }[self.part]
        if owner is not None:
            self.wrap(owner, name, trainer)

    def wrap(self, owner, name, trainer):
        original = getattr(owner, name)

        def faulty(*args, **kwargs):
            self.strike(trainer)
            return original(*args, **kwargs)

        object.__setattr__(owner, name, faulty)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if self.part == "update":
            self.strike(trainer)

    def strike(self, trainer):
        done = len(self.struck.read_text()) if self.struck.exists() else 0
        counted = self.part in ("checkpoint", "saved")  # by then
        epoch = trainer.fit_loop.epoch_progress.current.processed - counted
        if epoch != self.epoch or done >= self.times:
            return
        self.struck.write_text("x" * (done + 1))
        if self.kind == "raise":
            raise RuntimeError("the engine broke")
        if self.kind == "hang":
            time.sleep(10_000)
        if self.kind == "nan":
            next(trainer.lightning_module.parameters()).data.fill_(float("nan"))
        elif self.kind == "pool":
            for worker in trainer.datamodule.pool._workers:
                os.kill(worker._process.pid, signal.SIGKILL)
        elif self.kind == "clock":
            now, jumps = time.time, itertools.cycle((86400, -86400))
            time.time = lambda: now() + next(jumps)
        else:
            os.kill(os.getpid(), getattr(signal, self.kind))


class OwnPrecision(Precision):
    """A user's plugin, which says that it was there."""

    def teardown(self):
        print("the user's own plugin")
        super().teardown()

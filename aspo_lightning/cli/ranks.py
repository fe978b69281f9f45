"""The ranks that Lightning starts on a machine: they end with the first, and the first waits for them."""

import os
import sys
from pathlib import Path

from lightning.pytorch import Trainer

from aspo_lightning.rewards.inside_sandbox import die_with_parent
from aspo_lightning.run.lightning import started_ranks

MAIN_PROCESS = "ASPO_MAIN_PROCESS"  # in the environment of the ranks that Lightning starts: the id of the first


def die_with_main_process() -> None:
    """Ends this process when the first rank of this machine ends, if that has started it.

    Lightning watches the processes that it starts, but not the first: over NCCL they would wait for it, and spin, until
    a time limit.
    """
    if os.environ.get("LOCAL_RANK", "0") == "0":
        os.environ[MAIN_PROCESS] = str(os.getpid())
        return
    # If something else has started this rank, its parent may be a process that has nothing to do with it.
    main = int(os.environ.get(MAIN_PROCESS, "0"))
    if main == os.getppid():
        die_with_parent()
    if main and not Path(f"/proc/{main}").exists():
        sys.exit(1)  # it ended before


def wait_for_ranks(trainer: Trainer) -> None:
    """Returns when the ranks that this process has started have ended: what they still do would end with it."""
    for process in started_ranks(trainer.strategy):
        process.wait()

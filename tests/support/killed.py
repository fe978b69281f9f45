"""An `aspo` command that is killed at random moments, started again until it is done, and then once more.

python tests/support/killed.py SEED KILLS FOLDER COMMAND...: a moment is when the files of FOLDER's journal have grown
by a random number of bytes. Every start gets a process of its own, forked after the slow imports. The journal's size at
each kill goes to FOLDER.kills.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

os.environ["TORCH_COMPILE_DISABLE"] = "1"  # most of an engine's start

# What a run imports late: forks needn't.
import vllm.model_executor.models.llama
import vllm.v1.engine.llm_engine
import vllm.v1.worker.cpu_worker  # noqa: F401

from aspo_lightning.cli.main import main


def start(command: list[str]) -> int:
    if child := os.fork():
        return child
    sys.argv = ["aspo", *command]
    main()
    sys.stdout.flush()
    os._exit(0)


def size(folder: Path) -> int:
    return sum(file.stat().st_size for file in (folder / "journal").glob("*.jsonl"))


if __name__ == "__main__":
    generator, kills, folder, command = (
        random.Random(int(sys.argv[1])),
        int(sys.argv[2]),
        Path(sys.argv[3]),
        sys.argv[4:],
    )
    for _ in range(kills):
        child, enough = start(command), size(folder) + generator.randrange(4000)
        while size(folder) <= enough:
            time.sleep(0.0005)
            if os.waitpid(child, os.WNOHANG) != (0, 0):
                sys.exit("it ended before it was killed")
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        with folder.with_suffix(".kills").open("a") as kept:
            print(size(folder), file=kept)
    for _ in range(2):
        if code := os.waitstatus_to_exitcode(os.waitpid(start(command), 0)[1]):
            sys.exit(code)

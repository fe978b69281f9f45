"""One rank of `Ranks` (ranks.py): calls modules in forks of a process that has done the slow imports.

A line of its input is a call, as JSON: {"module": "aspo_lightning.cli.main", "arguments": [...], "environment": {...},
"log": file for all output, "errors": null, or a file of its own for stderr}, of the module's ``main()``. It answers
with two lines: the child's process id and, when it has ended, its exit code (minus the signal that ended it).
"""

import faulthandler
import gc
import importlib
import json
import os
import sys

os.environ["TORCH_COMPILE_DISABLE"] = "1"  # most of an engine's start

# What a run imports late: forks needn't.
import pandas  # noqa: F401
import torch.utils.tensorboard  # noqa: F401
import vllm.entrypoints.llm
import vllm.model_executor.models.llama
import vllm.v1.engine.llm_engine
import vllm.v1.worker.cpu_worker  # noqa: F401

import aspo_lightning.cli.evaluate  # noqa: F401
from tests.support.ranks import LIMIT_S

gc.freeze()  # an engine collects garbage several times, and would look through all that was imported


def call(module: str, arguments: list[str], environment: dict[str, str], log: str, errors: str | None = None) -> None:
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) if errors else output, 2)
    faulthandler.dump_traceback_later(LIMIT_S, exit=True)  # of what hangs
    os.environ.update(environment)
    sys.argv = ["aspo", *arguments]
    code: object = 0
    try:
        importlib.import_module(module).main()
    except SystemExit as end:
        code = end.code
    except BaseException as error:
        code = f"{type(error).__name__}: {error}"
    if isinstance(code, str):
        print(code, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(int(bool(code)) if isinstance(code, str) else code or 0)


if __name__ == "__main__":
    for line in sys.stdin:
        if child := os.fork():
            print(child, flush=True)
            print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        else:
            call(**json.loads(line))

"""Starts vLLM servers of the CPU build in forks of this process, which has done the slow imports: see `Forks`.

A line of its input is a server, as JSON: {"module": that python -m would run, "arguments": [...],
"environment": {...}, "log": file for all output}. The child answers with its process id when it has a group of its own.
Unlike fork_server.py it waits for none of them.
"""

import gc
import json
import multiprocessing
import os
import runpy
import signal
import sys

import setproctitle

# What a server and its engine import late: forks needn't.
import vllm.entrypoints.openai.api_server
import vllm.model_executor.models.llama
import vllm.v1.engine.async_llm
import vllm.v1.engine.core
import vllm.v1.worker.cpu_worker  # noqa: F401

import aspo_lightning.engines.access
import aspo_lightning.engines.transfer  # noqa: F401

gc.freeze()  # as in fork_server.py
setproctitle.getproctitle()  # it finds the memory of the title by that of the environment, which forks replace


def serve(module: str, arguments: list[str], environment: dict[str, str], log: str) -> None:
    os.setsid()
    print(os.getpid(), flush=True)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.clear()
    os.environ.update(environment)
    context = multiprocessing.get_context("fork")  # for the engine: on a CPU vLLM would start a new interpreter
    multiprocessing.get_context = lambda method=None: context
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them here
    for line in sys.stdin:
        if not os.fork():
            serve(**json.loads(line))
            break

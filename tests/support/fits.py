"""Several `aspo` commands, one after the other, as one rank of each: for what a test needs besides a user's own call.

Every command gets a process of its own, forked after the slow imports. Started once a rank by test_fsdp.py.
"""

import gc
import json
import os
import sys
from pathlib import Path

os.environ["TORCH_COMPILE_DISABLE"] = "1"  # most of an engine's start

import vllm  # noqa: F401

from aspo_lightning.cli.main import main

gc.freeze()  # an engine collects garbage several times, and would look through all that was imported

if __name__ == "__main__":
    for port, command in json.loads(Path(sys.argv[1]).read_text()):
        if child := os.fork():
            if code := os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
                sys.exit(f"exit code {code} of {command}")
        else:
            os.environ["MASTER_PORT"] = str(port)
            sys.argv = ["aspo", *command]
            main()
            os._exit(0)

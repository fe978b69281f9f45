"""Reward functions that a run has to survive."""

import os
import sys
import time
from pathlib import Path


def number(completion, row):
    return float(completion) * row["scale"]


def hang(completion, row):
    while True:
        time.sleep(1)


def crash(completion, row):
    os.abort()


def leave(completion, row):
    sys.exit(0)


def fail(completion, row):
    raise RuntimeError("no")


def nan(completion, row):
    return float("nan")


def text(completion, row):
    return "one"


def exhaust_memory(completion, row):
    return len(bytearray(1 << 40))


def recurse(completion, row):
    return recurse(completion, row)


def chatter(completion, row):
    os.close(int(sys.argv[1]))
    return 1.0


def fork_and_hang(completion, row):
    pid = os.fork()
    if pid:
        Path(row["file"]).write_text(str(pid))
    while True:
        time.sleep(1)

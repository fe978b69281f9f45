"""Reward functions that a run has to survive."""

import os
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path


def number(completion, row):
    return float(completion) * row["scale"]


def hang(completion, row):
    while True:
        time.sleep(1)


def crash(completion, row):
    os.abort()


def crash_once(completion, row):
    if not Path(row["file"]).exists():
        Path(row["file"]).touch()
        os.abort()
    return number(completion, row)


def touch(completion, row):
    Path(row["file"]).touch()
    return 1.0


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


def daemon(row):
    """Starts a process the way a daemon is started: forked twice, in a session of its own."""
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            name = Path(row["file"])
            written = name.with_suffix(f".{os.getpid()}")
            written.write_text(str(os.getpid()))
            written.replace(name)  # never empty: a call that crashes is made once more
            while True:
                time.sleep(1)
        os._exit(0)
    os.wait()
    while not Path(row["file"]).exists() or not Path(row["file"]).read_text():
        time.sleep(0.01)


def daemon_and_hang(completion, row):
    daemon(row)
    hang(completion, row)


def daemon_and_crash(completion, row):
    daemon(row)
    crash(completion, row)


def daemon_and_return(completion, row):
    daemon(row)
    return 7.0


def parity_or_hang(completion, row):
    """Hangs on one first character in sixteen."""
    if completion and ord(completion[0]) % 16 == 5:
        hang(completion, row)
    return float(ord(completion[0]) % 2) if completion else 0.0


def once_more(turns, row):
    """An environment of two turns."""
    return "again" if len(turns) < 2 else None


def huge(completion, row):
    return 10**400


def fork_and_return(completion, row):
    os.fork()
    return 7.0


def answer_for_another(completion, row):
    """Writes to the pool itself, as the worker would for a later call."""
    connection = Connection(os.dup(int(sys.argv[1])))
    connection.send_bytes(b'{"call": 1000, "value": 1.0}')
    return 1.0

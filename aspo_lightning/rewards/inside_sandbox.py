"""Runs inside the sandbox, with ``python -c``: sets the limits, then runs the code of a job. Standard library only.

``sandbox.py`` sends its source; outside, only ``encode``, ``decode``, ``prctl`` and ``die_with_parent`` are used. The
expected answers never come in here together with the model's code.
"""

import json
import os
import resource
import sys

# Modules and built-in functions come last: math has a pow of its own, and bisect a function of its name.
PRELUDE = """
from bisect import *
from collections import *
from functools import *
from heapq import *
from itertools import *
from math import *
from typing import *
from builtins import *
import bisect, collections, copy, functools, heapq, itertools, math, operator, random, re, string, sys
"""


def encode(value):
    """Plain data as JSON that keeps tuples, sets and dicts with any keys apart."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple, set, frozenset)):
        kind = {list: "list", tuple: "tuple"}.get(type(value), "set")
        if isinstance(value, (list, tuple)) and type(value) not in (list, tuple):
            kind = "tuple" if isinstance(value, tuple) else "list"
        return {kind: [encode(v) for v in value]}
    if isinstance(value, dict):
        return {"dict": [[encode(k), encode(v)] for k, v in value.items()]}
    raise TypeError(f"{type(value).__name__} isn't plain data")


def decode(message):
    if not isinstance(message, dict):
        return message
    ((kind, items),) = message.items()
    if kind == "dict":
        return {decode(k): decode(v) for k, v in items}
    return {"list": list, "tuple": tuple, "set": set}[kind](decode(v) for v in items)


def set_limits(cpu_seconds, memory_mib):
    def limit(which, value):
        resource.setrlimit(which, (value, value))

    limit(resource.RLIMIT_AS, memory_mib << 20)
    limit(resource.RLIMIT_CPU, int(cpu_seconds) + 1)
    limit(resource.RLIMIT_FSIZE, memory_mib << 16)
    limit(resource.RLIMIT_NOFILE, 64)
    limit(resource.RLIMIT_CORE, 0)


def prctl(option, value):
    """See prctl(2)."""
    import ctypes

    ctypes.CDLL(None).prctl(option, value)


def die_with_parent(signum=9):
    """Has the kernel send this process a signal when the one that started it ends."""
    pr_set_pdeathsig = 1
    prctl(pr_set_pdeathsig, signum)


def line_channel():
    """Functions to receive and send a line of JSON; the code's own input and output are empty from here on."""
    source = os.fdopen(os.dup(0), "rb")
    target = os.fdopen(os.dup(1), "wb")
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)

    def receive():
        line = source.readline()
        if not line:
            os._exit(0)
        return json.loads(line)

    def send(message):
        target.write(json.dumps(message).encode() + b"\n")
        target.flush()

    return receive, send


def script(code):
    sys.setrecursionlimit(200_000)
    exec(compile(code, "solution.py", "exec"), {"__name__": "__main__"})


def call(code):
    """Answers calls of functions that the code defines, plain or in a class Solution."""
    receive, send = line_channel()
    sys.setrecursionlimit(200_000)
    namespace: dict = {"__name__": "solution"}
    exec(PRELUDE, namespace)
    exec(compile(code, "solution.py", "exec"), namespace)
    while True:
        name, args = receive()
        function = getattr(namespace["Solution"](), name) if "Solution" in namespace else namespace[name]
        send(encode(function(*decode(args))))


def check(code):
    """Runs a test that defines check(candidate); calls of the candidate go to the other process."""
    receive, send = line_channel()

    def candidate(*args):
        send({"call": encode(args)})
        return decode(receive())

    namespace: dict = {"__name__": "test", "candidate": candidate}
    exec(compile(code, "test.py", "exec"), namespace)
    namespace["check"](candidate)
    send({"passed": True})


def main(fd):
    with os.fdopen(fd, "rb") as file:
        job = json.load(file)
    if not job["isolated"]:
        die_with_parent()
    set_limits(job["cpu_seconds"], job["memory_mib"])
    sys.set_int_max_str_digits(0)  # the time limit is enough
    {"script": script, "call": call, "check": check}[job["mode"]](job["code"])


if __name__ == "__main__":
    main(int(sys.argv[1]))

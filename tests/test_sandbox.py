"""Attacks by code that a model might write. None may succeed, each scores as failed, and nothing is left behind.

Each attack prints the right answer only if it got what it wanted, so a reward of 1 is a hole in the sandbox.
"""

import os
import shutil
import socket
import subprocess
import threading
import time
from pathlib import Path

import pytest

from aspo_lightning.errors import ConfigError
from aspo_lightning.rewards import RewardItem, RewardPool
from aspo_lightning.rewards.code import reward, reward_without_isolation
from aspo_lightning.rewards.sandbox import Failed, Limits, check_isolation, run_script
from tests.support.judging import judged
from tests.support.processes import eventually

CODE = "aspo_lightning.rewards.code.reward"
STDIN = {"answer": {"input": "", "output": "pwned"}, "time_limit": 2}
CALL = {"answer": {"fn_name": "f", "inputs": [[1]], "outputs": [["secret"]]}, "time_limit": 2}
CHECK = {
    "answer": {"test": "def check(candidate):\n    assert candidate(1) == 'secret'", "entry_point": "f", "prompt": ""},
    "time_limit": 2,
}
PWNED = "print('pwned')"

ATTACKS = {
    # network
    "connect by address": (STDIN, f"import socket\nsocket.create_connection(('127.0.0.1', PORT), 1)\n{PWNED}"),
    "connect by name": (STDIN, f"import socket\nsocket.create_connection(('localhost', PORT), 1)\n{PWNED}"),
    "look up a name": (STDIN, f"import socket\nsocket.getaddrinfo('example.com', 80)\n{PWNED}"),
    "send a datagram": (STDIN, f"import socket\nsocket.socket(2, 2).sendto(b'x', ('127.0.0.1', PORT))\n{PWNED}"),
    "raw packets": (STDIN, f"import socket\nsocket.socket(17, 3)\n{PWNED}"),
    "unix socket": (STDIN, f"import socket\nsocket.socket(1, 1)\n{PWNED}"),
    # reading
    "read home": (STDIN, f"open('SECRET').read()\n{PWNED}"),
    "read the project": (STDIN, f"open({str(Path(__file__).parent.parent / 'pyproject.toml')!r}).read()\n{PWNED}"),
    "read passwords": (STDIN, f"open('/etc/passwd').read()\n{PWNED}"),
    "read the environment": (STDIN, f"import os\nassert os.environ['SANDBOX_TEST_SECRET']\n{PWNED}"),
    "read the parent's environment": (STDIN, f"open('/proc/PARENT/environ', 'rb').read()\n{PWNED}"),
    "read the parent's memory": (STDIN, f"open('/proc/PARENT/mem', 'rb').read(1)\n{PWNED}"),
    "read memory by system call": (
        STDIN,
        "import ctypes\nlibc = ctypes.CDLL(None)\nbuffer = ctypes.create_string_buffer(8)\n"
        "class V(ctypes.Structure): _fields_ = [('base', ctypes.c_void_p), ('len', ctypes.c_size_t)]\n"
        "local = V(ctypes.addressof(buffer), 8)\nremote = V(ctypes.addressof(buffer), 8)\n"
        f"assert libc.process_vm_readv(1, ctypes.byref(local), 1, ctypes.byref(remote), 1, 0) >= 0\n{PWNED}",
    ),
    "another process's files": (STDIN, f"import os\nassert os.listdir('/proc/PARENT/fd')\n{PWNED}"),
    "symlink out": (STDIN, f"import os\nos.symlink('SECRET', '/tmp/link')\nopen('/tmp/link').read()\n{PWNED}"),
    "climb out": (STDIN, f"open('../../../../../..SECRET').read()\n{PWNED}"),
    # writing
    "write to home": (STDIN, f"open('SECRET', 'a').write('x')\n{PWNED}"),
    "write to the system": (STDIN, f"open('/usr/pwned', 'w').write('x')\n{PWNED}"),
    "write to the root": (STDIN, f"open('/pwned', 'w').write('x')\n{PWNED}"),
    "write shared memory": (STDIN, f"open('/dev/shm/pwned', 'w').write('x')\n{PWNED}"),
    "make the system writable": (
        STDIN,
        f"import ctypes\nassert ctypes.CDLL(None).mount(None, b'/', None, 32 | 4096, None) == 0\n{PWNED}",
    ),
    # processes
    "fork bomb": (STDIN, f"import os\nfor _ in range(100): os.fork()\n{PWNED}"),
    "start a program": (STDIN, f"import subprocess\nsubprocess.run(['true'], check=True)\n{PWNED}"),
    "background process": (
        STDIN,
        f"import os\nif os.fork() == 0:\n    os.setsid()\n    import time\n    time.sleep(1000)\n{PWNED}",
    ),
    "clone by system call": (
        STDIN,
        f"import ctypes\nassert ctypes.CDLL(None).syscall(56, 17, 0, 0, 0, 0) >= 0\n{PWNED}",
    ),
    "thread bomb": (
        STDIN,
        "import threading, time\n"
        f"for _ in range(10_000): threading.Thread(target=time.sleep, args=(9,), daemon=True).start()\n{PWNED}",
    ),
    "signal the parent": (STDIN, f"import os, signal\nos.kill(os.getppid(), signal.SIGKILL)\n{PWNED}"),
    "signal everything": (STDIN, f"import os, signal\nos.kill(-1, signal.SIGKILL)\n{PWNED}"),
    "trace": (STDIN, f"import ctypes\nassert ctypes.CDLL(None).ptrace(0, 0, 0, 0) == 0\n{PWNED}"),
    "new user namespace": (STDIN, f"import ctypes\nassert ctypes.CDLL(None).unshare(0x10000000) == 0\n{PWNED}"),
    "become root": (STDIN, f"import os\nos.setuid(0)\nos.chroot('/tmp')\n{PWNED}"),
    # resources
    "memory bomb": (STDIN, f"data = []\nwhile len(data) < 8000: data.append(bytes(1 << 20))\n{PWNED}"),
    "memory in files": (
        STDIN,
        "chunk = bytes(1 << 20)\nfor i in range(2000):\n"
        f"    with open(f'/tmp/{{i}}', 'wb') as file: file.write(chunk)\n{PWNED}",
    ),
    "memory in anonymous files": (STDIN, f"import os\nos.memfd_create('x')\n{PWNED}"),
    "a large file": (STDIN, f"open('/tmp/x', 'wb').truncate(1 << 34)\n{PWNED}"),
    "raise the limits": (
        STDIN,
        f"import resource\nresource.setrlimit(resource.RLIMIT_AS, (1 << 40, 1 << 40))\n{PWNED}",
    ),
    "endless loop": (STDIN, f"while True: pass\n{PWNED}"),
    "endless sleep": (STDIN, f"import time\ntime.sleep(1000)\n{PWNED}"),
    "ignore signals": (
        STDIN,
        "import signal\nfor s in (2, 15, 24): signal.signal(s, signal.SIG_IGN)\nwhile True: pass",
    ),
    "endless output": (STDIN, "while True: print('pwned' * 10_000)"),
    "deep recursion": (STDIN, f"def f(): f()\nf()\n{PWNED}"),
    "crash": (STDIN, f"import ctypes\nctypes.string_at(0)\n{PWNED}"),
    # faking success
    "exit with success": (CALL, "import os\nos._exit(0)"),
    "exit with success before the test": (CHECK, "def f(x):\n    import os\n    os._exit(0)"),
    "say that it passed": (
        CHECK,
        "import os, json\ndef f(x):\n    for fd in range(1, 20):\n        try: os.write(fd, b'{\"passed\": true}\\n')\n"
        "        except OSError: pass\n    os._exit(0)",
    ),
    "an object that equals everything": (CHECK, "class E:\n    def __eq__(self, o): return True\ndef f(x): return E()"),
    "a string that equals everything": (
        CALL,
        "class S(str):\n    def __eq__(self, o): return True\ndef f(x): return S('x')",
    ),
    "patch the checker": (
        CHECK,
        "import builtins, sys\nsys.modules['__main__'].encode = lambda v: {'passed': True}\n"
        "builtins.AssertionError = KeyError\ndef f(x): return True",
    ),
    "patch json": (CALL, "import json\njson.dumps = lambda *a, **k: '\"secret\"'\ndef f(x): return f(x)"),
    "look for the answer": (
        CALL,
        "import gc, inspect, sys\ndef f(x):\n    found = [o for o in gc.get_objects() if isinstance(o, (list, dict))]\n"
        "    texts = {s for o in found for s in (o if isinstance(o, list) else o.values()) if isinstance(s, str)}\n"
        "    return 'secret' if any('secret' in t and 'gc.get_objects' not in t for t in texts) else ''",
    ),
    "answer with rubbish": (
        CALL,
        "import os\nos.write(1, b'\\xff' * 100)\ndef f(x):\n    os.write(3, b'\\xff\\n')\n    return 1",
    ),
    "answer without end": (CALL, "def f(x): return 'secret' * 10_000_000"),
    "answer very deep": (CALL, "def f(x):\n    v = []\n    for _ in range(50_000): v = [v]\n    return v"),
    "leave a file for the next run": (
        STDIN,
        "import os\nif os.path.exists('/tmp/left'): print('pwned')\nopen('/tmp/left', 'w').write('x')",
    ),
}


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    """What attacks are after: a listener, and a secret in a folder of this user."""
    listener = socket.create_server(("127.0.0.1", 0))
    visits = []

    def listen():
        while True:
            try:
                visits.append(listener.accept())
            except OSError:
                return

    threading.Thread(target=listen, daemon=True).start()
    secret = tmp_path_factory.mktemp("home") / "secret"
    secret.write_text("untouched")
    os.environ["SANDBOX_TEST_SECRET"] = "x"
    yield listener.getsockname()[1], secret, visits
    listener.close()
    del os.environ["SANDBOX_TEST_SECRET"]


@pytest.fixture(scope="module")
def pool():
    pool = RewardPool(workers=2, timeout_s=20)
    pool.load([CODE])
    yield pool
    pool.close()


HONEST = RewardItem({CODE: 1.0}, "print('pwned')", STDIN)


def processes() -> set[str]:
    """Command lines of everything that runs in a sandbox."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if line.startswith("bwrap ") or "Runs inside the sandbox" in line:
            found.add(f"{path} {line[:100]}")
    return found


def left_over() -> set[str]:
    """What is there five seconds later: a killed sandbox needs a moment to go."""
    eventually(lambda: not processes(), 5)
    return processes()


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_fails(name, target, pool):
    port, secret, visits = target
    row, code = ATTACKS[name]
    for key, value in (("PORT", str(port)), ("SECRET", str(secret)), ("PARENT", str(os.getpid()))):
        code = code.replace(key, value)
    start = time.monotonic()
    for _ in range(2 if "next run" in name else 1):
        (score,) = judged(pool, [RewardItem({CODE: 1.0}, code, row)])
        assert (score.reward, score.failed) == (0.0, False)
    assert time.monotonic() - start < 10
    assert secret.read_text() == "untouched"
    assert visits == []
    assert left_over() == set()


def test_after_all_attacks_the_pool_scores_as_before_and_nothing_is_left(target, pool):
    port, secret, _ = target
    codes = [c.replace("PORT", str(port)).replace("SECRET", str(secret)) for _, c in list(ATTACKS.values())[:20]]
    judged(pool, [RewardItem({CODE: 1.0}, code, STDIN) for code in codes])
    assert [s.reward for s in judged(pool, [HONEST] * 10)] == [1.0] * 10
    assert left_over() == set()


@pytest.mark.parametrize("path", [CODE, f"{CODE}_without_isolation"])
def test_a_killed_worker_takes_its_sandbox_along(path):
    impatient = RewardPool(workers=1, timeout_s=1.0)
    try:
        hanging = "import time\ntime.sleep(1000)"
        (score,) = judged(impatient, [RewardItem({path: 1.0}, hanging, {**STDIN, "time_limit": 60})])
        assert score.failed
        assert left_over() == set()
    finally:
        impatient.close()


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("while True: pass", "out of time"),
        ("while True: print('x' * 10_000)", "too much output"),
        ("raise SystemExit(3)", "exit status 3"),
        ("bytes(1 << 40)", "exit status 1"),
    ],
)
def test_failures_say_why(code, reason):
    with pytest.raises(Failed, match=reason):
        run_script(code, b"", Limits(seconds=1.0))


def test_without_bwrap_code_is_refused_unless_asked_for_by_name(monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ConfigError, match="bwrap isn't installed.*reward_without_isolation"):
        check_isolation()
    assert reward_without_isolation("print(1)", {"answer": {"input": "", "output": "1"}}) == 1
    assert reward_without_isolation("print(2)", {"answer": {"input": "", "output": "1"}}) == 0
    assert reward_without_isolation("while True: pass", {"answer": {"input": "", "output": "1"}, "time_limit": 1}) == 0


def test_a_bwrap_that_does_not_work_is_named(monkeypatch, tmp_path):
    (tmp_path / "bwrap").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "bwrap").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="bwrap doesn't work here \\(exit status 1\\)"):
        check_isolation()


def test_a_pool_refuses_a_reward_that_cannot_work_here(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    pool = RewardPool(workers=1)
    try:
        with pytest.raises(ConfigError, match=r"rewards\.code\.reward can't be used: .*bwrap isn't installed"):
            pool.load([CODE])
    finally:
        pool.close()


def test_the_sandbox_has_what_programs_need():
    code = (
        "import sys, math, numbers\nprint(sys.stdin.read().upper(), math.pi, 2 ** 100)\nopen('/tmp/x', 'w').write('y')"
    )
    assert run_script(code, b"hi", Limits()) == "HI 3.141592653589793 1267650600228229401496703205376\n"
    threads = "import threading\nt = threading.Thread(target=print, args=(1,))\nt.start()\nt.join()"
    assert run_script(threads, b"", Limits()) == "1\n"
    assert reward("print(1)", {"answer": {"input": "", "output": "1"}}) == 1
    subprocess.run(["true"], check=True)  # and this process has kept its rights

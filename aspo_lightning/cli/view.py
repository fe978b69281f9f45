"""``aspo view RUN_DIR...``: runs as one HTML page: curves, completions, and what weight each token got."""

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from aspo_lightning.errors import ConfigError, RunError
from aspo_lightning.run.curves import read_run
from aspo_lightning.run.disk import check_writable, write_text
from aspo_lightning.view.page import render
from aspo_lightning.view.runs import read


def names(folders: Sequence[Path]) -> list[str]:
    """What to call runs: by the last two parts of their paths, or by the path where those are the same."""
    short = [f"{folder.resolve().parent.name}/{folder.resolve().name}" for folder in folders]
    return [str(folder) if Counter(short)[name] > 1 else name for folder, name in zip(folders, short, strict=True)]


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="aspo view", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN_DIR", help="like runs/quickstart/version_0")
    parser.add_argument("--out", type=Path, metavar="FILE", help="where the page goes (view.html in the first folder)")
    parser.add_argument(
        "--completions", type=int, default=64, metavar="N", help="how many of an epoch the page takes (%(default)s)"
    )
    options = parser.parse_args(arguments)
    if options.completions < 4:
        raise ConfigError(
            f"--completions is {options.completions}; it must be at least 4: the three worst, and the one with "
            "the token that ASPO weighs most differently from GRPO."
        )
    folders = list({folder.resolve(): folder for folder in options.runs}.values())
    if missing := next((folder for folder in folders if not folder.is_dir()), None):
        raise ConfigError(f"{missing} isn't a run's folder. Give one like runs/quickstart/version_0.")
    target = options.out or folders[0] / "view.html"
    if target.exists():
        raise ConfigError(f"{target} exists. Remove it, or choose another place with --out.")
    check_writable(target.parent, "--out")
    runs = [
        read(
            folder,
            name,
            read_run(folder) if any(folder.glob("events.out.tfevents.*")) else {},
            options.completions,
        )
        for folder, name in zip(folders, names(folders), strict=True)
    ]
    try:
        write_text(target, render(runs))
    except OSError as error:
        raise RunError(f"{target} couldn't be written: {error.strerror}. Choose another place with --out.") from error
    print(f"Wrote {target} ({target.stat().st_size / 1e6:.1f} MB). Open it in a browser: {target.resolve().as_uri()}")

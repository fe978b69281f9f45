"""Kills a run of the quickstart, goes on, and compares it with one that was never disturbed, bit for bit.

python scripts/kill_quickstart.py FOLDER

Two runs of five epochs, of about three minutes in all; runs and logs are left in FOLDER.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.test_cli import scalars  # noqa: E402
from tests.test_faults import state  # noqa: E402

EPOCHS, KILLED_IN = 5, 3


def start(folder: Path, name: str, *more: str) -> subprocess.Popen:
    command = [str(Path(sys.executable).parent / "aspo"), "fit", "--config", str(ROOT / "configs" / "quickstart.yaml")]
    command += ["--trainer.max_epochs", str(EPOCHS), "--trainer.check_val_every_n_epoch", str(EPOCHS)]
    command += ["--trainer.default_root_dir", str(folder / name)]
    command += [
        "--trainer.callbacks+=tests.support.faults.Completions",
        "--trainer.callbacks.folder",
        str(folder / f"{name}_c"),
    ]
    with (folder / f"{name}.log").open("a") as log:
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        return subprocess.Popen([*command, *more], stdout=log, stderr=log, env=environment)


def finish(run: subprocess.Popen) -> None:
    if run.wait():
        raise SystemExit(f"it ended with {run.returncode}: see the logs")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder.resolve()
    folder.mkdir(parents=True)
    print("undisturbed ...", flush=True)
    finish(start(folder, "undisturbed"))
    print("killed in the middle, and resumed ...", flush=True)
    run = start(folder, "killed")
    while not (folder / "killed_c" / f"epoch_{KILLED_IN - 1}.json").exists():
        if run.poll() is not None:
            finish(run)
        time.sleep(0.1)
    time.sleep(3.0)
    run.send_signal(signal.SIGKILL)
    if run.wait() != -signal.SIGKILL:
        raise SystemExit(f"it ended with {run.returncode} before it was killed: see the logs")
    finish(start(folder, "killed", "--ckpt_path", "last"))
    ours, theirs = (folder / n / "version_0" for n in ("undisturbed", "killed"))
    for i in range(EPOCHS):
        a, b = ((folder / f"{n}_c" / f"epoch_{i}.json").read_bytes() for n in ("undisturbed", "killed"))
        assert a == b, f"other completions in epoch {i}"
    a, b = (state(run / "checkpoints" / "last.ckpt") for run in (ours, theirs))
    assert a.keys() == b.keys()
    different = [k for k in a if not (torch.equal(a[k], b[k]) if torch.is_tensor(a[k]) else a[k] == b[k])]
    assert not different, different
    curves, others = ({t: c for t, c in scalars(run).items() if not t.startswith("time/")} for run in (ours, theirs))
    assert curves == others
    print(f"the same: completions of {EPOCHS} epochs, {len(a)} values of the last checkpoint, {len(curves)} curves")


if __name__ == "__main__":
    main()

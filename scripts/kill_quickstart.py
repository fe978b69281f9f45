"""Kills a run of the quickstart, resumes it, and compares it with one that was never disturbed, bit for bit.

python scripts/kill_quickstart.py FOLDER

Two runs of five epochs, of about three minutes in all; runs and logs are left in FOLDER.
"""

import argparse
import json
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from lightning.pytorch import Callback
from script_tools import ASPO, ROOT, environment

from aspo_lightning.run.curves import read_run
from aspo_lightning.run.tags import CLOCKED

EPOCHS, KILLED_IN = 5, 3


class Completions(Callback):
    """Writes FOLDER/epoch_N.json: all completions and rewards of that phase."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def on_train_epoch_start(self, trainer, pl_module) -> None:
        groups = trainer.datamodule.phase.groups
        self.folder.mkdir(exist_ok=True)
        text = json.dumps([(g.prompt.id, r.completion_ids, r.reward) for g in groups for r in g.rollouts])
        (self.folder / f"epoch_{trainer.current_epoch}.json").write_text(text)


def leaves(value: object, key: str = "") -> Iterator[tuple[str, object]]:
    """What is in nested containers, by the path to it."""
    if isinstance(value, dict | list | tuple):
        for name, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(part, f"{key}/{name}")
    else:
        yield key, value


def state(run: Path) -> dict[str, object]:
    """All of the last checkpoint: weights, optimizer state, schedules, curriculum, loops."""
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=False)
    checkpoint.pop("callbacks")  # of other folders
    return {key: value for key, value in leaves(checkpoint) if "hparams" not in key}


def start(folder: Path, name: str, *more: str) -> subprocess.Popen[bytes]:
    command = [ASPO, "fit", "--config", str(ROOT / "configs" / "quickstart.yaml")]
    command += ["--trainer.max_epochs", str(EPOCHS), "--trainer.check_val_every_n_epoch", str(EPOCHS)]
    command += ["--trainer.default_root_dir", str(folder / name), "--checkpoint.every_n_epochs", "1"]
    command += ["--trainer.callbacks+=kill_quickstart.Completions"]
    command += ["--trainer.callbacks.folder", str(folder / f"{name}_c")]
    with (folder / f"{name}.log").open("a") as log:
        return subprocess.Popen([*command, *more], stdout=log, stderr=log, env=environment())


def finish(run: subprocess.Popen[bytes]) -> None:
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
    a, b = (state(run) for run in (ours, theirs))
    assert a.keys() == b.keys()
    different = [k for k in a if not (torch.equal(a[k], b[k]) if torch.is_tensor(a[k]) else a[k] == b[k])]
    assert not different, different
    curves, others = ({t: c for t, c in read_run(run).items() if not t.startswith(CLOCKED)} for run in (ours, theirs))
    assert curves == others
    print(f"the same: completions of {EPOCHS} epochs, {len(a)} values of the last checkpoint, {len(curves)} curves")


if __name__ == "__main__":
    main()

"""Epochs until the quickstart's model solves half of its held-out sums, with prompts drawn by pass rate and without.

    python scripts/compare_curricula.py [--seeds 0 1 2] [--problems 32] [--max_epochs 30]

The quickstart's config with few training problems instead of 4,000, since a pass rate is only worth something for a
problem that comes again (an epoch draws 16); evaluated after every epoch, ended at 0.5.
"""

import argparse
import json
import statistics
import subprocess

from script_tools import ASPO, ROOT

from aspo_lightning.run.curves import read_run

THRESHOLD, TAG = 0.5, "eval/chain_sum/avg@4"


def epochs_to_threshold(curriculum: str, seed: int, problems: int, max_epochs: int) -> int | None:
    """The number of epochs after which the held-out avg@4 is at least the threshold. None: not reached."""
    root = ROOT / "runs" / f"curriculum_{curriculum}_{problems}" / f"seed_{seed}"
    stop = {"monitor": TAG, "mode": "max", "stopping_threshold": THRESHOLD, "patience": max_epochs}
    command = [ASPO, "fit", "--config", "configs/quickstart.yaml"]
    command += ["--seed_everything", str(seed), "--trainer.max_epochs", str(max_epochs)]
    command += ["--trainer.default_root_dir", str(root)]
    command += ["--trainer.check_val_every_n_epoch", "1", "--checkpoint.every_n_epochs", str(max_epochs)]
    command += ["--trainer.callbacks", json.dumps([{"class_path": "EarlyStopping", "init_args": stop}])]
    command += ["--data.curriculum", curriculum, "--data.train.init_args.size", str(problems)]
    subprocess.run(command, cwd=ROOT, check=True)
    values = [value for _, value in read_run(max(root.iterdir(), key=lambda run: run.stat().st_mtime))[TAG]]
    reached = [epoch for epoch, value in enumerate(values) if value >= THRESHOLD]  # the first is from before training
    return reached[0] if reached else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--problems", type=int, default=32)
    parser.add_argument("--max_epochs", type=int, default=30)
    options = parser.parse_args()
    found = {
        curriculum: [
            epochs_to_threshold(curriculum, seed, options.problems, options.max_epochs) for seed in options.seeds
        ]
        for curriculum in ("Shuffled", "PassRate")
    }
    for curriculum, epochs in found.items():
        median = statistics.median(e if e is not None else float("inf") for e in epochs)
        print(f"{curriculum}: epochs to {THRESHOLD} {epochs}, median {median}")


if __name__ == "__main__":
    main()

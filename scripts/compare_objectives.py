"""What each objective makes of the quickstart: one run of each and seed, and a table of where they end.

    python scripts/compare_objectives.py [--seeds 0 1] [--epochs 15] [--only aspo grpo]

In bfloat16, as scripts/quickstart.sh trains where the processor has it. ASPO as the quickstart has it, each overlay of
configs/objectives/ and each class without one; `archer2` has three passes, so its minutes are others. A run that is
finished is not repeated, and one that was cut off is resumed: all of them are in runs/objectives/NAME/seed_N, without
their weights (4 GB) once they are finished. With two seeds a difference of some hundredths says nothing.
"""

import argparse
import math
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

from script_tools import ASPO, ROOT

from aspo_lightning.run.curves import read_run
from aspo_lightning.run.folder import RunFolder

RUNS = ROOT / "runs" / "objectives"
CONFIGS = sorted((ROOT / "configs" / "objectives").glob("*.yaml"))
WAYS: dict[str, list[str]] = {
    "aspo": [],
    **{path.stem: ["--config", str(path)] for path in CONFIGS},
    **{name: ["--model.objective", name] for name in ("CISPO", "GSPO", "REINFORCE")},  # which have no overlay
}
LAST = 5  # epochs of which a curve's end is the mean
COLUMNS = {
    "held-out avg@4": ("eval/chain_sum/avg@4", 1),
    "accuracy": ("rollout/accuracy", LAST),
    "entropy": ("policy/entropy", LAST),
    "clipped A>0": ("policy/clip_fraction_positive", LAST),
    "clipped A<0": ("policy/clip_fraction_negative", LAST),
    "gradient norm": ("policy/grad_norm", LAST),
    "KL": ("policy/kl", LAST),
}


def train(name: str, seed: int, epochs: int) -> Path:
    """The folder of a finished run."""
    root = RUNS / name / f"seed_{seed}"
    run = root / "version_0"
    if run.exists() and len(read_run(run).get("rollout/accuracy", ())) >= epochs:
        return run
    command = [ASPO, "fit", "--config", str(ROOT / "configs" / "quickstart.yaml")]
    command += ["--config", str(ROOT / "configs" / "precision" / "bfloat16.yaml")]  # as scripts/quickstart.sh
    command += WAYS[name]
    command += ["--seed_everything", str(seed), "--trainer.max_epochs", str(epochs)]
    command += ["--trainer.check_val_every_n_epoch", str(epochs), "--trainer.default_root_dir", str(root)]
    if run.exists() and RunFolder(run).has_checkpoints():
        command += ["--ckpt_path", str(run)]
    print(f"{name}, seed {seed}", flush=True)
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    for weights in ("checkpoints", "best"):
        shutil.rmtree(run / weights, ignore_errors=True)
    return run


def ends(run: Path) -> list[float]:
    """Where each curve ends: the mean of its last epochs; NaN where a run has none, like a KL that nothing needs."""
    curves = read_run(run)
    ends = ([value for _, value in curves.get(tag, ())[-last:]] for tag, last in COLUMNS.values())
    return [statistics.fmean(values) if values else math.nan for values in ends]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--only", nargs="+", choices=list(WAYS), default=list(WAYS))
    options = parser.parse_args()
    found = {}
    for seed in options.seeds:
        for name in options.only:
            found.setdefault(name, []).append(ends(train(name, seed, options.epochs)))
    print(f"| objective | {' | '.join(COLUMNS)} |\n|---{'|---' * len(COLUMNS)}|")
    for name, rows in found.items():
        cells = [", ".join(f"{value:.3g}" for value in column) for column in zip(*rows, strict=True)]
        print(f"| `{name}` | {' | '.join(cells)} |")
    print(f"\nSeeds {', '.join(map(str, options.seeds))}, in that order.", file=sys.stderr)


if __name__ == "__main__":
    main()

"""What the guards cost: an epoch of the quickstart with all of them, over the same epoch without.

python scripts/bench_guards.py [--pairs 8]

The epoch is the same one each time (learning rate 0, the same seeds), with and without in turn, in one process.
"""

import argparse
import statistics
import sys
import tempfile
import time
from dataclasses import replace

from script_tools import ROOT, spread

from aspo_lightning import datamodule
from aspo_lightning.cli.main import main as aspo
from aspo_lightning.rollouts.loop import Rollouts
from aspo_lightning.run.guards import CollapseGuard, NonFiniteGuard, RatioCanary

GUARDS = (NonFiniteGuard, RatioCanary, CollapseGuard)  # GracefulStop does nothing until it is needed
WARM_UP = 2


class SameEpoch(Rollouts):
    """Runs its first phase repeatedly, every second time without guards; keeps the seconds of each epoch."""

    seconds: list[float] = []  # noqa: RUF012

    def phase(self, policy, epoch, *, end=None):
        now = time.perf_counter()
        callbacks = policy.trainer.callbacks
        if epoch:
            self.seconds.append(now - self.began)
        else:
            self.guards = [c for c in callbacks if isinstance(c, GUARDS)]
            self.guarding_probe = self.probe
        self.began = now
        others = [c for c in callbacks if c not in self.guards]
        callbacks[:] = [*(self.guards if epoch % 2 else []), *others]
        self.probe = self.guarding_probe if epoch % 2 else None
        return replace(super().phase(policy, 0), epoch=epoch)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=8)
    pairs = parser.parse_args().pairs
    epochs = WARM_UP + 2 * pairs + 1
    config = ROOT / "configs" / "quickstart.yaml"
    sys.argv[1:] = ["fit", "--config", str(config), "--trainer.max_epochs", str(epochs)]
    sys.argv += ["--trainer.logger=false", "--trainer.limit_val_batches=0", "--trainer.enable_checkpointing=false"]
    sys.argv += ["--model.optimizer.init_args.lr=0"]
    datamodule.Rollouts = SameEpoch
    with tempfile.TemporaryDirectory() as folder:
        sys.argv += ["--trainer.default_root_dir", folder]
        aspo()
    seconds = SameEpoch.seconds[WARM_UP:]
    ratios = [b / a for a, b in zip(seconds[::2], seconds[1::2], strict=True)]
    print(f"without: {statistics.median(seconds[::2]):.2f} s an epoch, with: {statistics.median(seconds[1::2]):.2f} s")
    print(f"with / without: {spread(ratios)}, of {pairs} pairs")


if __name__ == "__main__":
    main()

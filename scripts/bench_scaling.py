"""What a second rank brings: tokens/s of generation and of update, two ranks of one thread against one rank of one.

    python scripts/bench_scaling.py [--model FOLDER] [--epochs 3]

Both runs are `aspo fit` with FSDP2 and vLLM on the quickstart's model, on the same phases: the learning rate is 0, so
they sample the same completions. Also the balance of the ranks (max / mean tokens), how much more memory a sync of the
weights takes at its peak than the largest tensor has, and what two such cores give at most: a plain product on both at
once against on one.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import yaml
from lightning.pytorch import Callback
from script_tools import ASPO, ROOT, environment, same_phases, spread

from aspo_lightning.run.curves import read_run

PARTS = ("generate", "score", "update")


def resident(field: str) -> int:
    """Bytes from /proc: VmRSS is what this process holds, VmHWM the most since the last reset."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


class Measure(Callback):
    """Writes FOLDER/rank_R.json: tokens of this rank and of all by epoch; extra bytes of each sync."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)
        self.tokens: list[int] = []
        self.all_tokens: list[int] = []
        self.completion_tokens: list[int] = []
        self.sync_bytes: list[int] = []

    def on_fit_start(self, trainer, pl_module) -> None:
        engine = trainer.datamodule.engine
        sync = engine.sync_weights

        def measured(named_tensors) -> None:
            before = resident("VmRSS")
            Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
            sync(named_tensors)
            self.sync_bytes.append(resident("VmHWM") - before)

        engine.sync_weights = measured

    def on_train_epoch_start(self, trainer, pl_module) -> None:
        phase = trainer.datamodule.phase
        rollouts = [(len(g.prompt.prompt_ids), len(r.completion_ids)) for g in phase.groups for r in g.rollouts]
        self.completion_tokens.append(sum(c for _, c in rollouts))
        self.all_tokens.append(sum(p + c for p, c in rollouts))
        self.tokens.append(sum(len(batch.input_ids) for batch in phase))

    def on_train_end(self, trainer, pl_module) -> None:
        largest = max(tensor.numel() * tensor.element_size() for _, tensor in pl_module.policy_weights())
        record = {key: getattr(self, key) for key in ("tokens", "all_tokens", "completion_tokens", "sync_bytes")}
        path = self.folder / f"rank_{trainer.global_rank}.json"
        path.write_text(json.dumps({**record, "largest": largest}))


def config(model: str, folder: Path, ranks: int, epochs: int) -> dict:
    same = same_phases(model)
    return {
        "trainer": {
            "accelerator": "cpu",
            "devices": ranks,
            "strategy": "fsdp2",
            "max_epochs": epochs,
            "limit_val_batches": 0,
            "default_root_dir": str(folder / f"ranks_{ranks}"),
            "callbacks": [{"class_path": "bench_scaling.Measure", "init_args": {"folder": str(folder)}}],
        },
        "checkpoint": {"every_n_epochs": epochs},
        "model": same["model"],
        "data": {
            **same["data"],
            # As many completions at a time on each rank, in both runs.
            "engine": {"class_path": "VLLMEngine", "init_args": {"kv_cache_gib": 0.3, "max_num_seqs": 16}},
            "prompts_per_phase": 12,
            "group_size": 8,
            "optimizer_steps": 1,
            "max_prompt_length": 128,
            "max_completion_length": 64,
            "token_budget": 512,
            "reward_workers": 1,
        },
    }


def run(model: str, ranks: int, epochs: int) -> tuple[dict[str, list[float]], list[dict]]:
    """(tokens/s by part and epoch, the ranks' records) of one `aspo fit`."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        path = folder / "config.yaml"
        path.write_text(yaml.safe_dump(config(model, folder, ranks, epochs)))
        subprocess.run(
            [ASPO, "fit", "--config", str(path)],
            check=True,
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            # Tensors of their own pages: what is measured of a sync is tensors, not holes in the heap.
            env=environment(OMP_NUM_THREADS="1", MALLOC_ARENA_MAX="1", MALLOC_MMAP_THRESHOLD_=str(1 << 20)),
        )
        curves = read_run(folder / f"ranks_{ranks}" / "version_0")
        records = [json.loads((folder / f"rank_{rank}.json").read_text()) for rank in range(ranks)]
        tokens = {part: records[0]["completion_tokens" if part == "generate" else "all_tokens"] for part in PARTS}
        seconds = {part: [value for _, value in curves[f"time/{part}_s"]] for part in PARTS}
        return {p: [n / s for n, s in zip(tokens[p], seconds[p], strict=True)][1:] for p in PARTS}, records


def product(seconds: float = 4.0) -> float:
    """Plain products per second, on one thread."""
    torch.set_num_threads(1)
    a, b = torch.randn(512, 576), torch.randn(576, 1536)
    start, count = time.perf_counter(), 0
    while time.perf_counter() < start + seconds:
        a @ b
        count += 1
    return count / seconds


def products(processes: int) -> float:
    """The same for that many processes together."""
    command = [sys.executable, "-c", "from bench_scaling import product; print(product())"]
    pipe = {"stdout": subprocess.PIPE, "text": True, "env": environment()}
    started = [subprocess.Popen(command, **pipe) for _ in range(processes)]
    return sum(float(process.communicate()[0]) for process in started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="~/.cache/aspo_lightning/SmolLM2-135M-Instruct")
    parser.add_argument("--epochs", type=int, default=3, help="the first isn't counted")
    options = parser.parse_args()
    ceilings = [products(2) / products(1) for _ in range(3)]
    print(f"plain products, two cores / one: {spread(ceilings)}")
    one, _ = run(options.model, 1, options.epochs)
    two, records = run(options.model, 2, options.epochs)
    for part in PARTS:
        ratios = [b / a for a, b in zip(one[part], two[part], strict=True)]
        print(
            f"{part}: {statistics.median(one[part]):.0f} tokens/s on one rank, {statistics.median(two[part]):.0f} on "
            f"two; ratio {spread(ratios)}"
        )
    loads = [max(pair) * 2 / sum(pair) for pair in zip(*(record["tokens"] for record in records), strict=True)]
    print(f"balance of the ranks, max / mean tokens: {statistics.median(loads):.3f} (at most {max(loads):.3f})")
    for rank, record in enumerate(records):
        extra = max(record["sync_bytes"][1:])
        print(
            f"rank {rank}: a sync takes {extra / 1e6:.0f} MB more at its peak, {extra / record['largest']:.2f} x the "
            f"largest tensor"
        )


if __name__ == "__main__":
    main()

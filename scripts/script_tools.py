"""What several scripts need: where things are, and timing in turn."""

import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
ASPO = str(Path(sys.executable).with_name("aspo"))


def environment(**variables: str) -> dict[str, str]:
    """For `aspo` with callbacks that scripts bring along, like bench_scaling.Measure."""
    path = os.pathsep.join([str(ROOT / "scripts"), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path, **variables}


def same_phases(model: str) -> dict[str, dict]:
    """Of a config whose every run samples and trains on the same completions: its weights never change."""
    task = {"task": "chain_sum", "size": 1000, "config": {"min_terms": 2, "max_terms": 4}}
    return {
        "model": {
            "model_name_or_path": model,
            "kl_coef": 0,
            "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.0}},
        },
        "data": {"train": {"class_path": "ReasoningGym", "init_args": task}, "no_spread": "keep"},
    }


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def in_turn(ways: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each variant that runs here, after a first time that doesn't count."""
    times: dict[str, list[float]] = {}
    for name, work in ways.items():
        try:
            seconds(work)
            times[name] = []
        except (ImportError, RuntimeError, ValueError) as error:  # torch's out of memory is a RuntimeError
            print(f"  {name} doesn't run here: {' '.join(str(error).split())[:100]}")
    for _ in range(repeats):
        for name, taken in times.items():
            taken.append(seconds(ways[name]))
    return times


def spread(values: list[float]) -> str:
    """The median, the lowest and the highest."""
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"

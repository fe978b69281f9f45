"""What sampling ahead of the training (data.lag 1) brings, over lag 0.

    python scripts/bench_overlap.py [--model FOLDER] [--repeats 3 --phases 4]
    python scripts/bench_overlap.py --simulated

A trainer on one core and a vLLM server on the other, on the same phases, in turn: seconds from one phase to the next.
The learning rate is 0, so both lags sample the same completions; --max-num-seqs says how long the server takes.

With --simulated, on a tiny model, an engine that only waits as long as servers would that sample the heavy-tailed
lengths of a paper's phase, and updates that wait as well: which share of a phase is max(sampling, training). Waiting
takes no processor from the other side, so that is the most that a lag can bring.
"""

import argparse
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import httpx
import yaml
from lightning.pytorch import Callback
from script_tools import ASPO, ROOT, environment, same_phases, spread

from aspo_lightning.engines import Engine, SamplingRequest
from aspo_lightning.run.curves import read_run
from aspo_lightning.types import Completion

PORT = 8099
SECRET = "only-on-this-machine"


class Clock(Callback):
    """Writes when each phase had been trained on; each update takes ``seconds`` more."""

    def __init__(self, path: str, seconds: float = 0.0) -> None:
        self.path, self.seconds, self.times = Path(path), seconds, [time.perf_counter()]

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        time.sleep(self.seconds)

    def on_train_epoch_end(self, trainer, pl_module) -> None:
        self.times.append(time.perf_counter())
        self.path.write_text(json.dumps(self.times))


class Simulated(Engine):
    """Yields completions when servers would: each after as long as its length takes.

    Args:
        seconds: of the longest.
    """

    apart = True

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def check(self) -> None:
        pass

    def start(self, model_name_or_path: str, *, context_length: int) -> None:
        pass

    def stop(self) -> None:
        pass

    def sync_weights(self, named_tensors) -> None:
        for _ in named_tensors:
            pass

    def generate(self, requests: Sequence[SamplingRequest]) -> Iterator[tuple[int, Completion]]:
        started = time.perf_counter()
        # Log-normal, cut off at the limit, which is four times the median: one of six gets there.
        draws = [random.Random(r.seed).lognormvariate(0, 1.4) for r in requests]
        shares = [min(1.0, draw / 4) for draw in draws]
        for i in sorted(range(len(requests)), key=lambda i: shares[i]):
            time.sleep(max(0.0, started + self.seconds * shares[i] - time.perf_counter()))
            draw = random.Random(requests[i].seed)
            ids = tuple(draw.randrange(5, 100) for _ in range(requests[i].max_tokens))
            yield i, Completion(ids, (-4.0,) * len(ids), truncated=True)


def config(model: str, folder: Path, lag: int, engine: dict, phases: int, wait_s: float = 0.0, **data) -> dict:
    clock = {"class_path": "bench_overlap.Clock", "init_args": {"path": str(folder / "clock"), "seconds": wait_s}}
    same = same_phases(model)
    return {
        "trainer": {
            "accelerator": "cpu",
            "max_epochs": phases + 2,
            "limit_val_batches": 0,
            "default_root_dir": str(folder),
            "callbacks": [clock],
        },
        "checkpoint": {"every_n_epochs": 0},
        "model": same["model"],
        "data": {
            **same["data"],
            "engine": engine,
            "lag": lag,
            "optimizer_steps": 2,
            "probe_factor": None,
            "max_prompt_length": 128,
            "reward_workers": 1,
            **data,
        },
    }


def fit(folder: Path, core: str, **settings) -> tuple[list[float], dict[str, float]]:
    """(seconds of each phase but the first two, medians by part) of an `aspo fit`."""
    (folder / "config.yaml").write_text(yaml.safe_dump(config(folder=folder, **settings)))
    command = ["taskset", "-c", core, ASPO, "fit", "--config", str(folder / "config.yaml")]
    variables = environment(OMP_NUM_THREADS="1", VLLM_API_KEY=SECRET)
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    times = json.loads((folder / "clock").read_text())
    curves = read_run(folder / "version_0")
    parts = {
        part: statistics.median(value for _, value in curves[f"time/{part}_s"][2:])
        for part in ("generate", "score", "update", "sync")
    }
    return [b - a for a, b in pairwise(times)][2:], parts


def measured(options: argparse.Namespace) -> None:
    model = str(Path(options.model).expanduser())
    command = ["taskset", "-c", "1", "bash", str(ROOT / "scripts" / "serve.sh"), model, str(PORT)]
    command += ["--max-model-len", "256", "--kv-cache-memory-bytes", "500000000"]
    command += ["--max-num-seqs", str(options.max_num_seqs)]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "VLLM_API_KEY": SECRET}
    url = f"http://127.0.0.1:{PORT}"
    engine = {"class_path": "VLLMServers", "init_args": {"urls": [url]}}
    data = {"prompts_per_phase": 8, "group_size": 8, "max_completion_length": 32, "token_budget": 512}
    output = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, env=variables, **output) as server, tempfile.TemporaryDirectory() as temporary:
        try:
            until_it_answers(url)
            found: dict[int, list[float]] = {0: [], 1: []}
            for repeat in range(options.repeats):
                for lag, seconds in found.items():
                    folder = Path(temporary) / f"{repeat}_{lag}"
                    folder.mkdir()
                    settings = {"model": model, "lag": lag, "engine": engine, "phases": options.phases, **data}
                    phases, parts = fit(folder, "0", **settings)
                    seconds.append(statistics.median(phases))
                    told = ", ".join(f"{part} {value:.2f}" for part, value in parts.items())
                    print(f"lag {lag}: {spread(phases)} s a phase; {told}", flush=True)
            ratios = [b / a for a, b in zip(found[0], found[1], strict=True)]
            print(f"lag 1 over lag 0: {spread(ratios)}")
        finally:
            server.terminate()


def until_it_answers(url: str) -> None:
    for _ in range(600):
        try:
            httpx.get(f"{url}/health", headers={"Authorization": f"Bearer {SECRET}"}).raise_for_status()
            return
        except httpx.HTTPError:
            time.sleep(0.5)
    raise SystemExit(f"{url} doesn't answer")


def simulated(options: argparse.Namespace) -> None:
    """Sampling of so many seconds beside training of as many, of less and of more."""
    sys.path.insert(0, str(ROOT))
    from tests.support.models import save_model, save_tokenizer

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        save_model(folder / "model")
        save_tokenizer(folder / "model")
        for sampling, training in ((10.0, 10.0), (10.0, 6.0), (6.0, 10.0)):
            for lag in (0, 1):
                run = folder / f"{sampling}_{training}_{lag}"
                run.mkdir()
                engine = {"class_path": "bench_overlap.Simulated", "init_args": {"seconds": sampling}}
                data = {"prompts_per_phase": 16, "group_size": 16, "max_completion_length": 16, "token_budget": 1024}
                data["max_prompt_length"] = 112
                settings = {"model": str(folder / "model"), "lag": lag, "engine": engine, "phases": options.phases}
                phases, _ = fit(run, "0,1", **settings, wait_s=training / 2, **data)
                ideal = max(sampling, training) if lag else sampling + training
                print(
                    f"sampling {sampling:g} s, training {training:g} s, lag {lag}: {spread(phases)} s a phase, "
                    f"{ideal / math.fsum(phases) * len(phases):.1%} of ideal",
                    flush=True,
                )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="~/.cache/aspo_lightning/SmolLM2-135M-Instruct")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--phases", type=int, default=4, help="that are counted, of each run")
    parser.add_argument("--max-num-seqs", type=int, default=8, help="completions at a time, of the server")
    parser.add_argument("--simulated", action="store_true")
    options = parser.parse_args()
    (simulated if options.simulated else measured)(options)


if __name__ == "__main__":
    main()

"""A long run with a lag under random faults, against one that is never disturbed.

    python scripts/soak_lag.py FOLDER [--phases 200 --seed 0]

A tiny model, a vLLM server, data.lag 1. At random moments the trainer is killed, or told to end; the server is killed,
or frozen for some seconds; reward processes are killed; the disk is full when a checkpoint is written. What has ended
is started again and resumed. At the end completions, curves, weights and optimizer must be those of the undisturbed
run, bit for bit: none lost, doubled or trained on twice. Also told: memory and open files of the undisturbed run.
"""

import argparse
import errno
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import yaml
from lightning.pytorch import Callback
from script_tools import ASPO, ROOT

sys.path.insert(0, str(ROOT))
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "scripts")])
os.environ.update(VLLM_API_KEY="only-on-this-machine", OMP_NUM_THREADS="1")

from aspo_lightning.run import checkpoints
from tests.support.configs import tiny_config
from tests.support.faulty_runs import check_same
from tests.support.models import save_model, save_tokenizer
from tests.support.processes import Group
from tests.support.servers import Server, ready

FAULTS = ("trainer", "signal", "server", "frozen server", "rewards", "disk")


class Struck(Callback):
    """Fills the disk while FLAG is there, and writes what this process takes after each epoch to LEVELS."""

    def __init__(self, flag: str, levels: str) -> None:
        self.flag, self.levels = Path(flag), Path(levels)

    def on_fit_start(self, trainer, pl_module) -> None:
        write = checkpoints.sync_to_disk

        def full(*args, **kwargs):
            if self.flag.exists():
                self.flag.unlink()
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return write(*args, **kwargs)

        checkpoints.sync_to_disk = full

    def on_train_epoch_end(self, trainer, pl_module) -> None:
        with self.levels.open("a") as file:
            file.write(json.dumps(taken(os.getpid())) + "\n")


def taken(pid: int) -> tuple[float, int]:
    """(MB, open files) of a process."""
    status = Path(f"/proc/{pid}/status").read_text()
    (kilobytes,) = (line.split()[1] for line in status.splitlines() if line.startswith("VmRSS"))
    return int(kilobytes) / 1e3, len(list(Path(f"/proc/{pid}/fd").iterdir()))


class Soak:
    """The runs of one config in a folder."""

    def __init__(self, folder: Path, phases: int) -> None:
        self.folder, self.phases, self.model = folder, phases, str(folder / "model")
        save_model(folder / "model")
        save_tokenizer(folder / "model")

    def run(self, name: str) -> Path:
        return self.folder / f"run_{name}" / "version_0"

    def start(self, name: str, server: Server) -> Group:
        engine = {"class_path": "VLLMServers", "init_args": {"urls": [server.url]}}
        config = tiny_config(self.model, self.folder, engine=engine, lag=1, curriculum={"class_path": "PassRate"})
        config["trainer"].update(max_epochs=self.phases, check_val_every_n_epoch=20)
        config["trainer"]["default_root_dir"] = str(self.folder / f"run_{name}")
        # So far that the weights of another epoch would sample other completions, and not so far that nothing is left.
        config["model"]["optimizer"]["init_args"]["lr"] = 3e-3
        struck = {"flag": str(self.folder / "full"), "levels": str(self.folder / f"{name}_levels.jsonl")}
        config["trainer"]["callbacks"] = [
            {"class_path": "tests.support.faults.Completions", "init_args": {"folder": str(self.folder / name)}},
            {"class_path": "soak_lag.Struck", "init_args": struck},
        ]
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(config))
        again = ["--ckpt_path", "last"] if list(self.run(name).glob("checkpoints/epoch*")) else []
        if not again and self.run(name).exists():
            self.run(name).rename(self.folder / f"{name}_given_up_{time.time_ns()}")
        return Group([ASPO, "fit", "--config", str(path), *again], self.folder / f"{name}.log")

    def undisturbed(self) -> None:
        with ready(Server(self.model)) as (server,), self.start("undisturbed", server) as trainer:
            first = taken(server.process.pid)
            assert trainer.wait(7200) == 0, trainer.text[-3000:]
            last = taken(server.process.pid)
        levels = [json.loads(line) for line in (self.folder / "undisturbed_levels.jsonl").read_text().splitlines()]
        fifth = len(levels) // 5
        for name, part in (("second fifth", levels[fifth : 2 * fifth]), ("last fifth", levels[-fifth:])):
            memory, files = (statistics.median(values) for values in zip(*part, strict=True))
            print(f"trainer, {name} of the phases: {memory:.0f} MB, {files:.0f} open files")
        print(f"server: {first[0]:.0f} MB and {first[1]} open files before, {last[0]:.0f} and {last[1]} after")

    def disturbed(self, seed: int) -> Counter[str]:
        """The faults that struck, by kind."""
        draw, struck, server, starts = random.Random(seed), Counter[str](), None, 0
        try:
            while True:
                starts += 1
                assert starts < self.phases + 10, "it doesn't get on"
                server = server or self.serve()
                with self.start("disturbed", server) as trainer:
                    code = None
                    while code is None:
                        try:
                            code = trainer.wait(draw.uniform(10, 40))
                        except subprocess.TimeoutExpired:
                            fault = draw.choice(FAULTS)
                            struck[fault] += 1
                            print(f"phase {len(list((self.folder / 'disturbed').glob('*')))}: {fault}", flush=True)
                            self.strike(fault, trainer, server)
                if code == 0:
                    return struck
                if not server.answers():
                    server.__exit__()
                    server = None
        finally:
            if server:
                server.__exit__()

    def serve(self) -> Server:
        server = Server(self.model)
        server.until(server.answers, 300)
        return server

    def strike(self, fault: str, trainer: Group, server: Server) -> None:
        if fault == "trainer":
            trainer.signal(signal.SIGKILL)
        elif fault == "signal":
            os.kill(trainer.process.pid, signal.SIGTERM)
        elif fault == "server":
            server.signal(signal.SIGKILL)
        elif fault == "frozen server":
            server.signal(signal.SIGSTOP)
            time.sleep(5)
            server.signal(signal.SIGCONT)
        elif fault == "rewards":
            for pid in reward_processes(trainer.process.pid):
                os.kill(pid, signal.SIGKILL)
        else:
            (self.folder / "full").touch()


def reward_processes(pid: int) -> list[int]:
    """The processes of the pool of a trainer."""
    children = Path(f"/proc/{pid}/task").glob("*/children")
    pids = [int(child) for path in children for child in path.read_text().split()]
    return [child for child in pids if b"inside_worker" in Path(f"/proc/{child}/cmdline").read_bytes()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--phases", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0, help="of the faults")
    options = parser.parse_args()
    options.folder.mkdir(parents=True)
    soak = Soak(options.folder.resolve(), options.phases)
    soak.undisturbed()
    struck = soak.disturbed(options.seed)
    print(f"{struck.total()} faults: {', '.join(f'{count} x {fault}' for fault, count in struck.items())}")
    names = ("undisturbed", "disturbed")
    check_same([soak.run(name) for name in names], [soak.folder / name for name in names], soak.phases)
    print(f"the same: completions of {soak.phases} phases, curves, weights and optimizer")


if __name__ == "__main__":
    main()

"""`aspo fit` as SLURM starts it: a process a task, which knows its place by SLURM's variables alone."""

import json
import os
import subprocess

import yaml

from tests.support.commands import ASPO, ROOT
from tests.support.configs import tiny_config
from tests.test_fsdp import free_port

LAUNCHERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "NODE_RANK", "MASTER_ADDR")


def test_two_machines_of_a_task_each_train_a_phase(tiny_model, tmp_path):
    config = tiny_config(tiny_model, tmp_path, no_spread="keep")
    config["trainer"].update(max_epochs=1, limit_val_batches=0, strategy="fsdp2", num_nodes=2, devices=1)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    environment = {key: value for key, value in os.environ.items() if key not in LAUNCHERS}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TORCH_COMPILE_DISABLE": "1"}
    environment |= {"SLURM_JOB_ID": "123456", "SLURM_JOB_NAME": "aspo", "SLURM_NODELIST": "127.0.0.1"}
    environment |= {"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "1", "SLURM_NNODES": "2", "SLURM_LOCALID": "0"}
    environment |= {"MASTER_PORT": str(free_port())}  # else it follows from the job's number
    tasks = [
        subprocess.Popen(
            [ASPO, "fit", "--config", str(tmp_path / "config.yaml")],
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env=environment | {"SLURM_PROCID": str(rank), "SLURM_NODEID": str(rank)},
        )
        for rank in range(2)
    ]
    for task in tasks:
        errors = task.communicate(timeout=240)[1]
        assert task.returncode == 0, errors[-5000:]
    run = tmp_path / "tiny" / "version_0"
    assert json.loads((run / "origin.json").read_text())["ranks"] == 2
    assert (run / "checkpoints" / "epoch_00000.ckpt").is_dir()

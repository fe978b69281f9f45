"""`aspo fit` as SLURM starts it: a process a task, which knows its place by SLURM's variables alone."""

import json

from tests.support.configs import tiny_config, write_config
from tests.support.processes import free_port
from tests.support.ranks import Ranks


def test_two_machines_of_a_task_each_train_a_phase(tiny_model, tmp_path):
    config = tiny_config(tiny_model, tmp_path, no_spread="keep")
    config["trainer"].update(max_epochs=1, limit_val_batches=0, strategy="fsdp2", num_nodes=2, devices=1)
    job = {"SLURM_JOB_ID": "123456", "SLURM_JOB_NAME": "aspo", "SLURM_NODELIST": "127.0.0.1"}
    job |= {"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "1", "SLURM_NNODES": "2", "SLURM_LOCALID": "0"}
    job |= {"MASTER_PORT": str(free_port())}  # else it follows from the job's number
    tasks = [{**job, "SLURM_PROCID": str(task), "SLURM_NODEID": str(task)} for task in range(2)]
    with Ranks(2, tmp_path) as ranks:
        ranks.run("job", ["fit", "--config", write_config(tmp_path / "config.yaml", config)], environments=tasks)
    run = tmp_path / "tiny" / "version_0"
    assert json.loads((run / "origin.json").read_text())["ranks"] == 2
    assert (run / "checkpoints" / "epoch_00000.ckpt").is_dir()

#!/usr/bin/env bash
# sbatch --nodes N scripts/slurm.sh --config CONFIG [...]: `aspo fit` on N machines of 8 GPUs, a task for each GPU.
#SBATCH --job-name=aspo
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --output=%x_%j.log
#SBATCH --signal=USR1@900 # a quarter of an hour before the end: time to finish an epoch and write its checkpoint
set -euo pipefail

# sbatch runs a copy of this file: the project is where it was called.
cd "$SLURM_SUBMIT_DIR"
# A task that fails ends the others, which would otherwise wait for it.
srun --kill-on-bad-exit=1 .venv/bin/aspo fit "$@" --trainer.num_nodes "$SLURM_JOB_NUM_NODES" --trainer.devices 8

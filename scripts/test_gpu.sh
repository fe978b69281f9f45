#!/usr/bin/env bash
# Tests what only a GPU can show, on one GPU, offline, in some ten minutes. Arguments go to pytest; without vLLM, what
# needs it is left out. It needs scripts/install.sh dev, or any Python with torch 2.11 or newer, transformers, pytest,
# hypothesis and peft for the kernels (tests/gpu/test_kernels.py) alone.
set -euo pipefail
cd "$(dirname "$0")/.."

python=.venv/bin/python
[ -x "$python" ] || python=python3
if command -v nvidia-smi > /dev/null; then nvidia-smi; else echo "There is no nvidia-smi: no NVIDIA driver is installed."; fi
"$python" -c 'import sys, torch; print("Python", sys.version.split()[0], "torch", torch.__version__, "CUDA", torch.version.cuda)'
exec "$python" -m pytest tests/gpu --ignore tests/gpu/eight -rs --durations=10 "$@"

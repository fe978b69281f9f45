#!/usr/bin/env bash
# Tests what only several GPUs of a machine can show; meant for eight, it also runs with two or four. After
# scripts/test_gpu.sh; some forty minutes. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."

python=.venv/bin/python
[ -x "$python" ] || python=python3
nvidia-smi topo -m || true
exec "$python" -m pytest tests/gpu/eight -rs --durations=20 "$@"

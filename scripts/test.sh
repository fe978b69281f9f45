#!/usr/bin/env bash
# Installs what is missing, then checks and tests everything. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."

bash scripts/install.sh data docs dev
if ! command -v bwrap > /dev/null && command -v apt-get > /dev/null && [ "$(id -u)" = 0 ]; then
  apt-get update -qq && apt-get install -qq --yes bubblewrap > /dev/null # the sandbox of code rewards
fi
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
.venv/bin/lint-imports
NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --strict --quiet
# Two files at a time, the slow ones first (conftest.py), each with one thread: the models are too small for two.
OMP_NUM_THREADS=1 exec .venv/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"

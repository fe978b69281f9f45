#!/usr/bin/env bash
# Installs what is missing, then checks and tests everything. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."

bash scripts/install.sh data docs dev
missing=()
command -v bwrap > /dev/null || missing+=(bubblewrap) # the sandbox of code rewards
command -v chromium > /dev/null || missing+=(chromium) # opens the page of aspo view
command -v chromedriver > /dev/null || missing+=(chromium-driver)
if [ ${#missing[@]} -gt 0 ] && command -v apt-get > /dev/null && [ "$(id -u)" = 0 ]; then
  apt-get update -qq && apt-get install -qq --yes --no-install-recommends "${missing[@]}" > /dev/null
fi
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
.venv/bin/lint-imports
NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --strict --quiet
# Two files at a time, the slow ones first (conftest.py), each with one thread: the models are too small for two.
OMP_NUM_THREADS=1 exec .venv/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"

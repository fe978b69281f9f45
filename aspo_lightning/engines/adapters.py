"""Adapters as files, in peft's format: vLLM takes them from a folder alone."""

import json
import tempfile
from pathlib import Path

from safetensors.torch import save_file
from vllm.lora.request import LoRARequest

from aspo_lightning.engines.base import Adapters


class AdapterFolder:
    """A folder with adapters, and the request for them.

    Args:
        adapters: to write.
        after: those before; vLLM tells adapters apart by a number.
    """

    def __init__(self, adapters: Adapters, after: "AdapterFolder | None" = None) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="aspo_adapters_")
        tensors = {name: tensor.cpu().contiguous() for name, tensor in adapters.tensors}
        modules = sorted({name.partition(".lora_")[0].rpartition(".")[2] for name in tensors})
        config = {"peft_type": "LORA", "r": adapters.rank, "lora_alpha": adapters.alpha, "target_modules": modules}
        folder = Path(self._folder.name)
        (folder / "adapter_config.json").write_text(json.dumps(config))
        save_file(tensors, folder / "adapter_model.safetensors")
        number = after.request.lora_int_id + 1 if after else 1
        self.request: LoRARequest = LoRARequest(f"adapters_{number}", number, self._folder.name)

    def remove(self) -> None:
        self._folder.cleanup()

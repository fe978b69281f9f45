"""A callback that writes down the most memory of the last epoch's updates. Used through `aspo fit`."""

from pathlib import Path

import torch
from lightning.pytorch import Callback

from aspo_lightning.run.memory import peak_memory


class PeakRecorder(Callback):
    """Writes bytes to FOLDER/rank_R: of the GPU in the last epoch's updates, or of the process so far on a CPU."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def on_train_epoch_start(self, trainer, pl_module):
        if pl_module.device.type == "cuda":
            torch.cuda.empty_cache()
            free, total = torch.cuda.mem_get_info()
            # Libraries, less what torch counts as allocated while a sleeping engine has given it back.
            self.beside = total - free - torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()

    def on_train_epoch_end(self, trainer, pl_module):
        peak = self.beside + torch.cuda.max_memory_allocated() if pl_module.device.type == "cuda" else peak_memory()
        self.folder.mkdir(exist_ok=True)
        (self.folder / f"rank_{trainer.global_rank}").write_text(str(peak))


def callback(folder: Path) -> dict:
    return {"class_path": "tests.support.peak_recorder.PeakRecorder", "init_args": {"folder": str(folder)}}


def peaks(folder: Path) -> list[float]:
    """GB by rank."""
    return [int(file.read_text()) / 1e9 for file in sorted(folder.iterdir())]

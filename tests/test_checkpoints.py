import os

import pytest
import torch

from aspo_lightning.checkpoints import AtomicCheckpointIO, last_checkpoint
from aspo_lightning.errors import ConfigError


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "a.ckpt"
    io = AtomicCheckpointIO()
    io.save_checkpoint({"epoch": 1, "weights": torch.arange(3)}, path)
    with pytest.raises((AttributeError, TypeError)):
        io.save_checkpoint({"epoch": 2, "unpicklable": lambda: None}, path)
    assert [p.name for p in tmp_path.iterdir()] == ["a.ckpt"]
    loaded = torch.load(path)
    assert loaded["epoch"] == 1
    assert torch.equal(loaded["weights"], torch.arange(3))


def test_last_is_the_newest_checkpoint_of_the_newest_run_that_has_one(tmp_path):
    for run, name, at in [(2, "epoch_1.ckpt", 50), (10, "epoch_3.ckpt", 30), (10, "epoch_4.ckpt", 40)]:
        path = tmp_path / f"version_{run}" / "checkpoints" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        os.utime(path, (at, at))
    (tmp_path / "version_10" / "checkpoints" / "last.ckpt").symlink_to("epoch_3.ckpt")
    (tmp_path / "version_11").mkdir()
    assert last_checkpoint(tmp_path) == tmp_path / "version_10" / "checkpoints" / "epoch_4.ckpt"


def test_without_a_checkpoint_last_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="no run below"):
        last_checkpoint(tmp_path)

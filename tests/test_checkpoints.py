"""Checkpoints on a real disk: whole or not at all, damaged ones named, the newest whole one found."""

import errno
import os
import random
import resource
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from aspo_lightning.cli.main import error_for_people
from aspo_lightning.errors import ConfigError, RunError
from aspo_lightning.run.checkpoints import AtomicCheckpointIO, check_whole
from aspo_lightning.run.disk import digest_path, file_digest, lock, write_bytes
from aspo_lightning.run.folder import RunFolder, last_run, new_run

IO = AtomicCheckpointIO()


def save(path: Path, epoch: int, size: int = 1000) -> Path:
    model = {"model_name_or_path": "a model", "lora_rank": 0, "lora_alpha": 1.0, "dtype": torch.float32}
    content = {"epoch": epoch, "global_step": epoch, "model": model, "weights": torch.arange(size)}
    IO.save_checkpoint(content, path)
    os.utime(path, (epoch, epoch))
    return path


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path):
    path = save(tmp_path / "a.ckpt", 1)
    with pytest.raises((AttributeError, TypeError)):
        IO.save_checkpoint({"epoch": 2, "unpicklable": lambda: None}, path)
    assert {p.name for p in tmp_path.iterdir()} == {"a.ckpt", ".a.ckpt.xxh3"}
    loaded = IO.load_checkpoint(path, weights_only=True)
    assert loaded["epoch"] == 1
    assert torch.equal(loaded["weights"], torch.arange(1000))


def test_one_that_reaches_the_disk_in_pieces_is_whole(tmp_path):
    content = {"longer": torch.arange(5_000_000), "than": torch.arange(7), "pieces": torch.arange(9_000_000)}
    path = tmp_path / "a.ckpt"
    IO.save_checkpoint(content, path)
    assert digest_path(path).read_text() == file_digest(path)
    for loaded in (IO.load_checkpoint(path), torch.load(path, mmap=True)):
        assert loaded.keys() == content.keys()
        assert all(torch.equal(loaded[name], content[name]) for name in content)


def test_it_has_reached_the_disk_piece_by_piece_before_it_has_its_name(tmp_path, monkeypatch):
    path = tmp_path / "a.ckpt"
    done = []

    def seen(what, call):
        def noted(file, *args):
            call(file, *args)
            if not path.exists():  # later come its digest, and the folder
                done.append((what, os.fstat(file).st_size))

        return noted

    monkeypatch.setattr(os, "fsync", seen("synced", os.fsync))
    monkeypatch.setattr(os, "posix_fadvise", seen("let go", os.posix_fadvise))
    IO.save_checkpoint({"weights": torch.arange(9_000_000)}, path)
    pieces = [size for what, size in done if what == "synced"]
    assert pieces == sorted(pieces)
    assert len(pieces) == 3  # of 72 MB
    assert pieces[-1] == path.stat().st_size
    assert done == [(what, size) for size in pieces for what in ("synced", "let go")]


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 1 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True).returncode:
        pytest.skip("mounting a small disk takes root")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_leaves_the_checkpoint_before(small_disk):
    path = save(small_disk / "epoch_1.ckpt", 1)
    before = path.read_bytes()
    with pytest.raises(
        RunError, match=r"epoch_2.ckpt couldn't be written: the disk is full. Those before it are as they were"
    ) as e:
        save(small_disk / "epoch_2.ckpt", 2, size=1_000_000)
    assert "\n" not in str(e.value)
    assert path.read_bytes() == before
    assert {p.name for p in small_disk.iterdir()} == {"epoch_1.ckpt", ".epoch_1.ckpt.xxh3"}


def test_the_system_says_why_a_checkpoint_is_not_written(tmp_path):
    """And not torch, which can't end the file then. Past the limit a write fails, as it does past a quota."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    try:
        with pytest.raises(RunError, match=r"a.ckpt couldn't be written: File too large. Those before"):
            save(tmp_path / "a.ckpt", 1, size=1_000_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []


def test_where_nothing_can_be_locked_a_run_is_not_taken_for_another_one(tmp_path, monkeypatch):
    def flock(file, how):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    held = lock(tmp_path)
    with pytest.raises(RunError, match=f"Another run is writing to {tmp_path}"):
        lock(tmp_path)
    held.close()
    monkeypatch.setattr("fcntl.flock", flock)
    with pytest.warns(UserWarning, match=r"can't be locked \(Function not implemented\): nothing keeps a second run"):
        lock(tmp_path).close()


def test_no_room_for_what_else_a_run_keeps_is_told_in_one_line(small_disk):
    with pytest.raises(OSError, match="No space left") as error:
        write_bytes(small_disk / "epoch_00001.jsonl.gz", bytes(2_000_000))
    assert list(small_disk.iterdir()) == []
    said = str(error_for_people(error.value))
    assert said.startswith("What the run keeps could not be written: No space left on device. Resume from the last")
    assert error_for_people(FileNotFoundError(errno.ENOENT, "no such file")) is None


def test_removing_a_checkpoint_removes_its_digest(tmp_path):
    IO.remove_checkpoint(save(tmp_path / "a.ckpt", 1))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("seed", range(10))
def test_a_checkpoint_cut_off_anywhere_is_damaged(tmp_path, seed):
    path = save(tmp_path / "a.ckpt", 1)
    os.truncate(path, random.Random(seed).randrange(path.stat().st_size))
    for _ in range(2):
        with pytest.raises(RunError, match="a.ckpt is damaged: .* that is the newest whole one"):
            IO.load_checkpoint(path)
        digest_path(path).unlink(missing_ok=True)  # a copy without it, or one killed before it was written


@pytest.mark.parametrize("seed", range(10))
def test_one_flipped_bit_is_damage(tmp_path, seed):
    path = save(tmp_path / "a.ckpt", 1)
    check_whole(path)
    content = bytearray(path.read_bytes())
    content[random.Random(seed).randrange(len(content))] ^= 1 << seed % 8
    path.write_bytes(content)
    with pytest.raises(RunError, match="damaged: it has changed since it was written"):
        IO.load_checkpoint(path)


def test_last_falls_back_to_the_newest_whole_one_and_says_so(tmp_path, capsys):
    folder = tmp_path / "version_0" / "checkpoints"
    folder.mkdir(parents=True)
    paths = [save(folder / f"epoch_{i}.ckpt", i) for i in range(4)]
    os.truncate(paths[3], 100)
    os.utime(paths[3], (3, 3))
    assert RunFolder(tmp_path / "version_0").newest_checkpoint() == paths[2]
    assert f"{paths[3]} is damaged: it has changed since it was written. Taking the one before it." in (
        capsys.readouterr().out
    )
    for path in paths:
        os.truncate(path, 50)
    with pytest.raises(RunError, match="All checkpoints of .* are damaged"):
        last_run(tmp_path).newest_checkpoint()


def test_a_clock_that_jumps_back_does_not_matter(tmp_path):
    folder = tmp_path / "version_0" / "checkpoints"
    folder.mkdir(parents=True)
    save(folder / "epoch_00009.ckpt", 500)
    later = save(folder / "epoch_00010.ckpt", 1000)
    os.utime(later, (100, 100))
    assert RunFolder(tmp_path / "version_0").newest_checkpoint() == later


def test_any_flipped_bit_of_the_newest_is_passed_over(tmp_path):
    folder = tmp_path / "version_0" / "checkpoints"
    folder.mkdir(parents=True)
    before, newest = save(folder / "a.ckpt", 1, size=4), save(folder / "b.ckpt", 2, size=4)
    content, draw = newest.read_bytes(), random.Random(0)
    for _ in range(300):
        damaged = bytearray(content)
        damaged[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        newest.write_bytes(damaged)
        assert RunFolder(tmp_path / "version_0").newest_checkpoint() == before


def test_names_do_not_matter(tmp_path):
    folder = tmp_path / "version_0" / "checkpoints"
    folder.mkdir(parents=True)
    save(folder / "epoch_00009-acc_0.812.ckpt", 9)
    later = save(folder / "epoch_00010-acc_0.799.ckpt", 10)
    assert RunFolder(tmp_path / "version_0").newest_checkpoint() == later


def test_last_is_the_newest_checkpoint_of_the_newest_run_that_has_one(tmp_path):
    for run, name, at in [(2, "epoch_1.ckpt", 50), (10, "epoch_3.ckpt", 30), (10, "epoch_4.ckpt", 40)]:
        path = tmp_path / f"version_{run}" / "checkpoints" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        save(path, at)
    (tmp_path / "version_10" / "checkpoints" / "last.ckpt").symlink_to("epoch_3.ckpt")
    (tmp_path / "version_11").mkdir()
    for copy in ("version_10_backup2", "version_20_old", "version_"):  # of a user's, and no runs
        shutil.copytree(tmp_path / "version_2", tmp_path / copy)
    assert new_run(tmp_path).path.name == "version_12"
    assert last_run(tmp_path).newest_checkpoint() == tmp_path / "version_10" / "checkpoints" / "epoch_4.ckpt"


def test_without_a_checkpoint_last_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="no run below"):
        last_run(tmp_path).newest_checkpoint()

"""Real runs that are killed, stopped, starved and broken: what each leaves, and that going on is as if it never was."""

import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from aspo_lightning.run.disk import lock
from tests.support.faulty_runs import EPOCHS, FaultyRuns
from tests.support.processes import eventually
from tests.support.ranks import Ranks


def undisturbed(model: str, folder: Path, ranks: int) -> Iterator[FaultyRuns]:
    with Ranks(ranks, folder) as started:
        runs = FaultyRuns(started, model)
        assert runs.fit("undisturbed") == 0, runs.text("undisturbed")[-3000:]
        yield runs


@pytest.fixture(scope="module")
def rank(tiny_model, tmp_path_factory):
    yield from undisturbed(tiny_model, tmp_path_factory.mktemp("one_rank"), 1)


@pytest.fixture(scope="module")
def two_ranks(tiny_model, tmp_path_factory):
    yield from undisturbed(tiny_model, tmp_path_factory.mktemp("two_ranks"), 2)


@pytest.mark.parametrize("kind", ["rank", "two_ranks"])
@pytest.mark.parametrize("seed", range(int(os.environ.get("ASPO_KILLS", "1"))))
def test_killed_at_a_random_moment_it_goes_on_as_if_it_never_was(request, kind, seed):
    """More of them: ASPO_KILLS=20."""
    ranks: FaultyRuns = request.getfixturevalue(kind)
    name, draw = f"killed_{seed}", random.Random(seed)
    after, pids = draw.randrange(EPOCHS - 1), ranks.start(name)
    marks = [(ranks.folder / "undisturbed" / f"epoch_{i}.json").stat().st_mtime for i in (0, EPOCHS - 1)]
    reached = ranks.folder / name / f"epoch_{after}.json"  # its phase is sampled, rewarded and scored
    assert eventually(reached.exists, 400, every=0.001)
    time.sleep(draw.uniform(0, (marks[1] - marks[0]) / (EPOCHS - 1)))  # until about the next is
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    assert ranks.wait() == [-signal.SIGKILL] * len(pids)
    again = ["--ckpt_path", "last"] if list(ranks.run(name).glob("checkpoints/epoch*")) else []
    if not again and ranks.run(name).exists():  # before the first checkpoint: it starts anew
        ranks.run(name).rename(ranks.folder / f"{name}_given_up")
    assert ranks.fit(name, *again) == 0, ranks.text(name)[-3000:]
    ranks.check_whole(name)


PARTS = ["generate", "reward", "score", "update", "checkpoint"]


def test_a_signal_in_each_part_ends_a_run_behind_its_epoch(rank):
    """One run that is stopped in one part after the other, an epoch each, and goes on."""
    go_on: list[str] = []
    for epoch, part in enumerate(PARTS):
        kind = ("SIGTERM", "SIGUSR1", "SIGINT")[epoch % 3]
        assert rank.fit("term", *go_on, part=part, kind=kind, epoch=epoch) == 128 + signal.Signals[kind]
        assert f"{kind}: stopping when this epoch has ended" in rank.text("term")
        # The epoch it came in was finished; while its checkpoint is written, the next one.
        assert len(list((rank.folder / "term").iterdir())) == epoch + 1 + (part == "checkpoint")
        (rank.folder / "term.struck").unlink()
        go_on = ["--ckpt_path", "last"]
    rank.check_whole("term")


def test_killed_in_each_part_it_goes_on_as_if_it_never_was(rank):
    go_on: list[str] = []
    # At last when its last checkpoint is written, and only the end of the run is left.
    for epoch, part in [*enumerate(["saved", *PARTS]), (EPOCHS - 1, "saved")]:
        assert rank.fit("kill", *go_on, part=part, kind="SIGKILL", epoch=epoch) == -signal.SIGKILL
        (rank.folder / "kill.struck").unlink()
        go_on = ["--ckpt_path", "last"]
    assert rank.fit("kill", *go_on) == 0, rank.text("kill")[-3000:]
    rank.check_whole("kill")


def test_with_a_checkpoint_every_few_epochs_a_run_still_ends_with_one_and_goes_on(rank):
    every = ["--checkpoint.every_n_epochs", "4"]

    def kept() -> list[str]:
        (rank.folder / "few.struck").unlink(missing_ok=True)
        return sorted(path.name for path in rank.run("few").glob("checkpoints/epoch_*"))

    assert rank.fit("few", *every, part="update", kind="SIGTERM", epoch=1) == 128 + signal.SIGTERM
    assert kept() == ["epoch_00001.ckpt"]
    assert rank.fit("few", *every, "--ckpt_path", "last", part="update", kind="SIGKILL", epoch=5) == -signal.SIGKILL
    assert kept() == ["epoch_00001.ckpt", "epoch_00003.ckpt"]
    assert rank.fit("few", *every, "--ckpt_path", "last") == 0, rank.text("few")[-3000:]
    assert kept() == ["epoch_00003.ckpt", "epoch_00005.ckpt"]
    rank.check_whole("few")


def test_a_second_ctrl_c_ends_it_at_once(rank):
    assert rank.fit("interrupt", part="update", kind="SIGINT", times=2) != 0
    assert len(list((rank.folder / "interrupt").iterdir())) == 2
    assert not list(rank.run("interrupt").glob("checkpoints/epoch_00001*"))
    assert rank.fit("interrupt", "--ckpt_path", "last") == 0, rank.text("interrupt")[-3000:]
    rank.check_whole("interrupt")


@pytest.mark.parametrize("kind", ["raise", "hang"])
def test_an_engine_that_breaks_or_hangs_is_started_again(rank, kind):
    timeout = ["--data.engine.init_args.timeout_s", "5"]
    assert rank.fit(kind, *timeout, part="engine", kind=kind) == 0, rank.text(kind)[-3000:]
    assert ("vLLM hangs: no step in 5 s" if kind == "hang" else "the engine broke") in rank.text(kind)
    assert ("most recent call first" in rank.text(kind)) == (kind == "hang")  # where it hangs
    assert "Starting again" in rank.text(kind)
    rank.check_whole(kind)


def test_an_engine_that_breaks_twice_ends_the_run(rank):
    assert rank.fit("twice", part="engine", kind="raise", times=2) == 1
    assert "; and before: The engine broke (RuntimeError: the engine broke)" in rank.text("twice")
    assert list(rank.run("twice").glob("checkpoints/epoch_00000*"))  # to go on from


@pytest.mark.parametrize("kind", ["raise", "hang"])
def test_on_two_ranks_an_engine_that_breaks_or_hangs_ends_the_run(two_ranks, kind):
    timeout = ["--data.engine.init_args.timeout_s", "5"]
    two_ranks.start(kind, *timeout, part="engine", kind=kind)
    assert 0 not in two_ranks.wait()
    assert ("vLLM hangs: no step in 5 s" if kind == "hang" else "the engine broke") in two_ranks.text(kind)
    assert two_ranks.fit(kind, *timeout, "--ckpt_path", "last") == 0, two_ranks.text(kind)[-3000:]
    two_ranks.check_whole(kind)


@pytest.mark.parametrize("kind", ["rank", "two_ranks"])
def test_weights_that_are_not_finite_end_the_run_before_a_checkpoint_has_them(request, kind):
    ranks: FaultyRuns = request.getfixturevalue(kind)
    ranks.start("nan", part="update", kind="nan")
    assert 0 not in ranks.wait()
    assert "The policy's weights aren't finite, found in step " in ranks.text("nan")
    assert ranks.fit("nan", "--ckpt_path", "last") == 0, ranks.text("nan")[-3000:]
    ranks.check_whole("nan")


@pytest.mark.parametrize(("kind", "part"), [("pool", "reward"), ("clock", "generate")])
def test_killed_reward_processes_and_a_clock_that_jumps_change_nothing(rank, kind, part):
    assert rank.fit(kind, part=part, kind=kind) == 0, rank.text(kind)[-3000:]
    rank.check_whole(kind)


def test_a_damaged_newest_checkpoint_is_passed_over(rank):
    assert rank.fit("damaged", "--trainer.max_epochs", "3") == 0
    newest = rank.run("damaged") / "checkpoints" / "epoch_00002.ckpt"
    os.truncate(newest, newest.stat().st_size // 2)
    assert rank.fit("damaged", "--ckpt_path", str(newest)) == 1
    assert "epoch_00002.ckpt is damaged: it has changed since it was written" in rank.text("damaged")
    assert rank.fit("damaged", "--ckpt_path", "last") == 0, rank.text("damaged")[-3000:]
    assert "epoch_00002.ckpt is damaged" in rank.text("damaged")
    assert "epoch_00001.ckpt" in rank.text("damaged")
    rank.check_whole("damaged")


def test_other_mathematics_is_told_and_takes_a_flag(rank):
    assert rank.fit("changed", "--trainer.max_epochs", "2") == 0
    kept = {p: p.read_bytes() for p in rank.run("changed").iterdir() if p.is_file()}
    learning_rate = ["--model.optimizer.init_args.lr", "0.002"]
    assert rank.fit("changed", "--ckpt_path", "last", *learning_rate) == 1
    assert "model.optimizer.init_args.lr was 0.001 and is 0.002" in rank.text("changed")
    assert rank.fit("changed", "--ckpt_path", "last", *learning_rate, "--allow_changes", "true") == 0
    # What is no mathematics may change: nobody asks.
    assert rank.fit("changed", "--ckpt_path", "last", *learning_rate, "--data.reward_workers", "1") == 0
    assert all(p.read_bytes() == content for p, content in kept.items())  # nothing was overwritten
    newest = rank.run("changed") / "config_resumed_2.yaml"
    newest.write_text("model: {")
    assert rank.fit("changed", "--ckpt_path", "last") == 1
    assert "config_resumed_2.yaml is damaged" in rank.text("changed")
    origin = json.loads((rank.run("changed") / "origin.json").read_text())
    assert origin["versions"]["torch"] == torch.__version__
    assert origin["ranks"] == 1
    assert (rank.run("changed") / "config_resumed_1.yaml").is_file()


def test_two_runs_in_one_folder_are_refused(rank):
    assert rank.fit("both", "--trainer.max_epochs", "1") == 0
    with lock(rank.run("both")):
        assert rank.fit("both", "--ckpt_path", str(rank.run("both"))) == 1
    assert "Another run is writing to" in rank.text("both")
    assert [p.name for p in rank.run("both").glob("config*")] == ["config.yaml"]


def test_a_folder_that_cannot_be_written_is_told_at_once(rank, tmp_path):
    subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(tmp_path)], check=True)
    try:
        assert rank.fit("readonly", "--trainer.default_root_dir", str(tmp_path)) == 1
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)
    assert "can't be written to (Read-only file system). Choose another with" in rank.text("readonly")

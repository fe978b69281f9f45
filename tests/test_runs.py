"""A run's folder: kept whatever logs the run, resumed by the very command that the run printed."""

import csv
import json
import re
import shlex
import signal
import struct
from pathlib import Path

import pytest
import torch

from aspo_lightning.cli.fit import RUN
from aspo_lightning.run.curves import read_run
from aspo_lightning.run.rollout_files import rollout_files
from aspo_lightning.run.tags import CLOCKED
from tests.support.faulty_runs import FaultyRuns, state
from tests.support.ranks import Ranks

EPOCHS = 4


@pytest.fixture(scope="module")
def runs(tiny_model, tmp_path_factory):
    engine = {"class_path": "TransformersEngine"}  # what samples doesn't matter here
    with Ranks(1, tmp_path_factory.mktemp("runs")) as ranks:
        runs = FaultyRuns(ranks, tiny_model, engine=engine)
        runs.config["trainer"].update(max_epochs=EPOCHS, check_val_every_n_epoch=1)
        assert runs.fit("undisturbed") == 0, runs.text("undisturbed")[-3000:]
        yield runs


def logger(kind: str, **settings) -> dict:
    return {"class_path": f"lightning.pytorch.loggers.{kind}", "init_args": {"save_dir": RUN, **settings}}


LOGGERS = {
    "tensorboard": logger("TensorBoardLogger"),
    "csv": logger("CSVLogger"),
    "wandb": logger("WandbLogger", offline=True),
    "two": [logger("CSVLogger"), logger("TensorBoardLogger")],
    "none": False,
}


def csv_curves(run: Path) -> dict[str, list[tuple[int, float]]]:
    """Of the files of a run's starts: the later ones count."""
    found: dict[str, dict[int, float]] = {}
    for file in sorted(run.glob("csv*/metrics.csv"), key=lambda f: (len(f.parent.name), f.parent.name)):
        for row in csv.DictReader(file.read_text().splitlines()):
            for tag, value in row.items():
                if value and tag != "step":
                    found.setdefault(tag, {})[int(row["step"])] = single(float(value))
    return {tag: sorted(points.items()) for tag, points in found.items()}


def single(value: float) -> float:
    """As TensorBoard keeps it."""
    return struct.unpack("f", struct.pack("f", value))[0]


def resume_command(log: str) -> list[str]:
    (line,) = re.findall(r"resume it with\n(.*)\n", log)
    program, *arguments = shlex.split(line)
    assert program == "aspo"
    return arguments


@pytest.mark.parametrize("kind", LOGGERS)
def test_killed_after_its_second_epoch_it_is_resumed_by_the_command_it_printed(runs, kind, monkeypatch):
    monkeypatch.setitem(runs.config["trainer"], "logger", LOGGERS[kind])
    assert runs.fit(kind, part="generate", kind="SIGKILL", epoch=2) == -signal.SIGKILL
    run = runs.run(kind)
    assert run.is_dir()
    assert runs.again(kind, resume_command(runs.text(kind))) == 0, runs.text(kind)[-3000:]
    assert [path.name for path in run.parent.iterdir()] == ["version_0"]
    folders = {name: {p.name: p.read_text() for p in (runs.folder / name).iterdir()} for name in ("undisturbed", kind)}
    assert folders["undisturbed"] == folders[kind]  # all completions
    assert len(folders[kind]) == EPOCHS
    ours, theirs = (state(runs.run(n) / "checkpoints" / "last.ckpt") for n in (kind, "undisturbed"))
    assert ours.keys() == theirs.keys()
    for key in ours:
        assert torch.equal(ours[key], theirs[key]) if torch.is_tensor(ours[key]) else ours[key] == theirs[key], key
    kept = [
        {epoch: path.read_bytes() for epoch, path in rollout_files(runs.run(n)).items()} for n in ("undisturbed", kind)
    ]
    assert list(kept[0]) == list(range(EPOCHS))
    assert kept[0] == kept[1]
    saved = [
        [p.name for f in ("checkpoints", "best") for p in (runs.run(n) / f).glob("*.ckpt")]
        for n in ("undisturbed", kind)
    ]
    assert len(saved[0]) == 4  # the newest two, last, and the best
    assert set(saved[0]) <= set(saved[1])  # Lightning keeps the one that a run was resumed from
    assert {p.name for p in run.glob("*.yaml")} >= {"config.yaml", "config_resumed_1.yaml"}
    assert len(list((run / "eval").iterdir())) == EPOCHS + 1
    curves = read_run(runs.run("undisturbed"))
    curves = {
        tag: points for tag, points in curves.items() if tag != "epoch" and not tag.startswith((*CLOCKED, "final/"))
    }
    readers = [read_run] * (kind in ("tensorboard", "two")) + [csv_curves] * (kind in ("csv", "two"))
    for found in (read(run) for read in readers):
        assert {tag: points for tag, points in found.items() if tag in curves} == curves
    if kind == "wandb":
        assert len(list(run.glob("wandb/offline-run-*/*.wandb"))) == 2


def test_a_run_without_a_checkpoint_is_resumed_from_its_beginning(runs):
    assert runs.fit("early", part="generate", kind="SIGKILL", epoch=0) == -signal.SIGKILL
    assert runs.again("early", resume_command(runs.text("early"))) == 0, runs.text("early")[-3000:]
    assert "Resuming from its beginning: the run has no checkpoint yet" in runs.text("early")
    assert [path.name for path in runs.run("early").parent.iterdir()] == ["version_0"]
    assert read_run(runs.run("early"))["policy/loss"] == read_run(runs.run("undisturbed"))["policy/loss"]


def test_a_checkpoint_by_its_path_starts_a_run_of_its_own(runs):
    first = str(runs.run("undisturbed") / "checkpoints" / "epoch_00002.ckpt")
    assert runs.fit("own", "--ckpt_path", first) == 0, runs.text("own")[-3000:]
    assert [p.name for p in (runs.run("own") / "checkpoints").glob("epoch*")] == ["epoch_00003.ckpt"]
    assert [p.name for p in (runs.folder / "own").iterdir()] == ["epoch_3.json"]


@pytest.mark.parametrize("given", ["a checkpoint of another run", "nothing"])
def test_a_run_that_starts_itself_again_takes_its_own_checkpoint_or_the_one_it_was_given(runs, given):
    first = str(runs.run("undisturbed") / "checkpoints" / "epoch_00002.ckpt")
    arguments = ["--ckpt_path", first] if given != "nothing" else []
    name = f"again_{len(arguments)}"
    epoch = 3 if arguments else 1
    assert runs.fit(name, *arguments, part="broken", kind="raise", epoch=epoch) == 0, runs.text(name)[-3000:]
    assert "Starting again" in runs.text(name)
    assert f"epoch_{epoch}.json" in {p.name for p in (runs.folder / name).iterdir()}
    first_epoch = 3 if arguments else 0  # nothing was begun anew that a checkpoint had
    assert {p.name for p in (runs.folder / name).iterdir()} == {f"epoch_{e}.json" for e in range(first_epoch, EPOCHS)}
    last = state(next(runs.run(name).parent.glob("version_*/checkpoints/epoch_00003.ckpt")))
    theirs = state(runs.run("undisturbed") / "checkpoints" / "epoch_00003.ckpt")
    assert all(torch.equal(last[k], theirs[k]) for k in last if torch.is_tensor(last[k]))


CHANGES = {
    "what is held out": (["--data.val", "null"], "data.val"),
    "the engine": (["--data.engine", "VLLMEngine"], "data.engine.class_path was"),
    "the time of a reward": (["--data.reward_timeout_s", "9"], "data.reward_timeout_s was 5.0 and is 9.0"),
    "what is evaluated": (["--trainer.limit_val_batches", "0"], "trainer.limit_val_batches was None and is 0"),
    "a learning rate": (["--model.optimizer.init_args.lr", "0.1"], "model.optimizer.init_args.lr was 0.001 and is 0.1"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_would_compute_something_else_is_told(runs, name):
    arguments, message = CHANGES[name]
    assert runs.fit("undisturbed", "--ckpt_path", "last", *arguments) == 1
    assert "would be resumed with other settings" in runs.text("undisturbed")
    assert message in runs.text("undisturbed")


def test_what_changes_no_number_may_change(runs):
    incidental = ["--data.engine.batch_size", "7", "--data.token_budget", "300", "--data.reward_workers", "1"]
    incidental += ["--data.eval_temperature", "0.3", "--data.probe_factor", "null", "--model.chunk_size", "64"]
    assert runs.fit("undisturbed", "--ckpt_path", "last", *incidental) == 0, runs.text("undisturbed")[-3000:]


def test_a_stranger_s_checkpoint_runs_no_code(runs, tmp_path):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "was_here",))

    path = tmp_path / "evil.ckpt"
    content = torch.load(runs.run("undisturbed") / "checkpoints" / "last.ckpt", weights_only=True)
    torch.save({**content, "extra": Evil()}, path)
    assert runs.fit("evil", "--ckpt_path", str(path)) == 1
    line = runs.text("evil").strip().splitlines()[-1]
    assert "evil.ckpt holds pathlib.Path.touch" in line or "evil.ckpt holds" in line
    assert not (tmp_path / "was_here").exists()
    torch.save([1, 2], path)
    assert runs.fit("evil", "--ckpt_path", str(path)) == 1
    assert "evil.ckpt isn't a checkpoint: it holds a list" in runs.text("evil")
    path.write_text(json.dumps({"epoch": 3}))
    assert runs.fit("evil", "--ckpt_path", str(path)) == 1
    assert "evil.ckpt is damaged" in runs.text("evil")


def test_a_user_s_plugins_are_kept_and_what_is_switched_off_stays_off(runs):
    off = ["--trainer.enable_progress_bar", "false", "--trainer.enable_checkpointing", "false"]
    plugin = ["--trainer.plugins", "tests.support.faults.OwnPrecision"]
    assert runs.fit("plain", *plugin, *off, "--trainer.max_epochs", "1") == 0, runs.text("plain")[-3000:]
    assert "the user's own plugin" in runs.text("plain")
    assert not list(runs.run("plain").glob("**/*.ckpt"))
    assert "to resume" not in runs.text("plain")


def test_what_no_run_can_be_resumed_from_is_told_in_one_line(runs, tmp_path):
    best = next((runs.run("undisturbed") / "best").glob("*.ckpt"))
    assert runs.fit("best", "--ckpt_path", str(best)) == 1
    assert "holds weights alone, and no optimizer state" in runs.text("best").splitlines()[-1]
    torch.save({"state_dict": {}, "global_step": 3}, tmp_path / "other.ckpt")
    assert runs.fit("best", "--ckpt_path", str(tmp_path / "other.ckpt")) == 1
    assert "other.ckpt isn't a checkpoint of `aspo fit`" in runs.text("best").splitlines()[-1]
    plugin = ["--trainer.plugins", "lightning.pytorch.plugins.io.AsyncCheckpointIO"]
    assert runs.fit("best", *plugin) == 1
    assert "trainer.plugins has AsyncCheckpointIO" in runs.text("best").splitlines()[-1]


def test_a_dry_run_leaves_nothing_and_a_default_logger_logs_into_the_run(runs, monkeypatch):
    assert runs.fit("dry", "--trainer.fast_dev_run", "true") == 0, runs.text("dry")[-3000:]
    assert not runs.run("dry").parent.exists()
    monkeypatch.setitem(runs.config["trainer"], "logger", True)
    bar = ["--trainer.callbacks+=RichProgressBar", "--trainer.max_epochs", "1"]
    assert runs.fit("default", *bar) == 0, runs.text("default")[-3000:]
    assert "policy/loss" in read_run(runs.run("default"))

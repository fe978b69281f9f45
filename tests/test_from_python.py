"""Training from Python: the README's program and the notebook, run as printed, on a tiny model."""

import json
import os
import re
import subprocess
import sys

import nbformat
import pytest
from nbclient import NotebookClient

from aspo_lightning.run.curves import read_run
from aspo_lightning.run.rollout_files import read_rollouts, rollout_files
from tests.support.commands import ROOT
from tests.support.models import save_model, save_tokenizer

MODEL = "SmolLM2-135M-Instruct"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """With a tiny model where the quickstart's would be; it reads characters."""
    home = tmp_path_factory.mktemp("home")
    model = home / ".cache" / "aspo_lightning" / MODEL
    model.mkdir(parents=True)
    save_model(model)
    save_tokenizer(model)
    return home


def small(code: str) -> str:
    """Two epochs of prompts of characters."""
    code, epochs = re.subn(r'("max_epochs": |EPOCHS = )30', r"\g<1>2", code)
    code, lengths = re.subn(r"max_prompt_length=32", "max_prompt_length=96", code)
    assert (epochs, lengths) == (1, 1)
    return code


def test_the_readmes_program_runs_as_printed_and_resumes(home, tmp_path):
    section = (ROOT / "README.md").read_text().partition("## From Python")[2]
    code = small(re.search(r"```python\n(.*?)```", section, re.DOTALL)[1])
    assert sum(line != "" for line in code.splitlines()) <= 20
    environment = {**os.environ, "HOME": str(home), "PYTHONPATH": str(ROOT)}

    def run(code):
        return subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
        )

    result = run(code)
    assert result.returncode == 0, result.stderr[-3000:]
    folder = tmp_path / "runs" / "python" / "version_0"
    assert list(rollout_files(folder)) == [0, 1]
    assert {path.name for path in folder.iterdir()} >= {"checkpoints", "origin.json", "rollouts"}
    # As if it had been killed in its second epoch, with the curves written and the checkpoint not.
    (folder / "checkpoints" / "epoch_00001.ckpt").unlink()
    (folder / "checkpoints" / "last.ckpt").unlink()
    (folder / "checkpoints" / "last.ckpt").symlink_to("epoch_00000.ckpt")
    code = code.replace('"runs/python")', '"runs/python", resume=True)').replace('": 2', '": 3')
    result = run(code.replace("fit(module, data)", 'fit(module, data, ckpt_path="last")'))
    assert result.returncode == 0, result.stderr[-3000:]
    assert list(rollout_files(folder)) == [0, 1, 2]
    steps = [step for step, _ in read_run(folder)["rollout/reward"]]
    assert len(steps) == len(set(steps)) == 3  # each epoch once
    assert {path.name for path in folder.iterdir()} >= {"origin.json", "origin_resumed_1.json"}
    assert sorted(path.name for path in folder.parent.iterdir()) == ["version_0"]


def test_the_notebook_runs_from_start_to_end(home, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(ROOT / "docs" / "tutorial.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)
    source = small(json.dumps([cell.source for cell in notebook.cells]))
    for cell, text in zip(notebook.cells, json.loads(source), strict=True):
        cell.source = text
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    for name in ("aspo", "clipped"):
        (file,) = list(rollout_files(tmp_path / "runs" / name / "version_0").values())[-1:]
        assert any(record["tokens"] for record in read_rollouts(file))
    assert (tmp_path / "my_model" / "config.json").is_file()
    printed = [output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", [])]
    assert sum(text.count("reward ") >= 3 for text in printed) == 1
    assert any("token        advantage   ratio   ASPO   GRPO" in text for text in printed)
    assert sum("image/png" in o.get("data", {}) for cell in notebook.cells for o in cell.get("outputs", [])) == 2


def test_a_name_that_is_not_there_is_told():
    import aspo_lightning

    with pytest.raises(AttributeError, match="has no attribute 'Trainer'"):
        aspo_lightning.Trainer  # noqa: B018

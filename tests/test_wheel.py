"""The wheel: what is in it, and that it is enough in a folder where nothing else is."""

import os
import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import aspo_lightning
from tests.support.commands import ROOT


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from the files that belong to it, elsewhere: setuptools leaves things where it builds."""
    folder = tmp_path_factory.mktemp("built")
    source = folder / "source"
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("aspo_lightning", "configs", "tests"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(source)]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    (built,) = folder.glob("*.whl")
    return built


def test_the_wheel_holds_every_config_and_no_test(wheel):
    with zipfile.ZipFile(wheel) as content:
        names = set(content.namelist())
        for path in (ROOT / "configs").rglob("*.yaml"):
            assert content.read(f"aspo_lightning/configs/{path.relative_to(ROOT / 'configs')}") == path.read_bytes()
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"aspo_lightning"}
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "aspo_lightning").rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == modules


def test_what_the_wheel_says_of_itself(wheel):
    checked = subprocess.run(
        [sys.executable, "-m", "twine", "check", "--strict", str(wheel)], capture_output=True, text=True, timeout=60
    )
    assert checked.returncode == 0, checked.stdout
    with zipfile.ZipFile(wheel) as content:
        (name,) = [name for name in content.namelist() if name.endswith(".dist-info/METADATA")]
        metadata = Parser().parsestr(content.read(name).decode())
    assert metadata["Version"] == aspo_lightning.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert "Topic :: Scientific/Engineering :: Artificial Intelligence" in metadata.get_all("Classifier")
    assert metadata["Keywords"]
    assert metadata["Summary"]


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """``aspo`` of the wheel, in an empty folder; the libraries are those of this environment."""
    place, work = tmp_path_factory.mktemp("installed"), tmp_path_factory.mktemp("empty")
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", str(place)]
    subprocess.run([*command, str(wheel)], check=True, capture_output=True, timeout=60)

    def aspo(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, str(place / "bin" / "aspo"), *arguments],
            cwd=work,
            env={**os.environ, "PYTHONPATH": str(place), "HF_HUB_OFFLINE": "1", "TORCH_COMPILE_DISABLE": "1"},
            capture_output=True,
            text=True,
            timeout=120,
        )

    where = [sys.executable, "-c", "import aspo_lightning; print(aspo_lightning.__file__)"]
    found = subprocess.run(
        where, cwd=work, env={**os.environ, "PYTHONPATH": str(place)}, capture_output=True, text=True
    )
    assert Path(found.stdout.strip()).is_relative_to(place)
    return aspo, work


def test_configs_are_found_without_the_repository(installed):
    aspo, work = installed
    copied = aspo("configs", "quickstart", "mine.yaml")
    assert copied.returncode == 0, copied.stderr
    assert (work / "mine.yaml").read_bytes() == (ROOT / "configs" / "quickstart.yaml").read_bytes()


def test_the_quickstart_is_trained_by_name(installed, tiny_model):
    aspo, work = installed
    small = ["--config", "quickstart", "--model", tiny_model, "--data.engine", "TransformersEngine"]
    small += ["--data.max_prompt_length", "80", "--data.val", "null", "--trainer.max_epochs", "1"]
    trained = aspo("fit", *small)
    assert trained.returncode == 0, trained.stderr[-3000:]
    assert (work / "runs/quickstart/version_0/checkpoints/epoch_00000.ckpt").is_file()
    planned = aspo("plan", *small)
    assert planned.returncode == 0, planned.stderr[-3000:]
    assert "16 prompts x 4 completions" in planned.stdout

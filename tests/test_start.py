"""``aspo`` where libraries are installed that can't be loaded with the torch that is there."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from aspo_lightning.cli import start
from tests.support.commands import ROOT


def install(folder: Path, name: str, version: str, code: str) -> None:
    """As pip leaves a package."""
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text(code)
    (folder / f"{name}-{version}.dist-info").mkdir()
    (folder / f"{name}-{version}.dist-info" / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    )


BREAKS = "raise RuntimeError('operator torchvision::nms does not exist')"


def other_build() -> str:
    return "+other" if torch.__version__.partition("+")[2] else "+cpu"


def test_they_are_named_in_one_line_with_the_command_that_removes_them(tmp_path):
    install(tmp_path, "torchvision", f"0.28.0{other_build()}", BREAKS)
    install(tmp_path, "torchcodec", f"0.17.0{other_build()}", "raise OSError('Could not load this library')")
    program = "import sys; sys.argv = ['aspo', 'fit', '--config', 'quickstart']\n"
    program += "from aspo_lightning.cli.start import main; main()"
    result = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 1
    assert result.stderr == (
        f"aspo: error: torchvision, torchcodec can't be loaded beside torch {torch.__version__}, which breaks "
        "transformers and vLLM. Nothing here needs them, whatever `pip check` says of vLLM then: "
        f"{sys.executable} -m pip uninstall --yes torchvision torchcodec\n"
    )


@pytest.mark.parametrize("fits", ["the same build", "another that works"])
def test_what_fits_is_left_alone(fits, tmp_path, monkeypatch):
    build = torch.__version__.partition("+")[2]
    looked = tmp_path / "imported"
    code = f"import pathlib; pathlib.Path({str(looked)!r}).touch()"
    if fits == "the same build":
        install(tmp_path, "torchaudio", "2.13.0" + (build and f"+{build}"), code)
    else:
        install(tmp_path, "torchaudio", "2.13.0" + other_build(), code)
    monkeypatch.syspath_prepend(tmp_path)
    assert start.built_for_another_torch() == []
    assert looked.exists() == (fits == "another that works")  # it isn't tried out without need
    sys.modules.pop("torchaudio", None)

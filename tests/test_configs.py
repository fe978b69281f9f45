"""Configs by name, and ``aspo configs``."""

from dataclasses import asdict
from inspect import isabstract
from pathlib import Path

import pytest
import yaml

from aspo_lightning import objectives
from aspo_lightning.cli import configs
from aspo_lightning.errors import ConfigError
from aspo_lightning.objectives import Objective
from tests.support.commands import ROOT, aspo_here

NAMES = {str(p.relative_to(ROOT / "configs"))[:-5] for p in (ROOT / "configs").rglob("*.yaml")}


def test_a_name_is_the_shipped_config_and_a_file_of_that_name_wins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shipped = ROOT / "configs" / "objectives" / "grpo.yaml"
    for given in ("objectives/grpo", "objectives/grpo.yaml"):
        assert Path(configs.find_config(given)).samefile(shipped)
    assert Path(configs.find_config("recipes/math_1.5b")).samefile(ROOT / "configs/recipes/math_1.5b.yaml")
    (tmp_path / "objectives").mkdir()
    Path("objectives/grpo.yaml").write_text("mine: 1")
    for given in ("objectives/grpo", "objectives/grpo.yaml"):
        assert configs.find_config(given) == "objectives/grpo.yaml"
    Path("quickstart").mkdir()  # a folder, of runs perhaps
    assert Path(configs.find_config("quickstart")).samefile(ROOT / "configs" / "quickstart.yaml")


def test_yaml_and_addresses_are_left_to_the_parser(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for given in ("{data: {group_size: 4}}", "data:\n  group_size: [", "memory://bucket/run.yaml"):
        assert configs.find_config(given) == given


@pytest.mark.parametrize(
    ("given", "close"),
    [
        ("quikstart", "quickstart, eval/quickstart"),
        ("math_1.5b", "recipes/math_1.5b"),
        ("configs/recipes/qwen3_8b.yaml", "recipes/qwen3_8b"),
    ],
)
def test_an_unknown_name_gets_the_shipped_ones_in_one_line_the_closest_first(given, close, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as error:
        configs.find_config(given)
    before, _, names = str(error.value).partition("Shipped are ")
    assert repr(given) in before
    assert names.startswith(close)
    assert set(names.rstrip(".").split(", ")) == NAMES
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("command", ["fit", "validate", "test", "plan"])
def test_every_command_takes_names(command, monkeypatch, capsys):
    overlays = ["--config", "quickstart", "--config=objectives/grpo", "-c", "data/deepscaler.yaml"]
    assert aspo_here(monkeypatch, command, *overlays, "--print_config") == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["model"]["objective"]["class_path"].endswith(".GRPO")
    assert printed["data"]["train"]["init_args"]["path"] == "agentica-org/DeepScaleR-Preview-Dataset"
    assert printed["data"]["token_budget"] == 256


def test_an_unknown_name_on_the_command_line_is_one_line(monkeypatch):
    line = aspo_here(monkeypatch, "fit", "--config", "quickstrat")
    assert line.startswith("aspo: error: There is no file 'quickstrat' here")
    assert "Did you mean quickstart? " in line
    assert "Shipped are quickstart, " in line
    assert "\n" not in line


def test_configs_are_listed_printed_and_copied(tmp_path, capsys):
    configs.main([])
    lines = capsys.readouterr().out.splitlines()
    assert {line.split()[0] for line in lines} == NAMES
    assert lines[0].split()[0] == "quickstart"
    (grpo,) = [line for line in lines if line.startswith("objectives/grpo ")]
    assert grpo.endswith("  The baseline: ratios as they are.")
    assert max(map(len, lines)) <= 150
    text = (ROOT / "configs" / "objectives" / "grpo.yaml").read_text()
    configs.main(["objectives/grpo"])
    assert capsys.readouterr().out == text
    target = tmp_path / "mine.yaml"
    configs.main(["objectives/grpo.yaml", str(target)])
    assert target.read_text() == text


def test_a_copy_overwrites_nothing(tmp_path):
    target = tmp_path / "mine.yaml"
    target.write_text("mine: 1")
    for occupied in (target, tmp_path):
        with pytest.raises(ConfigError, match="exists, and nothing was written"):
            configs.main(["quickstart", str(occupied)])
    assert target.read_text() == "mine: 1"
    with pytest.raises(ConfigError, match=r"can't be written \(No such file"):
        configs.main(["quickstart", str(tmp_path / "none" / "mine.yaml")])
    with pytest.raises(ConfigError, match="There is no file 'quikstart'"):
        configs.main(["quikstart", str(tmp_path / "other.yaml")])
    assert list(tmp_path.iterdir()) == [target]


def resolved(monkeypatch, capsys, *args: str) -> dict:
    """What `aspo fit --config quickstart` and these arguments come to."""
    assert aspo_here(monkeypatch, "fit", "--config", "quickstart", *args, "--print_config") == 0
    return yaml.safe_load(capsys.readouterr().out)


def concrete(base: type) -> list[type]:
    """The classes below it in its own package."""
    found = [c for child in base.__subclasses__() for c in [child, *concrete(child)]]
    return sorted({c for c in found if not isabstract(c) and c.__module__.startswith("aspo_lightning")}, key=str)


@pytest.mark.parametrize("objective", concrete(Objective), ids=lambda c: c.__name__)
def test_an_objective_by_its_name_has_its_own_settings(objective, parsers, monkeypatch, capsys):
    found = resolved(monkeypatch, capsys, "--model.objective", objective.__name__)["model"]["objective"]
    assert found["class_path"].rpartition(".")[2] == objective.__name__
    assert found["init_args"] == asdict(objective())


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "objectives").iterdir()), ids=lambda p: p.stem)
def test_an_overlay_has_its_objectives_own_settings_and_what_it_says(path, parsers, monkeypatch, capsys):
    found = resolved(monkeypatch, capsys, "--config", str(path))["model"]["objective"]
    said = yaml.safe_load(path.read_text())["model"]["objective"]
    objective = getattr(objectives, said["class_path"])
    assert found["class_path"].rpartition(".")[2] == said["class_path"]
    assert found["init_args"] == asdict(objective()) | said.get("init_args", {})


def test_any_class_in_anothers_place_has_its_own_defaults_and_what_the_user_has_set(
    parsers, monkeypatch, capsys, tmp_path
):
    truncated = ["--data.mismatch", "TruncatedRatio", "--data.mismatch.level", "sequence"]
    found = resolved(monkeypatch, capsys, *truncated, "--data.mismatch", "MaskedRatio")["data"]["mismatch"]
    assert found["init_args"] == {"low": 0.5, "high": 2.0, "level": "sequence"}
    # Also where all of a run's settings are written out, as in its config.yaml.
    whole = tmp_path / "config.yaml"
    whole.write_text(yaml.safe_dump(resolved(monkeypatch, capsys, "--model.objective.dual_clip", "2.5")))
    found = resolved(monkeypatch, capsys, "--config", str(whole), "--model.objective", "DAPO")["model"]["objective"]
    assert found["init_args"] == asdict(objectives.DAPO()) | {"dual_clip": 2.5}

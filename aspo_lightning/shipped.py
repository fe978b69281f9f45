"""The configs that come with the package, and what ``--config`` names: a file, or one of them."""

import difflib
import os
from pathlib import Path

import yaml

from aspo_lightning.errors import ConfigError

FOLDER = Path(__file__).parent / "configs"


def shipped() -> dict[str, Path]:
    """The configs that come with the package, by name, like recipes/math_1.5b; whole runs before overlays."""
    files = {str(path.relative_to(FOLDER)).removesuffix(".yaml"): path for path in FOLDER.rglob("*.yaml")}
    return dict(sorted(files.items(), key=lambda item: ("/" in item[0], item[0])))


def shipped_config(name: str) -> Path:
    """The config of that name; ``.yaml`` may be left out or not.

    Raises:
        ConfigError: if there is none.
    """
    configs = shipped()
    if path := configs.get(name.removesuffix(".yaml")):
        return path
    close = difflib.get_close_matches(name, configs, n=3)
    names = ", ".join(dict.fromkeys([*close, *configs]))
    hint = f" Did you mean {close[0]}?" if close else ""
    raise ConfigError(
        f"There is no file {name!r} here, and no config of that name is shipped.{hint} Shipped are {names}."
    )


def find_config(given: str) -> str:
    """The file that ``--config`` names: one in the working directory, or else a shipped one.

    Addresses and YAML itself, which are allowed there too, are returned as they are.

    Raises:
        ConfigError: if there is no such file.
    """
    if "://" in given or _is_yaml(given):
        return given
    for path in (given, f"{given.removesuffix('.yaml')}.yaml"):
        if os.path.exists(path) and not os.path.isdir(path):  # noqa: PTH110, PTH112 (false for a name that is too long)
            return path
    return str(shipped_config(given))


def _is_yaml(text: str) -> bool:
    try:
        return "\n" in text or isinstance(yaml.safe_load(text), dict)
    except yaml.YAMLError:
        return False

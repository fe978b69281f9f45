"""``aspo configs [NAME [FILE]]``: lists the configs that come with the package, prints one, or copies it to edit."""

import argparse
import difflib
import os
from collections.abc import Sequence
from pathlib import Path

import yaml
from jsonargparse import ActionConfigFile

from aspo_lightning.errors import ConfigError

FOLDER = Path(__file__).parent.parent / "configs"


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


class ConfigByName(ActionConfigFile):
    """``--config`` that takes the name of a shipped config as well as a file."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: object,
        option_string: str | None = None,
    ) -> None:
        super().__call__(parser, namespace, find_config(str(values)), option_string)


def table() -> str:
    """A line for each shipped config: its name, and the first line of its comment."""
    first_lines = {name: path.read_text().splitlines()[0] for name, path in shipped().items()}
    width = max(map(len, first_lines))
    return "\n".join(f"{name:<{width}}  {line.removeprefix('# ')}" for name, line in first_lines.items())


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="aspo configs", description=__doc__)
    parser.add_argument("name", nargs="?", metavar="NAME", help="of a config, like objectives/grpo")
    parser.add_argument("file", nargs="?", type=Path, metavar="FILE", help="where to copy it, like my_run.yaml")
    options = parser.parse_args(arguments)
    if options.name is None:
        print(table())
        return
    text = shipped_config(options.name).read_text()
    if options.file is None:
        print(text, end="")
        return
    try:
        with options.file.open("x") as file:
            file.write(text)
    except FileExistsError as error:
        raise ConfigError(f"{options.file} exists, and nothing was written. Choose another name.") from error
    except OSError as error:
        raise ConfigError(f"{options.file} can't be written ({error.strerror}). Choose another place.") from error
    print(f"Copied {options.name} to {options.file}")

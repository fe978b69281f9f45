"""``aspo configs [NAME [FILE]]``: lists the configs that come with the package, prints one, or copies it to edit."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from jsonargparse import ActionConfigFile

from aspo_lightning.errors import ConfigError
from aspo_lightning.shipped import find_config, shipped, shipped_config


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

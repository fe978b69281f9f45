"""The parser of the command line and of YAML files."""

import inspect
import pydoc
import re
from collections.abc import MutableMapping
from typing import NoReturn

from jsonargparse import Namespace, _typehints
from lightning.pytorch.cli import LightningArgumentParser

from aspo_lightning.advantages import Advantage
from aspo_lightning.curriculum import Curriculum
from aspo_lightning.engines import Engine
from aspo_lightning.errors import ConfigError
from aspo_lightning.objectives import Objective
from aspo_lightning.rollouts.corrections import Correction
from aspo_lightning.tasks import Task

discard_unknown = _typehints.discard_init_args_on_class_path_change


def discard_defaults(parser: object, before: MutableMapping, after: MutableMapping) -> None:
    """Has a class that takes another's place start from its own defaults; what a user has set goes over to it.

    In jsonargparse all settings that both classes have go over, those by default as well: DAPO or GSPO in the place of
    ASPO would have ASPO's clip range.

    Args:
        parser: of the class, or what has one.
        before: class_path and init_args of the class that was there.
        after: of the one that takes its place.
    """
    if before and "init_args" in before and before["class_path"] != after["class_path"]:
        there = pydoc.locate(before["class_path"])
        parameters = inspect.signature(there).parameters if callable(there) else {}
        settings = before["init_args"]
        for key, value in list((vars(settings) if isinstance(settings, Namespace) else settings).items()):
            if key in parameters and parameters[key].default == value:
                settings.pop(key)
    discard_unknown(parser, before, after)


_typehints.discard_init_args_on_class_path_change = discard_defaults


class Parser(LightningArgumentParser):
    """Reports a bad setting in one line."""

    def validate(
        self,
        namespace: Namespace,
        skip_unset: bool = True,
        skip_required: bool = False,
        branch: str | None = None,
        **kwargs: object,
    ) -> None:
        """Checks null like any other value, which jsonargparse skips; each class's settings have such a parser."""
        # First what is missing, which is null here as well.
        for unset in (skip_unset, False):
            super().validate(namespace, unset, skip_required, branch, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        message = " ".join(message.split())
        # A class's settings have a parser of their own, whose message is in that of the parser above it.
        if match := re.search(r'Parser key "([^"]+)".*?(?:([\w.]+) is null\.|value: None\b)', message):
            key = ".".join(filter(None, match.groups()))
            message = f"{key} is null. Give it a value, or leave it out for the default."
        elif match := re.search(rf'"(?:\w+\.)*({_KEYS})".*import path string: (\S+)', message):
            key, name = match.groups()
            known = ", ".join(sorted(subclass_names(SWAPPABLE[key])))
            message = (
                f"{key} is {name!r}, which isn't a class of this kind. Known are {known}; any other by its import path."
            )
        raise ConfigError(message)


SWAPPABLE: dict[str, type] = {
    "model.objective": Objective,
    "data.engine": Engine,
    "data.train": Task,
    "data.val": Task,
    "data.curriculum": Curriculum,
    "data.advantage": Advantage,
    "data.mismatch": Correction,
}
_KEYS = "|".join(map(re.escape, SWAPPABLE))


def subclass_names(base: type) -> set[str]:
    """Names of all concrete classes below ``base``."""
    children: list[type] = base.__subclasses__()
    below = {name for child in children for name in subclass_names(child)}
    return below | {child.__name__ for child in children if not inspect.isabstract(child)}

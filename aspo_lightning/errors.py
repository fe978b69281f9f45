"""The errors that are for the person at the keyboard: shown as one line, without a traceback."""

RESUME = "Resume from the last checkpoint with the command that the run printed"
"""The end of many messages."""


class AspoError(Exception):
    """The base of all of them."""


class ConfigError(AspoError, ValueError):
    """A setting, file or piece of data can't be used. The message names the value, what is allowed and what to do."""


class RunError(AspoError):
    """A run can't continue, whatever its settings: weights aren't finite, a disk is full, a server is lost."""


class EngineError(AspoError):
    """The engine broke while it sampled. A run of one rank is started again, once, from its last checkpoint."""

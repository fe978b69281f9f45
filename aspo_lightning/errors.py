"""The errors that are for the person at the keyboard: shown as one line, without a traceback."""

RESUME = "Resume from the last checkpoint with the command that the run printed"
"""What ends many of them."""


class ConfigError(ValueError):
    """A setting, file or piece of data can't be used. The message says the value, what is allowed and what to do."""


class EngineError(ConfigError):
    """The engine broke while it sampled. A run of one rank is started again, once, from its last checkpoint."""

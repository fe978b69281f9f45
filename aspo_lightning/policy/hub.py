"""Finding the model that a user named, before anything heavy is loaded."""

from pathlib import Path

from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from aspo_lightning.errors import ConfigError
from aspo_lightning.policy import default_model


def resolve_model(model_name_or_path: str) -> str:
    """A local folder as an absolute path, or the hub name unchanged. The default model's folder is made if need be.

    Raises:
        ConfigError: for a local path (it starts with ``/``, ``.`` or ``~``) that isn't a model folder.
    """
    folder = Path(model_name_or_path).expanduser()
    if default_model.is_default(folder) and not folder.is_dir():
        default_model.fetch()
    if not folder.is_dir():
        if model_name_or_path.startswith(("/", ".", "~")):
            raise ConfigError(
                f"The model folder {folder} doesn't exist. Give a folder that has config.json, or a Hugging Face hub "
                "name."
            )
        return model_name_or_path
    if not (folder / "config.json").is_file():
        raise ConfigError(f"The model folder {folder} has no config.json. Give a Hugging Face model folder.")
    return str(folder.resolve())


def load_tokenizer(model_name_or_path: str) -> PreTrainedTokenizerBase:
    """The model's tokenizer.

    Raises:
        ConfigError: if there is none.
    """
    folder = Path(model_name_or_path)
    names = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
    if folder.is_dir() and not any((folder / name).is_file() for name in names):
        raise ConfigError(
            f"The model folder {folder} has no tokenizer (none of {', '.join(names)}). Save the tokenizer there too."
        )
    try:
        return AutoTokenizer.from_pretrained(model_name_or_path)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"The tokenizer of {model_name_or_path} can't be loaded: {reason}") from error


def load_config(model_name_or_path: str) -> PretrainedConfig:
    """The model's text config.

    Raises:
        ConfigError: if it can't be read.
    """
    try:
        return AutoConfig.from_pretrained(model_name_or_path).get_text_config()
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"The config of {model_name_or_path} can't be loaded: {reason}") from error

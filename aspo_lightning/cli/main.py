"""The commands of ``aspo``."""

import errno
import importlib
import os
import sys
import warnings
from pathlib import Path

from aspo_lightning.errors import RESUME, AspoError, RunError

# Warnings of libraries that a user can't act on.
HARMLESS_WARNINGS = [
    r"Total length of `list` across ranks is zero",  # a run without held-out tasks
    r".*torch\.distributed\.reduce_op.* is deprecated",  # vLLM looks at it
    r".*LeafSpec.* is deprecated",  # Lightning uses it
    r"It is recommended to use .self\.log\(.*sync_dist=True",  # it is used; vLLM's process group confuses Lightning
]

MODEL = "--model.model_name_or_path"  # what a user means by --model, which LightningCLI takes for a config file

TOOLS = ("configs", "export", "report", "study", "view")
"""Commands in modules of their names, which import no more than each of them needs."""


OTHERS = (
    "Besides these: aspo plan takes what fit takes, and says what memory that needs; aspo configs lists the configs "
    "that come along, prints or copies one; aspo view writes runs as a page; aspo report compares runs and evaluations "
    "in figures and tables; aspo study makes the runs of a study; aspo export makes a Hugging Face folder of a run."
)


def error_for_people(error: BaseException | None) -> AspoError | None:
    """The error, or the one below it, that is for people: jsonargparse wraps those of a class that may be left out."""
    while error is not None and not isinstance(error, AspoError):
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return RunError(f"What the run keeps could not be written: {error.strerror}. {RESUME}.")
        error = error.__cause__ or error.__context__
    return error


def main() -> None:
    """Runs the command that was typed."""
    for message in HARMLESS_WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    sys.path.append(str(Path.cwd()))  # parts that a user wrote, like my_package.MyObjective
    command = sys.argv[1] if len(sys.argv) > 1 else ""
    try:
        if command in TOOLS:
            use_tool(command)
        else:
            use_lightning(command)
    except (AspoError, ValueError, OSError) as error:
        if (cause := error_for_people(error)) is None:
            raise
        sys.exit(f"aspo: error: {cause}")


def use_tool(command: str) -> None:
    """Runs a command of its own. It ends without a word if nobody reads on (``aspo configs quickstart | head -1``)."""
    try:
        importlib.import_module(f"aspo_lightning.cli.{command}").main(sys.argv[2:])
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python fails over it once more at its end
        sys.exit(1)


def use_lightning(command: str) -> None:
    """Runs a command of LightningCLI. What it imports takes seconds."""
    from jsonargparse import set_parsing_settings

    from aspo_lightning.cli.evaluate import EvaluationCLI
    from aspo_lightning.cli.fit import ASPOCLI
    from aspo_lightning.cli.parser import Parser
    from aspo_lightning.cli.plan import PlanCLI
    from aspo_lightning.cli.ranks import die_with_main_process
    from aspo_lightning.datamodule import RolloutDataModule
    from aspo_lightning.module import ASPOModule

    die_with_main_process()
    # The help of some settings is below them, and looking there takes a second.
    helps = any(word == "-h" or "help" in word or "print_config" in word for word in sys.argv[1:])
    set_parsing_settings(docstring_parse_attribute_docstrings=helps)
    cli = {"plan": PlanCLI, "test": EvaluationCLI}.get(command, ASPOCLI)
    if command == "plan":
        sys.argv[1] = "fit"  # which is what it parses
    sys.argv[1:] = [MODEL if a == "--model" else a.replace("--model=", f"{MODEL}=", 1) for a in sys.argv[1:]]
    cli(
        ASPOModule,
        RolloutDataModule,
        save_config_callback=None,  # RunRecord does it
        seed_everything_default=0,
        parser_class=Parser,
        parser_kwargs={"description": OTHERS},
        auto_configure_optimizers=False,
        load_from_checkpoint_support=False,
    )

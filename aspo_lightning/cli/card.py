"""The model card of an exported policy: README.md, as Hugging Face's hub reads it."""

import contextlib
import re
from collections.abc import Mapping
from pathlib import Path

import torch
import yaml

from aspo_lightning.cli.report import measurements, read_result
from aspo_lightning.errors import ConfigError, RunError
from aspo_lightning.evaluation.results import Result, show
from aspo_lightning.markdown import markdown_table
from aspo_lightning.policy import default_model
from aspo_lightning.run.checkpoints import trained_from, trained_steps
from aspo_lightning.run.folder import RunFolder


def model_card(name: str, checkpoint: Path, dtype: torch.dtype) -> str:
    """Markdown: what the policy was trained from and on, how it did, and with what. What isn't known is left out.

    Args:
        name: of the exported folder.
        checkpoint: what was exported, in its run's folder or alone.
        dtype: of the exported weights.
    """
    source = Path(trained_from(checkpoint)["model_name_or_path"])
    base = default_model.HUB_NAME if default_model.is_default(source) else str(source)
    local = source.is_absolute() and not default_model.is_default(source)
    steps = trained_steps(checkpoint)
    run = RunFolder(checkpoint.parent.parent)
    alone = checkpoint.parent not in (run.checkpoints, run.best)
    config: dict[str, object] | None = None
    with contextlib.suppress(RunError):
        config = None if alone else run.config()
    head = {
        **({} if local else {"base_model": base}),  # which must be a model of the hub
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["aspo", "reinforcement-learning", "rlvr"],
    }
    facts = {
        "trained from": source.name if local else base,
        "trained on": ", ".join(dict.fromkeys(tasks(setting(config, "data", "train")))),
        "objective": class_name(setting(config, "model", "objective")),
        "optimizer steps": str(steps),
        "weights": str(dtype).removeprefix("torch."),
    }
    lines = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n\n# {escape(name)}\n",
        "Trained with aspo_lightning by reinforcement learning with verifiable rewards.\n",
        "| | |\n| --- | --- |",
        *(f"| {key} | {escape(value)} |" for key, value in facts.items() if value),
        *([] if alone else [*results(run, steps), *versions(run)]),
    ]
    if config is not None:
        text = yaml.safe_dump(config, sort_keys=False)
        lines += [f"\n<details>\n<summary>Settings of the run</summary>\n\n{fenced(text, 'yaml')}\n\n</details>"]
    return "\n".join(lines) + "\n"


def results(run: RunFolder, steps: int) -> list[str]:
    """A table of the run's first evaluation and of the last one up to the exported step."""
    found: dict[int, Result] = {}
    for step, folder in run.evaluations():
        if step <= steps:
            with contextlib.suppress(ConfigError):  # one that isn't finished
                found[step] = read_result(folder)
    if not found:
        return []
    shown = {step: found[step] for step in (min(found), max(found))}
    head = ["benchmark", *(f"after {step} steps" if step else "before" for step in shown)]
    rows = []
    for benchmark, last in shown[max(shown)]["benchmarks"].items():
        for key in last["measurements"]:
            if "@" in key:
                measured = [measurements(result, benchmark).get(key) for result in shown.values()]
                rows.append([escape(f"{benchmark}, {key}"), *(show(m) if m else "-" for m in measured)])
    table = markdown_table(head, rows)
    return ["\n## Results\n", table, "\nIn percent, with 95% intervals over problems, measured by the run itself."]


def versions(run: RunFolder) -> list[str]:
    """A table of what the run used when it was started last."""
    origin = run.origin()
    found = origin.get("versions")
    if not isinstance(found, Mapping):
        return []
    revision = origin.get("aspo_lightning")
    rows = {**found, **({"revision of aspo_lightning": revision} if revision else {})}
    table = [f"| {escape(str(key))} | {escape(str(value))} |" for key, value in rows.items()]
    return ["\n## Versions\n", "| | |\n| --- | --- |", *table]


def setting(config: object, *keys: str) -> object:
    """A setting by its path; None if there is none."""
    for key in keys:
        config = config.get(key) if isinstance(config, Mapping) else None
    return config


def class_name(part: object) -> str:
    return str(setting(part, "class_path") or "").rpartition(".")[2]


def tasks(task: object) -> list[str]:
    """A task's class with what it reads, or those of all tasks of a mixture."""
    parts = setting(task, "init_args", "tasks")
    if isinstance(parts, Mapping):
        return [name for part in parts.values() for name in tasks(part)]
    what = setting(task, "init_args", "path") or setting(task, "init_args", "task") or ""
    return [f"{class_name(task)} {what}".strip()] if class_name(task) else []


def escape(text: str) -> str:
    """Text of a user's or a model's, on one line, that Markdown and HTML show as it is."""
    visible = "".join(c if c.isprintable() else " " for c in text)
    return re.sub(r"([!-+:-@\[-`{-~])", r"\\\1", visible)


def fenced(text: str, language: str) -> str:
    """Text as a block of code that nothing in it can end."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"

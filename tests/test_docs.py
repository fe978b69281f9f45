"""What README, docs and a run itself show: commands work as typed, in a fresh shell, and configs are parsed."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from aspo_lightning.cli.main import TOOLS, main
from tests.support.commands import ROOT, aspo_here
from tests.support.models import save_model, save_tokenizer

DOCS = ["README.md", *(str(p.relative_to(ROOT)) for p in sorted((ROOT / "docs").rglob("*.md")))]
# What takes a hub, a cluster, hours, or is this suite.
ELSEWHERE = (
    "bash scripts/install.sh",
    "bash scripts/test.sh",
    "bash scripts/mutants.sh",
    "bash scripts/test_gpu",
    "bash scripts/serve.sh",
    "sbatch ",
    "mkdocs serve",
)


def blocks(doc: str, language: str) -> list[str]:
    """The code blocks of a page."""
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / doc).read_text(), re.DOTALL)


def commands(doc: str) -> list[str]:
    """The lines of a page's shell blocks, without comments."""
    lines = "\n".join(blocks(doc, "bash")).replace("\\\n", " ").splitlines()
    return [line for line in (re.sub(r"\s+#.*", "", line) for line in lines) if line]


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """The project's files with its environment; the quickstart, made small."""
    folder = tmp_path_factory.mktemp("clone")
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in files.splitlines():
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    (folder / ".venv").symlink_to(ROOT / ".venv")
    stamp = subprocess.run(
        "cksum < pyproject.toml | cut -d ' ' -f 1", shell=True, cwd=ROOT, capture_output=True, text=True
    )
    (ROOT / ".venv" / f"installed-cpu-{stamp.stdout.strip()}").touch()  # scripts/test.sh has installed more
    for name in ("quickstart.yaml", "eval/quickstart.yaml"):
        path = folder / "configs" / name
        config = yaml.safe_load(path.read_text())
        config.setdefault("trainer", {})
        if name == "quickstart.yaml":
            config["trainer"] |= {"max_epochs": 2, "check_val_every_n_epoch": 2}
            config["data"] |= {"max_prompt_length": 80}  # the tiny model reads characters
        config["data"]["engine"] = {"class_path": "TransformersEngine"}
        for task in config["data"]["val"].values():
            task["init_args"] |= {"size": 4} if "size" in task["init_args"] else {}
        if "eval_max_completion_length" in config["data"]:
            config["data"] |= {"eval_max_completion_length": 8, "max_prompt_length": 112, "max_completion_length": 8}
        path.write_text(yaml.safe_dump(config))
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copy(path, folder / name)  # in the working directory: found by its name
    model = folder / "home" / ".cache" / "aspo_lightning" / "SmolLM2-135M-Instruct"
    model.mkdir(parents=True)
    save_model(model)
    save_tokenizer(model)
    return folder


def typed(clone: Path, script: str) -> subprocess.CompletedProcess[str]:
    """Run in a fresh shell, in which nothing is set but what a login sets."""
    environment = {"HOME": str(clone / "home"), "PATH": "/usr/local/bin:/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        ["bash", "--noprofile", "--norc", "-e", "-c", script],
        cwd=clone,
        env={**environment, "HF_HUB_OFFLINE": "1", "TORCH_COMPILE_DISABLE": "1"},
        capture_output=True,
        text=True,
        timeout=400,
    )


# A server, until it says where it is.
SERVE = """{line} 2> served & server=$!
for _ in $(seq 240); do if grep http://localhost served >&2; then break; fi; sleep 0.5; done
kill $server"""


def run(clone: Path, lines: list[str]) -> str:
    """What the commands print, in one shell."""
    script = [SERVE.format(line=line) if "tensorboard --" in line else line for line in lines]
    result = typed(clone, "\n".join(script))
    assert result.returncode == 0, f"{result.stdout[-1000:]}\n{result.stderr[-3000:]}"
    assert result.stderr.count("http://localhost") == sum("tensorboard --" in line for line in lines)
    return result.stdout


@pytest.fixture(scope="module")
def readme(clone):
    lines = [line for line in commands("README.md") if not line.startswith(ELSEWHERE)]
    assert len(lines) > 10
    return run(clone, lines)


def test_the_commands_of_the_readme_work_as_typed(readme, clone):
    assert {p.name for p in (clone / "runs" / "quickstart").iterdir()} == {f"version_{i}" for i in range(5)}
    assert (clone / "my_model" / "config.json").is_file()
    assert (clone / "results" / "my_model" / "result.json").is_file()


def test_the_commands_that_a_run_prints_work_as_typed(readme, clone):
    first = readme.partition("version_1")[0]
    shown = [line.partition("to ")[2].split(maxsplit=1) for line in first.splitlines() if line.startswith("to ")]
    found = {kind: re.sub("^on +", "", command) for kind, command in shown}
    assert set(found) == {"look", "read", "resume", "train"}
    run(clone, [found["look"], f"{found['read']} --out read.html", found["resume"], found["train"]])
    assert (clone / "read.html").is_file()
    assert list((clone / "runs/quickstart/version_0/checkpoints").glob("epoch_00003.ckpt"))


def test_the_page_of_runs_is_made_as_typed(readme, clone):
    assert (clone / "runs/quickstart/version_0/view.html").is_file()
    run(clone, ["source .venv/bin/activate", *commands("docs/view.md")])
    assert (clone / "compared.html").is_file()


def parsed(monkeypatch, capsys, *arguments: str) -> dict:
    """The settings that ``aspo`` reads from its arguments."""
    assert aspo_here(monkeypatch, *arguments, "--print_config") == 0, arguments
    return yaml.safe_load(capsys.readouterr().out)


@pytest.mark.parametrize("doc", DOCS[1:])  # the README's are run
def test_commands_are_parsed(doc, parsers, tmp_path, monkeypatch, capsys):
    for line in commands(doc):
        words = shlex.split(line)
        if "aspo" not in words:
            continue
        arguments = words[words.index("aspo") + 1 :]
        if arguments[0] not in TOOLS:
            assert parsed(monkeypatch, capsys, *arguments)["data"]
            continue
        monkeypatch.setattr(sys, "argv", ["aspo", *arguments])
        monkeypatch.chdir(tmp_path)  # in which a tool finds nothing and can't make runs: it says so, when it has read
        (tmp_path / "runs").touch()
        with pytest.raises(SystemExit, match="aspo: error: "):
            main()


def holds(config: object, given: object) -> bool:
    """Whether a config has the settings that are given. Classes are given by their names, with a path or without."""
    if isinstance(given, dict):
        return isinstance(config, dict) and all(key in config and holds(config[key], given[key]) for key in given)
    if isinstance(config, dict):
        config = config["class_path"]
    return config == given or (isinstance(config, str) and config.endswith(f".{given}"))


@pytest.mark.parametrize("doc", DOCS)
def test_configs_are_parsed(doc, parsers, tmp_path, monkeypatch, capsys):
    for block in blocks(doc, "yaml"):
        path = tmp_path / "block.yaml"
        path.write_text(block)
        alone = "model_name_or_path" in block  # otherwise it is an overlay
        configs = [path] if alone else ["configs/quickstart.yaml", path]
        arguments = [word for config in configs for word in ("--config", str(config))]
        assert holds(parsed(monkeypatch, capsys, "fit", *arguments), yaml.safe_load(block)), block


@pytest.mark.parametrize("doc", DOCS)
def test_files_that_are_named_exist(doc):
    text = (ROOT / doc).read_text()
    named = re.findall(r"\b(?:scripts|configs|tests|docs|aspo_lightning)/[\w./]+\.(?:py|sh|yaml|md|json|png)\b", text)
    linked = [target for target in re.findall(r"\]\(([^)#]+)\)", text) if not target.startswith("http")]
    missing = [name for name in named if not (ROOT / name).exists()]
    missing += [name for name in linked if not (ROOT / doc).parent.joinpath(name).exists()]
    assert missing == []

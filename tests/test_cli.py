"""``aspo`` as a user calls it: real runs with vLLM on a tiny model, what they leave on disk, what bad input says."""

import errno
import json
import os
import re
import subprocess
import sys
import time

import pytest
import torch
import yaml

from aspo_lightning.cli.main import main
from aspo_lightning.cli.ranks import MAIN_PROCESS, die_with_main_process
from aspo_lightning.datamodule import RolloutDataModule
from aspo_lightning.objectives import Objective
from aspo_lightning.run.curves import read_run
from aspo_lightning.run.tags import EVALUATION, TAGS, table
from tests.support.commands import ASPO, ROOT, aspo, aspo_forked, aspo_here
from tests.support.configs import tiny_config, write_config
from tests.support.models import save_model, save_tokenizer

FIT_TAGS = {
    *(f"rollout/{n}" for n in ("reward", "accuracy", "length", "truncated_fraction", "repetition_rate", "kept_groups")),
    *(f"policy/{n}" for n in ("loss", "entropy", "kl", "grad_norm")),
    *(f"policy/{n}_{s}" for n in ("clip_fraction", "dual_clip_fraction", "ratio") for s in ("positive", "negative")),
    "policy/effective_sample_size",
    "mismatch/logprob_abs_mean",
    "mismatch/logprob_abs_max",
    "mismatch/kl",
    "mismatch/effective_sample_size",
    *(f"time/{n}_s" for n in ("generate", "reward", "score", "update", "sync")),
    *(f"throughput/{n}_tokens_s" for n in ("generate", "score", "update")),
    "throughput/update_peak_share",
}


@pytest.fixture(scope="module")
def finished(tiny_model, tmp_path_factory):
    """A run of two epochs with vLLM."""
    folder = tmp_path_factory.mktemp("runs")
    config = write_config(folder / "config.yaml", tiny_config(tiny_model, folder))
    result = aspo("fit", "--config", config)  # not in a fork, which has the memory of all imports
    assert result.returncode == 0, result.stderr[-3000:]
    return folder, config, result


def test_a_fit_leaves_logs_checkpoints_and_its_config(finished):
    folder, _, result = finished
    run = folder / "tiny" / "version_0"
    logged = read_run(run)
    assert set(logged) >= FIT_TAGS
    assert {len(logged[tag]) for tag in FIT_TAGS} == {2}
    assert [step for step, _ in logged["policy/loss"]] == [1, 3]  # two optimizer steps an epoch

    def tokens(part):
        rates, times = logged[f"throughput/{part}_tokens_s"], logged[f"time/{part}_s"]
        return [rate * seconds for (_, rate), (_, seconds) in zip(rates, times, strict=True)]

    completions = tiny_config(folder, folder)["data"]
    count = completions["prompts_per_phase"] * completions["group_size"]
    assert tokens("generate") == pytest.approx([length * count for _, length in logged["rollout/length"]], rel=1e-5)
    assert tokens("score") == pytest.approx(tokens("update"), rel=1e-5)
    assert all(0 < share < 1 for _, share in logged["throughput/update_peak_share"])
    assert [len(logged[f"eval/sums/{m}@2"]) for m in ("avg", "pass")] == [2, 2]  # before and after
    assert logged["mismatch/logprob_abs_max"][1][1] < 1e-3  # after updates: the engine has the new weights
    assert logged["policy/kl"][1][1] > 0
    assert yaml.safe_load((run / "config.yaml").read_text())["data"]["group_size"] == 4
    assert sorted(p.name for p in (run / "checkpoints").glob("*")) == [
        ".epoch_00000.ckpt.xxh3",
        ".epoch_00001.ckpt.xxh3",
        "epoch_00000.ckpt",
        "epoch_00001.ckpt",
        "last.ckpt",
    ]
    lines = result.stdout + result.stderr
    assert lines.count("| reward") == 2
    for text in ("eval/sums/avg@2: ", "peak memory", "tensorboard --logdir", f"--ckpt_path {run}\n"):
        assert text in lines


def test_the_plan_knew_what_the_fit_took(finished, monkeypatch, capsys):
    _, config, result = finished
    (took,) = re.findall(r"peak memory +([\d.]+) GB", result.stdout)
    monkeypatch.setattr(sys, "argv", ["aspo", "plan", "--config", config])
    main()
    (planned,) = re.findall(r"Fits: ([\d.]+) of", capsys.readouterr().out)
    assert float(planned) == pytest.approx(float(took), rel=0.2)


def test_the_peak_of_memory_is_that_of_the_run_and_not_of_what_started_it():
    starter = (
        "import subprocess, sys; held = b'x' * 10**9\n"
        "told = 'from aspo_lightning.run.memory import peak_memory; print(peak_memory())'\n"
        "subprocess.run([sys.executable, '-c', told], check=True)"
    )
    told = subprocess.run([sys.executable, "-c", starter], capture_output=True, text=True, check=True)
    assert int(told.stdout) < 0.9e9


@pytest.mark.skipif(sys.platform != "linux", reason="of glibc")
@pytest.mark.parametrize(("setting", "kept"), [({}, True), ({"MALLOC_MMAP_THRESHOLD_": "65536"}, False)])
def test_freed_memory_is_kept_unless_the_environment_says_what_becomes_of_it(setting, kept):
    program = (
        "import resource, torch\n"
        "from aspo_lightning.run.memory import keep_freed_memory\n"
        "def new_pages():\n"
        "    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "    torch.ones(2**24)\n"
        "    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before\n"
        "new_pages()\n"
        "before = new_pages()\n"
        "keep_freed_memory()\n"
        "print(before, [new_pages() for _ in range(20)][-1])"  # aligned blocks need some room more at first
    )
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MALLOC_")} | setting
    command = [sys.executable, "-c", program]
    told = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    before, after = map(int, told.stdout.split())
    assert before > 10  # in pages of 2 MiB, 32
    assert after < 10 if kept else after > 10


def test_a_checkpoint_holds_the_policy_and_not_the_reference(finished, tiny_model):
    folder, _, _ = finished
    checkpoint = torch.load(folder / "tiny/version_0/checkpoints/epoch_00001.ckpt", weights_only=False)
    assert not [key for key in checkpoint["state_dict"] if not key.startswith("policy.lm.")]
    weights = sum(v.numel() for v in {v.data_ptr(): v for v in checkpoint["state_dict"].values()}.values())
    from transformers import AutoModelForCausalLM

    assert weights == sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(tiny_model).parameters())


def test_a_second_run_has_a_folder_of_its_own_and_parts_are_swapped_by_name(finished):
    folder, config, _ = finished
    first = {p: p.stat().st_mtime_ns for p in (folder / "tiny" / "version_0").rglob("*")}
    result = aspo_forked(
        "fit",
        "--config",
        config,
        "--model.objective",
        "GRPO",
        "--data.engine",
        "TransformersEngine",
        "--trainer.max_epochs",
        "1",
        "--model.kl_coef",
        "0",
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert {p: p.stat().st_mtime_ns for p in first} == first
    saved = yaml.safe_load((folder / "tiny" / "version_1" / "config.yaml").read_text())
    assert saved["model"]["objective"]["class_path"] == "aspo_lightning.objectives.GRPO"
    assert saved["data"]["engine"]["class_path"].endswith("TransformersEngine")
    assert "policy/kl" not in read_run(folder / "tiny" / "version_1")


def test_turns_refills_a_curriculum_and_hanging_rewards_in_one_run(tiny_model, tmp_path):
    config = tiny_config(
        tiny_model, tmp_path, curriculum={"class_path": "PassRate"}, no_spread="refill", overlong_buffer=8, passes=2
    )
    settings = config["data"]["train"]["init_args"]
    settings.update(
        reward="tests.support.hostile_rewards.parity_or_hang",
        environment="tests.support.hostile_rewards.once_more",
        chat=False,
    )
    config["data"].update(reward_timeout_s=1.0, max_completion_length=24)
    start = time.monotonic()
    result = aspo_forked(
        "fit", "--config", write_config(tmp_path / "config.yaml", config), "--trainer.limit_val_batches", "0"
    )
    assert result.returncode == 0, result.stderr[-3000:]
    logged = read_run(tmp_path / "tiny" / "version_0")
    failed = [value for _, value in logged["rollout/failed_rewards"]]
    assert sum(failed) > 0
    waited = [value for _, value in logged["time/reward_s"]]
    assert all(w < 0.5 * f + 12 for f, w in zip(failed, waited, strict=True))  # two workers, a second each; new ones
    assert time.monotonic() - start < 200
    assert [value for _, value in logged["rollout/kept_groups"]] == [4, 4]
    assert [step for step, _ in logged["policy/loss"]] == [3, 7]  # two optimizer steps, two passes
    checkpoint = torch.load(tmp_path / "tiny/version_0/checkpoints/last.ckpt", weights_only=False)
    rates = checkpoint["RolloutDataModule"]["curriculum"]["state"]["rates"]
    assert 4 <= len(rates) <= 40
    assert all(0 <= rate <= 1 for rate in rates.values())


def test_validate_evaluates_a_checkpoint(finished):
    folder, config, _ = finished
    run = folder / "tiny" / "version_0"
    at_the_end = read_run(run)["eval/sums/avg@2"][-1][1]
    result = aspo_forked("validate", "--config", config, "--ckpt_path", str(run / "checkpoints" / "last.ckpt"))
    assert result.returncode == 0, result.stderr[-3000:]
    (shown,) = re.findall(r"eval/sums/avg@2\s+│\s+([\d.]+)", result.stdout)
    assert float(shown) == pytest.approx(at_the_end)


def test_every_tag_has_a_meaning_and_every_meaning_a_tag(finished):
    """docs/tags.md has them all. Other tests cover what this run lacks: level, correction, lag, votes."""
    lacks = {"rollout/level", "mismatch/cut_fraction", "mismatch/corrected_sample_size", "rollout/lag", "time/wait_s"}
    logged = read_run(finished[0] / "tiny" / "version_0").keys() - {"epoch"}
    evaluated = {re.sub(r"@\d+", "@<k>", tag.removeprefix("eval/sums/")) for tag in logged if tag.startswith("eval/")}
    assert {tag for tag in logged if not tag.startswith(("eval/", "final/"))} == TAGS.keys() - lacks
    assert evaluated == EVALUATION.keys() - {"maj@<k>"}
    assert table() in (ROOT / "docs" / "tags.md").read_text()


@pytest.mark.parametrize(
    "path", sorted(p for p in (ROOT / "configs").rglob("*.yaml") if p.parent.name != "studies"), ids=lambda p: p.stem
)
def test_shipped_configs_are_parsed(path, monkeypatch, capsys):
    """Overlays on top of the quickstart; what a config says is in the result."""
    base = ROOT / "configs" / "quickstart.yaml"
    overlay = [] if path.parent == base.parent else ["--config", str(base)]
    assert aspo_here(monkeypatch, "fit", *overlay, "--config", str(path), "--print_config") == 0
    printed = yaml.safe_load(capsys.readouterr().out)

    def compare(said, found):
        for key, value in said.items():
            if isinstance(value, dict):
                compare(value, found[key])
            elif key == "class_path":
                assert found[key].endswith(value)
            else:
                assert found[key] == value, key

    compare(yaml.safe_load(path.read_text()), printed)


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "objectives").glob("*.yaml")), ids=lambda p: p.stem)
def test_objective_overlays_fit_the_quickstart(path, tiny_model):
    from jsonargparse import ArgumentParser

    parser = ArgumentParser()
    parser.add_class_arguments(RolloutDataModule, "data")
    parser.add_subclass_arguments(Objective, "objective")
    base, overlay = (yaml.safe_load(p.read_text()) for p in (ROOT / "configs" / "quickstart.yaml", path))
    data = {**base["data"], **overlay.get("data", {}), "model_name_or_path": tiny_model}
    objective = overlay["model"]["objective"]
    made = parser.instantiate(parser.parse_object({"data": data, "objective": objective}))
    assert type(made.objective).__name__ == objective["class_path"]


def test_configs_overlay(finished, tmp_path):
    _, config, _ = finished
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text(yaml.safe_dump({"data": {"group_size": 6}}))
    printed = yaml.safe_load(aspo_forked("fit", "--config", config, "--config", str(overlay), "--print_config").stdout)
    assert printed["data"]["group_size"] == 6
    assert printed["data"]["prompts_per_phase"] == 4


CHAIN_SUM = ["--data.train", "ReasoningGym", "--data.train.init_args.task", "chain_sum"]
BAD_INPUT = {
    "unknown key": (["--model.no_such_key", "1"], "no_such_key"),
    "unknown objective": (["--model.objective", "PPPO"], "Known are ASPO, ASPOResponseMean, ASPOSoftGate"),
    "unknown engine": (["--data.engine", "SGLang"], "TransformersEngine, VLLMEngine"),
    "unknown curriculum": (["--data.curriculum", "PasRate"], "Known are PassRate, RisingLevels, Shuffled"),
    "no model folder": (["--model.model_name_or_path", "/no/such/folder"], "/no/such/folder doesn't exist"),
    "group of one": (["--data.group_size", "1"], "data.group_size is 1"),
    "negative clip range": (["--model.objective.clip_eps_low", "-0.2"], "clip_eps_low is -0.2"),
    "dual clip": (["--model.objective.dual_clip", "1.0"], "dual_clip is 1.0"),
    "greedy groups": (["--data.temperature", "0"], "data.temperature is 0"),
    "context": (["--data.max_prompt_length", "120", "--data.token_budget", "999"], "more than the 128"),
    "empty task": ([*CHAIN_SUM, "--data.train.init_args.size", "0"], "empty task"),
    "too few prompts": ([*CHAIN_SUM, "--data.train.init_args.size", "3"], "fewer than data.prompts_per_phase 4"),
    "unwritable": (["--trainer.default_root_dir", "/proc/none"], "/proc/none can't be written to"),
    "nothing to resume": (["--trainer.default_root_dir", "/tmp/none", "--ckpt_path", "last"], "no run below"),
    "checkpoints in an epoch": (["--checkpoint.every_n_train_steps", "1"], "Set checkpoint.every_n_epochs"),
    "half precision": (["--trainer.precision", "bf16-true"], "it must be one of 32-true, bf16-mixed"),
    "FSDP 1": (["--trainer.strategy", "fsdp"], "trainer.strategy is fsdp: use fsdp2"),
    "wrong type": (["--trainer.max_epochs", "many"], "many"),
}
NULLS = {
    "data.group_size": [],
    "data.engine.timeout_s": [],
    "data.train.reward": [],
    "data.curriculum.floor": ["--data.curriculum", "PassRate"],
    "model.objective.clip_eps_low": [],
    "model.optimizer.lr": [],
    "non_finite.patience": [],
    "checkpoint.save_top_k": [],
    "trainer.callbacks.patience": ["--trainer.callbacks", "EarlyStopping", "--trainer.callbacks.monitor", "step"],
    "seed_everything": [],
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_gets_one_clear_line(finished, name, monkeypatch):
    _, config, _ = finished
    args, message = BAD_INPUT[name]
    check_refused(aspo_here(monkeypatch, "fit", "--config", config, *args), message)


@pytest.mark.parametrize("key", NULLS)
def test_null_is_refused_wherever_a_value_is_needed(finished, key, monkeypatch):
    _, config, _ = finished
    line = aspo_here(monkeypatch, "fit", "--config", config, *NULLS[key], f"--{key}", "null")
    assert line == f"aspo: error: {key} is null. Give it a value, or leave it out for the default."


def test_null_is_taken_where_it_means_something(finished, monkeypatch, capsys):
    _, config, _ = finished
    keys = [
        "data.engine.init_args.kv_cache_gib",
        "model.objective.init_args.dual_clip",
        "data.probe_factor",
        "data.val",
    ]
    nulls = [argument for key in keys for argument in (f"--{key}", "null")]
    assert aspo_here(monkeypatch, "fit", "--config", config, *nulls, "--print_config") == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    for key in keys:
        value = printed
        for name in key.split("."):
            value = value[name]
        assert value is None


def check_refused(line, message):
    assert isinstance(line, str)  # Python prints it to stderr and exits with 1
    assert line.startswith("aspo: error: ")
    assert "\n" not in line
    assert message in line


def test_an_error_is_one_line_without_traceback(finished):
    _, config, _ = finished
    result = aspo("fit", "--config", config, "--data.group_size", "1")
    assert result.returncode == 1
    (line,) = [line for line in result.stderr.splitlines() if "error" in line.lower()]
    check_refused(line, "data.group_size is 1")
    assert "Traceback" not in result.stderr


def test_the_help_of_a_setting_is_what_is_written_below_it(monkeypatch, capsys):
    assert aspo_here(monkeypatch, "fit", "--help") == 0
    assert "compute precision is ``trainer.precision``" in " ".join(capsys.readouterr().out.split())


def test_a_tool_whose_output_nobody_reads_on_ends_without_a_word():
    process = subprocess.Popen(
        [ASPO, "configs", "quickstart"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    process.stdout.close()
    assert (process.stderr.read(), process.wait()) == ("", 1)


def test_a_model_without_tokenizer_and_a_row_without_answer_are_refused(finished, tmp_path, monkeypatch):
    _, config, _ = finished
    save_model(tmp_path / "model")
    check_refused(
        aspo_here(monkeypatch, "fit", "--config", config, "--model.model_name_or_path", str(tmp_path / "model")),
        "no tokenizer",
    )
    save_tokenizer(tmp_path / "model")
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"question": "1+1", "answer": "2"}) + "\n" + json.dumps({"question": "1+2"}))
    task = ["--data.train", "Dataset", "--data.train.init_args.path", str(rows)]
    check_refused(aspo_here(monkeypatch, "fit", "--config", config, *task), "rows.jsonl:2 has no 'answer'")


def test_a_full_disk_is_told_in_one_line_and_no_other_error_of_the_system_is_hidden(monkeypatch):
    def fails(command):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("aspo_lightning.cli.main.use_tool", fails)
    for number in (errno.ENOSPC, errno.EDQUOT):
        said = aspo_here(monkeypatch, "configs")
        assert said.startswith(f"aspo: error: What the run keeps could not be written: {os.strerror(number)}. Resume")
    number = errno.EACCES
    with pytest.raises(PermissionError):
        main()


def test_without_vllm_the_error_names_the_other_engine(finished, monkeypatch):
    from aspo_lightning.engines import VLLMEngine
    from aspo_lightning.errors import ConfigError

    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"vllm isn't installed.*--data\.engine TransformersEngine"):
        VLLMEngine().check()


def test_a_rank_ends_with_the_process_that_started_it_and_with_no_other(monkeypatch):
    """A rank that a cluster started may have the id of an earlier `aspo` in its environment."""
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv(MAIN_PROCESS, str(os.getpid()))  # which is there, and didn't start this one
    die_with_main_process()
    ended = subprocess.Popen(["true"])
    ended.wait()
    monkeypatch.setenv(MAIN_PROCESS, str(ended.pid))
    with pytest.raises(SystemExit):
        die_with_main_process()
    monkeypatch.setenv("LOCAL_RANK", "0")
    die_with_main_process()
    assert os.environ[MAIN_PROCESS] == str(os.getpid())

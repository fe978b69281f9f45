"""FSDP2 and LoRA as a user runs them: real processes over gloo, a vLLM engine on each rank, real checkpoints."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from aspo_lightning.engines import SamplingRequest, VLLMEngine
from tests.conftest import save_model, save_tokenizer
from tests.recorder import PROBE
from tests.test_cli import ASPO, ROOT, aspo, tiny_config, write

SHARDED = ["--trainer.strategy", "fsdp2", "--trainer.devices"]


class Runs:
    """Runs of one config; each is recorded by rank, in a folder of its own."""

    def __init__(self, model: str, folder: Path, **model_settings) -> None:
        self.folder = folder
        config = tiny_config(model, folder, prompts_per_phase=6, no_spread="keep")
        # SGD: AdamW would make steps of full size out of the rounding of gradients near zero.
        config["model"]["optimizer"] = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}}
        config["model"].update(model_settings)
        config["trainer"].update(max_epochs=3, limit_val_batches=0)
        config["checkpoint"] = {"save_top_k": -1}
        self.config = config

    def command(self, name: str, *args: str, **recorder) -> list[str]:
        config = {**self.config, "trainer": dict(self.config["trainer"])}
        config["trainer"]["callbacks"] = [
            {"class_path": "tests.recorder.Recorder", "init_args": {"folder": str(self.folder / name), **recorder}}
        ]
        config["trainer"]["logger"]["init_args"]["name"] = f"run_{name}"
        return ["fit", "--config", write(self.folder, config), *args]

    def record(self, name: str, *args: str) -> list[dict]:
        result = aspo(*self.command(name, *args))
        assert result.returncode == 0, result.stderr[-3000:]
        return [torch.load(path, weights_only=False) for path in sorted((self.folder / name).iterdir())]

    def checkpoint(self, name: str, epoch: int) -> Path:
        return self.folder / f"run_{name}" / "version_0" / "checkpoints" / f"epoch_{epoch:05d}.ckpt"


@pytest.fixture(scope="module")
def runs(tiny_model, tmp_path_factory):
    return Runs(tiny_model, tmp_path_factory.mktemp("sharded"))


@pytest.fixture(scope="module")
def one(runs):
    return runs.record("one")[0]


@pytest.fixture(scope="module")
def two(runs):
    return runs.record("two", *SHARDED, "2")


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


def distance(ours: dict, theirs: dict) -> float:
    assert list(ours) == list(theirs)
    return max(relative(ours[name], theirs[name]) for name in theirs)


def test_two_ranks_do_what_one_does(one, two):
    for phase, ours, theirs in zip(one["phases"], two[0]["phases"], two[1]["phases"], strict=True):
        assert ours["completions"] == theirs["completions"]  # gathered: every rank has the whole phase
        assert ours["completions"] == phase["completions"]
        assert ours["tokens"] + theirs["tokens"] == phase["tokens"]
        assert abs(ours["tokens"] - theirs["tokens"]) < 0.2 * phase["tokens"]
        assert ours["accumulate"] == theirs["accumulate"]
    assert len(one["gradients"]) == len(two[0]["gradients"]) == 6
    for gradient, ours, theirs in zip(one["gradients"], two[0]["gradients"], two[1]["gradients"], strict=True):
        assert torch.equal(ours, theirs)
        assert relative(ours, gradient) < 1e-5
    assert distance(two[0]["weights"], one["weights"]) < 1e-5


def test_after_each_sync_every_ranks_engine_has_the_weights(one, two):
    for record in (one, *two):
        assert len(record["probes"]) == 3
        assert max(record["probes"]) < 1e-4


def test_checkpoints_go_on_on_any_number_of_ranks(runs, one, two):
    after_first = ["--ckpt_path", str(runs.checkpoint("two", 0))]
    again = runs.record("two_to_two", *SHARDED, "2", *after_first)
    for name, weight in two[0]["weights"].items():
        assert torch.equal(again[0]["weights"][name], weight)
    # Two ranks' checkpoint on one, and what that writes on two.
    runs.record("two_to_one", *SHARDED, "1", *after_first, "--trainer.max_epochs", "2")
    last = runs.record("one_to_two", *SHARDED, "2", "--ckpt_path", str(runs.checkpoint("two_to_one", 1)))
    assert last[0]["phases"][0]["completions"] == one["phases"][2]["completions"]
    assert distance(last[0]["weights"], one["weights"]) < 1e-5


def test_a_sharded_checkpoint_holds_the_policy_alone_and_says_what_it_needs(runs, two):
    folder = runs.checkpoint("two", 2)
    assert {"meta.pt", ".metadata"} < {path.name for path in folder.iterdir()}
    from torch.distributed.checkpoint import FileSystemReader

    metadata = FileSystemReader(folder).read_metadata().state_dict_metadata
    assert {key for key in metadata if key.startswith("state_dict.")} == {
        f"state_dict.policy.lm.{name}" for name in [*two[0]["weights"], "lm_head.weight"]
    }
    result = aspo(*runs.command("refused", "--ckpt_path", str(folder)))
    assert result.returncode == 1
    assert "--trainer.strategy fsdp2" in result.stderr.splitlines()[-1]


def plain_logprobs(folder: Path, prompt: tuple[int, ...], completion: tuple[int, ...], temperature=1.0):
    lm = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        logits = lm(input_ids=torch.tensor([[*prompt, *completion]])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None]).squeeze(1)


def check_export(run: Path, target: Path, record: dict) -> None:
    """The exported folder gives the live policy's log-probs in plain transformers, and in vLLM."""
    result = aspo("export", str(run), str(target))
    assert result.returncode == 0, result.stderr
    ours = torch.cat([plain_logprobs(target, prompt, tuple(range(60, 70))) for prompt in PROBE])
    torch.testing.assert_close(ours, record["logprobs"], rtol=0, atol=1e-4)
    engine = VLLMEngine(kv_cache_gib=0.05)
    engine.start(str(target), context_length=64)
    completions = engine.generate([SamplingRequest(p, 8, seed=3) for p in PROBE], description="test")
    engine.stop()
    for prompt, completion in zip(PROBE, completions, strict=True):
        theirs = plain_logprobs(target, prompt, completion.completion_ids)
        torch.testing.assert_close(torch.tensor(completion.generator_logprobs), theirs, rtol=0, atol=1e-4)
    before = {path: path.read_bytes() for path in target.iterdir()}
    again = aspo("export", str(run), str(target))
    assert again.returncode == 1
    assert "not an empty folder" in again.stderr
    assert {path: path.read_bytes() for path in target.iterdir()} == before


def test_exports_of_full_and_sharded_checkpoints_are_the_policy(runs, one, two, tmp_path):
    check_export(runs.checkpoint("one", 2), tmp_path / "full", one)
    check_export(runs.folder / "run_two" / "version_0", tmp_path / "sharded", two[0])


@pytest.fixture(scope="module")
def untied_model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("untied")
    save_model(folder, tie_word_embeddings=False, hidden_size=256, intermediate_size=512)
    save_tokenizer(folder)
    return str(folder)


def test_lora_on_two_ranks(untied_model, tmp_path):
    runs = Runs(
        untied_model, tmp_path, lora_rank=2, optimizer={"class_path": "torch.optim.SGD", "init_args": {"lr": 1.0}}
    )
    two = runs.record("two", *SHARDED, "2")
    assert max(two[0]["probes"] + two[1]["probes"]) < 1e-4  # merged weights reach the engine
    base = load_file(f"{untied_model}/model.safetensors")
    changed = {name for name, weight in two[0]["weights"].items() if not torch.equal(weight, base[name])}
    assert changed == {name for name in base if name.endswith("_proj.weight")}
    # The reference is the base: in the first phase, before any update, nothing is apart from it.
    full = sum(weight.numel() * 4 for weight in base.values())
    size = sum(path.stat().st_size for path in runs.checkpoint("two", 0).rglob("*"))
    assert size < 0.05 * full
    again = runs.record("again", *SHARDED, "2", "--ckpt_path", str(runs.checkpoint("two", 1)))
    for name, weight in two[0]["weights"].items():
        assert torch.equal(again[0]["weights"][name], weight)
    check_export(runs.checkpoint("two", 2), tmp_path / "export", two[0])


@pytest.mark.parametrize(
    ("fault", "rank", "reason"), [("raise", 1, "rank 1 was told to fail"), ("kill", 1, "SIGKILL"), ("kill", 0, "")]
)
def test_when_a_rank_fails_all_end_soon_with_its_reason(runs, fault, rank, reason):
    command = runs.command(f"{fault}_{rank}", *SHARDED, "2", fault=fault, fault_rank=rank)
    process = subprocess.Popen(
        [ASPO, *command], cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, start_new_session=True
    )
    errors = process.communicate(timeout=200)[1]  # ends when the last process has closed it
    ended = time.monotonic()
    assert process.returncode != 0
    assert reason in errors
    while time.monotonic() < ended + 10:
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    pytest.fail("a process was left over")


def test_a_rank_without_sequences_takes_part(tiny_model, tmp_path):
    runs = Runs(tiny_model, tmp_path)
    # Room for one sequence in each micro-batch: three sequences make 2 x 2 of them, one empty.
    runs.config["data"].update(
        prompts_per_phase=1, group_size=3, optimizer_steps=1, max_prompt_length=8, token_budget=24
    )
    one, (first, second) = runs.record("one")[0], runs.record("two", *SHARDED, "2")
    assert [(p["accumulate"], q["accumulate"]) for p, q in zip(first["phases"], second["phases"], strict=True)] == [
        (2, 2)
    ] * 3
    assert distance(first["weights"], one["weights"]) < 1e-5

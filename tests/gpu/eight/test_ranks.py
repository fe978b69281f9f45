"""Ranks over NCCL, as many as there are GPUs of eight; with ASPO_GPU_TWIN=1 two over gloo, on a CPU, to test the tests.

What starts without hanging comes first.
"""

import shutil
import signal
import time
from importlib.util import find_spec

import pytest
import torch

pytest.importorskip("jsonargparse", reason="the package isn't installed with what it needs: scripts/install.sh")

from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from aspo_lightning.engines import SamplingRequest, VLLMServers
from aspo_lightning.errors import RunError
from aspo_lightning.run.curves import read_run
from tests.gpu.test_runs import config, planned
from tests.support import peak_recorder
from tests.support.commands import ASPO
from tests.support.configs import write_config
from tests.support.gpu import DEVICE, TWIN, on
from tests.support.models import save_tokenizer
from tests.support.processes import Group, eventually
from tests.support.published_models import MODELS
from tests.support.recorded_runs import SHARDED, RecordedRuns, distance, relative
from tests.support.servers import Server, ready

RANKS = min(8, torch.cuda.device_count()) or 2 * TWIN
HALF = RANKS // 2
WITHOUT_VLLM = ["--data.engine", "TransformersEngine"]
ENGINE = [] if find_spec("vllm") else WITHOUT_VLLM

pytestmark = pytest.mark.skipif(
    RANKS < 2, reason="torch sees fewer than two GPUs; ASPO_GPU_TWIN=1 runs two ranks on a CPU"
)


def finished(command, log, seconds=400, **environment) -> None:
    with Group([ASPO, *command], log, **environment) as run:
        code = run.wait(seconds)
    assert code == 0, run.text[-5000:]


@pytest.fixture(scope="module")
def runs(small_model, tmp_path_factory):
    """Those of a tiny model, recorded by rank."""
    runs = RecordedRuns(small_model, tmp_path_factory.mktemp("ranks"))
    runs.config["trainer"]["accelerator"] = on("gpu", "cpu")
    return runs


@pytest.mark.vllm
@pytest.mark.parametrize("ranks", sorted({2, RANKS}))
def test_ranks_with_engines_start_within_five_minutes(runs, tmp_path, ranks):
    """vLLM makes process groups inside of Lightning's."""
    finished(runs.command(f"start_{ranks}", *SHARDED, str(ranks), "--trainer.max_epochs", "1"), tmp_path / "log", 300)
    assert len(runs.records(f"start_{ranks}")) == ranks


@pytest.mark.vllm
def test_ranks_that_share_an_engine_sample_the_same_from_the_new_weights(runs, tmp_path):
    split = ["--data.engine.init_args.tensor_parallel_size", str(min(4, RANKS))]
    finished(runs.command("shared", *SHARDED, str(RANKS), *split), tmp_path / "log")
    records = runs.records("shared")
    assert len(records) == RANKS
    for record in records:
        assert len(record["probes"]) == 3
        assert max(record["probes"]) < on(0.5, 1e-4)  # engines have 16 bits on a GPU
        assert [p["completions"] for p in record["phases"]] == [p["completions"] for p in records[0]["phases"]]


@pytest.fixture(scope="module")
def all_ranks(runs, tmp_path_factory):
    """In float32, engine and all."""
    finished(runs.command("all", *SHARDED, str(RANKS), *WITHOUT_VLLM), tmp_path_factory.mktemp("all") / "log")
    return runs.records("all")


def test_all_ranks_do_what_one_does(runs, all_ranks, tmp_path):
    finished(runs.command("one", "--trainer.devices", "1", *WITHOUT_VLLM), tmp_path / "log")
    (one,) = runs.records("one")
    for record in all_ranks:
        assert [p["completions"] for p in record["phases"]] == [p["completions"] for p in one["phases"]]
        assert len(record["gradients"]) == len(one["gradients"]) == 6
        for ours, theirs in zip(record["gradients"], one["gradients"], strict=True):
            assert relative(ours.cpu(), theirs.cpu()) < 1e-4  # float32, added in another order
    for phase, *shares in zip(one["phases"], *(record["phases"] for record in all_ranks), strict=True):
        assert sum(share["tokens"] for share in shares) == phase["tokens"]


def test_half_of_the_ranks_resume_what_all_began(runs, all_ranks, tmp_path):
    checkpoint = ["--ckpt_path", str(runs.checkpoint("all", 0))]
    finished(runs.command("resumed", *SHARDED, str(HALF), *WITHOUT_VLLM, *checkpoint), tmp_path / "log")
    resumed = runs.records("resumed")
    assert len(resumed) == HALF
    assert [p["completions"] for p in resumed[0]["phases"]] == [p["completions"] for p in all_ranks[0]["phases"][1:]]
    weights, expected = ({n: w.cpu() for n, w in r[0]["weights"].items()} for r in (resumed, all_ranks))
    assert distance(weights, expected) < 1e-4


@pytest.mark.parametrize(("fault", "rank"), [("kill", min(5, RANKS - 1)), ("raise", 0)])
def test_when_one_rank_fails_nothing_runs_a_minute_later(runs, tmp_path, fault, rank):
    command = runs.command(f"{fault}_{rank}", *SHARDED, str(RANKS), *ENGINE, fault=fault, fault_rank=rank)
    marks = runs.folder / f"run_{fault}_{rank}" / "version_0" / "checkpoints"
    with Group([ASPO, *command], tmp_path / "log") as run:
        run.until(lambda: list(marks.glob("epoch_00000.ckpt")), 400)  # the fault comes in the next epoch
        assert eventually(lambda: not run.is_there(), 60), "a process is left over"
        assert run.wait(0) != 0
        if fault == "raise":
            assert f"rank {rank} was told to fail" in run.text


def gpus(first: int, number: int) -> dict[str, str]:
    return {"CUDA_VISIBLE_DEVICES": ",".join(map(str, range(first, first + number)))} if DEVICE.type == "cuda" else {}


@pytest.fixture
def servers(small_model, monkeypatch):
    """One on each GPU of the second half."""
    monkeypatch.setenv("VLLM_API_KEY", "a-secret-of-these-tests")
    with ready(*(Server(small_model, **gpus(HALF + i, 1)) for i in range(HALF))) as started:
        yield started


@pytest.mark.vllm
def test_the_first_half_trains_while_servers_on_the_second_sample(runs, servers, small_model, tmp_path):
    urls = f"[{','.join(server.url for server in servers)}]"
    engine = ["--data.engine.class_path", "VLLMServers", "--data.engine.init_args.urls", urls]
    finished(runs.command("served", *SHARDED, str(HALF), *engine), tmp_path / "log", **gpus(0, HALF))
    for record in runs.records("served"):
        assert max(record["probes"]) < on(0.5, 1e-4)

    weights = {name: w.to(DEVICE) for name, w in load_file(f"{small_model}/model.safetensors").items()}

    def until_one_is_lost():
        for i, named in enumerate(weights.items()):
            if i == 3:
                servers[-1].signal(signal.SIGKILL)
            yield named

    client = VLLMServers([server.url for server in servers])
    client.start(small_model, context_length=64)
    start = time.monotonic()
    with pytest.raises(RunError, match=f"The vLLM server at {servers[-1].url} doesn't answer"):
        client.sync_weights(until_one_is_lost())
    assert time.monotonic() - start < 60
    if servers[:-1]:
        rest = VLLMServers([server.url for server in servers[:-1]])
        rest.start(small_model, context_length=64)
        rest.sync_weights(weights.items())
        assert len(list(rest.generate([SamplingRequest((5, 6, 7), 8, seed=1)]))) == 1


@pytest.mark.vllm
@pytest.mark.skipif(RANKS < 8 and not TWIN, reason="it takes eight GPUs")
def test_a_phase_of_64_x_16_of_a_model_of_8_billion_takes_what_the_plan_says(small_model, note, tmp_path):
    model = small_model
    if DEVICE.type == "cuda":
        if (free := shutil.disk_usage(tmp_path).free / 1e9) < 130:
            pytest.skip(f"it takes 130 GB of disk, and {tmp_path} has {free:.0f}: pytest's --basetemp names another")
        model = str(tmp_path / "model")
        torch.manual_seed(0)
        with DEVICE:
            lm = AutoModelForCausalLM.from_config(MODELS["qwen3_8b"][0], dtype=torch.bfloat16)
        lm.save_pretrained(model)
        del lm
        torch.cuda.empty_cache()  # other processes need it
        save_tokenizer(model)
    prompt, completion = 24, on(2048, 32)
    prompts, group, budget = on((64, 16, 4 * (prompt + completion)), (4, 4, 256))
    data = {"prompts_per_phase": prompts, "group_size": group, "token_budget": budget}
    made = config(model, tmp_path, DEVICE, "vllm", max_prompt_length=prompt, max_completion_length=completion, **data)
    if DEVICE.type == "cuda":
        made["data"]["engine"]["init_args"] = {"gpu_memory_utilization": 0.65}
    made["model"]["gradient_checkpointing"] = True
    made["trainer"].update(
        devices=RANKS,
        precision="bf16-mixed",
        strategy={"class_path": "FSDP2Strategy", "init_args": {"reduce_each_micro_batch": True}},
        callbacks=[peak_recorder.callback(tmp_path / "peak")],
        limit_val_batches=0,
    )
    made["checkpoint"] = {"every_n_epochs": 2}
    settings = ["--config", write_config(tmp_path / "config.yaml", made)]
    finished(["fit", *settings], tmp_path / "log", 1800)
    run = tmp_path / "tiny" / "version_0"
    logged = read_run(run)
    for part in ("generate", "score", "update", "sync"):
        note(f"8B, {prompts} x {group} x {completion} tokens, {part}: {logged[f'time/{part}_s'][-1][1]:.1f} s")
    assert max(value for _, value in logged["mismatch/logprob_abs_mean"]) < 0.1  # after updates too
    checkpoint = run / "checkpoints" / "epoch_00001.ckpt"
    size = sum(file.stat().st_size for file in checkpoint.rglob("*")) / 1e9
    if DEVICE.type == "cuda":
        assert size == pytest.approx(12 * 8.191, rel=0.02)  # weights and AdamW's two, in float32
    plan, _ = planned(*settings)
    took = max(peak_recorder.peaks(tmp_path / "peak"))
    note(f"8B: an update takes {took:.1f} GB of each GPU, planned {plan:.1f}; a checkpoint {size:.0f} GB")
    assert 0.7 * plan < took < 1.05 * plan or (TWIN and 0.2 * plan < took < 3 * plan)

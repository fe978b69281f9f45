"""`aspo` on one GPU: in each precision and strategy, resumed and evaluated; its memory against the plan; its probe."""

import json
import math
import re

import pytest
import torch

pytest.importorskip("jsonargparse", reason="the package isn't installed with what it needs: scripts/install.sh")

from transformers import Qwen2ForCausalLM

from aspo_lightning.run.curves import read_run
from tests.support import peak_recorder
from tests.support.commands import aspo
from tests.support.configs import tiny_config, write_config
from tests.support.gpu import TWIN, on
from tests.support.models import save_tokenizer
from tests.support.published_models import R1_DISTILL

STRATEGY = "--trainer.strategy"
SHARDED = [STRATEGY, "FSDP2Strategy"]
ENGINES = {
    "transformers": {"class_path": "TransformersEngine", "init_args": {"batch_size": 16}},
    "transformers, 16 bits": {"class_path": "TransformersEngine", "init_args": {"dtype": "bfloat16"}},
    "vllm": {"class_path": "VLLMEngine", "init_args": {"kv_cache_gib": 0.05, "enforce_eager": True}},
}
BF16 = "--trainer.precision=bf16-mixed"
# Name: (engine, flags, allowed of the mean |log-prob difference| between engine and trainer)
WAYS = {
    "32-true": ("transformers", [], 1e-4),
    "bf16-mixed": ("transformers", [BF16, "--model.gradient_checkpointing=true"], 0.1),
    "fsdp2": ("transformers", [STRATEGY, "fsdp2"], 1e-4),
    "fsdp2, bf16-mixed, reduce_each": (
        "transformers",
        [BF16, *SHARDED, f"{STRATEGY}.reduce_each_micro_batch=true"],
        0.1,
    ),
    "fsdp2, bf16-mixed, cpu_offload": ("transformers", [BF16, *SHARDED, f"{STRATEGY}.cpu_offload=true"], 0.1),
    "vllm": ("vllm", [], 0.1),
    "vllm, fsdp2, bf16-mixed": ("vllm", [BF16, STRATEGY, "fsdp2"], 0.1),
}


def marked(names):
    return [pytest.param(name, marks=[pytest.mark.vllm] if name.startswith("vllm") else []) for name in names]


def config(model, folder, device, engine, **data):
    made = tiny_config(model, folder, engine=ENGINES[engine], no_spread="keep", **data)
    made["model"]["optimizer"]["init_args"]["lr"] = 1e-4
    made["trainer"].update(accelerator="gpu" if device.type == "cuda" else "cpu", devices=1)
    return made


def called(*args, timeout=300):
    result = aspo(*args, timeout=timeout)
    assert result.returncode == 0, result.stderr[-5000:]
    return result.stdout


@pytest.mark.parametrize("way", marked(WAYS))
def test_a_run_trains_and_is_resumed_and_evaluated_in_shards(gpu, note, small_model, tmp_path, way):
    engine, flags, allowed = WAYS[way]
    settings = ["--config", write_config(tmp_path / "config.yaml", config(small_model, tmp_path, gpu, engine)), *flags]
    called("fit", *settings)
    run = tmp_path / "tiny" / "version_0"
    before = read_run(run)
    called("fit", *settings, "--ckpt_path", "last", "--trainer.max_epochs", "3")
    assert [path.name for path in run.parent.iterdir()] == ["version_0"]
    after = read_run(run)
    assert [step for step, _ in after["policy/loss"]] == [1, 3, 5]
    assert after["policy/loss"][:2] == before["policy/loss"]
    assert all(0 < norm < math.inf for _, norm in after["policy/grad_norm"])
    kl = [value for _, value in after["policy/kl"]]
    assert kl[0] < kl[1] < kl[2]  # ever farther from the reference, when resumed too
    difference = [value for _, value in after["mismatch/logprob_abs_mean"]]
    note(f"{way}: mean |log-prob difference| of engine and trainer {' '.join(f'{x:.2g}' for x in difference)}")
    assert max(difference) < allowed
    if "fsdp2" not in way:
        return
    called("test", *settings, "--model", str(run), "--out", str(tmp_path / "out"))
    problems = json.loads((tmp_path / "out" / "result.json").read_text())["benchmarks"]["sums"]["problems"]
    assert len(problems) == 5


@pytest.mark.parametrize("engine", marked(["transformers, 16 bits", "vllm"]))
def test_the_probe_lets_fifty_phases_pass_in_which_nothing_changes(gpu, small_model, tmp_path, engine):
    made = config(small_model, tmp_path, gpu, engine, prompts_per_phase=2, group_size=2, optimizer_steps=1)
    made["model"]["optimizer"]["init_args"]["lr"] = 0.0
    made["trainer"].update(max_epochs=50, precision="bf16-mixed", limit_val_batches=0)
    called("fit", "--config", write_config(tmp_path / "config.yaml", made))
    assert len(read_run(tmp_path / "tiny" / "version_0")["policy/loss"]) == 50


def planned(*settings) -> tuple[float, bool]:
    """GB of an update by `aspo plan`, and whether all fits."""
    result = aspo("plan", *settings)
    return float(re.search(r"^together +([\d.]+)", result.stdout, re.MULTILINE)[1]), result.returncode == 0


def test_an_update_of_a_model_of_1_5_billion_takes_what_the_plan_says(gpu, note, small_model, tmp_path):
    model = small_model
    if gpu.type == "cuda":
        model = str(tmp_path / "model")
        torch.manual_seed(0)
        with gpu:
            Qwen2ForCausalLM(R1_DISTILL).to(torch.bfloat16).save_pretrained(model)
        torch.cuda.empty_cache()  # another process needs it
        save_tokenizer(model)
    prompt, completion = 24, on(1024, 64)
    data = {"prompts_per_phase": 2, "optimizer_steps": 1, "max_prompt_length": prompt}
    data |= {"max_completion_length": completion, "token_budget": 8 * (prompt + completion)}
    made = config(model, tmp_path, gpu, "transformers", **data)
    made["model"]["gradient_checkpointing"] = True
    made["trainer"].update(precision="bf16-mixed", limit_val_batches=0, enable_checkpointing=False)
    made["trainer"]["callbacks"] = [peak_recorder.callback(tmp_path / "peak")]
    settings = ["--config", write_config(tmp_path / "config.yaml", made)]
    there = torch.cuda.get_device_properties(gpu).total_memory / 1e9 if gpu.type == "cuda" else 1000
    plan, fits = planned(*settings, "--gpu-memory", str(there))
    if not fits:
        pytest.skip(f"by its plan it takes {plan:.0f} GB, and this GPU has {there:.0f}")
    called("fit", *settings, timeout=400)
    (took,) = peak_recorder.peaks(tmp_path / "peak")
    note(f"an update of {data['token_budget']} tokens takes {took:.2f} GB, planned {plan:.2f}")
    assert 0.7 * plan < took < 1.05 * plan or (TWIN and 0.3 * plan < took < 2 * plan)

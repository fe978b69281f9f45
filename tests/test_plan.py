"""`aspo plan`: parts by hand, the paper's recipes on the paper's hardware, and what it says when they don't fit."""

import re
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from aspo_lightning.cli.main import main
from aspo_lightning.cli.memory import activations, optimizer_states
from tests.support.commands import ROOT, aspo_here
from tests.support.models import save_model
from tests.support.published_models import MODELS

SERVED = ["--data.lag", "1", "--data.engine", "VLLMServers", "--data.engine.urls", "[http://127.0.0.1:8001]"]


@pytest.fixture
def planned(parsers, monkeypatch, capsys):
    """Calls `aspo plan`: (GB by part in an update and in sampling, all that was printed, exit code)."""

    def call(*args: str) -> tuple[dict[str, tuple[float, float]], str, int]:
        monkeypatch.setattr(sys, "argv", ["aspo", "plan", *args])
        monkeypatch.chdir(ROOT)
        code = 0
        try:
            main()
        except SystemExit as exit:
            code = exit.code
        text = capsys.readouterr().out
        rows = re.findall(r"^(\D+?)  +([\d.]+|-) +([\d.]+|-)$", text, re.MULTILINE)
        return {name: tuple(0.0 if c == "-" else float(c) for c in cells) for name, *cells in rows}, text, code

    return call


@pytest.mark.parametrize("twin", [[], ["--config", "configs/objectives/grpo.yaml"]], ids=["aspo", "grpo"])
@pytest.mark.parametrize("recipe", sorted(p.stem for p in (ROOT / "configs" / "recipes").iterdir()))
def test_recipes_fit_the_papers_hardware(recipe, twin, planned, tmp_path, monkeypatch):
    config, parameters = MODELS[recipe]
    config.save_pretrained(tmp_path)
    args = ["--config", f"configs/recipes/{recipe}.yaml", *twin, "--model.model_name_or_path", str(tmp_path)]
    parts, text, code = planned(*args, "--gpu-memory", "80")
    assert code == 0, text
    gpus = 32 if recipe == "qwen3_30b_a3b" else 8
    assert f"on {gpus} GPUs, fsdp2" in text
    # Float32 weights, as many gradients and twice as much of AdamW's, over all GPUs.
    for name, copies in (("weights", 1), ("gradients", 1), ("optimizer", 2), ("reference", 1)):
        assert parts[name][0] == pytest.approx(copies * 4 * parameters / gpus, abs=0.01), name
    split = 4 if gpus == 32 else 1
    assert parts["engine's weights"] == (0, pytest.approx(2 * parameters / split, abs=0.01))
    # vLLM has what the trainer leaves free while it samples: all but shards, libraries and what is in pieces.
    share = share_of(recipe)
    engine = ("engine's weights", "sampler", "KV cache", "asleep engine")
    assert sum(parts[name][1] for name in engine) == pytest.approx(80 * share, abs=0.03)
    free = 80 - sum(cells[1] for name, cells in parts.items() if name not in (*engine, "together"))
    assert 80 * share <= free < 80 * (share + 0.05) + 0.1
    assert "it can have" not in text
    assert parts["asleep engine"] == (2, 2)
    allocated = parts["together"][0] - 3 - 2 - parts["fragmentation"][0]
    assert parts["fragmentation"][0] == pytest.approx(0.1 * allocated, abs=0.02)
    assert f"asked for {1024 * split // gpus} completions" in text
    for column in (0, 1):
        together = sum(cells[column] for name, cells in parts.items() if name != "together")
        assert parts["together"][column] == pytest.approx(together, abs=0.1)
        assert together < 80
    (fits,) = re.findall(r"Fits: ([\d.]+) of 80.0 GB", text)
    assert float(fits) == pytest.approx(max(parts["together"]), abs=0.06)
    assert "--data.lag 1 an epoch would take" in text
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    parts, text, code = planned(*args, "--gpu-memory", "80", *SERVED)
    assert code == 0, text
    assert "engine's weights" not in parts
    assert "With data.lag 1 or more servers sample while it trains" in text


def test_what_a_lag_would_bring_is_told_by_hand_here(planned, tmp_path, monkeypatch):
    config, billions = MODELS["qwen3_8b"]
    parameters = 1e9 * billions
    config.save_pretrained(tmp_path)
    args = ["--config", "configs/recipes/qwen3_8b.yaml", "--model.model_name_or_path", str(tmp_path)]
    args += ["--gpu-memory", "80", "--data.max_completion_length", "6000", "--model.kl_coef", "0.1"]
    args += ["--model.gradient_checkpointing", "true", "--data.optimizer_steps", "4"]
    _, text, _ = planned(*args)
    # 64 x 16 completions of 3,000 tokens on average. An embedding isn't multiplied with; 151,936 x 4,096.
    multiplied, tokens = parameters - 151_936 * 4096, 1024 * 3000
    attention = 2000 / (6 * 4096)  # a token is of a completion of 4,000 on average, and sees half of it
    flops = multiplied * tokens * (1 + attention) * (6 + 2 + 2 + 3 / 4 * 2)  # recomputed; the reference; 3 steps of 4
    # 36 layers with 8 heads of 128, keys and values of 2 bytes.
    weights, kv = 6000 * 2 * parameters, 1024 * 6000**2 / 6 * 2 * 36 * 8 * 128 * 2
    training = [flops / n / (0.4 * 989e12) for n in range(1, 9)]
    sampling = [(weights + kv / n) / (0.6 * 3.35e12) for n in range(1, 9)]
    assert f"trains for {training[7] / 60:.1f} min on 8 GPUs, and samples for {sampling[7] / 60:.1f} min" in text
    ahead, servers = min((max(sampling[n - 1], training[7 - n]), n) for n in range(1, 8))
    together = training[7] + sampling[7]
    assert f"servers on {servers} of them and --data.lag 1 an epoch would take {ahead / 60:.1f} min" in text
    assert f"in place of {together / 60:.1f} min: {ahead / together:.2f}" in text

    monkeypatch.setenv("VLLM_API_KEY", "secret")
    _, text, code = planned(*args, *SERVED)
    assert code == 0, text
    enough = next(n for n in range(1, 100) if (weights + kv / n) / (0.6 * 3.35e12) <= training[7])
    assert (
        f"With data.lag 1 or more servers sample while it trains; to be done as soon, they need {enough} GPUs" in text
    )


def test_an_unsharded_reference_has_16_bit_layers_in_mixed_precision(planned, tmp_path):
    config, parameters = MODELS["qwen3_4b"]
    config.save_pretrained(tmp_path)
    args = ["--config", "configs/recipes/qwen3_4b.yaml", "--model.model_name_or_path", str(tmp_path)]
    parts, _, _ = planned(*args, "--trainer.strategy", "ddp")
    embedding = config.vocab_size * config.hidden_size / 1e9  # the head's too
    norms = parameters - embedding
    layer = 2560 * (2 * 4096 + 2 * 1024 + 3 * 9728)
    assert norms - 36 * layer / 1e9 == pytest.approx(0, abs=0.001)
    assert parts["reference"][0] == pytest.approx(2 * 36 * layer / 1e9 + 4 * embedding, abs=0.01)


def share_of(recipe: str) -> float:
    config = yaml.safe_load((ROOT / "configs" / "recipes" / f"{recipe}.yaml").read_text())
    return config["data"]["engine"]["init_args"]["gpu_memory_utilization"]


def test_the_share_that_is_free_for_the_engine_is_suggested(planned, tmp_path):
    MODELS["qwen3_8b"][0].save_pretrained(tmp_path)
    args = ["--config", "configs/recipes/qwen3_8b.yaml", "--model.model_name_or_path", str(tmp_path)]
    share = share_of("qwen3_8b")
    (room,) = re.findall(r"room for ([\d.]+) sequences", planned(*args)[1])
    parts, text, code = planned(*args, "--data.engine.gpu_memory_utilization", "0.4")
    assert code == 0
    assert (
        f"can have {share} of the GPU (--data.engine.gpu_memory_utilization {share}, now 0.4): room for {room}" in text
    )
    # 36 layers x 8 heads x 128 x key and value x 2 bytes: 147 kB a token, 1.21 GB for 8,192 tokens.
    assert float(room) == pytest.approx((parts["KV cache"][1] + (share - 0.4) * 80) / 1.208, abs=0.1)
    _, text, code = planned(*args, "--data.engine.gpu_memory_utilization", "0.8")
    assert code == 1
    assert "sampling takes" in text
    assert re.search(rf"--data.engine.gpu_memory_utilization {share} +[\d.]+ GB, fits", text)
    parts, _, _ = planned(*args, "--data.engine.enforce_eager", "true")
    assert parts["asleep engine"] == (1, 1)  # no CUDA graphs


def test_what_doesnt_fit_is_told_with_what_would_help(planned, tmp_path):
    MODELS["qwen3_8b"][0].save_pretrained(tmp_path)
    args = ["--config", "configs/recipes/qwen3_8b.yaml", "--model.model_name_or_path", str(tmp_path)]
    parts, text, code = planned(*args, "--trainer.devices", "2")
    assert code == 1
    short = parts["together"][0] - 80
    assert short == pytest.approx(4 * 8.191 * 5 / 2 - 80 + sum_of(parts), abs=0.1)
    assert f"an update takes {parts['together'][0]:.1f} GB, {short:.1f} more than there are" in text
    assert re.search(r"--trainer.strategy.cpu_offload true +[\d.]+ GB, fits", text)
    assert re.search(r"--model.lora_rank 32 +[\d.]+ GB, fits", text)


@pytest.mark.parametrize("strategy", ["fsdp2", "FSDP2Strategy", "ddp"])
def test_what_is_advised_can_be_typed_and_does_what_it_says(strategy, planned, tmp_path):
    MODELS["qwen3_4b"][0].save_pretrained(tmp_path)
    args = ["--config", "configs/recipes/qwen3_4b.yaml", "--model.model_name_or_path", str(tmp_path)]
    args += ["--trainer.strategy", strategy, "--gpu-memory", "42", "--model.gradient_checkpointing", "false"]
    args += ["--trainer.precision", "32-true", "--data.token_budget", "12000"]
    _, text, code = planned(*args)
    assert code == 1
    advice = re.findall(r"^  (--.+?)  +([\d.]+) GB(, fits)?$", text, re.MULTILINE)
    assert len(advice) >= 5
    for change, peak, fits in advice:
        parts, _, code = planned(*args, *change.split())
        assert max(parts["together"]) == pytest.approx(float(peak), abs=0.06), change
        assert (code == 0) == bool(fits), change


def sum_of(parts):
    sharded = ("weights", "gradients", "optimizer", "reference", "together")
    return sum(cells[0] for name, cells in parts.items() if name not in sharded)


def test_a_cache_too_small_for_one_sequence_is_told(planned, tmp_path):
    MODELS["math_1.5b"][0].save_pretrained(tmp_path)
    args = ["--config", "configs/recipes/math_1.5b.yaml", "--model.model_name_or_path", str(tmp_path)]
    # 28 layers x 2 heads x 128 x key and value x 2 bytes: 28.7 kB a token, 0.998 GB for 34,816 tokens.
    assert "room for 2.2 sequences" in planned(*args, "--data.engine.kv_cache_gib", "2")[1]
    _, text, code = planned(*args, "--data.engine.kv_cache_gib", "0.5")
    assert code == 1
    assert "no room for one sequence of full length" in text


def test_activations_are_those_of_a_real_forward_pass(tmp_path):
    save_model(tmp_path, hidden_size=256, intermediate_size=512, num_hidden_layers=4)
    lm = AutoModelForCausalLM.from_pretrained(tmp_path)
    own = {p.untyped_storage().data_ptr() for p in lm.parameters()}
    kept = {}
    tensors = []

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            tensors.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        lm.base_model(input_ids=torch.zeros(1, 512, dtype=torch.long), use_cache=False)
    # In float32 the norms' conversions to float32 are no copies.
    assert activations(str(tmp_path), 512, 4) == pytest.approx(sum(kept.values()), rel=0.15)


@pytest.mark.parametrize(
    ("make", "states"),
    [
        (torch.optim.AdamW, 2),
        (lambda p: torch.optim.SGD(p, lr=0.1), 0),
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), 1),
        (lambda p: torch.optim.AdamW(p, amsgrad=True), 3),
    ],
)
def test_optimizer_states_are_counted_on_a_real_one(make, states):
    assert optimizer_states(make) == states


def test_bad_settings_are_one_line(monkeypatch, tmp_path):
    MODELS["qwen3_30b_a3b"][0].save_pretrained(tmp_path)
    recipe = ["plan", "--config", "configs/recipes/qwen3_30b_a3b.yaml", "--model.model_name_or_path", str(tmp_path)]
    assert "must divide them" in aspo_here(monkeypatch, *recipe, "--data.engine.tensor_parallel_size", "5")
    assert "no_such" in aspo_here(monkeypatch, *recipe, "--model.no_such", "1")
    assert not Path("runs/qwen3_30b_a3b").exists()


def test_a_16_bit_engine_of_a_cpu_takes_half_but_for_its_packed_head(planned):
    args = ["--config", "configs/quickstart.yaml"]
    (full, _, _), (half, _, _) = planned(*args), planned(*args, "--data.engine.dtype", "bfloat16")
    assert half["engine's weights"][1] == pytest.approx(full["engine's weights"][1] / 2, abs=0.006)
    assert half["engine's packed head"] == full["engine's packed head"]

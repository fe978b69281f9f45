"""FSDP2 and LoRA as a user runs them: real processes over gloo, a vLLM engine on each rank, real checkpoints."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Gemma3TextConfig, Qwen3_5Config, Qwen3_5ForConditionalGeneration

from aspo_lightning.cli import export
from aspo_lightning.engines import SamplingRequest, VLLMEngine
from aspo_lightning.fsdp import source_dtype
from aspo_lightning.policy.settings import ModelSettings
from tests.support.commands import ASPO, aspo, aspo_here
from tests.support.models import save_model, save_tokenizer
from tests.support.processes import Group, eventually
from tests.support.rank_recorder import PROBE
from tests.support.ranks import Ranks
from tests.support.recorded_runs import SHARDED, RecordedRuns, distance, relative


@pytest.fixture(scope="module")
def untied_model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("untied")
    save_model(folder, tie_word_embeddings=False, hidden_size=256, intermediate_size=512)
    save_tokenizer(folder)
    return str(folder)


@pytest.fixture(scope="module")
def runs(tiny_model, tmp_path_factory):
    """`two` as a user starts it, by Lightning's own launcher; all others as a cluster does."""
    runs = RecordedRuns(tiny_model, tmp_path_factory.mktemp("sharded"))
    result = aspo(*runs.command("two", *SHARDED, "2"))
    assert result.returncode == 0, result.stderr[-5000:]
    return runs


@pytest.fixture(scope="module")
def lora_runs(untied_model, tmp_path_factory):
    runs = RecordedRuns(untied_model, tmp_path_factory.mktemp("lora"), lora_rank=2)
    runs.config["model"]["optimizer"]["init_args"]["lr"] = 1.0
    return runs


@pytest.fixture(scope="module")
def sparse_runs(tiny_model, tmp_path_factory):
    """Room for one sequence in a micro-batch: three sequences make 2 x 2 of them, one empty."""
    data = {"group_size": 3, "optimizer_steps": 1, "max_prompt_length": 8, "token_budget": 24}
    runs = RecordedRuns(tiny_model, tmp_path_factory.mktemp("sparse"), data)
    runs.config["data"]["prompts_per_phase"] = 1
    return runs


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    with Ranks(2, tmp_path_factory.mktemp("ranks")) as ranks:
        yield ranks


@pytest.fixture(scope="module")
def started(ranks, runs, lora_runs, sparse_runs):
    """All runs that finish well."""
    after_first = ["--ckpt_path", str(runs.checkpoint("two", 0))]
    for name, command in {
        "one": runs.command("one"),
        "sparse_one": sparse_runs.command("one"),
        "two_to_one": runs.command("two_to_one", *SHARDED, "1", *after_first, "--trainer.max_epochs", "2"),
    }.items():
        ranks.run(name, command, first=1)
    again = ["--ckpt_path", str(lora_runs.checkpoint("two", 1))]
    for name, command in {
        "two_to_two": runs.command("two_to_two", *SHARDED, "2", *after_first),
        "one_to_two": runs.command("one_to_two", *SHARDED, "2", "--ckpt_path", str(runs.checkpoint("two_to_one", 1))),
        "shared": runs.command("shared", *SHARDED, "2", "--data.engine.init_args.tensor_parallel_size", "2"),
        "sparse_two": sparse_runs.command("two", *SHARDED, "2"),
        "lora_two": lora_runs.command("two", *SHARDED, "2"),
        "lora_again": lora_runs.command("again", *SHARDED, "2", *again),
    }.items():
        ranks.run(name, command)


@pytest.fixture(scope="module")
def one(runs, started):
    return runs.records("one")[0]


@pytest.fixture(scope="module")
def two(runs, started):
    return runs.records("two")


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


def test_shards_are_cast_before_they_are_gathered(two, lora_runs):
    lora = lora_runs.records("two")[0]
    for record in (two[0], lora):
        assert list(record["half"]) == list(record["weights"])
        for name, weight in record["weights"].items():
            assert torch.equal(record["half"][name], weight.bfloat16()), name
    assert set(two[0]["sent"]) == {torch.bfloat16}
    # What has an adapter is merged in full before.
    assert lora["sent"].count(torch.float32) == 3 * 2 * sum(name.endswith("_proj.weight") for name in lora["weights"])


def test_ranks_that_share_an_engine_do_the_same(runs, one, two):
    for record in runs.records("shared"):
        assert [p["completions"] for p in record["phases"]] == [p["completions"] for p in one["phases"]]
        assert max(record["probes"]) < 1e-4
    assert distance(runs.records("shared")[0]["weights"], one["weights"]) < 1e-5


def test_checkpoints_go_on_on_any_number_of_ranks(runs, one, two):
    again = runs.records("two_to_two")
    for name, weight in two[0]["weights"].items():
        assert torch.equal(again[0]["weights"][name], weight)
    last = runs.records("one_to_two")  # from two ranks over one to two
    assert last[0]["phases"][0]["completions"] == one["phases"][2]["completions"]
    assert distance(last[0]["weights"], one["weights"]) < 1e-5


def test_a_sharded_checkpoint_holds_the_policy_alone_and_says_what_it_needs(runs, two, monkeypatch):
    folder = runs.checkpoint("two", 2)
    assert {"meta.pt", ".metadata"} < {path.name for path in folder.iterdir()}
    from torch.distributed.checkpoint import FileSystemReader

    metadata = FileSystemReader(folder).read_metadata().state_dict_metadata
    assert {key for key in metadata if key.startswith("state_dict.")} == {
        f"state_dict.policy.lm.{name}" for name in [*two[0]["weights"], "lm_head.weight"]
    }
    assert aspo_here(monkeypatch, *runs.command("refused", "--ckpt_path", str(folder))).endswith(
        "Resume from it with --trainer.strategy fsdp2, on any number of ranks (--trainer.devices 1 too)."
    )


def test_each_rank_brings_its_own_shards_to_the_disk(runs, two):
    files = {path.name for path in runs.checkpoint("two", 2).iterdir()}
    for rank, record in enumerate(two):
        shards = {name for name in record["synced"] if name.endswith(".distcp")}
        assert shards == {name for name in files if name.startswith(f"__{rank}_")}
        assert len(shards) >= 1
    assert {".metadata", "meta.pt"} < set(two[0]["synced"])


@pytest.fixture(scope="module")
def half_model(tmp_path_factory) -> Path:
    """250 MB in bfloat16, twice that in float32."""
    folder = tmp_path_factory.mktemp("half")
    save_model(folder, tie_word_embeddings=False, hidden_size=1024, intermediate_size=4096, num_hidden_layers=8)
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


def test_the_first_rank_reads_a_model_in_its_own_dtype(ranks, half_model, tmp_path):
    ranks.run("load", [str(half_model), str(tmp_path)], module="tests.support.sharded_load")
    peaks = [float((tmp_path / f"peak_{rank}").read_text()) for rank in range(2)]
    megabytes = (half_model / "model.safetensors").stat().st_size / 1e6
    # Half of it as float32 shards, on the first rank beside all of it in bfloat16; and a tensor that is under way.
    assert peaks[0] < 2.3 * megabytes
    assert peaks[1] < 1.3 * megabytes
    stored = load_file(half_model / "model.safetensors")
    for rank in range(2):
        loaded = torch.load(tmp_path / f"rank_{rank}.pt")
        assert loaded.keys() == stored.keys()
        for name, weight in loaded.items():
            assert weight.dtype == torch.float32
            assert torch.equal(weight, stored[name].float())


def test_sharded_weights_have_the_names_of_the_hub(ranks, tmp_path):
    """Those of a language model that is published as part of one that sees."""
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 128}
    linear = {"num_value_heads": 4, "num_key_heads": 2, "key_head_dim": 8, "value_head_dim": 8}
    text = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, **heads}
    text |= {f"linear_{name}": size for name, size in linear.items()} | {"eos_token_id": 1, "pad_token_id": 0}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
    config = Qwen3_5Config(text_config=text, vision_config={**vision, "num_position_embeddings": 16})
    Qwen3_5ForConditionalGeneration(config).save_pretrained(tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    ranks.run("names", [str(tmp_path / "model"), str(tmp_path)], module="tests.support.sharded_load")
    stored = load_file(tmp_path / "model" / "model.safetensors")
    for rank in range(2):
        loaded = torch.load(tmp_path / f"rank_{rank}.pt")
        assert loaded.keys() == {name for name in stored if ".visual." not in name}
        for name, weight in loaded.items():
            assert torch.equal(weight, stored[name].float())


def test_a_model_is_read_in_fewer_bits_only_where_that_changes_nothing(half_model, tiny_model, tmp_path):
    assert source_dtype(str(half_model), ModelSettings(dtype="float32")) == torch.bfloat16
    assert source_dtype(str(half_model), ModelSettings(dtype="float64")) == torch.bfloat16
    assert source_dtype(tiny_model, ModelSettings(dtype="float32")) == torch.float32
    assert source_dtype(tiny_model, ModelSettings(dtype="bfloat16")) == torch.bfloat16
    # Gemma has a scale that is computed in the dtype that it is loaded in.
    sizes = {"vocab_size": 128, "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 1, "head_dim": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    Gemma3TextConfig(**sizes, **heads, dtype="bfloat16", architectures=["Gemma3ForCausalLM"]).save_pretrained(tmp_path)
    assert source_dtype(str(tmp_path), ModelSettings(dtype="float32")) == torch.float32


def plain_logprobs(folder: Path, prompt: tuple[int, ...], completion: tuple[int, ...], temperature=1.0):
    lm = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        logits = lm(input_ids=torch.tensor([[*prompt, *completion]])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None]).squeeze(1)


def check_export(run: Path, target: Path, record: dict) -> None:
    """The exported folder gives the live policy's log-probs in plain transformers, and in vLLM."""
    export.main([str(run), str(target)])
    ours = torch.cat([plain_logprobs(target, prompt, tuple(range(60, 70))) for prompt in PROBE])
    torch.testing.assert_close(ours, record["logprobs"], rtol=0, atol=1e-4)
    engine = VLLMEngine(kv_cache_gib=0.05)
    engine.start(str(target), context_length=64)
    completions = [c for _, c in sorted(engine.generate([SamplingRequest(p, 8, seed=3) for p in PROBE]))]
    engine.stop()
    for prompt, completion in zip(PROBE, completions, strict=True):
        theirs = plain_logprobs(target, prompt, completion.completion_ids)
        torch.testing.assert_close(torch.tensor(completion.generator_logprobs), theirs, rtol=0, atol=1e-4)


def test_exports_are_the_policy(runs, lora_runs, one, two, tmp_path):
    check_export(runs.checkpoint("one", 2), tmp_path / "full", one)
    check_export(runs.folder / "run_two" / "version_0", tmp_path / "sharded", two[0])
    check_export(lora_runs.checkpoint("two", 2), tmp_path / "lora", lora_runs.records("two")[0])


def test_an_export_overwrites_nothing_and_wants_a_checkpoint(runs, one, tmp_path, monkeypatch):
    (tmp_path / "notes.txt").write_text("mine")
    checkpoint = str(runs.checkpoint("one", 2))
    assert "not an empty folder" in aspo_here(monkeypatch, "export", checkpoint, str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    assert "neither a run's folder" in aspo_here(monkeypatch, "export", str(tmp_path), str(tmp_path / "out"))
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    assert "isn't a checkpoint of `aspo fit`" in aspo_here(
        monkeypatch, "export", str(tmp_path / "other.ckpt"), str(tmp_path / "out")
    )
    assert not (tmp_path / "out").exists()


def test_lora_on_two_ranks(untied_model, lora_runs, started):
    two, again = lora_runs.records("two"), lora_runs.records("again")
    assert max(two[0]["probes"] + two[1]["probes"]) < 1e-4  # merged weights reach the engine
    base = load_file(f"{untied_model}/model.safetensors")
    changed = {name for name, weight in two[0]["weights"].items() if not torch.equal(weight, base[name])}
    assert changed == {name for name in base if name.endswith("_proj.weight")}
    for name, weight in two[0]["weights"].items():
        assert torch.equal(again[0]["weights"][name], weight)
    # Nothing is apart from the reference before the first update, and something is after it.
    assert two[0]["phases"][0]["kl"] == 0
    assert two[0]["phases"][1]["kl"] > 1e-6
    size = sum(path.stat().st_size for path in lora_runs.checkpoint("two", 0).rglob("*"))
    assert size < 0.05 * sum(weight.numel() * 4 for weight in base.values())


def test_a_rank_without_sequences_takes_part(sparse_runs, started):
    (one,), (first, second) = sparse_runs.records("one"), sparse_runs.records("two")
    for ours, theirs in zip(first["phases"], second["phases"], strict=True):
        assert (ours["accumulate"], theirs["accumulate"]) == (2, 2)
    assert distance(first["weights"], one["weights"]) < 1e-5


@pytest.mark.parametrize(
    ("fault", "rank", "stuck", "reason"),
    [
        ("raise", 0, True, "rank 0 was told to fail"),
        ("raise", 1, False, "rank 1 was told to fail"),
        ("kill", 0, True, ""),
        ("kill", 1, False, "SIGKILL"),
        ("kill", 1, True, ""),
    ],
)
def test_when_a_rank_fails_all_end_soon_with_its_reason(runs, tmp_path, fault, rank, stuck, reason):
    engine = ["--data.engine", "TransformersEngine"]
    command = runs.command("fails", *SHARDED, "2", *engine, fault=fault, fault_rank=rank, stuck=stuck)
    with Group([ASPO, *command], tmp_path / "log") as run:
        assert run.wait(500) != 0
        assert eventually(lambda: not run.is_there(), 10), "a process was left over"
    assert reason in run.text

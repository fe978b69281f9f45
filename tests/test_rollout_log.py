"""What is kept of an epoch's completions: by hand, from real runs, over ranks, and when files are damaged."""

import gzip
from dataclasses import replace

import pytest
import torch
from transformers import AutoTokenizer

from aspo_lightning.errors import ConfigError, RunError
from aspo_lightning.objectives import ASPO, GRPO
from aspo_lightning.run.rollout_files import read_rollouts, rollout_files, rollout_path, write_rollouts
from aspo_lightning.run.rollout_log import RolloutLog, Trained, records, token_records
from aspo_lightning.types import MicroBatch, Phase, Prompt, Rollout, RolloutGroup, TrainedSequence
from tests.support.commands import aspo, aspo_forked
from tests.support.configs import tiny_config, write_config


def rollout(ids, reward=1.0, **settings):
    return Rollout(tuple(ids), (-1.0,) * len(ids), False, "text", reward, reward == 1, **settings)


PROMPT = Prompt("p0", (5, 6), "Q: how?", "how?", {"x.reward": 1.0}, {})


def micro_batch():
    """Responses 3 and 1 of a phase, of two tokens and one."""
    sequences = [((5, 6), (7, 8)), ((5, 6), (9,))]
    batch = MicroBatch.from_sequences(sequences, advantages=[1.0, -1.0], members=(3, 1))
    return replace(batch, old_logprobs=torch.tensor([-1.0, -2.0, -3.0]))


def test_ratios_and_clips_are_summed_by_sequence_over_micro_batches_and_passes():
    trained = Trained()
    entropy = torch.tensor([0.1, 0.2, 0.3])
    ratios = torch.tensor([[1.1, 1.5, 0.5], [2.0, 0.9, 0.9]])  # of two passes; beyond 1.2 and below 0.8 is clipped
    for ratio in ratios:
        trained.add(micro_batch(), micro_batch().old_logprobs + ratio.log(), entropy, GRPO())
    first = replace(micro_batch(), old_logprobs=None, members=(0, 2))  # the ratio is 1, whatever the log-probs
    trained.add(first, torch.tensor([-1.0, -2.0, -3.0]), entropy, ASPO())
    totals = trained.totals()
    assert totals == {
        3: pytest.approx([1.1 + 1.5 + 2.0 + 0.9, 2, 4]),
        1: pytest.approx([0.5 + 0.9, 1, 2]),
        0: [2, 0, 2],
        2: [1, 0, 1],
    }


def test_the_tokens_kept_are_those_of_the_last_micro_batch(tiny_model):
    trained = Trained()
    assert token_records(trained, AutoTokenizer.from_pretrained(tiny_model)) == {}
    ratio, entropy = torch.tensor([1.1, 1.5, 0.5]), torch.tensor([0.25, 0.5, 0.75])
    trained.add(replace(micro_batch(), members=(8, 9)), torch.zeros(3), entropy, ASPO())
    trained.add(micro_batch(), micro_batch().old_logprobs + ratio.log(), entropy, ASPO())
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokens = token_records(trained, tokenizer)
    seven, eight, nine = (tokenizer.decode([token]) for token in (7, 8, 9))
    assert tokens == {
        3: {
            "text": [seven, eight],
            "ratio": pytest.approx([1.1, 1.5]),
            "entropy": [0.25, 0.5],
        },
        1: {"text": [nine], "ratio": pytest.approx([0.5]), "entropy": [0.75]},
    }


def test_a_record_has_what_became_of_a_completion():
    kept = rollout((7, 8), rewards={"x.reward": 1.0}, turns=2, sampled=(True, False), repetition_rate=0.5)
    other = replace(kept)  # an equal one
    unused = rollout((9,), reward=0.0, failed=True)
    groups = [RolloutGroup(PROMPT, (kept, other)), RolloutGroup(PROMPT.renamed("p1"), (unused,))]
    phase = Phase(4, [], 1, groups, trained=[TrainedSequence((5, 6), kept, 0.5), TrainedSequence((5, 6), other, -0.5)])
    tokens = {1: {"text": ["a"], "ratio": [2.0], "entropy": [0.1]}}
    first, second, third = records(phase, {0: [3.0, 1.0, 2.0], 1: [2.0, 0.0, 1.0]}, tokens)
    assert first == {
        "prompt_id": "p0",
        "sample": 0,
        "question": "how?",
        "completion": "text",
        "reward": 1.0,
        "rewards": {"x.reward": 1.0},
        "advantage": 0.5,
        "solved": True,
        "truncated": False,
        "failed": False,
        "turns": 2,
        "length": 1,
        "repetition_rate": 0.5,
        "ratio": 1.5,
        "clipped": 0.5,
        "tokens": None,
    }
    assert (second["sample"], second["advantage"], second["ratio"], second["tokens"]) == (1, -0.5, 2.0, tokens[1])
    assert (third["prompt_id"], third["failed"], third["solved"]) == ("p1", True, False)
    assert (third["advantage"], third["ratio"], third["clipped"]) == (None, None, None)


def record(completion="text"):
    phase = Phase(0, [], 1, [RolloutGroup(PROMPT, (replace(rollout((7,)), text=completion),))])
    return list(records(phase, {}, {}))


@pytest.mark.parametrize("text", ["<script>", "\x00\r\n\u2028", "\ud800 half of a pair", "مرحبا \u202e", "x" * 2**20])
def test_whatever_a_model_writes_is_read_as_it_was(text, tmp_path):
    path = rollout_path(tmp_path, 7)
    write_rollouts(path, record(text))
    assert path.name == "epoch_00007.jsonl.gz"
    assert list(read_rollouts(path)) == record(text)
    assert len(gzip.decompress(path.read_bytes()).splitlines()) == 1


def test_the_same_records_make_the_same_bytes_and_nothing_else_is_left(tmp_path):
    for epoch in (0, 1):
        write_rollouts(rollout_path(tmp_path, epoch), record())
    first, second = rollout_files(tmp_path).values()
    assert first.read_bytes() == second.read_bytes()
    assert len(list((tmp_path / "rollouts").iterdir())) == 2


@pytest.mark.parametrize("damage", ["cut off", "not gzip", "not json"])
def test_a_damaged_file_is_named(damage, tmp_path):
    path = rollout_path(tmp_path, 0)
    write_rollouts(path, record() * 50)
    whole = path.read_bytes()
    path.write_bytes(
        {"cut off": whole[: len(whole) // 2], "not gzip": b"{}", "not json": gzip.compress(b"{\n")}[damage]
    )
    with pytest.raises(RunError, match=r"epoch_00000.jsonl.gz is damaged: .* Remove it to see the others\.$"):
        list(read_rollouts(path))


@pytest.mark.parametrize("settings", [{"every_n_epochs": -1}, {"keep": 0}])
def test_settings_that_make_no_sense_are_refused(settings):
    with pytest.raises(ConfigError, match="rollout_log.every_n_epochs is"):
        RolloutLog(**settings)


def run(aspo, tiny_model, folder, *arguments):
    config = tiny_config(tiny_model, folder, engine={"class_path": "TransformersEngine"}, passes=2)
    config["trainer"] |= {"max_epochs": 3, "limit_val_batches": 0, "logger": False}
    result = aspo("fit", "--config", write_config(folder / "config.yaml", config), *arguments)
    assert result.returncode == 0, result.stderr[-3000:]
    return folder / "tiny" / "version_0"


def test_a_run_keeps_its_newest_completions(tiny_model, tmp_path):
    """On two ranks: each knows the ratios of its own micro-batches."""
    folder = run(
        aspo, tiny_model, tmp_path, "--rollout_log.keep", "2", "--trainer.devices", "2", "--trainer.strategy", "ddp"
    )
    files = rollout_files(folder)
    assert list(files) == [1, 2]
    for path in files.values():
        found = list(read_rollouts(path))
        places = [(r["prompt_id"], r["sample"]) for r in found]
        assert places == [(found[4 * group]["prompt_id"], sample) for group in range(4) for sample in range(4)]
        trained = [r for r in found if r["advantage"] is not None]
        assert 4 <= len(trained) <= 16
        for r in trained:
            assert r["ratio"] > 0
            assert 0 <= r["clipped"] <= 1
            assert r["reward"] == r["rewards"]["tests.support.rewards.parity"] == float(ord(r["completion"][0]) % 2)
        groups = [trained[i : i + 4] for i in range(0, len(trained), 4)]
        assert all(sum(r["advantage"] for r in group) == pytest.approx(0, abs=1e-5) for group in groups)
        assert any(r["ratio"] != 1 for r in trained)
        shown = [r for r in trained if r["tokens"]]
        assert 0 < len(shown) < len(trained)
        for r in shown:
            tokens = r["tokens"]
            assert len(tokens["text"]) == len(tokens["ratio"]) == len(tokens["entropy"]) == r["length"]
            assert "".join(tokens["text"]).startswith(r["completion"][:1])


def test_they_can_be_kept_now_and_then_or_not_at_all(tiny_model, tmp_path):
    for n, epochs in (("2", [0, 2]), ("0", [])):
        (tmp_path / n).mkdir()
        folder = run(aspo_forked, tiny_model, tmp_path / n, "--rollout_log.every_n_epochs", n)
        assert list(rollout_files(folder)) == epochs
        assert (folder / "rollouts").exists() == bool(epochs)

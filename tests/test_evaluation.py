"""Evaluations: what is measured, what is kept, and that nothing but the model and the settings decides it."""

import json
import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aspo_lightning.cli.export import load_policy
from aspo_lightning.errors import ConfigError
from aspo_lightning.evaluation.metrics import measure
from aspo_lightning.evaluation.results import COMPLETIONS, RESULT, TABLE, FileJournal, Results, check_folder, read_known
from aspo_lightning.identity import weights_digest
from aspo_lightning.policy.weights import full_weights
from aspo_lightning.run.curves import read_run
from aspo_lightning.types import Prompt, Rollout, RolloutGroup
from tests.support.commands import aspo_forked, aspo_here
from tests.support.configs import tiny_config, write_config
from tests.support.processes import eventually
from tests.support.ranks import Ranks

SETTINGS = {"seed": 0, "benchmarks": {"sums": {"samples": 2}}}


def group(i, rewards, answers, lengths):
    prompt = Prompt(f"p{i}", (5, 6), "?", "?", {"x.reward": 1.0}, {})
    rollouts = tuple(
        Rollout((7,) * n, (-1.0,) * n, n == 9, "a b", reward, reward == 1, answer=answer, repetition_rate=n / 10)
        for reward, answer, n in zip(rewards, answers, lengths, strict=True)
    )
    return RolloutGroup(prompt, rollouts)


def test_measurements_by_hand():
    groups = [
        group(0, [1.0, 0.99, 1.0, 0.0], ["4", "5", "4", "5"], [1, 2, 3, 4]),
        group(1, [0.0, 0.0, 0.0, 0.0], ["1", "1", None, "2"], [9, 9, 9, 5]),
    ]
    found = {name: m.value for name, m in measure(groups, [2]).items()}
    assert found == pytest.approx(
        {
            "avg@4": (2 / 4 + 0) / 2,
            "pass@2": (1 - 1 / 6) / 2,  # of the six pairs of the first problem one has no solution
            "maj@2": (1 / 6 + 4 / 6 / 2) / 2,  # both right: won; one of each: a draw
            "pass@4": 1 / 2,
            "maj@4": 1 / 4,  # two against two
            "length": (2.5 + 8) / 2,
            "truncated_fraction": 3 / 8,
            "repetition_rate": (0.25 + 0.8) / 2,
            "failed_rewards": 0,
        }
    )
    low, high = measure(groups)["avg@4"][1:]
    assert (low, high) == (0.0, 0.5)


def test_without_answers_there_is_no_vote():
    assert not any(name.startswith("maj") for name in measure([group(0, [1.0, 0.0], [None, None], [1, 1])]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_weights_digest_sees_every_bit(dtype):
    torch.manual_seed(0)
    weights = [("a", torch.randn(5, 7).to(dtype)), ("b", torch.randn(4).to(dtype))]
    digest = weights_digest(weights)
    assert digest == weights_digest([(name, tensor.clone()) for name, tensor in weights])
    bits = weights[0][1].view(torch.int16)
    bits[2, 3] ^= 1
    assert weights_digest(weights) != digest
    bits[2, 3] ^= 1
    row = weights[0][1][1].clone()
    weights[0][1][1] = weights[0][1][3]
    weights[0][1][3] = row
    assert weights_digest(weights) != digest


@given(cut=st.floats(0, 1), text=st.text())
def test_a_journal_torn_anywhere_keeps_what_came_before(tmp_path_factory, cut, text):
    folder = tmp_path_factory.mktemp("torn")
    journal = Results(folder, SETTINGS).journal("sums")
    records = [{"completion": {"ids": [i], "turns": [text]}} for i in range(4)]
    ends = []
    path = folder / "journal" / "rank_0.jsonl"
    for i, record in enumerate(records):
        journal.add("p", i, **record)
        ends.append(path.stat().st_size)
    length = int(cut * ends[-1])
    os.truncate(path, length)
    whole = sum(end <= length for end in ends)
    known = Results(folder, SETTINGS).journal("sums")
    assert [known.get("p", i) for i in range(4)] == records[:whole] + [{}] * (4 - whole)
    known.add("p", 3, reward=1.0)  # and what comes behind the tear is found again
    assert Results(folder, SETTINGS).journal("sums").get("p", 3)["reward"] == 1.0


def test_a_text_with_other_ends_of_lines_is_one_line(tmp_path):
    journal = FileJournal(tmp_path / "journal" / "rank_0.jsonl", "sums", {})
    journal.add("p", 0, answer="a\u2028b\x85c\x0bd")
    (tmp_path / COMPLETIONS).write_text(
        json.dumps({"benchmark": "sums", "id": "q", "sample": 1, "answer": "a\u2028b\x85c"}, ensure_ascii=False)
    )
    known = read_known(tmp_path)
    assert known == {("sums", "p", 0): {"answer": "a\u2028b\x85c\x0bd"}, ("sums", "q", 1): {"answer": "a\u2028b\x85c"}}


def test_other_results_are_not_touched(tmp_path):
    Results(tmp_path / "a", SETTINGS)
    check_folder(tmp_path / "a", SETTINGS)
    other = {"seed": 0, "benchmarks": {"sums": {"samples": 3}}}
    with pytest.raises(ConfigError, match="benchmarks.sums.samples is 2 there and 3 here"):
        Results(tmp_path / "a", other)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "thesis.tex").write_text("")
    with pytest.raises(ConfigError, match="holds something other than an evaluation"):
        Results(tmp_path / "b", SETTINGS)
    with pytest.raises(ConfigError, match="is a file"):
        Results(tmp_path / "b" / "thesis.tex", SETTINGS)
    assert FileJournal(tmp_path / "x", "sums", read_known(tmp_path / "a")).get("p", 0) == {}


@pytest.fixture(scope="module")
def trained(tiny_model, tmp_path_factory):
    """A run of a tiny model, evaluated before and behind it; and the config of that evaluation."""
    folder = tmp_path_factory.mktemp("evaluation")
    data = {"eval_group_size": 4, "eval_k": [2], "eval_max_completion_length": 24}
    config = tiny_config(tiny_model, folder, **data)
    rows = folder / "many.jsonl"
    rows.write_text("".join(json.dumps({"question": f"{i}+1", "answer": i + 1}) + "\n" for i in range(100, 124)))
    val = {"class_path": "Dataset", "init_args": {"path": str(rows), "reward": "tests.support.rewards.slow_parity"}}
    config["data"]["val"] = {"sums": val}
    config["data"]["engine"]["init_args"]["max_num_seqs"] = 8
    path = write_config(folder / "config.yaml", config)
    result = aspo_forked("fit", "--config", path)
    assert result.returncode == 0, result.stderr[-3000:]
    return folder, path, folder / "tiny" / "version_0"


def aspo_test(*args: str) -> str:
    result = aspo_forked("test", *args)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def files(folder: Path) -> dict[str, str]:
    return {name: (folder / name).read_text() for name in (RESULT, COMPLETIONS, TABLE)}


@pytest.fixture(scope="module")
def tested(trained):
    """The run's last checkpoint, evaluated by `aspo test`."""
    folder, config, run = trained
    out = folder / "tested"
    shown = aspo_test("--config", config, "--model", str(run), "--out", str(out))
    assert (out / TABLE).read_text() in shown
    return out


def test_a_checkpoint_scores_as_in_training_and_as_its_exported_folder(trained, tested):
    folder, config, run = trained
    exported = folder / "exported"
    assert aspo_forked("export", str(run), str(exported)).returncode == 0
    aspo_test("--config", config, "--model", str(exported), "--out", str(folder / "of_folder"))
    training = run / "eval" / "step_000004"
    results = [json.loads((f / RESULT).read_text()) for f in (training, tested, folder / "of_folder")]
    assert len({r["settings"]["weights"] for r in results}) == 1
    assert results[0]["benchmarks"] == results[1]["benchmarks"] == results[2]["benchmarks"]
    problems = results[0]["benchmarks"]["sums"]["problems"]
    assert [p["id"] for p in problems] == [f"many.jsonl/{i}" for i in range(1, 25)]
    assert all(len(p["rewards"]) == 4 for p in problems)
    assert all(p["solved"] == [reward == 1 for reward in p["rewards"]] for p in problems)
    assert 0 < sum(sum(p["rewards"]) for p in problems) < 96
    before = json.loads((run / "eval" / "step_000000" / RESULT).read_text())
    assert before["settings"]["weights"] != results[0]["settings"]["weights"]
    # The best weights are kept: there was one evaluation behind training.
    (best,) = (run / "best").glob("*.ckpt")
    policy, _ = load_policy(best)
    assert weights_digest(full_weights(policy.lm)) == results[0]["settings"]["weights"]
    # TensorBoard has the same numbers.
    curves = read_run(run)
    for name, m in results[0]["benchmarks"]["sums"]["measurements"].items():
        assert curves[f"eval/sums/{name}"][-1][1] == pytest.approx(m["value"])
    completions = [json.loads(line) for line in (tested / COMPLETIONS).read_text().splitlines()]
    assert [(c["id"], c["sample"]) for c in completions[:5]] == [
        *((f"many.jsonl/{1}", i) for i in range(4)),
        ("many.jsonl/2", 0),
    ]
    assert [c["reward"] for c in completions] == [r for p in problems for r in p["rewards"]]
    assert all(c["text"][:1] == (c["answer"] or "") for c in completions)
    assert any(len(c["completion"]["ids"]) > 16 for c in completions)  # longer than in training


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> Iterator[Ranks]:
    with Ranks(2, tmp_path_factory.mktemp("ranks")) as ranks:
        yield ranks


def test_killed_ten_times_the_result_is_the_same(trained, tested, ranks):
    folder, config, run = trained
    out = folder / "killed"
    command = ["test", "--config", config, "--model", str(run), "--out", str(out)]

    def size() -> int:
        return sum(file.stat().st_size for file in (out / "journal").glob("*.jsonl"))

    draw, sizes = random.Random(1), []
    for kill in range(10):
        enough = size() + draw.randrange(4000)
        (pid,) = ranks.start(f"kill_{kill}", command, first=1)
        assert eventually(lambda enough=enough: size() > enough, 100, every=0.0005), ranks.text(f"kill_{kill}")
        os.kill(pid, signal.SIGKILL)
        assert ranks.wait() == [-signal.SIGKILL], ranks.text(f"kill_{kill}")
        sizes.append(size())
    ranks.run("rest", command, first=1)
    ranks.run("again", command, first=1)
    shown = ranks.text("rest") + ranks.text("again")
    assert len(set(sizes)) == 10  # each time it had gone on
    assert files(out) == files(tested)  # and started once more it was only shown
    assert shown.count(files(tested)[TABLE]) == 2
    assert not (out / "journal").exists()


NCCL_TWIN = '{"class_path": "tests.support.nccl_twin.NCCLTwin"}'


@pytest.mark.parametrize(
    "settings",
    [["ddp"], [NCCL_TWIN], [NCCL_TWIN, "--trainer.inference_mode", "true"]],
    ids=["ddp", "sharded", "sharded in inference mode"],
)
def test_two_ranks_give_the_same_files_as_one(trained, tested, ranks, settings, request):
    folder, config, run = trained
    out = folder / request.node.name
    on_both = ["--trainer.devices", "2", "--trainer.strategy", *settings]
    ranks.run(out.name, ["test", "--config", config, "--model", str(run), "--out", str(out), *on_both])
    assert files(out) == files(tested)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--only", "[aime24, sums]"], "--only names aime24, but the tasks of data.val are sums"),
        (["--data.eval_k", "[5]"], "data.eval_k has 5, but sums is sampled 4 times a problem"),
        (["--data.eval_group_size", "{aime24: 4}"], "is given for aime24, but the tasks of data.val are sums"),
        (["--data.val", "{}"], "There is nothing to evaluate: data.val isn't set"),
        (
            ["--out", "TESTED", "--seed_everything", "7"],
            "holds results of another evaluation: benchmarks.sums.sampling.seed is 0 there and 7 here",
        ),
        (["--out", "MODEL"], "holds something other than an evaluation"),
        (["--model", "TORN"], "is damaged"),
        (["--best.monitor", "eval/other/avg@4"], "best.monitor is 'eval/other/avg@4'; known are eval/sums/avg@4"),
    ],
)
def test_bad_input_gets_one_clear_line(trained, tested, tiny_model, monkeypatch, args, message):
    folder, config, run = trained
    torn = folder / "torn.ckpt"
    torn.write_bytes((run / "checkpoints" / "epoch_00001.ckpt").read_bytes()[:5000])
    names = {"TESTED": str(tested), "MODEL": tiny_model, "TORN": str(torn)}
    before = files(tested)
    defaults = [] if "--model" in args else ["--model", str(run)]
    code = aspo_here(monkeypatch, "test", "--config", config, *defaults, *(names.get(a, a) for a in args))
    assert isinstance(code, str)
    assert message in code
    assert "\n" not in code
    assert files(tested) == before

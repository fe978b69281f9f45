"""Sampling ahead of the training (``data.lag``): against a plain loop that keeps old weights, and disturbed."""

import os
import random
import signal
import time
from collections.abc import Callable, Iterator

import pytest
import torch

from aspo_lightning.datamodule import RolloutDataModule
from aspo_lightning.engines import TransformersEngine
from aspo_lightning.errors import ConfigError
from aspo_lightning.run.curves import read_run
from tests.support.faulty_runs import EPOCHS, FaultyRuns, state
from tests.support.processes import eventually
from tests.support.ranks import Ranks
from tests.support.servers import Server, ready


@pytest.fixture(scope="module", autouse=True)
def token() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_API_KEY", "a-secret-of-these-tests")
        yield


@pytest.fixture(scope="module")
def server(tiny_model: str, quick_server: Callable[[str], Server]) -> Iterator[Server]:
    with ready(quick_server(tiny_model)) as (server,):
        yield server


def served(server: Server) -> dict:
    return {"class_path": "VLLMServers", "init_args": {"urls": [server.url]}}


def made_by_old_weights(lag: int) -> dict:
    engine = {"class_path": "tests.support.old_weights.OldWeights", "init_args": {"lag": lag, "kv_cache_gib": 0.05}}
    return {"engine": engine, "probe_factor": None}


@pytest.fixture(scope="module", params=[1, 2])
def ranks(request, tmp_path_factory) -> Iterator[Ranks]:
    with Ranks(request.param, tmp_path_factory.mktemp(f"ranks_{request.param}")) as ranks:
        yield ranks


class Moving(FaultyRuns):
    """Runs whose weights move so far in an epoch that those of another one sample other completions."""

    def __init__(self, ranks: Ranks, model: str, **data) -> None:
        super().__init__(ranks, model, **data)
        self.config["model"]["optimizer"]["init_args"]["lr"] = 1e-2


@pytest.mark.parametrize(("ranks", "lag"), [(1, 1), (2, 2)], indirect=["ranks"])
def test_a_lag_is_what_a_plain_loop_with_old_weights_makes(tiny_model, ranks, server, lag):
    runs = {
        "plain": Moving(ranks, tiny_model, **made_by_old_weights(lag)),
        "ahead": Moving(ranks, tiny_model, engine=served(server), lag=lag),
    }
    for name, run in runs.items():
        run.config["trainer"]["limit_val_batches"] = 0  # it syncs, which the plain engine would count
        name = f"{name}_{lag}"
        assert run.fit(name) == 0, run.text(name)[-3000:]
    plain, ahead = (run.folder / f"{name}_{lag}" for name, run in runs.items())
    sampled = [(plain / f"epoch_{epoch}.json").read_text() for epoch in range(EPOCHS)]
    assert [(ahead / f"epoch_{epoch}.json").read_text() for epoch in range(EPOCHS)] == sampled
    expected, found = (state(run.run(f"{name}_{lag}") / "checkpoints" / "last.ckpt") for name, run in runs.items())
    tensors = [key for key, value in expected.items() if torch.is_tensor(value)]
    assert len(tensors) > 50
    assert all(torch.equal(found[key], expected[key]) for key in tensors)
    curves = read_run(runs["ahead"].run(f"ahead_{lag}"))
    assert [value for _, value in curves["rollout/lag"]] == [min(epoch, lag) for epoch in range(EPOCHS)]
    # Not as if there were no lag: other weights would have sampled other tokens.
    assert curves["mismatch/logprob_abs_mean"][0][1] < 1e-4
    assert min(value for _, value in curves["mismatch/logprob_abs_mean"][1:]) > 0.1


class Disturbed(Moving):
    """Runs with a lag of one epoch, and evaluations between them."""

    def __init__(self, ranks: Ranks, model: str, server: Server) -> None:
        super().__init__(ranks, model, engine=served(server), lag=1)
        assert self.fit("undisturbed") == 0, self.text("undisturbed")[-3000:]

    def moment(self, draw: random.Random) -> tuple[int, float]:
        """An epoch, and seconds after its beginning until about the next."""
        marks = [(self.folder / "undisturbed" / f"epoch_{i}.json").stat().st_mtime for i in (0, EPOCHS - 1)]
        return draw.randrange(EPOCHS - 1), draw.uniform(0, (marks[1] - marks[0]) / (EPOCHS - 1))

    def start_until(self, name: str, epoch: int, seconds: float, *args: str) -> list[int]:
        """The process ids of a start, so long after it has begun an epoch."""
        pids = self.start(name, *args)
        assert eventually((self.folder / name / f"epoch_{epoch}.json").exists, 400, every=0.001)
        time.sleep(seconds)
        return pids

    def resume(self, name: str) -> None:
        again = ["--ckpt_path", "last"] if list(self.run(name).glob("checkpoints/epoch*")) else []
        if not again and self.run(name).exists():  # before the first checkpoint: it starts anew
            self.run(name).rename(self.folder / f"{name}_given_up")
        assert self.fit(name, *again) == 0, self.text(name)[-3000:]
        self.check_whole(name)


@pytest.fixture(scope="module")
def disturbed(ranks: Ranks, tiny_model: str, server: Server) -> Disturbed:
    return Disturbed(ranks, tiny_model, server)


KILLS = range(int(os.environ.get("ASPO_KILLS", "1")))


@pytest.mark.parametrize("seed", KILLS)
def test_killed_at_a_random_moment_a_run_with_a_lag_resumes_as_if_it_never_was(disturbed, seed):
    """More of them: ASPO_KILLS=20."""
    name, draw = f"killed_{seed}", random.Random(seed)
    pids = disturbed.start_until(name, *disturbed.moment(draw))
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    assert disturbed.wait() == [-signal.SIGKILL] * len(pids)
    disturbed.resume(name)


@pytest.mark.parametrize("seed", KILLS)
def test_a_server_killed_at_a_random_moment_costs_a_run_with_a_lag_one_line_and_nothing_else(
    disturbed, tiny_model, quick_server, seed
):
    name, draw = f"served_{seed}", random.Random(seed)
    with ready(quick_server(tiny_model)) as (lost,):
        address = ["--data.engine.init_args.urls", f"[{lost.url}]"]
        disturbed.start_until(name, *disturbed.moment(draw), *address)
        lost.signal(signal.SIGKILL)
        codes = disturbed.wait()
    if any(codes):  # or it was done with sampling
        assert 1 in codes
        lines = [line for line in disturbed.text(name).splitlines() if "aspo: error: " in line]
        assert any(f"The vLLM server at {lost.url} doesn't answer" in line for line in lines)
        assert len(lines) <= len(codes)
        disturbed.resume(name)  # with the server that the other runs have


@pytest.mark.parametrize("ranks", [1], indirect=True)
def test_a_run_with_a_lag_ends_after_its_epoch_when_a_signal_comes_and_resumes(disturbed):
    assert disturbed.fit("term", part="update", kind="SIGTERM", epoch=2) == 128 + signal.SIGTERM
    assert sorted(path.name for path in (disturbed.folder / "term").iterdir()) == [f"epoch_{i}.json" for i in range(3)]
    (disturbed.folder / "term.struck").unlink()
    disturbed.resume("term")


@pytest.mark.parametrize("ranks", [1], indirect=True)
def test_what_a_longer_run_needs_is_sampled_when_it_is_resumed(disturbed):
    short = ["--trainer.max_epochs", "3"]
    assert disturbed.fit("longer", *short) == 0, disturbed.text("longer")[-3000:]
    assert disturbed.fit("longer", "--ckpt_path", "last") == 0, disturbed.text("longer")[-3000:]
    curves = read_run(disturbed.run("longer"))
    assert [value for _, value in curves["rollout/lag"]] == [0, 1, 1, 0, 1, 1]


def test_an_engine_on_the_trainers_devices_is_refused(tiny_model):
    with pytest.raises(ConfigError, match="data.lag is 1, but TransformersEngine samples on the trainer's own devices"):
        RolloutDataModule(tiny_model, engine=TransformersEngine(), lag=1)
    with pytest.raises(ConfigError, match="data.lag is -1; it must be at least 0"):
        RolloutDataModule(tiny_model, lag=-1)

"""Sampling ahead of the training (``data.lag``): against a plain loop that keeps old weights, and disturbed."""

import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from aspo_lightning.cli.report import read_run
from aspo_lightning.datamodule import RolloutDataModule
from aspo_lightning.engines import TransformersEngine
from aspo_lightning.errors import ConfigError
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
def server(tiny_model: str) -> Iterator[Server]:
    with ready(Server(tiny_model)) as (server,):
        yield server


def served(server: Server) -> dict:
    return {"class_path": "VLLMServers", "init_args": {"urls": [server.url]}}


def made_by_old_weights(lag: int) -> dict:
    engine = {"class_path": "tests.support.old_weights.OldWeights", "init_args": {"lag": lag, "kv_cache_gib": 0.05}}
    return {"engine": engine, "probe_factor": None}


@pytest.fixture(scope="module", params=[1, 2], ids=["one rank", "two ranks"])
def ranks(request, tmp_path_factory) -> Iterator[Ranks]:
    with Ranks(request.param, tmp_path_factory.mktemp(f"ranks_{request.param}")) as ranks:
        yield ranks


@pytest.mark.parametrize("lag", [1, 2])
def test_a_lag_is_what_a_plain_loop_with_old_weights_makes(tiny_model, ranks, server, lag):
    runs = {
        "plain": FaultyRuns(ranks, tiny_model, **made_by_old_weights(lag)),
        "ahead": FaultyRuns(ranks, tiny_model, engine=served(server), lag=lag),
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
    # Not as if there were no lag.
    assert max(value for _, value in curves["mismatch/logprob_abs_mean"][:1]) < 1e-4
    assert min(value for _, value in curves["mismatch/logprob_abs_mean"][1:]) > 1e-3

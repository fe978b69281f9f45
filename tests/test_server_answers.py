"""What VLLMServers makes of answers that a real vLLM server can't be made to give on demand."""

import asyncio
import threading
import time

import pytest
import torch

from aspo_lightning.engines import SamplingRequest, VLLMServers
from aspo_lightning.engines.requests import is_truncated
from aspo_lightning.errors import ConfigError, RunError
from tests.support.fake_server import Joined, completion, serving

GENERATE = "/inference/v1/generate"
ASKED = [SamplingRequest((5, 6, 7), 8, seed) for seed in range(4)]


@pytest.fixture(autouse=True)
def token(monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "a-secret-of-these-tests")


def test_a_completion_that_a_server_gives_up_is_not_one():
    """vLLM answers so, with what it has by then, where it is shut down in order, paused or put to sleep."""
    reasons = iter(["stop", "abort", "stop", "length"])
    with (
        serving({GENERATE: lambda body: completion(next(reasons), 3, 4)}) as url,
        pytest.raises(RunError, match=rf"The vLLM server at {url} doesn't answer \(it gave up a completion: abort"),
    ):
        list(VLLMServers([url]).generate(ASKED))


def test_what_ends_by_itself_is_not_truncated():
    assert [is_truncated(reason) for reason in ("stop", "length", "repetition")] == [False, True, True]
    for reason in ("abort", "error", None):
        with pytest.raises(RuntimeError, match=f"it gave up a completion: {reason}"):
            is_truncated(reason)


def test_servers_sample_in_a_notebook_whose_thread_has_a_loop():
    async def cell():
        return dict(VLLMServers([url]).generate(ASKED))

    with serving({GENERATE: lambda body: completion("length", body["sampling_params"]["seed"])}) as url:
        found = asyncio.run(cell())
    assert {i: (c.completion_ids, c.truncated) for i, c in found.items()} == {i: ((i,), True) for i in range(4)}


def test_an_engine_that_dies_while_it_samples_is_a_lost_server_and_no_wrong_setting():
    answers = {
        GENERATE: lambda body: (500, {"error": "EngineCore encountered an issue"}),
        "/health": lambda body: (503, {}),
    }
    with (
        serving(answers) as url,
        pytest.raises(RunError, match=rf"The vLLM server at {url} doesn't answer \(its engine is dead\)"),
    ):
        list(VLLMServers([url]).generate(ASKED))
    with (
        serving({GENERATE: lambda body: (400, {"error": "no such model"})}) as url,
        pytest.raises(ConfigError, match=f"The vLLM server at {url} answered {GENERATE} with 400.*no such model"),
    ):
        list(VLLMServers([url]).generate(ASKED))


def test_a_server_that_refuses_to_join_is_told_at_once_and_why():
    refused = lambda body: (500, {"error": "Weight transfer not configured"})  # noqa: E731
    joined = Joined()
    with (
        serving({"/init_weight_transfer_engine": refused}) as wrong,
        serving({"/init_weight_transfer_engine": joined.join}) as right,
    ):
        start = time.monotonic()
        with pytest.raises(ConfigError, match=f"at {wrong} answered .* with 500.*Weight transfer not configured"):
            VLLMServers([right, wrong], timeout_s=100).start("model", context_length=64)
        assert time.monotonic() - start < 20


def test_the_time_limit_of_a_sync_is_of_each_tensor_not_of_all():
    joined, received = Joined(), {}

    def update(body):
        received.update(joined.stream.receive())
        return 200, {}

    def slowly():
        for i in range(5):
            time.sleep(1)  # as gathering a large tensor takes
            yield str(i), torch.full((2,), float(i))

    with serving({"/init_weight_transfer_engine": joined.join, "/update_weights": update}) as url:
        trainer = VLLMServers([url], timeout_s=3)
        trainer.start("model", context_length=64)
        trainer.sync_weights(slowly())
    assert {name: tensor.tolist() for name, tensor in received.items()} == {str(i): [i, i] for i in range(5)}


def test_a_server_that_never_says_that_it_has_all_weights_is_told():
    joined, free = Joined(), threading.Event()

    def update(body):
        list(joined.stream.receive())
        free.wait(60)
        return 200, {}

    with serving({"/init_weight_transfer_engine": joined.join, "/update_weights": update}) as url:
        trainer = VLLMServers([url], timeout_s=2)
        trainer.start("model", context_length=64)
        with pytest.raises(RunError, match=rf"The vLLM server at {url} doesn't answer \(not in 2 s\)"):
            trainer.sync_weights([("weight", torch.zeros(2))])
        free.set()


def test_a_server_that_ends_an_update_without_a_word_is_told_long_before_the_time_limit():
    """It joins, lives, and says nothing on the stream, as its NCCL would."""
    joined = Joined()
    answers = {"/init_weight_transfer_engine": joined.join, "/update_weights": lambda body: (500, {})}
    with serving(answers) as url:
        trainer = VLLMServers([url])
        trainer.start("a_model", context_length=64)
        start = time.monotonic()
        with pytest.raises(ConfigError, match="doesn't take the weights of a_model: .* the same model"):
            trainer.sync_weights([("weight", torch.zeros(50_000_000))])
        assert time.monotonic() - start < 30  # of 300
        joined.stream.group = None  # lets the trainer's end go

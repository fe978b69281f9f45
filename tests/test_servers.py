"""vLLM servers as the engine of a run: two real ones on loopback, as `scripts/serve.sh` starts them."""

import os
import signal
import subprocess
import time

import httpx
import pytest
import torch
from safetensors.torch import load_file
from transformers import GenerationConfig

from aspo_lightning.engines import SamplingRequest, VLLMEngine, VLLMServers
from aspo_lightning.errors import ConfigError
from tests.conftest import save_model, save_tokenizer
from tests.test_cli import ASPO, ROOT, aspo, aspo_here, scalars
from tests.test_fsdp import SHARDED, Runs, free_port, on_ranks


class Server:
    def __init__(self, model: str, *arguments: str) -> None:
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        settings = ["--max-model-len", "112", "--kv-cache-memory-bytes", "50000000", *arguments]
        self.process = subprocess.Popen(
            ["bash", str(ROOT / "scripts" / "serve.sh"), model, str(port), *settings],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        )

    def wait(self) -> None:
        for _ in range(600):
            assert self.process.poll() is None, "the server ended"
            try:
                if httpx.get(f"{self.url}/health").status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.2)
        pytest.fail("the server doesn't start")

    def signal(self, number: int) -> None:
        os.killpg(self.process.pid, number)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """It recommends a way of sampling, which no run asks for, and has an end token that only stands there."""
    folder = tmp_path_factory.mktemp("model")
    save_model(folder, eos_token_id=1)
    save_tokenizer(folder)
    GenerationConfig(
        eos_token_id=[1, 9],
        do_sample=True,
        temperature=0.3,
        top_k=2,
        top_p=0.5,
        min_p=0.2,
        repetition_penalty=1.5,
        max_new_tokens=3,
    ).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def servers(model):
    started = [Server(model), Server(model, "--generation-config", "auto")]  # which is vLLM's default
    try:
        for server in started:
            server.wait()
        yield started
    finally:
        for server in started:
            if server.process.poll() is None:
                server.signal(signal.SIGKILL)
            server.process.wait()


def engine(*servers: Server) -> list[str]:
    urls = ",".join(server.url for server in servers)
    return ["--data.engine.class_path", "VLLMServers", "--data.engine.init_args.urls", f"[{urls}]"]


@pytest.fixture(scope="module")
def runs(model, tmp_path_factory):
    return Runs(model, tmp_path_factory.mktemp("served"))


def test_servers_give_what_the_engine_in_the_process_gives(runs, servers):
    on_ranks(1, runs.folder, [runs.command("here"), runs.command("served", *engine(*servers))])
    on_ranks(2, runs.folder, [runs.command("sharded", *SHARDED, "2", *engine(*servers))])
    (here,), (served,), sharded = (runs.records(name) for name in ("here", "served", "sharded"))
    assert len({completion for phase in here["phases"] for completion in phase["completions"]}) > 40
    for phases in (served["phases"], sharded[0]["phases"], sharded[1]["phases"]):
        assert [p["completions"] for p in phases] == [p["completions"] for p in here["phases"]]
    assert max(served["probes"] + sharded[0]["probes"] + sharded[1]["probes"]) < 1e-4  # after three updates
    for name, weight in here["weights"].items():
        assert torch.equal(served["weights"][name], weight)


def test_what_a_model_recommends_for_sampling_is_not_followed_but_its_end_tokens_are(model, servers):
    requests = [SamplingRequest((5, 6, 7 + n), 24, seed, 1.5) for n in range(4) for seed in range(16)]
    here = VLLMEngine(kv_cache_gib=0.05)
    here.start(model, context_length=64)
    expected = here.generate(requests, description="test")
    here.stop()
    assert {c.completion_ids[-1] for c in expected if not c.truncated} == {1, 9}
    assert {len(c.completion_ids) for c in expected if c.truncated} == {24}
    for server in servers:
        served = VLLMServers([server.url])
        served.start(model, context_length=64)
        served.sync_weights(load_file(f"{model}/model.safetensors").items())
        found = served.generate(requests, description="test")
        assert [(c.completion_ids, c.truncated) for c in found] == [(c.completion_ids, c.truncated) for c in expected]
        for ours, theirs in zip(found, expected, strict=True):
            assert ours.generator_logprobs == pytest.approx(theirs.generator_logprobs, abs=1e-5)


def test_a_server_fills_what_a_request_leaves_out_by_no_recommendation(model, servers):
    """As `scripts/serve.sh` starts it: this request is somebody else's, and says little."""
    body = {"model": model, "prompt": [5, 6, 7], "max_tokens": 1, "logprobs": 5}
    answer = httpx.post(f"{servers[0].url}/v1/completions", json=body).json()
    (likeliest,) = answer["choices"][0]["logprobs"]["top_logprobs"]
    assert min(likeliest.values()) > -20  # of two tokens' choice all others had -inf


def test_a_server_killed_in_mid_phase_is_told_and_nothing_of_the_phase_is_trained_on(runs, servers):
    command = runs.command("broken", *engine(*servers), "--trainer.max_epochs", "10000", "--checkpoint.save_top_k", "1")
    process = subprocess.Popen([ASPO, *command], cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    run = runs.folder / "run_broken" / "version_0"
    while not list((run / "checkpoints").glob("epoch*.ckpt")):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.1)
    servers[1].signal(signal.SIGSTOP)
    time.sleep(3)  # by now the trainer waits for this server's completions, and has those of the other
    servers[1].signal(signal.SIGKILL)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 1
    (line,) = [line for line in errors.splitlines() if "aspo: error: " in line]
    assert f"The vLLM server at {servers[1].url} doesn't answer" in line
    assert line.endswith("go on by --ckpt_path last.")
    (checkpoint,) = (run / "checkpoints").glob("epoch*.ckpt")
    epochs = int(checkpoint.stem.removeprefix("epoch_")) + 1
    saved = torch.load(checkpoint, weights_only=False)
    assert saved["global_step"] == 2 * epochs
    assert len(scalars(run)["policy/loss"]) == epochs  # every epoch trained is in the checkpoint

    go_on = ["--ckpt_path", "last", "--trainer.max_epochs", str(epochs + 1)]
    result = aspo(*runs.command("broken", *engine(servers[0]), *go_on))
    assert result.returncode == 0, result.stderr[-3000:]
    assert len(scalars(run)["policy/loss"]) == epochs + 1


def test_a_server_lost_while_it_takes_weights_lets_the_other_go(model, servers):
    weights = load_file(f"{model}/model.safetensors")
    request = SamplingRequest((5, 6, 7), 8, seed=1)
    alone = VLLMServers([servers[0].url])

    def completion_after_sync():
        alone.start(model, context_length=64)
        alone.sync_weights(weights.items())
        return alone.generate([request], description="test")

    before = completion_after_sync()
    lost = Server(model)
    lost.wait()

    def until_one_is_lost():
        for i, named in enumerate(weights.items()):
            if i == 3:
                lost.signal(signal.SIGKILL)
            yield named

    both = VLLMServers([servers[0].url, lost.url])
    both.start(model, context_length=64)
    start = time.monotonic()
    with pytest.raises(ConfigError, match=f"The vLLM server at {lost.url} doesn't answer"):
        both.sync_weights(until_one_is_lost())
    assert time.monotonic() - start < 60  # and not after the time that servers wait for each other
    lost.process.wait()
    assert completion_after_sync() == before  # half an update has left nothing behind


def test_servers_that_cannot_serve_the_run_are_told_before_it_starts(runs, servers, tmp_path, monkeypatch):
    def refused(*args: str) -> str:
        return str(aspo_here(monkeypatch, *runs.command("refused", *args)))

    longer = ["--data.max_completion_length", "24"]
    assert "takes sequences of 112 tokens; this run needs 120. Start it with --max-model-len 120" in refused(
        *engine(servers[0]), *longer
    )
    urls = ["--data.engine.class_path", "VLLMServers", "--data.engine.init_args.urls"]
    nobody = f"http://127.0.0.1:{free_port()}"
    assert f"The vLLM server at {nobody} doesn't answer" in refused(*urls, f"[{nobody}]")
    assert "allowed are addresses like http://127.0.0.1:8001" in refused(*urls, "[localhost]")
    assert "VLLMServers.urls is empty" in refused(*urls, "[]")
    save_model(tmp_path, hidden_size=32)
    save_tokenizer(tmp_path)
    assert "Has it the same model?" in refused(*engine(servers[0]), "--model.model_name_or_path", str(tmp_path))

"""vLLM servers as the engine of a run: real ones on loopback, as `scripts/serve.sh` starts them.

All but the first are forks of a process that has imported vLLM.
"""

import json
import os
import re
import signal
import socket
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest
import torch
from safetensors.torch import load_file
from torch.distributed import TCPStore
from transformers import GenerationConfig

from aspo_lightning.engines import SamplingRequest, VLLMEngine, VLLMServers, transfer
from aspo_lightning.engines.access import RequireToken
from aspo_lightning.engines.servers import meeting_point, seen_by
from aspo_lightning.engines.transfer import Stream, check_devices
from aspo_lightning.errors import ConfigError, RunError
from aspo_lightning.run.curves import read_run
from tests.support.commands import ROOT, aspo_here
from tests.support.models import save_model, save_tokenizer
from tests.support.processes import eventually, free_port
from tests.support.ranks import Ranks
from tests.support.recorded_runs import SHARDED, RecordedRuns
from tests.support.servers import Server, ready

TOKEN = "a-secret-of-these-tests"
TRAINER = {"Authorization": f"Bearer {TOKEN}"}


@pytest.fixture(scope="module", autouse=True)
def token():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_API_KEY", TOKEN)
        yield


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
def started(model, quick_server):
    # The second as vLLM's default is.
    with ready(Server(model), quick_server(model, "--generation-config", "auto")) as servers:
        yield servers


@pytest.fixture
def servers(started):
    assert started[0].answers(), started[0].text[-3000:]  # or each test would wait for it as long as it may
    return started


@pytest.fixture
def third(model, quick_server):
    with ready(quick_server(model)) as (server,):
        yield server


def engine(*servers: Server) -> list[str]:
    urls = ",".join(server.url for server in servers)
    return ["--data.engine.class_path", "VLLMServers", "--data.engine.init_args.urls", f"[{urls}]"]


@pytest.fixture(scope="module")
def runs(model, tmp_path_factory):
    return RecordedRuns(model, tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def ranks(runs):
    with Ranks(2, runs.folder) as ranks:
        yield ranks


def test_servers_give_what_the_engine_in_the_process_gives(runs, ranks, servers):
    ranks.run("here", runs.command("here"), first=1)
    ranks.run("served", runs.command("served", *engine(*servers)), first=1)
    ranks.run("sharded", runs.command("sharded", *SHARDED, "2", *engine(*servers)))
    (here,), (served,), sharded = (runs.records(name) for name in ("here", "served", "sharded"))
    assert len({completion for phase in here["phases"] for completion in phase["completions"]}) > 40
    for phases in (served["phases"], sharded[0]["phases"], sharded[1]["phases"]):
        assert [p["completions"] for p in phases] == [p["completions"] for p in here["phases"]]
    assert max(served["probes"] + sharded[0]["probes"] + sharded[1]["probes"]) < 1e-4  # after three updates
    for name, weight in here["weights"].items():
        assert torch.equal(served["weights"][name], weight)


def test_what_a_model_recommends_for_sampling_is_not_followed_but_its_end_tokens_are(model, servers):
    requests = [SamplingRequest((5, 6, 7 + n), 24, seed, 1.5, 0.95) for n in range(4) for seed in range(16)]
    here = VLLMEngine(kv_cache_gib=0.05)
    here.start(model, context_length=64)
    expected = [c for _, c in sorted(here.generate(requests))]
    here.stop()
    assert {c.completion_ids[-1] for c in expected if not c.truncated} == {1, 9}
    assert {len(c.completion_ids) for c in expected if c.truncated} == {24}
    for server in servers:
        served = VLLMServers([server.url])
        served.start(model, context_length=64)
        served.sync_weights(load_file(f"{model}/model.safetensors").items())
        found = [c for _, c in sorted(served.generate(requests))]
        assert [(c.completion_ids, c.truncated) for c in found] == [(c.completion_ids, c.truncated) for c in expected]
        for ours, theirs in zip(found, expected, strict=True):
            assert ours.generator_logprobs == pytest.approx(theirs.generator_logprobs, abs=1e-5)


def test_a_request_has_what_else_it_is_to_have(model, servers):
    more = VLLMServers([servers[0].url], extra_body={"priority": 0, "sampling_params": {"min_tokens": 20}})
    more.check()
    more.start(model, context_length=64)
    more.sync_weights(load_file(f"{model}/model.safetensors").items())
    requests = [SamplingRequest((5, 6, 7), 24, seed, 1.5) for seed in range(16)]
    assert min(len(completion.completion_ids) for _, completion in more.generate(requests)) >= 20


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        ({"token_ids": [1]}, "token_ids"),
        ({"stream": True}, "stream"),
        ({"sampling_params": {"seed": 1}}, "sampling_params.seed"),
        ({"sampling_params": {"n": 2}}, "sampling_params.n"),
        ({"sampling_params": 3}, "sampling_params 3"),
    ],
)
def test_what_a_request_has_anyway_is_refused(extra, named):
    with pytest.raises(ConfigError, match=f"extra_body has {named}"):
        VLLMServers(["http://127.0.0.1:1"], extra_body=extra).check()


def test_leaving_early_leaves_no_request_and_no_thread(model, servers):
    served = VLLMServers([server.url for server in servers])
    served.start(model, context_length=64)
    served.sync_weights(load_file(f"{model}/model.safetensors").items())
    requests = [SamplingRequest((5, 6, 7), 24, seed) for seed in range(40)]
    threads = set(threading.enumerate())
    completions = served.generate(requests)
    index, completion = next(completions)
    completions.close()
    assert set(threading.enumerate()) <= threads  # some of these, of the sync, may have ended meanwhile
    served.sync_weights(load_file(f"{model}/model.safetensors").items())
    assert dict(served.generate(requests))[index] == completion


def test_a_server_that_still_computes_for_somebody_takes_weights(model, servers):
    """With half of the weights it would fail, and sample nothing more."""
    served = VLLMServers([server.url for server in servers])
    served.start(model, context_length=64)
    weights = load_file(f"{model}/model.safetensors")
    served.sync_weights(weights.items())
    requests = [SamplingRequest((5, 6, 7), 24, seed) for seed in range(8)]
    expected = dict(served.generate(requests))
    long = {"max_tokens": 100, "ignore_eos": True}
    body = {"token_ids": [5, 6, 7], "sampling_params": long}
    url = servers[0].url
    with ThreadPoolExecutor(64) as pool:
        others = [
            pool.submit(httpx.post, f"{url}/inference/v1/generate", json=body, headers=TRAINER, timeout=100)
            for _ in range(64)
        ]
        assert eventually(lambda: computes(url), 30)
        served.sync_weights(weights.items())
        reasons = {other.result().json()["choices"][0]["finish_reason"] for other in others}
    assert "abort" in reasons  # so it did compute
    assert dict(served.generate(requests)) == expected


def computes(url: str) -> bool:
    lines = httpx.get(f"{url}/metrics", headers=TRAINER).text.splitlines()
    return any(line.startswith("vllm:num_requests_running") and not line.endswith(" 0.0") for line in lines)


def test_a_server_fills_what_a_request_leaves_out_by_no_recommendation(model, servers):
    """As `scripts/serve.sh` starts it: this request is somebody else's, and says little."""
    body = {"model": model, "prompt": [5, 6, 7], "max_tokens": 1, "logprobs": 5}
    answer = httpx.post(f"{servers[0].url}/v1/completions", json=body, headers=TRAINER).json()
    (likeliest,) = answer["choices"][0]["logprobs"]["top_logprobs"]
    assert min(likeliest.values()) > -20  # of two tokens' choice all others had -inf


def test_a_server_killed_in_mid_phase_is_told_and_nothing_of_the_phase_is_trained_on(runs, ranks, servers):
    command = runs.command("broken", *engine(*servers), "--trainer.max_epochs", "10000", "--checkpoint.save_top_k", "1")
    run = runs.folder / "run_broken" / "version_0"
    ranks.start("broken", command, first=1)
    assert eventually(lambda: list((run / "checkpoints").glob("epoch*.ckpt")), 400), ranks.text("broken")[-3000:]
    servers[1].signal(signal.SIGSTOP)
    time.sleep(3)  # by now the trainer waits for this server's completions, and has those of the other
    servers[1].signal(signal.SIGKILL)
    killed = time.monotonic()
    assert ranks.wait() == [1]
    assert time.monotonic() - killed < 60
    (line,) = [line for line in ranks.text("broken").splitlines() if "aspo: error: " in line]
    assert f"The vLLM server at {servers[1].url} doesn't answer" in line
    assert line.endswith("resume with the command that the run printed.")
    (checkpoint,) = (run / "checkpoints").glob("epoch*.ckpt")
    epochs = int(checkpoint.stem.removeprefix("epoch_")) + 1
    saved = torch.load(checkpoint, weights_only=False)
    assert saved["global_step"] == 2 * epochs
    assert len(read_run(run)["policy/loss"]) == epochs  # every epoch trained is in the checkpoint

    go_on = ["--ckpt_path", "last", "--trainer.max_epochs", str(epochs + 1)]
    ranks.run("broken_again", runs.command("broken", *engine(servers[0]), *go_on), first=1)
    assert len(read_run(run)["policy/loss"]) == epochs + 1


def test_a_trainer_that_is_gone_leaves_nothing_in_a_server(model, servers):
    def gloo() -> int:
        """Its threads, in all processes of the server."""
        threads = subprocess.run(["ps", "-eLo", "pgid=,comm="], capture_output=True, text=True, check=True).stdout
        names = [line.split(maxsplit=1) for line in threads.splitlines()]
        return sum("gloo" in name for group, name in names if int(group) == servers[0].process.pid)

    weights = load_file(f"{model}/model.safetensors")
    left = []
    for _ in range(3):
        trainer = VLLMServers([servers[0].url])
        trainer.start(model, context_length=64)
        trainer.sync_weights(weights.items())
        left.append(gloo())
        trainer.stop()
    assert left[0] == left[1] == left[2] > 0


@pytest.mark.parametrize("part", ["all of it", "its engine"])
def test_a_server_lost_while_it_takes_weights_lets_the_other_go(model, servers, third, part):
    weights = load_file(f"{model}/model.safetensors")
    request = SamplingRequest((5, 6, 7), 8, seed=1)
    alone = VLLMServers([servers[0].url])

    def completion_after_sync():
        alone.start(model, context_length=64)
        alone.sync_weights(weights.items())
        return list(alone.generate([request]))

    before = completion_after_sync()

    def until_one_is_lost():
        for i, named in enumerate(weights.items()):
            if i == 3 and part == "all of it":
                third.signal(signal.SIGKILL)
            elif i == 3:
                pid = third.process.pid
                children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
                (core,) = [child for child in children if "EngineCore" in Path(f"/proc/{child}/cmdline").read_text()]
                os.kill(int(core), signal.SIGKILL)
            yield named

    both = VLLMServers([servers[0].url, third.url])
    both.start(model, context_length=64)
    start = time.monotonic()
    with pytest.raises(RunError, match=f"The vLLM server at {third.url} doesn't answer"):
        both.sync_weights(until_one_is_lost())
    assert time.monotonic() - start < 60  # and not after the time that servers wait for each other
    third.signal(signal.SIGKILL)
    third.process.wait()
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
    assert "it must be an address like http://127.0.0.1:8001" in refused(*urls, "[localhost]")
    assert "VLLMServers.urls is empty" in refused(*urls, "[]")
    none = ["--data.engine.init_args.max_num_seqs", "0"]
    assert "VLLMServers.max_num_seqs is 0; it must be at least 1" in refused(*engine(servers[0]), *none)
    save_model(tmp_path, hidden_size=32)
    save_tokenizer(tmp_path)
    assert "Has it the same model?" in refused(*engine(servers[0]), "--model.model_name_or_path", str(tmp_path))


def test_a_server_that_freezes_is_told_long_before_the_time_limit(model, servers, third, monkeypatch):
    """Over NCCL nothing else would tell, whatever happened to it."""
    monkeypatch.setattr("aspo_lightning.engines.servers.HEALTH_TIMEOUT_S", 10.0)  # so that the test needn't wait for 30
    weights = load_file(f"{model}/model.safetensors")
    both = VLLMServers([servers[0].url, third.url])
    both.start(model, context_length=64)
    both.sync_weights(weights.items())
    third.signal(signal.SIGSTOP)
    start = time.monotonic()
    with pytest.raises(RunError, match=f"The vLLM server at {third.url} doesn't answer"):
        list(both.generate([SamplingRequest((5, 6, 7), 8, seed) for seed in range(4)]))
    assert time.monotonic() - start < 100  # of 300
    third.signal(signal.SIGCONT)

    def until_one_is_frozen():
        for i, named in enumerate(weights.items()):
            if i == 3:
                third.signal(signal.SIGSTOP)
            yield named
        yield "more", torch.zeros(50_000_000)  # than fits in the connection

    start = time.monotonic()
    with pytest.raises(RunError, match=f"The vLLM server at {third.url} doesn't answer"):
        both.sync_weights(until_one_is_frozen())
    assert time.monotonic() - start < 100  # of 300
    third.signal(signal.SIGKILL)
    third.process.wait()
    alone = VLLMServers([servers[0].url])
    alone.start(model, context_length=64)  # which had half an update
    alone.sync_weights(weights.items())


def test_no_request_depends_on_a_connection_that_a_server_may_have_closed():
    """vLLM closes one that has been idle for five seconds, be it as the next request arrives."""
    lock = threading.Lock()
    busy, busiest, served = 0, 0, []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"  # connections are kept
        answered = False

        def answer(self, **body: object) -> None:
            text = json.dumps(body).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def do_GET(self) -> None:  # of /health, if it takes a second
            self.answer()

        def do_POST(self) -> None:
            nonlocal busy, busiest
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.answered:
                self.close_connection = True
                return
            self.answered = True
            with lock:
                busy += 1
                busiest = max(busy, busiest)
                served.append(body["sampling_params"]["seed"])
            time.sleep(0.05)
            with lock:
                busy -= 1
            logprobs = {"content": [{"logprob": -1.0}]}
            choice = {"token_ids": [len(body["token_ids"])], "logprobs": logprobs, "finish_reason": "stop"}
            self.answer(choices=[choice])

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    asked = [SamplingRequest((7,) * (1 + i), 8, seed=i, temperature=1.0) for i in range(40)]
    found = dict(VLLMServers([f"http://127.0.0.1:{server.server_port}"], max_num_seqs=4).generate(asked))
    server.shutdown()
    assert {i: completion.completion_ids for i, completion in found.items()} == {i: (1 + i,) for i in range(40)}
    assert sorted(served) == list(range(40))
    assert busiest == 4


def streams(**settings: object) -> list[Stream | Exception]:
    """Both ends of a stream, or what making them raised."""
    port = free_port()
    ends: dict[int, Stream | Exception] = {}

    def join(rank: int) -> None:
        try:
            ends[rank] = Stream(
                "127.0.0.1", port, rank=rank, world_size=2, device=torch.device("cpu"), timeout_s=100, **settings
            )
        except Exception as error:
            ends[rank] = error

    threads = [threading.Thread(target=join, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [ends[0], ends[1]]


def test_a_worker_does_not_wait_for_a_stream_that_the_trainer_has_closed():
    trainer, worker = streams()
    connections = trainer.group  # held, so that gloo doesn't tell: NCCL's needn't
    start = time.monotonic()
    trainer.close()
    with pytest.raises(ConnectionError, match="the trainer has closed the stream"):
        next(worker.receive())
    assert time.monotonic() - start < 10  # of 100
    del connections


def test_a_worker_does_not_wait_for_a_trainer_that_is_gone():
    """Its store goes with it. Its group stays here, so that gloo doesn't tell: NCCL's needn't."""
    trainer, worker = streams()
    port = free_port()
    stores = [TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)]
    worker.store = TCPStore("127.0.0.1", port)
    threading.Timer(3, stores.clear).start()
    start = time.monotonic()
    with pytest.raises(ConnectionError, match="another end of the stream is gone"):
        next(worker.receive())
    assert 3 <= time.monotonic() - start < 15  # of 100
    trainer.close()


def test_the_time_limit_is_of_each_tensor_not_of_all():
    trainer, worker = streams()
    trainer.timeout_s = worker.timeout_s = 3.0
    received = []
    thread = threading.Thread(target=lambda: received.extend(worker.receive()))
    thread.start()
    for i in range(3):
        time.sleep(1.5)
        trainer.send(str(i), torch.full((2,), float(i)))
    trainer.end()
    thread.join()
    assert [(name, tensor.tolist()) for name, tensor in received] == [("0", [0, 0]), ("1", [1, 1]), ("2", [2, 2])]
    start = time.monotonic()
    with pytest.raises(ConnectionError, match="aren't ready after 3 s"):
        next(worker.receive())
    assert 3 <= time.monotonic() - start < 10


def test_devices_between_which_no_weights_can_be_sent_are_refused():
    check_devices(["cpu", "cpu", "cpu"])
    check_devices(["GPU-a", "GPU-b", "GPU-c"])
    with pytest.raises(ConfigError, match=r"The trainer and a vLLM server use the same GPU \(GPU-a\).*CUDA_VIS"):
        check_devices(["GPU-a", "GPU-b", "GPU-a"])
    with pytest.raises(ConfigError, match=r"Two workers of vLLM servers use the same GPU \(GPU-b\)"):
        check_devices(["GPU-a", "GPU-b", "GPU-b"])
    for devices in (["GPU-a", "cpu"], ["cpu", "GPU-a"], ["GPU-a", "GPU-b", "cpu"]):
        with pytest.raises(ConfigError, match="some are on GPUs and some on CPUs"):
            check_devices(devices)


def test_both_ends_of_a_stream_on_one_gpu_say_so_at_once(monkeypatch):
    monkeypatch.setattr(transfer, "device_id", lambda device: "GPU-a")
    start = time.monotonic()
    trainer, worker = streams()
    assert time.monotonic() - start < 10  # of 100
    assert isinstance(trainer, ConfigError)
    assert "The trainer and a vLLM server use the same GPU (GPU-a)" in str(trainer)
    assert isinstance(worker, ConfigError | ConnectionError)


def test_servers_on_loopback_and_elsewhere_join_where_all_reach_the_trainer():
    here, there = "http://127.0.0.1:8001", "http://node2:8001"
    assert meeting_point({here: "127.0.0.1"}) == "127.0.0.1"
    assert meeting_point({here: "127.0.0.1", there: "10.0.0.5"}) == "10.0.0.5"
    assert meeting_point({there: "10.0.0.5", here: "::1", "http://node3:8001": "10.0.0.5"}) == "10.0.0.5"
    with pytest.raises(ConfigError, match="see this machine by different addresses.*in one network"):
        meeting_point({there: "10.0.0.5", "http://node3:8001": "10.1.0.5", here: "127.0.0.1"})


def test_a_server_sees_this_machine_by_the_address_that_the_connection_has():
    with socket.create_server(("127.0.0.2", 0)) as listener:
        url = f"http://127.0.0.2:{listener.getsockname()[1]}"
        seen = seen_by(url, 10)
        assert seen == listener.accept()[1][0]
    with pytest.raises(RunError, match=f"The vLLM server at {url} doesn't answer"):
        seen_by(url, 10)


def test_a_server_answers_nothing_on_any_path_without_the_token(model, servers):
    url = servers[0].url
    paths = httpx.get(f"{url}/openapi.json", headers=TRAINER).json()["paths"]
    weights = {"/init_weight_transfer_engine", "/start_weight_update", "/update_weights", "/finish_weight_update"}
    assert weights | {"/inference/v1/generate", "/v1/completions", "/collective_rpc", "/sleep", "/health"} <= set(paths)
    asked = [(method, path) for path, methods in paths.items() for method in methods] + [("get", "/no/such/path")]
    for method, path in asked:
        for given in (None, "Bearer", f"Bearer {TOKEN}x", TOKEN):
            answer = httpx.request(method, url + path, headers={"Authorization": given} if given else {})
            assert (answer.status_code, answer.text) == (401, ""), (method, path, given)
    body = {"token_ids": [5, 6, 7], "sampling_params": {"max_tokens": 2, "temperature": 0.0}}
    answer = httpx.post(f"{url}/inference/v1/generate", json=body, headers=TRAINER)
    assert 1 <= len(answer.json()["choices"][0]["token_ids"]) <= 2


def test_the_token_is_on_no_command_line_and_in_no_file_of_a_run(runs, ranks, servers):
    """After the runs that another test made."""
    ranks.run("secret", runs.command("secret", *engine(servers[0]), "--trainer.max_epochs", "1"), first=1)
    files = [path for path in runs.folder.rglob("*") if path.is_file()]
    assert len(files) > 3
    for path in files:
        assert TOKEN.encode() not in path.read_bytes(), path
    lines = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if readable(path)]
    assert any(b"vllm.entrypoints" in line for line in lines)
    assert not [line for line in lines if TOKEN.encode() in line]


def readable(path: Path) -> bool:
    try:
        return bool(path.read_bytes())
    except OSError:  # ended meanwhile
        return False


def test_a_trainer_without_the_token_or_with_another_is_told_in_one_line(runs, servers, monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "another")
    error = str(aspo_here(monkeypatch, *runs.command("another", *engine(servers[0]))))
    assert f"The vLLM server at {servers[0].url} was started with another token than the environment" in error
    monkeypatch.setenv("VLLM_API_KEY", f"{TOKEN} ")
    error = str(aspo_here(monkeypatch, *runs.command("illegal", *engine(servers[0]))))
    assert "The environment variable VLLM_API_KEY has spaces, line ends or letters beyond ASCII" in error
    assert TOKEN not in error
    monkeypatch.delenv("VLLM_API_KEY")
    error = str(aspo_here(monkeypatch, *runs.command("without", *engine(servers[0]))))
    assert "The environment variable VLLM_API_KEY isn't set" in error
    with pytest.raises(ConfigError, match="VLLM_API_KEY isn't set"):
        RequireToken(None)


@pytest.mark.parametrize(
    ("gpus", "environment", "said"),
    [
        (0, {"VLLM_API_KEY": ""}, "Set VLLM_API_KEY, a secret"),
        (4, {}, "This machine has 4 GPUs.*CUDA_VISIBLE_DEVICES=3 bash scripts/serve.sh no_model 8001"),
        (4, {"CUDA_VISIBLE_DEVICES": "2"}, "started"),
        (1, {}, "started"),
        (0, {}, "started"),
    ],
)
def test_a_server_asks_for_a_secret_and_for_its_gpus_where_there_are_several(tmp_path, gpus, environment, said):
    """With stand-ins for nvidia-smi and Python, and the script in a folder without an environment of its own."""
    for name, text in {
        "nvidia-smi": "\n".join(["#!/bin/sh", *(f"echo 'GPU {i}: NVIDIA H100 (UUID: GPU-{i})'" for i in range(gpus))]),
        "python": '#!/bin/sh\necho started "$@" >&2\n',
    }.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    (tmp_path / "scripts").mkdir()
    script = tmp_path / "scripts" / "serve.sh"
    script.write_text((ROOT / "scripts" / "serve.sh").read_text())
    result = subprocess.run(
        ["bash", script, "no_model", "8001", "--max-model-len", "64"],
        env={"PATH": f"{tmp_path}:/usr/bin:/bin", "VLLM_API_KEY": TOKEN, **environment},
        capture_output=True,
        text=True,
    )
    assert re.match(said, result.stderr), result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert result.returncode == (0 if said == "started" else 1)
    assert ("--enforce-eager" in result.stderr) == (said == "started" and gpus == 0)
    assert TOKEN not in result.stderr

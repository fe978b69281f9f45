"""vLLM servers on other GPUs, or other machines, as the engine of a run."""

import asyncio
import socket
import threading
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import cache
from ipaddress import ip_address
from itertools import islice
from queue import SimpleQueue
from ssl import SSLContext
from typing import Annotated, Any, NoReturn
from urllib.parse import urlsplit

import httpx
import torch
from anyio.from_thread import start_blocking_portal
from torch import Tensor

from aspo_lightning.collectives import barrier, rank, world_size
from aspo_lightning.engines.access import TOKEN, headers
from aspo_lightning.engines.base import Engine, SamplingRequest
from aspo_lightning.engines.requests import check_extra_body, is_truncated, request_body
from aspo_lightning.engines.transfer import CHECK_S, Stream
from aspo_lightning.errors import ConfigError, RunError
from aspo_lightning.identity import INCIDENTAL
from aspo_lightning.types import Completion

Answer = dict[str, Any]  # of a server, in JSON
HEALTH_TIMEOUT_S = 30.0  # a server that samples or takes weights answers in between


class VLLMServers(Engine):
    """Samples with servers started with ``scripts/serve.sh``, one or several. New weights are broadcast to all of them.

    What a server still samples when new weights come, for whomever, is given up.

    Where there are several ranks, each uses its share of the servers, or shares one. Requests to the servers carry the
    token that they were started with, from the environment variable VLLM_API_KEY.

    Args:
        urls: like http://127.0.0.1:8001.
        timeout_s: how long servers and trainer wait for each other when weights are sent.
        extra_body: fields of each request that go to the servers as they are, such as ``priority``, or
            ``sampling_params: {min_tokens: 2}``. Those that a request has anyway are refused.
        max_num_seqs: completions that a rank asks a server for at a time, each on a connection of its own: as many as
            it samples, see its own ``--max-num-seqs``.
    """

    apart = True

    def __init__(
        self,
        urls: Annotated[list[str], INCIDENTAL],
        timeout_s: Annotated[float, INCIDENTAL] = 300.0,
        extra_body: dict[str, Any] | None = None,
        max_num_seqs: Annotated[int, INCIDENTAL] = 256,
    ) -> None:
        self.urls = [url.rstrip("/") for url in urls]
        self.timeout_s = timeout_s
        self.extra_body = extra_body or {}
        self.max_num_seqs = max_num_seqs
        self._model_name = ""
        self._stream: Stream | None = None
        self._updates: list[Future[Answer]] = []

    def check(self) -> None:
        if not self.urls:
            raise ConfigError("VLLMServers.urls is empty. Give the servers' addresses, like http://127.0.0.1:8001.")
        for url in self.urls:
            if not urlsplit(url).hostname or not urlsplit(url).scheme.startswith("http"):
                raise ConfigError(f"VLLMServers.urls has {url!r}; it must be an address like http://127.0.0.1:8001.")
        if self.max_num_seqs < 1:
            raise ConfigError(f"VLLMServers.max_num_seqs is {self.max_num_seqs}; it must be at least 1.")
        check_extra_body(self.extra_body)
        headers()

    def start(self, model_name_or_path: str, *, context_length: int) -> None:
        models = {}
        sizes = {}
        for url in self.urls:
            model = self._ask(url, "GET", "/v1/models")["data"][0]
            if model["max_model_len"] < context_length:
                raise ConfigError(
                    f"The vLLM server at {url} takes sequences of {model['max_model_len']} tokens; this run needs "
                    f"{context_length}. Start it with --max-model-len {context_length}."
                )
            models[url] = model["id"]
            sizes[url] = self._ask(url, "GET", "/get_world_size")["world_size"]
        if len(set(models.values())) > 1:
            raise ConfigError(f"The vLLM servers have different models: {models}. Start all with {model_name_or_path}.")
        self._model_name = model_name_or_path
        if rank() == 0:
            self._connect(sizes)

    def _connect(self, sizes: dict[str, int]) -> None:
        """Opens the stream to all servers."""
        address = meeting_point({url: seen_by(url, self.timeout_s) for url in self.urls})
        with socket.socket() as listener:
            listener.bind(("", 0))
            port = listener.getsockname()[1]
        members = 1 + sum(sizes.values())
        next_rank = 1
        self._updates = []
        for url in self.urls:
            join = {
                "address": address,
                "port": port,
                "first_rank": next_rank,
                "world_size": members,
                "timeout_s": self.timeout_s,
            }
            # They answer when all have joined, so this process must join meanwhile.
            self._updates.append(self._ask_meanwhile(url, "/init_weight_transfer_engine", init_info=join))
            next_rank += sizes[url]
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
        try:
            self._stream = Stream(
                address,
                port,
                rank=0,
                world_size=members,
                device=device,
                timeout_s=self.timeout_s,
                check_servers=self._check,
            )
        except ConnectionError as error:
            self._check_health()
            for answer in self._updates:
                if answer.done():
                    answer.result()  # raises why one refused
            raise ConfigError(
                f"A vLLM server of {self.urls} doesn't join the trainer at {address}: see its own output, and whether "
                "this address is reached from there."
            ) from error
        self._await_updates()

    def generate(self, requests: Sequence[SamplingRequest]) -> Iterator[tuple[int, Completion]]:
        arrived: SimpleQueue[tuple[int, Completion] | None] = SimpleQueue()

        async def deliver() -> None:
            try:
                async for found in self._completions(requests):
                    arrived.put(found)
            finally:
                arrived.put(None)

        # In a thread of its own: a notebook's has a loop already. Leaving it cancels what is under way.
        with start_blocking_portal() as portal:
            delivery = portal.start_task_soon(deliver)
            while found := arrived.get():
                yield found
            delivery.result()  # raises what went wrong

    async def _completions(self, requests: Sequence[SamplingRequest]) -> AsyncIterator[tuple[int, Completion]]:
        mine = [(url, asyncio.Semaphore(self.max_num_seqs)) for url in self._mine()]
        # No connection is kept: a server closes one that has been idle for some seconds, perhaps as the next request
        # arrives. And requests wait for a semaphore, not for httpx, which would look through all of them each time.
        limits = httpx.Limits(max_keepalive_connections=0)
        # Not through a proxy of the environment, which would see the token.
        client = httpx.AsyncClient(
            timeout=None, limits=limits, headers=headers(), trust_env=False, verify=certificates()
        )
        async with client:

            async def complete(i: int, request: SamplingRequest) -> tuple[int, Completion]:
                url, free = mine[i % len(mine)]
                async with free:
                    return i, await self._complete(client, url, request)

            tasks = [asyncio.create_task(complete(i, request)) for i, request in enumerate(requests)]
            watch = asyncio.create_task(self._watch())  # never finished: it can only raise
            try:
                for finished in islice(asyncio.as_completed([*tasks, watch]), len(tasks)):
                    yield await finished
            finally:
                for task in (*tasks, watch):
                    task.cancel()
                await asyncio.gather(*tasks, watch, return_exceptions=True)

    async def _watch(self) -> NoReturn:
        """Raises when a server doesn't answer: one that froze, or whose machine is gone, closes no connection."""
        while True:
            await asyncio.sleep(CHECK_S)
            await asyncio.to_thread(self._check_health)

    @property
    def copies(self) -> int:
        return len(self._mine())

    def _mine(self) -> list[str]:
        """The servers that this rank asks."""
        return self.urls[rank() :: world_size()] or [self.urls[rank() % len(self.urls)]]

    async def _complete(self, client: httpx.AsyncClient, url: str, request: SamplingRequest) -> Completion:
        body = request_body(request, self.extra_body)
        path = "/inference/v1/generate"  # takes nothing from the model's generation_config.json but its end tokens
        try:
            response = await client.post(url + path, json=body)
        except httpx.TransportError as error:
            raise lost(url, error) from error
        if response.status_code != httpx.codes.OK:
            await asyncio.to_thread(self._check_health)  # an engine that has died answers here like a bad request
            refuse(url, path, response)
        (choice,) = response.json()["choices"]
        try:
            truncated = is_truncated(choice["finish_reason"])
        except RuntimeError as error:
            raise lost(url, error) from error
        return Completion(
            tuple(choice["token_ids"]),
            tuple(token["logprob"] for token in choice["logprobs"]["content"]),
            truncated=truncated,
        )

    def sync_weights(self, named_tensors: Iterable[tuple[str, Tensor]]) -> None:
        if rank() == 0:
            self._send(named_tensors)
        else:
            for _ in named_tensors:  # gathering a sharded tensor takes all ranks
                pass
        barrier()  # no rank samples before all servers have all weights

    def _send(self, named_tensors: Iterable[tuple[str, Tensor]]) -> None:
        stream = self._stream
        if stream is None:
            raise RuntimeError("the engine has not been started")
        # Ends what is still computed for nobody: for a generate that was left early, or a trainer that is gone.
        self._ask_all("/pause")
        # A trainer that was killed in here has left an update open.
        self._ask_all("/start_weight_update", otherwise="/finish_weight_update")
        self._updates = [self._ask_meanwhile(url, "/update_weights", update_info={}) for url in self.urls]
        try:
            for name, tensor in named_tensors:
                stream.send(name, tensor)
            stream.end()
        except BaseException as error:
            stream.close()  # the other servers still wait for the next tensor
            self._stream = None
            if isinstance(error, ConnectionError):
                wait(self._updates, timeout=CHECK_S)  # a server learns a moment later that its engine is gone
                self._check_health()  # names the one that is gone
                raise ConfigError(
                    f"A vLLM server of {self.urls} doesn't take the weights of {self._model_name}: see its own output. "
                    "Has it the same model?"
                ) from error
            raise
        self._await_updates()
        self._ask_all("/finish_weight_update")
        self._ask_all("/resume")

    def _check(self) -> None:
        """Raises if a server is gone or has refused what it is asked for meanwhile: a broadcast needn't notice."""
        self._check_health()
        if any(update.done() and update.exception() for update in self._updates):
            raise ConnectionError("a server has refused")

    def _await_updates(self) -> None:
        """Returns when all servers have answered what they were asked for meanwhile."""
        for url, update in zip(self.urls, self._updates, strict=True):
            try:
                update.result(self.timeout_s)
            except TimeoutError as error:
                raise lost(url, f"not in {self.timeout_s:g} s") from error

    def _check_health(self) -> None:
        for url in self.urls:
            self._ask(url, "GET", "/health", timeout=HEALTH_TIMEOUT_S)

    def _ask_all(self, path: str, otherwise: str | None = None) -> list[Answer]:
        with ThreadPoolExecutor(len(self.urls)) as pool:
            return list(pool.map(lambda url: self._ask(url, "POST", path, otherwise=otherwise), self.urls))

    def _ask_meanwhile(self, url: str, path: str, **body: object) -> Future[Answer]:
        """What a server will answer, when others have done their part. One that never does lets the process end."""
        limit = httpx.Timeout(self.timeout_s, read=None)
        answer: Future[Answer] = Future()

        def ask() -> None:
            try:
                answer.set_result(self._ask(url, "POST", path, timeout=limit, json=body))
            except Exception as error:
                answer.set_exception(error)

        threading.Thread(target=ask, daemon=True).start()
        return answer

    def _ask(
        self,
        url: str,
        method: str,
        path: str,
        *,
        timeout: float | httpx.Timeout | None = None,
        otherwise: str | None = None,
        json: Mapping[str, object] | None = None,
    ) -> Answer:
        """What a server answers. Where it refuses, ``otherwise`` is asked for, and then ``path`` once more."""
        try:
            response = httpx.request(
                method,
                url + path,
                timeout=timeout or self.timeout_s,
                headers=headers(),
                trust_env=False,
                verify=certificates(),
                json=json,
            )
        except httpx.TransportError as error:
            raise lost(url, error) from error
        if response.status_code == httpx.codes.OK:
            return Answer(response.json()) if response.content else {}
        if response.status_code == httpx.codes.SERVICE_UNAVAILABLE:
            raise lost(url, "its engine is dead")
        if otherwise and response.status_code != httpx.codes.UNAUTHORIZED:
            self._ask(url, method, otherwise)
            return self._ask(url, method, path)
        refuse(url, path, response)

    def stop(self) -> None:
        self._stream = None


@cache
def certificates() -> SSLContext:
    """Those that https is trusted by, read once: that takes 20 times as long as a request."""
    return httpx.create_ssl_context(trust_env=False)


def seen_by(url: str, timeout_s: float) -> str:
    """The address of this machine as a server sees it."""
    server = urlsplit(url)
    port = server.port or (443 if server.scheme == "https" else 80)
    try:
        with socket.create_connection((server.hostname or "", port), timeout=timeout_s) as connection:
            return str(connection.getsockname()[0])
    except OSError as error:
        raise lost(url, error) from error


def meeting_point(seen: Mapping[str, str]) -> str:
    """The address of the trainer at which all servers can join it.

    Args:
        seen: its address as each server sees it, by the server's URL. From loopback all addresses are reached.

    Raises:
        ConfigError: servers in different networks.
    """
    outside = {address for address in seen.values() if not ip_address(address).is_loopback}
    if len(outside) > 1:
        raise ConfigError(
            f"The vLLM servers see this machine by different addresses, {dict(seen)}, and must join it at one of them. "
            "Give VLLMServers.urls in one network, or on loopback."
        )
    return outside.pop() if outside else next(iter(seen.values()))


def refuse(url: str, path: str, response: httpx.Response) -> NoReturn:
    """Raises what a server's refusal means."""
    if response.status_code == httpx.codes.UNAUTHORIZED:
        raise ConfigError(
            f"The vLLM server at {url} was started with another token than the environment variable {TOKEN} "
            "has here. Set the same on both sides."
        )
    raise ConfigError(
        f"The vLLM server at {url} answered {path} with {response.status_code}: see its own output. Was it started by "
        f"scripts/serve.sh? {' '.join(response.text.split())[:300]}"
    )


def lost(url: str, reason: Exception | str) -> RunError:
    why = str(reason) or type(reason).__name__
    return RunError(
        f"The vLLM server at {url} doesn't answer ({why}). Nothing of the phase in the making is trained on. Start "
        "the server again with scripts/serve.sh and resume with the command that the run printed."
    )

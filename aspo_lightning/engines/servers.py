"""vLLM servers on other GPUs, or other machines, as the engine of a run."""

import asyncio
import socket
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any
from urllib.parse import urlsplit

import httpx
import torch
from torch import Tensor
from torch import distributed as dist
from tqdm.auto import tqdm

from aspo_lightning.engines.base import Finished, Generator, SamplingRequest, ignore
from aspo_lightning.engines.transfer import Stream
from aspo_lightning.errors import ConfigError
from aspo_lightning.identity import INCIDENTAL
from aspo_lightning.types import Completion

CONNECTIONS = 256  # to a server at a time: as many completions as it samples by default, and few enough open files


class VLLMServers(Generator):
    """Samples with servers started by ``scripts/serve.sh``, one or several. New weights are broadcast to all of them.

    Where there are several ranks, each uses its share of the servers, or shares one.

    Args:
        urls: like http://127.0.0.1:8001.
        timeout_s: how long servers and trainer wait for each other when weights are sent.
    """

    def __init__(self, urls: Annotated[list[str], INCIDENTAL], timeout_s: Annotated[float, INCIDENTAL] = 300.0) -> None:
        self.urls = [url.rstrip("/") for url in urls]
        self.timeout_s = timeout_s
        self._model = self._model_name = ""
        self._stream: Stream | None = None

    def check(self) -> None:
        if not self.urls:
            raise ConfigError("VLLMServers.urls is empty. Give the servers' addresses, like http://127.0.0.1:8001.")
        for url in self.urls:
            if not urlsplit(url).hostname or not urlsplit(url).scheme.startswith("http"):
                raise ConfigError(f"VLLMServers.urls has {url!r}; allowed are addresses like http://127.0.0.1:8001.")

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
            sizes[url] = self._ask(url, "GET", "/get_world_size", hint="start it by scripts/serve.sh")["world_size"]
        if len(set(models.values())) > 1:
            raise ConfigError(f"The vLLM servers have different models: {models}. Start all with {model_name_or_path}.")
        self._model, self._model_name = models[self.urls[0]], model_name_or_path
        if rank() == 0:
            self._connect(sizes)

    def _connect(self, sizes: dict[str, int]) -> None:
        """Opens the stream to all servers."""
        first = urlsplit(self.urls[0])
        with socket.create_connection((first.hostname or "", first.port or 80), timeout=self.timeout_s) as connection:
            address = connection.getsockname()[0]  # as which this machine is seen from there
        with socket.socket() as listener:
            listener.bind(("", 0))
            port = listener.getsockname()[1]
        world_size = 1 + sum(sizes.values())
        joins: list[dict[str, Any]] = []
        next_rank = 1
        for url in self.urls:
            joins.append(
                {
                    "address": address,
                    "port": port,
                    "first_rank": next_rank,
                    "world_size": world_size,
                    "timeout_s": self.timeout_s,
                }
            )
            next_rank += sizes[url]
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
        with ThreadPoolExecutor(len(self.urls)) as pool:
            # They answer when all have joined, so this one must meanwhile.
            answers = [
                pool.submit(self._ask, url, "POST", "/init_weight_transfer_engine", json={"init_info": join})
                for url, join in zip(self.urls, joins, strict=True)
            ]
            self._stream = Stream(address, port, rank=0, world_size=world_size, device=device, timeout_s=self.timeout_s)
            for answer in answers:
                answer.result()

    def generate(
        self, requests: Sequence[SamplingRequest], *, description: str, finished: Finished = ignore
    ) -> list[Completion]:
        return asyncio.run(self._generate(requests, description, finished))

    async def _generate(
        self, requests: Sequence[SamplingRequest], description: str, finished: Finished
    ) -> list[Completion]:
        mine = self._mine()
        limits = httpx.Limits(max_connections=CONNECTIONS * len(mine))
        with tqdm(total=len(requests), desc=description, leave=False, disable=None) as bar:

            async def complete(client: httpx.AsyncClient, i: int, request: SamplingRequest) -> Completion:
                completion = await self._complete(client, mine[i % len(mine)], request)
                finished(i, completion)
                bar.update()
                return completion

            async with httpx.AsyncClient(timeout=None, limits=limits) as client:
                tasks = [asyncio.create_task(complete(client, i, request)) for i, request in enumerate(requests)]
                try:
                    return list(await asyncio.gather(*tasks))
                finally:
                    for task in tasks:
                        task.cancel()  # the others, when one failed

    @property
    def copies(self) -> int:
        return len(self._mine())

    def _mine(self) -> list[str]:
        """The servers that this rank asks."""
        ranks = dist.get_world_size() if dist.is_initialized() else 1
        return self.urls[rank() :: ranks] or [self.urls[rank() % len(self.urls)]]

    async def _complete(self, client: httpx.AsyncClient, url: str, request: SamplingRequest) -> Completion:
        body = {
            "model": self._model,
            "prompt": list(request.prompt_ids),
            "max_tokens": request.max_tokens,
            "temperature": request.temperature,
            "top_p": request.top_p,
            # The rest isn't left out: a server would take it from the model's generation_config.json.
            "top_k": 0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "seed": request.seed,
            "logprobs": 0,
            "return_token_ids": True,
        }
        try:
            response = await client.post(f"{url}/v1/completions", json=body)
        except httpx.TransportError as error:
            raise lost(url, error) from error
        if response.status_code != httpx.codes.OK:
            raise ConfigError(f"The vLLM server at {url} refused a completion: {response.text[:300]}")
        choice = response.json()["choices"][0]
        return Completion(
            tuple(choice["token_ids"]),
            tuple(choice["logprobs"]["token_logprobs"]),
            truncated=choice["finish_reason"] == "length",
        )

    def sync_weights(self, named_tensors: Iterable[tuple[str, Tensor]]) -> None:
        if rank() == 0:
            self._send(named_tensors)
        else:
            for _ in named_tensors:  # gathering a sharded tensor takes all ranks
                pass
        if dist.is_initialized():
            dist.barrier()  # no rank samples before all servers have all weights

    def _send(self, named_tensors: Iterable[tuple[str, Tensor]]) -> None:
        stream = self._stream
        if stream is None:
            raise RuntimeError("the engine has not been started")
        # A trainer that was killed in here has left an update open.
        self._ask_all("/start_weight_update", otherwise="/finish_weight_update")
        with ThreadPoolExecutor(len(self.urls)) as pool:
            answers = [
                pool.submit(self._ask, url, "POST", "/update_weights", json={"update_info": {}}) for url in self.urls
            ]
            try:
                for name, tensor in named_tensors:
                    stream.send(name, tensor)
                stream.end()
            except RuntimeError as error:  # of the process group
                stream.close()  # the other servers still wait for the next tensor
                for url in self.urls:
                    self._ask(url, "GET", "/health")  # names the one that is gone
                raise ConfigError(
                    f"A vLLM server of {self.urls} doesn't take the weights of {self._model_name}: see its own output. "
                    "Has it the same model?"
                ) from error
            for answer in answers:
                answer.result()
        self._ask_all("/finish_weight_update")
        deadline = time.monotonic() + self.timeout_s
        # A server still holds the cache of its last completions for a moment after it has answered.
        while not all(answer["success"] for answer in self._ask_all("/reset_prefix_cache")):
            if time.monotonic() > deadline:
                raise ConfigError(f"A vLLM server of {self.urls} is never idle: one run at a time can use them.")
            time.sleep(0.05)

    def _ask_all(self, path: str, otherwise: str | None = None) -> list[Any]:
        with ThreadPoolExecutor(len(self.urls)) as pool:
            return list(pool.map(lambda url: self._ask(url, "POST", path, otherwise=otherwise), self.urls))

    def _ask(
        self,
        url: str,
        method: str,
        path: str,
        *,
        hint: str = "see its own output",
        otherwise: str | None = None,
        **body: Any,
    ) -> Any:
        """What a server answers. Where it refuses, ``otherwise`` is asked for, and then once more."""
        try:
            response = httpx.request(method, url + path, timeout=self.timeout_s, **body)
        except httpx.TransportError as error:
            raise lost(url, error) from error
        if response.status_code == httpx.codes.OK:
            return response.json() if response.content else None
        if otherwise:
            self._ask(url, method, otherwise)
            return self._ask(url, method, path)
        raise ConfigError(f"The vLLM server at {url} answered {path} with {response.status_code}: {hint}.")

    def stop(self) -> None:
        self._stream = None


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def lost(url: str, error: Exception) -> ConfigError:
    reason = str(error) or type(error).__name__
    return ConfigError(
        f"The vLLM server at {url} doesn't answer ({reason}). Nothing of the phase in the making is trained on. Start "
        "the server again by scripts/serve.sh and go on by --ckpt_path last."
    )

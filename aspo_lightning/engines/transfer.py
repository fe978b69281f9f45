"""Weights from a trainer to vLLM servers: both ends of a stream of tensors, through vLLM's weight-transfer interface.

vLLM finds ``register`` by the package's entry point, in each of its processes; a server uses it when it is started with
``--weight-transfer-config '{"backend": "aspo"}'``. The trainer is rank 0 of a process group of its own, all workers of
all servers are the other ranks. Each tensor is broadcast after a header, so only one exists at a time.

vLLM's own NCCL backend could serve several servers too, but not on CPUs: with it there would be two streams. It also
wants all names and shapes in advance, and waits for a lost peer forever.
"""

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from aspo_lightning.errors import ConfigError

HEADER_BYTES = 1024
POLL_S = 1e-4
CHECK_S = 1.0
UNFINISHED: list[Any] = []
"""Groups that are kept for ever: gloo would wait for what they have under way, for as long as the time limit is."""


class Stream:
    """One end of the stream. Making it waits for all others.

    Whoever waits in a broadcast checks every second whether the others are still there: NCCL doesn't notice.

    Args:
        address: where the trainer listens.
        port: of the trainer.
        rank: 0 sends.
        world_size: one trainer and all workers.
        device: where the tensors are; a GPU's go over NCCL, others over gloo.
        timeout_s: how long to wait for the others.
        check_servers: for the trainer; raises if a server is gone.

    Raises:
        ConfigError: weights can't be sent between these devices.
        ConnectionError: from all methods, when another end is gone or keeps this one waiting too long.
    """

    def __init__(
        self,
        address: str,
        port: int,
        *,
        rank: int,
        world_size: int,
        device: torch.device,
        timeout_s: float,
        check_servers: Callable[[], None] | None = None,
    ) -> None:
        self.rank, self.device, self.timeout_s = rank, device, timeout_s
        timeout = timedelta(seconds=timeout_s)
        self.check_servers = check_servers
        self.work: dist.Work | None = None
        try:
            self.store = dist.TCPStore(
                address, port, world_size, is_master=rank == 0, timeout=timeout, wait_for_workers=False
            )
            self.store.set(f"device/{rank}", device_id(device))
            names = [f"device/{i}" for i in range(world_size)]
            self._until(lambda: self.store.check(names), every=0.05)
            check_devices([self.store.get(name).decode() for name in names])
            if device.type == "cuda":
                options = dist.ProcessGroupNCCL.Options()
                options._timeout = 2 * timeout  # after ours: NCCL ends the whole process at its own
                self.group: Any = dist.ProcessGroupNCCL(self.store, rank, world_size, options)
            else:
                self.group = dist.ProcessGroupGloo(self.store, rank, world_size, timeout)
        except RuntimeError as error:
            raise ConnectionError(f"the others didn't come within {timeout_s:g} s") from error

    def close(self) -> None:
        """Ends the stream, so that no other end waits for this one. May be called more than once."""
        if self.group is None:
            return
        if self.rank == 0:
            self.store.set("closed", "")
        self.group.abort()  # what NCCL has under way
        if self.work is not None and not self.work.is_completed():
            UNFINISHED.append(self.group)
        self.group = None  # gloo closes its connections and ends its threads then

    def _check(self) -> None:
        if self.check_servers is not None:
            self.check_servers()
        elif self.store.check(["closed"]):  # raises where the trainer is gone
            raise ConnectionError("the trainer has closed the stream")

    def _until(self, holds: Callable[[], bool], every: float = POLL_S) -> None:
        """Returns when it holds; looks every second whether the others are still there."""
        start = checked = time.monotonic()
        while not holds():
            time.sleep(every)
            if time.monotonic() > checked + CHECK_S:
                self._check()
                checked = time.monotonic()
            if checked > start + self.timeout_s:
                raise ConnectionError(f"the others aren't ready after {self.timeout_s:g} s")

    def _broadcast(self, tensor: Tensor) -> Tensor:
        try:
            self.work = work = self.group.broadcast([tensor], dist.BroadcastOptions())
            self._until(work.is_completed)
            work.wait()  # raises what went wrong
        except RuntimeError as error:
            raise ConnectionError("another end of the stream is gone") from error
        return tensor

    def _send_header(self, header: Mapping[str, object]) -> None:
        text = json.dumps(header).encode().ljust(HEADER_BYTES)
        assert len(text) == HEADER_BYTES, f"a tensor's name is too long: {header}"
        self._broadcast(torch.frombuffer(bytearray(text), dtype=torch.uint8).to(self.device))

    def send(self, name: str, tensor: Tensor) -> None:
        dtype = str(tensor.dtype).removeprefix("torch.")
        self._send_header({"name": name, "dtype": dtype, "shape": list(tensor.shape)})
        self._broadcast(tensor.to(self.device).contiguous())

    def end(self) -> None:
        self._send_header({})

    def receive(self) -> Iterator[tuple[str, Tensor]]:
        """Until the sender's ``end``."""
        while True:
            text = self._broadcast(torch.empty(HEADER_BYTES, dtype=torch.uint8, device=self.device))
            header = json.loads(bytes(text.tolist()))
            if not header:
                return
            shape, dtype = header["shape"], getattr(torch, header["dtype"])
            yield header["name"], self._broadcast(torch.empty(shape, dtype=dtype, device=self.device))


def device_id(device: torch.device) -> str:
    """``cpu``, or the UUID of a GPU."""
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else "cpu"


def check_devices(devices: Sequence[str]) -> None:
    """Raises ConfigError if weights can't be sent from the first of these to the others; each as by ``device_id``."""
    gpus = [device for device in devices if device != "cpu"]
    if gpus and len(gpus) < len(devices):
        raise ConfigError(
            "Of the trainer and its vLLM servers, some are on GPUs and some on CPUs; weights are sent between GPUs or "
            "between CPUs. Start all of them on the same kind."
        )
    for gpu in gpus:
        if gpus.count(gpu) > 1:
            sharing = "The trainer and a vLLM server" if gpu == devices[0] else "Two workers of vLLM servers"
            raise ConfigError(
                f"{sharing} use the same GPU ({gpu}), between which NCCL can't send weights. Start each server with "
                "CUDA_VISIBLE_DEVICES set to GPUs of its own."
            )


def register() -> None:
    """Makes the backend ``aspo`` known to the vLLM of this process."""
    from vllm.distributed.weight_transfer import WeightTransferEngineFactory

    with suppress(ValueError):  # it is already: vLLM may load its plugins twice
        WeightTransferEngineFactory.register_engine("aspo", "aspo_lightning.engines.vllm_internals", "StreamedWeights")

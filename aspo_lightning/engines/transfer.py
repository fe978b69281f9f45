"""Weights from a trainer to vLLM servers: both ends of a stream of tensors, by vLLM's weight-transfer interface.

vLLM finds ``register`` by the package's entry point, in each of its processes; a server uses it when it is started with
``--weight-transfer-config '{"backend": "aspo"}'``. The trainer is rank 0 of a process group of its own, all workers of
all servers are the other ranks. Each tensor is broadcast behind a header, so only one exists at a time.
"""

import json
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

HEADER_BYTES = 1024


class Stream:
    """One end of the stream. Making it waits for all others.

    Args:
        address: where the trainer listens.
        port: of the trainer.
        rank: 0 sends.
        world_size: one trainer and all workers.
        device: where the tensors are; a GPU's go by NCCL, others by gloo.
        timeout_s: how long to wait for the others.
    """

    def __init__(
        self, address: str, port: int, *, rank: int, world_size: int, device: torch.device, timeout_s: float
    ) -> None:
        timeout = timedelta(seconds=timeout_s)
        store = dist.TCPStore(address, port, world_size, is_master=rank == 0, timeout=timeout)
        self.device = device
        if device.type == "cuda":
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = timeout
            self.group: Any = dist.ProcessGroupNCCL(store, rank, world_size, options)
        else:
            self.group = dist.ProcessGroupGloo(store, rank, world_size, timeout)

    def close(self) -> None:
        self.group = None

    def _broadcast(self, tensor: Tensor) -> Tensor:
        self.group.broadcast([tensor], dist.BroadcastOptions()).wait()
        return tensor

    def _send_header(self, header: dict[str, Any]) -> None:
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


def register() -> None:
    """Makes the backend ``aspo`` known to the vLLM of this process."""
    from vllm.distributed.weight_transfer import WeightTransferEngineFactory

    if "aspo" not in WeightTransferEngineFactory._registry:  # vLLM may load its plugins twice
        WeightTransferEngineFactory.register_engine("aspo", "aspo_lightning.engines.worker", "StreamedWeights")

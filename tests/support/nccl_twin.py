"""What NCCL changes in Lightning, on CPUs: a process group that isn't called gloo. Given as ``--trainer.strategy``."""

from typing import Any

from torch import Tensor

from aspo_lightning.fsdp import FSDP2Strategy


class NCCLTwin(FSDP2Strategy):
    """With a backend of another name than gloo Lightning evaluates in inference mode."""

    def _get_process_group_backend(self) -> str:
        return "cpu:gloo"

    def reduce(self, tensor: Tensor, group: Any = None, reduce_op: Any = "mean") -> Tensor:
        # gloo has no mean of integers, as NCCL does.
        return super().reduce(tensor.float(), group, reduce_op).to(tensor.dtype)

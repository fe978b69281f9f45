"""What an update computes, against what the machine can."""

import time
from collections.abc import Iterable

import torch
from torch import nn
from transformers import PreTrainedModel

from aspo_lightning.scorer import matmul
from aspo_lightning.types import MicroBatch

_SIZES = {"cpu": (256, 512, 1024, 2048), "cuda": (1024, 8192)}  # rows and columns: the last is enough for the peak
_TIMES = 3
_LONG_S = 0.02


def update_flops(lm: PreTrainedModel, batches: Iterable[MicroBatch]) -> float:
    """Operations of the weights' products in forward and backward of these micro-batches, by the whole model.

    In the layers of all T tokens of a row, in the head of its N response tokens.
    """
    rows, responses = (sum(sizes) for sizes in zip(*((len(b.input_ids), len(b.targets)) for b in batches), strict=True))
    layers, head = flops_per_token(lm)
    return rows * layers + responses * head


def flops_per_token(lm: PreTrainedModel) -> tuple[float, float]:
    """Operations of the weights' products in forward and backward of a token: in the layers, and in the head.

    2 for each weight in forward, 2 for the gradient of what comes in, 2 for that of the weight where it is trained. Of
    experts, the share that a token goes through. Attention between tokens isn't counted, nor what gradient
    checkpointing repeats.
    """
    head, embedding = lm.get_output_embeddings().weight, lm.get_input_embeddings().weight
    chosen = getattr(lm.config.get_text_config(), "num_experts_per_tok", None) or 1

    def of(weight: nn.Parameter) -> float:
        used = chosen / len(weight) if weight.ndim == 3 else 1.0  # the weights of all experts in one
        return (6 if weight.requires_grad else 4) * weight.numel() * used

    layers = (p for p in lm.parameters() if p.ndim > 1 and p is not head and p is not embedding)
    return sum(map(of, layers)), of(head)


def product_peak(dtype: torch.dtype, device: torch.device) -> float:
    """Operations a second of a large product on this machine: the fastest of several.

    It grows until one takes long: in bfloat16, on a processor that has no instructions for it, the largest would take
    minutes.
    """
    fastest, size = float("inf"), 0
    for size in _SIZES.get(device.type, _SIZES["cpu"]):
        fastest = _fastest(size, dtype, device)
        if fastest > _LONG_S:
            break
    return 2 * size**3 / fastest


def _fastest(n: int, dtype: torch.dtype, device: torch.device) -> float:
    # From a generator of its own: a run's random numbers don't depend on what is measured.
    a = torch.randn(n, n, device=device, generator=torch.Generator(device)).to(dtype)
    product = matmul if dtype == torch.float32 else torch.mm
    fastest = float("inf")
    for _ in range(_TIMES):
        start = time.perf_counter()
        product(a, a)[0, 0].item()  # waits for the device
        fastest = min(fastest, time.perf_counter() - start)
    return fastest

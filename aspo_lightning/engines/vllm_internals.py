"""All that patches vLLM or reaches into it, here and in its workers: what may move with its version.

Taking over new weights, running requests step by step, and what the CPU build needs on top. That each name still exists
in the vLLM that is installed: ``tests/test_private_names.py``.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from vllm._custom_ops import CPUDNNLGEMMHandler, create_onednn_mm, onednn_mm
from vllm.config import set_current_vllm_config
from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.model_executor.model_loader.reload.meta import SKIP_MODULES
from vllm.outputs import RequestOutput
from vllm.platforms import CpuArchEnum, current_platform

from aspo_lightning.engines.transfer import Stream

if TYPE_CHECKING:
    from vllm import LLM

# A reload makes each layer anew before it copies it over the old one. For the largest two that would be noticeable, so
# they stay where they are, for ``load_in_place``.
SKIP_MODULES.update({"VocabParallelEmbedding", "ParallelLMHead"})


@dataclass
class Rendezvous(WeightTransferInitInfo):
    """Where a server joins, and as which rank."""

    address: str
    port: int
    first_rank: int
    world_size: int
    timeout_s: float


@dataclass
class Nothing(WeightTransferUpdateInfo):
    """What comes with an update: the tensors have headers."""


class StreamedWeights(WeightTransferEngine[Rendezvous, Nothing]):
    """A server's end of the stream."""

    init_info_cls = Rendezvous
    update_info_cls = Nothing
    supports_draft_weight_update = False
    stream: Stream | None = None

    def init_transfer_engine(self, init_info: Rendezvous) -> None:
        self.shutdown()  # what is left of an earlier trainer: connections and threads, over NCCL memory
        parallel = self.parallel_config
        self.stream = Stream(
            init_info.address,
            init_info.port,
            rank=init_info.first_rank + parallel.data_parallel_index * parallel.world_size + parallel.rank,
            world_size=init_info.world_size,
            device=self.device,
            timeout_s=init_info.timeout_s,
        )

    def start_weight_update(self) -> None:
        if self.device.type == "cpu":
            forget_expert_kernels(self.model)
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: Nothing) -> None:
        stream = self.stream  # of this update, whatever comes next
        assert stream is not None
        try:
            with set_current_vllm_config(self.vllm_config):
                load = self.model.load_weights
                assert callable(load)
                load(load_in_place(embeddings(self.model), stream.receive()))
        except BaseException:
            stream.close()  # so that the trainer doesn't wait
            self.finish_weight_update()  # else vLLM calls it off, and the next update would find layers half made
            raise

    def finish_weight_update(self) -> None:
        with set_current_vllm_config(self.vllm_config):
            finalize_layerwise_reload(self.model, self.model_config)
            if self.device.type == "cpu":
                pack_head(self.model)

    def shutdown(self) -> None:
        if self.stream is not None:
            self.stream.close()
            self.stream = None


def embeddings(model: nn.Module) -> dict[str, VocabParallelEmbedding]:
    """Embedding and head, by the names of their weights."""
    return {
        f"{name}.weight": module for name, module in model.named_modules() if isinstance(module, VocabParallelEmbedding)
    }


def load_in_place(
    modules: Mapping[str, VocabParallelEmbedding], named_tensors: Iterable[tuple[str, Tensor]]
) -> Iterator[tuple[str, Tensor]]:
    """Copies weights of ``modules`` to where they are, and passes on the others."""
    for name, tensor in named_tensors:
        if name in modules:
            modules[name].weight_loader(modules[name].get_parameter("weight"), tensor)
        else:
            yield name, tensor


def without_shared_memory() -> None:
    """Has ranks that share an engine of the CPU build talk by gloo.

    Under this launcher their shared memory has the same name in every run, even one that was killed.
    """
    CpuCommunicator._all_group_ranks_share_shm_group_name = lambda self: False  # type: ignore[method-assign]


def pack_head(model: nn.Module) -> None:
    """Packs the head again, as the CPU build does after loading; a head of 16 bits as its logits are computed."""
    for module in model.modules():
        if not isinstance(module, ParallelLMHead):
            continue
        weight = module.get_parameter("weight")
        if weight.dtype == torch.float32 or current_platform.get_cpu_architecture() != CpuArchEnum.X86:
            assert isinstance(module.quant_method, QuantizeMethodBase)
            module.quant_method.process_weights_after_loading(module)
        else:
            packed_heads[module] = create_onednn_mm(weight.float().t())


def float32_logits(
    self: LogitsProcessor, lm_head: VocabParallelEmbedding, hidden_states: Tensor, embedding_bias: Tensor | None
) -> Tensor:
    """Logits by what ``pack_head`` has packed. vLLM would make a float32 copy of the head for each token."""
    if (packed := packed_heads.get(lm_head)) is None:
        return apply_head(self, lm_head, hidden_states, embedding_bias)
    bias = None if embedding_bias is None else embedding_bias.float()
    return onednn_mm(packed, hidden_states.float(), bias)


packed_heads: WeakKeyDictionary[nn.Module, CPUDNNLGEMMHandler] = WeakKeyDictionary()
apply_head = LogitsProcessor._apply_head
LogitsProcessor._apply_head = float32_logits  # type: ignore[method-assign]


def forget_expert_kernels(model: nn.Module) -> None:
    """Has the CPU build pack a mixture's experts again in a reload: it only does so where there is no kernel yet."""
    for module in model.modules():
        if isinstance(method := getattr(module, "quant_method", None), FusedMoEMethodBase):
            method.moe_kernel = None


def places(ids: Sequence[str]) -> dict[str, int]:
    """By the id that an output has, the place of its request in what ``LLM.enqueue`` returned: ids with a suffix."""
    return {id.partition("-")[0]: place for place, id in enumerate(ids)}


def running(llm: "LLM") -> bool:
    """Whether a request isn't finished yet."""
    return llm.llm_engine.has_unfinished_requests()


def step(llm: "LLM") -> list[RequestOutput]:
    """Samples a token of each request that runs. Returns the requests that it finishes."""
    outputs = llm.llm_engine.step()
    return [output for output in outputs if isinstance(output, RequestOutput) and output.finished]


def cancel(llm: "LLM", ids: Sequence[str]) -> None:
    """Ends those requests that aren't finished yet, by the ids that ``LLM.enqueue`` returned."""
    llm.llm_engine.abort_request(list(ids), internal=True)

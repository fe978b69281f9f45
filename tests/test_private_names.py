"""What the package reaches into in its libraries still exists in those that are installed."""

import inspect
from types import SimpleNamespace


def test_vllm_has_what_is_patched_or_reached_into():
    """All of aspo_lightning/engines/vllm_internals.py, whose imports are names of vLLM too."""
    from vllm import LLM
    from vllm.model_executor.model_loader.reload import meta
    from vllm.v1.engine.input_processor import InputProcessor
    from vllm.v1.engine.llm_engine import LLMEngine
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    from aspo_lightning.engines import vllm_internals as internals

    for name in ("VocabParallelEmbedding", "ParallelLMHead"):
        assert name in internals.SKIP_MODULES
        assert getattr(internals, name).__name__ == name
    assert meta.SKIP_MODULES is internals.SKIP_MODULES
    assert "SKIP_MODULES" in meta.materialize_layer.__code__.co_names
    assert callable(internals.VocabParallelEmbedding.weight_loader)
    assert callable(internals.QuantizeMethodBase.process_weights_after_loading)
    assert "quant_method" in assigned(internals.VocabParallelEmbedding)
    assert "moe_kernel" in assigned(internals.FusedMoEMethodBase)
    assert inspect.isfunction(internals.CpuCommunicator._all_group_ranks_share_shm_group_name)
    assert "weights_iterator" in inspect.signature(GPUModelRunner.reload_weights).parameters
    assert "llm_engine" in assigned(LLM)
    assert {"step", "has_unfinished_requests"} <= set(vars(LLMEngine))
    assert "internal" in inspect.signature(LLMEngine.abort_request).parameters
    request = SimpleNamespace(request_id="12", external_req_id=None)
    InputProcessor.assign_request_id(request)
    assert request.external_req_id == "12"  # which an output has
    assert internals.places(["5-a", request.request_id])["12"] == 1


def assigned(cls: type) -> set[str]:
    """The attributes that its objects are made with."""
    return set(cls.__init__.__code__.co_names)

"""Names of libraries that aren't documented and that we reach for: an update that takes one away is seen here first."""

import inspect
from types import SimpleNamespace

import torch
from jsonargparse import _typehints
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.strategies import ModelParallelStrategy

from aspo_lightning.cli import parser
from aspo_lightning.policy.causal_lm import ScoredCausalLM
from aspo_lightning.policy.weights import add_lora
from aspo_lightning.run.lightning import OVERRIDDEN


def test_lightning_still_has_what_we_reach_for():
    """What run/lightning.py names, and what FSDP2Strategy and the ranks use of strategies and launchers."""
    for owner, name in OVERRIDDEN:
        assert callable(getattr(owner, name)), name
    trainer = Trainer(accelerator="cpu", devices=2, strategy="ddp", logger=False)
    assert all(isinstance(callback, Callback) for callback in trainer.callbacks)
    assert trainer.datamodule is None
    assert isinstance(trainer.accumulate_grad_batches, int)
    assert isinstance(trainer.fit_loop.epoch_progress.current.processed, int)
    loop = trainer.fit_loop.epoch_loop
    assert loop.min_steps is None
    assert loop._batches_that_stepped == 0
    assert callable(loop._results.clear)
    assert callable(trainer._logger_connector.update_train_epoch_metrics)
    assert loop.max_steps == -1
    assert callable(loop.val_loop.run)
    assert callable(trainer._signal_connector.register_signal_handlers)
    assert LightningModule()._trainer is None
    trainer.strategy._configure_launcher()
    assert trainer.strategy.launcher.procs == []
    assert {"_data_parallel_size", "_tensor_parallel_size"} <= set(vars(ModelParallelStrategy()))


def test_lightning_installs_its_signal_handlers_where_we_keep_it_from_that():
    asked = []

    class Look(Callback):
        def on_fit_start(self, trainer, pl_module):
            trainer._signal_connector.register_signal_handlers = lambda: asked.append("before the first phase")

        def on_train_start(self, trainer, pl_module):
            asked.append("on_train_start")

    off = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    Trainer(accelerator="cpu", fast_dev_run=1, callbacks=[Look()], **off).fit(BoringModel())
    assert asked == ["before the first phase", "on_train_start"]


def test_jsonargparse_still_asks_us_what_a_class_takes_over_from_another():
    assert _typehints.discard_init_args_on_class_path_change is parser.discard_defaults
    assert list(inspect.signature(parser.discard_unknown).parameters) == ["parser_or_action", "prev_val", "value"]
    assert "discard_init_args_on_class_path_change" in _typehints.adapt_class_type.__code__.co_names


def test_torch_transformers_and_peft_still_have_what_we_reach_for(tiny_model):
    lm = ScoredCausalLM.from_pretrained(tiny_model).lm
    assert lm.config._attn_implementation == "packed"
    assert lm._weight_conversions == []
    assert set(lm._no_split_modules) <= {type(module).__name__ for module in lm.modules()}
    add_lora(lm, 2, 4.0)
    assert any(hasattr(module, "_disable_adapters") for module in lm.modules())
    if torch.backends.mkldnn.is_available():
        assert torch.ops.mkldnn._linear_pointwise(torch.ones(1, 2), torch.ones(3, 2), None, "none", [], "").sum() == 6


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
    parameters = inspect.signature(internals.apply_head).parameters
    assert list(parameters) == list(inspect.signature(internals.float32_logits).parameters)
    assert "_apply_head" in internals.LogitsProcessor._get_logits.__code__.co_names
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

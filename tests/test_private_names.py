"""Names of libraries that aren't documented and that we reach for: an update that takes one away is seen here first."""

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.strategies import ModelParallelStrategy

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


def test_torch_transformers_and_peft_still_have_what_we_reach_for(tiny_model):
    lm = ScoredCausalLM.from_pretrained(tiny_model).lm
    assert lm.config._attn_implementation == "packed"
    assert set(lm._no_split_modules) <= {type(module).__name__ for module in lm.modules()}
    add_lora(lm, 2, 4.0)
    assert any(hasattr(module, "_disable_adapters") for module in lm.modules())
    if torch.backends.mkldnn.is_available():
        assert torch.ops.mkldnn._linear_pointwise(torch.ones(1, 2), torch.ones(3, 2), None, "none", [], "").sum() == 6

"""What ``aspo export`` makes of a checkpoint. That an exported folder is the policy: test_fsdp.py."""

import json

import pytest

from aspo_lightning import ASPOModule
from aspo_lightning.cli.export import main
from aspo_lightning.run.checkpoints import AtomicCheckpointIO
from tests.support.models import save_model, save_tokenizer


@pytest.fixture
def checkpoint(tmp_path):
    """Of a model that is published with dropout."""
    save_model(tmp_path / "model", attention_dropout=0.1)
    save_tokenizer(tmp_path / "model")
    module = ASPOModule(str(tmp_path / "model"))
    module.configure_model()
    assert module.policy.lm.config.attention_dropout == 0  # it trains without
    content = {"state_dict": module.state_dict(), "global_step": 0}
    module.on_save_checkpoint(content)
    AtomicCheckpointIO().save_checkpoint(content, tmp_path / "epoch_00000.ckpt")
    return tmp_path / "epoch_00000.ckpt"


def test_the_config_is_the_models_own_but_for_the_dtype(checkpoint, tmp_path):
    original = json.loads((tmp_path / "model" / "config.json").read_text())
    assert original["attention_dropout"] == 0.1
    assert original["dtype"] == "float32"
    for arguments, dtype in (([], "float32"), (["--dtype", "bfloat16"], "bfloat16")):
        main([str(checkpoint), str(tmp_path / dtype), *arguments])
        assert json.loads((tmp_path / dtype / "config.json").read_text()) == {**original, "dtype": dtype}

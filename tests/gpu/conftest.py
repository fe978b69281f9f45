"""What tests of GPUs share. On a machine without one they skip, but for those that a CPU runs as well; with
ASPO_GPU_TWIN=1 in the environment all of them run there, small, to test the tests.
"""

import importlib.util

import pytest
import torch

from tests.support.gpu import DEVICE, TWIN
from tests.support.models import save_model, save_tokenizer

NO_GPU = "torch sees no GPU; ASPO_GPU_TWIN=1 runs this small, on the CPU"


def pytest_collection_modifyitems(items):
    if importlib.util.find_spec("vllm") is None:
        for item in items:
            if item.get_closest_marker("vllm"):
                item.add_marker(pytest.mark.skip(reason="vllm isn't installed: scripts/install.sh"))


def pytest_terminal_summary(terminalreporter):
    """The figures that tests have noted."""
    reports = [*terminalreporter.stats.get("passed", []), *terminalreporter.stats.get("failed", [])]
    notes = [text for report in reports for name, text in report.user_properties if name == "note"]
    if notes:
        terminalreporter.section("figures")
        for text in notes:
            terminalreporter.write_line(text)


@pytest.fixture
def note(record_property):
    """Shows a line at the end."""
    return lambda text: record_property("note", text)


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Of a test that runs on what there is."""
    return DEVICE


@pytest.fixture(scope="session")
def gpu(device) -> torch.device:
    """Of a test that is for a GPU."""
    if device.type != "cuda" and not TWIN:
        pytest.skip(NO_GPU)
    return device


@pytest.fixture(scope="session")
def small_model(tmp_path_factory) -> str:
    """A Llama with random weights and heads of 64, which a GPU's kernels want."""
    folder = tmp_path_factory.mktemp("small_model")
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    save_model(folder, hidden_size=256, intermediate_size=512, initializer_range=0.1, **heads)
    save_tokenizer(folder)
    return str(folder)

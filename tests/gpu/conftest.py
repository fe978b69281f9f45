"""What tests of one GPU share. On a machine without one they skip, but for those that a CPU runs as well; with
ASPO_GPU_TWIN=1 in the environment all of them run there, small, to test the tests.
"""

import importlib.util
import os

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from tests.conftest import save_model, save_tokenizer

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TWIN = os.environ.get("ASPO_GPU_TWIN") == "1"
NO_GPU = "torch sees no GPU; ASPO_GPU_TWIN=1 runs this small, on the CPU"
# Above what a count gives: allocations are rounded up, and so is a kernel's scratch.
ROOM = 32 * 2**20 if DEVICE.type == "cuda" else 2**18


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


def on(gpu, cpu):
    """One size for a GPU, another for a CPU."""
    return gpu if DEVICE.type == "cuda" else cpu


def peak(work) -> int:
    """Bytes that ``work()`` takes beyond what there was, at its peak; the second time, when all is compiled."""
    work()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = highest = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        highest = max(highest, held)
    return highest

"""Shared by all tests: the order of the files, and the tiny model."""

import os
import sys
from functools import partial

import pytest
from hypothesis import Phase, settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

settings.register_profile("tests", deadline=None)  # how long an example takes is the machine's business
settings.load_profile("tests")
# For scripts/mutants.sh: an example that fails is all it wants.
settings.register_profile("mutants", phases=[Phase.explicit, Phase.generate], database=None, deadline=None)

SLOW = (
    "test_faults",
    "test_fsdp",
    "test_recipes_run",
    "test_servers",
    "test_lag",
    "test_docs",
    "test_study",
    "test_evaluation",
    "test_runs",
    "test_from_python",
    "test_view",
    "test_loggers",
    "test_gradients",
)  # by file, the slowest first


def pytest_collection_modifyitems(items):
    """Slow files first: otherwise one process waits at the end while the other works through the last of them."""
    items.sort(key=lambda item: SLOW.index(item.path.stem) if item.path.stem in SLOW else len(SLOW))


@pytest.fixture(scope="module", autouse=True)
def no_process_group_is_left():
    """vLLM in this process makes one, which lives as long as the process and would be in the next file's way."""
    yield
    if (vllm_groups := sys.modules.get("vllm.distributed.parallel_state")) is not None:
        vllm_groups.destroy_model_parallel()
        vllm_groups.destroy_distributed_environment()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> str:
    """A Llama with random weights: 128 tokens, two layers, tied head."""
    from tests.support.models import save_model, save_tokenizer  # transformers, after HF_HUB_OFFLINE is set

    folder = tmp_path_factory.mktemp("tiny_model")
    save_model(folder)
    save_tokenizer(folder)
    return str(folder)


@pytest.fixture(scope="session")
def quick_server(tmp_path_factory):
    """Starts a ``Server``, on a CPU in a fork of a process that is ready for it."""
    import torch

    from tests.support.servers import ForkedServer, Forks, Server

    if torch.cuda.is_available():
        yield Server
        return
    with Forks(tmp_path_factory.mktemp("forks")) as forks:
        yield partial(ForkedServer, forks)


@pytest.fixture(scope="module")
def parsers():
    """Makes the parser of each kind of command once: it takes most of a second, and parsing a fifth of one."""
    from aspo_lightning.cli.fit import ASPOCLI

    made: dict[tuple[object, ...], dict[str, object]] = {}
    setup = ASPOCLI.setup_parser

    def once(cli: ASPOCLI, *args, **kwargs) -> None:
        kind = (type(cli), *cli.subcommands())
        if kind not in made:
            setup(cli, *args, **kwargs)
            made[kind] = vars(cli).copy()
        vars(cli).update(made[kind])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ASPOCLI, "setup_parser", once)
        yield

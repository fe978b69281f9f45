"""Sampling with plain transformers: slower than vLLM, but available wherever the trainer is."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from aspo_lightning.engines.base import FULL, HALF, Engine, EngineMemory, SamplingRequest, kv_bytes
from aspo_lightning.errors import ConfigError
from aspo_lightning.identity import INCIDENTAL
from aspo_lightning.types import Completion


class TransformersEngine(Engine):
    """Samples with a copy of the policy in transformers.

    Args:
        batch_size: completions sampled at a time.
        dtype: of the copy's weights, as transformers names it.
    """

    def __init__(self, batch_size: Annotated[int, INCIDENTAL] = 64, dtype: str = "float32") -> None:
        if batch_size < 1:
            raise ConfigError(f"TransformersEngine.batch_size is {batch_size}; it must be at least 1.")
        self.batch_size = batch_size
        self.dtype = dtype
        self._lm: PreTrainedModel | None = None

    @property
    def weights_dtype(self) -> torch.dtype | None:
        return getattr(torch, self.dtype, None)  # "auto" is none

    def memory(
        self,
        config: PreTrainedConfig,
        parameters: int,
        *,
        context_length: int,
        gpu_memory: float | None,
        share: float | None = None,
    ) -> EngineMemory:
        tokens = self.batch_size * context_length
        parts = {
            "engine's weights": parameters * FULL,
            "KV cache": tokens * kv_bytes(config, FULL if gpu_memory is None else HALF),
            "sampler": 4.0 * FULL * self.batch_size * config.vocab_size,
        }
        return EngineMemory(parts, cache_tokens=tokens)

    def check(self) -> None:
        pass

    def start(self, model_name_or_path: str, *, context_length: int) -> None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        lm = AutoModelForCausalLM.from_pretrained(model_name_or_path, dtype=self.dtype, device_map=device)
        self._lm = lm.eval()

    def generate(self, requests: Sequence[SamplingRequest]) -> Iterator[tuple[int, Completion]]:
        for start in range(0, len(requests), self.batch_size):
            yield from enumerate(self._generate_batch(requests[start : start + self.batch_size]), start)

    @torch.no_grad()
    def _generate_batch(self, requests: Sequence[SamplingRequest]) -> list[Completion]:
        lm = self._running()
        end = lm.generation_config.eos_token_id
        end_ids = set(end if isinstance(end, list) else [end]) - {None}
        width = max(len(r.prompt_ids) for r in requests)
        prompts = [[0] * (width - len(r.prompt_ids)) + list(r.prompt_ids) for r in requests]
        mask = torch.tensor([[0] * (width - len(r.prompt_ids)) + [1] * len(r.prompt_ids) for r in requests]).to(
            lm.device
        )
        position_ids = (mask.cumsum(1) - 1).clamp(min=0)
        input_ids = torch.tensor(prompts, device=lm.device)
        steps = max(r.max_tokens for r in requests)
        # One uniform number a token decides it (inverse CDF), so a completion depends on its own seed only.
        uniforms = torch.stack(
            [torch.rand(steps, dtype=torch.float64, generator=torch.Generator().manual_seed(r.seed)) for r in requests]
        ).to(lm.device)
        ids: list[list[int]] = [[] for _ in requests]
        logprobs: list[list[float]] = [[] for _ in requests]
        running = [r.max_tokens > 0 for r in requests]
        cache = None
        for step in range(steps):
            output = lm(
                input_ids=input_ids,
                attention_mask=mask,
                position_ids=position_ids,
                past_key_values=cache,
                use_cache=True,
            )
            cache = output.past_key_values
            tokens, token_logprobs = _sample(output.logits[:, -1].float(), uniforms[:, step], requests)
            for i, (token, logprob) in enumerate(zip(tokens.tolist(), token_logprobs.tolist(), strict=True)):
                if running[i]:
                    ids[i].append(token)
                    logprobs[i].append(logprob)
                    running[i] = token not in end_ids and len(ids[i]) < requests[i].max_tokens
            if not any(running):
                break
            input_ids = tokens[:, None]
            position_ids = position_ids[:, -1:] + 1
            mask = torch.cat([mask, mask.new_ones(len(requests), 1)], 1)
        return [
            Completion(tuple(i), tuple(p), truncated=not i or i[-1] not in end_ids)
            for i, p in zip(ids, logprobs, strict=True)
        ]

    def sync_weights(self, named_tensors: Iterable[tuple[str, Tensor]]) -> None:
        lm: Any = self._running()
        device = lm.device
        lm.to("meta")  # frees the old weights
        # Copies: they become the parameters. transformers brings the hub's names and shapes into its own on loading.
        weights = {name: tensor.detach().to(device, copy=True) for name, tensor in named_tensors}
        with no_progress_bars():
            self._lm, misfits = type(lm).from_pretrained(
                None,
                config=lm.config,
                state_dict=weights,
                dtype=lm.dtype,
                device_map=device,
                output_loading_info=True,
            )
        self._running().generation_config = lm.generation_config  # has the end tokens
        if any(misfits.values()):
            raise RuntimeError(f"the policy's weights aren't those of the engine's model: {misfits}")

    def stop(self) -> None:
        self._lm = None

    def _running(self) -> PreTrainedModel:
        if self._lm is None:
            raise RuntimeError("the engine has not been started")
        return self._lm


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Keeps transformers quiet about loading."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _sample(logits: Tensor, uniform: Tensor, requests: Sequence[SamplingRequest]) -> tuple[Tensor, Tensor]:
    """Tokens[R] and their log-probs[R] under the distribution they are drawn from, for logits[R, V]."""
    temperature = torch.tensor([r.temperature for r in requests], device=logits.device)
    greedy = temperature == 0
    logits = logits / torch.where(greedy, 1.0, temperature)[:, None]
    top_p = torch.tensor([r.top_p for r in requests], device=logits.device)
    if (top_p < 1).any():
        ordered, order = logits.softmax(-1).sort(-1, descending=True)
        outside = ordered.cumsum(-1) - ordered >= top_p[:, None]  # the first token always stays
        logits = logits.masked_fill(outside.scatter(1, order, outside), -torch.inf)
    logp = logits.log_softmax(-1)
    cdf = logp.double().exp().cumsum(-1)
    drawn = torch.searchsorted(cdf, uniform[:, None] * cdf[:, -1:], right=True).squeeze(1)
    tokens = torch.where(greedy, logits.argmax(-1), drawn.clamp(max=logits.shape[1] - 1))
    logprobs = logp.gather(1, tokens[:, None]).squeeze(1)
    return tokens, torch.where(greedy, 0.0, logprobs)

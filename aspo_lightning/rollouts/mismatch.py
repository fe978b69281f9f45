"""Whether the engine has the trainer's weights: the probe after each sync."""

import random

from torch import Tensor

from aspo_lightning.engines import Engine, SamplingRequest
from aspo_lightning.engines.base import generate
from aspo_lightning.errors import RESUME, RunError
from aspo_lightning.types import MicroBatch


class Probe:
    """Compares engine and trainer on a fixed prompt, each time the engine has new weights.

    Finds weights that didn't arrive, or a prefix cache of the old ones: the prompt is long enough to be cached. In
    bfloat16 a single token may agree by chance, and no later one would be as close: the mean of two short completions
    stays within a factor of a few from one set of weights to the next.

    Args:
        vocabulary: ids below this one make the prompt.
        context_length: of the engine.
        temperature: of sampling and scoring.
        factor: how much larger than at first the difference may grow.
    """

    SAMPLES, TOKENS = 2, 8
    BLOCK, BLOCKS = 32, 4
    """The prompt is up to this many blocks of tokens and one more; engines cache blocks of 16, 32 or 128."""
    AT_FIRST, LEAST = 0.5, 1e-4
    """Allowed of the mean |log-prob difference|: at first, and always."""

    def __init__(self, vocabulary: int, context_length: int, temperature: float, factor: float) -> None:
        draw = random.Random(0)
        tokens = min(self.TOKENS, context_length // 2)
        blocks = min(self.BLOCKS, (context_length - tokens - 1) // self.BLOCK)
        length = blocks * self.BLOCK + 1 if blocks else context_length - tokens
        prompt = tuple(draw.randrange(vocabulary) for _ in range(length))
        self.requests = [SamplingRequest(prompt, tokens, seed=i, temperature=temperature) for i in range(self.SAMPLES)]
        self.factor = factor
        self.first: float | None = None

    def sample(self, engine: Engine) -> MicroBatch:
        """What the engine makes of the prompt, to be scored by the trainer."""
        requests = [request for request in self.requests for _ in range(engine.copies)]
        completions = [completion for _, completion in sorted(generate(engine, requests))]
        return MicroBatch.from_sequences(
            [(r.prompt_ids, c.completion_ids) for r, c in zip(requests, completions, strict=True)],
            generator_logprobs=[c.generator_logprobs for c in completions],
        )

    def check(self, batch: MicroBatch, logprobs: Tensor) -> None:
        """Raises RunError if the engine's log-probs aren't the trainer's, ``logprobs`` [N]."""
        difference = (logprobs - batch.generator_logprobs).abs().mean().item()
        allowed = self.AT_FIRST if self.first is None else max(self.LEAST, self.factor * self.first)
        if not difference <= allowed:  # nor if it is not a number
            raise RunError(
                f"The engine doesn't sample from the policy's weights: on the probe its log-probs differ by "
                f"{difference:.3g} on average (allowed: {allowed:.3g}). A sync was incomplete, or the weights are not "
                f"finite. Nothing of this phase was trained on. {RESUME}."
            )
        self.first = difference if self.first is None else self.first

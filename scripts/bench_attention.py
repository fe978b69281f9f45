"""Attention over packed rows: its memory on a long row, and a phase with it against sdpa under the row's mask.

    python scripts/bench_attention.py [--model FOLDER --tokens 34816 --repeats 5]

1. A row of many tokens in one sequence and in sixteen, through a tiny model, forward and backward, each in a process of
   its own: seconds and the peak of the process beyond what it held before.
2. The quickstart's phase (16 prompts of 16 tokens with 4 completions of 4 each) in rows of up to 256 and of up to 2,048
   tokens: scoring and update with packed attention, with prompts repeated and shared, and with sdpa, which computes
   the whole row and masks it, in turn. Without --model it is a random one of the shape of SmolLM2-135M.
"""

import argparse
import json
import random
import subprocess
import sys
from collections.abc import Callable
from functools import partial

import torch
from script_tools import in_turn, seconds, spread
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from aspo_lightning.policy.causal_lm import ScoredCausalLM
from aspo_lightning.rollouts.packing import plan_phase
from aspo_lightning.run.memory import peak_memory
from aspo_lightning.types import MicroBatch


class Masked(ScoredCausalLM):
    """A packed row as transformers computes it from its position ids alone."""

    def _hidden_packed(self, batch: MicroBatch) -> torch.Tensor:
        return self._hidden(batch.input_ids[None], position_ids=batch.position_ids[None])[0]


def row(lengths: list[int], prompt: int) -> MicroBatch:
    """Random sequences of ``lengths`` tokens in the row, the first ``prompt`` of each its prompt's."""
    draw = random.Random(0)
    ids = [[draw.randrange(5, 128) for _ in range(n + 1)] for n in lengths]
    return MicroBatch.from_sequences([(x[:prompt], x[prompt:]) for x in ids])


def llama(**shape: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**shape, tie_word_embeddings=True))


def long_row(tokens: int, sequences: int) -> None:
    """Prints seconds and MiB of one pass."""
    lm = llama(vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2)
    model = ScoredCausalLM(lm)
    batch = row([tokens // sequences] * sequences, prompt=1)
    model(row([64], prompt=1))[0].sum().backward()  # imports and threads aren't what is measured
    before = peak_memory()
    taken = seconds(lambda: model(batch)[0].sum().backward())
    print(json.dumps({"seconds": taken, "mib": (peak_memory() - before) / 2**20}))


def phase_rows(budget: int, shared: bool) -> list[MicroBatch]:
    """16 prompts of 16 tokens with 4 completions of 4 tokens; or as many completions, each with a prompt of its own."""
    groups, completions = (16, 4) if shared else (64, 1)
    draw = random.Random(0)

    def tokens(count: int) -> list[int]:
        return [draw.randrange(5, 128) for _ in range(count)]

    sequences = [(prompt, tokens(4)) for prompt in (tokens(16) for _ in range(groups)) for _ in range(completions)]
    plan = plan_phase([(16, [4] * completions)] * groups, optimizer_steps=1, token_budget=budget)
    return [MicroBatch.from_sequences([sequences[i] for i in members]) for members in plan.steps[0][0]]


def phase(lm: PreTrainedModel, budget: int, repeats: int) -> None:
    """Prints the ratios of a phase's times."""
    masked = Masked(lm)
    masked.packs = True  # the check's row shares a prompt, which this can't
    ways = {
        "sdpa": (masked, "sdpa", phase_rows(budget, shared=False)),
        "packed": (ScoredCausalLM(lm), "packed", phase_rows(budget, shared=False)),
        "shared": (ScoredCausalLM(lm), "packed", phase_rows(budget, shared=True)),
    }

    @torch.no_grad()
    def score(model: ScoredCausalLM, batch: MicroBatch) -> None:
        model(batch)

    def update(model: ScoredCausalLM, batch: MicroBatch) -> None:
        model(batch)[0].sum().backward()

    def run(work: Callable[[ScoredCausalLM, MicroBatch], None], way: str) -> None:
        model, attention, batches = ways[way]
        lm.set_attn_implementation(attention)
        for batch in batches:
            work(model, batch)
        lm.zero_grad()

    for name, work in (("scoring", score), ("update", update)):
        times = in_turn({way: partial(run, work, way) for way in ways}, repeats)
        for way, taken in times.items():
            ratios = [ours / masked for ours, masked in zip(taken, times["sdpa"], strict=True)]
            tokens = " + ".join(str(len(batch.input_ids)) for batch in ways[way][2])
            print(f"{name}, {way}, {tokens} tokens: {spread(taken)} s; / sdpa {spread(ratios)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--tokens", type=int, default=34_816)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--sequences", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.sequences:
        return long_row(options.tokens, options.sequences)
    for sequences in (1, 16):
        command = [sys.executable, __file__, "--tokens", str(options.tokens), "--sequences", str(sequences)]
        outputs = [subprocess.check_output(command, text=True) for _ in range(min(3, options.repeats))]
        measured = [json.loads(output.splitlines()[-1]) for output in outputs]
        took, mib = (spread([each[key] for each in measured]) for key in ("seconds", "mib"))
        print(f"{options.tokens} tokens in {sequences} sequences: {took} s, {mib} MiB", flush=True)
    if options.model:
        lm = ScoredCausalLM.from_pretrained(options.model).lm
    else:
        shape = {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}
        lm = llama(**shape, num_attention_heads=9, num_key_value_heads=3)
    for budget in (256, 2048):
        phase(lm, budget, options.repeats)


if __name__ == "__main__":
    main()

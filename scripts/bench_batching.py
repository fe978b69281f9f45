"""What packing saves: tokens/s of forward + backward, packed by the planner against padded in order of arrival.

    python scripts/bench_batching.py [--model FOLDER] [--lengths FILE.json]

Two length distributions: that of a real phase (prompt and completion tokens of the quickstart model on longer sums, in
docs/phase_lengths.json by scripts/sample_lengths.py, or --lengths) and a heavy-tailed one (log-normal). The ceiling is
what counting predicts: sum of padded tokens / sum of real tokens. Also the balance of ranks: max / mean cost.
"""

import argparse
import json
import random
import statistics
from functools import partial
from pathlib import Path

import torch
from script_tools import ROOT, in_turn, spread
from transformers import LlamaConfig, LlamaForCausalLM

from aspo_lightning.policy.causal_lm import ScoredCausalLM
from aspo_lightning.rollouts.packing import plan_phase
from aspo_lightning.types import MicroBatch

Lengths = list[tuple[int, int]]  # (prompt, completion)


def heavy_tailed(count: int = 64) -> Lengths:
    draw = random.Random(0)
    return [(16, min(400, max(2, int(draw.lognormvariate(3.3, 1.0))))) for _ in range(count)]


def micro_batch(lengths: Lengths, padded: bool) -> MicroBatch:
    """Random tokens; ``padded`` gives every sequence the length of the longest."""
    longest = max(p + c for p, c in lengths)
    draw = random.Random(1)
    sequences = []
    for prompt, completion in lengths:
        if padded:
            completion = longest - prompt
        ids = [draw.randrange(5, 1000) for _ in range(prompt + completion)]
        sequences.append((ids[:prompt], ids[prompt:]))
    return MicroBatch.from_sequences(sequences)


def update(model: ScoredCausalLM, batches: list[MicroBatch], packs: bool) -> None:
    model.packs = packs
    for batch in batches:
        model(batch)[0].sum().backward()
    model.zero_grad()


def bench(name: str, model: ScoredCausalLM, lengths: Lengths, budget: int, repeats: int) -> None:
    totals = [p + c for p, c in lengths]
    alone = [(p, [c]) for p, c in lengths]  # groups of one: what packing gives, without shared prompts
    plan = plan_phase(alone, optimizer_steps=1, token_budget=budget)
    packed = [micro_batch([lengths[i] for i in bin], padded=False) for bin in plan.steps[0][0]]
    # Padded in order of arrival: as many sequences a batch as the budget holds at the longest length of the batch.
    batches: list[list[int]] = [[]]
    for i, n in enumerate(totals):
        if batches[-1] and (len(batches[-1]) + 1) * max(n, *(totals[j] for j in batches[-1])) > budget:
            batches.append([])
        batches[-1].append(i)
    padded = [micro_batch([lengths[i] for i in batch], padded=True) for batch in batches]
    real = sum(len(b.input_ids) for b in packed)
    ceiling = sum(len(b.input_ids) for b in padded) / real
    ways = {"packed": partial(update, model, packed, True), "padded": partial(update, model, padded, False)}
    times = in_turn(ways, repeats)
    ratios = [b / a for a, b in zip(times["packed"], times["padded"], strict=True)]
    speeds = {way: real / statistics.median(taken) for way, taken in times.items()}
    print(
        f"{name}: {len(totals)} sequences, {real} tokens; packed {speeds['packed']:.0f} tokens/s, padded "
        f"{speeds['padded']:.0f}; ratio {spread(ratios)}, ceiling {ceiling:.2f}: "
        f"{statistics.median(ratios) / ceiling:.0%} of it"
    )
    for world_size in (2, 8):
        plan = plan_phase(alone, optimizer_steps=1, world_size=world_size, token_budget=budget)
        loads = [sum(totals[i] for bin in rank for i in bin) for rank in plan.steps[0]]
        print(f"  {world_size} ranks: max / mean cost {max(loads) * world_size / sum(loads):.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", help="a model folder; without it a Llama as wide as the quickstart model, with four layers"
    )
    parser.add_argument("--lengths", type=Path, default=ROOT / "docs" / "phase_lengths.json")
    parser.add_argument("--budget", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    if options.model:
        model = ScoredCausalLM.from_pretrained(options.model)
    else:
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=49152,
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=4,  # for time; the ratio is the same for any number
            num_attention_heads=9,
            num_key_value_heads=3,
            tie_word_embeddings=True,
        )
        model = ScoredCausalLM(LlamaForCausalLM(config))
    real = [tuple(pair) for pair in json.loads(options.lengths.read_text())]
    bench("real phase", model, real, options.budget, options.repeats)
    bench("heavy-tailed", model, heavy_tailed(), options.budget, options.repeats)


if __name__ == "__main__":
    main()

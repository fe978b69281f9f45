"""What share of the machine's products an update reaches: forward, backward, clipping and AdamW on one micro-batch.

    python scripts/bench_update.py [--model FOLDER --tokens 2048 --repeats 5]

Groups of eight completions of 64 tokens after a prompt of 128 fill the row. The peak is that of a large product in the
same dtype, measured in turn with the updates; the operations are those of ``run.throughput.update_flops``: products
with weights, no attention.
"""

import argparse
import random
from functools import partial
from pathlib import Path

import torch
from script_tools import in_turn, spread

from aspo_lightning.policy.causal_lm import ScoredCausalLM
from aspo_lightning.run.memory import keep_freed_memory
from aspo_lightning.run.throughput import product_peak, update_flops
from aspo_lightning.types import MicroBatch

PROMPT, COMPLETION, GROUP = 128, 64, 8
WARM_UP = 5
"""Updates until each tensor finds a place where one was before, as in a run."""


def row(tokens: int) -> MicroBatch:
    draw = random.Random(0)

    def ids(count: int) -> list[int]:
        return [draw.randrange(100, 40_000) for _ in range(count)]

    sequences = []
    while (len(sequences) // GROUP + 1) * (PROMPT + GROUP * (COMPLETION - 1)) <= tokens:
        prompt = ids(PROMPT)
        sequences += [(prompt, ids(COMPLETION)) for _ in range(GROUP)]
    return MicroBatch.from_sequences(sequences)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="~/.cache/aspo_lightning/SmolLM2-135M-Instruct")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    keep_freed_memory()  # as a run does
    model = ScoredCausalLM.from_pretrained(str(Path(options.model).expanduser()))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    batch = row(options.tokens)
    device = torch.device("cpu")

    def update(dtype: torch.dtype) -> None:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = model(batch)[0].sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    flops = update_flops(model.lm, [batch])
    print(f"{len(batch.input_ids)} tokens, {len(batch.targets)} of them responses; {flops / 1e12:.2f} TFLOP an update")
    for dtype in (torch.bfloat16, torch.float32):
        for _ in range(WARM_UP):
            update(dtype)
        peaks: list[float] = []
        ways = {
            "update": partial(update, dtype),
            "peak": lambda to=peaks, of=dtype: to.append(product_peak(of, device)),
        }
        times = in_turn(ways, options.repeats)["update"]
        peaks = peaks[-len(times) :]
        shares = [flops / taken / peak for taken, peak in zip(times, peaks, strict=True)]
        gigaflops = spread([peak / 1e9 for peak in peaks])
        print(f"{dtype}: {spread(times)} s, peak {gigaflops} GFLOP/s, share of the peak {spread(shares)}")


if __name__ == "__main__":
    main()

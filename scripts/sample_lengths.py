"""Samples one phase of the quickstart model on longer sums in its chat format, and keeps the lengths.

    python scripts/sample_lengths.py MODEL_FOLDER docs/phase_lengths.json

The (prompt, completion) tokens are what scripts/bench_batching.py packs.
"""

import json
import sys
from pathlib import Path

from aspo_lightning.engines import VLLMEngine
from aspo_lightning.engines.base import SamplingRequest
from aspo_lightning.policy.hub import load_tokenizer
from aspo_lightning.rollouts.sampling import sampling_seed
from aspo_lightning.tasks import ReasoningGym


def main(model: str, out: Path) -> None:
    task = ReasoningGym("chain_sum", size=16, config={"min_terms": 2, "max_terms": 6, "min_digits": 1, "max_digits": 4})
    prompts = task.prompts(load_tokenizer(model))
    engine = VLLMEngine(kv_cache_gib=0.4, max_num_seqs=64)
    engine.start(model, context_length=512)
    requests = [
        SamplingRequest(p.prompt_ids, 256, sampling_seed(0, 0, p.id, sample), 1.0, 1.0)
        for p in prompts
        for sample in range(4)
    ]
    completions = [completion for _, completion in sorted(engine.generate(requests))]
    lengths = [(len(r.prompt_ids), len(c.completion_ids)) for r, c in zip(requests, completions, strict=True)]
    out.write_text(json.dumps(lengths) + "\n")
    tokens = [completion for _, completion in lengths]
    print(f"{len(lengths)} sequences, completions of {min(tokens)} to {max(tokens)} tokens")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))

"""vLLM's engine on one GPU through many phases: it sleeps while the trainer works, and wakes with new weights."""

import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("peft", reason="the scorer needs peft, which isn't installed")

from aspo_lightning.engines import SamplingRequest, VLLMEngine
from aspo_lightning.policy.causal_lm import ScoredCausalLM
from aspo_lightning.policy.weights import full_weights
from aspo_lightning.types import MicroBatch

CYCLES = 20
REQUESTS = [SamplingRequest(tuple(range(10, 10 + n)), 24, seed, 0.8) for n in (3, 9, 40) for seed in range(8)]


def used(device: torch.device) -> float:
    """MiB of the GPU, or of this process on a CPU."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info()
        return (total - free) / 2**20
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20


@pytest.mark.vllm
def test_an_engine_that_sleeps_and_wakes_twenty_times_samples_as_before_and_takes_no_more(gpu, note, small_model):
    engine = VLLMEngine(kv_cache_gib=0.25)
    engine.check()
    start = time.perf_counter()
    engine.start(small_model, context_length=64)
    note(f"engine: started in {time.perf_counter() - start:.1f} s")
    policy = ScoredCausalLM.from_pretrained(small_model).to(gpu)
    awake, asleep, seconds = [], [], []
    for cycle in range(CYCLES + 1):
        start = time.perf_counter()
        engine.sync_weights(full_weights(policy.lm))
        seconds.append(time.perf_counter() - start)
        completions = [c for _, c in sorted(engine.generate(REQUESTS))]
        awake.append(used(gpu))
        if cycle == 0:
            first = completions
            batch = MicroBatch.from_sequences(
                [(r.prompt_ids, c.completion_ids) for r, c in zip(REQUESTS, completions, strict=True)],
                generator_logprobs=[c.generator_logprobs for c in completions],
            ).to(gpu)
            with torch.no_grad():
                difference = (policy(batch, temperature=0.8)[0] - batch.generator_logprobs).abs()
            note(f"engine: log-probs less the trainer's: mean {difference.mean():.2g}, at most {difference.max():.2g}")
            assert difference.mean() < (0.1 if gpu.type == "cuda" else 1e-4)  # the engine has 16 bits on a GPU
        assert completions == first, f"other samples after {cycle} cycles"
        assert engine.sleep() == (gpu.type == "cuda")
        asleep.append(used(gpu))
    engine.stop()
    note(f"engine: a sync takes {sorted(seconds)[CYCLES // 2]:.3f} s; awake {awake[1]:.0f}, asleep {asleep[1]:.0f} MiB")
    note(f"engine, asleep, after each of {CYCLES} cycles: {' '.join(f'{mib:.0f}' for mib in asleep[1:])} MiB")
    if gpu.type == "cuda":
        assert awake[1] - asleep[1] > 0.9 * 0.25 * 1024  # the cache at least
    assert asleep[-1] - asleep[2] < 64
    assert awake[-1] - awake[2] < 64

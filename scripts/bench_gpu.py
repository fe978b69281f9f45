"""Speed on one GPU: tokens/s and the share of the measured matmul peak, against plain Hugging Face code.

    python scripts/bench_gpu.py [--tokens 8192 --sequences 4 --layers 28 --repeats 5]

Updates (forward and backward, without the optimizer) and scoring of a packed row, by a random model of the shape of
DeepSeek-R1-Distill-Qwen-1.5B with float32 weights, under bf16 autocast, activations checkpointed; plain is
transformers' sdpa over the packed row, all logits, log_softmax. The head alone: log-probs from hidden states, forward
and backward, also by the functions of TRL and Liger where they are installed. And an engine's syncs and sleeps, where
vLLM is. All variants take turns; medians, the lowest and the highest in brackets. Without a GPU it runs with small
sizes, to show that it runs: those figures mean nothing.

FLOPs are those of a forward pass times three: 2 x parameters of the layers and head a token, and causal attention
within each sequence; what is computed a second time isn't counted.
"""

import argparse
import importlib.util
import statistics
import tempfile
from collections.abc import Callable

import torch
from bench_scorer import WAYS
from script_tools import in_turn, seconds, spread
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

from aspo_lightning.engines import VLLMEngine
from aspo_lightning.policy.causal_lm import ScoredCausalLM
from aspo_lightning.policy.weights import full_weights
from aspo_lightning.types import MicroBatch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPES = {
    "cuda": {"hidden_size": 1536, "intermediate_size": 8960, "num_attention_heads": 12, "vocab_size": 151_936},
    "cpu": {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "vocab_size": 4096},
}
SIZES = {
    "cuda": {"tokens": 8192, "sequences": 4, "layers": 28, "repeats": 5},
    "cpu": {"tokens": 512, "sequences": 4, "layers": 2, "repeats": 2},
}


class Plain(ScoredCausalLM):
    """As one would write it with transformers."""

    def forward(self, batch: MicroBatch, **_: object) -> tuple[Tensor, Tensor]:
        output = self.lm(input_ids=batch.input_ids[None], position_ids=batch.position_ids[None], use_cache=False)
        logprobs = output.logits[0, batch.response_index].float().log_softmax(-1)
        return logprobs.gather(1, batch.targets[:, None]).squeeze(1), logprobs


def peak(repeats: int) -> float:
    """FLOP/s of a large square product in bfloat16."""
    n = {"cuda": 8192, "cpu": 512}[DEVICE.type]
    a, b = (torch.randn(n, n, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    times = in_turn({"product": lambda: [a @ b for _ in range(10)]}, repeats)["product"]
    return 10 * 2 * n**3 / statistics.median(times)


def show(
    what: str, ways: dict[str, Callable[[], object]], repeats: int, tokens: int, flops: float, best: float
) -> None:
    for name, taken in in_turn(ways, repeats).items():
        middle, low, high = (tokens / s for s in (statistics.median(taken), max(taken), min(taken)))
        share = flops / statistics.median(taken) / best
        print(f"| {what} | {name} | {middle:,.0f} ({low:,.0f} to {high:,.0f}) | {share:.0%} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in SIZES[DEVICE.type].items():
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    shape, tokens, repeats = SHAPES[DEVICE.type], options.tokens, options.repeats
    hidden, vocabulary, length = shape["hidden_size"], shape["vocab_size"], tokens // options.sequences
    best = peak(repeats)
    machine = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "CPU"
    print(f"{machine}, torch {torch.__version__}, measured peak {best / 1e12:.3g} TFLOP/s in bfloat16")
    print(f"{tokens} tokens in {options.sequences} sequences, {options.layers} layers, {shape}")
    print("| | | tokens/s | share of the peak |\n|---|---|---|---|")

    torch.manual_seed(0)
    config = Qwen2Config(**shape, num_hidden_layers=options.layers, num_key_value_heads=2, eos_token_id=1)
    with DEVICE:
        lm = Qwen2ForCausalLM(config)
    lm.gradient_checkpointing_enable({"use_reentrant": False})
    models = {"ours": ScoredCausalLM(lm.train()), "plain": Plain(lm)}
    ids = torch.randint(vocabulary, (options.sequences, length + 1)).tolist()
    batch = MicroBatch.from_sequences([(x[:1], x[1:]) for x in ids]).to(DEVICE)

    def logprobs(name: str) -> Tensor:
        lm.set_attn_implementation("packed" if name == "ours" else "sdpa")
        with torch.autocast(DEVICE.type, torch.bfloat16):
            return models[name](batch)[0]

    def update(name: str) -> None:
        logprobs(name).sum().backward()
        lm.zero_grad()

    layers = sum(p.numel() for p in lm.parameters()) - 2 * hidden * vocabulary
    attention = options.layers * options.sequences * 2 * length**2 * hidden  # half of two products [L, L, D] a head
    forward = 2 * tokens * (layers + hidden * vocabulary) + attention
    show("update", {n: lambda n=n: update(n) for n in models}, repeats, tokens, 3 * forward, best)
    scoring = {n: lambda n=n: torch.no_grad()(logprobs)(n) for n in models}
    show("scoring", scoring, repeats, tokens, forward, best)

    rows = torch.randn(tokens, hidden, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    weight = (torch.randn(vocabulary, hidden, device=DEVICE) * 0.02).to(torch.bfloat16).requires_grad_()

    def head(name: str) -> None:
        WAYS[name](rows, weight, batch.targets).float().sum().backward()
        rows.grad = weight.grad = None

    show("head", {n: lambda n=n: head(n) for n in WAYS}, repeats, tokens, 6 * tokens * hidden * vocabulary, best)
    if importlib.util.find_spec("vllm"):
        engine(lm, repeats)


def engine(lm: Qwen2ForCausalLM, repeats: int) -> None:
    """Prints what a phase costs besides its sampling."""
    on_gpu = DEVICE.type == "cuda"
    with tempfile.TemporaryDirectory() as folder:
        lm.save_pretrained(folder)
        sampler = VLLMEngine(kv_cache_gib=4.0 if on_gpu else 0.05)
        print(f"engine: start {seconds(lambda: sampler.start(folder, context_length=512)):.1f} s")
        times: dict[str, list[float]] = {"sync": [], "sleep": []}
        for _ in range(repeats + 1):
            times["sync"].append(seconds(lambda: sampler.sync_weights(full_weights(lm))))
            times["sleep"].append(seconds(sampler.sleep))
        print(", ".join(f"{name} {spread(taken[1:])} s" for name, taken in times.items()))
        sampler.stop()


if __name__ == "__main__":
    main()

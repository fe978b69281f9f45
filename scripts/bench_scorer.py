"""Time and memory of the scorer against plain log_softmax of all logits: forward + backward, in turn, in processes.

    python scripts/bench_scorer.py [--vocabulary 151936 --tokens 4096 --hidden 1024 --dtype float32 --repeats 5]

Hidden states and weight have the dtype; with bfloat16 `plain` widens its logits before the log_softmax.
Memory is the peak of the process beyond what it held before, less the gradients of hidden states and weight, which
every variant needs. Also against what TRL's GRPOTrainer calls, and Liger's function, where they are installed and run
on this machine. TRL goes beside this environment: pip install --no-deps --target DIR trl==1.16.0, and DIR in
PYTHONPATH.
"""

import argparse
import json
import subprocess
import sys
from functools import partial

import torch
from script_tools import seconds, spread

from aspo_lightning.run.memory import peak_memory
from aspo_lightning.scorer import token_logprobs


def plain(hidden, weight, targets):
    return (hidden @ weight.T).float().log_softmax(-1).gather(1, targets[:, None]).squeeze(1)


def ours(hidden, weight, targets):
    return token_logprobs(hidden, weight, targets)[0]


def trl(hidden, weight, targets):
    """As TRL's GRPOTrainer calls it for a model without bias, soft cap and scale."""
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

    outputs = ("log_probs", "entropy")
    settings = (targets, 1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, outputs)
    return ChunkedLogProbFunction.apply(hidden, weight, None, *settings)[0]


def liger(hidden, weight, targets):
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return -liger_fused_linear_cross_entropy(hidden, weight, targets, reduction="none")


WAYS = {"plain": plain, "ours": ours, "trl": trl, "liger": liger}


def measure(way: str, vocabulary: int, tokens: int, hidden_size: int, dtype: str) -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = partial(torch.randn, generator=generator, dtype=getattr(torch, dtype))
    hidden = drawn(tokens, hidden_size).requires_grad_()
    weight = drawn(vocabulary, hidden_size).mul_(0.02).requires_grad_()  # in place: no spike in memory
    targets = torch.randint(0, vocabulary, (tokens,), generator=generator)
    upstream = torch.randn(tokens, generator=generator)
    few = [tensor.detach()[:64].clone().requires_grad_() for tensor in (hidden, weight)]
    WAYS[way](*few, targets[:64] % 64).sum().backward()  # imports and threads are not what is measured
    before = peak_memory()
    taken = seconds(lambda: (WAYS[way](hidden, weight, targets) * upstream).sum().backward())
    peak = (peak_memory() - before) / 2**20
    gradients = (hidden.nbytes + weight.nbytes) / 2**20
    print(json.dumps({"seconds": taken, "mib": peak - gradients, "checksum": weight.grad.float().norm().item()}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    settings = {name: getattr(options, name) for name in ("vocabulary", "tokens", "hidden", "dtype")}
    if options.way:
        return measure(options.way, *settings.values())
    shape = f"V = {options.vocabulary}, N = {options.tokens}, H = {options.hidden}"
    print(f"{shape}, {options.dtype}; medians of {options.repeats}")
    found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for _ in range(options.repeats):
        for way in list(found):
            command = [sys.executable, __file__, "--way", way]
            for name, size in settings.items():
                command += [f"--{name}", str(size)]
            result = subprocess.run(command, capture_output=True, text=True)
            if result.returncode:
                print(f"{way:6s} doesn't run here: {result.stderr.strip().splitlines()[-1][:100]}")
                del found[way]
            else:
                found[way].append(json.loads(result.stdout.splitlines()[-1]))
    for way, measured in found.items():
        took = [each["seconds"] for each in measured]
        ratios = [mine["seconds"] / plain["seconds"] for mine, plain in zip(measured, found["plain"], strict=True)]
        mib = max(each["mib"] for each in measured)
        print(
            f"{way:6s} {spread(took)} s; {spread(ratios)} x plain's time of the same turn; {mib:.0f} MiB; "
            f"gradient norm {measured[0]['checksum']:.6f}"
        )


if __name__ == "__main__":
    main()

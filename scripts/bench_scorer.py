"""Time and memory of the scorer against plain log_softmax of all logits: forward + backward, each in its own process.

    python scripts/bench_scorer.py [--vocabulary 151936 --tokens 4096 --hidden 1024 --repeats 5]

Memory is the peak of the process beyond what it held before, less the gradients of hidden states and weight, which
every way needs. Also against TRL's and Liger's public functions where they are installed and run on this machine.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time


def plain(hidden, weight, targets):
    return (hidden @ weight.T).log_softmax(-1).gather(1, targets[:, None]).squeeze(1)


def ours(hidden, weight, targets):
    from aspo_lightning.scorer import token_logprobs

    return token_logprobs(hidden, weight, targets)[0]


def trl(hidden, weight, targets):
    from trl.trainer.utils import selective_log_softmax

    return selective_log_softmax(hidden @ weight.T, targets)


def liger(hidden, weight, targets):
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return -liger_fused_linear_cross_entropy(hidden, weight, targets, reduction="none")


WAYS = {"plain": plain, "ours": ours, "trl": trl, "liger": liger}


def measure(way: str, vocabulary: int, tokens: int, hidden_size: int, repeats: int) -> None:
    import torch

    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, hidden_size, generator=generator).requires_grad_()
    weight = torch.randn(vocabulary, hidden_size, generator=generator).mul_(0.02).requires_grad_()  # no spike in memory
    targets = torch.randint(0, vocabulary, (tokens,), generator=generator)
    upstream = torch.randn(tokens, generator=generator)
    WAYS[way](hidden[:8], weight[:64], targets[:8] % 64).sum()  # imports and threads are not what is measured
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = []
    for _ in range(repeats):
        hidden.grad = weight.grad = None
        start = time.perf_counter()
        (WAYS[way](hidden, weight, targets) * upstream).sum().backward()
        seconds.append(time.perf_counter() - start)
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    gradients = 4 * (hidden.numel() + weight.numel()) / 2**20
    print(json.dumps({"seconds": seconds, "mib": peak - gradients, "checksum": weight.grad.norm().item()}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    sizes = [options.vocabulary, options.tokens, options.hidden, options.repeats]
    if options.way:
        return measure(options.way, *sizes)
    baseline = None
    print(f"V = {sizes[0]}, N = {sizes[1]}, H = {sizes[2]}; medians of {sizes[3]}")
    for way in WAYS:
        command = [sys.executable, __file__, "--way", way]
        for name, size in zip(("vocabulary", "tokens", "hidden", "repeats"), sizes, strict=True):
            command += [f"--{name}", str(size)]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            print(f"{way:6s} doesn't run here: {result.stderr.strip().splitlines()[-1][:100]}")
            continue
        found = json.loads(result.stdout.splitlines()[-1])
        seconds = statistics.median(found["seconds"])
        baseline = baseline or (seconds, found["mib"])
        print(
            f"{way:6s} {seconds:6.2f} s ({min(found['seconds']):.2f} to {max(found['seconds']):.2f}), "
            f"{seconds / baseline[0]:.2f} x the time; "
            f"{found['mib']:7.0f} MiB, {baseline[1] / found['mib']:.1f} x less; "
            f"gradient norm {found['checksum']:.6f}",
            flush=True,
        )


if __name__ == "__main__":
    main()

"""Products, scorer and attention against float64, with what they may take of memory; on a GPU and, small, on a CPU."""

import time
from contextlib import contextmanager

import pytest
import torch

pytest.importorskip("peft", reason="the scorer needs peft, which isn't installed")

from transformers import Qwen2Config, Qwen2ForCausalLM

from aspo_lightning import scorer
from aspo_lightning.policy.attention import Packing, packed_attention
from aspo_lightning.policy.causal_lm import ScoredCausalLM
from aspo_lightning.scorer import matmul, token_logprobs
from aspo_lightning.types import MicroBatch
from tests.support.gpu import DEVICE, ROOM, on, peak
from tests.support.rows import visible

FULL, HALF, HALF16 = torch.float32, torch.bfloat16, torch.float16


def drawn(*shape, dtype, scale=1.0):
    """Normal numbers that are what they are in ``dtype``, where the test runs."""
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))) * scale).to(DEVICE, dtype)


def exact(tensors):
    return [x.detach().double().requires_grad_() for x in tensors]


def error(ours, theirs) -> float:
    """Of all numbers together, relative."""
    assert ours.shape == theirs.shape
    return ((ours.double() - theirs).norm() / theirs.norm()).item()


@contextmanager
def host_never_waits():
    """On a GPU: whatever has the host wait for the device raises."""
    if DEVICE.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if DEVICE.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")


# Sums are float32 whatever goes in. TF32 would err by 3e-4, a sum rounded to bfloat16 by 2e-3.
@pytest.mark.parametrize("dtype", [FULL, HALF, HALF16])
def test_products_are_summed_in_float32(device, dtype):
    a, b = drawn(300, 1000, dtype=dtype), drawn(1000, 500, dtype=dtype)
    for left in (a, a.T.contiguous().T):
        for right in (b, b.T.contiguous().T):
            product = matmul(left, right)
            assert product.dtype == torch.float32
            assert error(product, a.double() @ b.double()) < 1e-5
    for m, k, n in ((0, 8, 16), (8, 0, 16), (8, 16, 0)):  # as a rank without sequences has them
        empty = matmul(torch.ones(m, k, device=device, dtype=dtype), torch.ones(k, n, device=device, dtype=dtype))
        assert torch.equal(empty, torch.zeros(m, n, device=device))


def head(tokens, vocabulary, hidden, dtype):
    leaves = [drawn(tokens, hidden, dtype=dtype), drawn(vocabulary, hidden, dtype=dtype, scale=hidden**-0.5)]
    targets = torch.arange(tokens, device=DEVICE) * 7919 % vocabulary
    return *(x.requires_grad_() for x in leaves), targets


# In backward the gradient of the logits is rounded to 16 bits, and so is the result.
@pytest.mark.parametrize(("dtype", "tolerance"), [(FULL, 1e-5), (HALF, 0.01), (HALF16, 0.002)])
@pytest.mark.parametrize("entropy_grad", [False, True])
def test_log_probs_are_those_of_float64(device, dtype, tolerance, entropy_grad):
    hidden, weight, targets = head(200, 5000, 128, dtype)
    settings = {"temperature": 0.7, "chunk_size": 1024, "entropy_grad": entropy_grad}
    logprobs, entropy = token_logprobs(hidden, weight, targets, **settings)
    leaves = exact([hidden, weight])
    p = (leaves[0] @ leaves[1].T / 0.7).log_softmax(-1)
    expected = p.gather(1, targets[:, None]).squeeze(1), -(p.exp() * p).sum(-1)
    for mine, theirs in zip((logprobs, entropy), expected, strict=True):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine.double(), theirs, rtol=0, atol=2e-5)
    toward = torch.linspace(-1, 2, 200, device=device)
    (logprobs * toward + entropy * entropy_grad).sum().backward()
    (expected[0] * toward + expected[1] * entropy_grad).sum().backward()
    for mine, theirs in zip((hidden, weight), leaves, strict=True):
        assert mine.grad.dtype == dtype
        assert error(mine.grad, theirs.grad) < tolerance


@pytest.mark.parametrize("dtype", [FULL, HALF])
def test_no_tokens_have_no_log_probs_and_no_gradients(device, dtype):
    hidden, weight, targets = head(0, 5000, 128, dtype)
    logprobs, entropy = token_logprobs(hidden, weight, targets)
    assert logprobs.shape == entropy.shape == (0,)
    logprobs.sum().backward()
    assert torch.equal(weight.grad, torch.zeros_like(weight))


@pytest.mark.parametrize("dtype", [FULL, HALF])
def test_the_scorer_holds_few_chunks_of_logits_and_its_host_never_waits(device, note, dtype, monkeypatch):
    monkeypatch.setattr(scorer, "KEPT_LOGITS", 0)  # a CPU's
    tokens, vocabulary, size, chunk = on((8192, 151_936, 1536, 4096), (512, 8000, 64, 500))
    hidden, weight, targets = head(tokens, vocabulary, size, dtype)

    def work():
        hidden.grad = weight.grad = None
        token_logprobs(hidden, weight, targets, chunk_size=chunk)[0].sum().backward()
        hidden.grad = weight.grad = None

    taken = peak(work)
    gradients = weight.numel() * dtype.itemsize + hidden.numel() * (dtype.itemsize + 4)
    logits = 4 * tokens * chunk * 4
    products = (4 * hidden.numel() + 2 * chunk * size) * 4  # a chunk's share of each gradient; factors laid out anew
    assert taken < gradients + logits + products + ROOM
    if device.type == "cuda":
        note(f"scorer, {tokens} tokens, {dtype}: {taken / 2**20:.0f} MiB of which {gradients / 2**20:.0f} gradients")
    with host_never_waits():
        work()


HEADS, KEY_HEADS, SIZE = 4, 2, 64


def row(tokens, dtype, heads=HEADS, key_heads=KEY_HEADS, size=SIZE):
    return [drawn(tokens, n, size, dtype=dtype).requires_grad_() for n in (heads, key_heads, key_heads)]


def attention_by_hand(query, key, value, row_lengths, window):
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    scores = torch.einsum("qad,kad->aqk", query, key) * query.shape[-1] ** -0.5
    hidden = torch.ones(scores.shape[1:], dtype=torch.bool)
    for token, seen in enumerate(visible(row_lengths)):
        hidden[token, seen if window is None else seen[-window:]] = False
    weights = scores.masked_fill(hidden.to(scores.device), -torch.inf).softmax(-1)
    return torch.einsum("aqk,kad->qad", weights, value)


# In 16 bits the weights of the values are rounded too, and in backward those weights' gradients.
@pytest.mark.parametrize(("dtype", "tolerance"), [(FULL, 1e-5), (HALF, 0.01), (HALF16, 0.002)])
@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize(
    "row_lengths", [[(300,)], [(130,), (1,), (64,), (129,), (7,)], [(130, 40, 1, 64, 0, 60), (7, 129)], [(5, 70, 90)]]
)
def test_packed_attention_is_that_of_float64(device, dtype, tolerance, window, row_lengths):
    leaves = row(sum(map(sum, row_lengths)), dtype)
    ours = packed_attention(*leaves, Packing.of(row_lengths, device), window=window)
    assert ours.dtype == dtype
    theirs = exact(leaves)
    expected = attention_by_hand(*theirs, row_lengths, window)
    assert error(ours, expected) < tolerance
    toward = drawn(*ours.shape, dtype=dtype)
    (ours * toward).sum().backward()
    (expected * toward.double()).sum().backward()
    for mine, other in zip(leaves, theirs, strict=True):
        assert error(mine.grad, other.grad) < tolerance


@pytest.mark.parametrize("dtype", [FULL, HALF])
@pytest.mark.parametrize("prompts", [1, 4])
@pytest.mark.parametrize("completions", [0, 3])
def test_packed_attention_takes_no_memory_of_the_rows_length_squared(device, note, dtype, prompts, completions):
    tokens, heads, size = on((34_816, 2, 64), (4096, 2, 16))
    row_lengths = [(tokens // prompts // (1 + completions),) * (1 + completions)] * prompts
    leaves = row(tokens, dtype, heads, 1, size)

    def work():
        packed_attention(*leaves, Packing.of(row_lengths, device)).sum().backward()
        for leaf in leaves:
            leaf.grad = None

    taken = peak(work)
    bound = 24 * tokens * heads * size * 4  # so many [T, A, D]: inputs, output and gradients, gathered and split up
    assert bound < tokens**2  # a mask of one byte each
    assert taken < bound + ROOM
    if device.type == "cuda":
        note(f"attention, {prompts} x {row_lengths[0]} tokens, {dtype}: {taken / 2**20:.0f} of {bound / 2**20:.0f} MiB")
    with host_never_waits():
        work()


# Of DeepSeek-R1-Distill-Qwen-1.5B, but for the number of layers.
SHAPE = {
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "vocab_size": 151_936,
}
SMALL = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 4000,
}


def test_a_row_of_full_length_takes_what_is_counted_and_no_more_in_one_sequence(gpu, note):
    tokens, depth = on(34_816, 1024), 4
    shape = on(SHAPE, SMALL)
    hidden, inner, vocabulary = shape["hidden_size"], shape["intermediate_size"], shape["vocab_size"]
    if gpu.type == "cuda" and torch.cuda.get_device_properties(gpu).total_memory < 30e9:
        pytest.skip("it takes a GPU of 30 GB")
    torch.manual_seed(0)
    with gpu:
        lm = Qwen2ForCausalLM(Qwen2Config(**shape, num_hidden_layers=depth, max_position_embeddings=tokens))
    lm.gradient_checkpointing_enable({"use_reentrant": False})
    model = ScoredCausalLM(lm.train(), chunk_size=on(None, 512))
    count = sum(p.numel() for p in model.parameters())
    layers = count - 2 * vocabulary * hidden
    takes, seconds = {}, {}
    for sequences in (1, 4):
        ids = (torch.arange(tokens + sequences) * 7919 % vocabulary).tolist()
        each = len(ids) // sequences
        pieces = [ids[i * each : (i + 1) * each] for i in range(sequences)]
        batch = MicroBatch.from_sequences([(x[:1], x[1:]) for x in pieces]).to(gpu)
        assert len(batch.input_ids) == tokens

        def work(batch=batch):
            with torch.autocast(gpu.type, torch.bfloat16):
                logprobs = model(batch)[0]
            logprobs.sum().backward()
            model.zero_grad()

        takes[sequences] = peak(work)
        with host_never_waits():
            work()
        if gpu.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        if gpu.type == "cuda":
            torch.cuda.synchronize()
        seconds[sequences] = time.perf_counter() - start
        note(
            f"update of {tokens} tokens in {sequences} sequences, {depth} layers: {seconds[sequences]:.3f} s, "
            f"{takes[sequences] / 2**20:.0f} MiB"
        )
    gradients = 4 * count + 4 * vocabulary * hidden  # one of the two embeddings' is made beside what is there
    weights = 2 * layers  # rounded by autocast
    kept = (depth + 2) * tokens * hidden * 4  # between layers, checkpointed
    layer = tokens * (8 * inner * 2 + 20 * hidden * 4)  # one layer's, computed again, and its gradients
    logits = tokens * (3 * on(4096, 512) + 3 * hidden) * 4
    bound = gradients + weights + kept + max(layer, logits)
    note(f"counted: {bound / 2**20:.0f} MiB; all logits alone would take {tokens * vocabulary * 4 / 2**20:.0f}")
    assert takes[1] < bound + ROOM
    assert takes[4] < 1.1 * takes[1]
    if gpu.type == "cuda":  # attention is little of a small model's time
        assert seconds[4] < seconds[1]

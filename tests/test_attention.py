"""Packed attention against softmax(q k^T) v by hand, one sequence at a time, in float64; and what it never makes."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode

from aspo_lightning.fsdp import load_sharded
from aspo_lightning.policy import attention
from aspo_lightning.policy.attention import Packing, packed_attention
from aspo_lightning.policy.causal_lm import ScoredCausalLM
from aspo_lightning.policy.settings import ModelSettings
from aspo_lightning.types import MicroBatch
from tests.support.rows import visible

ROOT = Path(__file__).parent.parent
HEADS, KEY_HEADS, SIZE = 4, 2, 6


def row(tokens, dtype=torch.float64, seed=0):
    """query, key and value of a packed row."""
    draw = torch.Generator().manual_seed(seed)
    return [
        torch.randn(tokens, heads, SIZE, generator=draw, dtype=torch.float64).to(dtype).requires_grad_()
        for heads in (HEADS, KEY_HEADS, KEY_HEADS)
    ]


def by_hand(query, key, value, seen, scale=None, window=None):
    scale = SIZE**-0.5 if scale is None else scale
    outputs = []
    for t, tokens in enumerate(seen):
        tokens = tokens if window is None else tokens[-window:]
        for head in range(HEADS):
            group = head * KEY_HEADS // HEADS
            weights = (key[tokens, group] @ query[t, head] * scale).softmax(0)
            outputs.append(weights @ value[tokens, group])
    return torch.stack(outputs).view(len(seen), HEADS, SIZE)


def difference(row_lengths, seen, scale=None, window=None):
    """The largest of the outputs and of the gradients, between ours and by hand with the tokens ``seen``."""
    leaves = row(len(seen))
    ours = packed_attention(*leaves, Packing.of(row_lengths), scale=scale, window=window)
    expected = by_hand(*leaves, seen, scale, window)
    toward = torch.linspace(-1, 2, ours.numel(), dtype=torch.float64).view_as(ours)
    pairs = [(ours, expected)]
    pairs += zip(*(torch.autograd.grad((x * toward).sum(), leaves) for x in (ours, expected)), strict=True)
    return max((a - b).abs().max().item() for a, b in pairs)


@given(
    st.lists(
        st.lists(st.integers(0, 9), max_size=5).map(lambda own: [3, *own]) | st.just([9, 4, 3]), min_size=1, max_size=4
    ),
    st.sampled_from([None, 0.3]),
    st.sampled_from([None, 1, 3, 6]),
)
def test_a_completion_sees_its_prompt_and_itself_alone(row_lengths, scale, window):
    assert difference(row_lengths, visible(row_lengths), scale, window) < 1e-11


def test_what_a_completion_sees_is_neither_a_token_more_nor_one_less():
    row_lengths = [(4, 3, 2), (5, 2, 2)]
    right = visible(row_lengths)
    assert difference(row_lengths, right) < 1e-11
    first_of_second = 4 + 3
    for wrong in (
        [*right[first_of_second][:-1][:-1], first_of_second],  # the mask is off by one
        [*range(4), *range(4, first_of_second + 1)],  # it sees its sibling
        [first_of_second],  # it has lost its prompt
    ):
        seen = [wrong if t == first_of_second else tokens for t, tokens in enumerate(right)]
        assert difference(row_lengths, seen) > 1e-3


def test_long_completions_take_no_mask(monkeypatch):
    """One that is shorter than its prompt takes a mask, which is smaller than what the prompt would cost."""
    masks = []
    sdpa = attention.scaled_dot_product_attention
    monkeypatch.setattr(
        attention,
        "scaled_dot_product_attention",
        lambda *args, attn_mask, **settings: masks.append(attn_mask) or sdpa(*args, attn_mask=attn_mask, **settings),
    )
    for row_lengths, expected in (
        ([(4, 9, 8)], []),
        ([(9, 4, 3)], [(2, 1, 4, 13)]),
        ([(9, 4, 3), (8, 4, 3), (8, 2, 2)], [(4, 1, 4, 13), (2, 1, 2, 10)]),  # of several prompts
        ([(5, 4)], []),
    ):
        masks.clear()
        assert difference(row_lengths, visible(row_lengths)) < 1e-11
        assert [tuple(mask.shape) for mask in masks if mask is not None] == expected
    for largest, expected in ((2 * 4 * 13, [2]), (2 * 4 * 13 - 1, [1, 1]), (4 * 13 - 1, [1])):
        monkeypatch.setattr(attention, "_LARGEST_MASK", largest)
        masks.clear()
        assert difference([(9, 4, 3)], visible([(9, 4, 3)])) < 1e-11
        assert [len(mask) for mask in masks if mask is not None] == expected


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 0.02)])
def test_in_fewer_bits_it_is_as_near_as_they_allow(dtype, tolerance):
    row_lengths = [(40,), (3,), (17, 16, 1)]
    ours = packed_attention(*row(77, dtype), Packing.of(row_lengths))
    assert ours.dtype == dtype
    torch.testing.assert_close(ours.double(), by_hand(*row(77), visible(row_lengths)), rtol=0, atol=tolerance)


def test_segments_of_like_length_are_computed_together():
    packing = Packing.of([(5,), (100,), (4,), (80,), (1,)])
    assert [tuple(batch.queries.shape) for batch in packing.batches] == [(2, 100), (2, 5), (1, 1)]
    assert packing.query_bounds.tolist() == packing.key_bounds.tolist() == [0, 5, 105, 109, 189, 190]
    assert packing.query_bounds.dtype == torch.int32
    assert packing.longest_query == packing.longest_keys == 100
    assert packing.keys is None
    packing = Packing.of([(7, 3, 0, 3, 1), (2, 5)])
    assert [tuple(batch.queries.shape) for batch in packing.batches] == [(2, 7), (2, 3), (1, 1)]
    assert packing.query_bounds.tolist() == [0, 7, 10, 13, 14, 21]
    assert packing.key_bounds.tolist() == [0, 7, 17, 27, 35, 42]
    prompt = list(range(7))
    assert packing.keys.tolist() == [*prompt, *prompt, 7, 8, 9, *prompt, 10, 11, 12, *prompt, 13, *range(14, 21)]
    assert (packing.longest_query, packing.longest_keys) == (7, 10)


@pytest.mark.parametrize("row_lengths", [[(3,), (5,), (1,)], [(3, 5, 1), (4, 2)]])
def test_a_gpus_kernel_gets_16_bits_the_bounds_and_the_window(monkeypatch, row_lengths):
    """The kernel's arguments, from a stand-in that computes what the kernel's documentation says."""
    packing, seen = Packing.of(row_lengths), visible(row_lengths)

    def kernel(query, key, value, bounds_q, bounds_k, longest_q, longest_k, *, scale, window_size, enable_gqa):
        assert query.dtype == key.dtype == value.dtype == torch.bfloat16
        assert enable_gqa
        queries, keys = bounds_q.diff().tolist(), bounds_k.diff().tolist()
        assert (longest_q, longest_k) == (max(queries), max(keys))
        left, right = window_size
        assert right == 0
        ends = zip(queries, bounds_k[1:].tolist(), keys, strict=True)  # the last query sees the last key
        tokens = [list(range(end - k, end - q + i + 1)) for q, end, k in ends for i in range(q)]
        return by_hand(query.double(), key.double(), value.double(), tokens, scale, left + 1 if left >= 0 else None)

    monkeypatch.setattr(attention, "varlen_attn", kernel)
    monkeypatch.setattr(attention, "_has_kernel", lambda query, value: query.dtype == torch.bfloat16)
    exact = [x.to(torch.bfloat16).double() for x in row(len(seen))]
    for window in (None, 2):
        ours = packed_attention(*row(len(seen), torch.bfloat16), packing, scale=0.5, window=window)
        torch.testing.assert_close(ours, by_hand(*exact, seen, 0.5, window))


def test_the_kernel_is_left_to_heads_that_it_takes():
    def taken(query: int, value: int, dtype=torch.bfloat16, device="cuda") -> bool:
        kinds = {"dtype": dtype, "device": torch.device(device)}
        return attention._has_kernel(*(SimpleNamespace(shape=(7, 2, size), **kinds) for size in (query, value)))

    assert taken(64, 64)
    assert taken(256, 256)
    assert not taken(192, 128)  # DeepSeek-V3
    assert not taken(512, 512)  # Gemma 4
    assert not taken(20, 20)
    assert not taken(64, 64, dtype=torch.float32)
    assert not taken(64, 64, device="cpu")


def test_under_autocast_the_kernel_gets_16_bits_of_all_three(tiny_model, monkeypatch):
    """Llama's rotary embeddings make float32 of queries and keys."""
    model, seen = ScoredCausalLM.from_pretrained(tiny_model), []

    def kernel(query, key, value, *_, **__):
        seen.extend([query.dtype, key.dtype, value.dtype])
        return query

    monkeypatch.setattr(attention, "varlen_attn", kernel)
    monkeypatch.setattr(attention, "_autocast_dtype", torch.get_autocast_dtype)
    monkeypatch.setattr(attention, "_has_kernel", lambda query, value: query.dtype == torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        model(MicroBatch.from_sequences(sequences([5, 3])))
    assert seen == [torch.bfloat16] * 6


def test_under_autocast_a_cpu_attends_in_32_bits(tiny_model, monkeypatch):
    model, seen, sdpa = ScoredCausalLM.from_pretrained(tiny_model), [], attention.scaled_dot_product_attention

    def recorded(query, key, value, **settings):
        output = sdpa(query, key, value, **settings)
        seen.extend([query.dtype, key.dtype, value.dtype, output.dtype])
        return output

    monkeypatch.setattr(attention, "scaled_dot_product_attention", recorded)
    with torch.autocast("cpu", torch.bfloat16):
        model(MicroBatch.from_sequences(sequences([5, 4])))
    assert seen == [torch.float32] * 8  # two layers


def sequences(lengths, vocabulary=128):
    """Rows of ``lengths`` tokens: the last token of a sequence isn't in its row."""
    draw = torch.Generator().manual_seed(1)
    ids = [torch.randint(vocabulary, (n + 1,), generator=draw).tolist() for n in lengths]
    return [(x[:1], x[1:]) for x in ids]


@pytest.mark.parametrize(("device", "key_heads"), [("cpu", KEY_HEADS), ("cuda", HEADS)])
def test_a_kernel_is_asked_for_fewer_heads_of_keys_only_where_it_takes_them(device, key_heads, monkeypatch):
    """In 32 bits a GPU has none for them that doesn't make all scores."""
    asked = []

    def kernel(query, key, value, **settings):
        asked.append((key.shape[1], value.shape[1], settings["enable_gqa"]))
        return scaled_dot_product_attention(query, key, value, **settings)

    if device not in attention._GROUPS_HEADS:
        monkeypatch.setattr(attention, "_GROUPS_HEADS", ())  # so that a CPU does what is done there
    monkeypatch.setattr(attention, "scaled_dot_product_attention", kernel)
    assert difference([(2, 1, 3), (4,)], visible([(2, 1, 3), (4,)])) < 1e-12
    assert set(asked) == {(key_heads, key_heads, key_heads < HEADS)}


class Largest(TorchDispatchMode):
    """Notes the largest tensor that any operation makes, in numbers."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else [result]:
            if isinstance(x, torch.Tensor):
                self.numel = max(self.numel, x.numel())
        return result


@pytest.mark.parametrize("lengths", [[600], [150] * 4])
def test_nothing_of_the_rows_length_squared_is_ever_made(tiny_model, lengths):
    model = ScoredCausalLM.from_pretrained(tiny_model, ModelSettings(gradient_checkpointing=True))
    batch = MicroBatch.from_sequences(sequences(lengths))
    with Largest() as largest:
        model(batch)[0].sum().backward()
    assert 128 * 600 <= largest.numel < 600**2 / 3  # the logits of a chunk are the largest


def test_a_row_of_many_sequences_takes_no_more_memory_than_one_sequence_of_its_length():
    def mib(sequences: int) -> float:
        command = [sys.executable, "scripts/bench_attention.py", "--tokens", "8192", "--sequences", str(sequences)]
        return json.loads(subprocess.check_output(command, cwd=ROOT, text=True).splitlines()[-1])["mib"]

    assert mib(16) < 1.1 * mib(1)


@pytest.mark.parametrize("kind", ["Qwen2", "Qwen3", "Mistral", "Qwen3Moe", "Gemma3"])
def test_a_window_of_the_model_holds_within_a_packed_row(tmp_path, kind):
    import transformers

    config_class = getattr(transformers, f"{kind}TextConfig" if kind == "Gemma3" else f"{kind}Config")
    config = config_class(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=4,
        use_sliding_window=True,
        max_window_layers=0,
        initializer_range=0.3,
        **({"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16} if kind == "Qwen3Moe" else {}),
    )
    torch.manual_seed(0)
    getattr(transformers, f"{kind}ForCausalLM")(config).save_pretrained(tmp_path)
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    model = ScoredCausalLM.from_pretrained(str(tmp_path))
    assert model.packs
    rows = sequences([12, 7, 12])
    expected = []
    for prompt, completion in rows:
        ids = torch.tensor([*prompt, *completion])
        logits = plain(input_ids=ids[None, :-1]).logits[0].log_softmax(-1)
        expected.append(logits.gather(1, ids[1:, None]).squeeze(1))
    torch.testing.assert_close(model(MicroBatch.from_sequences(rows))[0], torch.cat(expected), rtol=0, atol=1e-4)


def test_what_packed_attention_cannot_do_is_padded(tmp_path):
    """Gemma 2 caps its attention's products."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    settings = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma2Config(vocab_size=128, head_dim=16, num_key_value_heads=1, **settings)
    Gemma2ForCausalLM(config).save_pretrained(tmp_path)
    assert not ScoredCausalLM.from_pretrained(str(tmp_path)).packs


def test_a_sharded_model_that_is_padded_keeps_its_own_attention(tmp_path):
    """gpt-oss attends to a learned sink as well, which neither packed attention nor SDPA knows."""
    from transformers import GptOssConfig, GptOssForCausalLM

    config = GptOssConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        num_local_experts=2,
        num_experts_per_tok=1,
        initializer_range=0.5,
    )
    torch.manual_seed(0)
    lm = GptOssForCausalLM(config)
    torch.nn.init.constant_(lm.model.layers[0].self_attn.sinks, 2.0)
    lm.save_pretrained(tmp_path)
    source = ScoredCausalLM.from_pretrained(str(tmp_path))
    assert not source.packs
    dist.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        sharded = load_sharded(source, str(tmp_path), ModelSettings(), mesh=mesh, device=torch.device("cpu"))
        batch = MicroBatch.from_sequences(sequences([12, 7]))
        torch.testing.assert_close(sharded(batch)[0], source(batch)[0], rtol=0, atol=1e-5)
    finally:
        dist.destroy_process_group()

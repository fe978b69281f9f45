"""What counts as an update's work, and what it is compared with."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from aspo_lightning.policy.weights import add_lora
from aspo_lightning.run import throughput
from aspo_lightning.run.throughput import product_peak, update_flops
from aspo_lightning.types import MicroBatch

SIZES = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 8}


def batch():
    """Rows of 3 + 3 + 2 tokens with 7 responses, and of 2 + 0 with 1."""
    rows = [[([5, 6, 7], [8, 9, 10, 11]), ([5, 6, 7], [12, 13, 14])], [([5, 6], [9])]]
    return [MicroBatch.from_sequences(row) for row in rows]


@pytest.mark.parametrize("tied", [True, False])
def test_an_updates_operations_are_those_that_torch_counts(tied):
    lm = LlamaForCausalLM(LlamaConfig(**SIZES, intermediate_size=40, num_key_value_heads=1, tie_word_embeddings=tied))
    with FlopCounterMode(display=False) as counter:
        for row in batch():
            hidden = lm.model(row.input_ids[None]).last_hidden_state[0]
            (hidden[row.response_index] @ lm.lm_head.weight.T).sum().backward()
    counted = counter.get_flop_counts()["Global"]
    assert update_flops(lm, batch()) == counted[torch.ops.aten.mm]


def test_of_experts_those_count_that_a_token_goes_through():
    config = Qwen3MoeConfig(
        **SIZES,
        intermediate_size=40,
        moe_intermediate_size=24,
        num_key_value_heads=1,
        num_experts=8,
        num_experts_per_tok=3,
        tie_word_embeddings=False,
    )
    attention = 16 * (16 + 8 + 8 + 16)
    layers = 2 * (attention + 16 * 8 + 3 * 3 * 16 * 24)  # with the router, and three products of each expert
    assert update_flops(Qwen3MoeForCausalLM(config), batch()) == 6 * (10 * layers + 8 * 16 * 60)


def test_frozen_weights_have_no_gradient_of_their_own():
    lm = LlamaForCausalLM(LlamaConfig(**SIZES, intermediate_size=40, num_key_value_heads=1))
    frozen = 2 * (16 * (16 + 8 + 8 + 16) + 3 * 16 * 40)
    add_lora(lm, 4, 8)
    trained = 2 * 4 * ((16 + 16) + 2 * (16 + 8) + (16 + 16) + 3 * (16 + 40))
    assert update_flops(lm, batch()) == 10 * (4 * frozen + 6 * trained) + 8 * 4 * 16 * 60


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_peak_is_the_fastest_of_several_products(dtype, monkeypatch):
    seconds = iter([0, 9, 10, 14, 20, 22, 30, 38, 40, 45])  # 9, 4, 2, 8 and 5
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: next(seconds))
    monkeypatch.setattr(throughput, "_SIZES", {"cpu": (10,)})
    assert product_peak(dtype, torch.device("cpu")) == 2 * 10**3 / 2


def test_the_peak_is_looked_for_in_no_product_that_takes_minutes(monkeypatch):
    seconds = iter([0, 0.02, 1, 1.01, 2, 2.02, 10, 14, 20, 22, 30, 38])  # the first size 0.01, the second 2
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: next(seconds))
    monkeypatch.setattr(throughput, "_SIZES", {"cpu": (10, 20, 40)})
    assert product_peak(torch.bfloat16, torch.device("cpu")) == 2 * 20**3 / 2


def test_a_look_at_the_peak_changes_no_random_number(monkeypatch):
    monkeypatch.setattr(throughput, "_SIZES", {"cpu": (10,)})
    before = torch.get_rng_state()
    product_peak(torch.float32, torch.device("cpu"))
    assert torch.equal(torch.get_rng_state(), before)

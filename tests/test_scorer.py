"""Log-probs, entropies and their gradients against plain softmax in float64; packing against one sequence at a time."""

import pytest
import torch

from aspo_lightning import scorer
from aspo_lightning.errors import ConfigError
from aspo_lightning.policy.attention import Packing
from aspo_lightning.policy.causal_lm import ScoredCausalLM
from aspo_lightning.policy.fast_linears import use_fast_linears
from aspo_lightning.policy.settings import ModelSettings
from aspo_lightning.policy.weights import full_weights
from aspo_lightning.scorer import _chunk_size, matmul, token_logprobs
from aspo_lightning.types import MicroBatch
from tests.support.models import save_model


def plain(hidden, weight, targets, temperature=1.0, bias=None, softcap=None):
    logits = hidden @ weight.T
    if bias is not None:
        logits = logits + bias
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logp = torch.log_softmax(logits / temperature, -1)
    return logp.gather(1, targets[:, None]).squeeze(1), -(logp.exp() * logp).sum(-1)


def head(n=13, v=37, h=8, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden, weight, bias = (torch.randn(*s, generator=generator).to(dtype) for s in ((n, h), (v, h), (v,)))
    targets = torch.randint(0, v, (n,), generator=generator)
    return hidden.requires_grad_(), weight.requires_grad_(), bias.requires_grad_(), targets


@pytest.mark.parametrize("chunk_size", [1, 5, 36, 37, 1000])
@pytest.mark.parametrize(
    ("temperature", "softcap", "with_bias"), [(1.0, None, False), (0.6, None, True), (1.3, 2.0, True)]
)
@pytest.mark.parametrize("entropy_grad", [False, True])
@pytest.mark.parametrize("kept", [0, 13 * 37])
def test_values_and_gradients_equal_plain_softmax(
    chunk_size, temperature, softcap, with_bias, entropy_grad, kept, monkeypatch
):
    monkeypatch.setattr(scorer, "KEPT_LOGITS", kept)
    hidden, weight, bias, targets = head()
    leaves = [hidden, weight, *([bias] if with_bias else [])]
    settings = {"temperature": temperature, "softcap": softcap, "bias": bias if with_bias else None}
    expected = plain(hidden, weight, targets, **settings)
    ours = token_logprobs(hidden, weight, targets, **settings, chunk_size=chunk_size, entropy_grad=entropy_grad)
    scale = torch.linspace(-1, 2, len(targets), dtype=torch.float64)
    for mine, theirs in zip(ours, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
    assert ours[1].requires_grad == entropy_grad
    total, expected_total = (ours[0] * scale).sum(), (expected[0] * scale).sum()
    if entropy_grad:
        total, expected_total = total + (ours[1] * scale**2).sum(), expected_total + (expected[1] * scale**2).sum()
    gradients = torch.autograd.grad(expected_total, leaves)
    for _ in range(2):  # the first uses up what was kept
        for mine, theirs in zip(torch.autograd.grad(total, leaves, retain_graph=True), gradients, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("multiplies", "tiles"), [(True, True), (True, False), (False, False)])
def test_gradients_in_16_bits_are_rounded_once(multiplies, tiles, monkeypatch):
    monkeypatch.setattr(scorer, "HAS_BFLOAT16", multiplies)
    monkeypatch.setattr(scorer, "HAS_AMX", tiles and scorer.HAS_AMX)
    leaves, targets = head(n=64, v=300, h=32, dtype=torch.bfloat16)[:2], head(n=64, v=300)[3]
    exact = [x.detach().double().requires_grad_() for x in leaves]
    token_logprobs(*leaves, targets, chunk_size=300)[0].sum().backward()
    plain(*exact, targets)[0].sum().backward()
    for ours, theirs in zip(leaves, exact, strict=True):
        error = (ours.grad.double() - theirs.grad).norm() / theirs.grad.norm()
        assert error < 2**-8  # of the logits' gradients, and of the sums


def test_logits_are_kept_only_for_a_backward_pass_and_up_to_a_size(monkeypatch):
    hidden, weight, _, targets = head()
    computed = []
    monkeypatch.setattr(scorer, "matmul", lambda a, b, *to: computed.append((len(a), b.shape[1])) or matmul(a, b, *to))
    for kept, times in ((13 * 37, 1), (13 * 37 - 1, 2)):
        monkeypatch.setattr(scorer, "KEPT_LOGITS", kept)
        computed.clear()
        token_logprobs(hidden, weight, targets, chunk_size=37)[0].sum().backward()
        assert computed.count((13, 37)) == times
    with torch.no_grad():
        logprobs, _ = token_logprobs(hidden, weight, targets)
    assert logprobs.grad_fn is None


@pytest.mark.parametrize("n", [1, 700, 5000])
def test_chunks_by_default_change_nothing(n):
    hidden, weight, _, targets = head(n=n, v=5000)
    expected = plain(hidden, weight, targets)[0]
    ours = token_logprobs(hidden, weight, targets)[0]
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
    grads, expected_grads = (torch.autograd.grad(x.square().sum(), [hidden, weight]) for x in (ours, expected))
    torch.testing.assert_close(grads, expected_grads, rtol=1e-10, atol=1e-10)


def test_under_autocast_the_heads_factors_have_16_bits_and_its_logits_32():
    hidden, weight, _, targets = head(v=3000, h=64, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        logprobs, _ = token_logprobs(hidden, weight, targets, chunk_size=512)
    logprobs.sum().backward()
    rounded = [x.detach().to(torch.bfloat16).double().requires_grad_() for x in (hidden, weight)]
    expected = plain(*rounded, targets)[0]
    expected.sum().backward()
    assert logprobs.dtype == hidden.grad.dtype == weight.grad.dtype == torch.float32
    torch.testing.assert_close(logprobs.double(), expected, rtol=1e-5, atol=1e-5)
    for mine, theirs in zip((hidden, weight), rounded, strict=True):
        torch.testing.assert_close(mine.grad.double(), theirs.grad, rtol=0.01, atol=0.01)


def test_the_host_never_waits_for_a_value():
    """On the meta device there are none: what asks for one, as nonzero does, raises."""
    hidden, weight, bias, targets = (x.detach().to("meta") for x in head(n=13, v=37))
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
    logprobs, entropy = scorer._TokenLogprobs.apply(*leaves, targets, 0.7, 30.0, 5, True, False)
    (logprobs + entropy).sum().backward()
    assert [leaf.grad.shape for leaf in leaves] == [(13, 8), (37, 8), (37,)]


def test_what_a_gpu_compiles_computes_the_same():
    """Of two chunks, so that sizes are dynamic; on a CPU by the same compiler."""
    hidden, weight, _, targets = head(n=13, v=37, dtype=torch.float32)
    zeros = torch.zeros(13)
    lse, entropy = (hidden @ weight.T).logsumexp(1), zeros + 0.3
    compiled = scorer._compiled(scorer._add), scorer._compiled(scorer._gradient)
    for add, gradient in ((scorer._add, scorer._gradient), compiled):
        sums, slopes = scorer.Sums(zeros, zeros - 1e30, zeros, zeros), []
        for v in (slice(0, 20), slice(20, 37)):
            logits = (hidden @ weight[v].T).detach()
            sums = add(sums, logits.clone(), targets - v.start)
            slopes += [gradient(logits, targets - v.start, lse.detach(), entropy, zeros + 2, zeros + 0.5)]
        torch.testing.assert_close(sums.top + sums.total.log(), lse)
        torch.testing.assert_close(sums.target, (hidden @ weight.T).gather(1, targets[:, None]).squeeze(1))
        p = (hidden @ weight.T).softmax(1)
        one_hot = torch.nn.functional.one_hot(targets, 37)
        torch.testing.assert_close(torch.cat(slopes, 1), 2 * (one_hot - p) - 0.5 * p * (p.log() + 0.3))


def test_large_logits_stay_exact():
    hidden, weight, _, targets = head()
    ours = token_logprobs(hidden * 300, weight, targets, chunk_size=5)
    expected = plain(hidden * 300, weight, targets)
    torch.testing.assert_close(ours[0], expected[0], rtol=1e-12, atol=1e-9)
    torch.testing.assert_close(ours[1], expected[1], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_computes_in_float32(dtype):
    hidden, weight, _, targets = head(v=3000, h=64, dtype=dtype)
    logprobs, entropy = token_logprobs(hidden, weight, targets, chunk_size=512)
    expected = plain(hidden.double(), weight.double(), targets)
    assert logprobs.dtype == entropy.dtype == torch.float32
    torch.testing.assert_close(logprobs, expected[0].float(), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(entropy, expected[1].float(), rtol=1e-4, atol=1e-4)
    logprobs.sum().backward()
    assert hidden.grad.dtype == dtype
    assert weight.grad.dtype == dtype


def test_no_tokens_give_zero_gradients():
    hidden, weight, _, targets = head(n=0)
    logprobs, entropy = token_logprobs(hidden, weight, targets, chunk_size=10)
    assert len(logprobs) == len(entropy) == 0
    logprobs.sum().backward()
    assert torch.equal(weight.grad, torch.zeros_like(weight))


@pytest.mark.parametrize("tiles", [True, False])
def test_products_in_16_bits_are_of_rounded_factors_with_32_bit_sums(tiles, monkeypatch):
    monkeypatch.setattr(scorer, "HAS_AMX", tiles and scorer.HAS_AMX)

    def expected_of(a, b):
        return a.bfloat16().double() @ b.bfloat16().double()

    a, b = torch.randn(64, 512), torch.randn(512, 33)
    expected = expected_of(a, b)
    for left in (a, a.T.contiguous().T, a.bfloat16()):
        for right in (b, b.T.contiguous().T):
            found = matmul(left, right, torch.bfloat16)
            assert found.dtype == torch.float32
            torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-3)  # rounded sums: up to 0.25 off
    for n, k, m in ((1, 8, 8), (16, 16, 16), (1, 64, 128), (3, 64, 128)):
        small, expected = matmul(a[:n, :k], b[:k, :1].expand(k, m), torch.bfloat16), expected_of(a[:n, :k], b[:k, :1])
        torch.testing.assert_close(small.double(), expected.expand(n, m), rtol=0, atol=1e-4)
    torch.testing.assert_close(matmul(a, b).double(), a.double() @ b.double(), rtol=0, atol=1e-3)
    torch.testing.assert_close((a @ b).double(), a.double() @ b.double(), rtol=0, atol=1e-3)  # that of others as well


@pytest.mark.parametrize("shape", [(5, 7, 3), (1, 1, 1), (0, 4, 3), (4, 0, 3), (64, 96, 33)])
def test_matmul_is_the_matrix_product(shape):
    m, k, n = shape
    a, b = torch.randn(m, k), torch.randn(k, n)
    expected = a.double() @ b.double()
    for left in (a, a.T.contiguous().T):
        for right in (b, b.T.contiguous().T):
            torch.testing.assert_close(matmul(left, right).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(64, 96, 33), (33, 96, 64), (5, 7, 3)])
def test_matmul_takes_factors_that_lie_in_memory_in_any_way(shape):
    """A gradient may be one row seen many times."""
    m, k, n = shape
    lefts = (torch.randn(k, 1).expand(k, m).T, torch.randn(1, m).expand(k, m).T, torch.randn(k, 2 * m)[:, ::2].T)
    rights = (torch.randn(k, n), torch.randn(1, n).expand(k, n), torch.randn(k, 3 * n)[:, ::3])
    for left in lefts:
        for right in rights:
            expected = left.double() @ right.double()
            torch.testing.assert_close(matmul(left, right).double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("bias", [True, False])
def test_fast_linear_has_the_gradients_of_linear(bias):
    torch.manual_seed(0)
    fast, exact = torch.nn.Linear(12, 7, bias=bias), torch.nn.Linear(12, 7, bias=bias).double()
    exact.load_state_dict(fast.state_dict())
    use_fast_linears(fast)
    x = torch.randn(2, 5, 12)
    scale = torch.randn(2, 5, 7)
    mine, theirs = x.clone().requires_grad_(), x.double().requires_grad_()
    out, expected = fast(mine), exact(theirs)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-6)
    (out * scale).sum().backward()
    (expected * scale).sum().backward()
    torch.testing.assert_close(mine.grad.double(), theirs.grad, rtol=1e-5, atol=1e-6)
    for p, q in zip(fast.parameters(), exact.parameters(), strict=True):
        torch.testing.assert_close(p.grad.double(), q.grad, rtol=1e-5, atol=1e-6)


SEQUENCES = [([5, 9, 20], [7, 8, 1]), ([30, 31], [40]), ([50, 51, 52, 53, 54], [60, 61, 62, 63, 1]), ([9], [])]


def logits_by_hand(model, prompt, completion, temperature):
    logits = model.lm(input_ids=torch.tensor([[*prompt, *completion]])).logits[0].double() / temperature
    logp = logits.log_softmax(-1)[len(prompt) - 1 : -1]
    return [logp[i, token].item() for i, token in enumerate(completion)]


@pytest.mark.parametrize("packs", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_packed_and_padded_rows_equal_one_sequence_at_a_time(tmp_path, packs, tied):
    save_model(tmp_path, tie_word_embeddings=tied)
    model = ScoredCausalLM.from_pretrained(str(tmp_path), ModelSettings(chunk_size=50))
    assert model.packs
    model.packs = packs
    logprobs, entropy = model(MicroBatch.from_sequences(SEQUENCES), temperature=0.7)
    expected = [x for prompt, completion in SEQUENCES for x in logits_by_hand(model, prompt, completion, 0.7)]
    assert logprobs.tolist() == pytest.approx(expected, abs=1e-4)
    assert entropy.shape == logprobs.shape


def test_the_end_token_is_scored_and_nothing_behind_it():
    batch = MicroBatch.from_sequences([([5, 6], [7, 1]), ([8], [9])])
    assert batch.targets.tolist() == [7, 1, 9]
    assert batch.input_ids.tolist() == [5, 6, 7, 8]  # the last token of a sequence predicts nothing
    assert batch.response_index.tolist() == [1, 2, 3]
    assert batch.position_ids.tolist() == [0, 1, 2, 0]
    assert batch.sequence_index.tolist() == [0, 0, 1]


def test_a_prompt_without_tokens_is_refused():
    with pytest.raises(ValueError, match="at least one token"):
        MicroBatch.from_sequences([([], [3])])


def test_dropout_is_switched_off(tmp_path):
    save_model(tmp_path, attention_dropout=0.5)
    model = ScoredCausalLM.from_pretrained(str(tmp_path)).train()
    batch = MicroBatch.from_sequences(SEQUENCES)
    assert torch.equal(model(batch)[0], model(batch)[0])


def test_a_model_that_mixes_packed_sequences_is_padded(tiny_model, monkeypatch):
    plain_forward = ScoredCausalLM._hidden

    def one_long_sequence(self, input_ids, packing=None, **kwargs):
        if packing is not None:  # as if the model's layers didn't take notice of it
            kwargs["packing"] = Packing.of([input_ids.shape[1]])
        return plain_forward(self, input_ids, **kwargs)

    monkeypatch.setattr(ScoredCausalLM, "_hidden", one_long_sequence)
    model = ScoredCausalLM.from_pretrained(tiny_model)
    assert not model.packs
    expected = [x for prompt, completion in SEQUENCES for x in logits_by_hand(model, prompt, completion, 1.0)]
    assert model(MicroBatch.from_sequences(SEQUENCES))[0].tolist() == pytest.approx(expected, abs=1e-4)


def test_a_head_it_does_not_know_is_refused(tiny_model, monkeypatch):
    from transformers import LlamaForCausalLM

    forward = LlamaForCausalLM.forward

    def scaled(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        output.logits = output.logits * 2
        return output

    monkeypatch.setattr(LlamaForCausalLM, "forward", scaled)
    with pytest.raises(ConfigError, match="LlamaForCausalLM computes its logits"):
        ScoredCausalLM.from_pretrained(tiny_model)


@pytest.mark.parametrize(
    ("tokens", "device", "size"),
    [
        (0, "cpu", 4096),
        (1, "cpu", 4096),
        (512, "cpu", 4096),
        (1024, "cpu", 2048),
        (3000, "cpu", 699),
        (4096, "cpu", 512),
        (10**6, "cpu", 512),
        (10**6, "meta", 4096),
    ],
)
def test_a_chunk_of_logits_fits_a_cpus_caches(tokens, device, size):
    assert _chunk_size(tokens, torch.device(device)) == size


def test_chunks_are_summed_in_float32():
    hidden, weight, _, targets = head(v=3000, h=64, dtype=torch.bfloat16)
    token_logprobs(hidden, weight, targets, chunk_size=10)[0].sum().backward()
    exact = hidden.detach().double().requires_grad_()
    plain(exact, weight.detach().double(), targets)[0].sum().backward()
    error = (hidden.grad.double() - exact.grad).abs().max() / exact.grad.abs().max()
    assert error < 0.005  # summed in bfloat16 it is 0.007


@pytest.mark.parametrize("wanted", ["hidden", "weight", "bias"])
def test_only_what_needs_a_gradient_gets_one(wanted):
    hidden, weight, bias, targets = head(dtype=torch.bfloat16)
    leaves = {"hidden": hidden, "weight": weight, "bias": bias}
    for name, leaf in leaves.items():
        leaf.requires_grad_(name == wanted)
    token_logprobs(hidden, weight, targets, bias=bias, chunk_size=10)[0].sum().backward()
    assert [name for name, leaf in leaves.items() if leaf.grad is not None] == [wanted]
    exact = {name: leaf.detach().double().requires_grad_() for name, leaf in leaves.items()}
    plain(exact["hidden"], exact["weight"], targets, bias=exact["bias"])[0].sum().backward()
    torch.testing.assert_close(leaves[wanted].grad.double(), exact[wanted].grad, rtol=0.02, atol=0.05)


@pytest.mark.parametrize("temperature", [0.5, 2.0, 3.0])
def test_temperatures_divide_logits_and_gradients(temperature):
    hidden, weight, _, targets = head()
    ours = token_logprobs(hidden, weight, targets, temperature=temperature)
    expected = plain(hidden, weight, targets, temperature)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
    grads, expected_grads = (torch.autograd.grad(x[0].square().sum(), [hidden, weight]) for x in (ours, expected))
    torch.testing.assert_close(grads, expected_grads, rtol=1e-10, atol=1e-10)


def test_by_default_a_model_is_loaded_whole_in_float32_and_ready_to_train(tiny_model):
    model = ScoredCausalLM.from_pretrained(tiny_model)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    assert all(p.requires_grad for p in model.parameters())
    assert not any(".lora_" in name for name, _ in model.named_parameters())
    assert model.training
    assert model.lm.training
    assert not model.lm.is_gradient_checkpointing
    assert model.lm.config._attn_implementation == "packed"
    assert (model.chunk_size, model.softcap) == (None, None)
    logprobs, entropy = model(MicroBatch.from_sequences(SEQUENCES))
    assert logprobs.requires_grad
    assert not entropy.requires_grad
    assert model(MicroBatch.from_sequences(SEQUENCES), entropy_grad=True)[1].requires_grad


def test_what_is_asked_of_a_model_is_what_is_loaded(tiny_model):
    settings = ModelSettings(dtype="bfloat16", chunk_size=50, gradient_checkpointing=True)
    model = ScoredCausalLM.from_pretrained(tiny_model, settings)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.chunk_size == 50
    assert model.lm.is_gradient_checkpointing
    for layer in model.lm.base_model.layers:
        assert layer._gradient_checkpointing_func.keywords == {"use_reentrant": False}


def test_a_model_without_weights_is_on_the_meta_device_and_assumed_to_pack(tiny_model):
    model = ScoredCausalLM.from_pretrained(tiny_model, ModelSettings(dtype="bfloat16", lora_rank=2), weights=False)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert {p.dtype for name, p in model.named_parameters() if ".lora_" not in name} == {torch.bfloat16}
    assert model.lm.config._attn_implementation == "packed"
    assert model.packs is True


def test_adapters_are_merged_into_layers_that_are_transposed(tmp_path):
    """GPT-2's: some are square, so that nothing but the numbers tells."""
    from transformers import GPT2Config, GPT2LMHeadModel

    settings = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64, "vocab_size": 128}
    GPT2LMHeadModel(GPT2Config(**settings, eos_token_id=1)).save_pretrained(tmp_path)
    policy = ScoredCausalLM.from_pretrained(str(tmp_path), ModelSettings(lora_rank=3, dtype="float64"))
    torch.manual_seed(0)
    for name, parameter in policy.lm.named_parameters():
        if ".lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    merged = GPT2LMHeadModel.from_pretrained(tmp_path, dtype=torch.float64)
    merged.load_state_dict(dict(full_weights(policy.lm)), strict=False)
    ids = torch.randint(128, (1, 12))
    base = GPT2LMHeadModel.from_pretrained(tmp_path, dtype=torch.float64)
    with torch.no_grad():
        expected = policy.lm(ids).logits
        assert (base(ids).logits - expected).abs().max() > 1e-2
        torch.testing.assert_close(merged(ids).logits, expected, rtol=1e-10, atol=1e-10)


def test_adapters_have_the_rank_and_alpha_asked_for(tiny_model):
    for settings, alpha in (({"lora_alpha": 8.0}, 8.0), ({}, 32.0)):
        model = ScoredCausalLM.from_pretrained(tiny_model, ModelSettings(lora_rank=2, **settings))
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        assert len(trained) == 2 * 2 * 7  # A and B of the seven linear layers in each of two blocks
        assert all(".lora_A." in name or ".lora_B." in name for name in trained)
        assert all(2 in p.shape for p in trained.values())
        assert model.lm.base_model.layers[0].self_attn.q_proj.scaling == {"default": alpha / 2}


def test_every_kind_of_dropout_is_set_to_zero(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    settings = {"vocab_size": 128, "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 64, "bos_token_id": 1}
    GPT2LMHeadModel(GPT2Config(**settings, eos_token_id=1, resid_pdrop=0.3, embd_pdrop=0.2)).save_pretrained(tmp_path)
    config = ScoredCausalLM.from_pretrained(str(tmp_path)).lm.config
    assert (config.resid_pdrop, config.embd_pdrop, config.attn_pdrop, config.summary_first_dropout) == (0, 0, 0, 0)
    assert config.layer_norm_epsilon == 1e-5


def test_a_soft_cap_of_the_model_is_the_scorers(tmp_path):
    from transformers import Gemma2Config, Gemma2ForCausalLM

    settings = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma2Config(vocab_size=128, head_dim=16, num_key_value_heads=1, final_logit_softcapping=0.5, **settings)
    Gemma2ForCausalLM(config).save_pretrained(tmp_path)
    model = ScoredCausalLM.from_pretrained(str(tmp_path))
    assert model.softcap == 0.5
    expected = [x for prompt, completion in SEQUENCES for x in logits_by_hand(model, prompt, completion, 1.0)]
    assert model(MicroBatch.from_sequences(SEQUENCES))[0].tolist() == pytest.approx(expected, abs=1e-4)


def test_a_bias_of_the_models_head_is_the_scorers(tmp_path):
    from transformers import PhiConfig, PhiForCausalLM

    settings = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    phi = PhiForCausalLM(PhiConfig(vocab_size=128, **settings))
    phi.lm_head.bias.data = torch.linspace(-3, 3, 128)
    phi.save_pretrained(tmp_path)
    model = ScoredCausalLM.from_pretrained(str(tmp_path))
    expected = [x for prompt, completion in SEQUENCES for x in logits_by_hand(model, prompt, completion, 1.0)]
    assert model(MicroBatch.from_sequences(SEQUENCES))[0].tolist() == pytest.approx(expected, abs=1e-4)


def test_a_prompt_without_a_completion_is_a_row_without_targets():
    batch = MicroBatch.from_sequences([([5, 6], []), ([8, 9], [4])])
    assert batch.input_ids.tolist() == [5, 6, 8, 9]
    assert batch.position_ids.tolist() == [0, 1, 0, 1]
    assert (batch.response_index.tolist(), batch.targets.tolist(), batch.sequence_index.tolist()) == ([3], [4], [1])


def test_a_moved_micro_batch_is_all_on_its_device():
    moved = MicroBatch.from_sequences(SEQUENCES).to("meta")
    assert {x.device.type for x in vars(moved).values() if isinstance(x, torch.Tensor)} == {"meta"}
    assert moved.row_lengths == MicroBatch.from_sequences(SEQUENCES).row_lengths


def test_an_entropy_carries_gradient_only_where_asked():
    hidden, weight, _, targets = head()
    assert not token_logprobs(hidden, weight, targets)[1].requires_grad


@pytest.mark.parametrize("sequences", [[], [([5, 6], [])], [([5], [6])]])
def test_the_fields_of_a_micro_batch_keep_their_types(sequences):
    values = {"advantages": [2], "loss_weights": [3], "generator_logprobs": [[-1]]} if sequences else {}
    batch = MicroBatch.from_sequences(sequences, **values)
    integers = {"input_ids", "position_ids", "response_index", "targets", "sequence_index"}
    for name in MicroBatch.__dataclass_fields__.keys() - {"row_lengths", "members", "old_logprobs"}:
        assert getattr(batch, name).dtype == (torch.long if name in integers else torch.float32)


def test_what_a_micro_batch_isnt_given_is_zero():
    batch = MicroBatch.from_sequences([([5], [6, 7])])
    for name in ("advantages", "loss_weights", "generator_logprobs", "ref_logprobs"):
        assert getattr(batch, name).tolist() == [0, 0]
    assert batch.old_logprobs is None
    empty = MicroBatch.from_sequences([])
    assert (empty.input_ids.tolist(), empty.position_ids.tolist()) == ([0], [0])

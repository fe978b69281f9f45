"""Both engines, the real ones, against the trainer's own scorer."""

import os
import subprocess
import sys

import pytest
import torch

from aspo_lightning.engines import SamplingRequest, TransformersEngine, VLLMEngine
from aspo_lightning.engines.base import Adapters
from aspo_lightning.engines.vllm_args import adapter_args
from aspo_lightning.errors import ConfigError
from aspo_lightning.policy.causal_lm import ScoredCausalLM
from aspo_lightning.policy.settings import ModelSettings
from aspo_lightning.policy.weights import adapter_tensors, full_weights
from aspo_lightning.run.curves import read_run
from aspo_lightning.run.rollout_files import read_rollouts, rollout_files
from aspo_lightning.types import MicroBatch
from tests.support.commands import aspo
from tests.support.configs import tiny_config, write_config
from tests.support.models import BIAS, save_experts, save_experts_with_bias, save_model, save_tokenizer
from tests.support.one_step import move_adapters
from tests.support.processes import free_port

PROMPTS = [tuple(range(10, 10 + n)) for n in (3, 9, 40, 7)]  # one fills a block of the prefix cache


@pytest.fixture(scope="module")
def untied_model(tmp_path_factory):
    """Its head has weights of its own, and two tokens end a completion."""
    folder = tmp_path_factory.mktemp("untied_model")
    save_model(folder, tie_word_embeddings=False, eos_token_id=[1, 9])
    save_tokenizer(folder)
    return str(folder)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixture")
    save_experts(folder)
    save_tokenizer(folder)
    return str(folder)


@pytest.fixture(scope="module", params=["tiny_model", "untied_model", "mixture"])
def model(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module", params=["vllm", "transformers"])
def engine(request, model):
    engine = VLLMEngine(kv_cache_gib=0.05) if request.param == "vllm" else TransformersEngine(batch_size=5)
    engine.check()
    engine.start(model, context_length=64)
    yield engine
    engine.stop()


@pytest.fixture
def policy(engine, model):
    """A scorer with the weights that the engine has."""
    policy = ScoredCausalLM.from_pretrained(model)
    engine.sync_weights(full_weights(policy.lm))
    return policy


def sample(engine, *, seeds=range(6), temperature=0.8, max_tokens=24, top_p=1.0, prompts=PROMPTS):
    requests = [SamplingRequest(p, max_tokens, seed, temperature, top_p) for p in prompts for seed in seeds]
    return requests, [c for _, c in sorted(engine.generate(requests))]


def scored(policy, requests, completions, temperature=0.8):
    batch = MicroBatch.from_sequences(
        [(r.prompt_ids, c.completion_ids) for r, c in zip(requests, completions, strict=True)],
        generator_logprobs=[c.generator_logprobs for c in completions],
    )
    with torch.no_grad():
        return policy(batch, temperature=temperature)[0], batch.generator_logprobs


def test_generator_logprobs_are_the_trainers_at_that_temperature(engine, policy):
    for temperature in (0.8, 1.3):
        requests, completions = sample(engine, temperature=temperature)
        ours, theirs = scored(policy, requests, completions, temperature)
        torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-4)


def test_the_end_token_is_kept_and_truncation_is_told(engine, policy):
    ends = policy.lm.config.eos_token_id
    ends = set(ends if isinstance(ends, list) else [ends])
    _, completions = sample(engine, seeds=range(40), temperature=1.5)
    for completion in completions:
        assert not ends & set(completion.completion_ids[:-1])
        assert completion.truncated == (completion.completion_ids[-1] not in ends)
        assert len(completion.completion_ids) == len(completion.generator_logprobs)
        assert len(completion.completion_ids) == 24 or not completion.truncated
    assert {c.completion_ids[-1] for c in completions if not c.truncated} == ends
    assert any(c.truncated for c in completions)


def test_a_seed_fixes_a_completion_whatever_else_is_sampled(engine, policy):
    requests, together = sample(engine)
    alone = [c.completion_ids for r in requests[::5] for _, c in engine.generate([r])]
    assert alone == [c.completion_ids for c in together[::5]]
    assert len({c.completion_ids for c in together[:6]}) > 1  # siblings differ


def test_leaving_early_leaves_nothing_running(engine, policy):
    requests, together = sample(engine)
    for index, completion in engine.generate(requests):
        assert completion == together[index]
        break
    engine.sync_weights(full_weights(policy.lm))  # vLLM couldn't empty its cache under running requests
    assert sample(engine)[1] == together


def test_weights_that_are_buffers_reach_an_engine(tmp_path):
    model = save_experts_with_bias(tmp_path)
    policy = ScoredCausalLM.from_pretrained(str(tmp_path))
    policy.lm.get_buffer(BIAS).copy_(torch.tensor([-1.0, 1.0, -1.0, 1.0]))  # the other experts
    engine = TransformersEngine()
    engine.start(str(tmp_path), context_length=32)
    engine.sync_weights(full_weights(policy.lm))
    ((_, completion),) = engine.generate([SamplingRequest((5, 6, 7), 8, seed=1)])
    engine.stop()
    ids = torch.tensor([[5, 6, 7, *completion.completion_ids]])
    targets = ids[0, 3:, None]
    with torch.no_grad():
        ours, before = (lm.eval()(ids).logits[0, 2:-1].log_softmax(-1).gather(1, targets) for lm in (policy.lm, model))
    assert completion.generator_logprobs == pytest.approx(ours[:, 0].tolist(), abs=1e-5)
    assert (ours - before).abs().max() > 1e-3


def test_greedy_takes_the_likeliest_token(engine, policy):
    requests, completions = sample(engine, seeds=[1], temperature=0.0, max_tokens=6)
    for request, completion in zip(requests, completions, strict=True):
        ids = list(request.prompt_ids)
        for token in completion.completion_ids:
            assert token == policy.lm(input_ids=torch.tensor([ids])).logits[0, -1].argmax()
            ids.append(token)


def test_top_p_leaves_the_nucleus(engine, policy):
    _, completions = sample(engine, seeds=range(30), temperature=1.0, max_tokens=1, top_p=0.3, prompts=PROMPTS[:1])
    probs = policy.lm(input_ids=torch.tensor([PROMPTS[0]])).logits[0, -1].softmax(-1)
    ordered, order = probs.sort(descending=True)
    nucleus = set(order[: int((ordered.cumsum(0) < 0.3).sum()) + 1].tolist())
    assert {c.completion_ids[0] for c in completions} <= nucleus


def test_after_a_sync_the_engine_samples_from_the_new_weights(engine, policy):
    before_requests, before = sample(engine)  # fills the prefix cache with the old weights
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.lm.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    unsynced = sample(engine)[1]
    assert [c.completion_ids for c in unsynced] == [c.completion_ids for c in before]  # its weights are a copy
    engine.sync_weights(full_weights(policy.lm))
    requests, completions = sample(engine)
    ours, theirs = scored(policy, requests, completions)
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-4)
    stale, old = scored(policy, before_requests, before)
    assert (stale - old).abs().mean() > 0.1  # the new weights are really others


@pytest.mark.parametrize("name", ["tiny_model", "untied_model", "mixture"])
def test_in_bfloat16_logits_are_not_rounded(request, name):
    """Against a float32 product of what the engine's own layers gave, for logits of about 10, as real models have."""
    engine = VLLMEngine(dtype="bfloat16", kv_cache_gib=0.05)
    engine.start(request.getfixturevalue(name), context_length=64)
    policy = ScoredCausalLM.from_pretrained(request.getfixturevalue(name))
    head = policy.lm.get_output_embeddings().weight
    with torch.no_grad():
        policy.lm.model.norm.weight *= 6
    hidden = []

    def watch(model):
        model.logits_processor.register_forward_pre_hook(lambda _, arguments: hidden.append(arguments[1].clone()))

    engine._running().apply_model(watch)
    differences = []
    for seed in range(4):
        with torch.no_grad():
            head += 0.1 * torch.randn(head.shape, generator=torch.Generator().manual_seed(seed))
        engine.sync_weights(full_weights(policy.lm))
        ((_,), (completion,)) = sample(engine, seeds=[seed], temperature=1.0, prompts=PROMPTS[:1])
        logits = torch.cat(hidden).float() @ head.bfloat16().float().T
        ids = torch.tensor(completion.completion_ids)[:, None]
        exact = logits.log_softmax(-1).gather(1, ids).squeeze(1)
        differences.append((exact - torch.tensor(completion.generator_logprobs)).abs())
        hidden.clear()
    assert torch.cat(differences).max() < 1e-5  # with 16-bit logits 0.09


def test_groups_of_the_engine_are_bound_to_no_gpu_and_the_trainers_is_again(tiny_model):
    """As Lightning binds it: torch splits the groups that follow off its NCCL communicator then, which may hang."""
    program = f"""
import os, torch
from torch import distributed as dist
from aspo_lightning.engines import VLLMEngine
dist.init_process_group("gloo", rank=0, world_size=1)
dist.group.WORLD.bound_device_id = torch.device("cuda:0")
VLLMEngine(kv_cache_gib=0.05).start({tiny_model!r}, context_length=64)
from vllm.distributed import parallel_state
groups = [parallel_state.get_world_group(), parallel_state.get_tp_group()]
print([g.bound_device_id for group in groups for g in (group.cpu_group, group.device_group)])
print(dist.group.WORLD.bound_device_id)
"""
    result = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env={**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())},
    )
    assert result.stdout.splitlines()[-2:] == ["[None, None, None, None]", "cuda:0"], result.stderr[-3000:]


def test_transformers_refuses_the_weights_of_another_model(tiny_model, untied_model):
    engine = TransformersEngine()
    engine.start(tiny_model, context_length=64)
    other = ScoredCausalLM.from_pretrained(untied_model)
    with pytest.raises(RuntimeError, match="aren't those of the engine's model"):
        engine.sync_weights(w for w in full_weights(other.lm) if "norm" not in w[0])


def test_a_batch_without_places_is_refused():
    with pytest.raises(ConfigError, match="batch_size is 0"):
        TransformersEngine(batch_size=0)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("max_model_len", "but data.max_prompt_length and data.max_completion_length sets it. Leave it out"),
        ("dtype", "but data.engine.dtype sets it"),
        ("logprobs_mode", "but sampling and syncs rely on how it is set"),
        ("speculative_confg", "isn't an argument of vLLM. Close to it are speculative_config"),
    ],
)
def test_arguments_of_vllm_that_are_not_free_or_not_there_are_refused(name, message):
    with pytest.raises(ConfigError, match=f"engine_args has {name}, .*{message}"):
        VLLMEngine(engine_args={name: 1}).check()


def test_speculative_decoding_trains_two_phases_of_the_policys_own_samples(tiny_model, tmp_path):
    """By n-grams: log-probs are the trainer's. With the prefix cache vLLM 0.32 gives some that aren't numbers."""
    drafts = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}
    args = {"speculative_config": drafts, "enable_prefix_caching": False}
    engine = {"class_path": "VLLMEngine", "init_args": {"kv_cache_gib": 0.05, "engine_args": args}}
    config = write_config(tmp_path / "config.yaml", tiny_config(tiny_model, tmp_path, engine=engine))
    result = aspo("fit", "--config", config)  # in a process that imports numba itself
    assert result.returncode == 0, result.stderr[-3000:]
    run = tmp_path / "tiny" / "version_0"
    completions = [r["completion"] for path in rollout_files(run).values() for r in read_rollouts(path)]
    assert len(set(completions)) > 25  # of 32
    mismatch = [value for _, value in read_run(run)["mismatch/logprob_abs_max"]]
    assert len(mismatch) == 2
    assert max(mismatch) < 1e-3


@pytest.mark.parametrize("model", ["tiny_model", "untied_model"], indirect=True)
def test_adapters_alone_give_the_completions_of_merged_weights(model):
    policy = ScoredCausalLM.from_pretrained(model, ModelSettings(lora_rank=3, lora_alpha=8.0))
    engines = [VLLMEngine(kv_cache_gib=0.05, merge_adapters=merge) for merge in (False, True)]
    alone, merged = engines
    for engine in engines:
        engine.expect_adapters(3)
        engine.start(model, context_length=64)
    assert (alone.takes_adapters, merged.takes_adapters) == (True, False)
    seen = []
    for scale in (1.0, -2.0):  # two syncs: the second time the first adapters are gone
        move_adapters(policy.lm)
        with torch.no_grad():
            for name, parameter in policy.lm.named_parameters():
                if ".lora_B" in name:
                    parameter *= scale
        tensors = dict(adapter_tensors(policy.lm))
        assert sum(t.numel() for t in tensors.values()) == sum(
            p.numel() for p in policy.parameters() if p.requires_grad
        )
        alone.sync_adapters(Adapters(3, 8.0, tensors.items()))
        merged.sync_weights(full_weights(policy.lm))
        (requests, found), (_, expected) = (sample(engine) for engine in engines)
        assert [c.completion_ids for c in found] == [c.completion_ids for c in expected]
        logprobs, generated = scored(policy, requests, found)
        assert (logprobs - generated).abs().max() < 1e-4
        seen.append([c.completion_ids for c in found])
    assert seen[0] != seen[1]
    for engine in engines:
        engine.stop()


def test_adapters_of_a_rank_that_vllm_has_no_room_for_are_refused():
    with pytest.raises(ConfigError, match=r"lora_rank is 4096, and vLLM takes adapters up to 512.*merge_adapters"):
        adapter_args(4096)
    assert adapter_args(3)["max_lora_rank"] == adapter_args(8)["max_lora_rank"]

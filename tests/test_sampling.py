"""Sampling with a scripted engine and real reward processes: requests, seeds, turns, refills."""

import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from aspo_lightning.curriculum import PassRate, Shuffled
from aspo_lightning.engines.base import Engine
from aspo_lightning.errors import ConfigError, EngineError, RunError
from aspo_lightning.evaluation.metrics import accuracy, measure
from aspo_lightning.evaluation.results import FileJournal, read_known
from aspo_lightning.rewards import RewardPool
from aspo_lightning.rollouts.ahead import PhaseSampler
from aspo_lightning.rollouts.sampling import Sampler, sampling_seed
from aspo_lightning.rollouts.settings import RewardSettings, RolloutSettings, Sampling
from aspo_lightning.rollouts.shaping import is_informative, rollout_metrics
from aspo_lightning.types import Completion, Prompt, Rollout, RolloutGroup
from tests.support.processes import eventually


def prompt(i, length=3, **kwargs):
    ids = tuple(range(10, 10 + length))
    return Prompt(
        f"p{i}", ids, f"text {i}", f"text {i}", {"tests.support.hostile_rewards.number": 1.0}, {"scale": 1}, **kwargs
    )


class Script(Engine):
    """Answers a request with as many sevens as its prompt has tokens; keeps what it was asked."""

    def __init__(self, answers=None):
        self.requests = []
        self.answers = answers

    def check(self):
        pass

    def start(self, model_name_or_path, *, context_length):
        pass

    def generate(self, requests):
        self.requests += requests
        for i, request in enumerate(requests):
            n = len(request.prompt_ids)
            yield i, self.answers.pop(0) if self.answers else Completion((7,) * n, (-0.5,) * n, True)

    def sync_weights(self, named_tensors):
        pass

    def stop(self):
        pass


class Characters:
    """A tokenizer of characters."""

    eos_token = None

    def decode(self, ids, skip_special_tokens):
        return "".join(map(chr, ids))

    def __call__(self, text, add_special_tokens):
        return SimpleNamespace(input_ids=[ord(c) for c in text])


class Counting(Characters):
    def decode(self, ids, skip_special_tokens):
        return str(len(ids))


@pytest.fixture
def pool():
    pool = RewardPool(workers=1)
    yield pool
    pool.close()


def test_groups_are_sampled_with_their_own_seeds_and_scored(pool):
    engine, prompts = Script(), [prompt(0, 2), prompt(1, 4)]
    groups, times = Sampler(engine, pool, Counting()).groups(prompts, Sampling(3, 9, 0.7, 0.9, seed=5), epoch=2)
    assert [g.prompt for g in groups] == prompts
    assert [[r.reward for r in g.rollouts] for g in groups] == [[2.0] * 3, [4.0] * 3]
    assert [r.seed for r in engine.requests] == [sampling_seed(5, 2, f"p{p}", s) for p in (0, 1) for s in range(3)]
    assert {(r.temperature, r.top_p, r.max_tokens) for r in engine.requests} == {(0.7, 0.9, 9)}
    assert all(r.truncated and r.sampled is None for g in groups for r in g.rollouts)
    assert set(times) == {"time/generate_s", "time/reward_s"}


class Halting(Script):
    """Samples the second completion only when the first one has been judged; then breaks, if it is to."""

    def __init__(self, file, breaks):
        super().__init__()
        self.file, self.breaks = file, breaks

    def generate(self, requests):
        yield 0, Completion((7,), (-0.5,), True)
        assert eventually(self.file.exists)
        if self.breaks:
            raise RuntimeError("no more")
        yield 1, Completion((7,), (-0.5,), True)


def touching(file):
    return replace(prompt(0), rewards={"tests.support.hostile_rewards.touch": 1.0}, row={"file": str(file)})


def test_completions_are_judged_while_others_are_sampled(pool, tmp_path):
    engine = Halting(tmp_path / "judged", breaks=False)
    (group,), _ = Sampler(engine, pool, Counting()).groups([touching(engine.file)], Sampling(2, 9, 1, 1, 0), epoch=0)
    assert [r.reward for r in group.rollouts] == [1.0, 1.0]


def test_an_engine_that_breaks_leaves_nothing_to_judge(pool, tmp_path):
    engine = Halting(tmp_path / "judged", breaks=True)
    with pytest.raises(EngineError, match="no more"):
        Sampler(engine, pool, Counting()).groups([touching(engine.file)], Sampling(2, 9, 1, 1, 0), epoch=0)
    assert pool._workers == [None]


def test_a_completion_is_measured_where_it_is_sampled(pool):
    class Repeats(Counting):
        def decode(self, ids, skip_special_tokens):
            return "a " * 20 + "a"  # the second of two 20-grams is the first again

    (group,), _ = Sampler(Script(), pool, Repeats()).groups([prompt(0, 2)], Sampling(1, 9, 0.7, 0.9, seed=5), epoch=0)
    assert group.rollouts[0].repetition_rate == 0.5


def test_accuracy_votes_and_curricula_go_by_the_first_reward(pool, tmp_path):
    """Of right and well-formed answers with weights 0.9 and 0.05, and of wrong ones that are only well-formed."""
    rewards = {"tests.support.guessing_game.reward": 0.9, "tests.support.hostile_rewards.number": 0.05}
    task = [Prompt(f"p{i}", (65,), "A", "A", rewards, {"secret": 2, "scale": 20}) for i in range(2)]
    known = {}
    journal = FileJournal(tmp_path / "journal" / "rank_0.jsonl", "sums", known)

    def sample():
        engine = Script([said(text) for text in "2112"])  # wrong ones get 0.05 * 20 = 1
        return Sampler(engine, pool, Characters()).groups(
            task, Sampling(2, 9, 1.0, 1.0, 0), epoch=0, vote=True, journal=journal
        )[0]

    groups = sample()
    assert [[r.reward for r in g.rollouts] for g in groups] == [[pytest.approx(2.9), 1.0], [1.0, pytest.approx(2.9)]]
    assert [[r.solved for r in g.rollouts] for g in groups] == [[True, False], [False, True]]
    assert accuracy(groups) == rollout_metrics(groups)["rollout/accuracy"] == 0.5
    assert {name: m.value for name, m in measure(groups, [1]).items() if "@" in name} == {
        "avg@2": 0.5,
        "pass@1": 0.5,
        "pass@2": 1.0,
    }
    curriculum = PassRate()
    curriculum.update(groups)
    assert curriculum.rates == {"p0": 0.5, "p1": 0.5}
    # A journal keeps it; what an older one kept without it is scored again.
    assert [read_known(tmp_path)["sums", "p0", s]["solved"] for s in (0, 1)] == [True, False]
    del known["sums", "p0", 0]["solved"]
    assert sample() == [replace(g, rollouts=tuple(map(without_logprobs, g.rollouts))) for g in groups]


def without_logprobs(rollout):
    return replace(rollout, generator_logprobs=(0.0,) * len(rollout.completion_ids))


def test_what_the_engine_raises_is_its_error_and_what_the_caller_raises_is_not(pool):
    class Breaks(Script):
        def generate(self, requests):
            yield from super().generate(requests[:1])
            raise RuntimeError("out of memory")

    class NoText(Counting):
        def decode(self, ids, skip_special_tokens):
            raise ZeroDivisionError

    sampling = Sampling(2, 9, 1.0, 1.0, seed=0)
    with pytest.raises(EngineError, match=r"The engine broke \(RuntimeError: out of memory\)"):
        Sampler(Breaks(), pool, Counting()).groups([prompt(0)], sampling, epoch=0)
    with pytest.raises(ZeroDivisionError):
        Sampler(Script(), pool, NoText()).groups([prompt(0)], sampling, epoch=0)


def test_seeds_differ_in_each_of_their_parts_and_stay_the_same():
    seeds = {
        sampling_seed(s, e, p, i, t)
        for s in (0, 1)
        for e in (0, 1, -1)
        for p in ("a", "b")
        for i in (0, 1, 2)
        for t in (0, 1)
    }
    assert len(seeds) == 72
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert sampling_seed(0, 3, "chain_sum/1/5", 2) == 4341009945434545905


def said(text, truncated=False):
    ids = tuple(map(ord, text))
    return Completion(ids, tuple(-float(i + 1) for i in range(len(ids))), truncated)


def play(pool, answers, max_tokens=50, environment="tests.support.guessing_game.environment"):
    """One completion of an episode in which the environment says "low" or "high" to guesses of 7."""
    game = Prompt(
        "p0",
        (65,),
        "A",
        "A",
        {"tests.support.guessing_game.reward": 1.0},
        {"secret": 7},
        environment=environment,
        after_reply=": ",
    )
    engine = Script([said(a) if isinstance(a, str) else a for a in answers])
    (group,), _ = Sampler(engine, pool, Characters()).groups([game], Sampling(1, max_tokens, 1.0, 1.0, seed=0), epoch=0)
    return engine, group.rollouts[0]


def test_an_environment_answers_until_it_is_content(pool):
    engine, rollout = play(pool, ["5", "9", "7"])
    assert rollout.text == "5low: 9high: 7"
    mask = "".join("x" if s else "." for s in rollout.sampled)
    assert mask == "x.....x......x"
    assert [p for p, s in zip(rollout.generator_logprobs, rollout.sampled, strict=True) if s] == [-1.0] * 3
    assert {p for p, s in zip(rollout.generator_logprobs, rollout.sampled, strict=True) if not s} == {0.0}
    assert rollout.sampled_length == 3
    assert (rollout.reward, rollout.solved, rollout.failed, rollout.truncated) == (1.0, True, False, False)
    # Each turn goes on from all before it, with what is left of the limit and a seed of its own.
    assert ["".join(map(chr, r.prompt_ids)) for r in engine.requests] == ["A", "A5low: ", "A5low: 9high: "]
    assert [r.max_tokens for r in engine.requests] == [50, 44, 37]
    assert len({r.seed for r in engine.requests}) == 3


def test_an_episode_ends_when_a_turn_is_cut_off_or_no_reply_fits(pool):
    _, cut = play(pool, ["5", said("9", truncated=True)])
    assert (cut.text, cut.truncated, cut.reward) == ("5low: 9", True, 0.0)
    _, full = play(pool, ["5"], max_tokens=6)
    assert (full.text, full.truncated, full.sampled) == ("5", True, None)


def thought(pool, prompt_text, answers, **kwargs):
    """The reward of a completion to a prompt that ends as a chat template may."""
    ids = tuple(map(ord, prompt_text))
    game = Prompt("p0", ids, prompt_text, "A", {"aspo_lightning.rewards.math.reward": 1.0}, {"answer": "7"}, **kwargs)
    engine = Script([said(a) for a in answers])
    (group,), _ = Sampler(engine, pool, Characters()).groups([game], Sampling(1, 500, 1.0, 1.0, seed=0), epoch=0)
    return group.rollouts[0].reward


def test_thinking_that_the_prompt_has_opened_is_judged_as_thinking(pool):
    unfinished, finished = r"first \boxed{7} but let me check", r"\boxed{8}? no</think>\boxed{7}"
    assert [thought(pool, "A<think>\n", [text]) for text in (unfinished, finished)] == [0, 1]
    assert [thought(pool, "A", [text]) for text in (unfinished, finished)] == [1, 1]
    assert thought(pool, "Think in <think> tags. A", [unfinished]) == 1
    assert thought(pool, "A<think></think>", [unfinished]) == 1


def test_a_later_turn_has_its_own_thinking(pool):
    again = {"environment": "tests.support.hostile_rewards.once_more", "before_reply": "|"}
    turns = ["no idea</think>", r"first \boxed{7} but let me check"]
    assert thought(pool, "A<think>\n", turns, after_reply=":<think>\n", **again) == 0
    assert thought(pool, "A<think>\n", turns, after_reply=":", **again) == 1


def test_a_sampling_that_goes_on_judges_thinking_all_the_same(pool):
    class Known:
        def get(self, prompt_id, sample):
            return {"completion": {"ids": list(map(ord, r"\boxed{7} but")), "truncated": True, "failed": False}}

        def add(self, prompt_id, sample, **known):
            assert known["reward"] == 0.0

    ids = tuple(map(ord, "A<think>"))
    game = Prompt("p0", ids, "A<think>", "A", {"aspo_lightning.rewards.math.reward": 1.0}, {"answer": "7"})
    settings = Sampling(1, 500, 1.0, 1.0, seed=0)
    (group,), _ = Sampler(Script(), pool, Characters()).groups([game], settings, epoch=0, journal=Known())
    assert group.rollouts[0].reward == 0.0


def test_an_environment_that_fails_ends_the_episode_without_reward(pool):
    _, rollout = play(pool, ["7"], environment="tests.support.hostile_rewards.fail")
    assert (rollout.text, rollout.reward, rollout.solved, rollout.failed) == ("7", 0.0, False, True)
    _, rollout = play(pool, ["7"], environment="tests.support.guessing_game.says_a_number")
    assert (rollout.text, rollout.reward, rollout.solved, rollout.failed) == ("7", 0.0, False, True)


def groups_of(*spreads):
    def rollouts(spread):
        return tuple(Rollout((1,), (0.0,), False, "", r, r == 1) for r in ((0.0, 1.0) if spread else (1.0, 1.0)))

    return [RolloutGroup(prompt(i), rollouts(spread)) for i, spread in enumerate(spreads)]


@pytest.mark.parametrize(
    ("rounds", "max_refills", "asked", "kept"),
    [
        ([[1, 0, 1, 0]], 0, [4], 2),
        ([[1, 0, 1, 0], [1, 0], [1]], 5, [4, 2, 1], 4),
        ([[1, 0, 1, 0], [0, 0], [0, 0]], 2, [4, 2, 2], 2),  # the bound
        ([[1, 0, 1, 0], [1], []], 5, [4, 2, 1], 3),  # no prompts left
        ([[1, 1, 1, 1]], 5, [4], 4),
    ],
)
def test_a_phase_is_refilled_up_to_its_bound(rounds, max_refills, asked, kept):
    left, requests = list(rounds), []

    class Rounds(Shuffled):
        def draw(self, prompts, count, *, epoch, seed):
            return self.draw_more(prompts, count, epoch=epoch, seed=seed, attempt=0)

        def draw_more(self, prompts, missing, *, epoch, seed, attempt):
            assert attempt == len(requests)
            requests.append(missing)
            return left.pop(0)

    sampler = SimpleNamespace(
        groups=lambda prompts, sampling, **_: (groups_of(*prompts), {"time/generate_s": 1.5}), world_size=1
    )
    settings = RolloutSettings(prompts_per_phase=4, max_refills=max_refills, no_spread="refill")
    phases = PhaseSampler(sampler, Rounds(), [], settings)
    phases.sample(0, weights_epoch=0)
    sampled = phases.take(0)
    assert requests == asked
    assert sum(is_informative(g, RewardSettings(), 8) for g in sampled.groups) == kept
    assert sampled.metrics["time/generate_s"] == 1.5 * sum(1 for r in rounds if r)


class Slow(Script):
    """Takes its time for each completion, and breaks after ``breaks`` of them."""

    def __init__(self, breaks=None):
        super().__init__()
        self.breaks, self.given = breaks, 0

    def generate(self, requests):
        for found in super().generate(requests):
            if self.given == self.breaks:
                raise RuntimeError("out of sevens")
            time.sleep(0.02)
            self.given += 1
            yield found


def phases_of(engine, pool):
    settings = RolloutSettings(prompts_per_phase=4, group_size=4, max_completion_length=9, lag=1)
    return PhaseSampler(Sampler(engine, pool, Counting()), Shuffled(), [prompt(i, i + 1) for i in range(12)], settings)


def reloaded(state, folder):
    """As a checkpoint gives it back, which takes tensors and plain data only."""
    torch.save(state, folder / "state")
    return torch.load(folder / "state", weights_only=True)


def test_phases_are_sampled_meanwhile_and_kept_as_they_were(pool, tmp_path):
    now, meanwhile = phases_of(Script(), pool), phases_of(Slow(), pool)
    for epoch in (0, 1):
        now.sample(epoch, weights_epoch=0)
    meanwhile.sample_meanwhile([0, 1], weights_epoch=0)
    assert meanwhile.missing(range(3)) == [0, 1, 2]  # there is time to look
    state = reloaded(meanwhile.state_dict(), tmp_path)  # waits for both
    assert meanwhile.missing(range(3)) == [2]
    resumed = phases_of(Script(), pool)
    resumed.load_state_dict(state)
    for epoch in (0, 1):
        expected, found, kept = (phases.take(epoch) for phases in (now, meanwhile, resumed))
        assert len({group.prompt.id for group in expected.groups}) == 4
        assert found.groups == expected.groups
        assert kept == found
        values = [[rollout.rewards for group in phase.groups for rollout in group.rollouts] for phase in (kept, found)]
        assert values[0] == values[1]  # which don't count in comparisons
    assert all(type(value) in (int, dict, list, torch.Tensor) for phase in state for value in phase.values())
    short = phases_of(Script(), pool)
    short.prompts = short.prompts[:1]
    with pytest.raises(ConfigError, match=r"completions of the prompt 'p\d+' that have yet to be"):
        short.load_state_dict(state)


def test_what_breaks_meanwhile_is_raised_where_it_is_waited_for(pool):
    phases = phases_of(Slow(breaks=5), pool)
    phases.sample_meanwhile([0], weights_epoch=0)
    with pytest.raises(EngineError, match="out of sevens"):
        phases.wait()
    with pytest.raises(EngineError, match="out of sevens"):
        phases.state_dict()  # no checkpoint lacks a phase


def test_what_is_sampled_meanwhile_is_given_up_at_the_next_completion(pool):
    engine = Slow()
    phases = phases_of(engine, pool)
    phases.sample_meanwhile([0, 1, 2], weights_epoch=0)
    assert eventually(lambda: engine.given > 2)
    phases.stop()
    given = engine.given
    assert given < 16
    with pytest.raises(RunError, match="What was being sampled ahead was given up"):
        phases.state_dict()
    assert phases.missing(range(3)) == [0, 1, 2]
    time.sleep(0.1)
    assert engine.given == given

"""Curricula: what they draw and what they learn; draws come from (seed, epoch) and state alone."""

import itertools
import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aspo_lightning.curriculum import PassRate, RisingLevels, Shuffled, passes, resume, saved
from aspo_lightning.errors import ConfigError
from aspo_lightning.types import Prompt, Rollout, RolloutGroup


def prompt(i, level=0):
    return Prompt(f"p{i}", (1,), "", "", {}, {}, level=level)


def group(prompt, *rewards):
    return RolloutGroup(prompt, tuple(Rollout((1,), (0.0,), False, "", r, r == 1) for r in rewards))


@given(st.integers(1, 30), st.integers(1, 30), st.integers(0, 50))
def test_shuffled_draws_every_prompt_before_any_is_drawn_again(size, count, seed):
    prompts = [prompt(i) for i in range(max(size, count))]
    drawn = Counter({p.id: 0 for p in prompts})
    orders = []
    for epoch in range(3 * len(prompts) // count + 1):
        ids = [p.id for p in Shuffled().draw(prompts, count, epoch=epoch, seed=seed)]
        assert len(set(ids)) == len(ids) == count
        drawn.update(ids)
        assert max(drawn.values()) - min(drawn.values()) <= 1
        orders += ids
    if len(prompts) > 20:
        assert orders[: len(prompts)] != orders[len(prompts) : 2 * len(prompts)]


def test_a_pass_of_64_out_of_100_goes_on_where_it_stopped():
    prompts = [prompt(i) for i in range(100)]
    first, second = ({p.id for p in Shuffled().draw(prompts, 64, epoch=e, seed=0)} for e in (0, 1))
    assert first | second == {p.id for p in prompts}


@pytest.mark.parametrize("curriculum", [Shuffled(), PassRate(), RisingLevels()], ids=lambda c: type(c).__name__)
def test_draws_depend_on_seed_and_epoch_alone(curriculum):
    prompts = [prompt(i) for i in range(100)]

    def ids(epoch, seed):
        return [p.id for p in curriculum.draw(prompts, 10, epoch=epoch, seed=seed)]

    assert ids(3, 1) == ids(3, 1)
    assert len({tuple(ids(e, s)) for e in (0, 1) for s in (0, 1)}) == 4
    curriculum.draw(prompts, 10, epoch=0, seed=0)
    more = [p.id for p in curriculum.draw_more(prompts[:7], 10, epoch=0, seed=0, attempt=1)]
    assert sorted(more) == [f"p{i}" for i in range(7)]


def test_pass_rates_are_running_means_of_solved_completions():
    curriculum = PassRate(smoothing=0.25)
    curriculum.update([group(prompt(0), 1.0, 0.0, 0.5, 1.0)])
    assert curriculum.rates == {"p0": 0.5}
    curriculum.update([group(prompt(0), 1.0, 1.0), group(prompt(1), 0.0, 0.0)])
    assert curriculum.rates == {"p0": 0.5 + 0.25 * 0.5, "p1": 0.0}
    other = PassRate(smoothing=0.25)
    other.load_state_dict(curriculum.state_dict())
    assert other.rates == curriculum.rates


def test_pass_rate_draws_by_p_times_one_minus_p():
    curriculum = PassRate(floor=0.2)
    rates = {"p0": 0.0, "p1": 0.25, "p2": 0.5, "p3": 1.0}  # p4 is new
    curriculum.load_state_dict({"rates": rates})
    prompts = [prompt(i) for i in range(5)]
    draws = Counter(curriculum.draw(prompts, 1, epoch=e, seed=0)[0].id for e in range(20_000))
    weights = {"p0": 0.2, "p1": 0.2 + 0.8 * 0.75, "p2": 1.0, "p3": 0.2, "p4": 1.0}
    for id, weight in weights.items():
        expected = weight / sum(weights.values())
        assert draws[id] / 20_000 == pytest.approx(expected, abs=4 * (expected / 20_000) ** 0.5)
    assert len({p.id for p in curriculum.draw(prompts, 5, epoch=0, seed=0)}) == 5


def test_levels_rise_when_a_phase_is_solved_and_stop_at_the_last():
    curriculum = RisingLevels(threshold=0.75)
    prompts = [prompt(i, level) for level in (0, 2, 5) for i in range(10 * level, 10 * level + 10)]

    def level():
        (found,) = {p.level for p in curriculum.draw(prompts, 4, epoch=1, seed=0)}
        return found

    assert level() == 0
    assert curriculum.update([group(prompts[0], 1.0, 1.0), group(prompts[1], 0.0, 0.0)]) == {"rollout/level": 0.0}
    assert level() == 0
    assert curriculum.update([group(prompts[0], 1.0, 1.0), group(prompts[1], 1.0, 0.0)]) == {"rollout/level": 0.0}
    assert level() == 2
    assert {p.level for p in curriculum.draw_more(prompts, 9, epoch=1, seed=0, attempt=1)} == {2}
    harder = [p for p in prompts if p.level != 2]  # all of this level were drawn
    assert curriculum.draw_more(harder, 9, epoch=1, seed=0, attempt=1) == []
    other = RisingLevels(threshold=0.75)
    other.load_state_dict(curriculum.state_dict())
    assert {p.level for p in other.draw(prompts, 4, epoch=1, seed=0)} == {2}
    for _ in range(3):
        curriculum.update([group(prompts[0], 1.0)])
    assert level() == 5


def test_a_level_too_small_for_a_phase_is_refused():
    prompts = [prompt(i, level) for level, size in ((0, 8), (3, 7)) for i in range(10 * level, 10 * level + size)]
    RisingLevels().check(prompts, 7)
    Shuffled().check(prompts, 8)
    with pytest.raises(ConfigError, match=r"Level 3 .* has 7 prompts, fewer than data.prompts_per_phase 8") as error:
        RisingLevels().check(prompts, 8)
    assert "\n" not in str(error.value)


def test_a_curriculum_goes_on_from_its_own_state_and_starts_afresh_from_anothers(caplog):
    learned = PassRate()
    learned.update([group(prompt(0), 1.0, 0.0)])
    other = PassRate()
    resume(other, saved(learned))
    assert other.rates == {"p0": 0.5}
    with caplog.at_level("INFO"):
        resume(other, saved(learned))
        assert not caplog.messages
        for curriculum, state in ((PassRate(), saved(Shuffled())), (RisingLevels(), saved(learned)), (PassRate(), {})):
            resume(curriculum, state)
            assert curriculum.state_dict() == type(curriculum)().state_dict()
    assert caplog.messages == [
        "PassRate starts afresh: the checkpoint's curriculum is Shuffled",
        "RisingLevels starts afresh: the checkpoint's curriculum is PassRate",
        "PassRate starts afresh: the checkpoint's curriculum is another",
    ]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PassRate(smoothing=0), "PassRate.smoothing is 0"),
        (lambda: PassRate(floor=2), "PassRate.floor is 2"),
        (lambda: RisingLevels(threshold=0), "RisingLevels.threshold is 0"),
    ],
)
def test_impossible_settings_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.parametrize("curriculum", [Shuffled(), PassRate(), RisingLevels()], ids=lambda c: type(c).__name__)
def test_further_draws_depend_on_seed_epoch_and_attempt_alone(curriculum):
    prompts = [prompt(i) for i in range(100)]
    curriculum.draw(prompts, 10, epoch=0, seed=0)

    def ids(epoch, seed, attempt):
        return tuple(p.id for p in curriculum.draw_more(prompts, 10, epoch=epoch, seed=seed, attempt=attempt))

    settings = [(0, 0, 1), (1, 0, 1), (0, 1, 1), (0, 0, 2)]
    assert len({ids(*s) for s in settings}) == 4
    assert [ids(*s) for s in settings] == [ids(*s) for s in settings]


def test_the_ends_of_the_settings():
    assert (PassRate(smoothing=1, floor=1).smoothing, RisingLevels(threshold=1).threshold) == (1, 1)
    for make in (lambda: PassRate(smoothing=1.5), lambda: PassRate(floor=1.5), lambda: RisingLevels(threshold=1.5)):
        with pytest.raises(ConfigError, match="is 1.5; it must be above 0 and at most 1"):
            make()
    assert (PassRate().smoothing, PassRate().floor, RisingLevels().threshold) == (0.5, 0.1, 0.7)


def test_a_pass_puts_first_only_what_a_draw_lacks():
    first, second = itertools.islice(passes(10, 4, seed=0), 2)
    shuffled = list(range(10))
    random.Random("0/1").shuffle(shuffled)
    begun = first[8:]  # two draws of four, and two more
    lacking = [i for i in shuffled if i not in begun][:2]
    assert second == lacking + [i for i in shuffled if i not in lacking]

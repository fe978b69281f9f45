from collections import Counter
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aspo_lightning.evaluation import metrics
from aspo_lightning.evaluation.metrics import interval, maj_at_k, pass_at_k, repetition_rate


@given(st.integers(1, 8), st.data())
def test_pass_at_k_equals_enumeration(n, data):
    solved, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    draws = list(combinations([i < solved for i in range(n)], k))
    assert pass_at_k(n, solved, k) == pytest.approx(sum(any(d) for d in draws) / len(draws), abs=1e-12)


@given(st.lists(st.sampled_from(["right", "also right", "x", "y", "z", None]), min_size=1, max_size=8), st.data())
def test_maj_at_k_equals_enumeration(answers, data):
    k = data.draw(st.integers(1, len(answers)))
    solved = [str(a).endswith("right") for a in answers]
    votes = ["right" if s else a for a, s in zip(answers, solved, strict=True)]

    def chance(draw):
        counts = Counter(vote for vote in draw if vote is not None)
        winners = [vote for vote in counts if counts[vote] == max(counts.values())]
        return winners.count("right") / len(winners) if winners else 0.0

    draws = list(combinations(votes, k))
    assert maj_at_k(answers, solved, k) == pytest.approx(sum(map(chance, draws)) / len(draws), abs=1e-12)


# The paper's kinds of benchmark: few problems with many samples, and many with few; easy and hard.
@pytest.mark.parametrize(("problems", "k", "a", "b"), [(30, 64, 0.5, 0.8), (164, 1, 0.3, 2.0), (500, 4, 2.0, 0.5)])
def test_intervals_cover_the_truth_in_95_percent_of_suites(monkeypatch, problems, k, a, b):
    monkeypatch.setattr(metrics, "RESAMPLES", 1000)
    generator = np.random.default_rng(7)
    covered = 0
    for _ in range(2000):
        solved = generator.binomial(k, generator.beta(a, b, problems)) / k
        low, high = interval(solved.tolist())
        covered += low <= a / (a + b) <= high
    assert 0.93 <= covered / 2000 <= 0.97


def test_one_problem_has_no_interval():
    assert all(np.isnan(interval([0.5])))


def test_more_draws_than_samples_are_refused():
    with pytest.raises(ValueError, match="k is 1 to 4"):
        pass_at_k(4, 1, 5)
    with pytest.raises(ValueError, match="maj@5 can't be told"):
        maj_at_k(["a"] * 4, [True] * 4, 5)


def test_repetition_is_the_share_of_20_grams_already_seen():
    words = [f"w{i}" for i in range(30)]
    assert repetition_rate(" ".join(words), 20) == 0
    # 60 words have 41 20-grams; the second half repeats the first, so 11 of them were seen (words 30-49 .. 40-59).
    assert repetition_rate(" ".join(words + [w.upper() for w in words]), 20) == pytest.approx(11 / 41)
    assert repetition_rate("a " * 19, 20) == pytest.approx(0)
    assert repetition_rate("too short", 20) == 0


# For n = 6, t's quantiles at 5 degrees of freedom are -2.57058 (0.025) and -1.47588 (0.1) in tables; times sqrt(6 / 5),
# these are normal quantiles for the shares below.
@pytest.mark.parametrize(("level", "tail"), [(0.95, 0.0024318), (0.8, 0.0529661)])
def test_an_interval_by_hand(level, tail):
    values = [0.0, 0.125, 0.3, 0.55, 0.81, 1.0]
    means = np.array(values)[np.random.default_rng(0).integers(0, 6, (10_000, 6))].mean(1)
    expected = np.quantile(means, tail), np.quantile(means, 1 - tail)
    assert interval(values, level) == pytest.approx(expected, abs=1e-6)
    if level == 0.95:
        assert interval(values) == interval(values, 0.95)


def test_two_problems_have_an_interval():
    assert interval([0.25, 0.75]) == (0.25, 0.75)


def test_the_ends_of_k_are_allowed():
    assert (pass_at_k(4, 1, 1), pass_at_k(4, 1, 4)) == (0.25, 1.0)
    answers, solved = ["a", "b", "b", "c"], [True, False, False, False]
    assert (maj_at_k(answers, solved, 1), maj_at_k(answers, solved, 4)) == (0.25, 0.0)
    for k in (0, 5):
        with pytest.raises(ValueError, match="k is 1 to 4"):
            pass_at_k(4, 1, k)
        with pytest.raises(ValueError, match="k is 1 to 4"):
            maj_at_k(answers, solved, k)


def test_every_answer_is_solved_or_not():
    with pytest.raises(ValueError, match="shorter"):
        maj_at_k(["a", "b", "c"], [False, True], 2)


def test_words_are_lower_case_and_split_on_single_spaces():
    assert repetition_rate("A a b", n=1) == pytest.approx(1 / 3)
    assert repetition_rate("a  b  c", n=1) == pytest.approx(1 / 5)  # the empty word twice
    assert repetition_rate("\u00df ss", n=1) == 0  # the same in upper case

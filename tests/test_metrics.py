from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aspo_lightning.metrics import pass_at_k, repetition_rate


@given(st.integers(1, 8), st.data())
def test_pass_at_k_equals_enumeration(n, data):
    solved, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    draws = list(combinations([i < solved for i in range(n)], k))
    assert pass_at_k(n, solved, k) == pytest.approx(sum(any(d) for d in draws) / len(draws), abs=1e-12)


def test_more_draws_than_samples_are_refused():
    with pytest.raises(ValueError, match="k is 1 to 4"):
        pass_at_k(4, 1, 5)


def test_repetition_is_the_share_of_20_grams_already_seen():
    words = [f"w{i}" for i in range(30)]
    assert repetition_rate(" ".join(words)) == 0
    # 60 words have 41 20-grams; the second half repeats the first, so 11 of them were seen (words 30-49 .. 40-59).
    assert repetition_rate(" ".join(words + [w.upper() for w in words])) == pytest.approx(11 / 41)
    assert repetition_rate("a " * 19) == pytest.approx(0)
    assert repetition_rate("too short") == 0

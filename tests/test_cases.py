"""The cases that vary many things together hold what they say."""

import itertools

import pytest

from tests import cases

SHAPES = "head_dim", "rotate_v", "dtype", "heads"
MASKS = "page_size", "lengths", "window", "soft_cap", "sinks"
STEPS = "page_size", "lengths", "window", "sinks", "queries", "query_lengths", "causal"


def level(case, name):
    if name == "heads":
        return case.q_heads, case.kv_heads
    value = getattr(case, name)
    return value is None if name == "query_lengths" else value


@pytest.mark.parametrize(
    ("columns", "one_token"), [(SHAPES, True), (MASKS, True), (SHAPES, False), (STEPS, False)]
)
def test_every_two_values_meet(columns, one_token):
    rows = [case for case in cases.PAIRS if (case.queries == 1) == one_token]
    for a, b in itertools.combinations(columns, 2):
        met = {(level(case, a), level(case, b)) for case in rows}
        wanted = itertools.product(*({level(case, name) for case in rows} for name in (a, b)))
        if {a, b} == {"window", "causal"}:  # a window is causal
            wanted = (pair for pair in wanted if pair[0] is None or pair[1])
        assert set(wanted) == met, (a, b)


def test_names_are_of_cases():
    names = [case.name for case in cases.DECODE + cases.PREFILL + cases.PAIRS]
    assert len(names) == len(set(names))
    assert set(names) > cases.HELD_BY_PAIRS

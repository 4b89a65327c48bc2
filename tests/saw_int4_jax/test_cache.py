"""The paged cache: the allocator against a model in plain Python, and what a spec promises."""

import dataclasses
import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from pallas_kernels import page_format
from saw_int4_jax import (
    CacheSpec,
    attend,
    extend,
    free,
    init_cache,
    last_token,
    positions,
    share,
    slots,
    truncate,
)
from tests.hlo import assert_in_place
from tests.saw_int4_jax.allocator_model import AllocatorModel

BATCH, NUM_PAGES, PAGE_SIZE, MAX_PAGES, MAX_COUNT = 3, 6, 3, 4, 5
HEAD_DIM, LAYERS = 8, 2
# Without rotation a constant row of a bfloat16 number is stored exactly: a token's name.
SPEC = CacheSpec(LAYERS, 1, HEAD_DIM, NUM_PAGES, PAGE_SIZE, order=1)

# --- The allocator, driven next to its model ------------------------------------------------


@functools.partial(jax.jit, donate_argnums=0)
def write(cache, counts, tokens):
    """Extends, and stores each token's number as its key and, negated in layer 1, as its value.

    With zero queries attention weighs all tokens alike: it returns the mean of those so far.
    """
    cache, ok = extend(cache, counts, max_count=MAX_COUNT)
    rows = jnp.broadcast_to(
        tokens[..., None, None].astype(jnp.float32), (*tokens.shape, 1, HEAD_DIM)
    )
    means = []
    for layer, sign in enumerate((1, -1)):
        mean, cache = attend(cache, layer, jnp.zeros_like(rows), rows, sign * rows)
        means.append(mean[..., 0, 0])
    return cache, ok, jnp.stack(means)


@jax.jit
def read(cache):
    """The tokens that every page-table entry leads to, [layer, key or value, B, max_pages * S]."""
    ids = jnp.maximum(cache.page_table, 0)
    stored = [jnp.stack(page_format.read(cache.pages, layer, ids)) for layer in range(LAYERS)]
    stored = jnp.stack(stored)  # [L, 2, B, max_pages, K, S, D]
    return stored[..., 0, :, 0].reshape(LAYERS, 2, BATCH, -1)


OPERATIONS = {
    "truncate": jax.jit(truncate, donate_argnums=0),
    "free": jax.jit(free, donate_argnums=0),
    "share": jax.jit(share, donate_argnums=0),
}


class Checked:
    """A cache and its model. Every operation runs on both, and every invariant is then checked."""

    def __init__(self):
        self.cache = init_cache(SPEC, BATCH, MAX_PAGES * PAGE_SIZE)
        self.model = AllocatorModel(BATCH, NUM_PAGES, PAGE_SIZE, MAX_PAGES)
        self.new_tokens = [0] * BATCH
        self.written = 0

    def extend(self, counts):
        tokens = np.arange(BATCH * MAX_COUNT).reshape(BATCH, MAX_COUNT)
        tokens = (tokens + self.written) % 256  # bfloat16 holds these integers exactly
        self.written += BATCH * MAX_COUNT
        expected = self.model.extend(tokens.tolist(), counts, MAX_COUNT)
        self.cache, ok, means = write(self.cache, jnp.asarray(counts), jnp.asarray(tokens))
        self.new_tokens = [count if ok else 0 for count, ok in zip(counts, expected)]
        for row, count in enumerate(self.new_tokens):
            held = np.asarray(self.model.tokens[row])
            mean = (np.cumsum(held) / np.arange(1, len(held) + 1))[len(held) - count :]
            np.testing.assert_allclose(means[0, row, :count], mean, rtol=1e-5)
            np.testing.assert_allclose(means[1, row, :count], -mean, rtol=1e-5)
        return self.check(ok, expected)

    def truncate(self, lengths):
        expected = self.model.truncate(lengths)
        self.cache, ok = OPERATIONS["truncate"](self.cache, jnp.asarray(lengths))
        self.new_tokens = [0] * BATCH
        return self.check(ok, expected)

    def free(self, rows):
        self.model.free(rows)
        self.cache = OPERATIONS["free"](self.cache, jnp.asarray(rows))
        self.new_tokens = [0] * BATCH
        return self.check(True, True)

    def share(self, source, target, length):
        expected = self.model.share(source, target, length)
        self.cache, ok = OPERATIONS["share"](self.cache, *map(jnp.int32, (source, target, length)))
        if expected:
            self.new_tokens[target] = 0
        return self.check(ok, expected)

    def check(self, ok, expected):
        model, cache = self.model, self.cache
        table, references, free_pages = map(
            np.asarray, (cache.page_table, cache.references, cache.free_pages)
        )
        np.testing.assert_array_equal(ok, expected)
        lengths = [len(tokens) for tokens in model.tokens]
        np.testing.assert_array_equal(cache.lengths, lengths)
        np.testing.assert_array_equal(cache.new_tokens, self.new_tokens)

        # The table names pages as the model does: the same ones shared, the same ones apart.
        assert [(row >= 0).sum() for row in table] == [len(pages) for pages in model.pages]
        names = [zip(row.tolist(), pages) for row, pages in zip(table, model.pages)]
        pairs = {pair for row in names for pair in row}
        assert len({page for page, _ in pairs}) == len({name for _, name in pairs}) == len(pairs)
        assert table.max() < NUM_PAGES

        counted = np.bincount(table[table >= 0], minlength=NUM_PAGES)
        np.testing.assert_array_equal(references, counted)
        free_now = free_pages[: int(cache.num_free)].tolist()
        assert sorted(free_now) == np.flatnonzero(counted == 0).tolist()
        assert len(free_now) == model.num_free
        for row, length in zip(table, lengths):
            if length % PAGE_SIZE:  # a partly filled page has one owner
                assert references[row[length // PAGE_SIZE]] == 1

        stored = np.asarray(read(cache))
        for row, tokens in enumerate(model.tokens):
            for layer, value_sign in enumerate((1, -1)):
                keys, values = stored[layer, :, row, : len(tokens)]
                np.testing.assert_array_equal(keys, tokens)
                np.testing.assert_array_equal(values, np.asarray(tokens) * value_sign)
        return np.asarray(expected).tolist()


def each(values):
    return st.tuples(*[st.sampled_from(values)] * BATCH).map(list)


ROW = st.sampled_from(range(BATCH))
ANY_ROW = st.sampled_from(range(-1, BATCH + 1))
RANDOM_OPERATIONS = {
    "extend": st.tuples(each([0, 1, 2, 3, 4, MAX_COUNT, MAX_COUNT, MAX_COUNT + 1])),
    "truncate": st.tuples(each([0, 0, 1, 2, 4, 5, 20, -1])),  # tokens to drop
    "fork": st.tuples(ROW, st.sampled_from(range(PAGE_SIZE)), st.sampled_from([1, 1, 1, 0])),
    "free": st.tuples(each([False, False, False, True])),
    "share": st.tuples(ANY_ROW, ANY_ROW, st.integers(-1, MAX_PAGES * PAGE_SIZE + 1)),
}


@hypothesis.settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
@hypothesis.given(
    st.lists(
        st.sampled_from(
            ["extend", "extend", "fork", "truncate", "truncate", "free", "share"]
        ).flatmap(lambda name: RANDOM_OPERATIONS[name].map(lambda arguments: (name, *arguments))),
        min_size=25,
        max_size=40,
    )
)
def test_random_operations(operations):
    """Valid and not. `fork` shares the longest sequence, at times with a row emptied for it."""
    checked = Checked()
    for name, *arguments in operations:
        lengths = [len(tokens) for tokens in checked.model.tokens]
        match name, arguments:
            case "truncate", [dropped]:
                checked.truncate([length - drop for length, drop in zip(lengths, dropped)])
            case "fork", [to, dropped, emptied]:
                if emptied:
                    checked.free([row == to for row in range(BATCH)])
                    lengths[to] = 0
                longest = max(lengths)
                checked.share(lengths.index(longest), to, longest - dropped)
            case _:
                getattr(checked, name)(*arguments)


BIG = 2**31 - 1
# What each operation answers, for the cases that are easily wrong.
SCENARIOS = {
    "in_row_order_until_the_pool_is_empty": [
        ("extend", [5, 5, 5], [True, True, True]),  # 2 pages each
        ("extend", [1, 2, 1], [True, False, True]),  # the last page of each has room for one
        ("extend", [0, 0, 0], [True, True, True]),
    ],
    "none_after_one_that_the_pool_cannot_serve": [
        ("extend", [5, 5, 0], [True, True, True]),
        ("extend", [5, 5, 1], [True, False, False]),
    ],
    "a_full_table": [
        ("extend", [5, 0, 0], [True, True, True]),
        ("extend", [5, 0, 0], [True, True, True]),
        ("extend", [3, 1, 0], [False, True, True]),  # 13 tokens are more than 4 pages of 3
        ("extend", [2, 0, 0], [True, True, True]),
        ("extend", [1, 0, 0], [False, True, True]),
    ],
    "counts_out_of_range": [
        ("extend", [-1, MAX_COUNT + 1, 1], [False, False, True]),
        ("extend", [-BIG - 1, BIG, 1], [False, False, True]),
    ],
    "lengths_out_of_range": [
        ("extend", [4, 4, 4], [True, True, True]),
        ("truncate", [-1, 5, 3], [False, False, True]),
        ("truncate", [-BIG - 1, BIG, 3], [False, False, True]),
        ("truncate", [4, 0, 0], [True, True, True]),
        ("truncate", [0, 0, 0], [True, True, True]),
    ],
    "double_free": [
        ("extend", [4, 4, 0], [True, True, True]),
        ("free", [True, False, False], True),
        ("free", [True, False, False], True),
        ("free", [True, True, True], True),
        ("extend", [5, 5, 5], [True, True, True]),
    ],
    "full_pages_are_shared": [
        ("extend", [5, 0, 0], [True, True, True]),
        ("extend", [1, 0, 0], [True, True, True]),
        ("share", (0, 1, 6), True),
        ("share", (1, 2, 3), True),
        ("extend", [2, 2, 2], [True, True, True]),
        ("free", [True, False, False], True),
        ("extend", [0, 3, 3], [True, True, True]),
    ],
    "a_partial_page_is_copied": [
        ("extend", [5, 0, 0], [True, True, True]),
        ("share", (0, 1, 5), True),
        ("share", (0, 2, 1), True),
        ("extend", [3, 3, 3], [True, True, False]),
        ("extend", [0, 1, 2], [True, True, True]),
    ],
    "no_page_for_the_copy": [
        ("extend", [5, 5, 0], [True, True, True]),
        ("extend", [3, 3, 0], [True, True, True]),
        ("share", (0, 2, 5), False),
        ("share", (0, 2, 6), True),
    ],
    "rows_out_of_range": [
        ("extend", [3, 0, 0], [True, True, True]),
        ("share", (-1, 1, 0), False),
        ("share", (BATCH, 1, 0), False),
        ("share", (0, -1, 3), False),
        ("share", (0, BATCH, 3), False),
        ("share", (0, BIG, 3), False),
    ],
    "shared_lengths_out_of_range": [
        ("extend", [4, 0, 0], [True, True, True]),
        ("share", (0, 1, -1), False),
        ("share", (0, 1, 5), False),
        ("share", (0, 1, BIG), False),
        ("share", (0, 1, 0), True),
        ("share", (0, 1, 4), True),
    ],
    "self_and_occupied": [
        ("extend", [4, 1, 0], [True, True, True]),
        ("share", (0, 0, 3), False),
        ("share", (0, 1, 3), False),
        ("share", (2, 2, 0), True),
    ],
    "a_cut_into_a_shared_page_copies_it": [
        ("extend", [5, 0, 0], [True, True, True]),
        ("extend", [1, 0, 0], [True, True, True]),
        ("share", (0, 1, 6), True),
        ("truncate", [5, 6, 0], [True, True, True]),
        ("extend", [1, 1, 0], [True, True, True]),
        ("truncate", [2, 4, 0], [True, True, True]),
    ],
    "rows_that_cut_the_same_page_in_one_call": [
        ("extend", [3, 0, 0], [True, True, True]),
        ("share", (0, 1, 3), True),
        ("share", (0, 2, 3), True),
        ("truncate", [2, 2, 1], [True, True, True]),
        ("extend", [3, 3, 4], [True, True, True]),
    ],
    "rows_that_cut_and_free_the_same_page_in_one_call": [
        ("extend", [3, 0, 0], [True, True, True]),
        ("share", (0, 1, 3), True),
        ("share", (0, 2, 3), True),
        ("truncate", [0, 2, 0], [True, True, True]),
        ("extend", [5, 3, 4], [True, True, True]),
    ],
    "no_page_for_the_copy_of_a_cut": [
        ("extend", [3, 5, 5], [True, True, True]),
        ("free", [False, False, True], True),
        ("share", (0, 2, 3), True),
        ("extend", [0, 4, 4], [True, True, True]),
        ("truncate", [2, 5, 6], [False, True, True]),
        ("truncate", [2, 5, 6], [True, True, True]),
    ],
    "one_page_for_the_copies_of_two_cuts": [
        ("extend", [3, 0, 0], [True, True, True]),
        ("share", (0, 1, 3), True),
        ("share", (0, 2, 3), True),
        ("extend", [0, 4, 5], [True, True, True]),
        ("truncate", [2, 1, 8], [True, False, True]),
        ("truncate", [2, 1, 8], [True, False, True]),
        ("truncate", [2, 7, 3], [True, True, True]),
        ("truncate", [2, 1, 3], [True, True, True]),
    ],
}


@pytest.mark.parametrize("scenario", SCENARIOS.values(), ids=SCENARIOS)
def test_scenario(scenario):
    checked = Checked()
    for operation, argument, expected in scenario:
        arguments = argument if isinstance(argument, tuple) else (argument,)
        assert getattr(checked, operation)(*arguments) == expected, (operation, argument)


def test_a_refused_call_changes_nothing():
    checked = Checked()
    checked.extend([5, 5, 5])
    before = jax.tree.map(np.array, checked.cache)
    checked.share(0, 1, 3)
    checked.share(3, 1, 0)
    jax.tree.map(np.testing.assert_array_equal, checked.cache, before)
    checked.truncate([6, -1, 9])
    checked.extend([6, -1, 3])
    before = dataclasses.replace(before, new_tokens=np.zeros(BATCH, np.int32))
    jax.tree.map(np.testing.assert_array_equal, checked.cache, before)


@pytest.mark.parametrize("operation", [extend, truncate, free])
def test_one_number_for_each_row(operation):
    cache = init_cache(SPEC, BATCH)
    for wrong in (1, BATCH + 1):
        with pytest.raises(ValueError, match=rf"^Expected .* of shape \({wrong},\) to be \[B\]"):
            operation(cache, jnp.zeros(wrong, jnp.int32))


# --- In place -------------------------------------------------------------------------------

POOLS = {
    "bf16": dict(dtype="bf16"),
    "paired": dict(layout="paired"),
    "split": dict(layout="split"),
}


@pytest.mark.parametrize("options", POOLS.values(), ids=POOLS)
def test_pages_are_donated_and_never_copied(options):
    spec = CacheSpec(4, 2, 64, num_pages=4096, page_size=16, **options)
    cache = jax.eval_shape(lambda: init_cache(spec, 8, 1024))
    row = jax.ShapeDtypeStruct((8,), jnp.int32)
    number = jax.ShapeDtypeStruct((), jnp.int32)
    calls = [
        (extend, row),
        (truncate, row),
        (free, jax.ShapeDtypeStruct((8,), bool)),
        (share, number, number, number),
    ]
    for operation, *arguments in calls:
        compiled = jax.jit(operation, donate_argnums=0).lower(cache, *arguments).compile()
        assert_in_place(compiled, cache.pages)
    not_donated = jax.jit(truncate).lower(cache, row).compile()
    with pytest.raises(AssertionError):  # or this test could not fail
        assert_in_place(not_donated, cache.pages)


# --- Where a step's tokens stand ------------------------------------------------------------


def test_positions_slots_and_last_token():
    cache, _ = extend(init_cache(SPEC, BATCH), jnp.array([4, 0, 2]))
    cache, _ = extend(cache, jnp.array([3, 1, 0]))
    np.testing.assert_array_equal(positions(cache, 3), [[4, 5, 6], [0, 1, 2], [2, 3, 4]])
    table = np.asarray(cache.page_table)
    expected = [
        [table[0, 1] * 3 + 1, table[0, 1] * 3 + 2, table[0, 2] * 3],
        [table[1, 0] * 3, -1, -1],
        [-1, -1, -1],
    ]
    np.testing.assert_array_equal(slots(cache, 3), expected)

    x = jnp.arange(BATCH * 3 * 2).reshape(BATCH, 3, 2)
    np.testing.assert_array_equal(last_token(x, cache)[:2, 0], [x[0, 2], x[1, 0]])
    np.testing.assert_array_equal(last_token(x, None), x[:, -1:])


def test_positions_and_slots_at_the_end_of_the_table():
    """Padding past the table's last column is skipped, not wrapped into some page."""
    cache, ok = extend(init_cache(SPEC, 1, 6), jnp.array([6]))
    assert ok
    cache, _ = extend(cache, jnp.array([0]))
    np.testing.assert_array_equal(slots(cache, 4), [[-1, -1, -1, -1]])


def test_attend_refuses_shapes_that_do_not_fit():
    cache, _ = extend(init_cache(SPEC, BATCH), jnp.ones(BATCH, jnp.int32))
    good = jnp.zeros((BATCH, 1, 1, HEAD_DIM))
    for q, k, v in [
        (good[:2], good[:2], good[:2]),
        (good, good[:2], good[:2]),
        (good, good, good[:2]),
        (good, jnp.zeros((BATCH, 2, 1, HEAD_DIM)), jnp.zeros((BATCH, 2, 1, HEAD_DIM))),
        (good, good[..., :4], good[..., :4]),
        (good[..., :4], good, good),
    ]:
        with pytest.raises(ValueError, match=r"^Expected "):
            attend(cache, 0, q, k, v)
    with pytest.raises(ValueError, match=r"^Expected layer=2"):
        attend(cache, LAYERS, good, good, good)


# --- Spec -----------------------------------------------------------------------------------

BAD_SPECS = [
    (dict(dtype="int8"), "dtype='int8'"),
    (dict(layout="rows"), "rows"),
    (dict(layout="bf16"), "layout='bf16'"),
    (dict(dtype="bf16", layout="paired"), "layout='paired'"),
    (dict(dtype="bf16", order=2), "order=2"),
    (dict(dtype="bf16", order=0), "order=0"),
    (dict(dtype="bf16", rotate_v=True), "rotate_v=True"),
    (dict(order=0), "order=0"),
    (dict(order=3), "order=3"),
    (dict(order=128), "order=128"),
    (dict(head_dim=96, order=64), "order=64"),
    (dict(head_dim=6, layout="split"), "head_dim=6"),
    (dict(layers=0), "layers=0"),
    (dict(kv_heads=0), "kv_heads=0"),
    (dict(head_dim=-64), "head_dim=-64"),
    (dict(num_pages=0), "num_pages=0"),
    (dict(page_size=-1), "page_size=-1"),
    (dict(num_pages=2**25, page_size=64), "num_pages=33554432"),
]
GOOD_SPEC = dict(layers=2, kv_heads=2, head_dim=64, num_pages=3, page_size=16)


@pytest.mark.parametrize(("options", "message"), BAD_SPECS)
def test_spec_errors(options, message):
    with pytest.raises(ValueError, match=f"^Expected .*{message}"):
        CacheSpec(**{**GOOD_SPEC, **options})


@pytest.mark.parametrize("arguments", [(0,), (-1,), (1, 0), (1, -5)])
def test_init_cache_errors(arguments):
    with pytest.raises(ValueError, match=r"^Expected .* to be positive"):
        init_cache(SPEC, *arguments)


@pytest.mark.parametrize(
    ("max_length", "expected"), [(None, 18), (1, 3), (3, 3), (4, 6), (18, 18), (1000, 18)]
)
def test_max_length_is_whole_pages_of_the_pool(max_length, expected):
    assert init_cache(SPEC, 1, max_length).max_length == expected


@pytest.mark.parametrize("options", POOLS.values(), ids=POOLS)
@pytest.mark.parametrize("head_dim", [64, 80, 96, 112, 128])
def test_bytes_per_token_are_those_of_the_arrays(options, head_dim):
    spec = CacheSpec(3, 2, head_dim, 5, 16, **options)
    cache = init_cache(spec, 1)
    assert spec.bytes_per_token * 5 * 16 == sum(x.nbytes for x in jax.tree.leaves(cache.pages))
    bits_per_value = spec.bytes_per_token * 8 / (3 * 2 * head_dim * 2)
    assert bits_per_value == (16 if "dtype" in options else 4 + 32 / head_dim)


def test_bits_per_value_of_head_dim_128():
    int4, bf16 = (CacheSpec(32, 8, 128, 1, dtype=dtype) for dtype in ("int4", "bf16"))
    assert int4.bytes_per_token * 8 / (32 * 8 * 128 * 2) == 4.25
    assert bf16.bytes_per_token / int4.bytes_per_token == pytest.approx(3.76, abs=0.01)


@pytest.mark.parametrize(
    ("head_dim", "order"), [(80, 16), (96, 32), (112, 16), (128, 128), (256, 256)]
)
def test_default_order_is_the_largest_that_divides(head_dim, order):
    spec = CacheSpec(1, 1, head_dim, 1)
    assert (spec.format.order, spec.method) == (order, "bdr")
    assert spec.format.value_order == 1
    assert dataclasses.replace(spec, rotate_v=True).format.value_order == order


def test_method_names():
    methods = [dict(dtype="bf16"), dict(order=1), dict(order=16), dict()]
    specs = [CacheSpec(**GOOD_SPEC, **options) for options in methods]
    assert [spec.method for spec in specs] == ["bf16", "int4", "bdr", "bdr"]
    assert len({hash(spec) for spec in specs}) == 4  # usable as static arguments


# --- Implementation --------------------------------------------------------------------------


def test_implementation_is_checked_and_chooses_the_layout():
    with pytest.raises(ValueError, match="Expected implementation='cuda' to be None or one of"):
        CacheSpec(1, 1, 16, num_pages=2, implementation="cuda")
    layouts = {
        name: CacheSpec(1, 1, 16, num_pages=2, implementation=name).format.layout
        for name in ("triton", "mosaic_tpu")
    }
    assert layouts == {"triton": "split", "mosaic_tpu": "paired"}


def test_two_implementations_are_two_programs():
    """The implementation is static: a program compiled for one is never run for another."""
    traced = []

    @jax.jit
    def step(cache):
        traced.append(cache.implementation)
        return cache

    for name in (None, "xla", None, "xla"):
        spec = CacheSpec(1, 1, 16, num_pages=2, implementation=name)
        assert step(init_cache(spec, 1)).implementation == name
    assert traced == [None, "xla"]


def test_a_kernel_of_another_device_is_refused():
    cache = init_cache(CacheSpec(1, 1, 16, num_pages=2, implementation="mosaic_tpu"), 1)
    cache, _ = extend(cache, jnp.array([1]))
    x = jnp.zeros((1, 1, 1, 16))
    with pytest.raises(NotImplementedError, match="implementation='mosaic_tpu' to run on its dev"):
        attend(cache, 0, x, x, x)

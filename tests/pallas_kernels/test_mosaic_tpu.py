"""The TPU kernels in the TPU interpreter, and on a TPU (`-m tpu`), against the oracle.

The interpreter fills memory that nobody wrote with NaN, raises on reads out of bounds, and makes a
copy only when it is awaited, so that a wait too few is a wrong value.
"""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import PageFormat, init_pages
from pallas_kernels.mosaic_tpu import attention, write
from tests import cases
from tests.pallas_kernels import test_attention, test_write

INTERPRET = pltpu.InterpretParams(
    detect_races=True,
    uninitialized_memory="nan",
    out_of_bounds_reads="raise",
    dma_execution_mode="on_wait",
)

# Queries and weights keep 15 bits; outputs in bfloat16 keep 8.
TOLERANCE = dict(rtol=0, atol=8e-4)
BF16_TOLERANCE = dict(rtol=2**-7, atol=2e-3)


def paired(all_cases):
    """The layout that only other kernels read becomes the one that these read."""
    return test_attention.distinct(
        dataclasses.replace(case, layout="paired") if case.layout == "split" else case
        for case in all_cases
    )


def attend(problem, interpret, kernel=attention):
    case = problem.case
    scale = case.head_dim**-0.5 if case.scale is None else case.scale
    call = functools.partial(kernel.paged_attention, scale=scale, interpret=interpret)
    out = jax.jit(call, static_argnames=("causal", "window", "soft_cap"))(
        problem.q,
        problem.pages,
        problem.page_table,
        problem.lengths,
        layer=test_attention.LAYER,
        query_lengths=problem.query_lengths,
        sinks=problem.sinks,
        **problem.options,
    )
    return np.asarray(out, np.float64)


def check_attention(case, interpret, kernel=attention):
    problem = test_attention.Problem(case)
    out = attend(problem, interpret, kernel)
    tolerance = BF16_TOLERANCE if case.dtype == "bfloat16" else TOLERANCE
    np.testing.assert_allclose(out, problem.expected(), **tolerance)
    real = np.arange(case.queries) < problem.query_lengths[:, None]
    assert not out[~real].any()
    assert not out[problem.lengths == 0].any()


def check_write(case, interpret, kernel=write):
    pages, (k, v) = test_write.dirty_pages(case), test_write.tokens(case)
    expected = test_write.expected_write(pages, k, v, case.slots, case.layer)
    call = functools.partial(kernel.write_kv, interpret=interpret)
    written = jax.jit(call)(pages, k, v, jnp.array(case.slots, jnp.int32), layer=case.layer)
    test_write.assert_same_bytes(written, expected)


ATTENTION = paired(cases.ATTENTION)

# Runs of tokens, as a prefill writes them: into whole tiles, ragged at both ends, over blocks of
# the kernel and borders of pages; and more tokens than units in flight, several to a tile.
RUN = cases.WriteCase("run", num_pages=5, page_size=128, kv_heads=1, head_dim=128, order=128)
SCATTERED = tuple(int(slot) for slot in np.random.default_rng(0).permutation(640)[:40])
RUNS = [
    dataclasses.replace(RUN, slots=tuple(range(130, 430))),
    dataclasses.replace(RUN, name="aligned_run", slots=tuple(range(128, 384)), dtype="bfloat16"),
    dataclasses.replace(RUN, name="run_64", slots=tuple(range(130, 300)), head_dim=64, order=64),
    dataclasses.replace(RUN, name="run_bf16", slots=tuple(range(130, 300)), layout="bf16", order=1),
    dataclasses.replace(
        RUN, name="two_runs", slots=(*range(60, 100), -1, *range(300, 333)), kv_heads=3
    ),
    dataclasses.replace(RUN, name="scattered", slots=SCATTERED, kv_heads=2),
]
WRITES = paired(cases.WRITES) + RUNS
QUICK = {"pairs_1", "pairs_13", "verify_4_bf16", "paired", "some_skipped", "two_runs"}


def interpreted(all_cases):
    """All but the quick ones are `slow`."""
    return [
        pytest.param(case, id=case.name, marks=() if case.name in QUICK else pytest.mark.slow)
        for case in all_cases
    ]


@pytest.fixture
def small_blocks(monkeypatch):
    """Several blocks of pages to a sequence."""
    monkeypatch.setattr(attention, "BLOCK_TOKENS", 128)


@pytest.mark.timeout(300)  # a copy into the wrong buffer is awaited forever
@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("case", interpreted(ATTENTION))
def test_attention_interpreted(case):
    check_attention(case, INTERPRET)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("case", interpreted(WRITES))
def test_write_interpreted(case):
    check_write(case, INTERPRET)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(("chunk", "order"), [(1, 128), (5, 1), (16, 128)])
def test_tiles_of_queries(monkeypatch, order, chunk):
    """More queries than one tile takes; items that see nothing stand between others."""
    monkeypatch.setattr(attention, "BLOCK_TOKENS", 128)
    monkeypatch.setattr(attention, "MAX_ROWS", 4 * chunk)
    case = cases.AttentionCase(
        "tiles",
        order=order,
        head_dim=128,
        queries=16,
        lengths=(16, 0, 150, 300, 16),
        query_lengths=(16, 0, 3, 16, 0),
        page_size=128,
    )
    check_attention(case, INTERPRET)


def float8(chosen):
    """The attention kernel with codes as float8 numbers, or not."""
    call = functools.partial(attention.paged_attention, float8=chosen)
    return types.SimpleNamespace(paged_attention=call)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("name", ["pairs_5", "pairs_12", "pairs_13", "small_pages"])
def test_float8_codes(name):
    (case,) = (case for case in ATTENTION if case.name == name)
    check_attention(case, INTERPRET, float8(True))


def test_whether_codes_survive_float8(monkeypatch):
    assert attention.codes_survive_float8(INTERPRET)
    monkeypatch.setattr(attention, "FLOAT8_UNIT", 256)
    assert not attention.codes_survive_float8(INTERPRET)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_nan_token_spoils_its_own_head_only(small_blocks):
    problem = test_attention.Problem(cases.AttentionCase("nan", lengths=(20, 20)))
    page = problem.page_table[0, 0]
    for kind in (0, 1):
        problem.words[test_attention.LAYER, page, 3, kind, kind] = 0x7FC0
    out = attend(problem, INTERPRET)
    assert np.isnan(out[0]).all()  # the key of KV head 0, the value of KV head 1
    assert np.isfinite(out[1]).all()


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("sink", [-np.inf, -1e4, 1e4])
def test_extreme_sinks(sink, small_blocks):
    problem = test_attention.Problem(cases.AttentionCase("sinks", lengths=(20, 0), sinks=True))
    problem.sinks[:] = sink
    np.testing.assert_allclose(attend(problem, INTERPRET), problem.expected(), **TOLERANCE)


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        (dict(), None),
        (dict(page_size=256, head_dim=80, order=16), None),
        (dict(page_size=64), None),
        (dict(page_size=16, kv_heads=4), None),
        (dict(page_size=16, layout="bf16", order=1), None),
        (dict(page_size=16, kv_heads=2), "kv_heads=2 to be a multiple of 4"),
        (dict(page_size=64, head_dim=64, order=1), "page_size=64 to be a multiple of 128"),
        (dict(page_size=48), "page_size=48"),
        (dict(page_size=8), "page_size=8"),
        (dict(head_dim=72, order=8), None),
        (dict(head_dim=100, order=4), "head_dim=100"),
        (dict(layout="split"), "'split'"),
    ],
    ids=str,
)
def test_pages_supported(shape, reason):
    pages = test_write.dirty_pages(dataclasses.replace(RUN, **shape))
    actual = attention.pages_supported(pages)
    assert actual == reason or reason in actual


def test_supported_page_tables():
    pages = test_write.dirty_pages(RUN)
    large = jax.ShapeDtypeStruct((4, 1 << 18), jnp.int32)
    assert "1048576" in attention.supported(large, pages, large)


# --- On a TPU -------------------------------------------------------------------------------


def on_tpu(case):
    """The case with pages that the compiled kernels take."""
    sizes = {name: getattr(case, name) for name in ("kv_heads", "page_size", "head_dim")}
    pages = init_pages(PageFormat(case.layout), layers=1, num_pages=1, **sizes)
    if attention.pages_supported(pages) is None:
        return case
    return dataclasses.replace(case, page_size=128)


@pytest.mark.tpu
@pytest.mark.parametrize("block_tokens", [128, attention.BLOCK_TOKENS])
@pytest.mark.parametrize("case", ATTENTION, ids=lambda case: case.name)
def test_attention_on_tpu(monkeypatch, case, block_tokens):
    monkeypatch.setattr(attention, "BLOCK_TOKENS", block_tokens)
    check_attention(on_tpu(case), interpret=False)


@pytest.mark.tpu
@pytest.mark.parametrize("name", ["pairs_5", "pairs_12"])
def test_float8_choice_on_tpu(name):
    """Codes as integers work on every TPU, and as float8 numbers where the device says so."""
    (case,) = (case for case in ATTENTION if case.name == name)
    check_attention(on_tpu(case), False, float8(False))
    if attention.float8_keeps_codes():
        check_attention(on_tpu(case), False, float8(True))


@pytest.mark.tpu
@pytest.mark.parametrize("case", WRITES, ids=lambda case: case.name)
def test_write_on_tpu(case):
    check_write(on_tpu(case), interpret=False)

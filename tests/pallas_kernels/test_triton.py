"""The Triton kernels against the oracle: interpreted anywhere, compiled on a GPU (`-m gpu`)."""

import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import PageFormat, init_pages, tuning
from pallas_kernels.triton import attention, decode, write
from pallas_kernels.triton.arithmetic import power_of_two
from pallas_kernels.xla.write import write_kv as write_kv_xla
from tests import cases, oracle
from tests.pallas_kernels import test_write
from tests.pallas_kernels.test_attention import LAYER, Problem, in_both_modes

INTERPRETED = "interpreted"
SLOWLY_INTERPRETED = pytest.param(INTERPRETED, marks=pytest.mark.slow)
COMPILED = pytest.param("compiled", marks=pytest.mark.gpu)

# Weights and codes meet in float16; a bfloat16 cache's weights are bfloat16.
TOLERANCE = 5e-4
BF16_TOLERANCE = 4e-3

# Interpreted cases that take a second or two each; the others are `slow`.
QUICK = {"bf16", "pairs_1", "pairs_13", "some_skipped", "bf16_skipped", "head_dim_96_split"}


def kernel_cases(all_cases):
    """Each case interpreted and compiled, `paired` ones as `split` unless there is the same one."""
    ours = [case for case in all_cases if case.layout != "paired"]
    ours += [
        dataclasses.replace(case, layout="split") for case in all_cases if case.layout == "paired"
    ]
    return in_both_modes(ours, QUICK)


def attend(problem, mode, blocks=None, **options):
    case = problem.case
    if blocks is None and mode == INTERPRETED:
        blocks = decode.Blocks(16, 16, 16, 16, 1, 1)
    static = dict(
        causal=case.causal,
        scale=case.head_dim**-0.5 if case.scale is None else case.scale,
        window=case.window,
        soft_cap=case.soft_cap,
        blocks=blocks,
        interpret=mode == INTERPRETED,
    )
    out = jax.jit(functools.partial(attention.paged_attention, **static))(
        problem.q,
        problem.pages,
        jnp.asarray(problem.page_table),
        jnp.asarray(problem.lengths),
        query_lengths=jnp.asarray(problem.query_lengths),
        sinks=problem.sinks,
        **{"layer": LAYER, **options},
    )
    assert out.shape == problem.q.shape
    assert out.dtype == problem.q.dtype
    return np.asarray(out, np.float64)


def relative_error(actual, expected):
    return np.linalg.norm(actual - expected) / max(np.linalg.norm(expected), 1e-30)


def assert_close(actual, problem, tolerance=None):
    case = problem.case
    if tolerance is None:
        short = case.layout == "bf16" or case.dtype == "bfloat16"
        tolerance = BF16_TOLERANCE if short else TOLERANCE
    assert relative_error(actual, problem.expected()) < tolerance


# --- Attention ------------------------------------------------------------------------------


@pytest.mark.parametrize(("mode", "case"), kernel_cases(cases.ATTENTION))
def test_attention_equals_the_oracle(mode, case):
    problem = Problem(case)
    actual = attend(problem, mode)
    assert_close(actual, problem)
    real = np.arange(case.queries) < problem.query_lengths[:, None]
    assert not actual[~real].any()
    assert not actual[problem.lengths == 0].any()


@pytest.mark.parametrize("mode", [SLOWLY_INTERPRETED, COMPILED])
@pytest.mark.parametrize(
    ("programs", "block_tokens", "page_size"), [(1, 32, 64), (64, 64, 16), (64, 32, 24)]
)
def test_block_sizes_do_not_show(mode, programs, block_tokens, page_size):
    case = cases.AttentionCase("blocks", "split", page_size=page_size, lengths=(0, 150, 33))
    problem = Problem(case)
    blocks = decode.Blocks(block_tokens, 16, programs, 64, 1, 2)
    assert_close(attend(problem, mode, blocks), problem)


@pytest.mark.parametrize("mode", [SLOWLY_INTERPRETED, COMPILED])
@pytest.mark.parametrize(
    ("layout", "q_heads"), [("split", 2), ("bf16", 5), ("bf16", 8), ("split", 16)]
)
def test_groups(mode, layout, q_heads):
    case = cases.AttentionCase(
        "group", layout, order=1, kv_heads=1, q_heads=q_heads, queries=3, lengths=(40, 7)
    )
    problem = Problem(case)
    assert_close(attend(problem, mode), problem)


@pytest.mark.parametrize("mode", [SLOWLY_INTERPRETED, COMPILED])
def test_long_context_in_one_split_keeps_its_digits(mode):
    """Zero-mean values: an offset carried through the sum would show here first."""
    case = cases.AttentionCase(
        "long", "split", lengths=(32_768,), kv_heads=1, head_dim=128, order=128, page_size=64
    )
    problem = Problem(case)
    scale, _ = oracle.split(problem.words)
    minimum = (-7.5 * scale).astype(jnp.bfloat16).view(np.uint16)
    problem.words = (problem.words & 0xFFFF) | minimum.astype(np.uint32) << 16
    assert_close(attend(problem, mode, decode.Blocks(64, 16, 1, 1, 1, 2)), problem, 1e-3)


@pytest.mark.parametrize("mode", [INTERPRETED, COMPILED])
@pytest.mark.parametrize(
    "lengths",
    [(0, 0, 900, 0), (900, 33, 1, 64), (0,), (40, 70, 0, 31, 64, 40, 33, 90)],
    ids=["one long", "ragged", "none", "several in a program"],
)
def test_uneven_batches(mode, lengths):
    case = cases.AttentionCase("uneven", "split", lengths=lengths, kv_heads=1, page_size=32)
    problem = Problem(case)
    blocks = decode.Blocks(32, 8, 6, 64, 1, 2)
    assert_close(attend(problem, mode, blocks), problem)


@pytest.mark.parametrize("mode", [INTERPRETED, COMPILED])
def test_nan_query_spoils_its_own_row_only(mode):
    problem = Problem(cases.AttentionCase("nan_query", "split", lengths=(20, 20)))
    problem.q = problem.q.at[0, 0, 1, 7].set(np.nan)
    out = attend(problem, mode)
    assert np.isnan(out[0, 0, 1]).all()
    assert np.isfinite(np.delete(out, 1, axis=2)).all()


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("q_heads", "kv_heads", "head_dim"),
    [
        *[(*heads, 128) for heads in ((16, 8), (40, 8), (64, 8), (32, 32), (8, 1))],
        *[(40, 8, head_dim) for head_dim in (64, 80, 96, 256)],
    ],
)
def test_heads_of_real_models(q_heads, kv_heads, head_dim):
    case = cases.AttentionCase(
        "heads",
        "split",
        order=head_dim & -head_dim,
        q_heads=q_heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        page_size=64,
        lengths=(700, 64, 0, 1, 333),
    )
    problem = Problem(case)
    assert_close(attend(problem, "compiled"), problem)


@pytest.mark.parametrize("mode", [SLOWLY_INTERPRETED, COMPILED])
@pytest.mark.parametrize("factor", [2.0**-60, 2.0**60])
def test_values_and_queries_of_any_magnitude(mode, factor):
    case = cases.AttentionCase("magnitude", "split", lengths=(40, 3), scale=float(0.125 / factor))
    problem = Problem(case)
    problem.q = problem.q * factor
    codes, words = problem.codes, problem.words
    scale, minimum = (x * [1, factor] for x in oracle.split(words))  # keys, values
    low, high = (x.astype(jnp.bfloat16).view(np.uint16) for x in (scale, minimum))
    problem.words = low | high.astype(np.uint32) << 16
    assert (codes == problem.codes).all()
    assert_close(attend(problem, mode), problem)


@pytest.mark.parametrize("mode", [INTERPRETED, COMPILED])
def test_nan_token_spoils_its_own_sequence_only(mode):
    problem = Problem(cases.AttentionCase("nan", "split", lengths=(20, 20)))
    problem.words[LAYER, problem.page_table[0, 0], 3, 0, 0] = oracle.NAN_WORD
    out = attend(problem, mode)
    assert np.isnan(out[0, :, :2]).all()  # the two query heads of KV head 0
    assert np.isfinite(out[0, :, 2:]).all()
    assert np.isfinite(out[1]).all()


@pytest.mark.parametrize("mode", [SLOWLY_INTERPRETED, COMPILED])
@pytest.mark.parametrize("sink", [-np.inf, -1e4, 1e4])
def test_extreme_sinks(mode, sink):
    problem = Problem(cases.AttentionCase("sinks", "split", lengths=(20, 0), sinks=True))
    problem.sinks[:] = sink
    actual = attend(problem, mode)
    np.testing.assert_allclose(actual, problem.expected(), rtol=0, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["bf16", "split"])
@pytest.mark.parametrize("queries", [1, 300])
def test_large_problem_equals_xla(method, queries):
    """The shapes of a real model, with the device's own block sizes."""
    problem = Problem(
        cases.AttentionCase(
            "large",
            method,
            order=1 if method == "bf16" else 128,
            dtype="bfloat16",
            lengths=(5000, 1, 2049, 0, 4096),
            queries=queries,
            query_lengths=(queries, 1, 1, 0, queries),
            q_heads=32,
            kv_heads=8,
            head_dim=128,
            page_size=64,
        )
    )
    actual = attend(problem, "compiled")
    expected = problem.attend(implementation="xla")
    assert relative_error(actual, expected) < BF16_TOLERANCE


# --- The work, cut ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("units", "slots"),
    [
        ((1,), 8),
        ((1, 501, 1, 1), 132),
        ((513,), 132),
        ((129, 14) * 16, 128),
        ((33, 5) * 64, 128),
        ((130,) * 32, 128),
        ((17,) * 256, 128),
        ((7, 2, 1), 4),
        ((88, 2, 1, 2), 8),
        ((3, 1, 2, 9, 1), 1),
    ],
)
def test_every_unit_is_one_slots(units, slots):
    padded = np.pad(units, (0, power_of_two(len(units)) - len(units)))
    cut = jax.vmap(functools.partial(decode.share, slots=slots), in_axes=(0, None))
    first, touched, start, low, high, total, used = map(
        np.asarray, cut(jnp.arange(slots), jnp.array(padded))
    )
    starts = np.cumsum(units) - units
    owners = np.repeat(np.arange(len(units)), units)
    assert low[0] == 0
    assert high[used[0] - 1] == len(owners) == total[0]
    for slot in range(slots):
        own = owners[low[slot] : high[slot]] if slot < used[0] else []
        assert touched[slot] == len(np.unique(own))
        assert len(own) <= -(-len(owners) // used[0])
        if len(own):
            assert first[slot] == own[0]
            assert start[slot] == starts[own[0]]
            mine = np.arange(low[slot], high[slot])
            assert (np.asarray(decode.slot_of(mine, total[slot], used[slot])) == slot).all()
            assert slot == 0 or low[slot] == high[slot - 1]


@pytest.mark.parametrize(
    ("batch", "programs", "slots"),
    [(1, 132, 64), (8, 132, 128), (32, 132, 128), (33, 132, 132), (70, 132, 132), (256, 132, 128)],
)
def test_equal_lengths_are_cut_evenly(batch, programs, slots):
    assert decode.count_slots(batch, programs, max_splits=64) == slots


# --- Writing --------------------------------------------------------------------------------


def written(pages, k, v, slots, mode, layer=0, blocks=None):
    if mode == INTERPRETED:
        blocks = write.Blocks(16, 1)
    static = dict(blocks=blocks, interpret=mode == INTERPRETED)
    return jax.jit(functools.partial(write.write_kv, **static))(pages, k, v, slots, layer=layer)


def written_on_cpu(*arrays):
    """By XLA, whose division on a GPU is approximate."""
    arrays = jax.device_put(arrays, jax.devices("cpu")[0])
    return jax.jit(functools.partial(write_kv_xla, layer=0))(*arrays)


@pytest.mark.parametrize(("mode", "case"), kernel_cases(cases.WRITES))
def test_write_equals_the_oracle(mode, case):
    pages, (k, v) = test_write.dirty_pages(case), test_write.tokens(case)
    slots = jnp.array(case.slots, jnp.int32)
    actual = written(pages, k, v, slots, mode, case.layer)
    expected = test_write.expected_write(pages, k, v, case.slots, case.layer)
    test_write.assert_same_bytes(actual, expected)


@pytest.mark.parametrize("mode", [INTERPRETED, COMPILED])
def test_hard_rows_have_the_same_bytes(mode):
    rows = [row.values for row in cases.ROWS if row.same_bytes]
    x = jnp.array(rows, jnp.float32)[:, None]
    sizes = dict(layers=1, num_pages=2, kv_heads=1, page_size=16, head_dim=16)
    pages = init_pages(PageFormat("split"), **sizes)
    slots = jnp.arange(len(x))
    expected = written_on_cpu(pages, x, -x, slots)
    actual = written(pages, x, -x, slots, mode)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("order", [1, 16, 128])
def test_many_tokens_have_the_same_bytes(order):
    """But for ties that the last bit of a rotation decides, which are few.

    Sums of a few bfloat16 numbers have few digits: that many of them are ties.
    """
    case = cases.WriteCase(
        "many",
        "split",
        order=order,
        dtype="bfloat16",
        slots=tuple(range(4096)),
        num_pages=64,
        page_size=64,
        kv_heads=8,
        head_dim=128,
    )
    pages, (k, v) = test_write.dirty_pages(case), test_write.tokens(case)
    slots = jnp.array(case.slots)
    codes, words = test_write.logical(written(pages, k, v, slots, "compiled"))
    expected = written_on_cpu(pages, k, v, slots)
    expected_codes, expected_words = test_write.logical(expected)
    same = words == expected_words
    flips = np.abs(codes.astype(int) - expected_codes)[same]
    print(f"order {order}: {(~same).sum()} of {same.size} words, {flips.sum()} of {flips.size}")
    assert (~same).mean() <= (0 if order == 1 else 1e-3)
    assert flips.max() <= 1
    assert flips.mean() <= (0 if order == 1 else 1e-4)


@pytest.mark.parametrize("mode", [INTERPRETED, COMPILED])
def test_bad_tokens_are_stored_as_nan(mode):
    case = cases.WriteCase("bad", "split", slots=(0, 1, 2))
    k, v = test_write.tokens(case)
    k = k.at[0, 0, 5].set(jnp.nan).at[1, 1, 7].set(jnp.inf)
    v = v.at[2, 0, 1].set(-jnp.inf)
    pages = written(test_write.dirty_pages(case), k, v, jnp.array(case.slots), mode)
    _, words = test_write.logical(pages)
    is_nan = words[0, 0, :3] == oracle.NAN_WORD  # [token, K, key or value]
    np.testing.assert_array_equal(np.argwhere(is_nan), [[0, 0, 0], [1, 1, 0], [2, 0, 1]])


@pytest.mark.parametrize("mode", [SLOWLY_INTERPRETED, COMPILED])
@pytest.mark.parametrize("case", cases.PREPARED, ids=lambda case: case.write.name)
def test_prepared_tokens_equal_those_of_xla(mode, case):
    """But for the last bit of a sum or a root, which decides a rounding now and then."""
    pages, operands, options = test_write.unprepared(case)
    expected_q, expected = test_write.prepare_and_write(pages, *operands, **options)
    if mode == INTERPRETED:
        options |= dict(blocks=write.Blocks(16, 1), interpret=True)
    everything = dict.fromkeys(("cos", "sin", "q_norm", "k_norm")) | options
    q, actual = jax.jit(
        functools.partial(write.write_qkv, layer=0, **{k: v for k, v in everything.items()})
    )(pages, *operands)
    dtype = case.write.dtype
    test_write.assert_nearly_equal(q, expected_q, dtype)
    test_write.assert_nearly_equal_pages(actual, expected, dtype)


@pytest.mark.gpu
def test_donated_pages_are_updated_in_place():
    case = cases.WriteCase("in_place", "split", num_pages=1000)
    pages, (k, v) = test_write.dirty_pages(case), test_write.tokens(case)
    step = jax.jit(functools.partial(write.write_kv, layer=0), donate_argnums=0)
    memory = step.lower(pages, k, v, jnp.array(case.slots)).compile().memory_analysis()
    assert memory.alias_size_in_bytes == pages.nbytes
    assert memory.temp_size_in_bytes < 1000


# --- Around the kernels ---------------------------------------------------------------------


def test_supported_says_why_not():
    sizes = dict(layers=1, num_pages=1, kv_heads=1, page_size=16)
    q = k = jnp.zeros((1, 1, 1), jnp.float32)
    split = init_pages(PageFormat("split"), head_dim=128, **sizes)
    paired = init_pages(PageFormat("paired"), head_dim=128, **sizes)
    wide = init_pages(PageFormat("split"), head_dim=512, **sizes)
    table = jnp.zeros((1, 1), jnp.int32)
    assert attention.supported(q, split, table) is None
    assert write.supported(split, k, k) is None
    for pages, reason in ((paired, "layout"), (wide, "head_dim")):
        assert reason in attention.supported(q, pages, table)
        assert reason in write.supported(pages, k, k)


def test_every_tuning_file_has_every_operation():
    for path in pathlib.Path(tuning.__file__).parent.glob("*.json"):
        sizes = json.loads(path.read_text())
        decode.Blocks(**sizes["decode_attention"])
        decode.Blocks(**sizes["decode_attention_bf16"])
        write.Blocks(**sizes["write_kv"])
        write.Blocks(**sizes["write_kv_many"])


def test_tuning_goes_by_device_kind():
    folder = pathlib.Path(tuning.__file__).parent
    for kind, name in (("NVIDIA H200", "h200"), ("NVIDIA H2000", "default"), ("cpu", "default")):
        expected = json.loads((folder / f"{name}.json").read_text())
        assert tuning.blocks("write_kv", kind) == expected["write_kv"]

"""The Triton kernel for many query rows against the oracle: interpreted, or on a GPU (`-m gpu`)."""

import dataclasses
import json
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import PageFormat, init_pages, tuning
from pallas_kernels.triton import attention, decode, prefill
from tests import cases, oracle
from tests.pallas_kernels.test_attention import LAYER, Problem
from tests.pallas_kernels.test_triton import (
    BF16_TOLERANCE,
    COMPILED,
    INTERPRETED,
    SLOWLY_INTERPRETED,
    assert_close,
    attend,
    kernel_cases,
    relative_error,
)

SMALL = {
    INTERPRETED: prefill.Blocks(16, 16, 16, 16, 1, 1),
    "compiled": prefill.Blocks(64, 32, 16, 16, 4, 3),
}

CASES = [
    *[case for case in cases.ATTENTION if case.queries > 1],
    cases.AttentionCase("chunk_bf16", "bf16", order=1, queries=16, lengths=(16, 40)),
    cases.AttentionCase("chunk_group_5", "split", queries=7, q_heads=10, lengths=(7, 40)),
    cases.AttentionCase("chunk_page_24", "split", queries=7, page_size=24, lengths=(7, 60)),
    cases.AttentionCase("chunk_negative_scale", "split", queries=7, lengths=(7, 40), scale=-0.3),
    *[
        cases.AttentionCase(
            f"chunk_head_dim_{head_dim}",
            "split",
            queries=7,
            head_dim=head_dim,
            rotate_v=True,
            lengths=(7, 40),
        )
        for head_dim in (80, 112)
    ],
]


@pytest.mark.parametrize(("mode", "case"), kernel_cases(CASES))
def test_prefill_equals_the_oracle(mode, case):
    problem = Problem(case)
    blocks = SMALL[mode]
    if mode == "compiled" and case.head_dim == 256:  # or registers spill, which takes long
        blocks = dataclasses.replace(blocks, rows=32, block_tokens=16)
    actual = attend(problem, mode, blocks)
    assert_close(actual, problem)
    real = np.arange(case.queries) < problem.query_lengths[:, None]
    assert not actual[~real].any()
    assert not actual[problem.lengths == 0].any()


@pytest.mark.parametrize("mode", [SLOWLY_INTERPRETED, COMPILED])
@pytest.mark.parametrize(
    ("programs", "block_tokens", "page_size"), [(1, 16, 64), (64, 64, 16), (64, 32, 24)]
)
def test_block_sizes_do_not_show(mode, programs, block_tokens, page_size):
    case = cases.AttentionCase(
        "blocks", "split", queries=40, page_size=page_size, lengths=(40, 150, 53)
    )
    problem = Problem(case)
    warps = 1 if mode == INTERPRETED else 4
    blocks = prefill.Blocks(64, block_tokens, programs, 64, warps, 3)
    assert_close(attend(problem, mode, blocks), problem)


@pytest.mark.parametrize("mode", [SLOWLY_INTERPRETED, COMPILED])
def test_long_context_in_one_split_keeps_its_digits(mode):
    """Zero-mean values: an offset carried through the sum would show here first."""
    case = cases.AttentionCase(
        "long",
        "split",
        queries=4,
        lengths=(32_768,),
        kv_heads=1,
        head_dim=128,
        order=128,
        page_size=64,
    )
    problem = Problem(case)
    scale, _ = oracle.split(problem.words)
    minimum = (-7.5 * scale).astype(jnp.bfloat16).view(np.uint16)
    problem.words = (problem.words & 0xFFFF) | minimum.astype(np.uint32) << 16
    assert_close(attend(problem, mode, prefill.Blocks(64, 64, 1, 1, 4, 3)), problem, 1e-3)


@pytest.mark.parametrize("mode", [SLOWLY_INTERPRETED, COMPILED])
@pytest.mark.parametrize("factor", [2.0**-60, 2.0**60])
def test_numbers_of_any_magnitude(mode, factor):
    """Keys and values by the factor; scores stay what they are."""
    case = cases.AttentionCase(
        "magnitude", "split", queries=7, lengths=(40, 8), scale=float(0.125 / factor)
    )
    problem = Problem(case)
    scale, minimum = (x * factor for x in oracle.split(problem.words))
    low, high = (x.astype(jnp.bfloat16).view(np.uint16) for x in (scale, minimum))
    problem.words = low | high.astype(np.uint32) << 16
    assert_close(attend(problem, mode, SMALL[mode]), problem)


@pytest.mark.parametrize("mode", [INTERPRETED, COMPILED])
def test_constant_vectors_beside_others(mode):
    """Their scale is zero: what is large about them is the minimum alone."""
    case = cases.AttentionCase("constant", "split", order=1, queries=7, lengths=(40, 8))
    problem = Problem(case)
    used = problem.words != oracle.NAN_WORD
    constant = used & (np.arange(case.page_size) % 2 == 0)[:, None, None]
    problem.words[constant] &= 0xFFFF0000
    assert_close(attend(problem, mode, SMALL[mode]), problem)


@pytest.mark.parametrize("mode", [SLOWLY_INTERPRETED, COMPILED])
@pytest.mark.parametrize("kind", [0, 1], ids=["key", "value"])
def test_nan_token_spoils_its_own_sequence_only(mode, kind):
    problem = Problem(cases.AttentionCase("nan", "split", queries=7, lengths=(20, 20)))
    problem.words[LAYER, problem.page_table[0, 0], 3, 0, kind] = oracle.NAN_WORD
    out = attend(problem, mode, SMALL[mode])
    assert np.isnan(out[0, :, :2]).all()  # the two query heads of KV head 0
    assert np.isfinite(out[0, :, 2:]).all()
    assert np.isfinite(out[1]).all()


@pytest.mark.parametrize("mode", [SLOWLY_INTERPRETED, COMPILED])
@pytest.mark.parametrize("sink", [-np.inf, -1e4, 1e4])
def test_extreme_sinks(mode, sink):
    case = cases.AttentionCase("sinks", "split", queries=7, lengths=(20, 7), sinks=True)
    problem = Problem(case)
    problem.sinks[:] = sink
    actual = attend(problem, mode, SMALL[mode])
    np.testing.assert_allclose(actual, problem.expected(), rtol=0, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["split", "bf16"])
@pytest.mark.parametrize("page_size", [16, 64, 256])
@pytest.mark.parametrize("q_heads", [32, 40])
def test_large_problem_equals_xla(layout, page_size, q_heads):
    """The shapes of a real model, with the device's own block sizes."""
    problem = Problem(
        cases.AttentionCase(
            "large",
            layout,
            order=1 if layout == "bf16" else 128,
            dtype="bfloat16",
            lengths=(5000, 1, 2049, 0, 4096),
            queries=300,
            query_lengths=(300, 1, 1, 0, 300),
            q_heads=q_heads,
            kv_heads=8,
            head_dim=128,
            page_size=page_size,
        )
    )
    actual = attend(problem, "compiled")
    expected = problem.attend(implementation="xla")
    assert relative_error(actual, expected) < BF16_TOLERANCE


def test_many_rows_are_for_prefill():
    sizes = dict(layers=1, num_pages=1, kv_heads=1, page_size=16)
    for layout, most in (("split", 16), ("bf16", 8)):
        pages = init_pages(PageFormat(layout), head_dim=128, **sizes)
        assert isinstance(attention.default_blocks(pages, most), decode.Blocks)
        blocks = attention.default_blocks(pages, most + 1)
        assert isinstance(blocks, prefill.Blocks)
        wide = attention.default_blocks(init_pages(PageFormat(layout), head_dim=256, **sizes), 1000)
        assert wide == dataclasses.replace(
            blocks, rows=blocks.rows // 2, block_tokens=blocks.block_tokens // 2
        )


def test_every_tuning_file_has_prefill():
    for path in pathlib.Path(tuning.__file__).parent.glob("*.json"):
        sizes = json.loads(path.read_text())
        prefill.Blocks(**sizes["prefill_attention"])
        prefill.Blocks(**sizes["prefill_attention_bf16"])

"""The shapes and inputs that tests and benchmarks share. Data only: nothing here computes."""

from __future__ import annotations

import dataclasses

from pallas_kernels.page_format import Layout

HEAD_DIMS = (64, 80, 96, 112, 128, 256)

# Each head dim with every Hadamard order that divides it.
ROTATIONS = [
    (head_dim, 1 << power)
    for head_dim in HEAD_DIMS
    for power in range(9)
    if head_dim % (1 << power) == 0
]

LARGEST_ORDERS = {1: 1, 64: 64, 80: 16, 96: 32, 112: 16, 128: 128, 192: 64, 256: 256}


@dataclasses.dataclass(frozen=True)
class Row:
    """A vector that is hard to quantize.

    Attributes:
      values: the vector.
      restores: `exact`, `close` (within the error bound) or `nan` throughout.
      same_bytes: every backend stores the same. Not so where one flushes subnormals to zero.
    """

    name: str
    values: tuple[float, ...]
    restores: str = "close"
    same_bytes: bool = True


ROWS = [
    Row("zero", (0.0,) * 16, "exact"),
    Row("constant", (-2.515625,) * 16, "exact"),
    Row("constant_1e30", (1e30,) * 16),
    Row("constant_1e-30", (1e-30,) * 16),
    Row("subnormal_1e-40", (1e-40,) * 16, same_bytes=False),
    Row("constant_not_bf16", (0.1,) * 16),
    Row("codes_0_to_15", tuple(range(16)), "exact"),
    Row("one_sided_narrow", tuple(1003 + i / 30 for i in range(16))),
    Row("all_negative", tuple(-5.25 - i * i / 7 for i in range(16))),
    Row("all_positive", tuple(0.3 + i * i / 7 for i in range(16))),
    Row("tiny", tuple(i * 1e-30 for i in range(-8, 8))),
    Row("scale_below_normal", tuple(2.0**-118 * (1 + i / 1024) for i in range(16))),
    Row("huge", tuple(i * 1e30 for i in range(-8, 8))),
    Row("outlier", (0.01, -0.02) * 7 + (0.03, 1000.0)),
    Row("outlier_below", (0.01, -0.02) * 7 + (0.03, -1000.0)),
    Row("alternating", (3.0, -3.0) * 8),
    Row("range_overflow", (3e38, -3e38) * 8, "nan"),
    Row("nan", (1.0,) * 15 + (float("nan"),), "nan"),
    Row("all_nan", (float("nan"),) * 16, "nan"),
    Row("inf", (1.0,) * 15 + (float("inf"),), "nan"),
    Row("minus_inf", (1.0,) * 15 + (float("-inf"),), "nan"),
    Row("both_inf", (float("inf"), float("-inf")) * 8, "nan"),
    Row("all_inf", (float("inf"),) * 16, "nan"),
]


@dataclasses.dataclass(frozen=True)
class WriteCase:
    """One call of `write_kv`.

    Attributes:
      slots: where the tokens go; negative ones and those past the pool are skipped.
    """

    name: str
    layout: Layout = "paired"
    order: int = 16
    rotate_v: bool = False
    dtype: str = "float32"
    slots: tuple[int, ...] = (37, 0, 63, 16, 15, 5)
    layers: int = 1
    layer: int = 0
    num_pages: int = 4
    page_size: int = 16
    kv_heads: int = 2
    head_dim: int = 64


WRITES = [
    WriteCase("paired"),
    WriteCase("paired_unrotated", order=1),
    WriteCase("paired_full_order", order=64),
    WriteCase("paired_values_rotated", rotate_v=True),
    WriteCase("paired_bf16_input", dtype="bfloat16"),
    WriteCase("paired_layer", layers=3, layer=1),
    WriteCase("split", "split"),
    WriteCase("split_unrotated", "split", order=1),
    WriteCase("split_full_order", "split", order=64),
    WriteCase("split_values_rotated", "split", order=64, rotate_v=True),
    WriteCase("split_bf16_input", "split", dtype="bfloat16"),
    WriteCase("split_layer", "split", layers=3, layer=2),
    WriteCase("bf16", "bf16", order=1),
    WriteCase("bf16_bf16_input", "bf16", order=1, dtype="bfloat16"),
    WriteCase("bf16_layer", "bf16", order=1, layers=3, layer=1),
    WriteCase("all_skipped", slots=(-1,) * 6),
    WriteCase("some_skipped", slots=(-1, 3, -7, 62, -1, 18)),
    WriteCase("past_the_pool", slots=(64, 3, 65, 10_000, 2**31 - 1, 18)),
    WriteCase("split_skipped", "split", slots=(-1, 3, 64, 62, -64, 18)),
    WriteCase("bf16_skipped", "bf16", order=1, slots=(-1, 3, 64, 62, -64, 18)),
    WriteCase("one_token", slots=(17,)),
    WriteCase("no_token", slots=()),
    WriteCase("mqa", kv_heads=1, head_dim=128, order=128),
    WriteCase("head_dim_80", head_dim=80),
    WriteCase("head_dim_96_split", "split", head_dim=96, order=32, kv_heads=3),
    WriteCase("head_dim_256", head_dim=256, order=256),
    WriteCase("small_pages", kv_heads=4, head_dim=128, slots=(37, 0, 63, 16, 15, -1, 5, 38)),
    WriteCase("pages_of_32", page_size=32, kv_heads=4, head_dim=128, slots=(127, 0, 31, 64, 40)),
    WriteCase("pages_of_64", page_size=64, head_dim=128, slots=(127, 0, 63, 64, 200)),
    WriteCase("page_of_128", num_pages=2, page_size=128, slots=(255, 0, 128, 127, 200, 64)),
]


@dataclasses.dataclass(frozen=True)
class PreparedCase:
    """One call of `write_qkv`: what is done to queries and keys before they are written."""

    write: WriteCase
    q_heads: int = 4
    rope: bool = True
    norm: bool = True


PREPARED = [
    PreparedCase(WriteCase("all", "split", order=64, dtype="bfloat16")),
    PreparedCase(WriteCase("rope", "split", rotate_v=True), norm=False),
    PreparedCase(WriteCase("norm", "split", dtype="bfloat16"), rope=False),
    PreparedCase(WriteCase("unquantized", "bf16", order=1, dtype="bfloat16"), q_heads=2),
    PreparedCase(WriteCase("skipped", "split", slots=(-1, 3, 64, 62, -64, 18)), q_heads=6),
    PreparedCase(WriteCase("head_dim_80", "split", head_dim=80, dtype="bfloat16")),
    PreparedCase(WriteCase("head_dim_96", "split", head_dim=96, order=32, kv_heads=1)),
    PreparedCase(WriteCase("head_dim_128", "split", head_dim=128, order=128, dtype="bfloat16")),
]


@dataclasses.dataclass(frozen=True)
class AttentionCase:
    """One call of `paged_attention`.

    Attributes:
      lengths: tokens of each sequence, the new ones included.
      queries: T, the new tokens of each sequence.
      query_lengths: how many of the T are real; `None`: all.
      shared_pages: how many leading pages all sequences have in common.
      sinks: whether each query head has a sink logit.
    """

    name: str
    layout: Layout = "paired"
    order: int = 16
    rotate_v: bool = False
    dtype: str = "float32"
    lengths: tuple[int, ...] = (33, 1, 48)
    queries: int = 1
    query_lengths: tuple[int, ...] | None = None
    shared_pages: int = 0
    q_heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    page_size: int = 16
    causal: bool = True
    scale: float | None = None
    window: int | None = None
    soft_cap: float | None = None
    sinks: bool = False


DECODE = [
    AttentionCase("paired"),
    AttentionCase("paired_unrotated", order=1),
    AttentionCase("paired_full_order", order=64),
    AttentionCase("paired_values_rotated", rotate_v=True),
    AttentionCase("split", "split"),
    AttentionCase("split_values_rotated", "split", order=64, rotate_v=True),
    AttentionCase("bf16", "bf16", order=1),
    AttentionCase("bf16_queries", dtype="bfloat16"),
    AttentionCase("mha", kv_heads=4),
    AttentionCase("mqa", kv_heads=1),
    AttentionCase("ragged", lengths=(0, 1, 15, 16, 17, 64, 50)),
    AttentionCase("all_empty", lengths=(0, 0)),
    AttentionCase("empty_with_sinks", lengths=(0, 20), sinks=True),
    AttentionCase("shared_pages", lengths=(40, 33, 55), shared_pages=2),
    AttentionCase("scale", scale=0.3),
    AttentionCase("soft_cap", soft_cap=1.5),
    AttentionCase("sinks", sinks=True),
    AttentionCase("window_below_page", window=5),
    AttentionCase("window_of_one", window=1),
    AttentionCase("window_above_page", window=20),
    AttentionCase("window_above_length", window=1000),
    AttentionCase("everything", "split", rotate_v=True, window=30, soft_cap=2.0, sinks=True),
    AttentionCase("head_dim_80", head_dim=80),
    AttentionCase("head_dim_96", "split", order=32, head_dim=96),
    AttentionCase("head_dim_112", head_dim=112),
    AttentionCase("head_dim_128", order=128, head_dim=128),
    AttentionCase("head_dim_128_split", "split", order=128, head_dim=128),
    AttentionCase("head_dim_256", order=256, head_dim=256),
    AttentionCase("small_pages", q_heads=8, kv_heads=4, head_dim=128, lengths=(200, 0, 17)),
    AttentionCase("page_of_32", q_heads=8, kv_heads=4, head_dim=128, page_size=32),
    AttentionCase("page_of_64", page_size=64, lengths=(64, 100, 3)),
    AttentionCase("page_of_128", "split", page_size=128, lengths=(128, 300, 127)),
    AttentionCase("block_borders", lengths=(511, 512, 513)),
    AttentionCase("several_blocks", "split", lengths=(1500, 40, 1024)),
    AttentionCase("several_blocks_bf16", "bf16", order=1, lengths=(1100, 700)),
    AttentionCase("window_in_last_block", lengths=(1500, 1400), window=100),
    AttentionCase("window_across_blocks", lengths=(1100, 0, 530), window=80),
    AttentionCase("context_32k", lengths=(32_000,), kv_heads=1, page_size=128),
]

PREFILL = [
    AttentionCase("verify_4", queries=4, lengths=(33, 4, 48)),
    AttentionCase("verify_4_split", "split", queries=4, lengths=(33, 4, 16), rotate_v=True),
    AttentionCase("verify_4_bf16", "bf16", order=1, queries=4, lengths=(33, 4, 48)),
    AttentionCase("chunk_7", queries=7, lengths=(7, 19, 32)),
    AttentionCase("chunk_16", queries=16, lengths=(16, 40, 21)),
    AttentionCase("chunk_16_mha_sinks", queries=16, lengths=(16, 40), kv_heads=4, sinks=True),
    AttentionCase("ragged_queries", queries=7, lengths=(3, 7, 20, 0), query_lengths=(3, 7, 2, 0)),
    AttentionCase(
        "ragged_queries_split", "split", queries=7, lengths=(3, 33, 20), query_lengths=(3, 7, 1)
    ),
    AttentionCase("not_causal", queries=7, lengths=(7, 40, 16), causal=False),
    AttentionCase(
        "not_causal_ragged",
        "split",
        queries=7,
        lengths=(3, 40, 0),
        query_lengths=(3, 5, 0),
        causal=False,
    ),
    AttentionCase("window_below_chunk", queries=16, lengths=(16, 60, 21), window=5),
    AttentionCase("window_above_chunk", queries=7, lengths=(7, 60, 21), window=20),
    AttentionCase(
        "window_ragged", queries=16, lengths=(12, 60, 0), query_lengths=(12, 9, 0), window=5
    ),
    AttentionCase("chunk_across_blocks", queries=16, lengths=(520, 1030, 16)),
    AttentionCase("chunk_window_across_blocks", queries=16, lengths=(520, 1030), window=12),
    AttentionCase("fewer_tokens_than_queries", queries=7, lengths=(3, 0, 20)),
    AttentionCase("chunk_shared_pages", queries=4, lengths=(36, 40), shared_pages=2),
    AttentionCase(
        "chunk_everything",
        "split",
        queries=7,
        lengths=(5, 40, 33),
        query_lengths=(5, 7, 2),
        window=11,
        soft_cap=2.0,
        sinks=True,
        rotate_v=True,
    ),
    AttentionCase("chunk_bf16_queries", queries=4, lengths=(33, 4), dtype="bfloat16"),
]

# What the lists above vary one at a time, varied together: every two values of head dimension,
# `rotate_v`, dtype and heads meet in a case, and so do every two of page size, lengths, window,
# soft cap, sinks, T, `query_lengths` and `causal`.
_RAGGED, _LONG, _SHORT = (0, 1, 15, 16, 17, 64, 50), (200, 0, 129), (33, 1, 48)
_COLUMNS = "head_dim order rotate_v dtype q_heads kv_heads page_size lengths window soft_cap sinks"
_COLUMNS += " scale queries query_lengths causal"
_SOME_OF_7, _SOME_OF_16 = (0, 1, 7, 0, 2, 7, 5), (0, 1, 9, 16, 2, 16, 0)
_ROWS = [
    (64, 16, False, "bfloat16", 4, 4, 16, _RAGGED, 20, None, True),
    (64, 16, True, "float32", 4, 2, 16, _LONG, 5, 2.0, True, 0.3),
    (64, 16, False, "bfloat16", 5, 1, 32, _RAGGED, 5, None, False, 0.3),
    (96, 32, True, "bfloat16", 4, 2, 128, _LONG, None, None, False),
    (96, 32, False, "float32", 5, 1, 32, _SHORT, None, 2.0, True, 0.3),
    (96, 32, False, "float32", 4, 4, 128, _RAGGED, 20, 2.0, True, 0.3),
    (128, 128, True, "bfloat16", 5, 1, 16, _SHORT, 5, None, False),
    (128, 128, False, "float32", 4, 2, 32, _LONG, 20, 2.0, False, 0.3),
    (128, 128, False, "bfloat16", 4, 4, 16, _SHORT, 20, 2.0, False),
    (256, 256, True, "float32", 4, 4, 128, _RAGGED, 5, 2.0, False),
    (256, 256, False, "bfloat16", 4, 2, 128, _SHORT, 20, 2.0, True, 0.3),
    (256, 256, False, "bfloat16", 5, 1, 16, _RAGGED, None, 2.0, True, 0.3),
    (64, 16, False, "float32", 4, 4, 64, _RAGGED, 5, 2.0, False, None, 4, (0, 1, 4, 2, 4, 3, 0)),
    (64, 16, True, "bfloat16", 4, 2, 16, _LONG, 5, 2.0, True, 0.3, 7, (7, 0, 3)),
    (64, 16, True, "bfloat16", 5, 1, 64, _LONG, None, 2.0, True, 0.3, 4, (1, 0, 4)),
    (96, 32, True, "bfloat16", 4, 4, 64, _LONG, None, 2.0, True, None, 16, (5, 0, 16), False),
    (96, 32, False, "float32", 4, 2, 16, _LONG, 5, None, False, 0.3, 16),
    (96, 32, True, "bfloat16", 5, 1, 16, _LONG, 20, None, True, None, 4, (4, 0, 2)),
    (128, 128, False, "bfloat16", 5, 1, 16, _LONG, 20, 2.0, False, 0.3, 7),
    (128, 128, True, "float32", 4, 2, 16, _RAGGED, None, 2.0, True, None, 4, None, False),
    (128, 128, False, "bfloat16", 4, 4, 16, _RAGGED, None, None, False, None, 16, _SOME_OF_16),
    (256, 256, False, "float32", 5, 1, 64, _RAGGED, 20, 2.0, True, None, 16),
    (256, 256, False, "bfloat16", 4, 2, 64, _RAGGED, None, None, False, None, 7, _SOME_OF_7, False),
    (256, 256, True, "bfloat16", 4, 4, 16, _RAGGED, None, 2.0, True, None, 4, None, False),
]
PAIRS = [
    AttentionCase(f"pairs_{i}", "split", **dict(zip(_COLUMNS.split(), row, strict=False)))
    for i, row in enumerate(_ROWS)
]

HELD_BY_PAIRS = {
    *("paired", "paired_unrotated", "paired_full_order", "paired_values_rotated", "split"),
    *("split_values_rotated", "bf16_queries", "mha", "mqa", "ragged", "empty_with_sinks", "scale"),
    *("soft_cap", "sinks", "everything", "window_below_page", "window_above_page"),
    *("window_above_length", "window_across_blocks", "head_dim_96", "head_dim_128"),
    *("head_dim_128_split", "head_dim_256", "page_of_64", "page_of_128", "several_blocks"),
    *("verify_4", "verify_4_split", "chunk_7", "chunk_16", "chunk_16_mha_sinks", "ragged_queries"),
    *("ragged_queries_split", "not_causal", "not_causal_ragged", "window_below_chunk"),
    *("window_above_chunk", "window_ragged", "chunk_window_across_blocks", "chunk_bf16_queries"),
    *("chunk_everything",),
}

# For kernels that take seconds to interpret or to compile: the pairs, and what they do not hold.
ATTENTION = PAIRS + [case for case in DECODE + PREFILL if case.name not in HELD_BY_PAIRS]

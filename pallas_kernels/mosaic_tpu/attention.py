"""`paged_attention` for TPU: online softmax over blocks of pages that are copied in ahead of use.

The grid walks over (sequence, tile of queries). An item of it reads its pages in blocks; while one
block is computed the next is copied, also across items, so that the memory never waits.

The codes stay integers. With x = code * scale + minimum for every token,

    q·k     = scale_k * (q·codes_k) + minimum_k * sum(q)
    sum p v = (p * scale_v)·codes_v + sum(p * minimum_v)

and the products with codes are int8 matrix products: q and p * scale_v are split into two int8
limbs each (15 bits, where a bfloat16 has 8), stacked as rows, which cost nothing while the rows
are few. bfloat16 pages go the same way with bfloat16 limbs. Where float8 is native and int8 is not,
codes are taken for float8 numbers: their bits are those of code / 512.

The rows of a few KV heads share one product: the heads' codes stand side by side, and a row of q is
zero outside its own head. So the rows fill the registers, whatever the group size.

A head_dim that is no multiple of the 128 lanes would be padded in memory; XLA therefore stores such
pages with the tokens in the lanes. The kernel takes them as they lie: [D, S] instead of [S, D].
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from pallas_kernels import page_format
from pallas_kernels.page_format import PageFormat, Pages

LANES, SUBLANES = 128, 8
SMALL_PAGES = (16, 32, 64)
BLOCK_TOKENS, BLOCK_PAGES = 2048, 32
BUFFER_BYTES = 8 << 20
MAX_ROWS = 512
MAX_SCORES = 1 << 19
MAX_TABLE = 1 << 17

# A masked score, and the maximum of none: finite, and exp(MASKED - EMPTY) is 0.
MASKED, EMPTY = -3e38, -1e30
TINY = 1e-30
HIGH_HALF = np.uint32(0xFFFF0000)
LOW_NIBBLES = np.uint32(0x0F0F0F0F)
# The largest number that is split into limbs.
LARGEST = {jnp.dtype(jnp.int8): 127 * 256, jnp.dtype(jnp.float8_e4m3fn): 256}
ROUND = 1.5 * 2**23  # added to a float32, it leaves the nearest integer in the low bits
FLOAT8_UNIT = 512  # the bits of a code, taken for a float8_e4m3, are code / FLOAT8_UNIT
FLOAT8_BITS = np.uint32(0xFFF00000)  # of a float32, as many as a float8 keeps
LOG2_E = math.log2(math.e)


class Sizes(NamedTuple):
    """The static sizes of a call.

    Attributes:
      tile: queries of one item of the grid.
      share: KV heads that share one matrix product; their number divides K.
      rows: rows of one product: share * tile * G, padded to whole registers.
      block: tokens copied in, and taken into the softmax, at once.
    """

    kv_heads: int
    group: int
    head_dim: int
    page_size: int
    num_pages: int
    max_pages: int
    tile: int
    share: int
    rows: int
    block: int

    @property
    def products(self) -> int:
        return self.kv_heads // self.share

    @property
    def used_rows(self) -> int:
        return self.share * self.tile * self.group

    @property
    def total_rows(self) -> int:
        return self.products * self.rows


def choose_sizes(queries: int, heads: int, pages: Pages, max_pages: int) -> Sizes:
    kv_heads = pages.kv_heads
    group = heads // kv_heads
    tile = max(1, min(queries, MAX_ROWS // heads))
    share = 1
    for n in range(2, kv_heads + 1):
        within = SUBLANES % n == 0 or kv_heads <= SUBLANES  # a register holds all that share
        if kv_heads % n == 0 and n * tile * group <= SUBLANES and within:
            share = n
    rows = -(-share * tile * group // SUBLANES) * SUBLANES
    token_bytes = pages.nbytes // (pages.layers * pages.num_pages * pages.page_size)
    unit = math.lcm(pages.page_size, LANES)
    most = min(
        BLOCK_TOKENS,
        BLOCK_PAGES * pages.page_size,
        BUFFER_BYTES // (2 * token_bytes),
        MAX_SCORES // (kv_heads // share * rows),
        max_pages * pages.page_size + unit - 1,
    )
    block = max(1, most // unit) * unit
    return Sizes(
        kv_heads,
        group,
        pages.head_dim,
        pages.page_size,
        pages.num_pages,
        max_pages,
        tile,
        share,
        rows,
        block,
    )


def paged_attention(
    q: Float[Array, "B T H D"],
    pages: Pages,
    page_table: Int[Array, "B max_pages"],
    lengths: Int[Array, "B"],
    *,
    layer: int | Int[Array, ""],
    query_lengths: Int[Array, "B"],
    causal: bool,
    scale: float,
    window: int | None,
    soft_cap: float | None,
    sinks: Float[Array, "H"] | None,
    interpret: Any = False,
    float8: bool | None = None,
    static_blocks: int | None = None,
) -> Float[Array, "B T H D"]:
    """See `pallas_kernels.paged_attention`; `interpret` is as of `pl.pallas_call`.

    `float8` is whether codes are multiplied as float8 numbers, not as int8; `None` asks the device.
    `static_blocks` is for the compiler's cycle estimates alone, which see no dynamic loop: every
    item reads this many whole blocks, whatever the lengths.
    """
    batch, queries, heads, head_dim = q.shape
    sizes = choose_sizes(queries, heads, pages, page_table.shape[1])
    dtype = q.dtype if q.dtype == jnp.bfloat16 else jnp.float32
    tiles = -(-queries // sizes.tile)
    padding = tiles * sizes.tile - queries
    q = jnp.pad(q.astype(dtype), ((0, 0), (0, padding), (0, 0), (0, 0)))
    query = np.arange(sizes.tile, dtype=np.int32).reshape(-1, 1, 1)

    whole = lambda shape: pl.BlockSpec(shape, lambda b, t, *_: (0,) * len(shape))  # noqa: E731
    per_item = pl.BlockSpec((1, 1, sizes.total_rows, head_dim), lambda b, t, *_: (b, t, 0, 0))
    operands = [(_to_rows(q, sizes), per_item)]
    column = whole((sizes.total_rows, 1))
    if sizes.tile > 1:
        query = np.broadcast_to(query, (sizes.tile, heads, 1))
        operands.append((_to_rows(query, sizes)[0], column))
    if sinks is not None:
        sinks = jnp.broadcast_to(sinks.astype(jnp.float32)[:, None], (sizes.tile, heads, 1))
        operands.append((_to_rows(sinks, sizes)[0], column))
    if pages.format.order > 1:
        operands.append((hadamard_signs(pages), whole((head_dim, head_dim))))
    in_place = pl.BlockSpec(memory_space=pltpu.HBM)
    data = pages.data.swapaxes(-1, -2) if tokens_last(pages) else pages.data
    operands.append((data.reshape(-1, *data.shape[2:]), in_place))  # layers one after another
    page_count = sizes.block // sizes.page_size
    buffers = [pltpu.VMEM((2, page_count, *data.shape[2:]), data.dtype)]
    limb = jnp.bfloat16
    if float8 is None:
        float8 = float8_keeps_codes()
    if pages.scales is not None:
        operands.append((pages.scales.reshape(-1, *pages.scales.shape[2:]), in_place))
        buffers.append(pltpu.VMEM((2, page_count, *pages.scales.shape[2:]), jnp.uint32))
        limb = jnp.float8_e4m3fn if float8 else jnp.int8
    limb_rows = jax.eval_shape(lambda x: _split(x, limb), jnp.zeros((sizes.rows, 1))).shape[0]

    inputs, in_specs = zip(*operands, strict=True)
    out = pl.pallas_call(
        functools.partial(
            _kernel,
            sizes=sizes,
            format=pages.format,
            tokens_last=tokens_last(pages),
            causal=causal,
            scale=scale,
            window=window,
            soft_cap=soft_cap,
            with_sinks=sinks is not None,
            static_blocks=static_blocks,
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(batch, tiles),
            in_specs=in_specs,
            out_specs=per_item,
            scratch_shapes=[
                pltpu.VMEM((sizes.products, limb_rows, sizes.share * head_dim), limb),
                pltpu.SMEM((1,), jnp.int32),
                pltpu.SemaphoreType.DMA((2,)),
                *buffers,
            ],
        ),
        out_shape=jax.ShapeDtypeStruct((batch, tiles, sizes.total_rows, head_dim), dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary", "arbitrary"), disable_bounds_checks=True
        ),
        name=f"paged_attention_{pages.format.layout}",
        interpret=interpret,
    )(
        jnp.asarray(layer, jnp.int32).reshape(1),
        lengths,
        query_lengths,
        page_table.reshape(-1),
        *inputs,
    )
    return _from_rows(out, sizes)[:, :queries]


def supported(
    q: Float[Array, "B T H D"], pages: Pages, page_table: Int[Array, "B max_pages"]
) -> str | None:
    """Why this implementation cannot run, or `None`. Where it runs is not its question."""
    if page_table.size > MAX_TABLE:
        return f"Expected {page_table.size=} to be at most {MAX_TABLE}: the table is in SMEM"
    return pages_supported(pages)


def pages_supported(pages: Pages) -> str | None:
    """Why these kernels cannot take the pages, or `None`. True of writing and of attention."""
    if pages.format.layout == "split":
        return f"Expected {pages.format.layout=} to be 'paired' or 'bf16'"
    # XLA lays other pages out with P in the lanes: every call would copy them all.
    if pages.page_size % LANES:
        if pages.page_size not in SMALL_PAGES:
            return f"Expected {pages.page_size=} to be a multiple of {LANES} or in {SMALL_PAGES}"
        if pages.head_dim % LANES:
            return f"Expected {pages.page_size=} to be a multiple of {LANES} with {pages.head_dim=}"
        if pages.scales is not None and not page_format.is_folded(pages.scales):
            return (
                f"Expected {pages.kv_heads=} to be a multiple of {64 // pages.page_size} "
                f"with {pages.page_size=}"
            )
    if pages.head_dim % SUBLANES:
        return f"Expected {pages.head_dim=} to be a multiple of {SUBLANES}"
    return None


@functools.cache
def float8_keeps_codes() -> bool:
    """Whether this device multiplies float8 natively, subnormals kept, as codes need it.

    What tpu7x does with subnormals is not documented: it is asked, once.
    """
    device = jax.local_devices()[0]
    if device.platform != "tpu" or not device.device_kind.startswith("TPU7"):
        return False
    with jax.ensure_compile_time_eval():
        return codes_survive_float8()


def codes_survive_float8(interpret: Any = False) -> bool:
    """Whether products of codes as float8 numbers are what they are of integers."""

    def kernel(codes_ref, out_ref):
        codes = pltpu.bitcast(codes_ref[...], jnp.float8_e4m3fn)
        dimensions = (((1,), (1,)), ((), ()))
        out_ref[...] = lax.dot_general(codes, codes, dimensions, preferred_element_type=jnp.float32)

    codes = np.random.default_rng(0).integers(0, 16, (LANES, LANES))
    out = pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct(codes.shape, jnp.float32),
        interpret=interpret,
    )(jnp.asarray(codes, jnp.uint8))
    return bool((np.asarray(out) * FLOAT8_UNIT**2 == codes @ codes.T).all())


def tokens_last(pages: Pages) -> bool:
    """Whether XLA keeps the pages as [D, S], which pads nothing."""
    return pages.head_dim % LANES != 0


def hadamard_signs(pages: Pages) -> Array:
    """±1 `bfloat16[D, D]`: the block-diagonal Hadamard matrix times sqrt(order)."""
    order = pages.format.order
    block = np.sign(page_format.hadamard(order))
    return jnp.asarray(np.kron(np.eye(pages.head_dim // order), block), jnp.bfloat16)


def _to_rows(x: Array | np.ndarray, sizes: Sizes) -> Array:
    """[..., tiles * tile, H, n] → [..., tiles, rows of all products, n]."""
    *lead, queries, _, width = x.shape
    tiles = queries // sizes.tile
    x = x.reshape(*lead, tiles, sizes.tile, sizes.kv_heads, sizes.group, width).swapaxes(-4, -3)
    x = x.reshape(*lead, tiles, sizes.products, sizes.used_rows, width)
    unused = sizes.rows - sizes.used_rows
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, unused), (0, 0)])
    return x.reshape(*lead, tiles, sizes.total_rows, width)


def _from_rows(x: Array, sizes: Sizes) -> Array:
    """The inverse of `_to_rows`."""
    batch, tiles, _, width = x.shape
    x = x.reshape(batch, tiles, sizes.products, sizes.rows, width)[:, :, :, : sizes.used_rows]
    x = x.reshape(batch, tiles, sizes.kv_heads, sizes.tile, sizes.group, width).swapaxes(2, 3)
    return x.reshape(batch, tiles * sizes.tile, sizes.kv_heads * sizes.group, width)


# --- In the kernel --------------------------------------------------------------------------


def _kernel(
    layer_ref,
    lengths_ref,
    query_lengths_ref,
    table_ref,
    q_ref,
    *refs,
    sizes: Sizes,
    format: PageFormat,
    tokens_last: bool,
    causal: bool,
    scale: float,
    window: int | None,
    soft_cap: float | None,
    with_sinks: bool,
    static_blocks: int | None,
):
    quantized = format.layout != "bf16"
    rest = iter(refs)
    query_ref = next(rest) if sizes.tile > 1 else None
    sinks_ref = next(rest) if with_sinks else None
    signs_ref = next(rest) if format.order > 1 else None
    pages_hbm = [next(rest) for _ in range(1 + quantized)]  # data and scales
    out_ref, q_limbs, slot_ref, semaphores, *pages_vmem = rest

    limb = q_limbs.dtype
    largest = LARGEST.get(limb, 1)
    code_unit = FLOAT8_UNIT if limb == jnp.float8_e4m3fn else 1

    page_size, head_dim, rows, share = sizes.page_size, sizes.head_dim, sizes.rows, sizes.share
    tiles = pl.num_programs(1)
    items = pl.num_programs(0) * tiles
    item = pl.program_id(0) * tiles + pl.program_id(1)
    block_pages = sizes.block // page_size
    layer_start = layer_ref[0] * sizes.num_pages

    # --- Which pages an item reads

    def visible(item):
        """First and last token that any query of an item sees, and the first query's position."""
        b, t = lax.div(item, tiles), lax.rem(item, tiles)
        length, real = lengths_ref[b], query_lengths_ref[b]
        begin = t * sizes.tile
        position = length - real + begin
        last = length - 1
        if causal:
            last = jnp.minimum(last, position + sizes.tile - 1)
        last = jnp.where(begin < real, jnp.maximum(last, -1), -1)
        first = 0 if window is None else jnp.maximum(position - window + 1, 0)
        return first, last, position

    def page_span(item):
        first, last, _ = visible(item)
        return lax.div(first, page_size), lax.div(last + page_size, page_size)

    def num_blocks(item):
        if static_blocks is not None:
            return static_blocks
        first, end = page_span(item)
        return lax.div(jnp.maximum(end - first, 0) + block_pages - 1, block_pages)

    def next_item(item):
        """The first item from this one on that reads anything."""
        if static_blocks is not None:
            return item
        return lax.while_loop(
            lambda i: (i < items) & (num_blocks(jnp.minimum(i, items - 1)) == 0),
            lambda i: i + 1,
            item,
        )

    def copies(item, block, slot, act):
        """Starts or awaits the copies of a block's pages."""
        first, end = page_span(item)
        first = first + block * block_pages
        count = jnp.minimum(end - first, block_pages)
        if static_blocks is not None:
            first, count = block * block_pages, jnp.int32(block_pages)

        start_entry = lax.div(item, tiles) * sizes.max_pages + first

        def page(j, _=None):
            page_id = layer_start + table_ref[start_entry + j]
            for hbm, vmem in zip(pages_hbm, pages_vmem, strict=True):
                source = hbm.at[page_id]
                act(pltpu.make_async_copy(source, vmem.at[slot, j], semaphores.at[slot]))

        @pl.when(count == block_pages)
        def _():
            for j in range(block_pages):
                page(j)

        @pl.when(count < block_pages)
        def _():
            lax.fori_loop(0, count, page, None)

    start = functools.partial(copies, act=lambda copy: copy.start())
    wait = functools.partial(copies, act=lambda copy: copy.wait())

    @pl.when(item == 0)
    def _():
        slot_ref[0] = 0
        first_item = next_item(0)

        @pl.when(first_item < items)
        def _():
            start(first_item, 0, 0)

    # --- The queries

    q = q_ref[0, 0].astype(jnp.float32)
    if signs_ref is not None:
        q = _times_signs(q, signs_ref[...]) * format.order**-0.5
    q = q * (scale * LOG2_E)
    q_sum = q.sum(-1, keepdims=True)
    q_unit = jnp.ones_like(q_sum)
    if quantized:
        q_unit = jnp.maximum(jnp.abs(q).max(-1, keepdims=True), TINY) * (1 / largest)
        q = q / q_unit
        q_unit = q_unit * code_unit
    row = lax.broadcasted_iota(jnp.int32, (rows, head_dim), 0)
    head_rows = sizes.tile * sizes.group
    for g in range(sizes.products):
        part = q[g * rows : (g + 1) * rows]
        for h in range(share):
            own = part
            if share > 1:
                own = jnp.where((row >= h * head_rows) & (row < (h + 1) * head_rows), part, 0)
            columns = slice(h * head_dim, (h + 1) * head_dim)
            q_limbs[g, :, columns] = _split(own, limb)

    column = (sizes.total_rows, 1)
    first, last, position = visible(item)
    limit = last + 1  # past it nothing was copied
    query = jnp.zeros(column, jnp.int32) if query_ref is None else query_ref[...]
    row_position = position + query
    row_last = row_position if causal else jnp.full_like(row_position, limit - 1)
    real = query_lengths_ref[pl.program_id(0)] - pl.program_id(1) * sizes.tile
    row_last = jnp.where(query < real, row_last, -1)
    first_token = lax.div(first, page_size) * page_size

    # --- Blocks of tokens

    def per_row(x):
        """[K, n] → [rows, n]: what belongs to the KV head of each row."""
        shape = (rows, x.shape[1])
        if share == 1:
            return jnp.concatenate([jnp.broadcast_to(row, shape) for row in jnp.split(x, len(x))])
        row = lax.broadcasted_iota(jnp.int32, shape, 0)
        head = sum((row >= h * head_rows).astype(jnp.int32) for h in range(1, share))
        products = []
        for g in range(sizes.products):
            first = g * share // SUBLANES * SUBLANES
            heads = x[first : first + SUBLANES]
            if len(heads) < SUBLANES:
                heads = jnp.concatenate(
                    [heads, jnp.zeros_like(x, shape=(SUBLANES - len(heads), x.shape[1]))]
                )
            products.append(
                jnp.take_along_axis(heads, head + (g * share - first), 0, mode="promise_in_bounds")
            )
        return jnp.concatenate(products, 0)

    def load_head(slot, h):
        """A KV head's data of a block."""
        data = [pages_vmem[0][slot, j, h] for j in range(block_pages)]
        return jnp.concatenate(data, -1 if tokens_last else -2)

    def load(slot, g):
        """Keys and values of the heads of product g, side by side."""
        heads = range(g * share, (g + 1) * share)
        keys, values = zip(*[_unpack(load_head(slot, h), limb) for h in heads], strict=True)
        axis = 0 if tokens_last else 1
        return jnp.concatenate(keys, axis), jnp.concatenate(values, axis)

    def load_scales(slot, kind):
        """Words of a block's keys (0) or values (1), [K, tokens]."""
        words = pages_vmem[1]
        if words.shape[2] == 2:
            return jnp.concatenate([words[slot, j, kind] for j in range(block_pages)], 1)
        share = 64 // page_size  # heads in a row of folded scales
        runs = []
        for i in range(share):
            lanes = pl.ds((kind * share + i) * page_size, page_size)
            pages = [words[slot, j, 0, :, lanes] for j in range(block_pages)]
            runs.append(jnp.concatenate(pages, 1))
        if share == 1:
            return runs[0]
        heads = range(sizes.kv_heads)
        return jnp.concatenate([runs[h % share][h // share : h // share + 1] for h in heads], 0)

    def product(limbs, codes, axis):
        dtype = jnp.int32 if limb == jnp.int8 else jnp.float32
        dimensions = (((1,), (axis,)), ((), ()))
        out = lax.dot_general(limbs, codes, dimensions, preferred_element_type=dtype)
        return _join(out, rows, limb)

    token_axis = 1 if tokens_last else 0
    block_count = num_blocks(item)
    slot_at_start = slot_ref[0]
    following = next_item(item + 1)

    def accumulate(block, carry):
        running_max, total, acc = carry
        slot = lax.rem(slot_at_start + block, 2)
        more = block + 1 < block_count
        then, then_block = jnp.where(more, item, following), jnp.where(more, block + 1, 0)

        @pl.when(then < items)
        def _():
            start(then, then_block, 1 - slot)

        wait(item, block, slot)

        base = first_token + block * sizes.block
        tokens = base + lax.broadcasted_iota(jnp.int32, (1, sizes.block), 1)
        keys, values = zip(*[load(slot, g) for g in range(sizes.products)], strict=True)
        scores = jnp.concatenate(
            [product(q_limbs[g], k, 1 - token_axis) for g, k in enumerate(keys)], 0
        )
        if quantized:
            k_scale, k_minimum = page_format.split_scales(load_scales(slot, 0))
            scores = scores * q_unit * per_row(k_scale) + q_sum * per_row(k_minimum)
        if soft_cap is not None:
            cap = soft_cap * LOG2_E
            scores = cap * jnp.tanh(scores * (1 / cap))
        seen = tokens <= row_last
        if window is not None:
            seen &= tokens > row_position - window
        scores = jnp.where(seen, scores, MASKED)

        new_max = jnp.maximum(running_max, scores.max(-1, keepdims=True))
        decay = jnp.exp2(running_max - new_max)
        weights = jnp.exp2(scores - new_max)
        total = total * decay + weights.sum(-1, keepdims=True)
        acc = acc * decay
        if quantized:
            words = load_scales(slot, 1)
            words = jnp.where(tokens < limit, words, np.uint32(0))  # 0 * NaN is NaN
            v_scale, v_minimum = page_format.split_scales(words)
            acc += (weights * per_row(v_minimum)).sum(-1, keepdims=True)
            unit = jnp.maximum(v_scale.max(-1, keepdims=True), TINY) * (1 / largest)
            weights = weights * per_row(v_scale / unit)
        else:
            values = tuple(_zero_from(v, tokens, limit, tokens_last) for v in values)
        outs = [
            product(_split(weights[g * rows : (g + 1) * rows], limb), v, token_axis)
            for g, v in enumerate(values)
        ]
        out = jnp.concatenate(outs, 0)
        if quantized:
            out *= per_row(jnp.broadcast_to(unit * code_unit, (sizes.kv_heads, LANES)))[:, :1]
        acc += out
        return new_max, total, acc

    running_max, total = jnp.full(column, EMPTY), jnp.zeros(column)
    if sinks_ref is not None:  # a sink is a key with this score and no value
        sinks = sinks_ref[...] * LOG2_E
        running_max = jnp.maximum(sinks, EMPTY)
        total = jnp.exp2(sinks - running_max)
    acc = jnp.zeros((sizes.total_rows, share * head_dim))
    _, total, acc = lax.fori_loop(0, block_count, accumulate, (running_max, total, acc))
    slot_ref[0] = lax.rem(slot_at_start + block_count, 2)

    outs = []
    for g in range(sizes.products):
        part = acc[g * rows : (g + 1) * rows]
        out = part[:, :head_dim]
        for h in range(1, share):
            here = part[:, h * head_dim : (h + 1) * head_dim]
            out = jnp.where(row < h * head_rows, out, here)
        outs.append(out)
    out = jnp.concatenate(outs, 0) / jnp.where(total == 0, 1, total)
    if format.value_order > 1 and signs_ref is not None:
        out = _times_signs(out, signs_ref[...]) * format.order**-0.5
    out_ref[0, 0] = out.astype(out_ref.dtype)


def _cut(x: Array, mask: np.uint32) -> Array:
    """A float32 cut to fewer bits. Not by a cast there and back, which may be removed."""
    return lax.bitcast_convert_type(lax.bitcast_convert_type(x, jnp.uint32) & mask, jnp.float32)


def _times_signs(x: Array, signs: Array) -> Array:
    """x @ signs with x to 16 bits: two exact products."""
    high = _cut(x, HIGH_HALF)
    dot = functools.partial(jnp.dot, preferred_element_type=jnp.float32)
    return dot(high.astype(jnp.bfloat16), signs) + dot((x - high).astype(jnp.bfloat16), signs)


def _split(x: Array, dtype) -> Array:
    """float32 [n, m] → its limbs, one below the other. But for bfloat16, |x| is LARGEST at most."""
    if dtype == jnp.int8:
        low = lax.bitcast_convert_type(x + ROUND, jnp.int32)
        high = lax.bitcast_convert_type(x + (ROUND + 128), jnp.int32) >> 8
        return jnp.concatenate([high, low], 0).astype(jnp.int8)  # the lowest byte of each
    if dtype == jnp.float8_e4m3fn:
        high = _cut(x, FLOAT8_BITS)
        middle = _cut(x - high, FLOAT8_BITS)
        limbs = [high, middle, x - high - middle]
        if padding := -3 * len(x) % 32:  # to whole registers
            limbs.append(jnp.zeros((padding, x.shape[1])))
        return jnp.concatenate(limbs, 0).astype(dtype)
    high = _cut(x, HIGH_HALF)
    return jnp.concatenate([high, x - high], 0).astype(jnp.bfloat16)


def _join(product: Array, n: int, dtype) -> Array:
    """The product of a split operand of n rows, in float32."""
    high, low = product[:n], product[n : 2 * n]
    if dtype == jnp.int8:
        return ((high << 8) + low).astype(jnp.float32)
    if dtype == jnp.float8_e4m3fn:
        return high + low + product[2 * n : 3 * n]
    return high + low


def _unpack(x: Array, dtype) -> tuple[Array, Array]:
    """Keys and values: codes of `uint8 [n, m]` as `dtype`, or bfloat16 of `uint16 [2, n, m]`."""
    if x.dtype == jnp.uint16:
        return pltpu.bitcast(x[0], jnp.bfloat16), pltpu.bitcast(x[1], jnp.bfloat16)
    words = pltpu.bitcast(x, jnp.uint32)
    nibbles = words & LOW_NIBBLES, (words >> np.uint32(4)) & LOW_NIBBLES
    return pltpu.bitcast(nibbles[0], dtype), pltpu.bitcast(nibbles[1], dtype)


def _zero_from(values: Array, tokens: Array, limit: Array, tokens_last: bool) -> Array:
    """bfloat16 values with those of tokens from `limit` on set to zero: 0 * NaN is NaN."""
    words = pltpu.bitcast(values, jnp.uint32)  # two rows in a word
    if tokens_last:
        keep = jnp.broadcast_to(tokens < limit, words.shape)
        return pltpu.bitcast(jnp.where(keep, words, np.uint32(0)), jnp.bfloat16)
    token = tokens[:, :1] + 2 * lax.broadcasted_iota(jnp.int32, words.shape, 0)
    words = jnp.where(token < limit, words, np.uint32(0))
    words = jnp.where(token + 1 < limit, words, words & np.uint32(0xFFFF))
    return pltpu.bitcast(words, jnp.bfloat16)

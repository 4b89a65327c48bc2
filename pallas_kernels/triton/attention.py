"""`paged_attention` in Pallas Triton, for any NVIDIA GPU: the launch of one of two kernels.

`decode` takes few query rows, `prefill` many.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float, Int

from pallas_kernels.page_format import Pages
from pallas_kernels.triton import decode, prefill
from pallas_kernels.triton.join import join_splits
from pallas_kernels.triton.work import output_shapes

Blocks = decode.Blocks | prefill.Blocks


def supported(
    q: Float[Array, "B T H D"], pages: Pages, page_table: Int[Array, "B max_pages"]
) -> str | None:
    """Why this implementation cannot run, or `None`. Where it runs is not its question."""
    if pages.format.layout == "paired":
        return "Expected the layout to be 'split' or 'bf16', got 'paired'"
    if q.dtype.itemsize > 4:
        return f"Expected {q.dtype=} to be of at most 32 bits"
    if pages.head_dim > 256:
        return f"Expected {pages.head_dim=} to be at most 256"
    return None


def default_blocks(pages: Pages, rows: int) -> Blocks:
    """The device's own for so many query rows of a sequence and KV head."""
    blocks = decode.default_blocks(pages, rows)
    return blocks if rows <= blocks.rows else prefill.default_blocks(pages)


# The layer is an operand: a model's layers are one function, traced and lowered once.
@functools.partial(
    jax.jit, static_argnames=("causal", "scale", "window", "soft_cap", "blocks", "interpret")
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
    blocks: Blocks | None = None,
    interpret: bool = False,
) -> Float[Array, "B T H D"]:
    """See `pallas_kernels.paged_attention`. Beyond its arguments:

    `blocks` says how to cut the work, and which kernel does it; `None` is the device's default for
    this shape.
    `interpret` runs it as plain `jnp` on any device.
    """
    if blocks is None:
        blocks = default_blocks(pages, q.shape[1] * q.shape[2] // pages.kv_heads)
    capacity = page_table.shape[1] * pages.page_size
    if isinstance(blocks, prefill.Blocks):
        name, plan = "prefill_attention", prefill.plan(blocks, q, pages, capacity)
    else:
        name, plan = "decode_attention", decode.plan(blocks, q, pages)
    arrays = dict(
        q=q,
        data=pages.data
        if pages.scales is not None
        else lax.bitcast_convert_type(pages.data, jnp.bfloat16),  # no copy: another type's name
        page_table=page_table,
        lengths=lengths,
        query_lengths=query_lengths,
        layer=jnp.asarray(layer, jnp.int32).reshape(1),
        scales=pages.scales,
        sinks=sinks,
        signs=None if plan.signs is None else jnp.asarray(plan.signs),
    )
    arrays = {name: x for name, x in arrays.items() if x is not None}

    def kernel(*refs):
        plan.kernel(
            **dict(zip(arrays, refs, strict=False)),
            outputs=refs[len(arrays) :],
            order=pages.format.order,
            value_order=pages.format.value_order,
            causal=causal,
            scale=scale,
            window=window,
            soft_cap=soft_cap,
            gpu=not interpret,
        )

    out_shape = output_shapes(q, plan.slots)
    outputs = pl.pallas_call(
        kernel,
        grid=plan.grid,
        out_shape=out_shape,
        in_specs=[pl.BlockSpec(memory_space=pl.ANY)] * len(arrays),
        out_specs=[pl.BlockSpec(memory_space=pl.ANY)] * len(out_shape),
        compiler_params=plt.CompilerParams(num_warps=plan.num_warps, num_stages=blocks.num_stages),
        interpret=interpret,
        name=name,
    )(*arrays.values())
    return (
        join_splits(*outputs, chunk=plan.chunk, interpret=interpret) if plan.slots else outputs[0]
    )

"""Joins what the splits of a context came to: a launch of its own, after either kernel."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float, Int

from pallas_kernels.triton.arithmetic import MASKED, exp2, padded


def join_splits(
    out: Float[Array, "B T H D"],
    means: Float[Array, "slots T H D"],
    log_totals: Float[Array, "slots T H"],
    places: Int[Array, "B 2"],
    *,
    chunk: int,
    interpret: bool,
) -> Float[Array, "B T H D"]:
    """Fills in all sequences but those of one split: means weighted by 2**log_totals, all finite.

    A sequence of no splits becomes zeros. `chunk` of them are taken at a time.
    """
    batch, head_dim = out.shape[0], out.shape[-1]
    rows = math.prod(out.shape[1:-1])
    # Few rows: several programs share the channels of one. Many, most of which have nothing to
    # join: a program looks after several.
    columns = padded(head_dim) if batch * rows > 512 else 32
    rows_each = 4 if rows % 4 == 0 and batch * rows > 2048 else 1
    return pl.pallas_call(
        functools.partial(
            _join, columns=columns, chunk=chunk, rows_each=rows_each, gpu=not interpret
        ),
        grid=(rows // rows_each, batch, pl.cdiv(head_dim, columns)),
        out_shape=jax.ShapeDtypeStruct((batch, rows, head_dim), out.dtype),
        in_specs=[pl.BlockSpec(memory_space=pl.ANY)] * 4,
        out_specs=pl.BlockSpec(memory_space=pl.ANY),
        input_output_aliases={3: 0},
        compiler_params=plt.CompilerParams(
            num_warps=4 if chunk * columns > 1024 else 1, num_stages=1
        ),
        interpret=interpret,
        name="join_splits",
    )(
        places,
        means.reshape(-1, rows, head_dim),
        log_totals.reshape(-1, rows),
        out.reshape(batch, rows, head_dim),
    ).reshape(out.shape)


def _join(places, *arrays, rows_each: int, **arguments):
    row, batch, part = (pl.program_id(i) for i in range(3))  # read here: `when` may not
    first, splits = places[batch, 0], places[batch, 1]

    def join():
        for i in range(rows_each):
            _join_row(row * rows_each + i, batch, part, first, splits, *arrays, **arguments)

    pl.when(splits != 1)(join)


def _join_row(
    row,
    batch,
    part,
    first,
    splits,
    means,
    log_totals,
    _,
    out,
    *,
    columns: int,
    chunk: int,
    gpu: bool,
):
    column = part * columns + jnp.arange(columns)
    inside = column < out.shape[2]

    def add(i, carry):
        largest, total, acc = carry
        index = i * chunk + jnp.arange(chunk)
        log_total = plt.load(log_totals.at[first + index, row], mask=index < splits, other=MASKED)
        mean = plt.load(
            means.at[first + index[:, None], row, column[None, :]],
            mask=(index < splits)[:, None] & inside[None, :],
            other=0,
        )
        new = jnp.maximum(largest, jnp.max(log_total))
        weight = jnp.where(log_total > MASKED, exp2(log_total - new, gpu), 0)
        decay = jnp.exp2(largest - new)
        total = total * decay + jnp.sum(weight)
        return new, total, acc * decay + jnp.sum(mean * weight[:, None], axis=0)

    carry = jnp.float32(MASKED), jnp.float32(0), jnp.zeros((columns,), jnp.float32)
    _, total, acc = lax.fori_loop(0, pl.cdiv(splits, chunk), add, carry)
    mean = acc / jnp.where(total > 0, total, 1)
    plt.store(out.at[batch, row, column], mean.astype(out.dtype), mask=inside)

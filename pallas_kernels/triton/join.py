"""Joins what the splits of a context made of it: a launch of its own, after prefill."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float

from pallas_kernels.triton.arithmetic import MASKED, exp2, padded


def join_splits(
    partial: Float[Array, "B T H splits D"],
    log_totals: Float[Array, "B T H splits"],
    dtype,
    interpret: bool,
) -> Float[Array, "B T H D"]:
    """The mean of the splits' outputs, weighted by 2**log_totals. Every split's mean is finite."""
    *lead, splits, head_dim = partial.shape
    rows = math.prod(lead)
    # Few rows: several programs share the channels of one.
    columns = padded(head_dim) if rows > 512 else 32
    parts = pl.cdiv(head_dim, columns)
    out = pl.pallas_call(
        functools.partial(_join, columns=columns, gpu=not interpret),
        grid=(rows, parts),
        out_shape=jax.ShapeDtypeStruct((rows, head_dim), dtype),
        in_specs=[pl.BlockSpec(memory_space=pl.ANY)] * 2,
        out_specs=pl.BlockSpec(memory_space=pl.ANY),
        compiler_params=plt.CompilerParams(
            num_warps=4 if splits * columns >= 1024 else 1, num_stages=1
        ),
        interpret=interpret,
        name="join_splits",
    )(partial.reshape(rows, splits, head_dim), log_totals.reshape(rows, splits))
    return out.reshape(*lead, head_dim)


def _join(partial, log_totals, out, *, columns: int, gpu: bool):
    _, splits, head_dim = partial.shape
    row = pl.program_id(0)
    column = pl.program_id(1) * columns + jnp.arange(columns)
    split = jnp.arange(1 << (splits - 1).bit_length())
    log_total = plt.load(log_totals.at[row, split], mask=split < splits, other=MASKED)
    weight = exp2(log_total - jnp.max(log_total), gpu)
    weight = jnp.where(log_total > MASKED, weight, 0)
    mean = plt.load(
        partial.at[row, split[:, None], column[None, :]],
        mask=(split < splits)[:, None] & (column < head_dim)[None, :],
        other=0,
    )
    total = jnp.sum(weight)
    mean = jnp.sum(mean * weight[:, None], axis=0) / jnp.where(total > 0, total, 1)
    plt.store(out.at[row, column], mean.astype(out.dtype), mask=column < head_dim)

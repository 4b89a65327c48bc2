"""A decode step's matrix products, and the look-up before them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

ROWS = 8


def dot_general(
    lhs: Float[Array, "*rows E"], rhs: Float[Array, "E F"], dimension_numbers: Any, **options: Any
) -> Float[Array, "*rows F"]:
    """`lax.dot_general`, for a `Dense`; on a GPU a single row is computed eight times.

    XLA cuts a product of eight rows along E, over the whole chip, and one of a single row along F
    alone: too few blocks to read the weights at the memory's rate. The rows are not stored: what
    sums the parts reads one.
    """
    if lhs.size == lhs.shape[-1] and lhs.ndim > 1 and jax.default_backend() == "gpu":
        rows = jnp.broadcast_to(lhs, (ROWS, *lhs.shape[1:]))
        return lax.dot_general(rows, rhs, dimension_numbers, **options)[:1]
    return lax.dot_general(lhs, rhs, dimension_numbers, **options)


def look_up(embed: Callable[..., Any], tokens: Int[Array, "B T"]) -> Float[Array, "B T E"]:
    """`embed(tokens)`; a single token is looked up twice.

    To XLA on a GPU a single row is a slice, and to slice a table that is split over devices it
    gathers all of it. Of several rows each device looks up those that it has.
    """
    if tokens.size == 1:
        return embed(jnp.broadcast_to(tokens, (2, 1)))[:1]
    return embed(tokens)

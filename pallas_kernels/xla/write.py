"""`write_kv` for any device: encode the tokens, scatter the rows."""

from __future__ import annotations

from jaxtyping import Array, Float, Int

from pallas_kernels import page_format
from pallas_kernels.page_format import Pages


def write_kv(
    pages: Pages,
    k: Float[Array, "n K D"],
    v: Float[Array, "n K D"],
    slots: Int[Array, "n"],
    *,
    layer: int | Int[Array, ""],
) -> Pages:
    rows, scales = page_format.encode(k, v, pages.format)
    return page_format.put(pages, layer, slots, rows, scales)

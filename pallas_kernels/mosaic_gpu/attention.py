"""`paged_attention` in Pallas Mosaic GPU, for Hopper: which of the two kernels runs.

`decode` takes few query rows over INT4 pages, `prefill` any number of them over any pages.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

import jax
from jaxtyping import Array, Float, Int

from pallas_kernels.mosaic_gpu import decode, prefill
from pallas_kernels.page_format import Pages


def supported(
    q: Float[Array, "B T H D"], pages: Pages, page_table: Int[Array, "B max_pages"]
) -> str | None:
    """Why this implementation cannot run, or `None`."""
    del page_table
    capability = getattr(jax.devices()[0], "compute_capability", "9.0")
    if capability.split(".")[0] != "9":  # `wgmma` came with Hopper and went with it
        return f"Expected compute {capability=} to be 9.0"
    return None if decode.supported(q, pages) is None else prefill.supported(q, pages)


def beats_others(
    q: Float[Array, "B T H D"], pages: Pages, page_table: Int[Array, "B max_pages"]
) -> bool:
    """Whether it is faster than the Triton kernel, as measured on an H200: see NOTES.md."""
    rows = q.shape[1] * (q.shape[2] // pages.kv_heads)
    crowded = rows in (2, 3)  # just too many registers for four programs on a multiprocessor
    return supported(q, pages, page_table) is None and kernel(q, pages) is decode and not crowded


def kernel(q: Float[Array, "B T H D"], pages: Pages) -> ModuleType:
    """The module whose `paged_attention` runs."""
    return decode if decode.supported(q, pages) is None else prefill


# The layer is an operand: a model's layers are one function, traced and lowered once.
@functools.partial(
    jax.jit, static_argnames=("causal", "scale", "window", "soft_cap", "blocks", "interpret")
)
def paged_attention(
    q: Float[Array, "B T H D"], pages: Pages, *args: Any, **options: Any
) -> Float[Array, "B T H D"]:
    """See `pallas_kernels.paged_attention`, and the two modules for what else they take."""
    return kernel(q, pages).paged_attention(q, pages, *args, **options)

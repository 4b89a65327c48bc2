"""Which implementation of an operation runs: the device's kernel where it can, else XLA."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any, Literal, get_args

import jax

Implementation = Literal["xla", "triton", "mosaic_tpu"]

# Kernels by the platform they run on, best first.
KERNELS: dict[str, tuple[Implementation, ...]] = {"gpu": ("triton",), "tpu": ("mosaic_tpu",)}


def choose(
    operation: Literal["write_kv", "paged_attention"],
    implementation: Implementation | None,
    *operands: Any,
) -> Callable[..., Any]:
    """The function to run.

    Args:
      operation: its name.
      implementation: `None` picks the best of the default device that takes the operands. A named
        one may be traced anywhere: the program may be compiled for another device than this one's.
      *operands: what a kernel's own `supported` looks at.

    Raises:
      NotImplementedError: the named implementation cannot run here; the message says why.
    """
    kernels = KERNELS.get(jax.default_backend(), ())
    if implementation is None:
        able = (k for k in kernels if _module(k, operation).supported(*operands) is None)
        return getattr(_module(next(able, "xla"), operation), operation)
    if implementation not in get_args(Implementation):
        names = get_args(Implementation)
        raise NotImplementedError(f"Expected {implementation=} to be one of {names}")
    traced = any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(operands))
    if implementation not in ("xla", *kernels) and not traced:
        device = jax.devices()[0].device_kind
        raise NotImplementedError(
            f"Expected {implementation=} to run on its device, not a {device}"
        )
    if implementation != "xla":
        reason = _module(implementation, operation).supported(*operands)
        if reason is not None:
            raise NotImplementedError(f"{reason} for {implementation=}")
    return getattr(_module(implementation, operation), operation)


def _module(implementation: Implementation, operation: str) -> ModuleType:
    """Imported when first used: a kernel language may be missing where it is not needed."""
    file = {"write_kv": "write", "paged_attention": "attention"}[operation]
    return importlib.import_module(f"pallas_kernels.{implementation}.{file}")

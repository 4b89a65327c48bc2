"""Which implementation of an operation runs: the device's kernel where it can, else XLA."""

from __future__ import annotations

import functools
import importlib
import logging
import os
from collections.abc import Callable
from types import ModuleType
from typing import Any, Literal, get_args

import jax

Implementation = Literal["xla", "triton", "mosaic_gpu", "mosaic_tpu"]

# Kernels by the platform they run on, best first: unless one says that it `beats_others`.
KERNELS: dict[str, tuple[Implementation, ...]] = {
    "gpu": ("triton", "mosaic_gpu"),
    "tpu": ("mosaic_tpu",),
}

# Names, separated by commas, that are never picked unasked.
SWITCHED_OFF = "PALLAS_KERNELS_OFF"


def choose(
    operation: Literal["write_kv", "write_qkv", "paged_attention"],
    implementation: Implementation | None,
    *operands: Any,
) -> Callable[..., Any]:
    """The function to run.

    Args:
      operation: its name.
      implementation: `None` picks the best of the default device that takes the operands. A named
        one may be traced anywhere: the program may be compiled for another device than this one's.
      *operands: what a kernel's own `supported` and `beats_others` look at.

    Raises:
      NotImplementedError: the named implementation cannot run here; the message says why.
    """
    kernels = KERNELS.get(jax.default_backend(), ())
    if implementation is None:
        reasons = []
        for kernel in sorted(kernels, key=lambda kernel: not _beats(kernel, operation, *operands)):
            off = kernel in os.environ.get(SWITCHED_OFF, "").split(",")
            reason = f"{SWITCHED_OFF} names it" if off else _reason(kernel, operation, *operands)
            if reason is None:
                return getattr(_module(kernel, operation), operation)
            reasons.append(f"{kernel}: {reason}")
        if reasons:
            _say(f"{operation} runs by XLA. " + ". ".join(reasons))
        return getattr(_module("xla", operation), operation)
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
        reason = _reason(implementation, operation, *operands)
        if reason is not None:
            raise NotImplementedError(f"{reason} for {implementation=}")
    return getattr(_module(implementation, operation), operation)


def _reason(kernel: Implementation, operation: str, *operands: Any) -> str | None:
    """Why a kernel cannot run, or `None`."""
    try:
        return _module(kernel, operation).supported(*operands)
    except ImportError as error:
        return str(error)


def _beats(kernel: Implementation, operation: str, *operands: Any) -> bool:
    """Whether a kernel says that it is the fastest for these operands."""
    try:
        beats_others = getattr(_module(kernel, operation), "beats_others", None)
    except ImportError:
        return False
    return beats_others is not None and beats_others(*operands)


@functools.cache
def _say(message: str) -> None:
    """Once."""
    logging.getLogger(__name__).warning(message)


def _module(implementation: Implementation, operation: str) -> ModuleType:
    """Imported when first used: a kernel language may be missing where it is not needed."""
    file = "attention" if operation == "paged_attention" else "write"
    return importlib.import_module(f"pallas_kernels.{implementation}.{file}")

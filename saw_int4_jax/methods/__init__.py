"""Ways of storing keys and values, to compare: names to methods.

`make_method` knows the names; `default_methods` lists what is worth comparing for a head dim.
"""

from __future__ import annotations

import functools

from pallas_kernels.page_format import largest_order
from saw_int4_jax.methods import calibrated, integer, vector, windowed
from saw_int4_jax.methods.method import LayerSample, Method

__all__ = ["LayerSample", "Method", "default_methods", "make_method"]

NAMES = (
    "bf16, int8, int4, int4-fp32, bdr, bdr-N, bdr-kv, bdr-N-kv, bdr-fp32, bdr-konly, balanced, "
    "balanced-kv, signed, "
    "kivi, window, kmeans, kmeans-bdr, vq, vq-bdr, hessian, hessian-bdr, gptq, gptq-bdr, "
    "centered, centered-bdr, covariance"
)

# Those that read text first, each without rotation and, as `-bdr`, with it.
CALIBRATED = {
    "kmeans": vector.kmeans,
    "vq": vector.vq,
    "hessian": calibrated.diagonal,
    "gptq": calibrated.gptq,
    "centered": calibrated.centered,
}


@functools.cache
def make_method(name: str, head_dim: int) -> Method:
    """The method of this name for a head dim; the same object for the same arguments.

    `bdr-N` is BDR with Hadamard order N, `-kv` rotates values too; elsewhere BDR is that with the
    largest order. `-fp32` has 32-bit scales.

    Raises:
      ValueError: no method has this name, or N does not divide `head_dim`.
    """
    largest = largest_order(head_dim)
    match name.split("-"):
        case ["bf16"]:
            return integer.bf16()
        case ["int8"]:
            return integer.int8()
        case ["int4"]:
            return integer.int4()
        case ["int4", "fp32"]:
            return integer.wide_scales(name, 1)
        case ["bdr", "fp32"]:
            return integer.wide_scales(name, largest)
        case ["bdr", "konly"]:
            return integer.int4_keys_only(name, largest)
        case ["bdr", *rest] if rest in ([], ["kv"]):
            return integer.bdr(name, largest, rest == ["kv"])
        case ["bdr", number, *rest] if number.isdigit() and rest in ([], ["kv"]):
            order = int(number)
            if order < 1 or order & (order - 1) or head_dim % order:
                raise ValueError(f"Expected {order=} to be a power of two dividing {head_dim=}")
            return integer.bdr(name, order, rest == ["kv"])
        case ["balanced", *rest] if rest in ([], ["kv"]):
            return integer.balanced(name, largest, rest == ["kv"])
        case ["signed"]:
            return integer.signed(name, largest)
        case ["kivi"]:
            return windowed.kivi()
        case ["window"]:
            return windowed.sink_window(name, largest)
        case ["covariance"]:
            return calibrated.covariance_rotation(name)
        case [family, *rest] if family in CALIBRATED and rest in ([], ["bdr"]):
            return CALIBRATED[family](name, largest if rest else 1)
    raise ValueError(f"Expected method {name!r} to be one of {NAMES}")


def default_methods(head_dim: int) -> list[str]:
    """What to compare: BDR in orders 16 to the largest, and everything else."""
    largest = largest_order(head_dim)
    orders = [n for n in (16, 32, 64, 128) if n < largest] or [n for n in (2, 4) if n < largest]
    return [
        "bf16",
        "int8",
        "int4",
        *(f"bdr-{n}" for n in orders),
        "bdr",
        *(f"bdr-{n}-kv" for n in orders),
        "bdr-kv",
        "balanced",
        "balanced-kv",
        "signed",
        "int4-fp32",
        "bdr-fp32",
        "bdr-konly",
        "window",
        "kivi",
        "kmeans",
        "kmeans-bdr",
        "vq",
        "vq-bdr",
        "hessian",
        "hessian-bdr",
        "gptq",
        "gptq-bdr",
        "covariance",
        "centered",
        "centered-bdr",
    ]

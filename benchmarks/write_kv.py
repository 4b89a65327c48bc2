"""Writing new tokens to a paged cache: time, rate, and what the rotation adds.

    python -m benchmarks.write_kv --json benchmarks/results/h200/write_kv.json

Bytes are those read (BF16 keys and values) and written (packed rows and scales). Keys and values
come out of the second level cache where they fit, as they do after a projection. The methods of a
number of tokens take turns, and so does a kernel that copies as many bytes as INT4 moves. The last
rows are what lies between projections and attention, with QK-norm and RoPE: in one launch, and by
XLA before the same kernel writes.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import operator
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from benchmarks.timing import copies, copy_chains, device_kernels, time_alternately
from pallas_kernels import PageFormat, Pages, init_pages, page_format
from pallas_kernels.xla import write as xla_write
from saw_int4_jax.results import describe_device, write_results

LAUNCH_BOUND = 10_000_000  # bytes below which a launch takes a good part of the time
FEW = 256  # tokens up to which a loop of calls must be longer: Python starts one as fast


def formats(head_dim: int) -> dict[str, PageFormat]:
    layout, order = page_format.preferred_layout(), page_format.largest_order(head_dim)
    return {
        "int4": PageFormat(layout),
        "bdr": PageFormat(layout, order),
        "bdr + values": PageFormat(layout, order, rotate_v=True),
        "bf16": PageFormat("bf16"),
    }


def random_tokens(
    format: PageFormat,
    *,
    tokens: int,
    kv_heads: int,
    head_dim: int,
    page_size: int,
    scattered: bool = False,
) -> tuple[Pages, tuple[jax.Array, jax.Array, jax.Array]]:
    """Pages of as many layers as defeat the caches, and keys, values and slots to write."""
    num_pages = -(-tokens // page_size) + 1
    sizes = dict(num_pages=num_pages, kv_heads=kv_heads, page_size=page_size, head_dim=head_dim)
    one = jax.eval_shape(lambda: init_pages(format, layers=1, **sizes))
    pages = init_pages(format, layers=copies(one.nbytes), **sizes)
    keys = jax.random.split(jax.random.key(0), 3)
    k, v = jax.random.normal(keys[0], (2, tokens, kv_heads, head_dim), jnp.bfloat16)
    slots = jax.random.permutation(keys[1], num_pages)[:, None] * page_size
    slots = (slots + jnp.arange(page_size)).reshape(-1)
    slots = (jax.random.permutation(keys[2], slots) if scattered else slots)[:tokens]
    return pages, (k, v, slots.astype(jnp.int32))


def write_chain(format: PageFormat, *, blocks=None, **sizes) -> tuple:
    """What `time_chain` takes: calls of `write_kv`, each a layer further."""

    write = importlib.import_module(f"pallas_kernels.{device_kernels()}.write")
    options = {} if blocks is None else {"blocks": blocks}

    def step(i, pages, data):
        return write.write_kv(pages, *data, layer=i % pages.layers, **options)

    return step, *random_tokens(format, **sizes)


def prepare_chain(format: PageFormat, *, q_heads: int, fused: bool, **sizes) -> tuple:
    """The same for `write_qkv`: the next call's queries are the last one's.

    Not so for few tokens in one launch, whose q, k and v are parts of one array, as XLA leaves them
    where it sums the parts of a projection.
    """
    write = importlib.import_module(f"pallas_kernels.{device_kernels()}.write")
    pages, (k, v, slots) = random_tokens(format, **sizes)
    tokens, kv_heads, head_dim = k.shape
    side_by_side = fused and tokens <= getattr(write, "SIDE_BY_SIDE", 0)
    angle = jnp.arange(tokens)[:, None] * 10_000 ** -jnp.linspace(0, 1, head_dim // 2)
    weight = jnp.ones(head_dim, jnp.bfloat16)
    by_xla = functools.partial(xla_write.write_qkv, write=write.write_kv)

    def step(i, carry, data):
        pages, q = carry
        kv, slots, cos, sin, weight = data
        if side_by_side:
            q, k, v = jnp.split(kv, [q_heads, q_heads + kv_heads], axis=1)
        else:
            k, v = kv
        q, pages = (write.write_qkv if fused else by_xla)(
            *(pages, q, k, v, slots),
            cos=cos,
            sin=sin,
            q_norm=weight,
            k_norm=weight,
            eps=1e-6,
            layer=i % pages.layers,
        )
        return pages, q

    q = jax.random.normal(jax.random.key(1), (tokens, q_heads, head_dim), jnp.bfloat16)
    kv = jnp.concatenate([q, k, v], axis=1) if side_by_side else (k, v)
    return step, (pages, q), (kv, slots, jnp.cos(angle), jnp.sin(angle), weight)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument(
        "--tokens", type=int, nargs="+", default=[1, 16, 64, 256, 2048, 8192], metavar="N"
    )
    arguments.add_argument("--q-heads", type=int, default=32)
    arguments.add_argument("--kv-heads", type=int, default=8)
    arguments.add_argument("--head-dim", type=int, default=128)
    on_gpu = jax.default_backend() == "gpu"
    arguments.add_argument("--page-size", type=int, default=64 if on_gpu else 128)
    arguments.add_argument("--scattered", action="store_true", help="no two tokens side by side")
    arguments.add_argument("--length", type=int, default=32, help="calls in one compiled loop")
    arguments.add_argument("--runs", type=int, default=40)
    arguments.add_argument("--json", metavar="FILE")
    arguments = arguments.parse_args()
    head_dim, q_heads = arguments.head_dim, arguments.q_heads
    sizes = dict(kv_heads=arguments.kv_heads, head_dim=head_dim, page_size=arguments.page_size)

    rows: list[dict[str, Any]] = []
    title = f"write_kv, {sizes['kv_heads']} heads of {head_dim}, {describe_device()}"
    table = Table("tokens", "method", "MB", "µs", "GB/s", "% of copy", "over int4", title=title)
    kernels, methods = device_kernels(), formats(head_dim)
    for tokens in arguments.tokens:
        here = dict(tokens=tokens, scattered=arguments.scattered, **sizes)
        rows_here, chains = {}, {}
        for name, format in methods.items():
            stored = 2 * head_dim if name == "bf16" else head_dim // 2 + 4
            size = 2 * tokens * sizes["kv_heads"] * (2 * head_dim + stored)
            chains[name] = write_chain(format, **here)
            about = dict(op="write_kv", implementation=kernels, method=name.split()[0])
            about |= dict(order=format.order, rotate_v=format.rotate_v, tokens=tokens, **sizes)
            rows_here[name] = about | dict(bytes=size)
        # Queries in and out; a cosine and a sine for two channels, in float32.
        size = rows_here["bdr"]["bytes"] + tokens * head_dim * (4 * q_heads + 4)
        for fused in (True, False):
            implementation = kernels if fused else f"xla + {kernels}"
            name = f"QK-norm, RoPE, bdr: {implementation}"
            chains[name] = prepare_chain(methods["bdr"], q_heads=q_heads, fused=fused, **here)
            about = dict(op="write_qkv", implementation=implementation, q_heads=q_heads, bytes=size)
            rows_here[name] = rows_here["bdr"] | about
        copied = {size: {} for size in {row["bytes"] for row in rows_here.values()}}
        for size, of_size in copied.items():
            if size >= LAUNCH_BOUND:
                of_size |= {f"copy {size} {i}": x for i, x in enumerate(copy_chains(size))}
        length = arguments.length * (8 if tokens <= FEW else 1)
        everything = functools.reduce(operator.or_, copied.values(), chains)
        figures = time_alternately(everything, length=length, runs=arguments.runs)
        for name, row in rows_here.items():
            over_int4 = figures[name].pop("over_first")
            size, median = row["bytes"], figures[name]["median_us"]
            row |= figures[name] | dict(gb_per_s=size / median / 1e3)
            if row["op"] == "write_kv":
                row["over_int4"] = over_int4
            if copied[size]:
                copy = min(figures[x]["median_us"] for x in copied[size])
                row |= dict(ceiling_gb_per_s=size / copy / 1e3, fraction_of_ceiling=copy / median)
            rows.append(row)
            table.add_row(
                f"{tokens:,}",
                name,
                f"{size / 1e6:.2f}",
                f"{median:.2f}",
                f"{row['gb_per_s']:.0f}",
                f"{row['fraction_of_ceiling']:.0%}" if copied[size] else "",
                f"{over_int4:+.1%}" if row["op"] == "write_kv" else "",
            )
        del chains, everything
        if arguments.json:
            write_results(arguments.json, rows)
    Console().print(table)


if __name__ == "__main__":
    main()

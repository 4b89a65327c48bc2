"""Decode attention over a paged cache: time, rate and share of what the memory can do.

    python -m benchmarks.decode_attention --json benchmarks/results/h200/decode_attention.json

One query token per sequence, permuted pages. Peer: cuDNN's attention over a dense BF16 cache.
"""

from __future__ import annotations

import argparse
import functools
import importlib

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from benchmarks.timing import copies, device_kernels, read_ceiling, time_chain
from pallas_kernels import PageFormat, Pages, init_pages, page_format
from saw_int4_jax.results import describe_device, write_results

SHAPES = ["1x32768", "8x16384", "32x8192", "64x4096", "128x2048", "256x1024"]


def formats(head_dim: int) -> dict[str, PageFormat]:
    layout, order = page_format.preferred_layout(), page_format.largest_order(head_dim)
    return {
        "bf16": PageFormat("bf16"),
        "int4": PageFormat(layout),
        "bdr": PageFormat(layout, order),
    }


def random_pages(
    format: PageFormat, *, batch: int, context: int, kv_heads: int, head_dim: int, page_size: int
) -> tuple[Pages, jax.Array]:
    """Pages of as many layers as defeat the caches, full of random tokens, and their table."""
    num_pages = batch * -(-context // page_size)
    sizes = dict(num_pages=num_pages, kv_heads=kv_heads, page_size=page_size, head_dim=head_dim)
    one = jax.eval_shape(lambda: init_pages(format, layers=1, **sizes))
    keys = jax.random.split(jax.random.key(0), 4)

    @functools.partial(jax.jit, static_argnums=0)
    def fill(layers):
        data = jax.random.bits(keys[0], (layers, *one.data.shape[1:]), one.data.dtype)
        if one.scales is None:  # the exponents of numbers in (-2, 2)
            return Pages(data & 0xBFFF, None, format)
        scale, minimum = jax.random.uniform(keys[1], (2, layers, *one.scales.shape[1:]))
        scale, minimum = (x.astype(jnp.bfloat16).astype(jnp.float32) for x in (scale, minimum))
        words = page_format.join_scales(0.1 + 0.1 * scale, -1.5 + 0.1 * minimum)
        return Pages(data, words, format)

    pages = fill(copies(one.nbytes))
    table = jax.random.permutation(keys[2], num_pages).astype(jnp.int32).reshape(batch, -1)
    return pages, table


def paged_chain(
    pages: Pages,
    table: jax.Array,
    lengths: jax.Array,
    *,
    q_heads: int,
    queries: int = 1,
    blocks=None,
    implementation: str | None = None,
) -> tuple:
    """What `time_chain` takes: calls of `paged_attention`, each a layer further."""
    implementation = implementation or device_kernels()
    kernels = importlib.import_module(f"pallas_kernels.{implementation}.attention")
    batch = len(table)
    q = jax.random.normal(
        jax.random.key(1), (batch, queries, q_heads, pages.head_dim), jnp.bfloat16
    )
    options = dict(causal=True, window=None, soft_cap=None, sinks=None)
    if blocks is not None:
        options["blocks"] = blocks

    @jax.jit  # traced and lowered once for all layers
    def attend(q, data, layer):
        pages, table, lengths, query_lengths = data
        return kernels.paged_attention(
            q,
            pages,
            table,
            lengths,
            layer=layer,
            query_lengths=query_lengths,
            scale=pages.head_dim**-0.5,
            **options,
        )

    def step(i, q, data):
        # A decode step's queries are the last layer's attention, more or less.
        return attend(q, data, jnp.int32(i % pages.layers))

    return step, q, (pages, table, lengths, jnp.full_like(lengths, queries))


def time_cudnn(
    *, batch: int, context: int, q_heads: int, kv_heads: int, head_dim: int, timing: dict
) -> dict[str, float]:
    shape = (batch, context, kv_heads, head_dim)
    layers = 2
    keys = jax.random.split(jax.random.key(0), 2 * layers)
    data = [jax.random.normal(key, shape, jnp.bfloat16) for key in keys]
    q = jax.random.normal(jax.random.key(1), (batch, 1, q_heads, head_dim), jnp.bfloat16)

    def step(i, q, data):
        for k, v in zip(data[::2], data[1::2], strict=True):
            q = jax.nn.dot_product_attention(q, k, v, implementation="cudnn")
        return q

    figures = time_chain(step, q, data, **timing)
    return {k: v / layers if k.endswith("_us") else v for k, v in figures.items()}


def main() -> None:
    on_gpu = jax.default_backend() == "gpu"
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--shapes", nargs="+", default=SHAPES, metavar="BATCHxCONTEXT")
    arguments.add_argument("--q-heads", type=int, default=32)
    arguments.add_argument("--kv-heads", type=int, default=8)
    arguments.add_argument("--head-dim", type=int, default=128)
    arguments.add_argument("--page-size", type=int, default=64 if on_gpu else 128)
    arguments.add_argument(
        "--ragged", action="store_true", help="half of the sequences at a tenth of the context"
    )
    peers = ["cudnn"] if on_gpu else []
    arguments.add_argument("--methods", nargs="+", default=["bf16", "int4", "bdr", *peers])
    arguments.add_argument(
        "--implementation",
        nargs="+",
        default=[device_kernels()],
        choices=["triton", "mosaic_gpu", "mosaic_tpu"],
    )
    arguments.add_argument("--length", type=int, default=32, help="calls in one compiled loop")
    arguments.add_argument("--runs", type=int, default=15)
    arguments.add_argument("--json", metavar="FILE")
    arguments = arguments.parse_args()
    heads = dict(q_heads=arguments.q_heads, kv_heads=arguments.kv_heads)
    timing = dict(length=arguments.length, runs=arguments.runs)
    head_dim, page_size = arguments.head_dim, arguments.page_size

    rows = []
    title = (
        f"decode attention, {heads['q_heads']}/{heads['kv_heads']} heads of {head_dim}, "
        f"page {page_size}, {describe_device()}"
    )
    table = Table("batch", "context", "method", "MB", "µs", "GB/s", "% of ceiling", title=title)
    for shape in arguments.shapes:
        batch, context = map(int, shape.split("x"))
        lengths = [context // 10 if arguments.ragged and i % 2 else context for i in range(batch)]
        ours = [method for method in arguments.methods if method != "cudnn"]
        runs = [(method, name) for method in ours for name in arguments.implementation]
        if "cudnn" in arguments.methods:
            runs.append(("cudnn", "cudnn"))
        for method, implementation in runs:
            common = dict(batch=batch, context=context, kv_heads=heads["kv_heads"])
            bits = 2 * 8 if method in ("bf16", "cudnn") else 4 + 32 / head_dim
            size = sum(lengths) * heads["kv_heads"] * 2 * head_dim * bits / 8
            if method == "cudnn":
                size = batch * context * heads["kv_heads"] * 4 * head_dim
                figures = time_cudnn(
                    **common, q_heads=heads["q_heads"], head_dim=head_dim, timing=timing
                )
                order = 1
            else:
                format = formats(head_dim)[method]
                order = format.order
                pages, page_table = random_pages(
                    format, **common, head_dim=head_dim, page_size=page_size
                )
                chain = paged_chain(
                    pages,
                    page_table,
                    jnp.array(lengths, jnp.int32),
                    q_heads=heads["q_heads"],
                    implementation=implementation,
                )
                figures = time_chain(*chain, **timing)
                del pages, chain
            ceiling = read_ceiling(int(size), **timing)
            rate = size / figures["median_us"] / 1e3
            rows.append(
                {
                    "op": "decode_attention",
                    "implementation": implementation,
                    "method": "bf16" if method == "cudnn" else method,
                    "peer": method == "cudnn",
                    "order": order,
                    "batch": batch,
                    "context": context,
                    "ragged": arguments.ragged,
                    **heads,
                    "head_dim": head_dim,
                    "page_size": page_size,
                    **figures,
                    "cache_bytes": int(size),
                    "gb_per_s": rate,
                    "ceiling_gb_per_s": ceiling,
                    "fraction_of_ceiling": rate / ceiling,
                }
            )
            table.add_row(
                str(batch),
                f"{context:,}",
                method if method == implementation else f"{method} {implementation}",
                f"{size / 1e6:.0f}",
                f"{figures['median_us']:.1f}",
                f"{rate:.0f}",
                f"{rate / ceiling:.0%}",
            )
    Console().print(table)
    if arguments.json:
        write_results(arguments.json, rows)


if __name__ == "__main__":
    main()

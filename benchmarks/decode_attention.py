"""Decode attention over a paged cache: time, rate and share of what the memory can do.

    python -m benchmarks.decode_attention --json benchmarks/results/h200/decode_attention.json

One query token per sequence, permuted pages. Peers, both over BF16: cuDNN's attention over a dense
cache and jax's own paged attention. With `--ragged` every second sequence has a tenth of the
context; cuDNN's is dense and reads it all.

    python -m benchmarks.decode_attention --draw benchmarks/results/h200/decode_attention.json

draws what was measured, without a GPU.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import itertools
import json
import pathlib

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


def time_jax_paged(
    *,
    batch: int,
    context: int,
    q_heads: int,
    kv_heads: int,
    head_dim: int,
    page_size: int,
    lengths: jax.Array,
    timing: dict,
) -> dict[str, float]:
    """jax's own paged attention for GPUs: dense heads of pages, keys and values apart."""
    from jax.experimental.pallas.ops.gpu.paged_attention import paged_attention

    layers, max_pages = 2, -(-context // page_size)
    shape = (kv_heads, batch * max_pages, page_size, head_dim)
    keys = jax.random.split(jax.random.key(0), 2 * layers + 1)
    data = [jax.random.normal(key, shape, jnp.bfloat16) for key in keys[1:]]
    table = jax.random.permutation(keys[0], batch * max_pages).reshape(batch, max_pages)
    q = jax.random.normal(jax.random.key(1), (batch, q_heads, head_dim), jnp.bfloat16)
    # Its cut into splits is the caller's: as many as fill the device.
    splits = max(1, min(max_pages // 8, 16, 1024 // (batch * kv_heads)))

    def step(i, q, data):
        *pages, table, lengths = data
        for k, v in zip(pages[::2], pages[1::2], strict=True):
            q = paged_attention(q * head_dim**-0.5, k, v, table, lengths, k_splits=splits)
        return q.astype(jnp.bfloat16)

    figures = time_chain(step, q, (*data, table.astype(jnp.int32), lengths), **timing)
    return {k: v / layers if k.endswith("_us") else v for k, v in figures.items()}


def draw(rows: list[dict], path: pathlib.Path) -> None:
    """Time over context, a line for each method; shapes stand in their own order."""
    from matplotlib.figure import Figure  # nothing else here needs it

    lines: dict[str, dict[str, float]] = {}
    for row in rows:
        shape = f"{row['batch']} × {row['context']:,}"
        lines.setdefault(name_of(row), {})[shape] = row["median_us"]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, times in lines.items():
        axes.plot(times.keys(), times.values(), marker="o", label=name)
    floors = {
        f"{row['batch']} × {row['context']:,}": row["cache_bytes"] / row["ceiling_gb_per_s"] / 1e3
        for row in rows
        if row["method"] not in ("bf16",)
    }
    axes.plot(floors.keys(), floors.values(), "k:", label="reading the INT4 bytes")
    axes.set_yscale("log")
    axes.set_xlabel("sequences × context")
    axes.set_ylabel("µs a layer")
    first = rows[0]
    ragged = ", every second sequence at a tenth" if first["ragged"] else ""
    axes.set_title(
        f"Decode attention, {first['q_heads']}/{first['kv_heads']} heads of "
        f"{first['head_dim']}{ragged}"
    )
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def name_of(row: dict) -> str:
    """The method of a row, and whose it is if not the default's."""
    if row["peer"]:
        return {"cudnn": "cuDNN, dense BF16", "jax": "jax's paged BF16"}[row["implementation"]]
    return row["method"].upper() + (
        "" if row["implementation"] == "triton" else f" ({row['implementation']})"
    )


def heads_of(text: str) -> tuple[int, int]:
    """`"32/8"` → query heads, KV heads."""
    q_heads, kv_heads = map(int, text.split("/"))
    return q_heads, kv_heads


def main() -> None:
    on_gpu = jax.default_backend() == "gpu"
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--shapes", nargs="+", default=SHAPES, metavar="BATCHxCONTEXT")
    arguments.add_argument("--heads", nargs="+", type=heads_of, default=[(32, 8)], metavar="H/K")
    arguments.add_argument("--head-dim", type=int, default=128)
    arguments.add_argument("--page-size", nargs="+", type=int, default=[64 if on_gpu else 128])
    arguments.add_argument(
        "--ragged", action="store_true", help="half of the sequences at a tenth of the context"
    )
    peers = ["cudnn", "jax"] if on_gpu else []
    arguments.add_argument(
        "--methods",
        nargs="+",
        default=["bf16", "int4", "bdr", *peers],
        choices=["bf16", "int4", "bdr", "cudnn", "jax"],
    )
    arguments.add_argument(
        "--implementation",
        nargs="+",
        default=[device_kernels()],
        choices=["triton", "mosaic_gpu", "mosaic_tpu"],
    )
    arguments.add_argument("--length", type=int, default=32, help="calls in one compiled loop")
    arguments.add_argument("--runs", type=int, default=15)
    arguments.add_argument("--json", metavar="FILE")
    arguments.add_argument("--draw", metavar="FILE", help="only draw these results, as FILE's .png")
    arguments = arguments.parse_args()
    if arguments.draw:
        path = pathlib.Path(arguments.draw)
        return draw(json.loads(path.read_text())["rows"], path.with_suffix(".png"))
    timing = dict(length=arguments.length, runs=arguments.runs)
    head_dim = arguments.head_dim

    rows = []
    title = f"decode attention, head dim {head_dim}, {describe_device()}"
    columns = ["shape", "heads", "page", "method", "MB", "µs", "GB/s", "% of ceiling", "× cuDNN"]
    table = Table(*columns, title=title)
    for shape, heads, page_size in itertools.product(
        arguments.shapes, arguments.heads, arguments.page_size
    ):
        batch, context = map(int, shape.split("x"))
        lengths = [context // 10 if arguments.ragged and i % 2 else context for i in range(batch)]
        common = dict(batch=batch, context=context, kv_heads=heads[1], head_dim=head_dim)
        runs = [
            (method, name)
            for method in arguments.methods
            for name in ([method] if method in ("cudnn", "jax") else arguments.implementation)
        ]
        found = []
        for method, implementation in runs:
            peer = method in ("cudnn", "jax")
            bits = 2 * 8 if peer or method == "bf16" else 4 + 32 / head_dim
            tokens = batch * context if method == "cudnn" else sum(lengths)
            size = tokens * heads[1] * 2 * head_dim * bits / 8
            order = 1
            if method == "cudnn":
                figures = time_cudnn(**common, q_heads=heads[0], timing=timing)
            elif method == "jax":
                figures = time_jax_paged(
                    **common,
                    q_heads=heads[0],
                    page_size=page_size,
                    lengths=jnp.array(lengths, jnp.int32),
                    timing=timing,
                )
            else:
                format = formats(head_dim)[method]
                order = format.order
                pages, page_table = random_pages(format, **common, page_size=page_size)
                chain = paged_chain(
                    pages,
                    page_table,
                    jnp.array(lengths, jnp.int32),
                    q_heads=heads[0],
                    implementation=implementation,
                )
                figures = time_chain(*chain, **timing)
                del pages, chain
            ceiling = read_ceiling(int(size), **timing)
            rate = size / figures["median_us"] / 1e3
            found.append(
                {
                    "op": "decode_attention",
                    "implementation": implementation,
                    "method": "bf16" if peer else method,
                    "peer": peer,
                    "order": order,
                    "batch": batch,
                    "context": context,
                    "ragged": arguments.ragged,
                    "q_heads": heads[0],
                    "kv_heads": heads[1],
                    "head_dim": head_dim,
                    "page_size": page_size,
                    **figures,
                    "cache_bytes": int(size),
                    "gb_per_s": rate,
                    "ceiling_gb_per_s": ceiling,
                    "fraction_of_ceiling": rate / ceiling,
                }
            )
        cudnn = [row["median_us"] for row in found if row["implementation"] == "cudnn"]
        for row in found:
            table.add_row(
                f"{batch} × {context:,}",
                f"{heads[0]}/{heads[1]}",
                str(page_size),
                name_of(row),
                f"{row['cache_bytes'] / 1e6:.0f}",
                f"{row['median_us']:.1f}",
                f"{row['gb_per_s']:.0f}",
                f"{row['fraction_of_ceiling']:.0%}",
                f"{cudnn[0] / row['median_us']:.1f}" if cudnn else "",
            )
        rows += found
        if arguments.json:  # after every shape: a long run may be cut off
            write_results(arguments.json, rows)
    Console().print(table)


if __name__ == "__main__":
    main()

"""Decode attention over a paged cache: time, rate and share of what the memory can do.

    python -m benchmarks.decode_attention --json benchmarks/results/h200/decode_attention.json

One query token per sequence, permuted pages; uniform lengths (`--shapes`) and ragged ones
(`--ragged`), where every second sequence has a tenth of the context. Everything is compiled first,
on all cores, and then timed one after the other.

Peers, all over BF16: cuDNN's attention over a dense cache, jax's own paged attention, and
FlashInfer where it is installed.

    python -m benchmarks.decode_attention --draw benchmarks/results/h200/decode_attention.json

draws what was measured, without a GPU.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import importlib.util
import itertools
import json
import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from benchmarks.timing import (
    ceilings,
    compile_all,
    copies,
    device_kernels,
    figures,
    time_chain,
)
from pallas_kernels import PageFormat, Pages, init_pages, page_format
from pallas_kernels.implementation import KERNELS
from saw_int4_jax.results import describe_device, write_results

SHAPES = ["1x32768", "8x16384", "32x8192", "64x4096", "128x2048", "256x1024"]
RAGGED = ["8x16384", "32x8192", "128x2048"]
PEERS = {
    "cudnn": "cuDNN, dense BF16",
    "jax": "jax's paged BF16",
    "flashinfer": "FlashInfer, paged BF16",
}


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


def cudnn_chain(
    *, batch: int, context: int, q_heads: int, kv_heads: int, head_dim: int, lengths: list[int]
) -> tuple:
    """The same for cuDNN over a dense cache."""
    shape = (batch, context, kv_heads, head_dim)
    keys = jax.random.split(jax.random.key(0), 4)
    data = [jax.random.normal(key, shape, jnp.bfloat16) for key in keys]
    q = jax.random.normal(jax.random.key(1), (batch, 1, q_heads, head_dim), jnp.bfloat16)
    ragged = min(lengths) < context

    def step(i, q, data):
        *pairs, lengths = data
        k, v = pairs[i % 2 * 2 : i % 2 * 2 + 2]
        options = dict(key_value_seq_lengths=lengths) if ragged else {}
        return jax.nn.dot_product_attention(q, k, v, implementation="cudnn", **options)

    return step, q, (*data, jnp.array(lengths, jnp.int32))


def jax_chain(
    *,
    batch: int,
    context: int,
    q_heads: int,
    kv_heads: int,
    head_dim: int,
    page_size: int,
    lengths: list[int],
) -> tuple:
    """The same for jax's own paged attention: dense heads of pages, keys and values apart."""
    from jax.experimental.pallas.ops.gpu.paged_attention import paged_attention

    max_pages = -(-context // page_size)
    shape = (kv_heads, batch * max_pages, page_size, head_dim)
    keys = jax.random.split(jax.random.key(0), 5)
    data = [jax.random.normal(key, shape, jnp.bfloat16) for key in keys[1:]]
    table = jax.random.permutation(keys[0], batch * max_pages).reshape(batch, max_pages)
    q = jax.random.normal(jax.random.key(1), (batch, q_heads, head_dim), jnp.bfloat16)
    # How it is cut is the caller's: into as many as fill the device, blocks that fit in one.
    blocks = dict(
        k_splits=max(1, min(max_pages // 8, 16, 1024 // (batch * kv_heads))),
        pages_per_compute_block=max(1, 128 // page_size),
    )

    def step(i, q, data):
        *pages, table, lengths = data
        k, v = pages[i % 2 * 2 : i % 2 * 2 + 2]
        return paged_attention(q * head_dim**-0.5, k, v, table, lengths, **blocks).astype(q.dtype)

    return step, q, (*data, table.astype(jnp.int32), jnp.array(lengths, jnp.int32))


def time_flashinfer(
    *,
    batch: int,
    context: int,
    q_heads: int,
    kv_heads: int,
    head_dim: int,
    page_size: int,
    lengths: list[int],
    runs: int,
) -> dict[str, float]:
    """FlashInfer is PyTorch's: a CUDA graph of calls on several layers, timed by CUDA events."""
    import flashinfer
    import torch

    layers, calls, device = 4, 32, "cuda"
    counts = torch.tensor([-(-n // page_size) for n in lengths])
    ends = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(device, torch.int32)
    used = int(counts.sum())
    shape = (layers, used, 2, page_size, kv_heads, head_dim)
    pages = torch.randn(shape, device=device, dtype=torch.bfloat16)
    q = torch.randn((batch, q_heads, head_dim), device=device, dtype=torch.bfloat16)
    attention = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        torch.empty(1 << 28, dtype=torch.uint8, device=device),
        use_cuda_graph=True,
        use_tensor_cores=q_heads > kv_heads,
        paged_kv_indptr_buffer=torch.empty_like(ends),
        paged_kv_indices_buffer=torch.empty(used, dtype=torch.int32, device=device),
        paged_kv_last_page_len_buffer=torch.empty(batch, dtype=torch.int32, device=device),
    )
    last = torch.tensor([(n - 1) % page_size + 1 for n in lengths], dtype=torch.int32)
    indices = torch.randperm(used, device=device).to(torch.int32)
    sizes = (q_heads, kv_heads, head_dim, page_size)
    attention.plan(ends, indices, last.to(device), *sizes, q_data_type=q.dtype)
    attention.run(q, pages[0])  # compiled here
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(calls):
            attention.run(q, pages[i % layers])
    times = []
    for _ in range(runs + 1):  # the first warms up
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(10):
            graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / (10 * calls))
    return figures(times[1:])


def draw(rows: list[dict], path: pathlib.Path) -> None:
    """Time over shapes, a line for each method; ragged lengths in a panel of their own."""
    from matplotlib.figure import Figure  # nothing else here needs it

    kinds = sorted({row["ragged"] for row in rows})
    figure = Figure(figsize=(8 * len(kinds), 4.5), layout="constrained")
    for axes, ragged in zip(figure.subplots(1, len(kinds), squeeze=False)[0], kinds, strict=True):
        lines: dict[str, dict[str, float]] = {}
        for row in rows:
            if row["ragged"] == ragged:
                shape = f"{row['batch']} × {row['context']:,}"
                lines.setdefault(name_of(row), {})[shape] = row["median_us"]
                if row["method"] != "bf16":
                    floor = row["median_us"] * row["fraction_of_ceiling"]
                    lines.setdefault("reading the INT4 bytes", {})[shape] = floor
        for name, times in lines.items():
            style = "k:" if name.startswith("reading") else "o-"
            axes.plot(list(times), list(times.values()), style, label=name)
        axes.set_yscale("log")
        axes.set_xlabel("sequences × context")
        axes.set_ylabel("µs a layer")
        first = rows[0]
        heads = f"{first['q_heads']}/{first['kv_heads']} heads of {first['head_dim']}"
        tail = ", every second sequence at a tenth" if ragged else ""
        axes.set_title(f"Decode attention, {heads}{tail}")
        axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right center")
    figure.savefig(path, dpi=120)


def name_of(row: dict) -> str:
    """The method of a row, and whose it is."""
    if row["peer"]:
        return PEERS[row["implementation"]]
    return f"{row['method'].upper()}, {row['implementation']}"


def heads_of(text: str) -> tuple[int, int]:
    """`"32/8"` → query heads, KV heads."""
    q_heads, kv_heads = map(int, text.split("/"))
    return q_heads, kv_heads


def implementations_of(format: PageFormat, *, q_heads: int, **sizes: int) -> list[str]:
    """The device's kernels that are timed by default: the first, and any that says it is faster."""
    first, *others = KERNELS.get(jax.default_backend(), ("xla",))
    q = jax.ShapeDtypeStruct((sizes["batch"], 1, q_heads, sizes["head_dim"]), jnp.bfloat16)
    pages, table = jax.eval_shape(lambda: random_pages(format, **sizes))

    def is_faster(name):
        kernels = importlib.import_module(f"pallas_kernels.{name}.attention")
        return kernels.beats_others(q, pages, table)

    return [first, *filter(is_faster, others)]


def rows_to_time(arguments: argparse.Namespace) -> list[dict]:
    """What is asked for, a row of the results for each, as yet without figures."""
    shapes = [(shape, False) for shape in arguments.shapes]
    shapes += [(shape, True) for shape in arguments.ragged]
    rows = []
    for (shape, ragged), heads, page_size, method in itertools.product(
        shapes, arguments.heads, arguments.page_size, arguments.methods
    ):
        batch, context = map(int, shape.split("x"))
        peer, head_dim = method in PEERS, arguments.head_dim
        sizes = dict(batch=batch, context=context, kv_heads=heads[1], head_dim=head_dim)
        sizes |= dict(q_heads=heads[0], page_size=page_size)
        format = formats(head_dim)["bf16" if peer else method]
        names = (
            [method] if peer else arguments.implementation or implementations_of(format, **sizes)
        )
        bits = 16 if format.layout == "bf16" else 4 + 32 / head_dim
        tokens = sum(lengths_of(sizes | dict(ragged=ragged)))
        about = dict(method="bf16" if peer else method, peer=peer, order=format.order, **sizes)
        about |= dict(ragged=ragged, cache_bytes=int(tokens * heads[1] * 2 * head_dim * bits / 8))
        rows += [dict(op="decode_attention", implementation=name, **about) for name in names]
    return rows


def lengths_of(row: dict) -> list[int]:
    batch, context = row["batch"], row["context"]
    return [context // 10 if row["ragged"] and i % 2 else context for i in range(batch)]


def maker(row: dict) -> Callable[[], tuple]:
    """A function that returns what `time_chain` takes."""
    lengths = lengths_of(row)
    sizes = {key: row[key] for key in ("batch", "context", "kv_heads", "head_dim")}
    if row["implementation"] == "cudnn":
        return lambda: cudnn_chain(**sizes, q_heads=row["q_heads"], lengths=lengths)
    sizes["page_size"] = row["page_size"]
    if row["implementation"] == "jax":
        return lambda: jax_chain(**sizes, q_heads=row["q_heads"], lengths=lengths)
    return lambda: paged_chain(
        *random_pages(formats(row["head_dim"])[row["method"]], **sizes),
        jnp.array(lengths, jnp.int32),
        q_heads=row["q_heads"],
        implementation=row["implementation"],
    )


def main() -> None:
    on_gpu = jax.default_backend() == "gpu"
    here = {"cudnn": on_gpu, "jax": on_gpu, "flashinfer": importlib.util.find_spec("flashinfer")}
    peers = [name for name in PEERS if here[name]]
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--shapes", nargs="*", default=SHAPES, metavar="BATCHxCONTEXT")
    arguments.add_argument("--ragged", nargs="*", default=RAGGED, metavar="BATCHxCONTEXT")
    arguments.add_argument("--heads", nargs="+", type=heads_of, default=[(32, 8)], metavar="H/K")
    arguments.add_argument("--head-dim", type=int, default=128)
    arguments.add_argument("--page-size", nargs="+", type=int, default=[64 if on_gpu else 128])
    methods = ["bf16", "int4", "bdr"]
    arguments.add_argument(
        "--methods", nargs="+", default=[*methods, *peers], choices=[*methods, *PEERS]
    )
    arguments.add_argument(
        "--implementation",
        nargs="+",
        choices=["triton", "mosaic_gpu", "mosaic_tpu"],
        help="default: the device's first, and any other that says it is faster",
    )
    arguments.add_argument("--length", type=int, default=32, help="calls in one compiled loop")
    arguments.add_argument("--runs", type=int, default=11)
    arguments.add_argument("--json", metavar="FILE")
    arguments.add_argument("--draw", metavar="FILE", help="only draw these results, as FILE's .png")
    arguments = arguments.parse_args()
    if arguments.draw:
        path = pathlib.Path(arguments.draw)
        return draw(json.loads(path.read_text())["rows"], path.with_suffix(".png"))
    console = Console()
    timing = dict(length=arguments.length, runs=arguments.runs, window_ms=20)
    rows = rows_to_time(arguments)
    makers = {i: maker(row) for i, row in enumerate(rows) if row["implementation"] != "flashinfer"}
    programs = compile_all(makers, length=arguments.length)
    rates = ceilings(sorted({row["cache_bytes"] for row in rows}), **timing)

    timed = []
    for i, row in enumerate(rows):
        try:
            if i in makers:
                program = programs[i].result()
                row |= time_chain(*makers[i](), chain=program, **timing)
            else:
                sizes = ("batch", "context", "q_heads", "kv_heads", "head_dim", "page_size")
                sizes = {key: row[key] for key in sizes}
                row |= time_flashinfer(**sizes, lengths=lengths_of(row), runs=arguments.runs)
        except Exception as error:
            if not row["peer"]:
                raise
            console.print(f"{name_of(row)}, {row['batch']} × {row['context']}: {error!r}")
            continue
        row["gb_per_s"] = row["cache_bytes"] / row["median_us"] / 1e3
        row["ceiling_gb_per_s"] = rates[row["cache_bytes"]]
        row["fraction_of_ceiling"] = row["gb_per_s"] / row["ceiling_gb_per_s"]
        timed.append(row)
        if arguments.json:  # after every row: a long run may be cut off
            write_results(arguments.json, timed)
    print_table(timed, console)


def print_table(rows: list[dict], console: Console) -> None:
    table = Table("shape", "heads", "page", "method", "MB", "µs", "GB/s", "% of ceiling", "× cuDNN")
    table.title = f"decode attention, head dim {rows[0]['head_dim']}, {describe_device()}"
    keys = ("batch", "context", "ragged", "q_heads", "kv_heads", "page_size")
    cudnn = {
        tuple(row[key] for key in keys): row["median_us"]
        for row in rows
        if row["implementation"] == "cudnn"
    }
    for row in rows:
        peer = cudnn.get(tuple(row[key] for key in keys))
        table.add_row(
            f"{row['batch']} × {row['context']:,}{', ragged' if row['ragged'] else ''}",
            f"{row['q_heads']}/{row['kv_heads']}",
            str(row["page_size"]),
            name_of(row),
            f"{row['cache_bytes'] / 1e6:.0f}",
            f"{row['median_us']:.1f}",
            f"{row['gb_per_s']:.0f}",
            f"{row['fraction_of_ceiling']:.0%}",
            f"{peer / row['median_us']:.1f}" if peer else "",
        )
    console.print(table)


if __name__ == "__main__":
    main()

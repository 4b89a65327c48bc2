"""Chunked prefill over packed pages: time, and its ratio to cuDNN over a dense BF16 cache.

    python -m benchmarks.prefill --json benchmarks/results/h200/prefill.json

A chunk of new tokens attends to itself and to the history before it, causally. cuDNN knows no such
mask by name: it reads one as an array, but where there is no history. `unmasked` is cuDNN without
any mask, which sees the chunk's future too: what it can do at its best.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from benchmarks.decode_attention import formats, paged_chain, random_pages
from benchmarks.timing import compile_all, device_kernels, time_chain
from pallas_kernels.triton import prefill
from saw_int4_jax.results import describe_device, write_results

PEERS = ("cudnn", "unmasked")
SHAPES = ["2048x16384", "2048x4096", "2048x0", "512x16384", "256x16384"]


def cudnn_chain(
    *, chunk: int, context: int, q_heads: int, kv_heads: int, head_dim: int, masked: bool = True
) -> tuple:
    """What `time_chain` takes."""
    keys = jax.random.split(jax.random.key(0), 3)
    q = jax.random.normal(keys[0], (1, chunk, q_heads, head_dim), jnp.bfloat16)
    k, v = (
        jax.random.normal(key, (1, context, kv_heads, head_dim), jnp.bfloat16) for key in keys[1:]
    )

    def step(i, q, data):
        options = {}
        if masked and chunk == context:
            options = dict(is_causal=True)
        elif masked:
            visible = jnp.arange(context) <= context - chunk + jnp.arange(chunk)[:, None]
            options = dict(mask=visible)
        return jax.nn.dot_product_attention(q, *data, implementation="cudnn", **options)

    return step, q, (k, v)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--shapes", nargs="+", default=SHAPES, metavar="CHUNKxHISTORY")
    arguments.add_argument("--q-heads", type=int, default=32)
    arguments.add_argument("--kv-heads", type=int, default=8)
    arguments.add_argument("--head-dim", type=int, default=128)
    on_gpu = jax.default_backend() == "gpu"
    arguments.add_argument("--page-size", type=int, default=64 if on_gpu else 128)
    peers = PEERS if on_gpu else ()
    arguments.add_argument("--methods", nargs="+", default=[*peers, "bf16", "int4", "bdr"])
    arguments.add_argument(
        "--blocks",
        type=int,
        nargs=6,
        metavar="N",
        help="rows, tokens, programs, most splits, warps, stages",
    )
    arguments.add_argument("--runs", type=int, default=10)
    arguments.add_argument("--json", metavar="FILE")
    arguments.add_argument("--plot", metavar="FILE", help="a picture of time over history")
    arguments = arguments.parse_args()
    heads = dict(kv_heads=arguments.kv_heads, head_dim=arguments.head_dim)
    blocks = prefill.Blocks(*arguments.blocks) if arguments.blocks else None

    def chain(chunk: int, context: int, method: str) -> tuple:
        if method in PEERS:
            sizes = dict(chunk=chunk, context=context, q_heads=arguments.q_heads)
            return cudnn_chain(**sizes, **heads, masked=method == "cudnn")
        format = formats(arguments.head_dim)[method]
        sizes = dict(batch=1, context=context, page_size=arguments.page_size)
        return paged_chain(
            *random_pages(format, **sizes, **heads),
            jnp.array([context], jnp.int32),
            q_heads=arguments.q_heads,
            queries=chunk,
            blocks=blocks,
        )

    shapes = [tuple(map(int, shape.split("x"))) for shape in arguments.shapes]
    makers = {
        (chunk, history, method): functools.partial(chain, chunk, history + chunk, method)
        for chunk, history in shapes
        for method in arguments.methods
    }
    programs = compile_all(makers, length=8)

    rows = []
    table = Table("chunk", "history", "method", "µs", "TFLOP/s", "over cuDNN")
    table.title = f"prefill, {describe_device()}"
    peer_us: dict[tuple, float] = {}
    for (chunk, history, method), make in makers.items():
        program = programs[chunk, history, method].result()
        figures = time_chain(*make(), chain=program, length=8, runs=arguments.runs, window_ms=20)
        pairs = chunk * (history + (chunk + 1) / 2)
        rate = 4 * pairs * arguments.q_heads * arguments.head_dim / figures["median_us"] / 1e6
        if method == "cudnn":
            peer_us[chunk, history] = figures["median_us"]
        rows.append(
            {
                "op": "prefill",
                "implementation": method if method in PEERS else device_kernels(),
                "method": "bf16" if method in PEERS else method,
                "peer": method in PEERS,
                "batch": 1,
                "tokens": chunk,
                "context": history + chunk,
                "q_heads": arguments.q_heads,
                **heads,
                "page_size": arguments.page_size,
                **(dataclasses.asdict(blocks) if blocks else {}),
                **figures,
                "tflop_per_s": rate,
            }
        )
        peer = peer_us.get((chunk, history))
        table.add_row(
            f"{chunk:,}",
            f"{history:,}",
            method,
            f"{figures['median_us']:.0f}",
            f"{rate:.0f}",
            f"{figures['median_us'] / peer:.2f}" if peer else "",
        )
        if arguments.json:  # after each: an interruption costs one
            write_results(arguments.json, rows)
    Console().print(table)
    if arguments.plot:
        plot(rows, arguments.plot)


def plot(rows: list[dict], path: str | pathlib.Path) -> None:
    """Draws time over history, a panel for each chunk; needs matplotlib."""
    from matplotlib.figure import Figure

    names = {"cudnn": "cuDNN, dense BF16", "unmasked": "cuDNN, no mask"}
    chunks = sorted({row["tokens"] for row in rows})
    figure = Figure(figsize=(4.5 * len(chunks), 4), layout="constrained")
    for axes, chunk in zip(figure.subplots(1, len(chunks), squeeze=False)[0], chunks, strict=True):
        here = [row for row in rows if row["tokens"] == chunk]
        for name in dict.fromkeys((row["implementation"], row["method"]) for row in here):
            line = [row for row in here if (row["implementation"], row["method"]) == name]
            line.sort(key=lambda row: row["context"])
            axes.plot(
                [row["context"] - chunk for row in line],
                [row["median_us"] / 1e3 for row in line],
                "--" if line[0]["peer"] else "-",
                marker="o",
                label=names.get(name[0], f"{name[1].upper()} pages"),
            )
        axes.set(title=f"{chunk:,} new tokens", xlabel="tokens of history", ylabel="ms")
        axes.set(ylim=(0, None))
        axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()

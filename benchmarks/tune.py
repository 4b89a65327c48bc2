"""Finds the block sizes of the GPU kernels on this device: every candidate, timed side by side.

    python -m benchmarks.tune --json tune.json

Prints the fastest of each shape; `pallas_kernels/tuning/<device>.json` holds what was chosen.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools

import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from benchmarks import decode_attention, write_kv
from benchmarks.timing import compile_all, time_chain
from pallas_kernels.triton import decode, write
from saw_int4_jax.results import describe_device, write_results

DECODE = [
    decode.Blocks(block_tokens, 16, programs, 64, num_warps, num_stages)
    for block_tokens, num_warps in [(32, 1), (64, 1), (128, 2)]
    for num_stages in (3, 5, 7)
    for programs in (528, 1056, 1584)
]
WRITE = [
    write.Blocks(block_tokens, num_warps)
    for block_tokens, num_warps in itertools.product([16, 32, 64], [1, 2, 4])
]


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--shapes", nargs="*", default=decode_attention.SHAPES)
    arguments.add_argument("--tokens", type=int, nargs="*", default=[64, 2048, 8192])
    arguments.add_argument("--methods", nargs="+", default=["bdr"])
    arguments.add_argument("--length", type=int, default=16, help="calls in one compiled loop")
    arguments.add_argument("--runs", type=int, default=5)
    arguments.add_argument("--jobs", type=int, default=12, help="compilations at a time")
    arguments.add_argument("--json", metavar="FILE")
    arguments = arguments.parse_args()
    timing = dict(length=arguments.length, runs=arguments.runs, window_ms=15)
    heads = dict(kv_heads=8, head_dim=128, page_size=64)

    def time_all(chains: dict) -> list[dict]:
        makers = {blocks: functools.partial(tuple, chain) for blocks, chain in chains.items()}
        programs = compile_all(makers, length=arguments.length, jobs=arguments.jobs)
        return [
            dataclasses.asdict(blocks)
            | time_chain(*chain, chain=programs[blocks].result(), **timing)
            for blocks, chain in chains.items()
        ]

    rows = []
    for method, shape in itertools.product(arguments.methods, arguments.shapes):
        batch, context = map(int, shape.split("x"))
        pages, table = decode_attention.random_pages(
            decode_attention.formats(128)[method], batch=batch, context=context, **heads
        )
        lengths = jnp.full(batch, context, jnp.int32)
        chains = {
            blocks: decode_attention.paged_chain(pages, table, lengths, q_heads=32, blocks=blocks)
            for blocks in DECODE
        }
        about = dict(op="decode_attention", method=method, batch=batch, context=context)
        rows += [about | figures for figures in time_all(chains)]
        del pages, chains
    for method, tokens in itertools.product(arguments.methods, arguments.tokens):
        format = write_kv.formats(128)[method]
        chains = {
            blocks: write_kv.write_chain(format, tokens=tokens, blocks=blocks, **heads)
            for blocks in WRITE
        }
        about = dict(op="write_kv", method=method, tokens=tokens)
        rows += [about | figures for figures in time_all(chains)]

    shapes: dict[tuple, list[dict]] = {}
    for row in rows:
        keys = ("op", "method", "batch", "context", "tokens")
        shapes.setdefault(tuple(row.get(key, "") for key in keys), []).append(row)
    sizes = ("block_tokens", "num_warps", "num_stages", "programs")
    printed = Table("op", "method", "batch", "context", "tokens", *sizes, "µs")
    printed.title = f"fastest block sizes, {describe_device()}"
    for shape, found in shapes.items():
        for row in sorted(found, key=lambda row: row["median_us"])[:3]:
            sizes_of = [str(row.get(size, "")) for size in sizes]
            printed.add_row(*map(str, shape), *sizes_of, f"{row['median_us']:.2f}")
    Console().print(printed)
    if arguments.json:
        write_results(arguments.json, rows)


if __name__ == "__main__":
    main()

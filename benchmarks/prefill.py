"""Chunked prefill over packed pages: time, and its ratio to cuDNN over a dense BF16 cache.

    python -m benchmarks.prefill --json benchmarks/results/h200/prefill.json

A chunk of new tokens attends to itself and to the history before it, causally.
"""

from __future__ import annotations

import argparse
import dataclasses

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from benchmarks.decode_attention import formats, paged_chain, random_pages
from benchmarks.timing import time_chain
from pallas_kernels.triton.attention import Blocks
from saw_int4_jax.results import describe_device, write_results


def cudnn_chain(*, chunk: int, context: int, q_heads: int, kv_heads: int, head_dim: int) -> tuple:
    """What `time_chain` takes: bottom-right causal attention, as a mask that cuDNN knows."""
    keys = jax.random.split(jax.random.key(0), 3)
    q = jax.random.normal(keys[0], (1, chunk, q_heads, head_dim), jnp.bfloat16)
    k, v = (
        jax.random.normal(key, (1, context, kv_heads, head_dim), jnp.bfloat16) for key in keys[1:]
    )

    def step(i, q, data):
        # The queries stand at the end of the keys: as many rows of padding stand before them.
        visible = jnp.arange(context) <= context - chunk + jnp.arange(chunk)[:, None]
        return jax.nn.dot_product_attention(q, *data, mask=visible, implementation="cudnn")

    return step, q, (k, v)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--chunk", type=int, default=2048)
    arguments.add_argument("--history", type=int, nargs="+", default=[0, 16384])
    arguments.add_argument("--q-heads", type=int, default=32)
    arguments.add_argument("--kv-heads", type=int, default=8)
    arguments.add_argument("--head-dim", type=int, default=128)
    arguments.add_argument("--page-size", type=int, default=64)
    arguments.add_argument("--methods", nargs="+", default=["cudnn", "bf16", "int4", "bdr"])
    arguments.add_argument(
        "--blocks", type=int, nargs=4, metavar="N", help="tokens, rows, warps, stages"
    )
    arguments.add_argument("--runs", type=int, default=10)
    arguments.add_argument("--json", metavar="FILE")
    arguments = arguments.parse_args()
    heads = dict(kv_heads=arguments.kv_heads, head_dim=arguments.head_dim)
    blocks = None
    if arguments.blocks:
        block_tokens, block_rows, num_warps, num_stages = arguments.blocks
        blocks = Blocks(block_tokens, block_rows, 1, 1, num_warps, num_stages)

    rows = []
    table = Table("chunk", "history", "method", "µs", "TFLOP/s", "over cuDNN")
    table.title = f"prefill, {describe_device()}"
    for history in arguments.history:
        context = history + arguments.chunk
        pairs = arguments.chunk * (history + (arguments.chunk + 1) / 2)
        flops = 4 * pairs * arguments.q_heads * arguments.head_dim
        peer = None
        for method in arguments.methods:
            if method == "cudnn":
                chain = cudnn_chain(
                    chunk=arguments.chunk, context=context, q_heads=arguments.q_heads, **heads
                )
            else:
                pages, page_table = random_pages(
                    formats(arguments.head_dim)[method],
                    batch=1,
                    context=context,
                    page_size=arguments.page_size,
                    **heads,
                )
                chain = paged_chain(
                    pages,
                    page_table,
                    jnp.array([context], jnp.int32),
                    q_heads=arguments.q_heads,
                    queries=arguments.chunk,
                    blocks=blocks,
                )
            figures = time_chain(*chain, length=8, runs=arguments.runs)
            peer = figures["median_us"] if method == "cudnn" else peer
            rows.append(
                {
                    "op": "prefill",
                    "implementation": "cudnn" if method == "cudnn" else "triton",
                    "method": "bf16" if method == "cudnn" else method,
                    "peer": method == "cudnn",
                    "batch": 1,
                    "tokens": arguments.chunk,
                    "context": context,
                    "q_heads": arguments.q_heads,
                    **heads,
                    "page_size": arguments.page_size,
                    **(dataclasses.asdict(blocks) if blocks else {}),
                    **figures,
                    "tflop_per_s": flops / figures["median_us"] / 1e6,
                }
            )
            table.add_row(
                f"{arguments.chunk:,}",
                f"{history:,}",
                method,
                f"{figures['median_us']:.0f}",
                f"{flops / figures['median_us'] / 1e6:.0f}",
                f"{figures['median_us'] / peer:.2f}" if peer else "",
            )
    Console().print(table)
    if arguments.json:
        write_results(arguments.json, rows)


if __name__ == "__main__":
    main()

"""Writing new tokens to a paged cache: time, rate, and what the rotation adds.

    python -m benchmarks.write_kv --json benchmarks/results/h200/write_kv.json

Bytes are those read (BF16 keys and values) and written (packed rows and scales). Keys and values
come out of the second level cache where they fit, as they do after a projection.
"""

from __future__ import annotations

import argparse
import importlib

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from benchmarks.timing import copies, copy_ceiling, device_kernels, time_chain
from pallas_kernels import PageFormat, init_pages, page_format
from saw_int4_jax.results import describe_device, write_results

LAUNCH_BOUND = 4_000_000  # bytes below which a launch takes longer than the memory


def formats(head_dim: int) -> dict[str, PageFormat]:
    layout, order = page_format.preferred_layout(), page_format.largest_order(head_dim)
    return {
        "bf16": PageFormat("bf16"),
        "int4": PageFormat(layout),
        "bdr": PageFormat(layout, order),
        "bdr + values": PageFormat(layout, order, rotate_v=True),
    }


def write_chain(
    format: PageFormat,
    *,
    tokens: int,
    kv_heads: int,
    head_dim: int,
    page_size: int,
    scattered: bool = False,
    blocks=None,
) -> tuple:
    """What `time_chain` takes: calls of `write_kv`, each a layer further."""
    num_pages = -(-tokens // page_size) + 1
    sizes = dict(num_pages=num_pages, kv_heads=kv_heads, page_size=page_size, head_dim=head_dim)
    one = jax.eval_shape(lambda: init_pages(format, layers=1, **sizes))
    pages = init_pages(format, layers=copies(one.nbytes), **sizes)
    keys = jax.random.split(jax.random.key(0), 3)
    k, v = jax.random.normal(keys[0], (2, tokens, kv_heads, head_dim), jnp.bfloat16)
    slots = jax.random.permutation(keys[1], num_pages)[:, None] * page_size
    slots = (slots + jnp.arange(page_size)).reshape(-1)
    slots = (jax.random.permutation(keys[2], slots) if scattered else slots)[:tokens]

    kernels = importlib.import_module(f"pallas_kernels.{device_kernels()}.write")
    options = {} if blocks is None else {"blocks": blocks}

    def step(i, pages, data):
        return kernels.write_kv(pages, *data, layer=i % pages.layers, **options)

    return step, pages, (k, v, slots.astype(jnp.int32))


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument(
        "--tokens", type=int, nargs="+", default=[1, 16, 64, 256, 2048, 8192], metavar="N"
    )
    arguments.add_argument("--kv-heads", type=int, default=8)
    arguments.add_argument("--head-dim", type=int, default=128)
    on_gpu = jax.default_backend() == "gpu"
    arguments.add_argument("--page-size", type=int, default=64 if on_gpu else 128)
    arguments.add_argument("--scattered", action="store_true", help="no two tokens side by side")
    arguments.add_argument("--methods", nargs="+", default=list(formats(1)))
    arguments.add_argument("--length", type=int, default=32, help="calls in one compiled loop")
    arguments.add_argument("--runs", type=int, default=15)
    arguments.add_argument("--json", metavar="FILE")
    arguments = arguments.parse_args()
    sizes = dict(
        kv_heads=arguments.kv_heads, head_dim=arguments.head_dim, page_size=arguments.page_size
    )
    timing = dict(length=arguments.length, runs=arguments.runs)

    rows = []
    title = f"write_kv, {sizes['kv_heads']} heads of {sizes['head_dim']}, {describe_device()}"
    table = Table("tokens", "method", "MB", "µs", "GB/s", "% of copy", "over int4", title=title)
    for tokens in arguments.tokens:
        plain = None
        for method in arguments.methods:
            format = formats(sizes["head_dim"])[method]
            chain = write_chain(format, tokens=tokens, scattered=arguments.scattered, **sizes)
            figures = time_chain(*chain, **timing)
            vectors = 2 * tokens * sizes["kv_heads"]
            stored = 2 * sizes["head_dim"] if method == "bf16" else sizes["head_dim"] / 2 + 4
            size = int(vectors * (2 * sizes["head_dim"] + stored))
            ceiling = copy_ceiling(size, **timing) if size >= LAUNCH_BOUND else None
            rate = size / figures["median_us"] / 1e3
            plain = figures["median_us"] if method == "int4" else plain
            rows.append(
                {
                    "op": "write_kv",
                    "implementation": device_kernels(),
                    "method": method.split()[0],
                    "order": format.order,
                    "rotate_v": format.rotate_v,
                    "tokens": tokens,
                    **sizes,
                    **figures,
                    "bytes": size,
                    "gb_per_s": rate,
                    **(
                        {"ceiling_gb_per_s": ceiling, "fraction_of_ceiling": rate / ceiling}
                        if ceiling
                        else {}
                    ),
                }
            )
            table.add_row(
                f"{tokens:,}",
                method,
                f"{size / 1e6:.2f}",
                f"{figures['median_us']:.2f}",
                f"{rate:.0f}",
                f"{rate / ceiling:.0%}" if ceiling else "",
                f"{figures['median_us'] / plain - 1:+.1%}" if plain else "",
            )
    Console().print(table)
    if arguments.json:
        write_results(arguments.json, rows)


if __name__ == "__main__":
    main()

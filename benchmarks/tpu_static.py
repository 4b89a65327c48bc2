"""What the TPU compiler says of the kernels: instruction counts and memory, with no TPU at hand.

    python benchmarks/tpu_static.py --chips v5e v6e tpu7x --results benchmarks/results

Needs `libtpu` on x86-64 Linux; one kernel per process, since the compiler's profiler may abort.
Nothing here ran. Per kernel:

- `bundles`: instruction words that the core issues, each loop times its trips, waits for copies
  not counted. A word takes at least a cycle.
- `bytes`: what must cross the memory bus: for attention the pages, for writing the tokens' rows
  and scales.
- `margin`: cycles that the memory needs for `bytes`, over `bundles`. Above 1 the kernel is bound
  by memory, by this estimate. It takes bandwidth and clock from `CHIPS`.
- `cycles`: the compiler's own estimate, with its model of copies, which overlaps them little.
  Missing where its profiler fails: on v5e, and on v6e with some versions of `libtpu`.
- `libtpu`: the compiler's version; instruction counts differ by a tenth between versions.
- `vmem_bytes` and `temp_bytes`: the most on-chip memory of one kernel; temporaries of the program.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.metadata
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

# HBM bandwidth in byte/s of what JAX calls a device (on tpu7x, half a chip), and the clock in Hz
# that follows from the published bfloat16 FLOP/s and the size of the matrix units.
CHIPS = {"v5e": (819e9, 1.5e9), "v6e": (1640e9, 1.75e9), "tpu7x": (3690e9, 2.2e9)}
FOLDERS = {"v5e": "tpu_v5e", "v6e": "tpu_v6e", "tpu7x": "tpu7x"}
METHODS = {
    "bf16": dict(layout="bf16", order=1),
    "int4": dict(layout="paired", order=1),
    "bdr": dict(layout="paired", order=128),
}


@dataclasses.dataclass(frozen=True)
class Case:
    op: str
    method: str = "bdr"
    batch: int = 1
    context: int = 0
    tokens: int = 1
    rotate_v: bool = False
    q_heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    page_size: int = 128
    float8: bool = False
    peer: bool = False


def all_cases(chip: str) -> list[Case]:
    attention = [
        Case("decode_attention", method, batch, context)
        for batch, context in ((2, 4096), (8, 8192))
        for method in METHODS
    ]
    attention.append(Case("decode_attention", "bdr", 8, 8192, rotate_v=True))
    attention += [Case("decode_attention", "bdr", 8, 8192, page_size=size) for size in (64, 32, 16)]
    attention += [Case("prefill", method, 1, 8192, tokens=256) for method in METHODS]
    if chip == "tpu7x":
        decode = [Case("decode_attention", method, 8, 8192, float8=True) for method in METHODS]
        attention += [*decode[1:], Case("prefill", "bdr", 1, 8192, tokens=256, float8=True)]
    writes = [
        Case("write_kv", method, tokens=tokens) for tokens in (8, 64, 512) for method in METHODS
    ]
    peers = [
        Case("decode_attention", method, 8, 8192, peer=True)
        for method in ("jax_paged_attention_int8", "jax_ragged_paged_attention_bf16")
    ]
    return attention + writes + peers


def pages_of(case: Case):
    """The shapes of a pool of 20 layers: none of its arrays fits in on-chip memory."""
    import jax

    from pallas_kernels import PageFormat, init_pages

    options = METHODS[case.method]
    format = PageFormat(options["layout"], options["order"], case.rotate_v)
    sizes = dict(kv_heads=case.kv_heads, page_size=case.page_size, head_dim=case.head_dim)
    num_pages = max(1 << 17, case.batch * case.context) // case.page_size
    return jax.eval_shape(lambda: init_pages(format, layers=20, num_pages=num_pages, **sizes))


# --- One kernel, in a process of its own -----------------------------------------------------


def compile_case(chip: str, case: Case):
    import jax
    import jax.numpy as jnp

    from pallas_kernels.mosaic_tpu import attention, write
    from tests import tpu_aot

    def array(shape, dtype):
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))

    if case.peer:
        return tpu_aot.compile_for(chip, *peer_call(case))
    pages = pages_of(case)
    scalar = array((), "int32")
    if case.op == "write_kv":
        token = array((case.tokens, case.kv_heads, case.head_dim), "bfloat16")
        return tpu_aot.compile_for(
            chip,
            lambda pages, k, v, slots, layer: write.write_kv(pages, k, v, slots, layer=layer),
            *(pages, token, token, array((case.tokens,), "int32"), scalar),
            donate_argnums=0,
        )
    max_pages = case.context // case.page_size
    chosen = attention.choose_sizes(case.tokens, case.q_heads, pages, max_pages)

    def call(q, pages, table, lengths, layer):
        return attention.paged_attention(
            q,
            pages,
            table,
            lengths,
            layer=layer,
            query_lengths=lengths,
            causal=True,
            scale=case.head_dim**-0.5,
            window=None,
            soft_cap=None,
            sinks=None,
            static_blocks=case.context // chosen.block,
            float8=case.float8,
        )

    return tpu_aot.compile_for(
        chip,
        call,
        array((case.batch, case.tokens, case.q_heads, case.head_dim), "bfloat16"),
        pages,
        array((case.batch, max_pages), "int32"),
        array((case.batch,), "int32"),
        scalar,
    )


def peer_call(case: Case):
    """A kernel that comes with JAX, and the shapes it is called with."""
    import jax
    import jax.numpy as jnp
    from jax.experimental.pallas.ops.tpu import paged_attention, ragged_paged_attention
    from jax.experimental.pallas.ops.tpu.paged_attention import quantization_utils

    def array(shape, dtype):
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))

    max_pages = case.context // case.page_size
    num_pages = case.batch * max_pages
    lengths = array((case.batch,), "int32")
    table = array((case.batch, max_pages), "int32")
    q = array((case.batch, case.q_heads, case.head_dim), "bfloat16")
    if case.method == "jax_ragged_paged_attention_bf16":
        kv = array((num_pages, case.page_size, 2 * case.kv_heads, case.head_dim), "bfloat16")
        queries, sequences = array((case.batch + 1,), "int32"), array((1,), "int32")
        call = functools.partial(
            ragged_paged_attention.ragged_paged_attention,
            num_kv_pages_per_block=8,
            num_queries_per_block=8,
        )
        return call, q, kv, lengths, table, queries, sequences
    shape = (case.kv_heads, num_pages, case.page_size)
    pages = quantization_utils.QuantizedTensor(
        weight=array((*shape, case.head_dim), "int8"), scales=array((*shape, 1), "float32")
    )

    def call(q, k, v, lengths, table):
        return paged_attention.paged_attention(q, k, v, lengths, table, pages_per_compute_block=8)

    return call, q, pages, pages, lengths, table


def measure(chip: str, case: Case) -> None:
    compiled = compile_case(chip, case)
    sizes = re.findall(r'used_scoped_memory_configs.*?"size":"(\d+)"', compiled.as_text())
    memory = compiled.memory_analysis()
    row = dict(
        vmem_bytes=max(map(int, sizes), default=0),
        temp_bytes=memory.temp_size_in_bytes,
        libtpu=importlib.metadata.version("libtpu"),
    )
    print("ROW", json.dumps(row))


# --- Reading what the compiler leaves behind -------------------------------------------------


def run(chip: str, case: Case, flags: str) -> subprocess.CompletedProcess:
    from tests.tpu_aot import ENVIRONMENT

    command = [sys.executable, __file__, "--one", chip, json.dumps(dataclasses.asdict(case))]
    environment = {**os.environ, **ENVIRONMENT, "JAX_PLATFORMS": "cpu", "LIBTPU_INIT_ARGS": flags}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def words_by_loop(listing: str, depth: int) -> tuple[list[int], list[int]]:
    """Instruction words of a kernel: by loop depth outside, and of each loop at `depth`, in order.

    A word is a line such as `0x5a LB: >> { … }`: `>` for each loop around it, LB where one begins.
    """
    outside, loops = [0] * (depth + 1), []
    for line in listing.splitlines():
        match = re.match(r"\s*(?:0x[0-9a-f]+|0)\s+(\w\w)?\s*:\s*(>*)\s*\{", line)
        if not match:
            continue
        label, at = match[1], len(match[2])
        if at == depth and label == "LB":
            loops.append(0)
        # A loop may be listed in pieces: what is as deep belongs to the last that began.
        if at >= depth and loops:
            loops[-1] += 1
        else:
            outside[min(at, depth)] += 1
    return outside, loops


def count_bundles(listing: str, case: Case) -> int | None:
    """Instruction words issued; `None` if the listing has other loops than expected."""
    if case.op == "write_kv":
        from pallas_kernels.mosaic_tpu.write import BLOCK_TOKENS, TILE_TOKENS

        blocks = -(-case.tokens // BLOCK_TOKENS)
        depth = 1 if blocks == 1 else 2
        outside, loops = words_by_loop(listing, depth)
        run = case.tokens >= BLOCK_TOKENS  # a prefill fills whole units
        tiles = case.tokens // TILE_TOKENS if run else case.tokens
        chunks = case.tokens // case.page_size if run else case.tokens
        trips = [case.tokens, tiles, tiles, chunks, chunks][: 3 if case.method == "bf16" else 5]
        if len(loops) != len(trips):
            return None
        once = outside[0] + sum(outside[1:]) * blocks
        return once + sum(words * trip for words, trip in zip(loops, trips, strict=True))
    outside, loops = words_by_loop(listing, 2)
    items, blocks = static_trips(case)
    return outside[0] + outside[1] * items + (outside[2] + sum(loops)) * blocks


def static_trips(case: Case) -> tuple[int, int]:
    """Items of the attention's grid, and blocks of pages of all items."""
    from pallas_kernels.mosaic_tpu import attention

    max_pages = case.context // case.page_size
    chosen = attention.choose_sizes(case.tokens, case.q_heads, pages_of(case), max_pages)
    items = case.batch * -(-case.tokens // chosen.tile)
    return items, items * (case.context // chosen.block)


def bytes_moved(case: Case) -> int:
    vector_pair = 4 * case.head_dim if case.method == "bf16" else case.head_dim + 8
    tokens = case.tokens if case.op == "write_kv" else case.batch * case.context
    return tokens * case.kv_heads * vector_pair


def row_of(chip: str, case: Case) -> dict:
    row = dict(
        op="tpu_static",
        kernel=case.op,
        chip=chip,
        implementation="jax" if case.peer else "mosaic_tpu",
        **{k: v for k, v in dataclasses.asdict(case).items() if k != "op"},
    )
    with tempfile.TemporaryDirectory() as folder:
        done = run(chip, case, f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true")
        found = re.search(r"^ROW (.*)$", done.stdout, re.MULTILINE)
        if not found:
            error = [line for line in done.stderr.splitlines() if "Error" in line][-1:]
            return {**row, "error": (error or done.stderr.splitlines()[-1:])[0][:300]}
        row |= json.loads(found[1])
        names = [f"*{name}*final_bundles.txt" for name in ("paged_attention_", "write_kv_")]
        listings = [
            path
            for name in names
            for path in pathlib.Path(folder).glob(name)
            if "schedule" not in path.name
        ]
        if listings and not case.peer:
            row["bundles"] = count_bundles(listings[0].read_text(), case)
    if case.peer:
        return row
    row["bytes"] = bytes_moved(case)
    if row.get("bundles"):
        bandwidth, clock = CHIPS[chip]
        row["bytes_per_bundle"] = round(row["bytes"] / row["bundles"], 1)
        row["memory_cycles"] = round(row["bytes"] / bandwidth * clock)
        row["margin"] = round(row["memory_cycles"] / row["bundles"], 2)
    if case.op != "write_kv":  # whose loops have no static trips
        with tempfile.TemporaryDirectory() as folder:
            run(chip, case, f"--xla_jf_dump_static_llo_profile_to={folder}")
            for path in pathlib.Path(folder).rglob("*paged_attention_*"):
                row["cycles"] = int(re.search(r"estimated_cycles\D*(\d+)", path.read_text())[1])
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chips", nargs="+", choices=CHIPS, default=list(CHIPS))
    parser.add_argument("--results", metavar="FOLDER", help="write FOLDER/<chip>/FILE")
    parser.add_argument("--file", default="static.json")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        chip, case = arguments.one
        measure(chip, Case(**json.loads(case)))
        return

    from saw_int4_jax.results import write_results

    for chip in arguments.chips:
        rows = []
        for case in all_cases(chip):
            rows.append(row_of(chip, case))
            print(json.dumps(rows[-1]), flush=True)
        if arguments.results:
            write_results(pathlib.Path(arguments.results) / FOLDERS[chip] / arguments.file, rows)


if __name__ == "__main__":
    main()

"""Decode step on several devices: tensor and data parallel against one, and where the time goes.

    python -m benchmarks.parallel_decode --json benchmarks/results/h200-x2/parallel_decode.json

Runs `saw_int4_jax.decode`, the loop that users run, with all layers of the model, random weights
and random pages made on the devices. Where the pages of all layers do not fit one device, several
layers read and write the same: a layer's are far more than a chip's own caches hold, so nothing is
saved but memory. The split is found by leaving pieces out: attention (with the norms, RoPE and the
write before it) is what a model without it saves, collectives are what a model without attention
takes longer on the devices than its share, a narrower model, takes on one.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import fcntl
import functools
import itertools
import os
import time
import unittest.mock
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from rich.console import Console
from rich.table import Table

from benchmarks.decode_step import parameter_shapes
from benchmarks.timing import figures
from pallas_kernels import Pages, page_format
from saw_int4_jax import Cache, CacheSpec, attend, cache, decode, init_cache
from saw_int4_jax.cache import DATA, ROWS, cache_shardings
from saw_int4_jax.demo import METHOD_OPTIONS
from saw_int4_jax.generate import RUNNING, DecodeState, Forward
from saw_int4_jax.models.configs import CONFIGS
from saw_int4_jax.models.llama import LlamaConfig, one_layer_forward
from saw_int4_jax.results import describe_device, write_results
from saw_int4_jax.sharding import make_mesh, param_shardings

NO_ATTENTION = "none"


@dataclasses.dataclass(frozen=True)
class Program:
    """One compiled loop: what runs where. `method` may be `NO_ATTENTION`."""

    parallel: str  # one, tensor, data; share: one device's part of tensor
    method: str
    batch: int


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """What all programs have in common."""

    config: LlamaConfig
    devices: int
    page_size: int
    pool_tokens: int
    max_length: int
    steps: int
    memory: float  # bytes of a device

    def model_config(self, program: Program) -> LlamaConfig:
        if program.parallel != "share":
            return self.config
        widths = "vocab_size", "mlp_dim", "num_heads", "num_kv_heads"
        return dataclasses.replace(
            self.config, **{name: getattr(self.config, name) // self.devices for name in widths}
        )

    def mesh(self, parallel: str) -> Mesh:
        count = self.devices if parallel in ("tensor", "data") else 1
        pools = count if parallel == "data" else 1
        kv_heads = self.config.num_kv_heads
        return make_mesh(kv_heads, data=pools, devices=jax.devices()[:count])

    def spec(self, program: Program) -> CacheSpec:
        """The pool: of as many layers as fit one device beside the weights, at most all."""
        method = "int4" if program.method == NO_ATTENTION else program.method
        options = dict(page_size=self.page_size, **METHOD_OPTIONS[method])
        config = self.model_config(program)
        spec = config.cache_spec(self.pool_tokens // self.page_size, **options)
        layer_bytes = spec.bytes_per_token * self.pool_tokens / config.num_layers
        room = self.memory - 2 * weight_count(self.config)
        layers = 1 if program.method == NO_ATTENTION else int(room // layer_bytes)
        return dataclasses.replace(spec, layers=max(1, min(layers, config.num_layers)))

    def lower(self, program: Program) -> jax.stages.Lowered:
        forward, variables, state = shapes_of(self, program)
        attention = no_attention if program.method == NO_ATTENTION else attend_in_turn
        with unittest.mock.patch.object(cache, "attend", attention):
            return decode.lower(
                forward, variables, state, num_steps=self.steps, eos=np.zeros(0, np.int32)
            )


def attend_in_turn(cache: Cache, layer: jax.Array, *args, **options):
    """`attend`, where layers past those of the pool begin with its first again."""
    return attend(cache, layer % cache.pages.layers, *args, **options)


def no_attention(cache: Cache, layer: jax.Array, q, k, v, **options):
    """In place of `attend`. Takes keys and values, or their projections would be left out too."""
    del layer, options
    return q + jnp.repeat(k + v, q.shape[2] // k.shape[2], axis=2), cache


@functools.cache
def weight_shapes(config: LlamaConfig) -> Any:
    return parameter_shapes(config, jnp.bfloat16)


def weight_count(config: LlamaConfig) -> int:
    return sum(x.size for x in jax.tree.leaves(weight_shapes(config)))


def place_weights(config: LlamaConfig, mesh: Mesh) -> Any:
    """Shapes of a model's parameters in bfloat16, as they lie on a mesh."""
    shapes = weight_shapes(config)
    return jax.tree.map(
        lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at),
        shapes,
        param_shardings(shapes, mesh),
    )


@functools.cache
def shapes_of(benchmark: Benchmark, program: Program) -> tuple[Forward, Any, DecodeState]:
    """The model, and shapes of its parameters and its state as they lie on the mesh."""
    config, mesh = benchmark.model_config(program), benchmark.mesh(program.parallel)
    # Not the cached one: what it has traced has its attention in it.
    forward = one_layer_forward.__wrapped__(config, jnp.bfloat16)
    length = benchmark.max_length
    cache = jax.eval_shape(
        lambda: init_cache(benchmark.spec(program), program.batch, length, mesh=mesh)
    )
    shardings = cache_shardings(cache, mesh)
    cache = jax.tree.map(
        lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), cache, shardings
    )
    row = jax.ShapeDtypeStruct((program.batch,), jnp.int32, sharding=NamedSharding(mesh, ROWS))
    return forward, place_weights(config, mesh), DecodeState(cache, row, row, row)


# --- Weights and pages, made where they are to lie ---------------------------------------------


def hashed(shape: tuple[int, ...]) -> jax.Array:
    """24 bits of a hash of each place: random enough, and needs no memory beside the result."""
    primes = 83492791, 73856093, 19349663, 2971215073, 433494437, 28657
    places = [
        jax.lax.broadcasted_iota(jnp.uint32, shape, i) * np.uint32(primes[i])
        for i in range(len(shape))
    ]
    mixed = sum(places) * np.uint32(2654435761)
    return (mixed ^ (mixed >> 15)) >> 8


@functools.cache
def maker(shape: tuple[int, ...], dtype: Any, sharding: NamedSharding, layout: str) -> Callable:
    """A compiled function without arguments that makes one array."""

    def make():
        match layout:
            case "weight":
                return (hashed(shape).astype(jnp.float32) * (0.08 / 2**24) - 0.04).astype(dtype)
            case "scales":
                word = page_format.join_scales(jnp.float32(0.125), jnp.float32(-1.0))
                return jnp.full(shape, word)
            case "bf16":  # bits with the exponents of numbers in (-2, 2)
                data = hashed(shape).astype(dtype)
                return data & 0x3FFF | (data << 1 & 0x8000)
        return hashed(shape).astype(dtype)

    return jax.jit(make, out_shardings=sharding)


def random_weights(shapes: Any) -> Any:
    return jax.tree.map(lambda x: maker(x.shape, x.dtype, x.sharding, "weight")(), shapes)


def random_pages(shapes: Pages) -> Pages:
    data, scales = shapes.data, shapes.scales
    made = maker(data.shape, data.dtype, data.sharding, shapes.format.layout)()
    if scales is not None:
        scales = maker(scales.shape, scales.dtype, scales.sharding, "scales")()
    return dataclasses.replace(shapes, data=made, scales=scales)


def filled_state(cache: Cache, pages: Pages, context: int, steps: int) -> DecodeState:
    """Sequences of `context` tokens on permuted pages, with room for `steps` more."""
    pools = cache.mesh.shape[DATA]
    batch, max_pages = cache.page_table.shape
    pool_pages, pool_batch = cache.pages.num_pages // pools, batch // pools
    held, needed = (-(-n // cache.pages.page_size) for n in (context, context + steps))
    if pool_batch * needed > pool_pages or needed > max_pages:
        raise ValueError(f"Expected {batch=} of {context=} to fit the pool")
    rng = np.random.default_rng(0)
    table = np.full((batch, max_pages), -1, np.int32)
    free, used = np.zeros((pools, pool_pages), np.int32), pool_batch * held
    references = np.zeros((pools, pool_pages), np.int32)
    for pool in range(pools):
        order = rng.permutation(pool_pages)
        rows = slice(pool * pool_batch, (pool + 1) * pool_batch)
        table[rows, :held] = order[:used].reshape(pool_batch, held)
        references[pool, order[:used]] = 1
        free[pool, : pool_pages - used] = order[used:]
    arrays = dataclasses.replace(
        cache,
        pages=pages,
        page_table=table,
        lengths=np.full(batch, context, np.int32),
        new_tokens=np.zeros(batch, np.int32),
        references=references.ravel(),
        free_pages=free.ravel(),
        num_free=np.full(pools, pool_pages - used, np.int32),
    )
    cache = jax.device_put(arrays, cache_shardings(cache, cache.mesh))
    rows = np.zeros(batch, np.int32), np.full(batch, 1 << 30, np.int32), np.full(batch, RUNNING)
    sharding = NamedSharding(cache.mesh, ROWS)
    return DecodeState(cache, *(jax.device_put(x.astype(np.int32), sharding) for x in rows))


# --- Timing -------------------------------------------------------------------------------------


def time_loop(compiled, variables, state: DecodeState, steps: int, runs: int) -> tuple[dict, Pages]:
    """Microseconds of a step, from `runs` loops after one to warm up; the pages come back."""
    times = []
    eos = np.zeros(0, np.int32)
    for _ in range(runs + 1):
        jax.block_until_ready(state)
        start = time.perf_counter()
        state, tokens = compiled(variables, state, eos=eos)
        jax.block_until_ready(tokens)
        times.append((time.perf_counter() - start) / steps * 1e6)
    if (np.asarray(tokens) < 0).any():
        raise RuntimeError("Expected every sequence to run to the end")
    return figures(times[1:]), state.cache.pages


def programs(arguments: argparse.Namespace, batch: int) -> list[Program]:
    """All that one batch needs; the pieces that are only for the split last."""
    parallels = [p for p in arguments.parallel if p != "data" or batch % arguments.devices == 0]
    whole = itertools.product(parallels, [*arguments.methods, NO_ATTENTION])
    found = [Program(parallel, method, batch) for parallel, method in whole]
    if "tensor" in parallels:
        found.append(Program("share", NO_ATTENTION, batch))
    return found


def rows_of(
    benchmark: Benchmark,
    times: dict[tuple[Program, int], dict],
    arguments: argparse.Namespace,
) -> list[dict[str, Any]]:
    """A row for each whole program, with its split where that was timed."""
    rows = []
    for (program, context), timed in times.items():
        if program.method == NO_ATTENTION:
            continue
        parallel, step = program.parallel, timed["median_us"]
        _, variables, state = shapes_of(benchmark, program)
        bare, share = (
            times.get((Program(p, NO_ATTENTION, program.batch), context), {}).get("median_us")
            for p in (parallel, "share" if parallel == "tensor" else parallel)
        )
        split = {}
        if bare is not None:
            split["attention_us"] = step - bare
        if bare is not None and share is not None:
            split |= {"matmuls_us": share, "collectives_us": bare - share}
        rows.append(
            {
                "op": "parallel_decode",
                "model": arguments.model,
                "method": program.method,
                "parallel": parallel,
                "devices": state.cache.mesh.size,
                "batch": program.batch,
                "context": context,
                "page_size": benchmark.page_size,
                "layers": benchmark.config.num_layers,
                "pool_layers": state.cache.pages.layers,
                **timed,
                **split,
                "tokens_per_s": program.batch / step * 1e6,
                "steps": benchmark.steps,
                "xla_flags": os.environ.get("XLA_FLAGS", ""),
                "weight_bytes_per_device": bytes_per_device(variables),
                "pool_bytes_per_device": bytes_per_device(state.cache.pages),
            }
        )
    return rows


def bytes_per_device(shapes: Any) -> int:
    return sum(
        int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize
        for x in jax.tree.leaves(shapes)
    )


def compile_all(benchmark: Benchmark, wanted: list[Program], workers: int) -> dict[Program, Any]:
    """The compiled loops; lowering is one thread's work, compiling many's."""
    started = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(workers) as executor:
        futures = {program: executor.submit(benchmark.lower(program).compile) for program in wanted}
        print(f"{len(futures)} programs lowered after {time.monotonic() - started:.0f} s")
        compiled = {program: future.result() for program, future in futures.items()}
    print(f"compiled after {time.monotonic() - started:.0f} s", flush=True)
    return compiled


def time_all(
    benchmark: Benchmark, compiled: dict[Program, Any], arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    """Rows of all programs, with one set of weights and one pool at a time."""
    started = time.monotonic()
    growth = benchmark.max_length - max(arguments.context)
    order = ["one", "tensor", "share", "data"]
    wanted = sorted(compiled, key=lambda p: (order.index(p.parallel), p.method))
    times: dict[tuple[Program, int], dict] = {}
    rows: list[dict[str, Any]] = []
    for _, group in itertools.groupby(wanted, lambda p: p.parallel):
        variables = None
        for _, same_pool in itertools.groupby(group, lambda p: p.method):
            pages = None
            for program in same_pool:
                _, shapes, state = shapes_of(benchmark, program)
                variables = variables or random_weights(shapes)
                pages = pages or random_pages(state.cache.pages)
                for context in arguments.context:
                    if program.batch * context > arguments.pool_tokens:
                        continue
                    if time.monotonic() - started > arguments.seconds:
                        continue
                    filled = filled_state(state.cache, pages, context, growth)
                    timed, pages = time_loop(
                        compiled[program], variables, filled, benchmark.steps, arguments.runs
                    )
                    del filled
                    times[program, context] = timed
                    print(program, context, f"{timed['median_us']:.0f} us", flush=True)
            del pages
            rows = rows_of(benchmark, times, arguments)
            if arguments.json:
                write_results(arguments.json, rows)
        del variables
    return rows


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--model", default="Qwen3-8B", choices=CONFIGS)
    arguments.add_argument("--devices", type=int, default=len(jax.devices()))
    choices = ["one", "tensor", "data"]
    arguments.add_argument("--parallel", nargs="+", choices=choices, default=choices)
    arguments.add_argument("--batch", type=int, nargs="+", default=[64, 256, 1])
    arguments.add_argument("--context", type=int, nargs="+", default=[4096, 16384])
    methods = list(METHOD_OPTIONS)
    arguments.add_argument("--methods", nargs="+", choices=methods, default=methods)
    arguments.add_argument("--pool-tokens", type=int, default=1 << 20, help="in all pools")
    arguments.add_argument("--steps", type=int, default=16)
    arguments.add_argument("--runs", type=int, default=3)
    arguments.add_argument("--page-size", type=int, default=64)
    arguments.add_argument("--memory-gb", type=float, help="of a device; default: what it says")
    arguments.add_argument("--workers", type=int, default=16, help="that compile")
    arguments.add_argument(
        "--lock", metavar="FILE", help="of programs side by side: each is timed alone"
    )
    arguments.add_argument("--seconds", type=float, default=1e9, help="start nothing after that")
    arguments.add_argument("--json", metavar="FILE")
    arguments = arguments.parse_args()
    lock = share_lock(arguments.lock)

    memory = (jax.devices()[0].memory_stats() or {}).get("bytes_limit", 1e12)
    if arguments.memory_gb is not None:
        memory = arguments.memory_gb * 1e9
    growth = arguments.steps * (arguments.runs + 2)
    unit = arguments.page_size * arguments.devices
    slack = max(arguments.batch) * (growth + arguments.page_size)
    benchmark = Benchmark(
        config=CONFIGS[arguments.model],
        devices=arguments.devices,
        page_size=arguments.page_size,
        pool_tokens=-(-(arguments.pool_tokens + slack) // unit) * unit,
        max_length=max(arguments.context) + growth,
        steps=arguments.steps,
        memory=memory - 3e9,  # for what a step needs besides
    )
    wanted = [p for batch in arguments.batch for p in programs(arguments, batch)]
    compiled = compile_all(benchmark, wanted, arguments.workers)
    wait_for_turn(lock)
    rows = time_all(benchmark, compiled, arguments)
    Console(width=160).print(table_of(rows, arguments.model))


def share_lock(path: str | None) -> int | None:
    """Says that this program compiles: others that wait for their turn wait for it."""
    if path is None:
        return None
    lock = os.open(path, os.O_RDWR | os.O_CREAT)
    fcntl.flock(lock, fcntl.LOCK_SH)
    return lock


def wait_for_turn(lock: int | None) -> None:
    """Returns when no other program compiles or is timed; none is until this one ends."""
    if lock is not None:
        fcntl.flock(lock, fcntl.LOCK_EX)


def table_of(rows: list[dict], model: str) -> Table:
    pieces = "attention", "matmuls", "collectives"
    head = ["batch", "context", "cache", "devices", "pool layers", "ms", *pieces, "tokens/s"]
    table = Table(*head, title=f"parallel decode, {model}, {describe_device()}")
    for row in rows:
        split = (row.get(f"{name}_us") for name in pieces)
        table.add_row(
            str(row["batch"]),
            f"{row['context']:,}",
            row["method"].upper(),
            f"{row['devices']} {row['parallel']}",
            str(row["pool_layers"]),
            f"{row['median_us'] / 1e3:.2f}",
            *("" if piece is None else f"{piece / 1e3:.2f}" for piece in split),
            f"{row['tokens_per_s']:,.0f}",
        )
    return table


if __name__ == "__main__":
    main()

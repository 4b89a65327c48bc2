"""Decode step of a whole model: compile time, step time and memory over batch and context.

    python -m benchmarks.decode_step --json benchmarks/results/cpu/decode_step.json
    python -m benchmarks.decode_step --model Qwen3-8B --dtype bfloat16 --page-size 64 --steps 64 \
        --batch 1 8 32 64 128 256 --context 1024 4096 16384 --trace 8 --runs 2 \
        --json benchmarks/results/h200/decode_step.json --plot decode_step.png

Runs `saw_int4_jax.decode`, the jitted loop that users run, with random weights and a cache filled
with random codes through a permuted page table. Step time is that of one loop over its steps. One
program serves all contexts of a batch, its pool made for the longest that fits the memory.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import functools
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from pallas_kernels import Pages, page_format
from pallas_kernels.implementation import KERNELS
from saw_int4_jax import CacheSpec, decode, init_cache
from saw_int4_jax.demo import METHOD_OPTIONS, REFERENCE_MODEL
from saw_int4_jax.generate import RUNNING, DecodeState
from saw_int4_jax.models.configs import CONFIGS
from saw_int4_jax.models.hugging_face import read_config
from saw_int4_jax.models.llama import Llama
from saw_int4_jax.results import describe_device, write_results

EOS = jnp.zeros(0, jnp.int32)


@functools.partial(jax.jit, static_argnums=0)
def random_pages(spec: CacheSpec) -> Pages:
    """The cache's pages, of random tokens."""
    pages = jax.eval_shape(spec.init_pages)
    data = jax.random.bits(jax.random.key(0), pages.data.shape, pages.data.dtype)
    if pages.scales is None:  # bfloat16 bits with the exponents of numbers in (-2, 2)
        return dataclasses.replace(pages, data=data & 0xBFFF)
    word = page_format.join_scales(jnp.float32(0.125), jnp.float32(-1.0))
    scales = jnp.full(pages.scales.shape, word)
    return dataclasses.replace(pages, data=data, scales=scales)


def random_state(spec: CacheSpec, pages: Pages, batch: int, context: int) -> DecodeState:
    """`batch` sequences that each hold `context` tokens of `pages`, permuted."""
    held = -(-context // spec.page_size)
    used = batch * held
    longest = spec.num_pages * spec.page_size // batch
    cache = jax.eval_shape(lambda: init_cache(spec, batch, longest))
    order = np.random.default_rng(0).permutation(spec.num_pages).astype(np.int32)
    table = np.full(cache.page_table.shape, -1, np.int32)
    table[:, :held] = order[:used].reshape(batch, held)
    references = np.zeros(spec.num_pages, np.int32)
    references[order[:used]] = 1
    cache = dataclasses.replace(
        cache,
        pages=pages,
        page_table=jnp.asarray(table),
        lengths=jnp.asarray(np.full(batch, context, np.int32)),
        new_tokens=jnp.asarray(np.zeros(batch, np.int32)),
        references=jnp.asarray(references),
        free_pages=jnp.asarray(np.roll(order, -used)),
        num_free=jnp.asarray(spec.num_pages - used, jnp.int32),
    )
    return DecodeState(
        cache=cache,
        tokens=jnp.asarray(np.zeros(batch, np.int32)),
        remaining=jnp.asarray(np.full(batch, 2**30, np.int32)),
        finish=jnp.asarray(np.full(batch, RUNNING, np.int32)),
    )


def compile_loop(
    model: Llama, variables, spec: CacheSpec, batch: int, steps: int
) -> jax.stages.Compiled:
    """Compiles `decode` for caches of a spec."""
    pages = jax.eval_shape(spec.init_pages)
    state = jax.eval_shape(lambda pages: random_state(spec, pages, batch, 1), pages)
    return decode.lower(model.apply, variables, state, num_steps=steps, eos=EOS).compile()


def run(compiled: jax.stages.Compiled, variables, state: DecodeState) -> tuple[DecodeState, float]:
    """Runs the loop once: the state after it, and seconds."""
    jax.block_until_ready(state)
    start = time.perf_counter()
    state, tokens = compiled(variables, state, eos=EOS)
    jax.block_until_ready(tokens)
    return state, time.perf_counter() - start


def measure(
    compiled: jax.stages.Compiled, variables, state: DecodeState, *, steps: int, runs: int
) -> tuple[DecodeState, dict[str, Any]]:
    """Times of one step, over `runs` loops after one to warm up."""
    state, _ = run(compiled, variables, state)
    times = []
    for _ in range(runs):
        state, seconds = run(compiled, variables, state)
        times.append(seconds / steps * 1e6)
    median = statistics.median(times)
    batch = state.cache.batch
    return state, {
        "median_us": median,
        "min_us": min(times),
        "max_us": max(times),
        "runs": runs,
        "steps": steps,
        "tokens_per_s": batch / median * 1e6,
        "raw_us": times,
    }


def trace(
    compiled: jax.stages.Compiled, variables, state: DecodeState, *, steps: int
) -> tuple[DecodeState, dict[str, Any]]:
    """What ran on the GPU in a step: how many kernels, how long they took, and the longest."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            state, _ = run(compiled, variables, state)
        [file] = pathlib.Path(folder).rglob("*.xplane.pb")
        profile = jax.profiler.ProfileData.from_file(str(file))
    count: collections.Counter[str] = collections.Counter()
    nanoseconds: collections.Counter[str] = collections.Counter()
    for plane in profile.planes:
        if not plane.name.startswith("/device:GPU"):
            continue
        for line in plane.lines:
            if line.name.startswith("Stream"):
                for event in line.events:
                    count[event.name] += 1
                    nanoseconds[event.name] += event.duration_ns
    return state, {
        "kernels": sum(count.values()) / steps,
        "kernel_us": sum(nanoseconds.values()) / steps / 1e3,
        "longest_kernels_us": {
            f"{name} x {count[name] / steps:.0f}": round(time / steps / 1e3, 1)
            for name, time in nanoseconds.most_common(20)
        },
    }


def fitting_contexts(
    spec: Callable[[int], CacheSpec], batch: int, contexts: list[int], taken: int
) -> list[int]:
    """Those whose pages find room beside `taken` bytes, if the device says how much it has."""
    limit = (jax.devices()[0].memory_stats() or {}).get("bytes_limit")
    if limit is None:
        return contexts

    def size(spec: CacheSpec) -> int:
        return spec.bytes_per_token * spec.num_pages * spec.page_size

    return [c for c in contexts if taken + size(spec(c)) < 0.95 * limit]


def plot(rows: list[dict[str, Any]], path: str | pathlib.Path) -> None:
    """Step time over batch, a panel for each context."""
    from matplotlib.figure import Figure  # nothing else here needs it

    contexts = sorted({row["context"] for row in rows})
    figure = Figure(figsize=(4.5 * len(contexts), 4), layout="constrained")
    panels = figure.subplots(1, len(contexts), sharey=True, squeeze=False)[0]
    for axes, context in zip(panels, contexts, strict=True):
        for method in METHOD_OPTIONS:
            here = [r for r in rows if r["context"] == context and r["method"] == method]
            here.sort(key=lambda row: row["batch"])
            milliseconds = [row["median_us"] / 1e3 for row in here]
            axes.plot([r["batch"] for r in here], milliseconds, marker="o", label=method.upper())
        axes.set(xscale="log", yscale="log", xlabel="batch", title=f"context {context:,}")
        axes.set_xticks(batches := sorted({row["batch"] for row in rows}), batches)
        axes.grid(alpha=0.3, which="both")
    panels[0].set_ylabel("ms a step")
    panels[0].legend()
    figure.suptitle(f"decode step, {rows[0]['model']}")
    figure.savefig(path, dpi=110)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--model", default="reference", help=f"reference, {', '.join(CONFIGS)}")
    arguments.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    arguments.add_argument("--context", type=int, nargs="+", default=[1024, 8192, 32768])
    arguments.add_argument(
        "--pool-factor",
        type=int,
        nargs="+",
        default=[1],
        metavar="N",
        help="pool size over what the longest context takes",
    )
    arguments.add_argument("--methods", nargs="+", choices=METHOD_OPTIONS, default=METHOD_OPTIONS)
    arguments.add_argument("--steps", type=int, default=8)
    arguments.add_argument("--runs", type=int, default=5)
    arguments.add_argument("--page-size", type=int, default=128)
    arguments.add_argument("--dtype", default="float32", help="of weights and arithmetic")
    arguments.add_argument(
        "--trace",
        type=int,
        nargs="+",
        default=[],
        metavar="BATCH",
        help="count GPU kernels at the first context",
    )
    arguments.add_argument("--json", metavar="FILE")
    arguments.add_argument("--plot", metavar="FILE", help="needs matplotlib")
    arguments = arguments.parse_args()

    bundled = arguments.model == "reference"
    config = read_config(REFERENCE_MODEL) if bundled else CONFIGS[arguments.model]
    model = Llama(config, last_only=True)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    variables = jax.jit(
        lambda key: jax.tree.map(
            lambda leaf: jax.random.normal(key, leaf.shape, arguments.dtype) * 0.02, shapes
        )
    )(jax.random.key(0))
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(variables))

    rows: list[dict[str, Any]] = []
    console = Console()
    table = Table(
        *("batch", "context", "pool", "cache", "compile s", "step ms", "tokens/s", "temp MB"),
        *("kernels", "in kernels"),
        title=f"decode step, {arguments.model}, {describe_device()}",
    )
    grown = arguments.steps * (arguments.runs + 2)
    for batch in arguments.batch:
        for factor in arguments.pool_factor:
            for method in arguments.methods:

                def spec_for(context: int) -> CacheSpec:
                    size = arguments.page_size
                    pages = -(-(context + grown) // size) * batch * factor  # noqa: B023
                    return config.cache_spec(pages, page_size=size, **METHOD_OPTIONS[method])  # noqa: B023

                contexts = fitting_contexts(spec_for, batch, arguments.context, weights)
                if not contexts:
                    continue
                spec = spec_for(max(contexts))
                start = time.perf_counter()
                compiled = compile_loop(model, variables, spec, batch, arguments.steps)
                compile_s = time.perf_counter() - start
                memory = compiled.memory_analysis()
                pages = random_pages(spec)
                for context in contexts:
                    state = random_state(spec, pages, batch, context)
                    state, figures = measure(
                        compiled, variables, state, steps=arguments.steps, runs=arguments.runs
                    )
                    if batch in arguments.trace and context == contexts[0]:
                        state, kernels = trace(compiled, variables, state, steps=arguments.steps)
                        figures |= kernels
                    pages = state.cache.pages
                    rows.append(
                        {
                            "op": "decode_step",
                            "implementation": KERNELS.get(jax.default_backend(), ("xla",))[0],
                            "model": arguments.model,
                            "method": method,
                            "order": spec.format.order,
                            "batch": batch,
                            "context": context,
                            "page_size": spec.page_size,
                            "pool_factor": factor,
                            "cache_bytes_per_token": spec.bytes_per_token,
                            "compile_s": compile_s,
                            "temp_bytes": memory.temp_size_in_bytes,
                            "alias_bytes": memory.alias_size_in_bytes,
                            "pool_bytes": pages.nbytes,
                            **figures,
                        }
                    )
                    kernel_us = figures.get("kernel_us")
                    table.add_row(
                        str(batch),
                        f"{context:,}",
                        f"{factor}x",
                        method.upper(),
                        f"{compile_s:.2f}",
                        f"{figures['median_us'] / 1e3:.2f}",
                        f"{figures['tokens_per_s']:.1f}",
                        f"{memory.temp_size_in_bytes / 1e6:.2f}",
                        f"{figures['kernels']:.0f}" if kernel_us else "",
                        f"{kernel_us / figures['median_us']:.1%}" if kernel_us else "",
                    )
                del state, pages  # before the next pool is made
                if arguments.json:
                    write_results(arguments.json, rows)
    console.print(table)
    if arguments.plot:
        plot(rows, arguments.plot)


if __name__ == "__main__":
    main()

"""Decode step of a whole model: compile time, step time and memory over context and batch.

    python benchmarks/decode_step.py --json benchmarks/results/cpu/decode_step.json

Runs `saw_int4_jax.decode`, the jitted loop that users run, with random weights and a cache filled
with random codes through a permuted page table. Step time is that of one loop over its steps.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from pallas_kernels import page_format
from pallas_kernels.implementation import KERNELS
from saw_int4_jax import Cache, CacheSpec, decode, init_cache
from saw_int4_jax.demo import METHOD_OPTIONS, REFERENCE_MODEL
from saw_int4_jax.generate import RUNNING, DecodeState
from saw_int4_jax.models.configs import CONFIGS
from saw_int4_jax.models.hugging_face import read_config
from saw_int4_jax.models.llama import Llama
from saw_int4_jax.results import describe_device, write_results


def filled_cache(spec: CacheSpec, batch: int, context: int) -> Cache:
    """A cache whose sequences each hold `context` random tokens on permuted pages."""
    cache = init_cache(spec, batch, spec.num_pages * spec.page_size // batch)
    pages = cache.pages
    rng = np.random.default_rng(0)  # jax.random takes several times the memory of its result
    dtype = pages.data.dtype
    data = jnp.asarray(rng.integers(0, jnp.iinfo(dtype).max, pages.data.shape, dtype))
    scales = pages.scales
    if scales is None:  # bfloat16 bits with the exponents of numbers in (-2, 2)
        data = data & 0x3FFF | (data << 1 & 0x8000)
    else:
        word = page_format.join_scales(jnp.float32(0.125), jnp.float32(-1.0))
        scales = jnp.full(scales.shape, word)
    held = -(-context // spec.page_size)
    order = jnp.asarray(rng.permutation(spec.num_pages), jnp.int32)
    used = batch * held
    table = cache.page_table.at[:, :held].set(order[:used].reshape(batch, held))
    return dataclasses.replace(
        cache,
        pages=dataclasses.replace(pages, data=data, scales=scales),
        page_table=table,
        lengths=jnp.full(batch, context, jnp.int32),
        references=cache.references.at[order[:used]].set(1),
        free_pages=jnp.roll(order, -used),
        num_free=jnp.asarray(spec.num_pages - used, jnp.int32),
    )


def measure(
    model: Llama, variables, spec: CacheSpec, *, batch: int, context: int, steps: int, runs: int
) -> dict[str, float]:
    """Compiles the loop, runs it `runs` times, and returns times and the compiler's memory."""
    cache = filled_cache(spec, batch, context)
    state = DecodeState(
        cache=cache,
        tokens=jnp.zeros(batch, jnp.int32),
        remaining=jnp.full(batch, steps * (runs + 1) + 1, jnp.int32),
        finish=jnp.full(batch, RUNNING, jnp.int32),
    )
    eos = jnp.zeros(0, jnp.int32)
    start = time.perf_counter()
    compiled = decode.lower(model.apply, variables, state, num_steps=steps, eos=eos).compile()
    compile_s = time.perf_counter() - start
    memory = compiled.memory_analysis()

    times = []
    for _ in range(runs + 1):  # the first is a warm-up
        jax.block_until_ready(state)
        start = time.perf_counter()
        state, tokens = compiled(variables, state, eos=eos)
        jax.block_until_ready(tokens)
        times.append((time.perf_counter() - start) / steps * 1e6)
    times = times[1:]
    median = statistics.median(times)
    return {
        "compile_s": compile_s,
        "median_us": median,
        "min_us": min(times),
        "max_us": max(times),
        "runs": runs,
        "steps": steps,
        "tokens_per_s": batch / median * 1e6,
        "temp_bytes": memory.temp_size_in_bytes,
        "alias_bytes": memory.alias_size_in_bytes,
        "pool_bytes": cache.pages.nbytes,
        "raw_us": times,
    }


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
        help="pool size over what the context takes",
    )
    arguments.add_argument("--methods", nargs="+", choices=METHOD_OPTIONS, default=METHOD_OPTIONS)
    arguments.add_argument("--steps", type=int, default=8)
    arguments.add_argument("--runs", type=int, default=5)
    arguments.add_argument("--page-size", type=int, default=128)
    arguments.add_argument("--dtype", default="float32", help="of weights and arithmetic")
    arguments.add_argument("--json", metavar="FILE")
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

    rows = []
    table = Table(
        "batch",
        "context",
        "pool",
        "cache",
        "compile s",
        "step ms",
        "tokens/s",
        "temp MB",
        title=f"decode step, {arguments.model}, {describe_device()}",
    )
    for batch in arguments.batch:
        for context in arguments.context:
            for factor in arguments.pool_factor:
                for method in arguments.methods:
                    size = arguments.page_size
                    grown = context + arguments.steps * (arguments.runs + 1)
                    pages = -(-grown // size) * batch * factor
                    spec = config.cache_spec(pages, page_size=size, **METHOD_OPTIONS[method])
                    figures = measure(
                        model,
                        variables,
                        spec,
                        batch=batch,
                        context=context,
                        steps=arguments.steps,
                        runs=arguments.runs,
                    )
                    rows.append(
                        {
                            "op": "decode_step",
                            "implementation": KERNELS.get(jax.default_backend(), ("xla",))[0],
                            "model": arguments.model,
                            "method": method,
                            "order": spec.format.order,
                            "batch": batch,
                            "context": context,
                            "page_size": size,
                            "pool_factor": factor,
                            "cache_bytes_per_token": spec.bytes_per_token,
                            **figures,
                        }
                    )
                    table.add_row(
                        str(batch),
                        f"{context:,}",
                        f"{factor}x",
                        method.upper(),
                        f"{figures['compile_s']:.2f}",
                        f"{figures['median_us'] / 1e3:.2f}",
                        f"{figures['tokens_per_s']:.1f}",
                        f"{figures['temp_bytes'] / 1e6:.2f}",
                    )
    Console().print(table)
    if arguments.json:
        write_results(arguments.json, rows)


if __name__ == "__main__":
    main()

"""Decode step of a whole model: compile time, step time and memory over batch and context.

    python -m benchmarks.decode_step --json benchmarks/results/cpu/decode_step.json
    XLA_CLIENT_MEM_FRACTION=0.95 python -m benchmarks.decode_step --model Qwen3-8B \
        --dtype bfloat16 --page-size 64 --steps 64 --runs 2 --batch 1 8 32 64 128 256 \
        --context 1024 4096 16384 --trace 1 8 64 --compile-at-once 16 \
        --json benchmarks/results/h200/decode_step.json --plot decode_step.png

Runs `saw_int4_jax.decode`, the jitted loop that users run, with random weights and a cache filled
with random codes through a permuted page table. Step time is that of one loop over its steps. One
program serves all contexts of a batch, its pool made for the longest that fits the memory.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import dataclasses
import functools
import itertools
import pathlib
import tempfile
import threading
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.timing import figures
from pallas_kernels import Pages, page_format
from pallas_kernels.implementation import choose
from saw_int4_jax import CacheSpec, decode, init_cache
from saw_int4_jax.demo import METHOD_OPTIONS, REFERENCE_MODEL
from saw_int4_jax.generate import RUNNING, DecodeState
from saw_int4_jax.models.configs import CONFIGS
from saw_int4_jax.models.hugging_face import read_config
from saw_int4_jax.models.llama import Llama, LlamaConfig, one_layer_forward
from saw_int4_jax.results import describe_device, write_results

EOS = jnp.zeros(0, jnp.int32)
FEW_STEPS = 4  # to warm up: XLA records a CUDA graph in the second; and to trace
LOWERING = threading.Lock()  # one at a time, so that each is timed alone


def model_config(name: str) -> LlamaConfig:
    """Of the bundled model, `reference`, or of one of `CONFIGS`."""
    return read_config(REFERENCE_MODEL) if name == "reference" else CONFIGS[name]


def parameter_shapes(config: LlamaConfig, dtype: Any) -> Any:
    variables = jax.eval_shape(Llama(config).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), variables)


def random_weights(shapes: Any) -> Any:
    """Parameters of these shapes, drawn on the device."""

    @functools.partial(jax.jit, static_argnums=(1, 2))
    def draw(key, shape, dtype):
        return (0.02 * jax.random.normal(key, shape)).astype(dtype)

    leaves, tree = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    return tree.unflatten([draw(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)])


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

    def row(value: int):
        return jnp.full(batch, value, jnp.int32)

    cache = dataclasses.replace(
        cache,
        pages=pages,
        page_table=jnp.asarray(table),
        lengths=row(context),
        new_tokens=row(0),
        references=jnp.asarray(references),
        free_pages=jnp.asarray(np.roll(order, -used)),
        num_free=jnp.asarray(spec.num_pages - used, jnp.int32),
    )
    return DecodeState(cache, tokens=row(0), remaining=row(0), finish=row(RUNNING))


def fitting(
    config: LlamaConfig, weights: int, contexts: list[int], grown: int, batch: int, **options
) -> tuple[CacheSpec, list[int]]:
    """A cache for the longest of the contexts that find room beside the weights, and those.

    Args:
      config: of the model.
      weights: bytes.
      contexts: tokens of each sequence.
      grown: tokens that a sequence grows by.
      batch: sequences; those of all pools.
      **options: as in `CacheSpec`.
    """
    limit = (jax.devices()[0].memory_stats() or {}).get("bytes_limit", float("inf"))
    size = options["page_size"]
    specs = {c: config.cache_spec(-(-(c + grown) // size) * batch, **options) for c in contexts}
    fit = [
        context
        for context, spec in specs.items()
        if weights + jax.eval_shape(spec.init_pages).nbytes < 0.95 * limit
    ]
    return specs[max(fit, default=contexts[0])], fit


def compile_loop(
    config: LlamaConfig, variables: Any, spec: CacheSpec, batch: int, steps: int
) -> tuple[jax.stages.Compiled, float]:
    """`decode` for caches of a spec, and how many seconds it took to compile."""
    with LOWERING:
        start = time.perf_counter()
        pages = jax.eval_shape(spec.init_pages)
        state = jax.eval_shape(lambda pages: random_state(spec, pages, batch, 1), pages)
        forward = one_layer_forward(config)
        lowered = decode.lower(forward, variables, state, num_steps=steps, eos=EOS)
    # Else a trace shows the kernels launched one by one, without the graphs.
    gpu = jax.default_backend() == "gpu"
    options = {"xla_enable_command_buffers_during_profiling": True} if gpu else None
    return lowered.compile(compiler_options=options), time.perf_counter() - start


def run(
    compiled: jax.stages.Compiled, variables, state: DecodeState, steps: int
) -> tuple[DecodeState, float]:
    """Runs so many steps of the loop: the state after them, and seconds."""
    finish = jnp.full_like(state.finish, RUNNING)
    state = dataclasses.replace(state, remaining=jnp.full_like(finish, steps), finish=finish)
    jax.block_until_ready(state)
    start = time.perf_counter()
    state, tokens = compiled(variables, state, eos=EOS)
    jax.block_until_ready(tokens)
    seconds = time.perf_counter() - start
    if (tokens[:, :steps] < 0).any():
        raise RuntimeError(f"Expected all sequences to take {steps} steps")
    return state, seconds


def measure(
    compiled: jax.stages.Compiled, variables, state: DecodeState, *, steps: int, runs: int
) -> tuple[DecodeState, dict[str, Any]]:
    """Times of one step, over `runs` loops after two short ones to warm up."""
    for _ in range(2):
        state, _ = run(compiled, variables, state, min(steps, FEW_STEPS))
    times = []
    for _ in range(runs):
        state, seconds = run(compiled, variables, state, steps)
        times.append(seconds / steps * 1e6)
    found = figures(times)
    rate = state.cache.batch / found["median_us"] * 1e6
    return state, {**found, "steps": steps, "tokens_per_s": rate, "raw_us": times}


def trace(
    compiled: jax.stages.Compiled, variables, state: DecodeState
) -> tuple[DecodeState, dict[str, Any]]:
    """What ran on the GPU in a step: the kernels, and how much of the time any of them ran."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            state, _ = run(compiled, variables, state, FEW_STEPS)
        [file] = pathlib.Path(folder).rglob("*.xplane.pb")
        profile = jax.profiler.ProfileData.from_file(str(file))
    events = [
        (event.start_ns, event.duration_ns, event.name)
        for plane in profile.planes
        if plane.name.startswith("/device:GPU")
        for line in plane.lines
        if line.name.startswith("Stream")
        for event in line.events
    ]
    count: collections.Counter[str] = collections.Counter()
    total: collections.Counter[str] = collections.Counter()
    busy, end = 0, 0
    for start, duration, name in sorted(events):
        count[name] += 1
        total[name] += duration
        busy += max(0, start + duration - max(start, end))
        end = max(end, start + duration)
    return state, {
        "kernels": len(events) / FEW_STEPS,
        "kernel_us": sum(total.values()) / FEW_STEPS / 1e3,
        "busy_us": busy / FEW_STEPS / 1e3,
        "longest_kernels_us": {
            f"{name} x {count[name] / FEW_STEPS:.0f}": round(time / FEW_STEPS / 1e3, 1)
            for name, time in total.most_common(20)
        },
    }


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


def attention(spec: CacheSpec, config: LlamaConfig, batch: int) -> str:
    """Which implementation attends."""
    q = jax.ShapeDtypeStruct((batch, 1, config.num_heads, config.head_dim), jnp.bfloat16)
    table = jax.ShapeDtypeStruct((batch, spec.num_pages // batch), jnp.int32)
    function = choose("paged_attention", None, q, jax.eval_shape(spec.init_pages), table)
    return function.__module__.split(".")[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="reference", help=f"reference, {', '.join(CONFIGS)}")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--context", type=int, nargs="+", default=[1024, 8192, 32768])
    parser.add_argument(
        "--pool-factor",
        type=int,
        nargs="+",
        default=[1],
        metavar="N",
        help="pool size over what the longest context takes",
    )
    parser.add_argument("--methods", nargs="+", choices=METHOD_OPTIONS, default=[*METHOD_OPTIONS])
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--page-size", type=int, default=128)
    parser.add_argument("--dtype", default="float32", help="of weights and arithmetic")
    parser.add_argument("--compile-at-once", type=int, default=1, metavar="N")
    parser.add_argument(
        "--trace",
        type=int,
        nargs="+",
        default=[],
        metavar="BATCH",
        help="GPU kernels, and how long any of them ran, at the first context",
    )
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--plot", metavar="FILE", help="needs matplotlib")
    options = parser.parse_args()

    config = model_config(options.model)
    shapes = parameter_shapes(config, jnp.dtype(options.dtype))
    weights = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes))
    grown = options.steps * options.runs + 3 * FEW_STEPS
    print(f"decode step, {options.model}, {describe_device()}", flush=True)
    cases = [*itertools.product(options.batch, options.pool_factor, options.methods)]
    caches = {}
    for batch, factor, method in cases:
        format = dict(page_size=options.page_size, **METHOD_OPTIONS[method])
        fit = fitting(config, weights, options.context, grown, batch * factor, **format)
        caches[batch, factor, method] = fit

    def compile_case(case):
        spec, contexts = caches[case]
        return contexts and compile_loop(config, shapes, spec, case[0], options.steps)

    first = [case for case in cases if case[2] == options.methods[0]]
    programs = {}
    with concurrent.futures.ThreadPoolExecutor(options.compile_at_once) as pool:
        for some in first, [case for case in cases if case not in first]:  # products tuned by then
            programs |= dict(zip(some, pool.map(compile_case, some), strict=True))

    variables = random_weights(shapes)
    rows: list[dict[str, Any]] = []
    print("batch context pool method attention   compile s  step ms  tokens/s  kernels   busy")
    for case in cases:
        (batch, factor, method), (spec, contexts) = case, caches[case]
        for context in set(options.context) - set(contexts):
            print(f"{batch:5} {context:7,} {factor:3}x {method:6} no room")
        if not contexts:
            continue
        compiled, compile_s = programs[case]
        memory = compiled.memory_analysis()
        pages = random_pages(spec)
        for context in contexts:
            state = random_state(spec, pages, batch, context)
            state, measured = measure(
                compiled, variables, state, steps=options.steps, runs=options.runs
            )
            if batch in options.trace and context == contexts[0]:
                state, kernels = trace(compiled, variables, state)
                measured |= kernels
            pages = state.cache.pages
            row = {
                "op": "decode_step",
                "implementation": attention(spec, config, batch),
                "model": options.model,
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
                **measured,
            }
            rows.append(row)
            line = (
                f"{batch:5} {context:7,} {factor:3}x {method:6} {row['implementation']:10} "
                f"{compile_s:10.1f} {row['median_us'] / 1e3:8.3f} {row['tokens_per_s']:9,.0f}"
            )
            if "kernels" in row:
                line += f" {row['kernels']:8.0f} {row['busy_us'] / row['median_us']:6.1%}"
            print(line, flush=True)
        del state, pages  # before the next pool is made
        if options.json:
            write_results(options.json, rows)
    if options.plot:
        plot(rows, options.plot)


if __name__ == "__main__":
    main()

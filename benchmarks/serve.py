"""Serving: tokens per second, and how long requests take, over how many there are at a time.

    python benchmarks/serve.py --json benchmarks/results/h200/serve.json --plot serve.png

D(p, n) are prompts of p random tokens with answers of n tokens. All requests of a cell arrive at
once and the job ends with the last; there are as many as the concurrency says. Weights are random,
the pools of all methods have the same size in bytes.

A full table takes hours of prefill. `--measure` names the cells that run on the device, all of
them by the engine that users run. The others are replayed: the engine's scheduler makes the same
decisions about the same requests, while a clock goes on by what the engine's two programs were
measured to take (rows `serve_cost`). Cells that are measured are replayed too, which shows how far
that is to be trusted.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import dataclasses
import functools
import gc
import json
import os
import pathlib
import re
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from rich.console import Console
from rich.table import Table

from pallas_kernels import page_format
from pallas_kernels.page_format import Pages
from saw_int4_jax import CacheSpec, init_cache
from saw_int4_jax.demo import METHOD_OPTIONS, REFERENCE_MODEL
from saw_int4_jax.generate import make_sampling
from saw_int4_jax.models.configs import CONFIGS
from saw_int4_jax.models.hugging_face import read_config
from saw_int4_jax.models.llama import Llama, LlamaConfig, one_layer_forward
from saw_int4_jax.results import describe_device, write_results
from saw_int4_jax.serving import Engine, Request, Timing, summarize
from saw_int4_jax.serving.engine import MAX_STOP_TOKENS
from saw_int4_jax.serving.programs import Rows, decode_rows, prefill_rows
from saw_int4_jax.serving.scheduler import Limits, Piece, Scheduler, Turn

# Of a row `serve_cost` alone.
COST_KEYS = ("op", "call", "position", "batch", "cached_tokens", "seconds")

CELLS = ["256x1024@32,64,128,256", "16384x1024@8,16,32,64,128"]


@dataclasses.dataclass(frozen=True)
class Cell:
    """Requests that arrive at once: prompts and answers of the same length."""

    prompt: int
    new: int
    concurrency: int

    def prompts(self, vocabulary: int) -> list[list[int]]:
        rng = np.random.default_rng(0)
        return rng.integers(0, vocabulary, (self.concurrency, self.prompt)).tolist()


def parse_cells(texts: Sequence[str]) -> list[Cell]:
    """Cells from words like `256x1024@32,64`."""
    cells = []
    for text in texts:
        match = re.fullmatch(r"(\d+)x(\d+)@(\d+(?:,\d+)*)", text)
        if match is None:
            raise ValueError(f"Expected {text!r} to be like 256x1024@32,64")
        cells += [Cell(int(match[1]), int(match[2]), int(n)) for n in match[3].split(",")]
    return cells


# --- Weights and pools ------------------------------------------------------------------------


def parameter_shapes(config: LlamaConfig) -> Any:
    tokens = jnp.zeros((1, 1), jnp.int32)
    variables = jax.eval_shape(Llama(config).init, jax.random.key(0), tokens)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), variables)


def random_weights(config: LlamaConfig) -> Any:
    """Parameters of a model, drawn on the device."""

    @functools.partial(jax.jit, static_argnames="shape")
    def draw(key, *, shape):
        return (0.02 * jax.random.normal(key, shape)).astype(jnp.bfloat16)

    leaves, tree = jax.tree.flatten(parameter_shapes(config))
    keys = jax.random.split(jax.random.key(0), len(leaves))
    return jax.tree.unflatten(tree, [draw(k, shape=x.shape) for k, x in zip(keys, leaves)])


@functools.partial(jax.jit, donate_argnames="pages")
def fill(pages: Pages) -> Pages:
    """Pages with noise in place of nothing: what the chip does with zeros is no measure."""
    noise = jnp.zeros(pages.data.shape, jnp.uint32)
    for axis, factor in enumerate((0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D, 0x27D4EB2F)):
        index = lax.broadcasted_iota(jnp.uint32, noise.shape, noise.ndim - 1 - axis)
        noise = (noise ^ index) * jnp.uint32(factor)
    # What is there takes part: an argument that nobody reads cannot be written in place.
    data = pages.data ^ (noise >> 13).astype(pages.data.dtype)
    scales = pages.scales
    if scales is None:  # bfloat16 bits with the exponents of numbers in (-2, 2)
        data = data & 0x3FFF | (data << 1 & 0x8000)
    else:
        scales = scales | page_format.join_scales(jnp.float32(0.125), jnp.float32(-1.0))
    return dataclasses.replace(pages, data=data, scales=scales)


def pool_spec(config: LlamaConfig, method: str, pool_bytes: float, page_size: int) -> CacheSpec:
    """As many pages as fit the bytes."""
    spec = config.cache_spec(1, page_size=page_size, **METHOD_OPTIONS[method])
    num_pages = int(pool_bytes // (spec.bytes_per_token * page_size))
    return dataclasses.replace(spec, num_pages=num_pages)


# --- What the two programs take ---------------------------------------------------------------


def make_rows(limits: Limits, width: int, counts, lengths, page_table) -> Rows:
    size = len(counts)
    arrays: dict[str, Any] = dict(
        tokens=np.zeros((size, width), np.int32),
        counts=np.asarray(counts, np.int32),
        lengths=np.asarray(lengths, np.int32),
        page_table=np.asarray(page_table, np.int32),
        stop_tokens=np.full((size, MAX_STOP_TOKENS), -1, np.int32),
    )
    return Rows(**arrays, sampling=make_sampling(size, temperature=0.0))


@dataclasses.dataclass(frozen=True)
class Costs:
    """Seconds of the engine's calls, between measured points linear in the tokens attended to.

    Attributes:
      prefill: (mean position of a call's tokens, seconds), ascending.
      decode: for each batch its points (tokens of all sequences, seconds of one step).
    """

    prefill: list[tuple[float, float]]
    decode: dict[int, list[tuple[float, float]]]

    def prefill_s(self, pieces: Sequence[Piece]) -> float:
        mean = statistics.fmean(piece.start + piece.count / 2 for piece in pieces)
        return float(np.interp(mean, *zip(*self.prefill)))

    def decode_s(self, turns: Sequence[Turn]) -> float:
        batch = min(batch for batch in self.decode if batch >= len(turns))
        (few, fast), (many, slow) = self.decode[batch]
        steps = max(turn.steps for turn in turns)
        tokens = sum(turn.job.computed + turn.steps / 2 for turn in turns)
        return steps * max(0.0, fast + (slow - fast) * (tokens - few) / (many - few))

    def rows(self) -> list[dict[str, Any]]:
        """For the results file."""
        found = [
            {"call": "prefill", "position": position, "seconds": seconds}
            for position, seconds in self.prefill
        ]
        for batch, points in self.decode.items():
            found += [
                {"call": "decode_step", "batch": batch, "cached_tokens": tokens, "seconds": seconds}
                for tokens, seconds in points
            ]
        return found

    @classmethod
    def from_rows(cls, rows: Sequence[dict[str, Any]]) -> Costs:
        prefill = [(row["position"], row["seconds"]) for row in rows if row["call"] == "prefill"]
        decode: dict[int, list[tuple[float, float]]] = {}
        for row in rows:
            if row["call"] == "decode_step":
                point = row["cached_tokens"], row["seconds"]
                decode.setdefault(row["batch"], []).append(point)
        return cls(sorted(prefill), decode)


def measure_costs(engine: Engine, longest: int, *, runs: int = 3) -> Costs:
    """Times both programs as the engine calls them, result on the host, over random pages."""
    limits = engine.limits
    order = np.random.default_rng(0).permutation(limits.num_pages)

    def tables(sequences: int, tokens: int) -> np.ndarray:
        table = np.full((sequences, limits.max_pages), -1)
        held = limits.pages(tokens)
        table[:, :held] = order[: sequences * held].reshape(sequences, held)
        return table

    def seconds(call, rows: Rows) -> float:
        times, place = [], engine._cache.pages.data.unsafe_buffer_pointer()
        for _ in range(runs + 1):  # the first compiles
            start = time.perf_counter()
            np.asarray(call(rows))
            times.append(time.perf_counter() - start)
        if engine._cache.pages.data.unsafe_buffer_pointer() != place:
            print("warning: the pool was copied, not updated in place", flush=True)
        return statistics.median(times[1:])

    size, piece = limits.pieces, limits.piece
    apart = make_rows(limits, piece, [piece] * size, [0] * size, tables(size, piece))
    prefill = [(piece / 2, seconds(engine._prefill, apart))]
    last = longest - size * piece
    for start in sorted({last // 8, last // 2, last}):
        table = np.repeat(tables(1, start + size * piece), size, axis=0)
        lengths = start + piece * np.arange(size)
        rows = make_rows(limits, piece, [piece] * size, lengths, table)
        prefill.append((start + size * piece / 2, seconds(engine._prefill, rows)))

    decode: dict[int, list[tuple[float, float]]] = {}
    for batch in engine.batches:
        most = min(longest, limits.num_pages // batch * limits.page_size)
        for length in (most // 16, most - limits.steps):
            table = tables(batch, length + limits.steps)
            rows = make_rows(limits, 1, [limits.steps] * batch, [length] * batch, table)
            point = (
                batch * (length + limits.steps / 2),
                seconds(engine._decode, rows) / limits.steps,
            )
            decode.setdefault(batch, []).append(point)
    return Costs(prefill, decode)


# --- Cells ------------------------------------------------------------------------------------


def replay(limits: Limits, costs: Costs, cell: Cell, vocabulary: int) -> tuple[list[Timing], int]:
    """The scheduler's course over a cell by measured costs: timings, and how many preemptions."""
    scheduler = Scheduler(limits)
    jobs = [scheduler.add(prompt, cell.new) for prompt in cell.prompts(vocabulary)]
    now, first, end = 0.0, {}, {}
    while plan := scheduler.plan():
        if plan.pieces:
            now += costs.prefill_s(plan.pieces)
            for piece in plan.pieces:
                scheduler.prefilled(piece, 0)
                if piece.job.new_tokens:
                    first.setdefault(piece.job, now)
        if plan.turns:
            now += costs.decode_s(plan.turns)
            for turn in plan.turns:
                scheduler.decoded(turn, [0] * turn.steps)
        for job in {x.job for x in (*plan.pieces, *plan.turns) if x.job.finish}:
            end[job] = now
    timings = [Timing(0.0, first[job], end[job], cell.new) for job in jobs]
    return timings, scheduler.preemptions


def measure(engine: Engine, cell: Cell, vocabulary: int) -> tuple[list[Timing], int]:
    """The same on the device."""
    before = engine.scheduler.preemptions
    responses = engine.generate(
        [Request(prompt, cell.new, ignore_eos=True) for prompt in cell.prompts(vocabulary)]
    )
    timings = [response.timing for response in responses if response.timing is not None]
    return timings, engine.scheduler.preemptions - before


def figures(cell: Cell, timings: list[Timing], preemptions: int) -> dict[str, Any]:
    found = summarize(timings)
    return {
        "prompt_tokens": cell.prompt,
        "new_tokens": cell.new,
        "concurrency": cell.concurrency,
        "tokens_per_s": found["tokens_per_s"],
        "request_tokens_per_s": statistics.fmean(x.tokens / x.e2e_s for x in timings),
        "decode_tokens_per_s": 1 / found["tpot_s_mean"],
        "ttft_ms": 1e3 * found["ttft_s_mean"],
        "e2e_s": found["e2e_s_mean"],
        "e2e_s_p75": found["e2e_s_p75"],
        "e2e_s_p90": found["e2e_s_p90"],
        "preemptions": preemptions,
    }


# --- Command ----------------------------------------------------------------------------------


def compile_all(config: LlamaConfig, limits: dict[str, Any], arguments: argparse.Namespace) -> None:
    """Compiles the programs without a weight or a page, to fill JAX's compilation cache."""
    forward = one_layer_forward(config, jnp.dtype(jnp.bfloat16))
    variables = parameter_shapes(config)
    longest = max(cell.prompt + cell.new for cell in parse_cells(arguments.cells))

    def compile_one(method: str, size: int, width: int) -> str:
        spec = pool_spec(config, method, arguments.pool_gb * 1e9, arguments.page_size)
        cache = jax.eval_shape(lambda: init_cache(spec, max(arguments.batches), longest))
        max_pages = cache.page_table.shape[1]
        fixed = Limits(spec.num_pages, spec.page_size, max_pages, cache.batch, **limits)
        rows = make_rows(fixed, width, [0] * size, [0] * size, np.full((size, max_pages), -1))
        start = time.perf_counter()
        if width > 1:
            lowered = prefill_rows.lower(forward, variables, cache, rows)
        else:
            lowered = decode_rows.lower(forward, variables, cache, rows, max_steps=fixed.steps)
        traced = time.perf_counter()
        memory = lowered.compile().memory_analysis()
        return (
            f"{method} {size} x {width}: traced {traced - start:.1f} s, compiled "
            f"{time.perf_counter() - traced:.1f} s, temporary "
            f"{memory.temp_size_in_bytes / 1e9:.2f} GB, copied "
            f"{(memory.output_size_in_bytes - memory.alias_size_in_bytes) / 1e9:.2f} GB"
        )

    shapes = [(limits["pieces"], limits["piece"]), *((batch, 1) for batch in arguments.batches)]
    programs = [(method, *shape) for shape in shapes for method in arguments.methods]
    with concurrent.futures.ThreadPoolExecutor(max(1, arguments.threads)) as pool:
        for text in pool.map(lambda program: compile_one(*program), programs):
            print(text, flush=True)


def plot(rows: Sequence[dict[str, Any]], path: str) -> None:
    """Job throughput against the speed of one request."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in rows if row["op"] == "serve"]
    largest = max(row["pool_bytes"] for row in rows)
    rows = [row for row in rows if row["pool_bytes"] > 0.98 * largest]
    seen = collections.Counter(
        {(row["prompt_tokens"], row["new_tokens"], row["concurrency"]) for row in rows}
    )
    several = collections.Counter(cell[:2] for cell in seen)
    lengths = sorted(cell for cell, count in several.items() if count > 1)
    figure, axes = pyplot.subplots(1, len(lengths), figsize=(5 * len(lengths), 4), squeeze=False)
    for ax, (prompt, new) in zip(axes[0], lengths):
        for method, color in zip(METHOD_OPTIONS, ("tab:gray", "tab:orange", "tab:blue")):
            here = [r for r in rows if (r["prompt_tokens"], r["new_tokens"]) == (prompt, new)]
            here = sorted(
                (r for r in here if r["method"] == method), key=lambda r: r["concurrency"]
            )
            for run, style in (("replayed", "o--"), ("measured", "s")):
                some = [row for row in here if row["run"] == run]
                ax.plot(
                    [row["request_tokens_per_s"] for row in some],
                    [row["tokens_per_s"] for row in some],
                    style,
                    color=color,
                    fillstyle="none" if run == "replayed" else "full",
                    label=f"{method.upper()}, {run}" if some else None,
                )
        ax.set_title(f"D({prompt}, {new})")
        ax.set_xlabel("tokens/s of a request")
        ax.set_ylabel("tokens/s of the job")
        ax.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def show(rows: Sequence[dict[str, Any]]) -> None:
    table = Table(title=describe_device())
    for name in ("requests", "at a time", "pool", "cache", "run"):
        table.add_column(name)
    for name in ("job tok/s", "request tok/s", "TTFT s", "E2E s", "p75", "p90", "preempted"):
        table.add_column(name, justify="right")
    for row in rows:
        if row["op"] == "serve":
            table.add_row(
                f"D({row['prompt_tokens']}, {row['new_tokens']})",
                str(row["concurrency"]),
                f"{row['pool_bytes'] / 1e9:.0f} GB",
                row["method"].upper(),
                row["run"],
                f"{row['tokens_per_s']:.0f}",
                f"{row['request_tokens_per_s']:.1f}",
                f"{row['ttft_ms'] / 1e3:.2f}",
                f"{row['e2e_s']:.2f}",
                f"{row['e2e_s_p75']:.2f}",
                f"{row['e2e_s_p90']:.2f}",
                str(row["preemptions"]),
            )
    Console(width=140).print(table)


def device_rows(
    method: str,
    config: LlamaConfig,
    variables: Any,
    limits: dict[str, Any],
    arguments: argparse.Namespace,
    elapsed: Callable[[], float],
) -> list[dict[str, Any]]:
    """What is measured of one cache: costs, and the cells that run."""
    cells, measured = parse_cells(arguments.cells), parse_cells(arguments.measure)
    longest = max(cell.prompt + cell.new for cell in cells + measured)
    spec = pool_spec(config, method, arguments.pool_gb * 1e9, arguments.page_size)
    cache = init_cache(spec, max(arguments.batches), longest)
    cache = dataclasses.replace(cache, pages=fill(cache.pages))
    forward = one_layer_forward(config, jnp.dtype(jnp.bfloat16))
    engine = Engine(forward, variables, cache, batches=arguments.batches, **limits)
    del cache
    about = {
        "model": arguments.model,
        "method": method,
        "order": spec.format.order,
        "cache_bytes_per_token": spec.bytes_per_token,
        "page_size": spec.page_size,
        "max_pages": engine.limits.max_pages,
        "rows": engine.limits.rows,
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        **limits,
        **pool_size(spec.num_pages, spec),
    }
    costs = measure_costs(engine, longest, runs=arguments.runs)
    print(f"{method}: costs at {elapsed():.0f} s", flush=True)
    rows = [{"op": "serve_cost", **about, **cost} for cost in costs.rows()]
    for cell in measured:
        takes = max(x.end for x in replay(engine.limits, costs, cell, config.vocab_size)[0])
        if elapsed() + takes < arguments.seconds:
            result = measure(engine, cell, config.vocab_size)
            rows.append({"op": "serve", "run": "measured", **about, **figures(cell, *result)})
    print(f"{method}: done at {elapsed():.0f} s", flush=True)
    return rows


def pool_size(num_pages: int, spec: CacheSpec) -> dict[str, int]:
    tokens = num_pages * spec.page_size
    return {"pool_tokens": tokens, "pool_bytes": tokens * spec.bytes_per_token}


def replayed_rows(
    measured: Sequence[dict[str, Any]], cells: Sequence[Cell], pools_gb: Sequence[float]
) -> list[dict[str, Any]]:
    """Every cell, and those that were measured, by the measured costs, in pools of these sizes."""
    rows = []
    for method in dict.fromkeys(row["method"] for row in measured):
        mine = [row for row in measured if row["method"] == method]
        of_costs = [row for row in mine if row["op"] == "serve_cost"]
        costs, about = Costs.from_rows(of_costs), of_costs[0]
        config = model_config(about["model"])
        ran = [
            Cell(row["prompt_tokens"], row["new_tokens"], row["concurrency"])
            for row in mine
            if row["op"] == "serve"
        ]
        names = "page_size", "max_pages", "rows", "piece", "pieces", "steps", "mixed_steps"
        fixed = {name: about[name] for name in (*names, "reserve")}
        for pool_gb in (about["pool_bytes"] / 1e9, *pools_gb):
            spec = pool_spec(config, method, pool_gb * 1e9, about["page_size"])
            limits = Limits(num_pages=spec.num_pages, **fixed)
            here = cells if pool_gb in pools_gb else list(dict.fromkeys([*ran, *cells]))
            for cell in here:
                result = replay(limits, costs, cell, config.vocab_size)
                kept = {k: v for k, v in about.items() if k not in COST_KEYS}
                size = pool_size(spec.num_pages, spec)
                row = {"op": "serve", "run": "replayed", **kept, **size}
                rows.append(row | figures(cell, *result))
    return rows


def model_config(name: str) -> LlamaConfig:
    return read_config(REFERENCE_MODEL) if name == "reference" else CONFIGS[name]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="Qwen3-8B", help=f"reference, {', '.join(CONFIGS)}")
    parser.add_argument("--cells", nargs="+", default=CELLS, metavar="PxN@C,C")
    parser.add_argument("--measure", nargs="*", default=[], metavar="PxN@C,C")
    parser.add_argument("--methods", nargs="+", choices=METHOD_OPTIONS, default=[*METHOD_OPTIONS])
    parser.add_argument("--pool-gb", type=float, default=100.0, help="of each method's pool")
    parser.add_argument(
        "--replay-gb", type=float, nargs="*", default=[], help="replay with smaller pools too"
    )
    parser.add_argument("--page-size", type=int, default=128)
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 16, 32, 64, 128, 256])
    parser.add_argument("--piece", type=int, default=256)
    parser.add_argument("--pieces", type=int, default=8)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--mixed-steps", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=1e9, help="measure no cell past this")
    parser.add_argument("--runs", type=int, default=3, help="of each timing")
    parser.add_argument("--compile-only", action="store_true", help="needs no memory")
    parser.add_argument(
        "--threads", type=int, default=0, help="compile first, so many programs at a time"
    )
    parser.add_argument(
        "--replay", metavar="FILE", help="measure nothing, replay what this file measured"
    )
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--plot", metavar="FILE")
    arguments = parser.parse_args()
    started = time.perf_counter()

    def elapsed() -> float:
        return time.perf_counter() - started

    limits = dict(
        piece=arguments.piece,
        pieces=arguments.pieces,
        steps=arguments.steps,
        mixed_steps=arguments.mixed_steps,
        reserve=1.0,  # answers are as long as they may be
    )
    rows: list[dict[str, Any]] = []
    if arguments.replay:
        results = json.loads(pathlib.Path(arguments.replay).read_text())
        rows = [row for row in results["rows"] if row.get("run") != "replayed"]
    else:
        config = model_config(arguments.model)
        if arguments.threads:
            compile_all(config, limits, arguments)
            print(f"compiled at {elapsed():.0f} s", flush=True)
        if arguments.compile_only:
            return
        variables = random_weights(config)
        for method in arguments.methods:
            rows += device_rows(method, config, variables, limits, arguments, elapsed)
            gc.collect()  # the pool goes before the next one comes
            if arguments.json:
                write_results(arguments.json, rows)
    rows += replayed_rows(rows, parse_cells(arguments.cells), arguments.replay_gb)
    if arguments.json:
        made = results["meta"] if arguments.replay else None
        write_results(arguments.json, rows, made)
    show(rows)
    if arguments.plot:
        pathlib.Path(arguments.plot).parent.mkdir(parents=True, exist_ok=True)
        plot(rows, arguments.plot)


if __name__ == "__main__":
    main()

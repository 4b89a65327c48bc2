"""Serving: tokens per second, and how long requests take, over how many there are at a time.

    python -m benchmarks.serve --json benchmarks/results/h200/serve.json --plot serve.png

measures jobs on the engine that users run, in the order given, each for all caches in turn:

    256x1024@32,64        32, then 64 requests at once: prompts of 256 random tokens, 1024 new ones
    16128+256x1024@32     the first 16128 tokens of each prompt are in the pool already, if it holds
                          so many: conversations that go on
    16384x1024@128/9      the same model with 9 layers and a pool in proportion: everything but
                          embedding and logits takes that share of the time, nothing else changes
    …:bf16,bdr            not for all caches

All requests of a job arrive at once and it ends with the last. Weights are random, the pools of all
caches have the same size in bytes. Programs are compiled before; `--compile-only` does that alone,
for a process that shares JAX's compilation cache. Pool and weights are to fill the memory: set
`XLA_PYTHON_CLIENT_MEM_FRACTION=0.95`, and keep XLA from trying to do with less by
`XLA_FLAGS=--xla_disable_hlo_passes=rematerialization`.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import functools
import gc
import itertools
import os
import re
import statistics
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.decode_step import model_config, parameter_shapes, random_pages, random_weights
from saw_int4_jax import Cache, CacheSpec, init_cache
from saw_int4_jax.demo import METHOD_OPTIONS, METHODS
from saw_int4_jax.models.configs import CONFIGS
from saw_int4_jax.models.llama import LlamaConfig, one_layer_forward
from saw_int4_jax.results import write_results
from saw_int4_jax.serving import Engine, Request, summarize
from saw_int4_jax.serving.prefix_cache import page_keys
from saw_int4_jax.serving.programs import State, decode_rows, idle_rows, prefill_rows

JOBS = [
    "256x1024@32,64,128,256",
    "16384x1024@8",
    "16384x1024@128/9:bf16,bdr",
    "16128+256x1024@32:bf16,bdr",
    "16384x1024@32/9",
    "16384x1024@64,16/9:bf16,bdr",
    "16128+256x1024@128/9:bf16,bdr",
]


@dataclasses.dataclass(frozen=True)
class Job:
    """Requests that arrive at once.

    Attributes:
      found: tokens at the beginning of each prompt that are in the pool already.
      prompt: tokens of each prompt, those included.
      new: tokens of each answer.
      concurrency: requests.
      layers: of the model; `None`: all.
      methods: caches to measure.
    """

    found: int
    prompt: int
    new: int
    concurrency: int
    layers: int | None = None
    methods: tuple[str, ...] = METHODS

    def prompts(self, vocabulary: int) -> list[list[int]]:
        rng = np.random.default_rng(0)
        return rng.integers(0, vocabulary, (self.concurrency, self.prompt)).tolist()


def parse_jobs(texts: Sequence[str]) -> list[Job]:
    """Jobs from words like `16128+256x1024@32,64/9:bf16,bdr`."""
    jobs = []
    for text in texts:
        pattern = r"(?:(\d+)\+)?(\d+)x(\d+)@(\d+(?:,\d+)*)(?:/(\d+))?(?::([a-z0-9,]+))?"
        match = re.fullmatch(pattern, text)
        if match is None:
            raise ValueError(f"Expected {text!r} to be like 256x1024@32,64")
        found, prompt, new = int(match[1] or 0), int(match[2]), int(match[3])
        layers = int(match[5]) if match[5] else None
        methods = tuple(match[6].split(",")) if match[6] else METHODS
        if not set(methods) <= set(METHODS):
            raise ValueError(f"Expected {methods=} of {text!r} to be some of {METHODS}")
        shapes = [(found, found + prompt, new, int(n), layers) for n in match[4].split(",")]
        jobs += [Job(*shape, methods) for shape in shapes]
    return jobs


# --- Model, pool, programs --------------------------------------------------------------------


def first_layers(variables: Any, config: LlamaConfig) -> Any:
    """The parameters that a shallower model has."""
    kept = {f"layers_{layer}" for layer in range(config.num_layers)}
    params = variables["params"].items()
    return {"params": {k: v for k, v in params if not k.startswith("layers_") or k in kept}}


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is the same for all jobs: one set of compiled programs for each cache and depth."""

    model: LlamaConfig
    pool_bytes: float
    page_size: int
    longest: int
    batches: tuple[int, ...]
    limits: dict[str, Any]

    def config(self, layers: int | None) -> LlamaConfig:
        return dataclasses.replace(self.model, num_layers=layers or self.model.num_layers)

    def spec(self, method: str, layers: int | None) -> CacheSpec:
        """As many pages as fit the bytes; the pool of a shallower model holds as many tokens."""
        spec = self.model.cache_spec(1, page_size=self.page_size, **METHOD_OPTIONS[method])
        num_pages = int(self.pool_bytes // (spec.bytes_per_token * self.page_size))
        layers = layers or self.model.num_layers
        return dataclasses.replace(spec, num_pages=num_pages, layers=layers)

    def cache(self, spec: CacheSpec) -> Cache:
        cache = init_cache(spec, max(self.batches), self.longest)
        return dataclasses.replace(cache, pages=random_pages(spec))

    def engine(self, method: str, layers: int | None, variables: Any) -> Engine:
        """Over a pool of random pages: what the chip does with zeros is no measure."""
        config, spec = self.config(layers), self.spec(method, layers)
        forward = one_layer_forward(config, jnp.dtype(jnp.bfloat16))
        cache = jax.jit(functools.partial(self.cache, spec))()
        variables = first_layers(variables, config)
        return Engine(forward, variables, cache, batches=self.batches, **self.limits)

    def compile(
        self, method: str, layers: int | None, variables: Any, call: str, size: int, count: int
    ) -> str:
        """Compiles a program of `engine` without a weight or a page, for the compilation cache."""
        start = time.perf_counter()
        config, spec = self.config(layers), self.spec(method, layers)
        forward = one_layer_forward(config, jnp.dtype(jnp.bfloat16))
        cache = jax.eval_shape(functools.partial(self.cache, spec))
        state = State(cache, cache.lengths)
        variables = first_layers(variables, config)
        rows = idle_rows(size, count if call == "prefill" else 0, cache.page_table.shape[1])
        if call == "prefill":
            lowered = prefill_rows.lower(forward, variables, state, rows)
        else:
            lowered = decode_rows.lower(forward, variables, state, rows, num_steps=count)
        lowered.compile()
        program = f"{method} {config.num_layers} layers {call} {size} x {count}"
        return f"{program}: compiled in {time.perf_counter() - start:.1f} s"


# --- Jobs -------------------------------------------------------------------------------------


def keep(engine: Engine, prompts: Sequence[Sequence[int]], found: int) -> None:
    """Has the pool know the first tokens of prompts, until it is full; its pages are random."""
    pool, size = engine.scheduler.pool, engine.limits.page_size
    for prompt in prompts:
        keys = page_keys(prompt[:found], size)
        if len(keys) > pool.available - pool.idle:
            return
        pages = pool.take(len(keys))
        for page, key in zip(pages, keys):
            pool.publish(page, key)
        pool.release(pages)


def serve(engine: Engine, job: Job, vocabulary: int) -> dict[str, Any]:
    """Runs a job, and what came of it."""
    prompts = job.prompts(vocabulary)
    keep(engine, prompts, job.found)
    responses = engine.generate([Request(x, job.new, ignore_eos=True) for x in prompts])
    timings = [response.timing for response in responses if response.timing is not None]
    found = summarize(timings)
    return {
        "prompt_tokens": job.prompt,
        "found_tokens": job.found,
        "reused_tokens": sum(response.reused_tokens for response in responses),
        "new_tokens": job.new,
        "concurrency": job.concurrency,
        "tokens_per_s": found["tokens_per_s"],
        "request_tokens_per_s": statistics.fmean(x.tokens / x.e2e_s for x in timings),
        "decode_tokens_per_s": 1 / found["tpot_s_mean"],
        "ttft_s": found["ttft_s_mean"],
        "e2e_s": found["e2e_s_mean"],
        "e2e_s_p75": found["e2e_s_p75"],
        "e2e_s_p90": found["e2e_s_p90"],
        "preemptions": engine.scheduler.preemptions,
    }


def plot(rows: Sequence[dict[str, Any]], path: str) -> None:
    """Tokens per second of the job against those of one request; a panel for each kind of job."""
    from matplotlib.figure import Figure  # nothing else here needs it

    kinds: dict[tuple, list[dict[str, Any]]] = {}
    for row in rows:
        kind = row["prompt_tokens"], row["new_tokens"], row["found_tokens"], row["layers"]
        kinds.setdefault(kind, []).append(row)
    kinds = {
        kind: rows for kind, rows in kinds.items() if len({r["concurrency"] for r in rows}) > 1
    }
    figure = Figure(figsize=(4.5 * len(kinds), 4), layout="constrained")
    panels = figure.subplots(1, len(kinds), squeeze=False)[0]
    for axes, ((prompt, new, found, layers), here) in zip(panels, kinds.items(), strict=True):
        for method in METHOD_OPTIONS:
            line = sorted(
                (row["request_tokens_per_s"], row["tokens_per_s"], row["concurrency"])
                for row in here
                if row["method"] == method
            )
            axes.plot([x for x, _, _ in line], [y for _, y, _ in line], "o-", label=method.upper())
            for x, y, concurrency in line if method == "bdr" else []:
                axes.annotate(f" {concurrency}", (x, y), size=7)
        title = f"D({prompt:,}, {new:,})" + (f", {found:,} found" if found else "")
        axes.set(title=f"{title}, {layers} layers", xlabel="tokens/s of a request")
        axes.set(ylabel="tokens/s of the job", xlim=0, ylim=0)
        axes.grid(alpha=0.3)
    panels[0].legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="Qwen3-8B", help=f"reference, {', '.join(CONFIGS)}")
    parser.add_argument("--jobs", nargs="+", default=JOBS, metavar="[F+]PxN@C,C[/L][:M,M]")
    parser.add_argument("--pool-gb", type=float, default=100.0, help="of each method's pool")
    parser.add_argument("--page-size", type=int, default=128)
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 16, 32, 64, 128, 256])
    parser.add_argument("--piece", type=int, default=256)
    parser.add_argument("--pieces", type=int, default=8)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--mixed-steps", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=1e9, help="start no job past this")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="to compile")
    parser.add_argument("--compile-only", action="store_true", help="needs no memory")
    parser.add_argument("--json", metavar="FILE", help="written after each job")
    parser.add_argument("--plot", metavar="FILE", help="needs matplotlib")
    arguments = parser.parse_args()
    began = time.perf_counter()
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", tempfile.mkdtemp())
    model = model_config(arguments.model)
    jobs = parse_jobs(arguments.jobs)
    limits = dict(
        piece=arguments.piece,
        pieces=arguments.pieces,
        steps=arguments.steps,
        mixed_steps=arguments.mixed_steps,
        reserve=1.0,  # answers are as long as they may be
    )
    setting = Setting(
        model,
        arguments.pool_gb * 1e9,
        arguments.page_size,
        max(job.prompt + job.new for job in jobs),
        tuple(arguments.batches),
        limits,
    )

    def say(text: str) -> None:
        print(f"{time.perf_counter() - began:6.1f} s  {text}", flush=True)

    runs = [(job, method) for job in jobs for method in job.methods]
    calls = [("prefill", size, arguments.piece) for size in {1, arguments.pieces}]
    steps = {arguments.steps, arguments.mixed_steps}
    calls += [("decode", *call) for call in itertools.product(setting.batches, steps)]
    programs = itertools.product(dict.fromkeys((m, job.layers) for job, m in runs), calls)
    shapes = parameter_shapes(model, jnp.bfloat16)
    with concurrent.futures.ThreadPoolExecutor(arguments.threads) as pool:
        compiles = [
            pool.submit(setting.compile, *engine, shapes, *call) for engine, call in programs
        ]
        for compiled in concurrent.futures.as_completed(compiles):
            say(compiled.result())
    if arguments.compile_only:
        return

    variables = random_weights(shapes)
    rows: list[dict[str, Any]] = []
    for job, method in runs:
        if time.perf_counter() - began > arguments.seconds:
            break
        engine = setting.engine(method, job.layers, variables)
        engine.warm_up(sampled=False)
        spec = setting.spec(method, job.layers)
        pool_tokens = spec.num_pages * spec.page_size
        about = {
            "op": "serve",
            "model": arguments.model,
            "layers": spec.layers,
            "method": method,
            "order": spec.format.order,
            "page_size": spec.page_size,
            "pool_tokens": pool_tokens,
            "pool_bytes": pool_tokens * spec.bytes_per_token,
            "cache_bytes_per_token": spec.bytes_per_token,
            "xla_flags": os.environ.get("XLA_FLAGS", ""),
            **limits,
        }
        kind = f"{method} D({job.prompt}, {job.new}), {job.found} found, {spec.layers} layers"
        say(f"{kind}, {job.concurrency} at once …")
        rows.append(about | serve(engine, job, model.vocab_size))
        say(f"{rows[-1]['tokens_per_s']:,.0f} tokens/s, E2E {rows[-1]['e2e_s']:.2f} s")
        del engine
        gc.collect()  # the pool goes before the next one comes
        if arguments.json:
            write_results(arguments.json, rows)
    if arguments.plot:
        plot(rows, arguments.plot)


if __name__ == "__main__":
    main()

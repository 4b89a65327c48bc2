"""A job of many requests on several devices: one pool over all of them, a pool on each, or one.

    python -m benchmarks.parallel_serve --json benchmarks/results/h200-x2/parallel_serve.json

All requests arrive at once, prompts of random tokens, and the job ends with the last. Tensor
parallel is one engine over a mesh of all devices; data parallel an engine for each device, with
its own share of the requests and a thread of its own. Weights are random.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import os
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from rich.console import Console
from rich.table import Table

from benchmarks.parallel_decode import place_weights, random_weights, share_lock, wait_for_turn
from saw_int4_jax import init_cache
from saw_int4_jax.demo import METHOD_OPTIONS
from saw_int4_jax.models.configs import CONFIGS
from saw_int4_jax.models.llama import one_layer_forward
from saw_int4_jax.results import describe_device, write_results
from saw_int4_jax.serving import Engine, Request, summarize
from saw_int4_jax.sharding import make_mesh


def make_engines(arguments: argparse.Namespace) -> dict[tuple[str, str], list[Engine]]:
    """By how the job is spread and the cache; engines on the same devices share weights."""
    config, devices = CONFIGS[arguments.model], jax.devices()
    spreads = {"one": [devices[:1]], "tensor": [devices], "data": [[d] for d in devices]}
    engines: dict[tuple[str, str], list[Engine]] = {}
    length = arguments.prompt + arguments.new
    weights: dict[Mesh, Any] = {}
    for spread in arguments.parallel:
        for group in spreads[spread]:
            mesh = make_mesh(config.num_kv_heads, devices=group)
            if mesh not in weights:
                weights[mesh] = random_weights(place_weights(config, mesh))
            rows = arguments.requests // len(spreads[spread])
            for method in arguments.methods:
                pages = rows * -(-length // arguments.page_size)
                options = dict(page_size=arguments.page_size, **METHOD_OPTIONS[method])
                engine = Engine(
                    one_layer_forward(config, jnp.dtype(jnp.bfloat16)),
                    weights[mesh],
                    init_cache(config.cache_spec(pages, **options), rows, length, mesh=mesh),
                    batches=[rows],
                    pieces=8,
                    reuse=False,
                    reserve=1.0,
                )
                engines.setdefault((spread, method), []).append(engine)
    return engines


def run(engines: list[Engine], prompts: list[list[int]], new: int) -> list[Any]:
    """Serves a job by engines side by side, each an equal part; the responses."""

    def serve(engine: Engine, share: list[list[int]]):
        return engine.generate([Request(prompt, new, ignore_eos=True) for prompt in share])

    parts = [prompts[i :: len(engines)] for i in range(len(engines))]
    with concurrent.futures.ThreadPoolExecutor(len(engines)) as threads:
        return [x for part in threads.map(serve, engines, parts) for x in part]


def time_all(
    engines: dict[tuple[str, str], list[Engine]],
    prompts: list[list[int]],
    arguments: argparse.Namespace,
) -> list[dict[str, Any]]:
    """A row for each run of the job."""
    rows = []
    for (spread, method), some in engines.items():
        for _ in range(arguments.runs):
            figures = summarize([x.timing for x in run(some, prompts, arguments.new)])
            rows.append(
                {
                    "op": "parallel_serve",
                    "model": arguments.model,
                    "method": method,
                    "parallel": spread,
                    "devices": 1 if spread == "one" else len(jax.devices()),
                    "prompt_tokens": arguments.prompt,
                    "new_tokens": arguments.new,
                    "concurrency": arguments.requests,
                    "xla_flags": os.environ.get("XLA_FLAGS", ""),
                    "tokens_per_s": figures["tokens_per_s"],
                    "ttft_s": figures["ttft_s_mean"],
                    "e2e_s": figures["e2e_s_mean"],
                }
            )
            print(rows[-1], flush=True)
        if arguments.json:
            write_results(arguments.json, rows)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="Qwen3-8B", choices=CONFIGS)
    choices = ["one", "tensor", "data"]
    parser.add_argument("--parallel", nargs="+", choices=choices, default=choices)
    parser.add_argument("--methods", nargs="+", choices=METHOD_OPTIONS, default=["bf16", "bdr"])
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--new", type=int, default=256)
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--page-size", type=int, default=64)
    parser.add_argument(
        "--lock", metavar="FILE", help="of programs side by side: each is timed alone"
    )
    parser.add_argument("--json", metavar="FILE")
    arguments = parser.parse_args()
    lock = share_lock(arguments.lock)

    started = time.monotonic()
    engines = make_engines(arguments)
    config = CONFIGS[arguments.model]
    rng = np.random.default_rng(0)
    prompts = rng.integers(0, config.vocab_size, (arguments.requests, arguments.prompt)).tolist()
    with concurrent.futures.ThreadPoolExecutor(len(engines)) as threads:
        list(threads.map(lambda some: run(some, prompts, 2), engines.values()))
    print(f"compiled after {time.monotonic() - started:.0f} s", flush=True)
    wait_for_turn(lock)
    rows = time_all(engines, prompts, arguments)
    table = Table("GPUs", "cache", "tokens/s", "TTFT s", "E2E s", title=describe_device())
    for row in rows:
        table.add_row(
            f"{row['devices']} {row['parallel']}",
            row["method"].upper(),
            f"{row['tokens_per_s']:,.0f}",
            f"{row['ttft_s']:.2f}",
            f"{row['e2e_s']:.2f}",
        )
    Console(width=100).print(table)


if __name__ == "__main__":
    main()

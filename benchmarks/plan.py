"""Memory and step time of large models on 1 to 64 GPUs, on paper: an estimate, not a measurement.

    python benchmarks/plan.py --json benchmarks/results/plan/h200.json

A decode step takes, on each device, the sum of

- its share of the weights, read once, at the rate at which one GPU's matrix products read them;
- its share of the cache, at the rate that decode attention was measured to read at: a time per
  call and a time per byte, fitted to all measured shapes of each kind of cache;
- two all-reduces a layer of [batch, embed_dim] bfloat16 over the devices that share a pool, one
  after the look-up of the tokens, and the exchange of the best tokens, taken to be one more: a
  latency each, and 2 (n - 1) / n of the bytes (a ring) at the link's rate. Measured on two devices
  where `parallel_decode.json` of two exists, else as `--link-gb-per-s` and `--latency-us` say.

Pools exchange nothing, so they are taken to scale perfectly; tensor parallelism stays within the
eight GPUs of a host. Arithmetic counts where it takes longer than reading the weights.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from saw_int4_jax import CacheSpec
from saw_int4_jax.demo import METHOD_OPTIONS
from saw_int4_jax.models.configs import CONFIGS
from saw_int4_jax.models.llama import Llama, LlamaConfig
from saw_int4_jax.results import write_results

RESULTS = pathlib.Path(__file__).parent / "results"
MODELS = "Qwen3-8B", "Qwen3-32B", "Llama-3.1-70B"
CHIPS = 1, 2, 4, 8, 16, 32, 64
# HBM3 and HBM3e by NVIDIA's data sheets.
DATA_SHEET_GB_PER_S = {"h200": 4800, "h100": 3350}
HOST = 8  # GPUs that one NVLink switch joins


def load(path: pathlib.Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text())["rows"] if path.exists() else []


def attention_times(device: str) -> dict[str, tuple[float, float]]:
    """Microseconds of a call and of a byte, by method, fitted to the fastest time of each shape."""
    rows = load(RESULTS / device / "decode_attention.json")
    rows = [r for r in rows if not r["peer"] and not r["ragged"]]
    rows.sort(key=lambda r: -r["median_us"])
    fits = {}
    for method in METHOD_OPTIONS:
        # Slowest first: of each shape the fastest stays.
        here = {(r["batch"], r["context"]): r for r in rows if r["method"] == method}.values()
        a = np.array([[1, r["cache_bytes"]] for r in here])
        times = np.array([r["median_us"] for r in here])
        # Relative errors count: a large shape is no more true than a small one.
        (call, byte), *_ = np.linalg.lstsq(a / times[:, None], np.ones(len(here)), rcond=None)
        fits[method] = max(call, 0.0), byte
    return fits


def measured_on_two(device: str) -> tuple[str, list[dict[str, Any]]]:
    """The device kind of which a pair was measured, best this one, and what was."""
    for kind in (device, *DATA_SHEET_GB_PER_S):
        rows = load(RESULTS / f"{kind}-x2" / "parallel_decode.json")
        if rows:
            return kind, rows
    return device, []


def weight_rate(device: str) -> tuple[float, str]:
    """GB/s at which one GPU's products read weights, and where the figure is from."""
    kind, rows = measured_on_two(device)
    rows = [r for r in rows if r["parallel"] == "one" and "matmuls_us" in r and r["batch"] <= 64]
    if not rows:
        read = load(RESULTS / device / "decode_attention.json")
        return max(r["gb_per_s"] / r["fraction_of_ceiling"] for r in read), "the read ceiling"
    rates = []
    for row in rows:
        read = row["weight_bytes_per_device"] - embedding_bytes(CONFIGS[row["model"]])
        rates.append(read / row["matmuls_us"] / 1e3)
    scale = DATA_SHEET_GB_PER_S[device] / DATA_SHEET_GB_PER_S[kind]
    scaled = "" if kind == device else ", scaled by the data sheets' bandwidths"
    return float(np.median(rates)) * scale, f"measured on one {kind.upper()}{scaled}"


def link(arguments: argparse.Namespace) -> tuple[float, float, str]:
    """(latency in µs, GB/s, where from) of an all-reduce."""
    points: dict[int, list[float]] = {}
    kind, rows = measured_on_two(arguments.device)
    measured = f"measured on two {kind.upper()}"
    for row in rows:
        if row["parallel"] == "tensor" and "collectives_us" in row:
            size = row["batch"] * CONFIGS[row["model"]].embed_dim * 2
            points.setdefault(size, []).append(row["collectives_us"] / (2 * row["layers"] + 2))
    if len(points) < 2:
        return arguments.latency_us, arguments.link_gb_per_s, "assumed"
    sizes = np.array(sorted(points))
    times = np.array([np.median(points[size]) for size in sizes])
    slope, latency = np.polyfit(sizes, times, 1)
    if slope <= 0:
        return float(np.median(times)), arguments.link_gb_per_s, f"latency {measured}"
    return max(float(latency), 0.0), float(1 / slope / 1e3), measured


@functools.cache
def weight_bytes(config: LlamaConfig) -> int:
    """In bfloat16: those of one layer, taken from the model itself, times the layers."""

    def values(layers: int) -> int:
        model = Llama(dataclasses.replace(config, num_layers=layers))
        shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
        return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))

    one, two = values(1), values(2)
    return 2 * (one + (two - one) * (config.num_layers - 1))


def embedding_bytes(config: LlamaConfig) -> int:
    """Of the table that is looked up, not read."""
    return 0 if config.tie_embeddings else 2 * config.vocab_size * config.embed_dim


def estimate(
    name: str, method: str, chips: int, tensor: int, batch: int, measured: dict, arguments: Any
) -> dict[str, Any]:
    """A row: one model on `chips` devices, `tensor` to a pool of `batch` sequences."""
    config = CONFIGS[name]
    spec: CacheSpec = config.cache_spec(1, page_size=64, **METHOD_OPTIONS[method])
    weights = weight_bytes(config) / tensor
    read = weights - embedding_bytes(config) / tensor
    per_sequence = spec.bytes_per_token * arguments.context
    room = arguments.memory_gb * 1e9 * arguments.usable - weights
    fits = int(max(room, 0) // (per_sequence / tensor))

    products = max(read / measured["weights_gb_per_s"] / 1e3, read * batch / arguments.tflops / 1e6)
    call, byte = measured["attention"][method]
    layer_bytes = per_sequence * batch / tensor / config.num_layers
    attention = config.num_layers * (call + layer_bytes * byte)
    collectives = 0.0
    if tensor > 1:
        traffic = 2 * (tensor - 1) / tensor * batch * config.embed_dim * 2
        each = measured["latency_us"] + traffic / measured["link_gb_per_s"] / 1e3
        collectives = (2 * config.num_layers + 2) * each
    step = products + attention + collectives
    return {
        "op": "plan",
        "estimate": True,
        "model": name,
        "method": method,
        "devices": chips,
        "tensor": tensor,
        "data": chips // tensor,
        "batch": batch * (chips // tensor),
        "context": arguments.context,
        "weight_gb_per_device": weights / 1e9,
        "cache_gb_per_device": per_sequence * batch / tensor / 1e9,
        "fits": batch <= fits,
        "most_sequences": fits * (chips // tensor),
        "matmuls_us": products,
        "attention_us": attention,
        "collectives_us": collectives,
        "step_us": step,
        "tokens_per_s": batch * (chips // tensor) / step * 1e6,
    }


def best(name: str, method: str, chips: int, measured: dict, arguments: Any) -> dict[str, Any]:
    """The split with the most tokens a second of those that fit, or else the widest."""
    tensors = [t for t in (1, 2, 4, 8) if t <= min(chips, HOST, CONFIGS[name].num_kv_heads)]
    rows = [
        estimate(name, method, chips, t, arguments.batch_per_device * t, measured, arguments)
        for t in tensors
    ]
    return max(rows, key=lambda r: (r["fits"], r["tokens_per_s"] if r["fits"] else r["tensor"]))


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--device", default="h200", help="folder of the measured figures")
    arguments.add_argument("--batch-per-device", type=int, default=16)
    arguments.add_argument("--context", type=int, default=16384)
    arguments.add_argument("--memory-gb", type=float, default=141, help="the H200's data sheet")
    arguments.add_argument("--usable", type=float, default=0.9, help="share of it")
    arguments.add_argument("--tflops", type=float, default=989, help="dense bf16, data sheet")
    arguments.add_argument(
        "--link-gb-per-s",
        type=float,
        default=450,
        help="one way; NVLink 4: 900 both ways in the H100's and H200's data sheets",
    )
    arguments.add_argument("--latency-us", type=float, default=15, help="of an all-reduce; assumed")
    arguments.add_argument("--json", metavar="FILE")
    arguments = arguments.parse_args()

    rate, rate_from = weight_rate(arguments.device)
    latency, bandwidth, link_from = link(arguments)
    measured = {
        "attention": attention_times(arguments.device),
        "weights_gb_per_s": rate,
        "latency_us": latency,
        "link_gb_per_s": bandwidth,
    }
    basis = {
        "weights_gb_per_s": rate,
        "weights_from": rate_from,
        "latency_us": latency,
        "link_gb_per_s": bandwidth,
        "link_from": link_from,
        "memory_gb": arguments.memory_gb,
    }
    rows = [
        best(name, method, chips, measured, arguments) | basis
        for name in MODELS
        for chips in CHIPS
        for method in METHOD_OPTIONS
    ]
    head = ["model", "devices", "cache", "tensor x data", "weights GB", "cache GB", "most", "ms"]
    table = Table(*head, "tokens/s", title=f"ESTIMATE. {basis}")
    for r in rows:
        table.add_row(
            r["model"],
            str(r["devices"]),
            r["method"].upper(),
            f"{r['tensor']} x {r['data']}",
            f"{r['weight_gb_per_device']:.0f}",
            f"{r['cache_gb_per_device']:.0f}",
            str(r["most_sequences"]),
            f"{r['step_us'] / 1e3:.1f}" if r["fits"] else "does not fit",
            f"{r['tokens_per_s']:,.0f}" if r["fits"] else "",
        )
    Console(width=140).print(table)
    if arguments.json:
        write_results(arguments.json, rows)


if __name__ == "__main__":
    main()

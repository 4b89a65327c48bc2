# ---
# jupyter:
#   jupytext:
#     cell_metadata_filter: -all
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#       jupytext_version: 1.19.6
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Benchmark your chip
#
# How close does decoding come to what the memory allows? This notebook measures the ceilings of
# the device it runs on, then decode attention and writing for three caches, and draws a roofline,
# with the figures of an NVIDIA H200 that are committed to the repository beside it. A CPU runs the
# XLA reference, which is no fast path: there it shows the method, not the speed. A few minutes.

# %%
# Installs the library where it is missing: from the clone that this notebook lies in, or from
# SOURCE, which may be a clone's folder or an address that git can clone.
import importlib.util
import os
import pathlib
import shutil
import subprocess
import sys

SOURCE = os.environ.get("SAW_INT4_SOURCE", "")  # @param {type:"string"}


def must(*command):
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed: {done.stderr.strip().splitlines()[-1]}")
    return done.stdout


def accelerator():
    """The extra of this package that brings JAX for what is plugged in; "" for a CPU alone."""
    if shutil.which("nvidia-smi"):
        driver = must("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        return "[cuda]" if int(driver.split(".")[0]) >= 580 else "[cuda12]"
    tpu = any(pathlib.Path(path).exists() for path in ("/dev/accel0", "/dev/vfio/0"))
    return "[tpu]" if tpu else ""


folders = [pathlib.Path(SOURCE), *pathlib.Path.cwd().resolve().parents, pathlib.Path.cwd()]
CLONE = next((f.resolve() for f in folders if (f / "benchmarks" / "results").is_dir()), None)
if importlib.util.find_spec("saw_int4_jax") is None:
    if CLONE is None and SOURCE:
        must("git", "clone", "--quiet", "--depth", "1", SOURCE, "saw-int4-jax")
        CLONE = pathlib.Path("saw-int4-jax").resolve()
    if CLONE is None:
        raise SystemExit("Set SOURCE to a clone of saw-int4-jax, or to an address to clone")
    must(sys.executable, "-m", "pip", "install", "-q", f"{CLONE}{accelerator()}", "matplotlib")
    importlib.invalidate_caches()

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import saw_int4_jax as saw

QUICK = os.environ.get("SAW_INT4_QUICK") == "1"  # small settings, for tests
BACKEND = jax.default_backend()
DEVICE = jax.devices()[0].device_kind
print(f"{BACKEND.upper()}: {len(jax.devices())} x {DEVICE}")
print(f"jax {jax.__version__}, saw-int4-jax {saw.__version__}")

COLORS = {"bf16": "#6b7280", "int4": "#d95f02", "bdr": "#0f8b8d"}
NAMES = {"bf16": "BF16", "int4": "INT4", "bdr": "BDR (rotated INT4)"}
plt.rcParams |= {"axes.spines.top": False, "axes.spines.right": False, "figure.dpi": 110}

# %% [markdown]
# ## Timing
#
# A call is timed as one of a chain inside a compiled loop, each needing the last one's result, so
# that calls do not overlap and Python stands outside. Where an accelerator has caches, calls walk
# over several layers, so that those are not what is measured. The median of several windows.

# %%
import functools
import statistics
import time

LENGTH, WINDOW_S, WINDOWS = (2, 0.05, 3) if BACKEND == "cpu" else (32, 0.03, 7)
if QUICK:
    WINDOW_S = 0.0


def microseconds(step, carry, data):
    """Of one `carry = step(i, carry, data)`."""

    @functools.partial(jax.jit, donate_argnums=0)
    def chain(carry, data):
        unroll = min(LENGTH, 8)
        body = lambda i, carry: step(i, carry, data)  # noqa: E731
        return jax.lax.fori_loop(0, LENGTH, body, carry, unroll=unroll)

    def window(loops):
        nonlocal carry
        start = time.perf_counter()
        for _ in range(loops):
            carry = chain(carry, data)
        jax.block_until_ready(carry)
        return time.perf_counter() - start

    carry = jax.block_until_ready(jax.tree.map(jnp.copy, carry))
    window(1)  # compiles
    loops = max(1, round(WINDOW_S / window(1)))
    return statistics.median(window(loops) for _ in range(WINDOWS)) / (loops * LENGTH) * 1e6


# %% [markdown]
# ## Ceilings
#
# What a compiled reduction reads, what a compiled copy reads and writes, and what a matrix product
# computes. These are what simple programs reach, not the maker's figures.

# %%
MEGABYTES = 4 if QUICK else 64 if BACKEND == "cpu" else 256
LAYERS = 1 if BACKEND == "cpu" else 4
size = MEGABYTES * 2**20
blocks = jax.random.bits(jax.random.key(0), (LAYERS, 16, size // 64), jnp.uint32)


def read(i, carry, blocks):
    return (blocks[i % LAYERS] ^ carry).max(0)


def copy(i, carry, blocks):
    del blocks
    return carry + jnp.uint32(1)


READ = size / microseconds(read, blocks[0, 0], blocks) / 1e3
COPY = 2 * size / microseconds(copy, blocks[0], None) / 1e3
n, dtype = (256 if QUICK else 1024, jnp.float32) if BACKEND == "cpu" else (4096, jnp.bfloat16)
matrix = jnp.eye(n, dtype=dtype)
COMPUTE = 2 * n**3 / microseconds(lambda i, x, m: x @ m, matrix, matrix) / 1e3
del blocks
print(f"{DEVICE}: reads {READ:,.0f} GB/s, copies {COPY:,.0f} GB/s (read and written)")
print(f"multiplies {dtype.__name__} matrices of {n} x {n} at {COMPUTE / 1e3:,.2f} TFLOP/s")

# %% [markdown]
# ## Decode attention
#
# One new token for every sequence, 32 query and 8 KV heads of 128, over permuted pages that were
# written with random keys and values.

# %%
from pallas_kernels import PageFormat, init_pages, page_format, paged_attention, write_kv

Q_HEADS, KV_HEADS, D = 32, 8, 128
PAGE = 64 if BACKEND == "gpu" else 128
layout = page_format.preferred_layout()
FORMATS = {
    "bf16": PageFormat("bf16"),
    "int4": PageFormat(layout),
    "bdr": PageFormat(layout, order=D),
}
if QUICK:
    SHAPES = [(1, 256), (1, 512)]
elif BACKEND == "cpu":
    SHAPES = [(1, 512), (1, 1024), (1, 2048), (1, 4096), (1, 8192)]
else:
    SHAPES = [(1, 32768), (8, 2048), (8, 16384), (32, 1024), (32, 2048), (32, 4096), (32, 8192)]


@functools.partial(jax.jit, donate_argnums=0)
def write_some(pages, key, slots, layer):
    k, v = jax.random.normal(key, (2, len(slots), KV_HEADS, D), jnp.bfloat16)
    return write_kv(pages, k, v, slots, layer=layer)


def filled_pages(format, batch, context):
    """Pages of a few layers, full of random tokens, and their page table."""
    num_pages = batch * context // PAGE
    sizes = dict(num_pages=num_pages, kv_heads=KV_HEADS, page_size=PAGE, head_dim=D)
    one = jax.eval_shape(lambda: init_pages(format, layers=1, **sizes)).nbytes
    layers = 1 if BACKEND == "cpu" else max(2, min(8, round(4e8 / one)))
    pages, step = init_pages(format, layers=layers, **sizes), min(8192, batch * context)
    for layer in range(layers):
        for start in range(0, batch * context, step):
            key = jax.random.fold_in(jax.random.key(layer), start)
            pages = write_some(pages, key, start + jnp.arange(step), layer)
    table = jax.random.permutation(jax.random.key(1), num_pages).reshape(batch, -1)
    return pages, table, one


def attend(i, q, data):
    pages, table, lengths = data
    return paged_attention(q, pages, table, lengths, layer=i % pages.layers)


here = []
for batch, context in SHAPES:
    for method, format in FORMATS.items():
        pages, table, size = filled_pages(format, batch, context)
        q = jax.random.normal(jax.random.key(2), (batch, 1, Q_HEADS, D), jnp.bfloat16)
        us = microseconds(attend, q, (pages, table, jnp.full(batch, context)))
        here.append(dict(method=method, batch=batch, context=context, us=us, bytes=size))
        del pages
        print(
            f"{batch:4} x {context:6,} {NAMES[method]:20} {us:10,.1f} µs "
            f"{size / us / 1e3:8,.1f} GB/s of cache, {size / us / 1e3 / READ:4.0%} of reading"
        )

# %% [markdown]
# ## Writing
#
# New keys and values of 8 heads: rotated, quantized, packed and scattered.

# %%
COUNTS = [1, 64] if QUICK else [1, 16, 64, 256, 2048] + [8192] * (BACKEND != "cpu")
writes = []
for tokens in COUNTS:
    k, v = jax.random.normal(jax.random.key(3), (2, tokens, KV_HEADS, D), jnp.bfloat16)
    for method, format in FORMATS.items():
        sizes = dict(kv_heads=KV_HEADS, page_size=PAGE, head_dim=D)
        pages = init_pages(format, layers=4, num_pages=-(-tokens // PAGE) + 1, **sizes)

        def write(i, pages, data):
            return write_kv(pages, *data, layer=i % 4)

        us = microseconds(write, pages, (k, v, jnp.arange(tokens)))
        writes.append(dict(method=method, tokens=tokens, us=us))
        print(f"{tokens:6,} tokens {NAMES[method]:20} {us:10,.1f} µs")

# %% [markdown]
# ## Roofline
#
# A decode step does 4 · H · D operations for every cached token; fewer bytes a token mean more
# operations a byte, and the roof over them is the rate of reading. An H200's figures are those
# committed in `benchmarks/results/h200`.

# %%
import json


def h200(name):
    if CLONE is None:
        print(f"no clone of the repository here: {name} of the H200 is not drawn")
        return []
    rows = json.loads((CLONE / "benchmarks/results/h200" / name).read_text())["rows"]
    ours = {"decode_attention", "write_kv"}
    rows = [r for r in rows if r["op"] in ours and not r.get("peer") and not r.get("ragged")]
    return [r for r in rows if r["method"] in FORMATS]


there = h200("decode_attention.json")
figure, axes = plt.subplots(1, 3, figsize=(14, 4.4), layout="constrained")
time_axis, write_axis, roof = axes
short = DEVICE if len(DEVICE) < 24 else DEVICE[:24]


def operations(row):
    return 4 * Q_HEADS * D * row["batch"] * row["context"]


for method in FORMATS:
    color, rows = COLORS[method], [r for r in here if r["method"] == method]
    rows.sort(key=lambda r: r["batch"] * r["context"])
    x = [r["batch"] * r["context"] for r in rows]
    time_axis.plot(x, [r["us"] for r in rows], "o-", color=color, label=NAMES[method])
    intensity = [operations(r) / r["bytes"] for r in rows]
    roof.plot(intensity, [operations(r) / r["us"] / 1e6 for r in rows], "o", color=color)
    rows = [r for r in writes if r["method"] == method]
    write_axis.plot([r["tokens"] for r in rows], [r["us"] for r in rows], "o-", color=color)

    marks = dict(marker="D", ls="none", mfc="none", color=color, ms=6)
    rows = [r for r in there if r["method"] == method and r["kv_heads"] == KV_HEADS]
    rows = [r for r in rows if (r["q_heads"], r["head_dim"]) == (Q_HEADS, D)]
    time_axis.plot(
        [r["batch"] * r["context"] for r in rows], [r["median_us"] for r in rows], **marks
    )
    intensity = [operations(r) / r["cache_bytes"] for r in rows]
    roof.plot(intensity, [operations(r) / r["median_us"] / 1e6 for r in rows], **marks)
    rows = [r for r in h200("write_kv.json") if r["method"] == method and not r["rotate_v"]]
    write_axis.plot([r["tokens"] for r in rows], [r["median_us"] for r in rows], **marks)

x = np.geomspace(1, 200, 50)
roof.plot(x, np.minimum(x * READ, COMPUTE) / 1e3, color="black", lw=1.2, label=f"{short}, measured")
if there:
    best = max(r["gb_per_s"] / r["fraction_of_ceiling"] for r in there)
    roof.plot(x, x * best / 1e3, color="black", lw=1, ls=":", label="H200, rate of reading")
roof.legend(frameon=False, fontsize=8, loc="lower right")
time_axis.plot([], [], "D", mfc="none", color="black", label="H200, committed")
time_axis.legend(frameon=False, fontsize=8)
labels = (
    (
        time_axis,
        "tokens in the cache",
        "µs",
        f"Decode attention, {Q_HEADS}/{KV_HEADS} heads of {D}",
    ),
    (write_axis, "tokens written", "µs", f"Writing, {KV_HEADS} heads of {D}"),
    (roof, "operations for a byte of cache", "TFLOP/s", "Roofline of decode attention"),
)
for axis, xlabel, ylabel, title in labels:
    axis.set(xscale="log", yscale="log", xlabel=xlabel, ylabel=ylabel, title=title)
    axis.grid(alpha=0.2)
runs = "XLA, no kernel" if BACKEND == "cpu" else "kernels"
figure.supxlabel(f"filled: {short}, {runs}, jax {jax.__version__}", fontsize=8, color="#6b7280")
figure.savefig("benchmark_your_chip.png")
plt.show()

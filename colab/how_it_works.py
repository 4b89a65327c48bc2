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
# # How it works
#
# Outlier channels, rotation, nibbles and pages, drawn from the bundled model's own cache: nothing
# here is made up, every picture is read out of the arrays that the kernels work on. Half a minute
# on a laptop; nothing is downloaded.

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
# ## Keys, as a model makes them
#
# We let the model read a text through an unquantized cache and look at one head of one layer:
# tokens by channels. Large models have channels that are many times larger than the rest, always
# the same ones; this small one has them only mildly. So we also look at an exact
# re-parameterization of it, with one channel pair of every key 16 times larger and the query's 16
# times smaller: the model's function is the same.

# %%
from pallas_kernels import page_format
from saw_int4_jax.demo import HELDOUT, OUTLIER_PAIR, REFERENCE_MODEL
from saw_int4_jax.models import Llama, load_model
from saw_int4_jax.rotation import scale_key_channels

model = load_model(REFERENCE_MODEL)
LENGTH, LAYER, HEAD = 128, 2, 0
text = model.tokenizer.encode((HELDOUT / "python.txt").read_text(encoding="utf-8"))[:LENGTH]


def read_text(params, method="bdr", **options):
    """The logits of a text read in one step, and the cache it was read into."""
    cache = saw.init_cache(model.config.cache_spec(num_pages=1, **options), batch=1)
    cache, _ = saw.extend(cache, jnp.array([LENGTH]))
    return Llama(model.config).apply({"params": params}, jnp.array([text]), cache)


params = {
    "as trained": model.params,
    "with an outlier": scale_key_channels(model.params, model.config, OUTLIER_PAIR, 16),
}
keys = {}
for name, p in params.items():
    _, cache = read_text(p, dtype="bf16")
    all_keys, _ = page_format.read(cache.pages, LAYER, cache.page_table[:1, 0])  # [1, K, S, D]
    keys[name] = all_keys[0, HEAD, :LENGTH]
    rms = jnp.sqrt((keys[name] ** 2).mean(0))
    print(f"{name}: largest channel {float(rms.max() / jnp.median(rms)):.1f} x the median one")

# %% [markdown]
# ## Rotation
#
# A Hadamard matrix has entries ±1/√n. Multiplied by it, every channel becomes a sum over all
# channels of its block, and an outlier is spread over the block. It is its own inverse, and
# queries rotated alike have the same dot products with the keys.

# %%
D = model.config.head_dim
x = keys["with an outlier"]
rotated = {order: page_format.rotate(x, order) for order in (1, 16, D)}
print("rotated twice:", float(jnp.abs(page_format.rotate(rotated[D], D) - x).max()), "off")

query = jax.random.normal(jax.random.key(0), (D,))
plain, turned = x @ query, rotated[D] @ page_format.rotate(query, D)
print("dot products:", float(jnp.abs(plain - turned).max() / jnp.abs(plain).max()), "off")

figure, axes = plt.subplots(
    1, 4, figsize=(12, 3), layout="constrained", width_ratios=[1, 1, 1, 0.9]
)
for axis, (order, matrix) in zip(axes, rotated.items()):
    image = axis.imshow(np.abs(matrix), aspect="auto", cmap="magma", vmin=0, vmax=12)
    title = "not rotated" if order == 1 else f"blocks of {order}"
    axis.set(title=title, xlabel="channel", ylabel="token" if order == 1 else None)
figure.colorbar(image, ax=axes[:3], label="|key|", shrink=0.9)
signs = np.sign(page_format.hadamard(16))
axes[3].imshow(signs, cmap="gray_r", interpolation="nearest")
axes[3].set(title="Hadamard, order 16", xticks=[], yticks=[], xlabel="black +¼, white −¼")
plt.show()

# %% [markdown]
# ## Four bits
#
# Each vector: a minimum, a scale, and codes 0..15. Without rotation the outlier takes the range,
# and most other channels of the vector share two or three codes. How much of a vector goes to its
# most frequent code, its second, and so on:

# %%
figure, axes = plt.subplots(1, 3, figsize=(12, 2.8), layout="constrained", sharey=True)
for axis, (order, matrix) in zip(axes, rotated.items()):
    codes, _ = page_format.quantize(matrix)
    share = np.stack([np.bincount(row, minlength=16) / D for row in np.asarray(codes)])
    bits = -(share * np.log2(np.maximum(share, 1e-9))).sum(1).mean()
    ranked = -np.sort(-share, axis=1).mean(0)
    axis.bar(range(1, 17), 100 * ranked, color=COLORS["int4" if order == 1 else "bdr"])
    title = "not rotated" if order == 1 else f"blocks of {order}"
    axis.set(xlabel="codes of a vector, by use", title=f"{title}: {bits:.2f} bits of information")
axes[0].set_ylabel("% of its channels")
plt.show()

# %% [markdown]
# ## Nibbles
#
# In the `paired` layout (CPU, TPU) a byte holds the key code of a channel in its low nibble and
# the value code in the high one; in the `split` layout (GPU) a 16-bit word holds four codes of a
# key or a value, a quarter of the channels apart. Here is the beginning of one token, out of the
# cache:

# %%
logits, cache = read_text(params["with an outlier"], layout="paired")
TOKEN, SHOWN = 5, 16
row = np.asarray(cache.pages.data[LAYER, 0, HEAD, TOKEN])
words = np.asarray(cache.pages.scales[LAYER, 0, :, HEAD, TOKEN])
split = page_format.convert(cache.pages, "split").data[LAYER, 0, HEAD, :, TOKEN]

figure, axis = plt.subplots(figsize=(12, 3.1), layout="constrained")
greens, oranges = plt.get_cmap("GnBu"), plt.get_cmap("OrRd")


def cell(x, y, text, color, width=1.0):
    axis.add_patch(plt.Rectangle((x, y), width, 0.8, fc=color, ec="white"))
    axis.text(x + width / 2, y + 0.4, text, ha="center", va="center", family="monospace", size=9)


for c in range(SHOWN):
    k, v = row[c] & 15, row[c] >> 4
    cell(c, 3, f"{k}", greens(k / 24))
    cell(c, 2, f"{v}", oranges(v / 24))
    cell(c, 1, f"{row[c]:02X}", "#e5e7eb")
    axis.text(c + 0.5, 3.95, f"{c}", ha="center", size=7, color="#6b7280")
for c in range(SHOWN // 4):
    cell(4 * c, 0, f"{int(split[0, c]):04X}: channels {c}, {c + D // 4}, …", greens(0.2), width=4)
for y, label in (
    (3, "key codes"),
    (2, "value codes"),
    (1, "bytes, paired"),
    (0, "key words, split"),
):
    axis.text(-0.2, y + 0.4, label, ha="right", va="center")
for y, label, word in ((3, "key", words[0]), (2, "value", words[1])):
    scale, minimum = (float(x) for x in page_format.split_scales(jnp.uint32(word)))
    meaning = f"{label}: {int(word):08X}\nscale {scale:.3f}, min {minimum:.2f}"
    axis.text(SHOWN + 0.3, y + 0.4, meaning, va="center", size=8, family="monospace")
axis.set(xlim=(-2.6, SHOWN + 4), ylim=(-0.1, 4.3))
axis.set_title(f"token {TOKEN}, layer {LAYER}, head {HEAD}: channels 0 to {SHOWN - 1} of {D}")
axis.axis("off")
plt.show()

# %% [markdown]
# ## Pages
#
# A pool of pages, and for every sequence a row of a page table. Sequences grow page by page; a
# shared beginning is stored once; a page is free when nobody names it. The functions are pure: a
# cache goes in, a cache comes out.

# %%
small = saw.CacheSpec(layers=1, kv_heads=1, head_dim=8, num_pages=12, page_size=4)
cache = saw.init_cache(small, batch=3)
history = []


def note(what, cache):
    history.append((what, np.asarray(cache.page_table), np.asarray(cache.lengths)))
    return cache


cache = note("0 and 1 get 10 and 6 tokens", saw.extend(cache, jnp.array([10, 6, 0]))[0])
cache = note("2 shares the first 8 of 0", saw.share(cache, 0, 2, 8)[0])
cache = note("all get 3 more", saw.extend(cache, jnp.array([3, 3, 3]))[0])
cache = note("1 ends", saw.free(cache, jnp.array([False, True, False])))
cache = note("0 and 2 get 7 more", saw.extend(cache, jnp.array([7, 0, 7]))[0])

owners = ["#0f8b8d", "#d95f02", "#7c5cbf"]
figure, axis = plt.subplots(figsize=(12, 3.3), layout="constrained")
for y, (what, table, lengths) in enumerate(history):
    for page in range(small.num_pages):
        rows, columns = np.nonzero(table == page)
        axis.add_patch(plt.Rectangle((page, -y), 0.9, 0.8, fc="#f3f4f6", ec="#d1d5db"))
        for n, (owner, column) in enumerate(zip(rows, columns)):
            filled = min(small.page_size, lengths[owner] - column * small.page_size)
            height, base = 0.8 / len(rows), -y + 0.8 * n / len(rows)
            width = 0.9 * filled / small.page_size
            axis.add_patch(plt.Rectangle((page, base), width, height, fc=owners[owner]))
    axis.text(-0.2, -y + 0.4, what, ha="right", va="center")
    listed = "  ".join(str([int(p) for p in row if p >= 0]) for row in table)
    axis.text(12.2, -y + 0.4, listed, va="center", family="monospace", size=8)
for page in range(small.num_pages):
    axis.text(page + 0.45, 0.95, f"{page}", ha="center", size=8, color="#6b7280")
axis.text(12.2, 0.95, "page table, a row for each sequence", size=8, color="#6b7280")
axis.legend(
    [plt.Rectangle((0, 0), 1, 1, fc=color) for color in owners],
    [f"sequence {i}" for i in range(3)],
    ncols=3,
    loc="lower center",
    bbox_to_anchor=(0.4, -0.12),
    frameon=False,
)
axis.set(xlim=(-3.6, 18.5), ylim=(-4.6, 1.4))
axis.axis("off")
plt.show()

# %% [markdown]
# ## The error, step by step
#
# What each step of the way adds, for one layer and for the model's output, with the outlier.

# %%
p = params["with an outlier"]


def rms(x):
    return float(jnp.sqrt(jnp.mean(x**2)))


x = keys["with an outlier"]
quiet = np.argsort(np.asarray(jnp.abs(x).max(0)))[:-2]  # all channels but the outlier pair
print("error of the keys, relative to their size without the outlier pair")
for order in (1, 16, D):
    restored = page_format.dequantize(*page_format.quantize(page_format.rotate(x, order)))
    back = page_format.rotate(restored, order)
    print(f"  order {order:3}: {rms((back - x)[:, quiet]) / rms(x[:, quiet]):.1%}")

exact, _ = read_text(p, dtype="bf16")
exact = jax.nn.log_softmax(exact)
print("KL of the next byte, nats")
divergence = {}
for method, options in (("int4", dict(order=1)), ("order 16", dict(order=16)), ("bdr", {})):
    logits, _ = read_text(p, **options)
    kl = (jnp.exp(exact) * (exact - jax.nn.log_softmax(logits))).sum(-1)
    divergence[method] = float(kl.mean())
    print(f"  {method:9}: {divergence[method]:.4f}")

# %% [markdown]
# ## All in one
#
# Keys of one head, the same rotated, and the error of four bits on both, in the model's own
# channels.

# %%
figure, axes = plt.subplots(2, 3, figsize=(12, 5.4), layout="constrained", sharex=True, sharey=True)
for row, (order, name) in enumerate(((1, "INT4"), (D, "BDR"))):
    stored = page_format.rotate(x, order)
    restored = page_format.dequantize(*page_format.quantize(stored))
    error = page_format.rotate(restored, order) - x
    codes, _ = page_format.quantize(stored)
    shown = (np.abs(stored), codes, np.abs(error))
    same = dict(aspect="auto", interpolation="nearest")
    looks = (
        dict(cmap="magma", vmin=0, vmax=16),
        dict(cmap="viridis", vmin=0, vmax=15),
        dict(cmap="inferno", vmin=0, vmax=2),
    )
    images = [axes[row, i].imshow(shown[i], **same, **looks[i]) for i in range(3)]
    axes[row, 0].set_ylabel(f"{name}\ntoken")
    axes[row, 2].text(
        0.98,
        0.03,
        f"RMS error {rms(error):.2f}, the model's KL {divergence[name.lower()]:.3f}",
        transform=axes[row, 2].transAxes,
        ha="right",
        color="white",
    )
for axis, title in zip(
    axes[0], ("what is stored: |key|", "as four bits", "error after reading back")
):
    axis.set_title(title)
for axis, image, label in zip(axes.T, images, ("|key|", "code", "|error|")):
    axis[1].set_xlabel("channel")
    figure.colorbar(image, ax=list(axis), location="bottom", label=label, shrink=0.7, pad=0.02)
axes[1, 0].text(0.98, 0.03, "rotated", transform=axes[1, 0].transAxes, ha="right", color="white")
figure.suptitle(
    f"Keys of layer {LAYER}, head {HEAD} of the bundled model, one channel pair an outlier (x16)"
)
figure.savefig("how_it_works.png")
plt.show()

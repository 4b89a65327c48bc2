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
# # Quickstart
#
# A language model decodes from a KV cache in four bits: SAW-INT4 ([arXiv
# 2604.19157](https://arxiv.org/abs/2604.19157)) for JAX. This notebook generates text from such a
# cache, then puts size and quality of three caches side by side. It needs a minute or two on a
# laptop, uses a GPU or TPU where there is one, and downloads no model.

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
# ## Text from an INT4 cache
#
# The bundled model is a byte-level Llama of 6 million parameters: it writes the look of Python,
# and no sense. `cache_spec` describes a cache for it: by default *BDR*, keys rotated by a Hadamard
# matrix, then 4 bits for every number and 32 for every vector.

# %%
from saw_int4_jax.demo import HELDOUT, METHOD_OPTIONS, OUTLIER_PAIR, REFERENCE_MODEL
from saw_int4_jax.models import Llama, load_model

model = load_model(REFERENCE_MODEL)  # or a Hugging Face directory
spec = model.config.cache_spec(num_pages=4)
print(f"{spec.method}: {spec.bytes_per_token:,} bytes a token in all layers, {spec.format}")

# %%
PROMPT = "def read_lines(path):\n"
tokens = model.tokenizer.encode(PROMPT)
forward = Llama(model.config, last_only=True).apply  # (variables, tokens, cache) -> (logits, cache)

count = 32 if QUICK else 160
text = model.tokenizer.stream(tokens)
print(PROMPT, end="")
for new, _ in saw.stream(
    forward,
    model.variables,
    [tokens],
    saw.init_cache(spec, batch=1),
    max_new_tokens=count,
    every=16,
):
    print(text.push(new[0][new[0] >= 0].tolist()), end="", flush=True)
print(text.flush())

# %% [markdown]
# The decode loop is one compiled program. Pages are taken inside it as the sequence grows, and the
# cache is updated in place.
#
# ## Three caches, the same prompt
#
# A spec says which: `dtype="bf16"` is not quantized, `order=1` is INT4 without rotation.

# %%
continuations = {}
for method, options in METHOD_OPTIONS.items():
    cache = saw.init_cache(model.config.cache_spec(num_pages=4, **options), batch=1)
    result = saw.generate(forward, model.variables, [tokens], cache, max_new_tokens=count)
    continuations[method] = result.tokens[0]

for method, ids in continuations.items():
    same = [a == b for a, b in zip(ids, continuations["bf16"])]
    agree = same.index(False) if False in same else len(ids)
    print(f"--- {NAMES[method]}: the first {agree} of {len(ids)} tokens are BF16's")
    print(model.tokenizer.decode(ids))

# %% [markdown]
# Greedy text leaves the BF16 cache's at the first near tie and never comes back; it says little
# about quality. Better: give the model held-out text, every token through the cache, and compare
# the distribution of the next token with the BF16 cache's (KL divergence).
#
# Large models have *outlier channels* in their keys, this small one hardly. So the same is
# measured for an exact re-parameterization of it: one channel pair of every key 16 times larger,
# the query's 16 times smaller. The float function is unchanged.

# %%
from saw_int4_jax.evaluate import evaluate, windows
from saw_int4_jax.rotation import scale_key_channels

length, count = (256, 2) if QUICK else (512, 12)
held_out = (HELDOUT / "python.txt").read_text(encoding="utf-8")
held_out = windows(model.tokenizer.encode(held_out)[1:], length, model.tokenizer.bos_id)[:count]
specs = [model.config.cache_spec(1, **options) for options in METHOD_OPTIONS.values()]

scores = {}
for scale in (1, 16):
    params = scale_key_channels(model.params, model.config, OUTLIER_PAIR, scale)
    found = evaluate(Llama(model.config).apply, {"params": params}, held_out, specs)
    for method, score in zip(METHOD_OPTIONS, found):
        scores[scale, method] = score
        print(
            f"outliers x{scale:<3} {NAMES[method]:20} {score.bits_per_byte(score.tokens):.4f} "
            f"bits/byte, KL {score.kl:.4f}, likeliest token agrees {score.top1:.1%}"
        )

# %% [markdown]
# ## Side by side
#
# Size, for models that need it: how many tokens fit into 10 GB beside the weights. Quality, as
# measured above.

# %%
from saw_int4_jax.models import CONFIGS

SHOWN = ["Llama-2-7B", "Llama-3.1-70B", "Qwen3-8B", "Llama-3.1-8B"]
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")


def draw(axes, number, heights, method, label, form):
    place = np.arange(len(heights)) + 0.4 * number - 0.2
    bars = axes.bar(place, heights, 0.38, label=label, color=COLORS[method])
    axes.bar_label(bars, fmt=form, fontsize=8)


for number, method in enumerate(("bf16", "bdr")):
    options = METHOD_OPTIONS[method]
    size = np.array([CONFIGS[name].cache_spec(1, **options).bytes_per_token for name in SHOWN])
    label = "BF16" if method == "bf16" else "INT4 and BDR: 4.25 bits a value"
    draw(left, number, 1e7 / size, method, label, "%.0fk")
left.set_xticks(range(len(SHOWN)), SHOWN)
left.set(ylabel="thousand tokens in 10 GB", title="What fits")
left.legend(frameon=False, loc="upper left")

for number, method in enumerate(("int4", "bdr")):
    draw(right, number, [scores[s, method].kl for s in (1, 16)], method, NAMES[method], "%.4f")
right.set_xticks(range(2), ["as trained", "one key channel pair 16 times larger"])
right.set(ylabel="KL to the BF16 cache, nats per token", title="What it costs (less is better)")
tested = f"bundled 6 M model, {scores[1, 'bdr'].tokens:,} held-out tokens, {DEVICE}"
right.set_xlabel(tested, fontsize=8, color="#6b7280")
right.legend(frameon=False, loc="upper left")
figure.savefig("quickstart.png")
plt.show()

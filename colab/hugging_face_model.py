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
# # A Hugging Face model
#
# Any Llama, Mistral, Qwen2 or Qwen3: from a local directory, or Qwen3-0.6B downloaded if you ask
# for it. The notebook looks at the model's keys for outlier channels, generates, and measures what
# INT4 and BDR caches cost on a text of yours. Without either it takes the model that is bundled
# with the package.

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
# ## The model
#
# `MODEL` is a directory with `config.json`, `tokenizer.json` and safetensors. With `DOWNLOAD` its
# weights come from the Hugging Face hub instead (Qwen3-0.6B: 1.5 GB; no account needed). Both may
# be left empty.

# %%
MODEL = os.environ.get("SAW_INT4_MODEL", "")  # @param {type:"string"}
DOWNLOAD = os.environ.get(
    "SAW_INT4_DOWNLOAD", ""
)  # @param ["", "Qwen/Qwen3-0.6B"] {allow-input: true}
TEXT = os.environ.get("SAW_INT4_TEXT", "")  # @param {type:"string"}

from saw_int4_jax.demo import HELDOUT, METHOD_OPTIONS, OUTLIER_PAIR, REFERENCE_MODEL
from saw_int4_jax.models import Llama, load_model


def directory():
    """MODEL, or what could be downloaded, or the bundled model; says which."""
    if MODEL:
        return pathlib.Path(MODEL)
    if DOWNLOAD:
        try:
            from huggingface_hub import snapshot_download

            kinds = ["*.json", "*.safetensors"]
            return pathlib.Path(snapshot_download(DOWNLOAD, allow_patterns=kinds))
        except Exception as error:
            reason = str(error).strip().splitlines()[0]
            print(f"{DOWNLOAD} could not be downloaded ({type(error).__name__}: {reason})")
    return REFERENCE_MODEL


path = directory()
name = "the bundled model" if path == REFERENCE_MODEL else DOWNLOAD or path.name
dtype = jnp.float32 if BACKEND == "cpu" else jnp.bfloat16
try:
    model = load_model(path, dtype=dtype)
except (OSError, ValueError) as error:
    raise SystemExit(f"{path} could not be loaded: {error}") from None
config = model.config
size = sum(x.size for x in jax.tree.leaves(model.params))
print(f"{name}: {size / 1e6:,.0f} M parameters, {config.num_layers} layers, ", end="")
print(f"{config.num_heads}/{config.num_kv_heads} heads of {config.head_dim}")
for method, options in METHOD_OPTIONS.items():
    spec = config.cache_spec(1, **options)
    print(f"  {NAMES[method]:20} {spec.bytes_per_token:9,} bytes a token")

# %% [markdown]
# ## Outlier channels
#
# The keys of a text, out of an unquantized cache: how much larger is the largest channel of a head
# than its median one, before and after rotation?

# %%
from pallas_kernels import page_format

files = [pathlib.Path(TEXT)] if TEXT else [HELDOUT / "prose.txt"]
text = "\n".join(file.read_text(encoding="utf-8") for file in files)
tokens = model.tokenizer.encode(text)
LENGTH = 128 if QUICK else 256
if len(tokens) < LENGTH:
    raise SystemExit(f"TEXT has {len(tokens)} tokens, at least {LENGTH} are needed")

spec = config.cache_spec(-(-LENGTH // 128), dtype="bf16")
cache, _ = saw.extend(saw.init_cache(spec, batch=1), jnp.array([LENGTH]))
forward = Llama(config).apply
_, cache = jax.jit(forward)(model.variables, jnp.array([tokens[:LENGTH]]), cache)


def ratios(keys):
    """RMS of each head's largest channel over its median one: [K]."""
    rms = jnp.sqrt((keys**2).mean((0, 2)))  # [pages, K, S, D] -> [K, D]
    return rms.max(-1) / jnp.median(rms, -1)


uneven = {"as they are": [], "rotated": []}
for layer in range(config.num_layers):
    keys, _ = page_format.read(cache.pages, layer, cache.page_table[0])
    order = page_format.largest_order(config.head_dim)
    uneven["as they are"].append(np.asarray(ratios(keys)))
    uneven["rotated"].append(np.asarray(ratios(page_format.rotate(keys, order))))
for what, values in uneven.items():
    print(f"keys {what}: largest channel {np.max(values):.0f} x the median one, at most")

# %% [markdown]
# ## Text

# %%
PROMPT = "def main():\n" if path == REFERENCE_MODEL else "The key-value cache of a language model"
prompt = model.tokenizer.encode(PROMPT)
count = 16 if QUICK else 64
for method, options in METHOD_OPTIONS.items():
    cache = saw.init_cache(config.cache_spec(2, **options), batch=1)
    newest = Llama(config, last_only=True).apply
    result = saw.generate(
        newest,
        model.variables,
        [prompt],
        cache,
        max_new_tokens=count,
        eos=model.tokenizer.eos_ids,
        chunk=32,
    )
    print(f"--- {NAMES[method]}\n{PROMPT}{model.tokenizer.decode(result.tokens[0])}")

# %% [markdown]
# ## What four bits cost
#
# The text again, every token through the cache, in windows. The bundled model is also measured
# with an injected outlier, because it is too small to have large ones: an exact
# re-parameterization.

# %%
from saw_int4_jax.evaluate import evaluate, windows
from saw_int4_jax.rotation import scale_key_channels

WINDOWS = 2 if QUICK else 8
body = tokens[1:] if model.tokenizer.bos_id is not None else tokens
held_out = windows(body, LENGTH, model.tokenizer.bos_id)[:WINDOWS]
specs = [config.cache_spec(1, **options) for options in METHOD_OPTIONS.values()]
measured = {"as it is": model.params}
if path == REFERENCE_MODEL:
    outliers = scale_key_channels(model.params, config, OUTLIER_PAIR, 16)
    measured["outlier injected (x16)"] = outliers

scores = {}
for what, params in measured.items():
    found = evaluate(forward, {"params": params}, held_out, specs, batch=4, chunk=LENGTH)
    scores[what] = dict(zip(METHOD_OPTIONS, found))
    for method, score in scores[what].items():
        print(
            f"{name}, {what}: {NAMES[method]:20} perplexity {score.perplexity:.4f}, "
            f"KL {score.kl:.5f}, likeliest token agrees {score.top1:.1%}"
        )

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
layers = np.arange(config.num_layers)
for (what, values), method in zip(uneven.items(), ("int4", "bdr")):
    values = np.array(values)  # [L, K]
    left.plot(
        layers,
        values.max(1),
        "o-",
        color=COLORS[method],
        label=f"keys {what}: the most uneven head",
    )
    spread = "all heads" if what == "rotated" else None
    left.fill_between(
        layers, values.min(1), values.max(1), color=COLORS[method], alpha=0.15, label=spread
    )
left.set(
    yscale="log",
    ylim=(0.9, None),
    xlabel="layer",
    ylabel="largest channel / median channel (RMS)",
    title=f"Outliers in the keys of {name}",
)
left.legend(frameon=False)
left.grid(alpha=0.2)

for i, method in enumerate(("int4", "bdr")):
    kl = [found[method].kl for found in scores.values()]
    place = np.arange(len(kl)) + 0.4 * i - 0.2
    bars = right.bar(place, kl, 0.38, label=NAMES[method], color=COLORS[method])
    right.bar_label(bars, fmt="%.4f", fontsize=8)
right.set_xticks(range(len(scores)), list(scores))
right.set(
    ylabel="KL to the BF16 cache, nats per token", title="What four bits cost (less is better)"
)
tested = f"{WINDOWS * LENGTH:,} tokens of {files[0].name}, {DEVICE}"
right.set_xlabel(tested, fontsize=8, color="#6b7280")
right.margins(y=0.15)
right.legend(frameon=False)
figure.savefig("hugging_face_model.png")
plt.show()

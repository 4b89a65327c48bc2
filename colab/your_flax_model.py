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
# # Your Flax model
#
# You have a Flax model with an attention call in it. This notebook takes a small one in Linen and
# the same in NNX, swaps that call, and checks three things: an unquantized paged cache gives the
# same predictions; a quantized one gives nearly the same; and what the cache weighs. It trains the
# Linen model for a minute on a text that comes with the package, and downloads nothing.

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
# ## A Linen model as it was
#
# Two layers, grouped-query attention, RoPE. It sees the whole text at once: to generate, it would
# have to compute all of it again for every token.

# %%
import flax.linen as nn

LAYERS, WIDTH, VOCABULARY = 2, 256, 256  # a token is a byte
HEADS, KV_HEADS, HEAD_DIM = 4, 2, 128
rope = saw.Rope()


class Before(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(VOCABULARY, WIDTH)(tokens)
        position = jnp.arange(tokens.shape[1])[None]
        for _ in range(LAYERS):
            y = nn.RMSNorm()(x)
            q = rope(nn.DenseGeneral((HEADS, HEAD_DIM))(y), position)
            k = rope(nn.DenseGeneral((KV_HEADS, HEAD_DIM))(y), position)
            v = nn.DenseGeneral((KV_HEADS, HEAD_DIM))(y)
            y = jax.nn.dot_product_attention(q, k, v, is_causal=True)
            x = x + nn.DenseGeneral(WIDTH, axis=(-2, -1))(y)
            x = x + nn.Dense(WIDTH)(jax.nn.silu(nn.Dense(2 * WIDTH)(nn.RMSNorm()(x))))
        return nn.Dense(VOCABULARY)(nn.RMSNorm()(x))


# %% [markdown]
# Trained for a minute, so that its attention attends to something:

# %%
import optax

from saw_int4_jax.demo import HELDOUT

corpus = jnp.frombuffer((HELDOUT / "python.txt").read_bytes(), jnp.uint8).astype(jnp.int32)
LENGTH, STEPS = (64, 8) if QUICK else (256, 200)
unseen, corpus = corpus[: 4 * LENGTH].reshape(4, LENGTH), corpus[4 * LENGTH :]
optimizer = optax.adamw(optax.cosine_decay_schedule(3e-3, STEPS))


def nats(variables, tokens):
    logits = Before().apply(variables, tokens[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


@jax.jit
def train(variables, state, key):
    start = jax.random.randint(key, (8, 1), 0, len(corpus) - 129)
    loss, gradient = jax.value_and_grad(nats)(variables, corpus[start + jnp.arange(129)])
    updates, state = optimizer.update(gradient, state, variables)
    return optax.apply_updates(variables, updates), state, loss


variables = Before().init(jax.random.key(0), unseen)
state = optimizer.init(variables)
for i in range(STEPS):
    variables, state, loss = train(variables, state, jax.random.key(i))
    if i % (STEPS // 4) == 0 or i == STEPS - 1:
        print(f"step {i:3}: {loss / np.log(2):.2f} bits per byte")

# %% [markdown]
# ## Swapped
#
# Three lines differ, and that a cache goes in and out: positions come from the cache, the
# attention call is `attend`. The parameters are the same, name by name.


# %%
class After(nn.Module):
    @nn.compact
    def __call__(self, tokens, cache):
        x = nn.Embed(VOCABULARY, WIDTH)(tokens)
        position = saw.positions(cache, tokens.shape[1])  # <-
        for layer in range(LAYERS):
            y = nn.RMSNorm()(x)
            q = rope(nn.DenseGeneral((HEADS, HEAD_DIM))(y), position)
            k = rope(nn.DenseGeneral((KV_HEADS, HEAD_DIM))(y), position)
            v = nn.DenseGeneral((KV_HEADS, HEAD_DIM))(y)
            y, cache = saw.attend(cache, layer, q, k, v)  # <-
            x = x + nn.DenseGeneral(WIDTH, axis=(-2, -1))(y)
            x = x + nn.Dense(WIDTH)(jax.nn.silu(nn.Dense(2 * WIDTH)(nn.RMSNorm()(x))))
        return nn.Dense(VOCABULARY)(nn.RMSNorm()(x)), cache  # <-


# %% [markdown]
# Large models have *outlier channels* in their keys. This one gets a pair by hand: key channels
# times 12, the queries' divided by as much, which leaves the model's function as it was.


# %%
def with_outlier(variables, pair=7, scale=12.0):
    factor = jnp.ones(HEAD_DIM).at[jnp.array([pair, pair + HEAD_DIM // 2])].set(scale)
    queries = [f"DenseGeneral_{4 * layer}" for layer in range(LAYERS)]  # of each layer's q, k, v, o
    keys = [f"DenseGeneral_{4 * layer + 1}" for layer in range(LAYERS)]
    params = dict(variables["params"])
    for names, scaled in ((queries, lambda x: x / factor), (keys, lambda x: x * factor)):
        params |= {name: jax.tree.map(scaled, params[name]) for name in names}
    return {"params": params}


variables = with_outlier(variables)
expected = jax.nn.log_softmax(Before().apply(variables, unseen))

# %% [markdown]
# ## Check 1: equality, whole text and token by token
#
# `extend` makes room for a step's tokens; `generate` calls it, outside of it that is our part.
# First the whole text in one step, then one token at a time, as in decoding. What is compared is
# the distribution of the next byte, with that of the model as it was: KL divergence, in nats.

# %%
ROWS = len(unseen)
sizes = dict(layers=LAYERS, kv_heads=KV_HEADS, head_dim=HEAD_DIM, page_size=32)
sizes["num_pages"] = ROWS * -(-LENGTH // 32)
SPECS = {
    "bf16": saw.CacheSpec(**sizes, dtype="bf16"),
    "int4": saw.CacheSpec(**sizes, order=1),
    "bdr": saw.CacheSpec(**sizes),
}


@jax.jit
def one_step(variables, tokens, cache):
    counts = jnp.full(cache.batch, tokens.shape[1])
    cache, _ = saw.extend(cache, counts, max_count=tokens.shape[1])
    return After().apply(variables, tokens, cache)


def divergence(logits):
    """From the model as it was, by sequence and position."""
    return np.asarray((jnp.exp(expected) * (expected - jax.nn.log_softmax(logits))).sum(-1))


kl = {}
for method, spec in SPECS.items():
    whole, _ = one_step(variables, unseen, saw.init_cache(spec, ROWS))
    cache, logits = saw.init_cache(spec, ROWS), []
    for t in range(LENGTH):
        step, cache = one_step(variables, unseen[:, t : t + 1], cache)
        logits.append(step)
    kl[method] = divergence(jnp.concatenate(logits, axis=1))
    print(
        f"{NAMES[method]:20} KL whole text {divergence(whole).mean():.6f}, "
        f"token by token {kl[method].mean():.6f}"
    )

assert kl["bf16"].mean() < 1e-3  # the swap is right: only a rounding to bfloat16 lies between

# %% [markdown]
# ## Check 2: the same tokens
#
# Greedy decoding from a cache, against the model as it was, which starts anew for every token.

# %%
prompt, count = unseen[0, :32].tolist(), 8 if QUICK else 32
plain = list(prompt)
score = jax.jit(Before().apply)
for _ in range(count):
    padded = np.zeros((1, len(prompt) + count), np.int32)
    padded[0, : len(plain)] = plain
    plain.append(int(score(variables, padded)[0, len(plain) - 1].argmax()))

for method, spec in SPECS.items():
    cache = saw.init_cache(spec, batch=1)
    result = saw.generate(After().apply, variables, [prompt], cache, max_new_tokens=count, chunk=32)
    same = [a == b for a, b in zip(result.tokens[0], plain[len(prompt) :])]
    first = same.index(False) if False in same else count
    print(f"{NAMES[method]:20} the first {first} of {count} bytes as without a cache")

# %% [markdown]
# ## The same in NNX
#
# `saw_int4_jax.nn.nnx.PagedAttention` is an attention layer with projections and RoPE; without a
# cache it is plain causal attention, so that one module trains and serves. The state goes in
# beside the tokens; any function `(variables, tokens, cache) -> (logits, cache)` will do.

# %%
from flax import nnx

from saw_int4_jax.nn.nnx import PagedAttention


class Decoder(nnx.Module):
    def __init__(self, rngs):
        sizes = dict(num_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=HEAD_DIM)
        self.embed = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs)
        self.norms = nnx.List(nnx.RMSNorm(WIDTH, rngs=rngs) for _ in range(LAYERS))
        self.attention = nnx.List(
            PagedAttention(WIDTH, layer=i, rngs=rngs, **sizes) for i in range(LAYERS)
        )
        self.head = nnx.Linear(WIDTH, VOCABULARY, rngs=rngs)

    def __call__(self, tokens, cache=None):
        x = self.embed(tokens)
        for norm, attention in zip(self.norms, self.attention):
            y, cache = attention(norm(x), cache)
            x = x + y
        return self.head(x), cache


decoder = Decoder(nnx.Rngs(0))
graph, state = nnx.split(decoder)


def forward(state, tokens, cache):
    return nnx.merge(graph, state)(tokens, cache)


plain, _ = decoder(unseen)  # no cache: as in training
counts = jnp.full(ROWS, LENGTH)
cache, _ = saw.extend(saw.init_cache(SPECS["bf16"], ROWS), counts, max_count=LENGTH)
logits, cache = jax.jit(forward)(state, unseen, cache)
difference = jnp.linalg.norm(logits - plain) / jnp.linalg.norm(plain)
print(f"BF16 cache: logits {difference:.2%} of their size from the module without a cache")
assert difference < 0.02

result = saw.generate(forward, state, [prompt], saw.init_cache(SPECS["bdr"], 1), max_new_tokens=8)
print(f"and from a BDR cache it generates {result.tokens[0]}")

# %% [markdown]
# ## What it weighs
#
# Pages are taken as a sequence grows, so the cache holds what is used, rounded up to a page. A
# dense cache is as large as the longest sequence may become.

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
block = LENGTH // 16  # positions in a point
for method, values in kl.items():
    points = values.reshape(ROWS, 16, block).mean((0, 2))
    place = block * (np.arange(16) + 0.5)
    left.plot(place, points, "o-", ms=4, color=COLORS[method], label=NAMES[method])
left.set(
    yscale="log",
    xlabel="position, bytes",
    ylabel="KL to the model as it was, nats",
    title="The swapped model, token by token",
)
left.legend(frameon=False, ncols=3, fontsize=8)
left.set_ylim(top=left.get_ylim()[1] * 4)
left.grid(alpha=0.2)

tokens = np.arange(1, 1025)
for method, spec in SPECS.items():
    if method != "int4":
        pages = -(-tokens // spec.page_size)
        kilobytes = pages * spec.page_size * spec.bytes_per_token / 1e3
        label = "paged, BF16" if method == "bf16" else "paged, INT4 or BDR"
        right.plot(tokens, kilobytes, color=COLORS[method], label=label)
dense = 1024 * SPECS["bf16"].bytes_per_token / 1e3
right.axhline(dense, color=COLORS["bf16"], ls=":", label="dense, BF16, room for 1024")
right.set(
    xlabel="tokens of a sequence",
    ylabel="kB of keys and values",
    title=f"{LAYERS} layers, {KV_HEADS} KV heads of {HEAD_DIM}",
)
right.legend(frameon=False, fontsize=8)
right.grid(alpha=0.2)
figure.savefig("your_flax_model.png")
plt.show()

"""What ways of storing keys and values cost in quality, on the same model and the same text.

Everything is teacher-forced through the cache: a token's keys and values are stored before
anything, the token itself included, reads them, in one pass over a window and, on a part of the
text, token by token as in decode. The reference is the library's BF16 cache.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import hashlib
import json
import math
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.page_format import largest_order, rotate
from saw_int4_jax import cache as paged
from saw_int4_jax.evaluate import compare_logits, windows
from saw_int4_jax.generate import Forward, generate
from saw_int4_jax.methods import LayerSample, Method, default_methods, dense, make_method
from saw_int4_jax.methods.dense import DenseCache
from saw_int4_jax.models import Model
from saw_int4_jax.models.llama import Llama, LlamaConfig
from saw_int4_jax.models.tokenizer import Tokenizer
from saw_int4_jax.rotation import scale_key_channels

Row = dict[str, Any]
_Reference = Callable[[int], Float[Array, "B T vocab"]]  # the BF16 logits of a batch, by its row

# Room in a dense cache is a multiple of this, so that groups of tokens are whole.
_GRAIN = 128
_KEPT_LOGITS = 4 << 30  # bytes of reference logits that are kept rather than computed again

NEEDLE = 32  # tokens to recall, of which the first are given
CUE = 8


# --- A method on a model ----------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A method calibrated for a model.

    Attributes:
      method: which.
      config: the model's.
      params: its parameters, with what the method folds into them.
      found: what calibration found, for a dense cache.
      seconds: what calibration took.
    """

    method: Method
    config: LlamaConfig
    params: dict[str, Any]
    found: tuple[Any, Any] = ((), ())
    seconds: float = 0.0

    @property
    def variables(self) -> dict[str, Any]:
        return {"params": self.params}

    @property
    def forward(self) -> Forward:
        return _forward(self.config, dense.attend if self.method.paged is None else paged.attend)

    def open(self, batch: int, length: int) -> Any:
        """An empty `Cache` or `DenseCache` for `length` tokens of each of `batch` sequences."""
        if self.method.paged is None:
            room = -(-length // _GRAIN) * _GRAIN
            return dense.init_dense(self.method, self.config, self.found, batch, room)
        spec = self.config.cache_spec(1, **dict(self.method.paged))
        spec = dataclasses.replace(spec, num_pages=batch * -(-length // spec.page_size))
        return paged.init_cache(spec, batch, length)


@functools.cache
def _forward(config: LlamaConfig, attend: Callable) -> Forward:
    """One object for the same arguments: as a static argument, another one compiles anew."""
    return Llama(config, attend=attend).apply


def prepare(
    method: Method,
    config: LlamaConfig,
    params: dict[str, Any],
    samples: list[LayerSample],
    seed: int = 0,
) -> Prepared:
    """Calibrates a method.

    Args:
      method: which.
      config: the model's.
      params: its parameters.
      samples: of each layer, from `dense.layer_samples`; empty if `method.uses_text` is false.
      seed: of what is random in it.

    Raises:
      ValueError: the method needs text and there are no samples.
    """
    if method.uses_text and not samples:
        raise ValueError(f"Expected calibration text for {method.name}")
    start = time.perf_counter()
    key = jax.random.key(seed)
    found: tuple[Any, Any] = ((), ())
    if method.fold is not None:
        params = method.fold(params, config, samples, key)
    if method.calibrate is not None:
        layers = [
            method.calibrate(sample, jax.random.fold_in(key, layer))
            for layer, sample in enumerate(samples)
        ]
        found = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
    jax.block_until_ready((params, found))
    return Prepared(method, config, params, found, time.perf_counter() - start)


def extend(
    cache: paged.Cache | DenseCache, counts: Int[Array, "B"], max_count: int
) -> paged.Cache | DenseCache:
    """Starts a step of `counts` tokens in either kind of cache."""
    if isinstance(cache, DenseCache):
        return dense.extend(cache, counts)
    return paged.extend(cache, counts, max_count=max_count)[0]


@functools.partial(jax.jit, static_argnames="forward")
def advance(
    forward: Forward,
    variables: Any,
    tokens: Int[Array, "B T"],
    counts: Int[Array, "B"],
    cache: Any,
) -> tuple[Float[Array, "B T vocab"], Any]:
    """One step of a model on either kind of cache: logits of its tokens, and the cache."""
    return forward(variables, tokens, extend(cache, counts, tokens.shape[1]))


@functools.partial(jax.jit, static_argnames="forward")
def one_by_one(
    forward: Forward, variables: Any, tokens: Int[Array, "B T"], cache: Any
) -> Float[Array, "B T vocab"]:
    """The logits of `advance`, taken one token at a time."""
    counts = jnp.ones(tokens.shape[0], jnp.int32)

    def body(cache, column):
        logits, cache = forward(variables, column[:, None], extend(cache, counts, 1))
        return cache, logits[:, 0]

    return lax.scan(body, cache, tokens.T)[1].swapaxes(0, 1)


# --- What is measured -------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Material:
    """Token ids that all methods are measured on.

    Attributes:
      text: windows to score; T is the context.
      calibration: windows that methods may fit to; none of them is scored.
      needles: windows whose last `NEEDLE` tokens repeat an earlier passage of random tokens.
      greedy: windows whose second half is the BF16 cache's greedy continuation of the first.
      bytes_per_token: of the text.
    """

    text: Int[np.ndarray, "N T+1"]
    calibration: Int[np.ndarray, "C T+1"]
    needles: Int[np.ndarray, "M T+1"]
    greedy: Int[np.ndarray, "M T+1"]
    bytes_per_token: float


def split_windows(
    text: Int[np.ndarray, "N T+1"], every: int = 5
) -> tuple[Int[np.ndarray, "N T+1"], Int[np.ndarray, "C T+1"]]:
    """(to score, to calibrate on): every fifth window is for calibration.

    Raises:
      ValueError: there are fewer than two.
    """
    if len(text) < 2:
        raise ValueError(f"Expected {len(text)=} windows to be two or more: one for calibration")
    for_calibration = np.arange(len(text)) % every == min(every, len(text)) - 1
    return text[~for_calibration], text[for_calibration]


def read_windows(
    tokenizer: Tokenizer, files: Sequence[pathlib.Path], context: int, limit: int | None = None
) -> tuple[Int[np.ndarray, "N T+1"], Int[np.ndarray, "C T+1"], float]:
    """Text files as (windows to score, windows to calibrate on, bytes per token).

    Args:
      tokenizer: the model's.
      files: UTF-8 text; windows do not cross files.
      context: T, tokens of a window.
      limit: the most windows to score, spread over the text; `None`: all.

    Raises:
      ValueError: there is not text enough for two windows.
    """
    parts, size, tokens = [], 0, 0
    for file in files:
        content = pathlib.Path(file).read_text(encoding="utf-8")
        ids = tokenizer.encode(content)
        ids = ids if tokenizer.bos_id is None else ids[1:]
        size, tokens = size + len(content.encode()), tokens + len(ids)
        if len(ids) > context:
            parts.append(windows(ids, context, tokenizer.bos_id))
    if not parts:
        raise ValueError(f"Expected a text of {tokens} tokens to hold windows of {context}")
    text, calibration = split_windows(np.concatenate(parts))
    if limit is not None and limit < len(text):
        text = text[np.linspace(0, len(text) - 1, limit).astype(int)]
    return text, calibration, size / tokens


def make_needles(
    haystack: Int[np.ndarray, "N T+1"], count: int, seed: int = 0
) -> Int[np.ndarray, "M T+1"]:
    """Windows of text in which a passage of random tokens comes twice, the second time at the end.

    The tokens are drawn from those of the text, the first place anywhere in the first three
    quarters.
    """
    rng = np.random.default_rng(seed)
    length = haystack.shape[1]
    alphabet = np.unique(haystack[:, 1:])
    rows = haystack[rng.integers(0, len(haystack), count)].copy()
    for row in rows:
        needle = rng.choice(alphabet, min(NEEDLE, length // 4))
        place = rng.integers(1, max(2, length * 3 // 4 - len(needle)))
        row[place : place + len(needle)] = needle
        row[-len(needle) :] = needle
    return rows


def continue_greedily(
    config: LlamaConfig, params: dict[str, Any], text: Int[np.ndarray, "M T+1"]
) -> Int[np.ndarray, "M T+1"]:
    """The windows with their second half replaced by the BF16 cache's greedy continuation."""
    count, length = text.shape
    kept = length // 2
    reference = prepare(make_method("bf16", config.head_dim), config, params, [])
    result = generate(
        Llama(config, last_only=True).apply,
        reference.variables,
        text[:, :kept].tolist(),
        reference.open(count, length),
        max_new_tokens=length - kept,
        chunk=1 << max(0, (kept - 1).bit_length() - 1),
        every=length - kept,
    )
    return np.concatenate([text[:, :kept], np.asarray(result.tokens, np.int32)], axis=1)


def make_material(
    config: LlamaConfig,
    params: dict[str, Any],
    text: Int[np.ndarray, "N T+1"],
    calibration: Int[np.ndarray, "C T+1"],
    *,
    rows: int,
    bytes_per_token: float = 1.0,
) -> Material:
    """Material with `rows` windows of needles and of greedy text."""
    spread = text[np.linspace(0, len(text) - 1, rows).astype(int)]
    return Material(
        text=text,
        calibration=calibration,
        needles=make_needles(np.concatenate([text, calibration]), rows),
        greedy=continue_greedily(config, params, spread),
        bytes_per_token=bytes_per_token,
    )


def compare(
    config: LlamaConfig,
    params: dict[str, Any],
    material: Material,
    methods: Sequence[str],
    *,
    batch: int = 8,
    seeds: int = 3,
    calibration_tokens: int = 8192,
    decode_tokens: int = 128,
    workers: int = 1,
) -> Iterator[list[Row]]:
    """Measures methods, in order.

    Args:
      config: the model's.
      params: its parameters.
      material: from `make_material`, for this model; re-parameterizations may share it.
      methods: names that `make_method` knows.
      batch: windows at a time.
      seeds: how often a method with randomness is prepared and measured.
      calibration_tokens: the most tokens that calibration reads.
      decode_tokens: tokens of each window of one batch that go through one by one as well; 0
        leaves that out.
      workers: methods at a time, as threads: most of a small model's time goes into compiling.

    Yields:
      For each method its rows: `accuracy` first, then `accuracy_by_context` and
      `attention_error`.
    """
    samples: list[LayerSample] = []
    made = [make_method(name, config.head_dim) for name in methods]
    length = material.text.shape[1] - 1
    if any(method.uses_text for method in made):
        rows = max(1, calibration_tokens // length)
        samples = dense.layer_samples(config, params, material.calibration[:rows, :-1])
    bf16 = prepare(make_method("bf16", config.head_dim), config, params, [])
    kept = None if 4 * material.text.size * config.vocab_size <= _KEPT_LOGITS else 0

    @functools.lru_cache(maxsize=kept)
    def reference(row: int) -> Float[Array, "B T vocab"]:
        return _logits(bf16, _batch(material.text, row, batch)[:, :-1])

    def measure(method: Method) -> list[Row]:
        variants = (
            prepare(method, config, params, samples, seed)
            for seed in range(seeds if method.random else 1)
        )
        runs = [_measure(x, material, reference, batch, decode_tokens) for x in variants]
        tokens = len(samples[0].q) if method.uses_text else 0
        return _rows(method, config, material, runs, calibration_tokens=tokens)

    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        yield from pool.map(measure, made)


def evaluate_model(
    model: Model,
    files: Sequence[pathlib.Path],
    *,
    name: str,
    methods: Sequence[str] | None = None,
    scales: Sequence[int] = (1,),
    outlier_pair: int = 0,
    context: int | None = None,
    limit: int | None = None,
    rows: int = 8,
    path: str | pathlib.Path | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    **options: Any,
) -> Iterator[list[Row]]:
    """Compares methods on a model and its re-parameterizations with outlier keys.

    Args:
      model: what to measure on.
      files: UTF-8 text.
      name: of the model, for the rows.
      methods: names that `make_method` knows; `None`: all that are worth it.
      scales: how much larger the injected outlier pair is; 1 is the model as it is.
      outlier_pair: the RoPE pair of keys that is made larger.
      context: tokens of a window; `None`: the model's, at most 1024.
      limit: the most windows to score.
      rows: windows of needles, and of greedy text.
      path: results of an earlier run: what it measured in the same set-up is not measured again.
      progress: called with the methods done and their total.
      **options: as in `compare`.

    Yields:
      All rows so far, after every method.

    Raises:
      ValueError: the text is too short, a method unknown, or `path` no results file.
    """
    config = model.config
    names = list(methods or default_methods(config.head_dim))
    for method in names:
        make_method(method, config.head_dim)
    context = context or min(config.max_length, 1024)
    text, calibration, bytes_per_token = read_windows(model.tokenizer, files, context, limit)
    settings = {key: value for key, value in options.items() if key not in ("workers", "batch")}
    setup = fingerprint(model=name, text=text, calibration=calibration, rows=rows, **settings)
    found = load_rows(path, setup) if path else []
    params = model.params
    material = make_material(
        config, params, text, calibration, rows=rows, bytes_per_token=bytes_per_token
    )
    count, total = 0, len(scales) * len(names)
    for scale in scales:
        labels = {"model": name, "setup": setup, "outlier_scale": scale}
        params = scale_key_channels(
            model.params, config, outlier_pair % (config.head_dim // 2), scale
        )
        here = [row for row in found if row["outlier_scale"] == scale]
        done = {row["method"] for row in here if row["op"] == "accuracy"}
        if not any(row["op"] == "key_outliers" for row in here):
            found += [labels | row for row in key_outliers(config, params, text[:4, :-1])]
        count += len(done & set(names))
        missing = [method for method in names if method not in done]
        progress(count, total)
        for new in compare(config, params, material, missing, **options):
            found += [labels | row for row in new]
            count += 1
            progress(count, total)
            yield found
    yield found


def _batch(text: np.ndarray, row: int, batch: int) -> np.ndarray:
    """`batch` windows from a row on, the last repeated at the end."""
    return text[np.minimum(np.arange(row, row + batch), len(text) - 1)]


def _logits(prepared: Prepared, tokens: np.ndarray) -> Float[Array, "B T vocab"]:
    batch, length = tokens.shape
    cache = prepared.open(batch, length)
    counts = np.full(batch, length, np.int32)
    return advance(prepared.forward, prepared.variables, tokens, counts, cache)[0]


def _figures(
    prepared: Prepared, text: np.ndarray, batch: int, reference: _Reference | None = None
) -> Float[np.ndarray, "4 N T"]:
    """What `compare_logits` says of each token; without a reference, of the logits themselves."""
    parts = []
    for row in range(0, len(text), batch):
        tokens = _batch(text, row, batch)
        logits = _logits(prepared, tokens[:, :-1])
        figures = compare_logits(logits, reference(row) if reference else logits, tokens[:, 1:])
        parts.append(np.asarray(figures)[:, : len(text) - row])
    return np.concatenate(parts, axis=1)


@dataclasses.dataclass(frozen=True)
class _Run:
    """One prepared method's raw results."""

    nats: Float[np.ndarray, "N T"]
    kl: Float[np.ndarray, "N T"]
    agree: Float[np.ndarray, "N T"]
    recalled: Float[np.ndarray, "M n"]
    diverged: Int[np.ndarray, "M"]
    attention_error: Float[np.ndarray, "L"]
    decode_kl: tuple[float, float]  # token by token, and the same tokens in one pass
    seconds: float


def _measure(
    prepared: Prepared, material: Material, reference: _Reference, batch: int, decode_tokens: int
) -> _Run:
    text = material.text
    nats, kl, agree, _ = _figures(prepared, text, batch, reference)
    recalled = _figures(prepared, material.needles, batch)[3]
    recalled = recalled[:, -min(NEEDLE, text.shape[1] // 4) + CUE :]
    continued = _figures(prepared, material.greedy, batch)[3, :, text.shape[1] // 2 - 1 :]
    diverged = np.where(continued.all(1), continued.shape[1], continued.argmin(1))

    decode_kl = math.nan, math.nan
    if decode_tokens:
        tokens = _batch(text, 0, batch)[:, : decode_tokens + 1]
        cache = prepared.open(batch, decode_tokens)
        logits = one_by_one(prepared.forward, prepared.variables, tokens[:, :-1], cache)
        figures = compare_logits(logits, reference(0)[:, :decode_tokens], tokens[:, 1:])
        real = min(batch, len(text))
        decode_kl = float(figures[1, :real].mean()), float(kl[:real, :decode_tokens].mean())
    error = attention_error(prepared, text[:1, :-1])
    return _Run(nats, kl, agree, recalled, diverged, error, decode_kl, prepared.seconds)


def attention_error(prepared: Prepared, tokens: Int[np.ndarray, "B T"]) -> Float[np.ndarray, "L"]:
    """How far each layer's attention, given exact inputs, ends from the exact one, relatively.

    Measured behind the output projection, in the Frobenius norm.
    """
    config = prepared.config
    layers = dense.observe(config, prepared.params, tokens)
    outputs = [dense.output_projection(config, prepared.params, i) for i in range(len(layers[0]))]
    return np.asarray(_attention_error(config, layers, outputs, prepared.open(*tokens.shape)))


@functools.partial(jax.jit, static_argnums=0)
def _attention_error(config, layers, outputs, cache):
    q, k, v, exact = layers
    counts = jnp.full(q.shape[1], q.shape[2], jnp.int32)
    cache = extend(cache, counts, q.shape[2])
    attend = dense.attend if isinstance(cache, DenseCache) else paged.attend
    errors = []
    for layer in range(config.num_layers):
        window = config.window if layer >= config.full_layers else None
        out, cache = attend(cache, layer, q[layer], k[layer], v[layer], window=window)
        ours, theirs = (
            jnp.einsum("bthd,hde->bte", x, outputs[layer], precision=lax.Precision.HIGHEST)
            for x in (out, exact[layer])
        )
        errors.append(jnp.linalg.norm(ours - theirs) / jnp.linalg.norm(theirs))
    return jnp.stack(errors)


# --- Rows -------------------------------------------------------------------------------------


def _rows(
    method: Method,
    config: LlamaConfig,
    material: Material,
    runs: Sequence[_Run],
    *,
    calibration_tokens: int,
) -> list[Row]:
    context = material.text.shape[1] - 1

    def mean(name: str) -> np.ndarray:
        return np.mean([getattr(run, name) for run in runs], axis=0)

    kl, nats = mean("kl"), mean("nats")
    by_window = kl.mean(1)
    size = config.num_kv_heads, config.head_dim
    accuracy: Row = {
        "op": "accuracy",
        "method": method.name,
        "about": method.about,
        "kernels": method.paged is not None,
        "bits_per_value": method.bits(*size, context),
        "bits_per_value_32k": method.bits(*size, 32768),
        "paging": method.paging,
        "regular": method.regular,
        "fused": method.fused,
        "context": context,
        "tokens": kl.size,
        "seeds": len(runs),
        "perplexity": math.exp(nats.mean()),
        "bits_per_byte": nats.mean() / math.log(2) / material.bytes_per_token,
        "kl": kl.mean(),
        "kl_se": by_window.std(ddof=1) / math.sqrt(len(by_window)) if len(by_window) > 1 else None,
        "kl_seed_std": np.std([run.kl.mean() for run in runs], ddof=1) if len(runs) > 1 else None,
        "kl_p99": np.mean([np.quantile(run.kl, 0.99) for run in runs]),
        "top1": mean("agree").mean(),
        "recall": mean("recalled").mean(),
        "recall_se": mean("recalled").mean(1).std() / math.sqrt(len(material.needles)),
        "diverged_at": np.median(np.concatenate([run.diverged for run in runs])),
        "greedy_tokens": material.greedy.shape[1] // 2,
        "attention_error": mean("attention_error").mean(),
        "decode_kl": mean("decode_kl")[0],
        "one_pass_kl": mean("decode_kl")[1],
        "calibration_tokens": calibration_tokens,
        "calibration_s": min(run.seconds for run in runs) if calibration_tokens else 0.0,
        "kl_windows": [float(f"{x:.4g}") for x in by_window],
    }
    halves = [context >> i for i in range(context.bit_length()) if context >> i >= 64]
    by_context = [
        {
            "op": "accuracy_by_context",
            "method": method.name,
            "context": end,
            "kl": kl[:, end // 2 : end].mean(),
            "perplexity": math.exp(nats[:, end // 2 : end].mean()),
            "top1": mean("agree")[:, end // 2 : end].mean(),
        }
        for end in halves
    ]
    errors = [
        {"op": "attention_error", "method": method.name, "layer": layer, "attention_error": error}
        for layer, error in enumerate(mean("attention_error"))
    ]
    return [{k: _plain(v) for k, v in row.items()} for row in (accuracy, *by_context, *errors)]


def _plain(x: Any) -> Any:
    """NumPy scalars as Python's; what is not finite, as JSON cannot have it, as None."""
    x = x.item() if isinstance(x, np.generic) else x
    return None if isinstance(x, float) and not math.isfinite(x) else x


def fingerprint(**what: Any) -> str:
    """A short name for a set-up; rows of another one are not mixed with it."""
    digest = hashlib.sha256()
    for name, value in sorted(what.items()):
        digest.update(name.encode())
        digest.update(value.tobytes() if isinstance(value, np.ndarray) else repr(value).encode())
    return digest.hexdigest()[:12]


def load_rows(path: str | pathlib.Path, setup: str) -> list[Row]:
    """The rows that an earlier run with the same set-up left in a results file."""
    path = pathlib.Path(path)
    if not path.is_file():
        return []
    try:
        rows = json.loads(path.read_text())["rows"]
        return [row for row in rows if row.get("setup") == setup]
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"Expected {path} to be a results file: {error}") from error


def key_outliers(
    config: LlamaConfig, params: dict[str, Any], tokens: Int[np.ndarray, "B T"]
) -> list[Row]:
    """How uneven the channels of keys are in each layer, before and after rotation.

    `channel_ratio` is the largest channel's root mean square over the median channel's, `range`
    the mean over vectors of (maximum - minimum) over the root mean square, which the INT4 step is
    a fifteenth of; both the mean over KV heads.
    """
    k = dense.observe(config, params, tokens)[1]  # [L, B, T, K, D]
    largest, rows = largest_order(config.head_dim), []
    for order in [n for n in (1, 16, 32, 64, 128) if n < largest] + [largest]:
        rotated = rotate(k, order)
        rms = jnp.sqrt((rotated**2).mean((1, 2)))  # [L, K, D]
        ratio = (rms.max(-1) / jnp.median(rms, axis=-1)).mean(-1)
        spread = rotated.max(-1) - rotated.min(-1)
        span = (spread / jnp.sqrt((rotated**2).mean(-1))).mean((1, 2, 3))
        rows += [
            {
                "op": "key_outliers",
                "layer": layer,
                "order": order,
                "channel_ratio": float(ratio[layer]),
                "range": float(span[layer]),
            }
            for layer in range(config.num_layers)
        ]
    return rows

"""The demonstration: text from a rotated INT4 cache, and what 4 bits cost next to BF16."""

from __future__ import annotations

import dataclasses
import importlib.resources
import pathlib
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Int

from saw_int4_jax.cache import CacheSpec, init_cache
from saw_int4_jax.evaluate import evaluate, windows
from saw_int4_jax.generate import stream
from saw_int4_jax.models import Model
from saw_int4_jax.models.llama import Llama
from saw_int4_jax.rotation import scale_key_channels

DATA = pathlib.Path(str(importlib.resources.files("saw_int4_jax"))) / "data"
REFERENCE_MODEL = DATA / "reference"
HELDOUT = DATA / "heldout"
PROMPT = "def "

# One RoPE channel pair of every key, made an outlier without changing the function.
OUTLIER_PAIR = 10
OUTLIER_SCALES = (1, 16)

METHOD_OPTIONS: dict[str, dict[str, Any]] = {
    "bf16": dict(dtype="bf16"),
    "int4": dict(order=1),
    "bdr": dict(),
}

METHODS = tuple(METHOD_OPTIONS)

WINDOW = 1024


def compare_methods(
    model: Model, *, progress: Callable[[int, int], None] | None = None
) -> list[dict[str, Any]]:
    """Rows for BF16, INT4 and BDR: quality on the held-out text, bytes, and decode speed.

    Each for the model as trained and for its exact re-parameterization with one outlier channel
    pair (`outlier_scale` 16), because large models have such channels and this small one has few.
    """
    text = heldout_windows(model)
    specs = [model.config.cache_spec(1, **METHOD_OPTIONS[method]) for method in METHODS]
    speeds = [decode_speed(model, spec) for spec in specs]
    forward = Llama(model.config).apply
    rows = []
    for number, scale in enumerate(OUTLIER_SCALES):

        def report(done: int, total: int, first: int = number) -> None:
            if progress is not None:
                progress(first * total + done, len(OUTLIER_SCALES) * total)

        params = scale_key_channels(model.params, model.config, OUTLIER_PAIR, scale)
        scores = evaluate(forward, {"params": params}, text, specs, progress=report)
        rows += [
            {
                "op": "demo",
                "model": "reference",
                "outlier_scale": scale,
                "method": spec.method,
                "order": spec.format.order,
                "tokens": score.tokens,
                "bits_per_byte": score.bits_per_byte(score.tokens),  # a token is a byte
                "kl": score.kl,
                "top1": score.top1,
                "cache_bytes_per_token": spec.bytes_per_token,
                "tokens_per_s": speed,
            }
            for spec, score, speed in zip(specs, scores, speeds)
        ]
    return rows


def heldout_windows(model: Model) -> Int[np.ndarray, "N length+1"]:
    """The held-out text in windows of the model's context, a file after the other."""
    tokenizer = model.tokenizer
    files = sorted(HELDOUT.glob("*.txt"))
    texts = [tokenizer.encode(file.read_text(encoding="utf-8"))[1:] for file in files]
    return np.concatenate([windows(text, WINDOW, tokenizer.bos_id) for text in texts])


def decode_speed(model: Model, spec: CacheSpec, *, tokens: int = 64) -> float:
    """Tokens per second of the jitted decode loop, batch 1, after one loop that compiles it."""
    spec = dataclasses.replace(spec, num_pages=-(-(2 * tokens + 2) // spec.page_size))
    parts = stream(
        Llama(model.config, last_only=True).apply,
        model.variables,
        [[0]],
        init_cache(spec, 1),
        max_new_tokens=2 * tokens + 1,
        chunk=1,
        every=tokens,
    )
    next(parts)  # prefill
    next(parts)
    start = time.perf_counter()
    next(parts)
    return tokens / (time.perf_counter() - start)

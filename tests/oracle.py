"""What the kernels must compute, written a second time in NumPy and as plainly as possible.

Tokens are held in logical order: codes `uint8 [..., K, 2, D]` and words `uint32 [..., K, 2]`, key
then value. In the `bf16` layout the codes are the bits, `uint16`, and there are no words.
"""

from __future__ import annotations

import numpy as np
from ml_dtypes import bfloat16

NAN_WORD = 0x7FC0


def hadamard(order: int) -> np.ndarray:
    """Entry i, j is minus one to the number of bits that i and j share, over sqrt(order)."""
    index = np.arange(order)
    shared = np.bitwise_count(index[:, None] & index)
    return (1.0 - 2.0 * (shared % 2)) / np.sqrt(order)


def rotate(x: np.ndarray, order: int) -> np.ndarray:
    """Multiplies each run of `order` channels by `hadamard(order)`, in the dtype of x."""
    blocks = x.reshape(*x.shape[:-1], x.shape[-1] // order, order)
    return (_signed_sums(blocks) * x.dtype.type(order**-0.5)).reshape(x.shape)


def _signed_sums(x: np.ndarray) -> np.ndarray:
    if x.shape[-1] == 1:
        return x
    left, right = (_signed_sums(half) for half in np.split(x, 2, axis=-1))
    return np.concatenate([left + right, left - right], axis=-1)


def quantize(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes `uint8 [..., D]` and words `uint32 [...]`, one vector at a time."""
    codes = np.zeros(x.shape, np.uint8)
    words = np.zeros(x.shape[:-1], np.uint32)
    with np.errstate(all="ignore"):
        for row in np.ndindex(words.shape):
            codes[row], words[row] = _quantize_vector(x[row].astype(np.float32))
    return codes, words


def _quantize_vector(x: np.ndarray) -> tuple[np.ndarray, int]:
    minimum = x.min().astype(bfloat16)
    if minimum > x.min():
        minimum = np.nextafter(minimum, bfloat16(-np.inf))
    spread = x.max() - np.float32(minimum)
    if not np.isfinite(spread):
        return np.zeros(x.shape), NAN_WORD
    scale = (spread * np.float32(1 / 15)).astype(bfloat16)
    if scale < np.finfo(np.float32).tiny:
        return np.zeros(x.shape), join(bfloat16(0), minimum)
    steps = (x - np.float32(minimum)) * (np.float32(1) / np.float32(scale))
    return np.clip(np.rint(steps), 0, 15), join(scale, minimum)


def join(scale: bfloat16, minimum: bfloat16) -> int:
    """The word of one vector."""
    return int(scale.view(np.uint16)) + int(minimum.view(np.uint16)) * 2**16


def split(words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scale and minimum in float64."""
    halves = (words % 2**16, words // 2**16)
    return tuple(half.astype(np.uint16).view(bfloat16).astype(np.float64) for half in halves)


def dequantize(codes: np.ndarray, words: np.ndarray | None) -> np.ndarray:
    """The numbers that codes stand for, float64; bits of bfloat16 if there are no words."""
    if words is None:
        return codes.view(bfloat16).astype(np.float64)
    scale, minimum = split(words)
    return codes * scale[..., None] + minimum[..., None]


def encode(
    k: np.ndarray, v: np.ndarray, layout: str, order: int, value_order: int
) -> tuple[np.ndarray, np.ndarray | None]:
    """The codes and words of tokens `[n, K, D]`."""
    if layout == "bf16":
        return np.stack([k, v], axis=-2).astype(bfloat16).view(np.uint16), None
    k, v = (x.astype(np.float32) for x in (k, v))
    return quantize(np.stack([rotate(k, order), rotate(v, value_order)], axis=-2))


def write(codes, words, layer: int, slots, new_codes, new_words) -> None:
    """Sets tokens of `codes [L, P, S, K, 2, D]` and `words [L, P, S, K, 2]`."""
    _, num_pages, page_size, *_ = codes.shape
    for i, slot in enumerate(slots):
        if 0 <= slot < num_pages * page_size:
            codes[layer, slot // page_size, slot % page_size] = new_codes[i]
            if words is not None:
                words[layer, slot // page_size, slot % page_size] = new_words[i]


def to_arrays(codes, words, layout: str) -> tuple[np.ndarray, np.ndarray | None]:
    """Logical order → the arrays of a layout, axes as in the table of `page_format`."""
    if layout == "paired":
        rows = codes[..., 0, :] + 16 * codes[..., 1, :]  # [L, P, S, K, D]
        return rows.transpose(0, 1, 3, 2, 4), fold(words.transpose(0, 1, 4, 3, 2))
    if layout == "bf16":
        return codes.transpose(0, 1, 3, 4, 2, 5), None
    quarters = codes.reshape(*codes.shape[:-1], 4, -1)
    rows = sum(quarters[..., i, :].astype(np.uint16) * np.uint16(16**i) for i in range(4))
    return rows.transpose(0, 1, 3, 4, 2, 5), words.transpose(0, 1, 3, 4, 2)


def fold(words: np.ndarray) -> np.ndarray:
    """`[L, P, 2, K, S]` → `[L, P, 1, K * S / 64, 128]`, where pages are small and heads enough."""
    _, _, _, kv_heads, page_size = words.shape
    share = 64 // page_size
    if 64 % page_size or kv_heads % share:
        return words
    rows = []
    for first in range(0, kv_heads, share):
        heads = [words[:, :, kind, first + i] for kind in (0, 1) for i in range(share)]
        rows.append(np.concatenate(heads, axis=-1))
    return np.stack(rows, axis=2)[:, :, None]


def unfold(scales: np.ndarray, page_size: int) -> np.ndarray:
    """The inverse of `fold`."""
    if scales.shape[2] == 2:
        return scales
    share = 64 // page_size
    heads = [
        [
            scales[:, :, 0, row, (kind * share + i) * page_size :][..., :page_size]
            for row in range(scales.shape[3])
            for i in range(share)
        ]
        for kind in (0, 1)
    ]
    return np.moveaxis(np.array(heads), (0, 1), (2, 3))


def from_arrays(data, scales, layout: str) -> tuple[np.ndarray, np.ndarray | None]:
    """The inverse of `to_arrays`."""
    data = np.asarray(data)
    if layout == "paired":
        rows = data.transpose(0, 1, 3, 2, 4)
        codes = np.stack([rows % 16, rows // 16], axis=-2)
        return codes, unfold(np.asarray(scales), data.shape[3]).transpose(0, 1, 4, 3, 2)
    rows = data.transpose(0, 1, 4, 2, 3, 5)
    if layout == "bf16":
        return np.ascontiguousarray(rows), None
    codes = np.concatenate([rows // 16**i % 16 for i in range(4)], axis=-1)
    return codes.astype(np.uint8), np.asarray(scales).transpose(0, 1, 4, 2, 3)


def attention(
    q: np.ndarray,
    keys: np.ndarray,
    values: np.ndarray,
    page_table: np.ndarray,
    lengths,
    query_lengths,
    *,
    causal: bool,
    scale: float,
    window: int | None,
    soft_cap: float | None,
    sinks: np.ndarray | None,
) -> np.ndarray:
    """Attention of `q [B, T, H, D]` over `keys` and `values [P, S, K, D]`, one query at a time."""
    _, page_size, kv_heads, _ = keys.shape
    batch, _, heads, _ = q.shape
    out = np.zeros(q.shape)
    for b in range(batch):
        tokens = np.arange(lengths[b])
        pages = page_table[b, tokens // page_size]
        sequence_keys = keys[pages, tokens % page_size]  # [length, K, D]
        sequence_values = values[pages, tokens % page_size]
        for t in range(query_lengths[b]):
            position = lengths[b] - query_lengths[b] + t
            stop = position + 1 if causal else lengths[b]
            start = 0 if window is None else max(0, position + 1 - window)
            if stop <= start:
                continue
            for h in range(heads):
                head = h // (heads // kv_heads)
                scores = sequence_keys[start:stop, head] @ q[b, t, h] * scale
                if soft_cap is not None:
                    scores = soft_cap * np.tanh(scores / soft_cap)
                top = scores.max() if sinks is None else max(scores.max(), sinks[h])
                weights = np.exp(scores - top)
                total = weights.sum() + (0 if sinks is None else np.exp(sinks[h] - top))
                out[b, t, h] = weights / total @ sequence_values[start:stop, head]
    return out

"""The page format: how keys and values lie in memory. The one contract between all kernels.

Logical, the same everywhere. Each (layer, token, KV head) has a key and a value vector of D
numbers. The key is first rotated by a block-diagonal Hadamard matrix (SAW-INT4, arXiv
2604.19157), then each vector is stored as D codes 0..15 and one `uint32`: the low
16 bits are a bfloat16 scale, the high 16 bits a bfloat16 minimum, and

    x ≈ code * scale + minimum.

That is 4 + 32 / D bits per number: 4.25 at D = 128.

Physical, one `data` and one `scales` array for all layers (L layers, P pages of S tokens, K KV
heads), named by layout:

| layout   | data                          | scales               |
|----------|-------------------------------|----------------------|
| `paired` | `uint8 [L, P, K, S, D]`       | `uint32 [L, P, 2, K, S]` |
| `split`  | `uint16 [L, P, K, 2, S, D/4]` | `uint32 [L, P, K, 2, S]` |
| `bf16`   | `uint16 [L, P, K, 2, S, D]`   | none: not quantized  |

`paired` puts the key code in the low nibble and the value code in the high nibble of one byte:
rows as wide as D, no interleaving (TPU, CPU). A TPU would pad rows of under 128 scales: if S
divides 64, and 64 / S divides K, `paired` has its scales as `uint32 [L, P, 1, K * S / 64, 128]`,
each row the keys of 64 / S heads and then their values. `split` keeps key rows and value rows apart
(key, then value) as words of four codes: nibble i of word c is channel c + i * D/4 (GPU).
`bf16` holds the bits of plain bfloat16 numbers: as integers, because XLA on CPU widens the whole
operand of a bfloat16 scatter or gather to float32.

Everything here is plain `jnp`: it is the documentation, the oracle and the CPU fallback.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int, UInt8, UInt32

Layout = Literal["paired", "split", "bf16"]
LAYOUTS: tuple[Layout, ...] = ("paired", "split", "bf16")

# Of what follows. Another number where stored bytes would come to mean something else.
VERSION = 1

_TINY = float(np.finfo(np.float32).tiny)
# A factor, because XLA turns a division by a constant into one under jit and not elsewhere.
_FIFTEENTH = np.float32(1 / 15)


@dataclasses.dataclass(frozen=True)
class PageFormat:
    """What the bytes of a page mean. Static: two formats are two compiled programs.

    Attributes:
      layout: physical layout, see the module's table. `bf16` is not quantized.
      order: Hadamard order applied to keys (and to queries when reading). A power of two that
        divides D; 1 is no rotation.
      rotate_v: also rotate values when writing and undo it on the attention output. Leave it off
        when the rotation has been folded into the projections around the attention.
    """

    layout: Layout
    order: int = 1
    rotate_v: bool = False

    def __post_init__(self):
        layout, order, rotate_v = self.layout, self.order, self.rotate_v
        if layout not in LAYOUTS:
            raise ValueError(f"Expected {layout=} to be one of {LAYOUTS}")
        if order < 1 or order & (order - 1):
            raise ValueError(f"Expected {order=} to be a power of two")
        if layout == "bf16" and (order > 1 or rotate_v):
            raise ValueError(f"Expected no rotation with {layout=}, got {order=} and {rotate_v=}")

    @property
    def value_order(self) -> int:
        """The Hadamard order applied to values: `order` with `rotate_v`, else 1."""
        return self.order if self.rotate_v else 1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pages:
    """The pages of all layers: arrays as in the module's table, and their format."""

    data: Array
    scales: Array | None
    format: PageFormat = dataclasses.field(metadata={"static": True})

    @property
    def _dims(self) -> tuple[int, ...]:
        """(L, P, K, S, D)."""
        layers, num_pages, kv_heads, *_, page_size, width = self.data.shape
        head_dim = 4 * width if self.format.layout == "split" else width
        return layers, num_pages, kv_heads, page_size, head_dim

    @property
    def layers(self) -> int:
        return self._dims[0]

    @property
    def num_pages(self) -> int:
        return self._dims[1]

    @property
    def kv_heads(self) -> int:
        return self._dims[2]

    @property
    def page_size(self) -> int:
        return self._dims[3]

    @property
    def head_dim(self) -> int:
        return self._dims[4]

    @property
    def nbytes(self) -> int:
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))


def preferred_layout(implementation: str | None = None) -> Layout:
    """The INT4 layout that an implementation reads fastest; `None`: the default device's."""
    if implementation is None and jax.default_backend() == "gpu":
        implementation = "triton"
    return "split" if implementation == "triton" else "paired"


def page_specs(format: PageFormat, pages: str | None, kv_heads: str | None) -> Any:
    """`Pages` of a `PartitionSpec` for each array: which mesh axes split pages and KV heads."""
    data: Any = PartitionSpec(None, pages, kv_heads)
    if format.layout == "bf16":
        return Pages(data, None, format)
    scales: Any = data
    if format.layout == "paired":
        scales = PartitionSpec(None, pages, None, kv_heads)
    return Pages(data, scales, format)


def init_pages(
    format: PageFormat, *, layers: int, num_pages: int, kv_heads: int, page_size: int, head_dim: int
) -> Pages:
    """Zeroed pages. Unwritten slots are never read, so zeros are only for reproducibility.

    Raises:
      ValueError: a size is not positive, `format.order` does not divide `head_dim`, or the
        `split` layout meets a `head_dim` that is no multiple of four.
    """
    sizes = dict(layers=layers, num_pages=num_pages, kv_heads=kv_heads, page_size=page_size)
    for name, size in {**sizes, "head_dim": head_dim}.items():
        if size < 1:
            raise ValueError(f"Expected {name}={size} to be positive")
    layout, order = format.layout, format.order
    if head_dim % order:
        raise ValueError(f"Expected rotation {order=} to divide {head_dim=}")
    if layout == "split" and head_dim % 4:
        raise ValueError(f"Expected {head_dim=} to be a multiple of 4 with {layout=}")
    lead = (layers, num_pages)
    match layout:
        case "paired":
            data = jnp.zeros((*lead, kv_heads, page_size, head_dim), jnp.uint8)
            scales = fold_scales(jnp.zeros((*lead, 2, kv_heads, page_size), jnp.uint32))
        case "split":
            data = jnp.zeros((*lead, kv_heads, 2, page_size, head_dim // 4), jnp.uint16)
            scales = jnp.zeros((*lead, kv_heads, 2, page_size), jnp.uint32)
        case "bf16":
            data = jnp.zeros((*lead, kv_heads, 2, page_size, head_dim), jnp.uint16)
            return Pages(data, None, format)
    return Pages(data, scales, format)


# --- Rotation -------------------------------------------------------------------------------


def largest_order(head_dim: int) -> int:
    """The largest power of two that divides `head_dim`: 128 → 128, 96 → 32, 80 → 16."""
    return head_dim & -head_dim


def hadamard(order: int) -> Float[np.ndarray, "order order"]:
    """The orthonormal Sylvester Hadamard matrix, float64. Symmetric: its own inverse."""
    signs = np.ones((1, 1))
    while len(signs) < order:
        signs = np.block([[signs, signs], [signs, -signs]])
    return signs / np.sqrt(order)


def rotate(x: Float[Array, "*lead D"], order: int) -> Float[Array, "*lead D"]:
    """Multiplies each run of `order` channels by `hadamard(order)`, in float32.

    Butterflies rather than a matrix product: every sum has one order, whatever the batch, backend
    or blocking. Rotating twice gives x back. Queries and keys rotated alike keep their dot
    products.

    Args:
      x: any float dtype.
      order: a power of two that divides D; 1 returns x as float32.
    """
    *lead, head_dim = x.shape
    x = x.astype(jnp.float32)
    if order == 1:
        return x
    half = 1
    while half < order:
        pairs = x.reshape(*lead, head_dim // (2 * half), 2, half)
        a, b = pairs[..., 0, :], pairs[..., 1, :]
        x = jnp.stack([a + b, a - b], axis=-2)
        half *= 2
    return x.reshape(*lead, head_dim) * np.float32(order**-0.5)


# --- Quantization ---------------------------------------------------------------------------


def quantize(
    x: Float[Array, "*lead D"],
) -> tuple[UInt8[Array, "*lead D"], UInt32[Array, "*lead"]]:
    """Quantizes each vector to codes 0..15 and its scale word.

    The minimum is rounded down and the scale to nearest in bfloat16 first, and the codes are
    computed from the rounded pair: no number moves by more than half a step, plus 2^-9 of the
    range at the very top. A constant bfloat16 row is exact. A row that holds a NaN or an infinity,
    or whose range overflows float32, gets the word 0x7FC0 (scale NaN, minimum 0) and comes back as
    NaN throughout. A scale below the smallest normal float32 counts as zero.
    """
    x = x.astype(jnp.float32)
    minimum = floor_to_bf16(x.min(-1))
    spread = x.max(-1) - minimum
    # `reduce_precision` and not a cast there and back, which XLA removes under jit on GPU.
    scale = lax.reduce_precision(spread * _FIFTEENTH, exponent_bits=8, mantissa_bits=7)
    # Each number is looked at: under jit on CPU a vectorized minimum may pass over a NaN.
    finite = jnp.isfinite(x).all(-1) & jnp.isfinite(spread)
    usable = finite & (scale >= _TINY)
    inverse = jnp.where(usable, 1 / scale, 0)
    steps = jnp.round((x - minimum[..., None]) * inverse[..., None])
    codes = jnp.where(usable[..., None], jnp.clip(steps, 0, 15), 0).astype(jnp.uint8)
    scale = jnp.where(finite, jnp.where(usable, scale, 0), jnp.nan)
    minimum = jnp.where(finite, minimum, 0)
    return codes, join_scales(scale, minimum)


def dequantize(
    codes: UInt8[Array, "*lead D"], scales: UInt32[Array, "*lead"]
) -> Float[Array, "*lead D"]:
    """code * scale + minimum in float32."""
    scale, minimum = split_scales(scales)
    return codes.astype(jnp.float32) * scale[..., None] + minimum[..., None]


def join_scales(
    scale: Float[Array, "*lead"], minimum: Float[Array, "*lead"]
) -> UInt32[Array, "*lead"]:
    """Two float32 that hold bfloat16 values → one word: scale low, minimum high."""
    low = lax.bitcast_convert_type(scale, jnp.uint32) >> 16
    high = lax.bitcast_convert_type(minimum, jnp.uint32) & np.uint32(0xFFFF0000)
    return low | high


def split_scales(
    scales: UInt32[Array, "*lead"],
) -> tuple[Float[Array, "*lead"], Float[Array, "*lead"]]:
    """One word → (scale, minimum) in float32."""
    scale = lax.bitcast_convert_type(scales << 16, jnp.float32)
    minimum = lax.bitcast_convert_type(scales & np.uint32(0xFFFF0000), jnp.float32)
    return scale, minimum


def floor_to_bf16(x: Float[Array, "*lead"]) -> Float[Array, "*lead"]:
    """The largest bfloat16 not above a finite x, as float32."""
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    away_from_zero = jnp.where(x < 0, np.uint32(0xFFFF), np.uint32(0))
    return lax.bitcast_convert_type((bits + away_from_zero) & np.uint32(0xFFFF0000), jnp.float32)


# --- Codes ↔ rows ---------------------------------------------------------------------------


def pack(
    k_codes: UInt8[Array, "*lead D"], v_codes: UInt8[Array, "*lead D"], layout: Layout
) -> Array:
    """Codes → stored rows: `uint8 [*lead, D]` (paired) or `uint16 [*lead, 2, D/4]` (split)."""
    if layout == "paired":
        return k_codes | (v_codes << 4)
    codes = jnp.stack([k_codes, v_codes], axis=-2).astype(jnp.uint16)
    n0, n1, n2, n3 = jnp.split(codes, 4, axis=-1)
    return n0 | (n1 << 4) | (n2 << 8) | (n3 << 12)


def unpack(rows: Array, layout: Layout) -> tuple[UInt8[Array, "*lead D"], UInt8[Array, "*lead D"]]:
    """The inverse of `pack`."""
    if layout == "paired":
        return rows & 0xF, rows >> 4
    nibbles = [(rows >> shift) & 0xF for shift in (0, 4, 8, 12)]
    codes = jnp.concatenate(nibbles, axis=-1).astype(jnp.uint8)
    return codes[..., 0, :], codes[..., 1, :]


# --- Scales of small pages --------------------------------------------------------------------


def fold_scales(scales: UInt32[Array, "*lead 2 K S"]) -> UInt32[Array, "*lead _ _ _"]:
    """Scales as `paired` has them: `[*lead, 1, K * S / 64, 128]` for small pages, else as given."""
    *lead, _, kv_heads, page_size = scales.shape
    if 64 % page_size or kv_heads % (64 // page_size):
        return scales
    scales = scales.reshape(*lead, 2, kv_heads * page_size // 64, 64).swapaxes(-3, -2)
    return scales.reshape(*lead, 1, -1, 128)


def is_folded(scales: UInt32[Array, "*lead _ _ _"]) -> bool:
    """Whether scales of `paired` pages have small pages' shape."""
    return scales.shape[-3] == 1


def unfold_scales(
    scales: UInt32[Array, "*lead _ _ _"], page_size: int
) -> UInt32[Array, "*lead 2 K S"]:
    """The inverse of `fold_scales`."""
    if not is_folded(scales):
        return scales
    *lead, _, rows, _ = scales.shape
    scales = scales.reshape(*lead, rows, 2, 64).swapaxes(-3, -2)
    return scales.reshape(*lead, 2, -1, page_size)


# --- Tokens ↔ pages -------------------------------------------------------------------------


def encode(
    k: Float[Array, "n K D"], v: Float[Array, "n K D"], format: PageFormat
) -> tuple[Array, UInt32[Array, "n K 2"] | None]:
    """Rotates, quantizes and packs tokens: their stored rows and scale words (key, value).

    Rows are `uint8 [n, K, D]` (paired), `uint16 [n, K, 2, D/4]` (split) or
    `uint16 [n, K, 2, D]` (bf16, without scales).
    """
    if format.layout == "bf16":
        rows = jnp.stack([k, v], axis=-2).astype(jnp.bfloat16)
        return lax.bitcast_convert_type(rows, jnp.uint16), None
    k_codes, k_scales = quantize(rotate(k, format.order))
    v_codes, v_scales = quantize(rotate(v, format.value_order))
    return pack(k_codes, v_codes, format.layout), jnp.stack([k_scales, v_scales], axis=-1)


def put(
    pages: Pages,
    layer: int | Int[Array, ""],
    slots: Int[Array, "n"],
    rows: Array,
    scales: UInt32[Array, "n K 2"] | None,
) -> Pages:
    """Scatters encoded tokens to their slots. Slots outside 0 .. P * S - 1 are skipped."""
    slots = jnp.where(slots < 0, pages.num_pages * pages.page_size, slots)
    page, offset = slots // pages.page_size, slots % pages.page_size
    if scales is None or pages.scales is None:
        data = pages.data.at[layer, page, :, :, offset].set(rows, mode="drop")
        return dataclasses.replace(pages, data=data)
    if pages.format.layout == "paired":
        data = pages.data.at[layer, page, :, offset].set(rows, mode="drop")
        kind, head = jnp.arange(2), jnp.arange(pages.kv_heads)[:, None]
        page, offset = page[:, None, None], offset[:, None, None]
        where: tuple[Any, ...] = kind, head, offset
        if is_folded(pages.scales):
            share = 64 // pages.page_size
            where = 0, head // share, (kind * share + head % share) * pages.page_size + offset
        words = pages.scales.at[layer, page, *where].set(scales, mode="drop")
        return dataclasses.replace(pages, data=data, scales=words)
    data = pages.data.at[layer, page, :, :, offset].set(rows, mode="drop")
    scales = pages.scales.at[layer, page, :, :, offset].set(scales, mode="drop")
    return dataclasses.replace(pages, data=data, scales=scales)


def read(
    pages: Pages, layer: int | Int[Array, ""], page_ids: Int[Array, "*lead"]
) -> tuple[Float[Array, "*lead K S D"], Float[Array, "*lead K S D"]]:
    """Dequantizes whole pages to float32 keys and values, as stored: rotated."""
    layout = pages.format.layout
    rows = pages.data[layer, page_ids]  # [*lead, K, (2,) S, width]
    if pages.scales is None:
        rows = lax.bitcast_convert_type(rows, jnp.bfloat16).astype(jnp.float32)
        return rows[..., 0, :, :], rows[..., 1, :, :]
    scales = pages.scales[layer, page_ids]
    if layout == "paired":
        scales = unfold_scales(scales, pages.page_size)
    if layout == "split":
        rows, scales = rows.swapaxes(-3, -2), scales.swapaxes(-3, -2)  # [*lead, K, S, 2, ·]
    k_codes, v_codes = unpack(rows, layout)
    return (
        dequantize(k_codes, scales[..., 0, :, :]),
        dequantize(v_codes, scales[..., 1, :, :]),
    )


def convert(pages: Pages, layout: Layout) -> Pages:
    """The same codes and scales in another INT4 layout, bit for bit.

    Raises:
      ValueError: either layout is `bf16`, or `split` meets a head_dim that is no multiple of 4.
    """
    source = pages.format.layout
    if pages.scales is None or layout == "bf16":
        raise ValueError(f"Expected INT4 layouts to convert between, got {source} and {layout}")
    if source == layout:
        return pages
    if layout == "split" and pages.head_dim % 4:
        raise ValueError(f"Expected {pages.head_dim=} to be a multiple of 4 with {layout=}")
    rows, scales = pages.data, pages.scales
    if source == "split":
        rows = pack(*unpack(rows.swapaxes(3, 4), source), layout)
        scales = fold_scales(scales.swapaxes(2, 3))
    else:
        rows = pack(*unpack(rows, source), layout).swapaxes(3, 4)
        scales = unfold_scales(scales, pages.page_size).swapaxes(2, 3)
    return Pages(rows, scales, dataclasses.replace(pages.format, layout=layout))

"""The paged cache: a pool of pages, each sequence's page table, and who owns which page.

A `Cache` is a pytree; every function here is pure, jittable and returns a new one. Donate it, so
that nothing the size of the pool is copied. One step of a model is

    cache, ok = extend(cache, counts)          # pages and lengths for the step's new tokens
    out, cache = attend(cache, layer, q, k, v)  # in each layer: write them, attend to all

Invariants, kept by every function: a page is on the free stack exactly if its reference count is
zero; it counts the page-table entries that name it; a partly filled last page has one owner. So a
step may write wherever `extend` made room, without looking who else reads the page.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import PageFormat, Pages, init_pages, paged_attention, write_qkv
from pallas_kernels.implementation import Implementation
from pallas_kernels.page_format import Layout, largest_order, page_specs, preferred_layout
from pallas_kernels.write import check_layer

# Mesh axes by what they split: sequences and pages; KV heads; the query heads of each KV head.
AXES = DATA, HEADS, GROUPS = "data", "heads", "groups"
ROWS = PartitionSpec(DATA)
Q_SPEC = PartitionSpec(DATA, None, (HEADS, GROUPS))  # [B, T, H, D]
KV_SPEC = PartitionSpec(DATA, None, HEADS)  # [B, T, K, D]


@dataclasses.dataclass(frozen=True)
class CacheSpec:
    """What a cache holds and how. Hashable, so it may be a static argument.

    Attributes:
      layers: attention layers of the model.
      kv_heads: key/value heads of a layer.
      head_dim: numbers in one key or value vector.
      num_pages: pages in the pool, each for every layer and KV head.
      page_size: tokens in a page.
      dtype: `"int4"`, or `"bf16"` for an unquantized cache behind the same functions.
      order: Hadamard order of the rotation, a power of two that divides `head_dim`. `None`: the
        largest (BDR). 1: no rotation (plain INT4).
      rotate_v: rotate values too, and rotate the attention output back. To have this for free
        leave it off and fold the rotation into the weights: `rotation.fold_values`.
      layout: physical layout, see `pallas_kernels.page_format`. `None`: the best for
        `implementation`, or for the device.
      implementation: of `write_kv` and `paged_attention`. `None`: the best for the device. Name it
        to compile for a device that is not there.
    """

    layers: int
    kv_heads: int
    head_dim: int
    num_pages: int
    page_size: int = 128
    dtype: Literal["int4", "bf16"] = "int4"
    order: int | None = None
    rotate_v: bool = False
    layout: Layout | None = None
    implementation: Implementation | None = None

    def __post_init__(self):
        dtype, layout, implementation = self.dtype, self.layout, self.implementation
        if implementation not in (None, *get_args(Implementation)):
            names = get_args(Implementation)
            raise ValueError(f"Expected {implementation=} to be None or one of {names}")
        if dtype not in ("int4", "bf16"):
            raise ValueError(f"Expected {dtype=} to be 'int4' or 'bf16'")
        if layout is not None and (layout == "bf16") != (dtype == "bf16"):
            raise ValueError(f"Expected {layout=} to be one for {dtype=}")
        if self.num_pages * self.page_size >= 2**31:
            raise ValueError(
                f"Expected {self.num_pages=} of {self.page_size=} to hold fewer than 2**31 tokens: "
                "slots are int32"
            )
        jax.eval_shape(self.init_pages)  # raises for sizes that do not fit

    @property
    def format(self) -> PageFormat:
        """The page format, defaults filled in."""
        if self.dtype == "bf16":
            return PageFormat("bf16", 1 if self.order is None else self.order, self.rotate_v)
        order = largest_order(self.head_dim) if self.order is None else self.order
        layout = self.layout or preferred_layout(self.implementation)
        return PageFormat(layout, order, self.rotate_v)

    @property
    def method(self) -> Literal["bf16", "int4", "bdr"]:
        """The paper's name for it: BDR is INT4 with a block-diagonal rotation."""
        if self.dtype == "bf16":
            return "bf16"
        return "bdr" if self.format.order > 1 else "int4"

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token in all layers and heads, taken from the arrays' shapes."""
        return jax.eval_shape(self.init_pages).nbytes // (self.num_pages * self.page_size)

    def init_pages(self) -> Pages:
        """The pool's pages alone."""
        return init_pages(
            self.format,
            layers=self.layers,
            num_pages=self.num_pages,
            kv_heads=self.kv_heads,
            page_size=self.page_size,
            head_dim=self.head_dim,
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Pages and their bookkeeping for B sequences, over a pool of P pages of S tokens.

    Attributes:
      pages: keys and values of all layers.
      page_table: `int32[B, max_pages]`, page ids of each sequence in order, -1 past its end.
      lengths: `int32[B]`, tokens of each sequence, the current step's included.
      new_tokens: `int32[B]`, tokens that the last `extend` made room for: the current step's.
      references: `int32[P]`, page-table entries that name a page.
      free_pages: `int32[P]`, a stack of the free pages: entries 0 .. num_free - 1.
      num_free: `int32[]`; `int32[N]` with a mesh whose axis `data` is of size N.
      implementation: as in `CacheSpec`. Static: another program.
      mesh: the devices over which the cache is spread, or `None`; see `saw_int4_jax.sharding`.
        Its axis `data` cuts the pool into N, each with P / N pages, ids from 0, and B / N of the
        sequences. Static: every function here is mapped over it.
    """

    pages: Pages
    page_table: Int[Array, "B max_pages"]
    lengths: Int[Array, "B"]
    new_tokens: Int[Array, "B"]
    references: Int[Array, "P"]
    free_pages: Int[Array, "P"]
    num_free: Int[Array, "*N"]
    implementation: Implementation | None = dataclasses.field(
        default=None, metadata={"static": True}
    )
    mesh: Mesh | None = dataclasses.field(default=None, metadata={"static": True})

    @property
    def batch(self) -> int:
        return self.page_table.shape[0]

    @property
    def max_length(self) -> int:
        """The most tokens that one sequence can hold."""
        return self.page_table.shape[1] * self.pages.page_size


def init_cache(
    spec: CacheSpec, batch: int, max_length: int | None = None, *, mesh: Mesh | None = None
) -> Cache:
    """An empty cache.

    Args:
      spec: what to hold; its pages and heads are those of all devices together.
      batch: sequences, B.
      max_length: the most tokens one sequence may hold; `None`: all of its pool.
      mesh: devices to spread it over, see `saw_int4_jax.sharding`. Each makes its own part.

    Raises:
      ValueError: `batch` or `max_length` is not positive, or the mesh does not divide the cache.
    """
    if batch < 1:
        raise ValueError(f"Expected {batch=} to be positive")
    if max_length is not None and max_length < 1:
        raise ValueError(f"Expected {max_length=} to be positive")
    pools = 1
    if mesh is not None:
        check_mesh(mesh, kv_heads=spec.kv_heads, num_pages=spec.num_pages, batch=batch)
        pools = mesh.shape[DATA]
    pool_pages = max_pages = spec.num_pages // pools
    if max_length is not None:
        max_pages = min(max_pages, -(-max_length // spec.page_size))

    def empty() -> Cache:
        return Cache(
            pages=spec.init_pages(),
            page_table=jnp.full((batch, max_pages), -1, jnp.int32),
            lengths=jnp.zeros(batch, jnp.int32),
            new_tokens=jnp.zeros(batch, jnp.int32),
            references=jnp.zeros(spec.num_pages, jnp.int32),
            free_pages=jnp.tile(jnp.arange(pool_pages - 1, -1, -1, dtype=jnp.int32), pools),
            num_free=jnp.full(() if mesh is None else pools, pool_pages, jnp.int32),
            implementation=spec.implementation,
            mesh=mesh,
        )

    if mesh is None:
        return empty()
    return jax.jit(empty, out_shardings=cache_shardings(jax.eval_shape(empty), mesh))()


# --- Several devices ------------------------------------------------------------------------


def check_mesh(mesh: Mesh, *, kv_heads: int, num_pages: int, batch: int) -> None:
    """Raises ValueError unless a cache can be spread over a mesh."""
    if mesh.axis_names != AXES or any(kind != AxisType.Auto for kind in mesh.axis_types):
        raise ValueError(f"Expected {mesh=} to have the axes {AXES}, all of them Auto")
    data, heads, groups = (mesh.shape[axis] for axis in AXES)
    if num_pages % data or batch % data:
        raise ValueError(f"Expected {num_pages=} and {batch=} to be multiples of {data=} devices")
    if kv_heads % heads:
        raise ValueError(f"Expected {kv_heads=} to be a multiple of {heads=} devices")
    if groups > 1 and heads != kv_heads:
        raise ValueError(
            f"Expected {heads=} devices to be as many as {kv_heads=} where {groups=} devices hold "
            "each KV head"
        )


def cache_shardings(cache: Cache, mesh: Mesh) -> Cache:
    """A `NamedSharding` for each array of a cache, or of its shapes, spread over a mesh.

    Raises:
      ValueError: the mesh does not divide an array.
    """
    cache = dataclasses.replace(cache, mesh=mesh)

    def sharding(spec: PartitionSpec, x: Array) -> NamedSharding:
        try:
            NamedSharding(mesh, spec).shard_shape(x.shape)
        except ValueError as error:
            raise ValueError(f"Expected {x.shape=} to be divided by {mesh=} as {spec}") from error
        return NamedSharding(mesh, spec)

    return jax.tree.map(sharding, _specs(cache), cache)


def split_rows(x: Array, cache: Cache) -> Array:
    """Lays x [B, ...] as the cache's sequences lie; XLA would have to guess."""
    if cache.mesh is None:
        return x
    return lax.with_sharding_constraint(x, NamedSharding(cache.mesh, ROWS))


def on_host(x: Array) -> np.ndarray:
    """The values of x, gathered where they lie on several hosts: all of them must ask."""
    if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
        return multihost_utils.process_allgather(x, tiled=True)
    return np.array(x)


def _specs(cache: Cache) -> Cache:
    """A `PartitionSpec` for each array."""
    specs = jax.tree.map(lambda _: ROWS, cache)
    return dataclasses.replace(specs, pages=page_specs(cache.pages.format, DATA, HEADS))


def _on_each_device(
    f: Callable[..., tuple[Cache, Any]],
    cache: Cache,
    *args: Any,
    specs: Sequence[PartitionSpec] = (ROWS,),
    out: PartitionSpec = ROWS,
) -> tuple[Cache, Any]:
    """`f(cache, *args)`, with a mesh on each device with its own part of them.

    Such a part is a whole cache: one pool's pages of some KV heads, and that pool's sequences.

    Args:
      f: returns the cache and one array more.
      cache: spread or not.
      *args: arrays, or `None`.
      specs: how each of them is split.
      out: how the array that `f` returns is.
    """
    mesh = cache.mesh
    if mesh is None:
        return f(cache, *args)

    def part(cache, *args):
        cache = dataclasses.replace(cache, num_free=cache.num_free.reshape(()), mesh=None)
        cache, x = f(cache, *args)
        return dataclasses.replace(cache, num_free=cache.num_free.reshape(1), mesh=mesh), x

    cache_specs = _specs(cache)
    return jax.shard_map(
        part,
        mesh=mesh,
        in_specs=(cache_specs, *specs),
        out_specs=(cache_specs, out),
        check_vma=False,
    )(cache, *args)


# --- Pages: grow, shrink, share -------------------------------------------------------------


def extend(
    cache: Cache, counts: Int[Array, "B"], *, max_count: int | None = None
) -> tuple[Cache, Bool[Array, "B"]]:
    """Makes room for `counts` new tokens at the end of each sequence and starts a step.

    A sequence gets all the pages it needs or none, and is then left as it was. Pages go out in
    row order; after a sequence that the pool cannot serve no later one gets any, lest small needs
    starve a large one. A sequence whose last page has room enough goes on in any case.

    Args:
      cache: donate it.
      counts: new tokens of each sequence; 0 sits the step out.
      max_count: a static bound on `counts` (1 in a decode step), which keeps the work small.

    Returns:
      The cache, with `new_tokens` the granted counts, and which sequences got their room.

    Raises:
      ValueError: `counts` is not of shape [B].
    """
    _check_rows("counts", counts, cache)
    if max_count is None:
        max_count = cache.max_length
    grow = functools.partial(_extend, max_count=max_count)
    return _on_each_device(grow, cache, counts)


def _extend(cache: Cache, counts: Array, max_count: int) -> tuple[Cache, Array]:
    size, max_pages = cache.pages.page_size, cache.page_table.shape[1]
    held, needed = _pages(cache.lengths, size), _pages(cache.lengths + counts, size)
    possible = (counts >= 0) & (counts <= max_count) & (needed <= max_pages)
    missing = jnp.where(possible, needed - held, 0)
    ok = possible & ((missing == 0) | (jnp.cumsum(missing) <= cache.num_free))

    index = jnp.arange(_pages(max_count, size))
    wanted = ok[:, None] & (index < missing[:, None])
    cache, new = _take(cache, wanted)
    column = jnp.where(wanted, held[:, None] + index, max_pages)
    counts = jnp.where(ok, counts, 0)
    cache = dataclasses.replace(
        cache,
        page_table=_set_rows(cache.page_table, column, new),
        lengths=cache.lengths + counts,
        new_tokens=counts,
    )
    return cache, ok


def truncate(cache: Cache, lengths: Int[Array, "B"]) -> tuple[Cache, Bool[Array, "B"]]:
    """Shortens sequences to `lengths` and gives back the pages that nobody else uses.

    A cut inside a shared page copies that page, since the sequence will write there next; where
    the pool has no page left for the copy, or `lengths` is out of range, the sequence is left as
    it was. A page is shared here if it was before the call, whatever other rows drop in it.
    Cutting to 0 always works.

    Args:
      cache: donate it.
      lengths: what is to remain of each sequence.

    Returns:
      The cache, with `new_tokens` zero, and which sequences were cut.

    Raises:
      ValueError: `lengths` is not of shape [B].
    """
    _check_rows("lengths", lengths, cache)
    return _on_each_device(_truncate, cache, lengths)


def _truncate(cache: Cache, lengths: Array) -> tuple[Cache, Array]:
    possible = (lengths >= 0) & (lengths <= cache.lengths)
    copied = possible & (lengths < cache.lengths) & _shares_last_page(cache, lengths)
    ok = possible & (~copied | (jnp.cumsum(copied) <= cache.num_free))
    copied &= ok
    lengths = jnp.where(ok, lengths, cache.lengths)
    return _drop_past(_own_last_page(cache, lengths, copied), lengths), ok


def free(cache: Cache, rows: Bool[Array, "B"]) -> Cache:
    """Empties the chosen sequences; an empty one stays so.

    Raises:
      ValueError: `rows` is not of shape [B].
    """
    _check_rows("rows", rows, cache)

    def empty(cache: Cache, rows: Array) -> tuple[Cache, Array]:
        return _drop_past(cache, jnp.where(rows, 0, cache.lengths)), rows

    return _on_each_device(empty, cache, rows)[0]


def share(
    cache: Cache,
    source: int | Int[Array, ""],
    target: int | Int[Array, ""],
    length: int | Int[Array, ""],
) -> tuple[Cache, Bool[Array, ""]]:
    """Makes the empty sequence `target` begin with the first `length` tokens of `source`.

    Full pages are shared; a partly filled last one is copied now rather than when it is first
    written, so that the decode step never has to look.

    Args:
      cache: donate it.
      source: row to share from.
      target: row to fill; must be empty.
      length: tokens to share, at most those of `source`.

    Returns:
      The cache and whether it was done: not if a row or the length is out of range, `target` is
      not empty or in another pool, or the pool has no page left for the copy. The cache is then
      unchanged.
    """
    rows = jnp.arange(cache.batch)
    specs = [ROWS, *[PartitionSpec()] * 3]
    arguments = rows, *(jnp.asarray(x, jnp.int32) for x in (source, target, length))
    cache, ok = _on_each_device(_share, cache, *arguments, specs=specs)
    return cache, ok.any()


def _share(
    cache: Cache, rows: Int[Array, "B"], source: Array, target: Array, length: Array
) -> tuple[Cache, Bool[Array, "B"]]:
    """`rows` are the numbers of the sequences here. Which of them were filled."""
    size, max_pages = cache.pages.page_size, cache.page_table.shape[1]
    here = jnp.clip(source - rows[0], 0, cache.batch - 1)
    possible = (rows == source).any() & (length >= 0) & (length <= cache.lengths[here])
    copied = length % size != 0
    possible &= copied <= cache.num_free
    filled = possible & (rows == target) & (cache.lengths == 0)

    kept = filled.any() & (jnp.arange(max_pages) < _pages(length, size))
    entries = jnp.where(kept, cache.page_table[here], -1)
    cache = dataclasses.replace(
        cache,
        page_table=jnp.where(filled[:, None], entries, cache.page_table),
        lengths=jnp.where(filled, length, cache.lengths),
        new_tokens=jnp.where(filled, 0, cache.new_tokens),
        references=cache.references.at[_or_past(kept, entries, cache)].add(1, mode="drop"),
    )
    return _own_last_page(cache, cache.lengths, filled & copied), filled


def _check_rows(name: str, x: Array, cache: Cache) -> None:
    if jnp.shape(x) != (cache.batch,):
        raise ValueError(f"Expected {name} of shape {jnp.shape(x)} to be [B] = [{cache.batch}]")


def _pages(tokens, page_size: int):
    return (tokens + page_size - 1) // page_size


def _or_past(valid: Array, page_ids: Array, cache: Cache) -> Array:
    """Page ids, and P where not valid: an index that scatters drop."""
    return jnp.where(valid, page_ids, cache.pages.num_pages)


def _set_rows(table: Array, column: Int[Array, "B n"], values: Int[Array, "B n"]) -> Array:
    rows = jnp.arange(table.shape[0])[:, None]
    return table.at[rows, column].set(values, mode="drop")


def _take(cache: Cache, wanted: Bool[Array, "B n"]) -> tuple[Cache, Int[Array, "B n"]]:
    """Pops a page for each `wanted`; the caller has checked that there are enough."""
    rank = jnp.cumsum(wanted).reshape(wanted.shape)  # 1, 2, … at the wanted ones
    pages = cache.free_pages[jnp.where(wanted, cache.num_free - rank, 0)]
    references = cache.references.at[_or_past(wanted, pages, cache)].set(1, mode="drop")
    num_free = cache.num_free - wanted.sum(dtype=jnp.int32)
    return dataclasses.replace(cache, references=references, num_free=num_free), pages


def _release(cache: Cache, page_ids: Int[Array, "..."]) -> Cache:
    """Drops one reference to each page id that is not -1, and frees pages without any."""
    dropped = _or_past(page_ids >= 0, page_ids, cache)
    references = cache.references.at[dropped].add(-1, mode="drop")
    freed = (references == 0) & (cache.references > 0)
    position = _or_past(freed, cache.num_free + jnp.cumsum(freed) - 1, cache)
    ids = jnp.arange(cache.pages.num_pages, dtype=jnp.int32)
    return dataclasses.replace(
        cache,
        references=references,
        free_pages=cache.free_pages.at[position].set(ids, mode="drop"),
        num_free=cache.num_free + freed.sum(dtype=jnp.int32),
    )


def _drop_past(cache: Cache, lengths: Int[Array, "B"]) -> Cache:
    """Cuts sequences and releases the pages that they no longer reach."""
    column = jnp.arange(cache.page_table.shape[1])
    keep = column < _pages(lengths, cache.pages.page_size)[:, None]
    cache = _release(cache, jnp.where(keep, -1, cache.page_table))
    return dataclasses.replace(
        cache,
        page_table=jnp.where(keep, cache.page_table, -1),
        lengths=lengths,
        new_tokens=jnp.zeros_like(cache.new_tokens),
    )


def _last_page(cache: Cache, lengths: Int[Array, "B"]) -> tuple[Array, Int[Array, "B"]]:
    """(column, page id) of the page that holds each sequence's last token."""
    column = jnp.maximum(_pages(lengths, cache.pages.page_size) - 1, 0)
    return column, jnp.take_along_axis(cache.page_table, column[:, None], axis=1)[:, 0]


def _shares_last_page(cache: Cache, lengths: Int[Array, "B"]) -> Bool[Array, "B"]:
    partial = lengths % cache.pages.page_size != 0
    return partial & (cache.references[_last_page(cache, lengths)[1]] > 1)


def _own_last_page(cache: Cache, lengths: Int[Array, "B"], rows: Bool[Array, "B"]) -> Cache:
    """Gives the chosen rows their own copy of the page with their last token."""
    column, old = _last_page(cache, lengths)
    cache, new = _take(cache, rows[:, None])
    new = new[:, 0]

    def copy(pages: Array) -> Array:  # [L, P, ...]
        return pages.at[:, _or_past(rows, new, cache)].set(pages[:, old], mode="drop")

    cache = dataclasses.replace(
        cache,
        pages=jax.tree.map(copy, cache.pages),
        page_table=_set_rows(
            cache.page_table,
            jnp.where(rows, column, cache.page_table.shape[1])[:, None],
            new[:, None],
        ),
    )
    return _release(cache, jnp.where(rows, old, -1))


# --- One step: where its tokens stand, and attention -----------------------------------------


def positions(cache: Cache, num_tokens: int) -> Int[Array, "B T"]:
    """The position in its sequence of each of a step's tokens, for RoPE."""
    return (cache.lengths - cache.new_tokens)[:, None] + jnp.arange(num_tokens)


def last_token(x: Float[Array, "B T *rest"], cache: Cache | None) -> Float[Array, "B 1 *rest"]:
    """x at each sequence's newest token: row `new_tokens - 1`, or the last without a cache."""
    if cache is None:
        return x[:, -1:]
    index = jnp.maximum(cache.new_tokens - 1, 0).reshape(-1, *[1] * (x.ndim - 1))
    return jnp.take_along_axis(x, index, axis=1)


def slots(cache: Cache, num_tokens: int) -> Int[Array, "B T"]:
    """page * S + offset for each of a step's tokens, -1 for padding."""
    size = cache.pages.page_size
    position = positions(cache, num_tokens)
    column = jnp.minimum(position // size, cache.page_table.shape[1] - 1)
    page = jnp.take_along_axis(cache.page_table, column, axis=1)
    real = jnp.arange(num_tokens) < cache.new_tokens[:, None]
    return jnp.where(real, page * size + position % size, -1)


def attend(
    cache: Cache,
    layer: int | Int[Array, ""],
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T K D"],
    v: Float[Array, "B T K D"],
    *,
    cos: Float[Array, "B T D/2"] | None = None,
    sin: Float[Array, "B T D/2"] | None = None,
    q_norm: Float[Array, "D"] | None = None,
    k_norm: Float[Array, "D"] | None = None,
    eps: float = 1e-6,
    sinks: Float[Array, "H"] | None = None,
    **options,
) -> tuple[Float[Array, "B T H D"], Cache]:
    """Writes a step's keys and values, then attends: what replaces a model's attention call.

    The cache must have been extended for the step. Of the T tokens of sequence b the first
    `cache.new_tokens[b]` are real; the others are neither written nor attended from.

    Args:
      cache: donate it to the jitted step.
      layer: this attention layer's index.
      q: queries after RoPE, or before it with `cos` and `sin`.
      k: keys likewise; they are rotated and quantized here.
      v: values.
      cos: with `sin`, RoPE for q and k, as in `pallas_kernels.write_qkv`.
      sin: see `cos`.
      q_norm: weight of the queries' RMS norm, applied before RoPE; `None`: no such norm.
      k_norm: that of the keys'.
      eps: of these norms.
      sinks: as in `pallas_kernels.paged_attention`.
      **options: `causal`, `scale`, `window`, `soft_cap`, as there.

    Raises:
      ValueError: shapes do not fit the cache.
    """
    batch, num_tokens = q.shape[:2]
    if batch != cache.batch or k.shape[:2] != (batch, num_tokens) or v.shape != k.shape:
        raise ValueError(
            f"Expected {q.shape=}, {k.shape=}, {v.shape=} to be [B, T, heads, D] alike in B and T "
            f"with B = {cache.batch}"
        )
    check_layer(layer, cache.pages)
    if cache.mesh is not None:
        devices = cache.mesh.shape[HEADS] * cache.mesh.shape[GROUPS]
        if q.shape[2] % devices:
            raise ValueError(
                f"Expected {q.shape[2]} query heads to be a multiple of {devices} devices"
            )

    def local(cache, layer, q, k, v, sinks, cos, sin, q_norm, k_norm):
        def tokens(x):
            return None if x is None else x.reshape(-1, *x.shape[2:])

        chosen = cache.implementation
        new_q, pages = write_qkv(
            cache.pages,
            tokens(q),
            tokens(k),
            tokens(v),
            slots(cache, num_tokens).reshape(-1),
            cos=tokens(cos),
            sin=tokens(sin),
            q_norm=q_norm,
            k_norm=k_norm,
            eps=eps,
            layer=layer,
            implementation=chosen,
        )
        out = paged_attention(
            new_q.reshape(q.shape),
            pages,
            cache.page_table,
            cache.lengths,
            layer=layer,
            query_lengths=cache.new_tokens,
            sinks=sinks,
            implementation=chosen,
            **options,
        )
        return dataclasses.replace(cache, pages=pages), out

    heads, everywhere = PartitionSpec((HEADS, GROUPS)), PartitionSpec()
    specs = everywhere, Q_SPEC, KV_SPEC, KV_SPEC, heads, ROWS, ROWS, everywhere, everywhere
    arrays = layer, q, k, v, sinks, cos, sin, q_norm, k_norm
    cache, out = _on_each_device(local, cache, *arrays, specs=specs, out=Q_SPEC)
    return out, cache

"""A cache on disk: a long prefix is computed once and read back, byte for byte.

    save_cache(path, cache, note="Qwen3-8B, the manual")
    cache = load_cache(path, spec, batch=64, mesh=mesh)  # its first sequences are the saved ones
    cache, ok = share(cache, 0, 5, length)  # another one begins with the same tokens

Orbax writes the pages in use and, as JSON beside them, each sequence's length and pages, what the
bytes mean and the version of the page format. Where they are loaded they may lie otherwise: in
another pool, on other devices, in the other INT4 layout. What differs in meaning is refused before
a page is read.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import pathlib
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding
from jaxtyping import Array, Int

from pallas_kernels import Pages, page_format
from pallas_kernels.page_format import convert, page_specs
from saw_int4_jax.cache import DATA, HEADS, ROWS, Cache, CacheSpec, init_cache, on_host

# What two caches must agree on. The layout is not among it: INT4 layouts convert.
MEANING = ("dtype", "layers", "kv_heads", "head_dim", "page_size", "order", "rotate_v")


@dataclasses.dataclass(frozen=True)
class SavedCache:
    """What a saved cache is, without its pages.

    Attributes:
      version: of the page format, `pallas_kernels.page_format.VERSION`.
      spec: as it was saved; `num_pages` counts the pages saved.
      lengths: tokens of each sequence.
      page_ids: the saved pages of each sequence, in order.
      note: as given to `save_cache`.
    """

    version: int
    spec: CacheSpec
    lengths: tuple[int, ...]
    page_ids: tuple[tuple[int, ...], ...]
    note: str


def save_cache(path: str | os.PathLike, cache: Cache, *, note: str = "") -> None:
    """Writes a cache's sequences and their pages to a new directory.

    Between two steps: which tokens are the newest is not kept. With several processes all of them
    call it, and see the same directory.

    Args:
      path: must not exist.
      cache: spread over devices or not; not consumed.
      note: kept as it is; the model and the text, for example, of which nothing else is known.

    Raises:
      ValueError: `path` exists.
    """
    table, lengths = on_host(cache.page_table), on_host(cache.lengths)
    pools = 1 if cache.mesh is None else cache.mesh.shape[DATA]
    held = np.arange(table.shape[1]) < -(-lengths // cache.pages.page_size)[:, None]
    used, index = _number_pages(np.where(held, table, -1), pools)
    saved = _take_pages(cache.pages, used.ravel(), mesh=cache.mesh)
    pages = cache.pages
    spec = CacheSpec(
        layers=pages.layers,
        kv_heads=pages.kv_heads,
        head_dim=pages.head_dim,
        num_pages=saved.num_pages,
        page_size=pages.page_size,
        dtype="bf16" if pages.format.layout == "bf16" else "int4",
        order=pages.format.order,
        rotate_v=pages.format.rotate_v,
        layout=pages.format.layout,
    )
    about = {
        "version": page_format.VERSION,
        "spec": dataclasses.asdict(spec),
        "lengths": lengths.tolist(),
        "page_ids": [row[row >= 0].tolist() for row in index],
        "note": note,
    }
    ocp = _orbax()
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        checkpointer.save(
            _directory(path),
            args=ocp.args.Composite(
                about=ocp.args.JsonSave(about), pages=ocp.args.StandardSave(_arrays(saved))
            ),
        )


def describe_cache(path: str | os.PathLike) -> SavedCache:
    """What was saved, without reading a page.

    Raises:
      FileNotFoundError: there is no saved cache.
      ValueError: it is of another version of the page format.
    """
    ocp = _orbax()
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        args = ocp.args.Composite(about=ocp.args.JsonRestore())
        about = checkpointer.restore(_directory(path), args=args)["about"]
    if about["version"] != page_format.VERSION:
        raise ValueError(
            f"Expected version {page_format.VERSION} of the page format in {os.fspath(path)}, got "
            f"{about['version']}"
        )
    return SavedCache(
        about["version"],
        CacheSpec(**about["spec"]),
        tuple(about["lengths"]),
        tuple(map(tuple, about["page_ids"])),
        about["note"],
    )


def load_cache(
    path: str | os.PathLike,
    spec: CacheSpec,
    batch: int,
    max_length: int | None = None,
    *,
    mesh: Mesh | None = None,
) -> Cache:
    """`init_cache`, its first sequences those that were saved. The other arguments are as there.

    Args:
      path: where `save_cache` wrote.
      spec: of the cache to make. Its pages, layout and implementation are its own; the rest must
        be as saved.
      batch: at least as many sequences as were saved.
      max_length: the most tokens one sequence may hold.
      mesh: devices to spread it over.

    Raises:
      FileNotFoundError: there is no saved cache.
      ValueError: what was saved is not of this kind, or does not fit. No page has been read then.
    """
    saved = describe_cache(path)
    _check_meaning(saved.spec, spec)
    if batch < len(saved.lengths):
        raise ValueError(f"Expected {batch=} to be at least the {len(saved.lengths)} saved")
    shapes = jax.eval_shape(lambda: init_cache(spec, batch, max_length, mesh=mesh))
    pools = 1 if mesh is None else mesh.shape[DATA]
    pool_pages = spec.num_pages // pools
    table = np.full(shapes.page_table.shape, -1, np.int32)
    for row, ids in enumerate(saved.page_ids):
        if len(ids) > table.shape[1]:
            raise ValueError(
                f"Expected the {saved.lengths[row]} tokens of sequence {row} to fit "
                f"{shapes.max_length=}"
            )
        table[row, : len(ids)] = ids
    used, index = _number_pages(table, pools)
    counts = np.array([len(np.unique(ids[ids >= 0])) for ids in table.reshape(pools, -1)])
    if counts.max() > pool_pages:
        raise ValueError(f"Expected {counts.max()} saved pages to fit a pool of {pool_pages}")

    cache = init_cache(spec, batch, max_length, mesh=mesh)
    found = _load_pages(path, saved.spec, mesh)
    pages = _fill_pages(cache.pages, found, used.ravel(), mesh=mesh)
    # Pool for pool: pages 0 .. count - 1 are taken, the others stand on the free stack.
    index = np.where(index >= 0, index % used.shape[1], -1)
    references = np.zeros((pools, pool_pages), np.int32)
    for count, entries in zip(references, index.reshape(pools, -1)):
        np.add.at(count, entries[entries >= 0], 1)
    lengths = np.zeros(batch, np.int32)
    lengths[: len(saved.lengths)] = saved.lengths

    def like(x: Any, old: Array) -> Array:
        return jax.device_put(np.asarray(x, np.int32).reshape(old.shape), old.sharding)

    return dataclasses.replace(
        cache,
        pages=pages,
        page_table=like(index, cache.page_table),
        lengths=like(lengths, cache.lengths),
        references=like(references, cache.references),
        num_free=like(pool_pages - counts, cache.num_free),
    )


def _check_meaning(saved: CacheSpec, wanted: CacheSpec) -> None:
    def meaning(spec: CacheSpec) -> dict[str, Any]:
        spec = dataclasses.replace(spec, order=spec.format.order)
        return {name: getattr(spec, name) for name in MEANING}

    old, new = meaning(saved), meaning(wanted)
    different = [
        f"{name}={old[name]}, not {new[name]}" for name in MEANING if old[name] != new[name]
    ]
    if different:
        raise ValueError(f"Expected a cache as it was saved: {'; '.join(different)}")


def _number_pages(
    table: Int[np.ndarray, "B max_pages"], pools: int
) -> tuple[Int[np.ndarray, "pools n"], Int[np.ndarray, "B max_pages"]]:
    """Each pool's pages in use, padded to n, and the table with pool * n + their index instead."""
    parts = np.split(table, pools)
    found = [np.unique(part[part >= 0]) for part in parts]
    count = max(1, *map(len, found))
    used = np.zeros((pools, count), np.int32)
    numbered = []
    for pool, (part, ids) in enumerate(zip(parts, found)):
        used[pool, : len(ids)] = ids
        numbered.append(np.where(part >= 0, pool * count + np.searchsorted(ids, part), -1))
    return used, np.concatenate(numbered)


# --- Pages --------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames="mesh")
def _take_pages(pages: Pages, ids: Int[Array, "pools*n"], *, mesh: Mesh | None) -> Pages:
    """Each pool's chosen pages alone."""

    def take(pages, ids):
        return jax.tree.map(lambda x: x[:, ids], pages)

    if mesh is not None:
        specs = page_specs(pages.format, DATA, HEADS)
        take = jax.shard_map(
            take, mesh=mesh, in_specs=(specs, ROWS), out_specs=specs, check_vma=False
        )
    return take(pages, ids)


@functools.partial(jax.jit, static_argnames="mesh", donate_argnames="pages")
def _fill_pages(
    pages: Pages, saved: Pages, ids: Int[Array, "pools*n"], *, mesh: Mesh | None
) -> Pages:
    """Each pool begins with its chosen ones of the saved pages, in the pool's own layout."""

    if saved.format != pages.format:
        saved = convert(saved, pages.format.layout)

    def fill(pages, saved, ids):
        return jax.tree.map(lambda old, new: old.at[:, : len(ids)].set(new[:, ids]), pages, saved)

    if mesh is not None:
        specs = page_specs(pages.format, DATA, HEADS)
        everywhere = page_specs(pages.format, None, HEADS)
        fill = jax.shard_map(
            fill, mesh=mesh, in_specs=(specs, everywhere, ROWS), out_specs=specs, check_vma=False
        )
    return fill(pages, saved, ids)


def _load_pages(path: str | os.PathLike, spec: CacheSpec, mesh: Mesh | None) -> Pages:
    """The saved pages, on each device those of its KV heads."""

    def placed(x: jax.ShapeDtypeStruct, spec: PartitionSpec) -> jax.ShapeDtypeStruct:
        if mesh is None:
            return x.update(sharding=SingleDeviceSharding(jax.local_devices()[0]))
        return x.update(sharding=NamedSharding(mesh, spec))

    shapes = jax.tree.map(
        placed, jax.eval_shape(spec.init_pages), page_specs(spec.format, None, HEADS)
    )
    ocp = _orbax()
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        args = ocp.args.Composite(pages=ocp.args.StandardRestore(_arrays(shapes)))
        arrays = checkpointer.restore(_directory(path), args=args)["pages"]
    return dataclasses.replace(shapes, data=arrays["data"], scales=arrays.get("scales"))


def _arrays(pages: Pages) -> dict[str, Any]:
    arrays = {"data": pages.data, "scales": pages.scales}
    return {name: x for name, x in arrays.items() if x is not None}


def _directory(path: str | os.PathLike) -> pathlib.Path:
    return pathlib.Path(path).absolute()


def _orbax() -> Any:
    """Imported where it is needed: it takes a second."""
    import orbax.checkpoint

    return orbax.checkpoint

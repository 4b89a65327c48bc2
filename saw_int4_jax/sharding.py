"""Several devices: sequences and page pools, KV heads, and the model around them.

    mesh = make_mesh(kv_heads=8, data=2)
    variables = shard_params(variables, mesh)
    cache = init_cache(spec, batch, mesh=mesh)

and everything else is as on one device. A mesh has three axes:

- `data`: each part holds its own pool of pages and its own share of the sequences, under its own
  page ids, and the whole model. Nothing is exchanged.
- `heads`: KV heads with their query heads, and the projections around them. A layer costs two sums
  over the devices, after the attention and after the MLP (Megatron-LM, arXiv 1909.08053).
- `groups`: where devices outnumber KV heads, each KV head lies on several, which share its query
  heads and everything else as above.

XLA partitions the model after its parameters; `attend`, `extend` and the other functions on a cache
run on each device with its own part. The kernels see one device's arrays and know nothing of it.

On several hosts, or with one process per GPU, every process runs the same program on the same
inputs after `jax.distributed.initialize()`, and gets the same tokens back from `generate`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jax.tree_util import tree_map_with_path

from saw_int4_jax.cache import AXES, DATA, GROUPS, HEADS, Cache, cache_shardings, check_mesh

__all__ = ["cache_shardings", "make_mesh", "param_shardings", "shard_cache", "shard_params"]

KV_COLUMNS = ("k_proj", "v_proj")
COLUMNS = ("q_proj", "gate_proj", "up_proj")
ROWS = ("o_proj", "down_proj")


def make_mesh(kv_heads: int, *, data: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of `data` pools, each on an equal share of the devices by tensor parallelism.

    Args:
      kv_heads: KV heads of the model. Devices of a pool split them; past one KV head a device,
        they split its query heads.
      data: pools.
      devices: `None`: all.

    Raises:
      ValueError: `data` does not divide the devices, or a pool's devices neither divide nor are a
        multiple of the KV heads.
    """
    count = jax.device_count() if devices is None else len(devices)
    if data < 1 or count % data:
        raise ValueError(f"Expected {data=} pools to divide {count} devices")
    tensor = count // data
    if kv_heads % tensor and tensor % kv_heads:
        raise ValueError(
            f"Expected {tensor} devices of a pool to divide {kv_heads=} or to be a multiple of it"
        )
    heads = min(tensor, kv_heads)
    shape = data, heads, tensor // heads
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def param_shardings(params: Any, mesh: Mesh) -> Any:
    """A `NamedSharding` for each parameter of `Llama`, or of a model that names them alike.

    Projections into heads and the hidden layer are split by columns, those out of them by rows, the
    embedding and `lm_head` by tokens where the devices divide them. The rest is on every device.

    Args:
      params: arrays or their shapes, kernels [in, out].
      mesh: from `make_mesh`.

    Raises:
      ValueError: the devices do not divide a projection.
    """
    tensor = HEADS, GROUPS

    def sharding(path: tuple, leaf: Any) -> NamedSharding:
        module, name = (getattr(key, "key", None) for key in path[-2:])
        columns = [None] * (leaf.ndim - 1)
        spec = PartitionSpec()
        if module in KV_COLUMNS:
            spec = PartitionSpec(*columns, HEADS)
        elif module in COLUMNS:
            spec = PartitionSpec(*columns, tensor)
        elif module in ROWS and name == "kernel":
            spec = PartitionSpec(tensor, None)
        elif module == "lm_head" and divides(leaf.shape[-1]):
            spec = PartitionSpec(*columns, tensor)
        elif name == "embedding" and divides(leaf.shape[0]):
            spec = PartitionSpec(tensor, None)
        sharding = NamedSharding(mesh, spec)
        try:
            sharding.shard_shape(leaf.shape)
        except ValueError as error:
            raise ValueError(
                f"Expected {module} of shape {leaf.shape} to be divided by {dict(mesh.shape)}"
            ) from error
        return sharding

    def divides(size: int) -> bool:
        return size % (mesh.shape[HEADS] * mesh.shape[GROUPS]) == 0

    return tree_map_with_path(sharding, params)


def shard_params(params: Any, mesh: Mesh) -> Any:
    """The parameters, placed as `param_shardings` says."""
    return jax.device_put(params, param_shardings(params, mesh))


def shard_cache(cache: Cache, mesh: Mesh) -> Cache:
    """A cache of one device, whatever it holds, spread over the KV heads of a mesh.

    An empty one is better made where it is to lie: `init_cache(…, mesh=mesh)`.

    Raises:
      ValueError: the mesh does not divide the cache, or has several pools: the sequences of one
        cannot be split.
    """
    pages = cache.pages
    check_mesh(mesh, kv_heads=pages.kv_heads, num_pages=pages.num_pages, batch=cache.batch)
    if mesh.shape[DATA] > 1 or cache.mesh is not None:
        raise ValueError(f"Expected {cache.mesh=} to be None and {mesh=} to have one pool")
    cache = dataclasses.replace(cache, num_free=cache.num_free[None], mesh=mesh)
    return jax.device_put(cache, cache_shardings(cache, mesh))

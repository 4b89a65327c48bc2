"""Tensor parallelism: KV heads, and the projections around them, spread over a mesh axis.

    mesh = jax.make_mesh((4,), ("heads",), axis_types=(jax.sharding.AxisType.Auto,))
    variables = shard_params(variables, mesh, "heads")
    cache = shard_cache(init_cache(spec, batch), mesh, "heads")

and everything else is as on one device: XLA partitions the model after its parameters, `attend`
runs the kernels on each device's own heads, page tables and lengths are the same everywhere. A
layer costs two sums over the devices, after the attention and after the MLP (Megatron-LM, arXiv
1909.08053).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pallas_kernels.page_format import head_specs
from saw_int4_jax.cache import Cache

COLUMNS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "lm_head")
ROWS = ("o_proj", "down_proj")


def param_shardings(params: Any, mesh: Mesh, axis: str) -> Any:
    """A `NamedSharding` for each parameter of `Llama`, or of a model that names them alike.

    Projections into heads, the hidden layer and the vocabulary are split by columns, those out of
    them by rows, the embedding by tokens; the rest is on every device.

    Args:
      params: arrays or their shapes, kernels [in, out].
      mesh: the devices.
      axis: the mesh axis to split over.
    """

    def sharding(path: tuple, leaf: Any) -> NamedSharding:
        module, name = (getattr(key, "key", None) for key in path[-2:])
        spec = PartitionSpec()
        if module in COLUMNS:
            spec = PartitionSpec(*[None] * (leaf.ndim - 1), axis)
        elif (module in ROWS and name == "kernel") or name == "embedding":
            spec = PartitionSpec(axis, None)
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(sharding, params)


def cache_shardings(cache: Cache, mesh: Mesh, axis: str) -> Cache:
    """A `NamedSharding` for each array of a cache: pages by KV head, the rest on every device.

    Raises:
      ValueError: the axis does not divide the KV heads.
    """
    kv_heads, devices = cache.pages.kv_heads, mesh.shape[axis]
    if kv_heads % devices:
        raise ValueError(f"Expected {kv_heads=} to be a multiple of the {devices} of {axis=}")
    everywhere = jax.tree.map(lambda _: PartitionSpec(), cache)
    specs = dataclasses.replace(everywhere, pages=head_specs(cache.pages.format, axis))
    specs = dataclasses.replace(specs, head_sharding=NamedSharding(mesh, PartitionSpec(axis)))
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)


def shard_params(params: Any, mesh: Mesh, axis: str) -> Any:
    """The parameters, placed as `param_shardings` says."""
    return jax.device_put(params, param_shardings(params, mesh, axis))


def shard_cache(cache: Cache, mesh: Mesh, axis: str) -> Cache:
    """The cache, its KV heads spread over a mesh axis; `attend` then works on it as before.

    Under `jax.jit`, around `init_cache`, no device ever holds the whole pool.

    Raises:
      ValueError: the axis does not divide the KV heads.
    """
    shardings = cache_shardings(cache, mesh, axis)
    return jax.device_put(
        dataclasses.replace(cache, head_sharding=shardings.head_sharding), shardings
    )

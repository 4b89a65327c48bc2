"""Compiles for TPUs that are not there: libtpu on any x86-64 Linux machine, no network.

Set the environment (`ENVIRONMENT`) before JAX starts a backend; `libtpu` must be installed.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

TOPOLOGIES = {
    "v5e": "v5e:2x2",
    "v5p": "v5p:2x2x1",
    "v6e": "v6e:2x2",
    "tpu7x": "tpu7x:2x2x1",
}

# Never on a machine with a TPU: the last lets two processes load libtpu at once.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def available() -> bool:
    return importlib.util.find_spec("libtpu") is not None


def set_environment() -> None:
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)


@functools.cache
def devices(chip: str) -> tuple:
    set_environment()
    topology = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[chip])
    return tuple(topology.devices)


def compile_for(chip: str, function: Callable, *shapes: Any, **jit_options: Any):
    """Compiles `function` of pytrees of `jax.ShapeDtypeStruct` for one chip of `TOPOLOGIES`."""
    mesh = Mesh(np.array(devices(chip)[:1]), ("x",))
    sharding = NamedSharding(mesh, PartitionSpec())
    arguments = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes
    )
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        traced = jax.jit(function, **jit_options).trace(*arguments)
        return traced.lower(lowering_platforms=("tpu",)).compile()

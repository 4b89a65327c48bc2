"""Compiles a decode loop for an H200 on a machine without a GPU: what does a step launch?

    JAX_PLATFORMS=cpu python -m tests.saw_int4_jax.decode_step_for_h200

Needs the extra `gpu-aot`. Its own process, because it makes JAX believe in a GPU.
"""

import dataclasses
import os
import pathlib
import re
import sys

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from pallas_kernels import tuning
from saw_int4_jax import decode, init_cache
from saw_int4_jax.generate import DecodeState
from saw_int4_jax.models.configs import CONFIGS
from saw_int4_jax.models.llama import Llama
from tests.pallas_kernels.compile_for_h200 import DUMP, H200  # first: sets the environment

os.environ["XLA_FLAGS"] = ""  # to dump what the kernels are made of takes minutes
BATCH, LAYERS = 8, 2
# A norm, qkv, RoPE and write, attention in two, output, add, norm, gate and up, SiLU, down, add;
# and the sum of what the contraction of qkv was cut into.
LAUNCHES = 14  # of a layer
OTHERS = 16  # page tables, RoPE's angles, embedding, logits, sampling, bookkeeping
# Only with these does XLA believe that a CUDA graph can hold kernels that it did not make.
VERSIONS = (
    'runtime_version: "13.0.0" driver_version: "13.0.0" compile_time_toolkit_version: "13.0.0"'
)


def compile_step(topology, **options) -> str:
    """The launches of the program, as XLA writes them down."""
    config = dataclasses.replace(CONFIGS["Qwen3-8B"], num_layers=LAYERS)
    model = Llama(config, last_only=True)
    variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    spec = config.cache_spec(512, page_size=64, **options)

    def start(variables):
        variables = jax.tree.map(lambda x: x.astype(jnp.bfloat16), variables)
        row = jnp.zeros(BATCH, jnp.int32)
        return variables, DecodeState(init_cache(spec, BATCH), row, row, row), jnp.zeros(0, int)

    sharding = jax.sharding.SingleDeviceSharding(topology.devices[0])
    variables, state, eos = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        jax.eval_shape(start, variables),
    )
    lowered = decode.lower(model.apply, variables, state, num_steps=8, eos=eos)
    folder = pathlib.Path(DUMP) / spec.method
    lowered.compile(compiler_options={"xla_dump_to": str(folder), "xla_dump_hlo_as_text": True})
    [file] = folder.glob("*jit_decode.thunk_sequence_after_thunk_passes.txt")
    return file.read_text()


def main() -> None:
    from jax._src.pallas.triton import gpu_info

    gpu_info.registry["cpu"] = lambda: gpu_info.get_gpu_info_from_version(gpu_info.GpuVersion.H200)
    blocks = tuning.blocks
    tuning.blocks = lambda op: blocks(op, "NVIDIA H200")
    jax.default_backend = lambda: "gpu"
    topology = topologies.get_topology_desc(
        platform="cuda",
        topology_name="h200",
        topology="1x1x1",
        target_config=H200.replace("gpu_device_info {", f"gpu_device_info {{ {VERSIONS}"),
    )
    for options in dict(dtype="bf16"), dict(layout="split"):
        text = compile_step(topology, **options)
        body = text[text.index("body:") :]
        launches = len(re.findall(r"\d+: k(?:CustomKernel|CustomCall|Kernel|Gemm)\b", body))
        print(f"{options}: {launches} launches")
        if len(re.findall(r"^ {4}\d", body, re.MULTILINE)) != 1 or "kCommandBuffer" not in body:
            sys.exit(f"Expected a step to be one CUDA graph, got\n{body}")
        if launches > LAUNCHES * LAYERS + OTHERS:
            sys.exit(f"Expected at most {LAUNCHES} launches a layer and {OTHERS}, got\n{body}")


if __name__ == "__main__":
    main()

"""Compiles the GPU kernels for an H200 on a machine without a GPU, and bounds their spills.

    JAX_PLATFORMS=cpu python tests/pallas_kernels/compile_for_h200.py [words of the names …]

Needs the extra `gpu-aot`: the plugin of jax's own version, and the ptxas of nvidia-cuda-nvcc, which
tells the spills. Its own process, because XLA reads its flags once.
"""

import functools
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import unittest.mock

DUMP = tempfile.mkdtemp()
os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
os.environ["XLA_FLAGS"] = f"--xla_dump_to={DUMP} --xla_dump_emitter_re=.* --xla_gpu_dump_llvmir"

os.environ["MOSAIC_GPU_DUMP_TO"] = DUMP
os.environ["MOSAIC_GPU_DUMP_PTXAS"] = "1"

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from jax.experimental import topologies  # noqa: E402
from jax.sharding import NamedSharding, PartitionSpec  # noqa: E402

from pallas_kernels import PageFormat, init_pages, tuning  # noqa: E402
from pallas_kernels.triton import attention, write  # noqa: E402
from saw_int4_jax import init_cache  # noqa: E402
from saw_int4_jax.cache import cache_shardings  # noqa: E402
from saw_int4_jax.models.llama import Llama, LlamaConfig  # noqa: E402
from saw_int4_jax.sharding import make_mesh, param_shardings  # noqa: E402

H200 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000
  l2_cache_size: 62914560
  clock_rate_ghz: 1.98
  device_memory_size: 150000000000
  shared_memory_per_block_optin: 232448
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  cuda_compute_capability { major: 9 minor: 0 }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA H200"
"""


# Bytes that may be spilled: prefill fills the registers, and what it spills is used once.
SPILLS = {"triton prefill": 600, "triton prefill bf16": 600}


def compile_for(topology, f, *args):
    sharding = jax.sharding.SingleDeviceSharding(topology.devices[0])
    args = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), args)
    return jax.jit(f).lower(*args).compile()


def compile_attention(topology, format, *, queries, head_dim, attention=attention, q_heads=32):
    batch, kv_heads, max_pages = 32, 8, 16
    sizes = dict(layers=2, num_pages=512, kv_heads=kv_heads, page_size=64, head_dim=head_dim)
    pages = jax.eval_shape(lambda: init_pages(format, **sizes))

    def f(q, pages, page_table, lengths, layer):
        return attention.paged_attention(
            q,
            pages,
            page_table,
            lengths,
            layer=layer,
            query_lengths=jnp.full(batch, queries),
            causal=True,
            scale=head_dim**-0.5,
            window=None,
            soft_cap=None,
            sinks=None,
        )

    compile_for(
        topology,
        f,
        jax.ShapeDtypeStruct((batch, queries, q_heads, head_dim), jnp.bfloat16),
        pages,
        jax.ShapeDtypeStruct((batch, max_pages), jnp.int32),
        jax.ShapeDtypeStruct((batch,), jnp.int32),
        jax.ShapeDtypeStruct((), jnp.int32),
    )


def compile_write(topology, format):
    sizes = dict(layers=2, num_pages=64, kv_heads=8, page_size=64, head_dim=128)
    pages = jax.eval_shape(lambda: init_pages(format, **sizes))
    tokens = jax.ShapeDtypeStruct((64, 8, 128), jnp.bfloat16)
    slots = jax.ShapeDtypeStruct((64,), jnp.int32)
    compile_for(topology, lambda *x: write.write_kv(*x, layer=0), pages, tokens, tokens, slots)


def compile_prepare(topology, format, tokens):
    sizes = dict(layers=2, num_pages=64, kv_heads=8, page_size=64, head_dim=128)
    pages = jax.eval_shape(lambda: init_pages(format, **sizes))
    q, k = (jax.ShapeDtypeStruct((tokens, heads, 128), jnp.bfloat16) for heads in (32, 8))
    slots = jax.ShapeDtypeStruct((tokens,), jnp.int32)
    angle = jax.ShapeDtypeStruct((tokens, 64), jnp.float32)
    weight = jax.ShapeDtypeStruct((128,), jnp.bfloat16)

    def f(pages, q, k, v, slots, cos, sin, q_norm, k_norm):
        weights = dict(q_norm=q_norm, k_norm=k_norm, eps=1e-6)
        return write.write_qkv(pages, q, k, v, slots, layer=1, cos=cos, sin=sin, **weights)

    compile_for(topology, f, pages, q, k, k, slots, angle, angle, weight, weight)


def compile_on_two(topology):
    """A decode step of one sequence, tensor parallel: the kernels, and no table is gathered."""
    config = LlamaConfig(
        vocab_size=1024,
        embed_dim=256,
        mlp_dim=512,
        num_layers=1,
        num_heads=8,
        num_kv_heads=2,
        head_dim=128,
        max_length=256,
        tie_embeddings=True,
    )
    mesh = make_mesh(config.num_kv_heads, devices=topology.devices)
    model = Llama(config, jnp.bfloat16, last_only=True)
    variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    spec = config.cache_spec(num_pages=8, page_size=64, layout="split")
    cache = jax.eval_shape(lambda: init_cache(spec, 1, mesh=mesh))
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32, sharding=NamedSharding(mesh, PartitionSpec()))

    def place(shapes, shardings):
        return jax.tree.map(
            lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), shapes, shardings
        )

    variables = place(variables, param_shardings(variables, mesh))
    cache = place(cache, cache_shardings(cache, mesh))
    with unittest.mock.patch.object(jax, "default_backend", return_value="gpu"):
        lowered = jax.jit(model.apply, donate_argnums=2).lower(variables, tokens, cache)
    text = lowered.compile().as_text()
    assert 'custom_call_target="mosaic_gpu' in text
    assert "all-gather" not in text


def spilled_bytes() -> int | None:
    """Over all kernels compiled since the last call; `None` without ptxas."""
    [*found] = pathlib.Path(jax.__file__).parents[1].glob("nvidia/cu*/bin/ptxas")
    spilled = 0
    for ptx in pathlib.Path(DUMP).glob("*.ptx"):
        if found:
            command = [found[0], "-v", "-arch=sm_90a", ptx, "-o", os.devnull]
            report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
            spilled += sum(map(int, re.findall(r"(\d+) bytes spill stores", report)))
        ptx.unlink()
    for report in pathlib.Path(DUMP).glob("*.ptxas"):  # Mosaic GPU's
        spilled += sum(map(int, re.findall(r"(\d+) bytes spill stores", report.read_text())))
        report.unlink()
    return spilled if found else None


def main() -> None:
    # Without a GPU, Pallas' Triton lowering must be told which one is meant, and so must we.
    from jax._src.pallas.triton import gpu_info

    gpu_info.registry["cpu"] = lambda: gpu_info.get_gpu_info_from_version(gpu_info.GpuVersion.H200)
    blocks = tuning.blocks
    tuning.blocks = lambda op: blocks(op, "NVIDIA H200")
    topology = topologies.get_topology_desc(
        platform="cuda", topology_name="h200", topology="1x1x1", target_config=H200
    )

    bdr = PageFormat("split", 128)
    programs = {
        "triton decode": lambda: compile_attention(topology, bdr, queries=1, head_dim=128),
        "triton decode 16 rows": lambda: compile_attention(
            topology, bdr, queries=1, head_dim=128, q_heads=128
        ),
        "triton decode bf16": lambda: compile_attention(
            topology, PageFormat("bf16"), queries=1, head_dim=128
        ),
        "triton decode head_dim 96": lambda: compile_attention(
            topology, PageFormat("split", 32), queries=1, head_dim=96
        ),
        "triton prefill": lambda: compile_attention(topology, bdr, queries=300, head_dim=128),
        "triton prefill bf16": lambda: compile_attention(
            topology, PageFormat("bf16"), queries=300, head_dim=128
        ),
        "triton write": lambda: compile_write(topology, bdr),
        "triton write prepared": lambda: compile_prepare(topology, bdr, 8),
        "triton write prepared bf16": lambda: compile_prepare(topology, PageFormat("bf16"), 512),
        "triton write values rotated": lambda: compile_write(
            topology, PageFormat("split", 128, True)
        ),
    }
    if jax.__version_info__ >= (0, 11):
        from pallas_kernels.mosaic_gpu import attention as mosaic

        for layout, head_dim, queries, q_heads in (
            ("split", 64, 1, 32),
            ("split", 128, 1, 32),
            ("split", 128, 1, 64),
            ("split", 128, 3, 32),
            ("split", 256, 1, 32),
            ("split", 128, 300, 32),
            ("bf16", 128, 1, 32),
        ):
            name = f"mosaic {layout} head_dim {head_dim}, {queries} queries, {q_heads} heads"
            programs[name] = functools.partial(
                compile_attention,
                topology,
                PageFormat(layout, head_dim if layout == "split" else 1),
                queries=queries,
                q_heads=q_heads,
                head_dim=head_dim,
                attention=mosaic,
            )
        two = topologies.get_topology_desc(
            platform="cuda", topology_name="h200", topology="1x1x2", target_config=H200
        )
        programs["mosaic over two devices"] = lambda: compile_on_two(two)
    wanted = set(sys.argv[1:])
    programs = {k: v for k, v in programs.items() if wanted <= set(k.split())}
    failures = []
    for name, compile_it in programs.items():
        compile_it()
        spilled = spilled_bytes()
        print(f"{name}: {'unknown' if spilled is None else spilled} bytes spilled", flush=True)
        if spilled and spilled > SPILLS.get(name, 0):
            failures.append(name)
    sys.exit(f"Expected fewer spills in {failures}" if failures else 0)


if __name__ == "__main__":
    main()

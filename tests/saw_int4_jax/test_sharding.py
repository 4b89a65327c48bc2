"""A cache and a model spread over devices, hosts and pools give what one device gives."""

import argparse
import contextlib
import dataclasses
import functools
import logging
import os
import pathlib
import re
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

import saw_int4_jax as saw
from saw_int4_jax import sharding
from saw_int4_jax.cache import AXES
from saw_int4_jax.checkpoint import load_cache, save_cache
from saw_int4_jax.demo import REFERENCE_MODEL
from saw_int4_jax.models import Llama, load_model
from saw_int4_jax.models.llama import LlamaConfig
from saw_int4_jax.serving import Engine, Request, command

CONFIG = LlamaConfig(
    vocab_size=64,
    embed_dim=32,
    mlp_dim=64,
    num_layers=1,
    num_heads=8,
    num_kv_heads=4,
    head_dim=16,
    max_length=64,
    qkv_bias=True,
    qk_norm=True,
)
# What every GPU kernel takes, in pages of 64 tokens; groups of four decode by Mosaic's.
KERNELS = dataclasses.replace(CONFIG, num_heads=16, head_dim=128, max_length=256)
FAST_COMPILATION = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
BATCH, NUM_PAGES, PAGE_SIZE = 8, 64, 4
PROMPTS = [[1, 2, 3], [4] * 9, [5, 6], [7, 8, 9, 10], [11] * 5, [12], [13, 14], [15, 1, 15, 1]]
# (data, heads, groups)
MESHES = [(1, 2, 1), (1, 4, 1), (1, 4, 2), (8, 1, 1), (2, 4, 1), (4, 2, 1)]


def mesh_of(shape):
    count = int(np.prod(shape))
    kinds = (AxisType.Auto,) * len(shape)
    return jax.make_mesh(shape, AXES, axis_types=kinds, devices=jax.devices()[:count])


def spec_of(dtype="int4", config=CONFIG):
    size = 64 if config is KERNELS else PAGE_SIZE
    return config.cache_spec(num_pages=NUM_PAGES, page_size=size, dtype=dtype)


@functools.cache
def forward_of(config):
    """One object: it is a static argument."""
    return Llama(config, last_only=True).apply


@functools.cache
def random_variables(config=CONFIG):
    return jax.jit(Llama(config).init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))


def generate_on(mesh, dtype="int4", cache=None, prompts=PROMPTS, config=CONFIG, **options):
    variables = random_variables(config)
    if mesh is not None:
        variables = sharding.shard_params(variables, mesh)
    if cache is None:
        spec = spec_of(dtype, config)
        cache = saw.init_cache(spec, BATCH, max_length=config.max_length // 2, mesh=mesh)
    options = dict(max_new_tokens=10, chunk=8, every=4) | options
    return saw.generate(forward_of(config), variables, prompts, cache, **options)


def start(function, *arguments, devices=1):
    """Runs a function of this file in a process of its own, on virtual CPU devices or, 0, GPUs."""
    code = f"from tests.saw_int4_jax.test_sharding import {function} as f; f(*{arguments})"
    flags = f"--xla_force_host_platform_device_count={devices} {FAST_COMPILATION}"
    on_cpu = {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    on_gpu = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, **(on_cpu if devices else on_gpu)},
        cwd=pathlib.Path(__file__).parents[2],
    )


# --- Eight virtual devices ------------------------------------------------------------------


@contextlib.contextmanager
def compilations():
    """A list to which the names of compiled programs are added."""
    names = []
    handler = logging.Handler()
    handler.emit = lambda record: names.extend(
        re.findall(r"^Finished XLA compilation of (\S+)", record.getMessage())
    )
    logger = logging.getLogger("jax")
    logger.addHandler(handler)
    with jax.log_compiles():
        yield names
    logger.removeHandler(handler)


def check_same_tokens():
    one = {dtype: generate_on(None, dtype).tokens for dtype in ("int4", "bf16")}
    for shape in MESHES:
        dtype = "bf16" if shape == (2, 4, 1) else "int4"
        with compilations() as names:
            many = generate_on(mesh_of(shape), dtype)
        # One program for both chunks of the prompts, one for all loops of the decoding.
        assert names.count("jit(_step)") == names.count("jit(decode)") == 1, (shape, names)
        assert many.tokens == one[dtype], shape
        data = many.cache.pages.data
        local = data.addressable_shards[0].data.shape
        assert len(data.addressable_shards) == np.prod(shape)
        assert local[1:3] == (NUM_PAGES // shape[0], CONFIG.num_kv_heads // shape[1]), shape


def check_pools_are_separate_caches():
    """The page functions on two pools over two heads do what they do on two caches apart."""
    mesh, rng = mesh_of((2, 2, 1)), np.random.default_rng(0)
    spec = spec_of()
    half = dataclasses.replace(spec, num_pages=NUM_PAGES // 2)
    both = saw.init_cache(spec, BATCH, max_length=32, mesh=mesh)
    apart = [saw.init_cache(half, BATCH // 2, max_length=32) for _ in range(2)]
    bits = rng.integers(0, 255, both.pages.data.shape, np.uint8)

    def filled(cache, bits):
        data = jax.device_put(bits, cache.pages.data.sharding)
        return dataclasses.replace(cache, pages=dataclasses.replace(cache.pages, data=data))

    both = filled(both, bits)
    apart = [filled(c, x) for c, x in zip(apart, np.split(bits, 2, axis=1))]
    extend, truncate, free, share = map(jax.jit, (saw.extend, saw.truncate, saw.free, saw.share))

    def halves(x):
        return np.split(np.asarray(x), 2)

    for _ in range(6):
        counts = rng.integers(0, 20, BATCH)
        both, ok = extend(both, counts)
        apart, oks = zip(*(extend(c, x) for c, x in zip(apart, halves(counts))))
        np.testing.assert_array_equal(ok, np.concatenate(oks))
        lengths = rng.integers(0, 1 + np.asarray(both.lengths))
        both, ok = truncate(both, lengths)
        apart, oks = zip(*(truncate(c, x) for c, x in zip(apart, halves(lengths))))
        np.testing.assert_array_equal(ok, np.concatenate(oks))
        rows = rng.random(BATCH) < 0.4
        both = free(both, rows)
        apart = [free(c, x) for c, x in zip(apart, halves(rows))]
        for pool in range(2):
            source, target = rng.integers(0, BATCH // 2, 2)
            length = rng.integers(0, 1 + np.asarray(apart[pool].lengths)[source])
            first = pool * BATCH // 2
            both, ok = share(both, first + source, first + target, length)
            apart = list(apart)
            apart[pool], wanted = share(apart[pool], source, target, length)
            assert bool(ok) == bool(wanted)
        for leaf, *parts in zip(*map(jax.tree.leaves, (both, *apart))):
            axis = 1 if leaf.ndim > 2 else 0
            joined = np.concatenate([np.atleast_1d(p) for p in parts], axis=axis)
            np.testing.assert_array_equal(leaf, joined)
    both = free(both, np.arange(BATCH) != 0)
    both, _ = extend(both, np.eye(BATCH, dtype=int)[0])
    before = jax.tree.map(np.asarray, both)
    both, ok = share(both, 0, BATCH - 1, 1)
    assert not ok  # another pool
    jax.tree.map(np.testing.assert_array_equal, both, before)


def check_saved_caches(folder):
    """Saved on one mesh and loaded on another, sequences go on as if nothing had happened."""
    path, shape = pathlib.Path(folder, "cache"), (2, 2, 1)
    cache = saw.init_cache(spec_of(), BATCH, max_length=32, mesh=mesh_of(shape))
    cache, _ = saw.extend(cache, np.array([9, 5, 0, 0, 8, 1, 3, 3]))
    bits = np.random.default_rng(0).integers(0, 255, cache.pages.data.shape, np.uint8)
    data = jax.device_put(bits, cache.pages.data.sharding)
    cache = dataclasses.replace(cache, pages=dataclasses.replace(cache.pages, data=data))
    cache, ok = saw.share(cache, 0, 2, 8)
    assert ok
    save_cache(path, cache)
    for mesh in (None, mesh_of((1, 4, 2)), mesh_of((4, 2, 1))):
        loaded = load_cache(path, spec_of(), BATCH, max_length=32, mesh=mesh)
        np.testing.assert_array_equal(loaded.lengths, cache.lengths)
        for one, other in zip(pages_of_rows(cache), pages_of_rows(loaded)):
            jax.tree.map(np.testing.assert_array_equal, one, other)
        if mesh is None:
            assert loaded.references.max() == 2  # the shared page is still one


def pages_of_rows(cache):
    """The pages of each sequence in order, wherever they lie."""
    pools = 1 if cache.mesh is None else cache.mesh.shape["data"]
    table, lengths = np.asarray(cache.page_table), np.asarray(cache.lengths)
    pages = jax.tree.map(np.asarray, cache.pages)
    for row, length in enumerate(lengths):
        pool = row * pools // cache.batch
        ids = table[row, : -(-length // PAGE_SIZE)] + pool * (cache.pages.num_pages // pools)
        yield jax.tree.map(lambda x, ids=ids: x[:, ids], pages)


def check_engine():
    """Tensor parallel it serves what one device generates; pools are for several engines."""
    mesh, tokens = mesh_of((1, 4, 2)), generate_on(None).tokens
    variables = sharding.shard_params(random_variables(), mesh)
    cache = saw.init_cache(spec_of(), BATCH, max_length=32, mesh=mesh)
    engine = Engine(
        forward_of(CONFIG), variables, cache, batches=[BATCH], piece=16, pieces=1, steps=4
    )
    with compilations() as names:
        responses = engine.generate([Request(prompt, 10) for prompt in PROMPTS])
    assert [response.tokens for response in responses] == tokens
    assert names.count("jit(prefill_rows)") == names.count("jit(decode_rows)") == 1, names
    cache = saw.init_cache(spec_of(), BATCH, mesh=mesh_of((2, 4, 1)))
    with pytest.raises(ValueError, match="to have one pool"):
        Engine(forward_of(CONFIG), variables, cache)

    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    model = load_model(REFERENCE_MODEL)
    engine = command.make_engine(model, parser.parse_args(["--devices", "2", "--pool-gb", "0.01"]))
    pages = engine.scheduler.limits.num_pages
    assert 0.008e9 < pages * 128 * model.config.cache_spec(1).bytes_per_token <= 0.01e9
    with pytest.raises(ValueError, match=r"arguments.devices=9 to be within 1 \.\. 8"):
        command.make_engine(model, parser.parse_args(["--devices", "9"]))


def check_eight_devices(folder):
    check_engine()
    check_saved_caches(folder)
    check_same_tokens()
    check_pools_are_separate_caches()


def test_eight_devices_generate_what_one_does(tmp_path):
    assert start("check_eight_devices", str(tmp_path), devices=8).wait() == 0


# --- Two processes --------------------------------------------------------------------------


def check_processes(address, count, index, folder=None, gpus=False):
    """In each of `count` processes: what they generate together, they generate alone.

    With a folder that all see, also after the cache was saved and loaded.
    """
    jax.distributed.initialize(address, count, index, local_device_ids=[index] if gpus else None)
    assert jax.process_count() == count
    if gpus:
        check_kernels()
        return
    alone = generate_on(None)
    for data in (1, count):
        mesh = sharding.make_mesh(CONFIG.num_kv_heads, data=data)
        together = generate_on(mesh)
        assert not together.cache.pages.data.is_fully_addressable
        assert together.tokens == alone.tokens
        assert together.finish == alone.finish
    path = pathlib.Path(folder, "cache")
    save_cache(path, together.cache)
    loaded = load_cache(path, spec_of(), BATCH, max_length=32, mesh=mesh)
    prompts = [row[-1:] for row in alone.tokens]
    options = dict(prompts=prompts, sampling=saw.make_sampling(BATCH, seed=1))
    alone = generate_on(None, cache=alone.cache, **options)
    assert generate_on(mesh, cache=loaded, **options).tokens == alone.tokens


def check_together(*processes):
    try:
        assert not any(process.wait(300) for process in processes)
    finally:
        for process in processes:
            process.kill()


def free_address():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


@pytest.mark.slow
def test_two_processes_generate_what_one_does(tmp_path):
    arguments = "check_processes", free_address(), 2
    check_together(*(start(*arguments, i, str(tmp_path), devices=2) for i in range(2)))


# --- GPUs -----------------------------------------------------------------------------------


def check_kernels():
    """By the kernels of all devices here: one pool over them and one for each give one's tokens."""
    rng, count = np.random.default_rng(0), jax.device_count()
    prompts = [rng.integers(0, 64, n).tolist() for n in (3, 100, 5, 64, 65, 63, 1, 90)]
    options = dict(prompts=prompts, config=KERNELS, chunk=4)  # few rows: Mosaic's, where it runs
    alone = generate_on(None, **options).tokens
    for data in (1, count):
        mesh = sharding.make_mesh(KERNELS.num_kv_heads, data=data)
        together = generate_on(mesh, **options)
        assert together.tokens == alone, (mesh, together.tokens, alone)
        variables = sharding.shard_params(random_variables(KERNELS), mesh)
        tokens = np.zeros((BATCH, 1), np.int32)
        step = jax.jit(forward_of(KERNELS)).lower(variables, tokens, together.cache)
        [*kernels] = set(re.findall("mosaic_gpu|triton", step.as_text()))
        assert kernels
        print(f"{dict(mesh.shape)}, {kernels}: the tokens of one", flush=True)


@pytest.mark.gpu
def test_gpus_generate_what_one_does():
    check_together(start("check_kernels", devices=0))


@pytest.mark.gpu
def test_processes_of_a_gpu_each_generate_what_one_does():
    arguments = "check_processes", free_address(), jax.device_count()
    check_together(*(start(*arguments, i, None, True, devices=0) for i in range(arguments[-1])))


# --- Bad input ------------------------------------------------------------------------------


def test_projections_are_split_where_heads_are():
    model = Llama(dataclasses.replace(CONFIG, num_layers=1))
    variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    shardings = sharding.param_shardings(variables, mesh_of((1, 1, 1)))["params"]
    attention, mlp = shardings["layers_0"]["self_attn"], shardings["layers_0"]["mlp"]
    tensor = "heads", "groups"
    assert attention["q_proj"]["kernel"].spec == PartitionSpec(None, tensor)
    assert attention["k_proj"]["kernel"].spec == PartitionSpec(None, "heads")
    assert attention["k_proj"]["bias"].spec == PartitionSpec("heads")
    assert attention["o_proj"]["kernel"].spec == PartitionSpec(tensor, None)
    assert attention["q_norm"]["scale"].spec == PartitionSpec()
    assert mlp["up_proj"]["kernel"].spec == PartitionSpec(None, tensor)
    assert mlp["down_proj"]["kernel"].spec == PartitionSpec(tensor, None)
    assert shardings["embed_tokens"]["embedding"].spec == PartitionSpec(tensor, None)
    assert shardings["lm_head"]["kernel"].spec == PartitionSpec(None, tensor)
    assert shardings["norm"]["scale"].spec == PartitionSpec()


def test_devices_that_do_not_divide_the_model():
    model = Llama(dataclasses.replace(CONFIG, num_layers=1, mlp_dim=66, vocab_size=65))
    variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    mesh = AbstractMesh((1, 4, 1), AXES, axis_types=(AxisType.Auto,) * 3)
    with pytest.raises(ValueError, match=r"Expected down_proj of shape \(66, 32\) to be divided"):
        sharding.param_shardings(variables, mesh)
    mlp = variables["params"]["layers_0"].pop("mlp")
    shardings = sharding.param_shardings(variables, mesh)["params"]
    assert shardings["lm_head"]["kernel"].spec == PartitionSpec()
    assert mlp


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 3, 1), "Expected kv_heads=4 to be a multiple of heads=3 devices"),
        ((1, 2, 2), "Expected heads=2 devices to be as many as kv_heads=4"),
        ((3, 1, 1), "Expected num_pages=64 and batch=8 to be multiples of data=3"),
    ],
)
def test_devices_that_do_not_divide_the_cache(shape, message):
    mesh = AbstractMesh(shape, AXES, axis_types=(AxisType.Auto,) * 3)
    with pytest.raises(ValueError, match=message):
        saw.init_cache(spec_of(), BATCH, mesh=mesh)


def test_query_heads_that_the_devices_do_not_divide():
    mesh = AbstractMesh((1, 4, 3), AXES, axis_types=(AxisType.Auto,) * 3)
    cache = jax.eval_shape(lambda: saw.init_cache(spec_of(), BATCH))
    cache = dataclasses.replace(cache, mesh=mesh)
    q, k = jnp.zeros((BATCH, 1, 8, 16)), jnp.zeros((BATCH, 1, 4, 16))
    with pytest.raises(ValueError, match="Expected 8 query heads to be a multiple of 12 devices"):
        saw.attend(cache, 0, q, k, k)


def test_mesh_with_other_axes():
    mesh = AbstractMesh((1,), ("model",), axis_types=(AxisType.Auto,))
    with pytest.raises(ValueError, match="to have the axes"):
        saw.init_cache(spec_of(), BATCH, mesh=mesh)


@pytest.mark.parametrize(
    ("kv_heads", "data", "message"),
    [(4, 3, "data=3 pools to divide 8"), (3, 1, "8 devices of a pool to divide kv_heads=3")],
)
def test_make_mesh_of_devices_that_do_not_fit(kv_heads, data, message):
    with pytest.raises(ValueError, match=message):
        sharding.make_mesh(kv_heads, data=data, devices=[None] * 8)


def test_one_pool_cannot_be_split():
    cache = saw.init_cache(spec_of(), BATCH)
    mesh = AbstractMesh((2, 1, 1), AXES, axis_types=(AxisType.Auto,) * 3)
    with pytest.raises(ValueError, match="to have one pool"):
        sharding.shard_cache(cache, mesh)

"""Device timing: chains of calls in one program, and what the memory itself can do.

A call is timed as one of a chain inside a compiled loop, each needing the last one's result, so
that calls do not overlap and Python stands outside. Calls walk over several copies of their
data (the layers of a cache), or the second level cache would be measured. What is reported is the
median over many windows of such loops.
"""

from __future__ import annotations

import concurrent.futures
import functools
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.implementation import KERNELS, Implementation

UNROLL = 8  # calls per turn of the loop: one CUDA graph


def device_kernels() -> Implementation:
    """The implementation that is timed unless another is named: the default device's best."""
    return KERNELS.get(jax.default_backend(), ("xla",))[0]


# (which of UNROLL, carry, data) -> carry
Step = Callable[[int, Any, Any], Any]
Chain = tuple[Step, Any, Any]


def compile_chain(step: Step, carry: Any, data: Any, *, length: int) -> jax.stages.Compiled:
    """Compiles `length` times `carry = step(i % UNROLL, carry, data)` as one program."""

    def chain(carry, data):
        def body(_, carry):
            for i in range(UNROLL):
                carry = step(i, carry, data)
            return carry

        return lax.fori_loop(0, length // UNROLL, body, carry)

    return jax.jit(chain, donate_argnums=0).lower(carry, data).compile()


def compile_all(
    makers: Mapping[Any, Callable[[], Chain]], *, length: int, jobs: int | None = None
) -> dict[Any, concurrent.futures.Future[jax.stages.Compiled]]:
    """Compiles chains on all cores at once: before anything is timed, never beside it.

    Args:
      makers: functions that return what `compile_chain` takes. Only shapes are asked of them: no
        array is made.
      length: as `compile_chain`'s.
      jobs: compilations at a time; `None`: as many as there are cores.

    Returns:
      By the same keys, the programs as futures that are done: `result()` raises what went wrong.
    """

    def compile_one(make):
        steps = []

        def arrays():
            step, *rest = make()
            steps.append(step)
            return rest

        carry, data = jax.eval_shape(arrays)
        return compile_chain(steps[0], carry, data, length=length)

    with concurrent.futures.ThreadPoolExecutor(jobs or os.cpu_count()) as pool:
        return {key: pool.submit(compile_one, make) for key, make in makers.items()}


def time_chain(
    step: Step,
    carry: Any,
    data: Any,
    *,
    length: int = 32,
    runs: int = 20,
    window_ms: float = 30,
    chain: jax.stages.Compiled | None = None,
) -> dict[str, float]:
    """Times `length` times `carry = step(i % UNROLL, carry, data)` in one program.

    Args:
      step: the call to time; its first argument is static.
      carry: what the first step takes; donated.
      data: what every step takes.
      length: steps in a loop, a multiple of `UNROLL`.
      runs: how often a window of such loops is timed.
      window_ms: length of a window, about: many loops in flight, one wait at the end, because a
        launch and a wait cost the host up to half a millisecond.
      chain: what `compile_chain` made of these, if it did.

    Returns:
      `median_us`, `min_us`, `max_us` of one step, and `runs`.
    """
    chain = chain or compile_chain(step, carry, data, length=length)
    carry = jax.tree.map(jnp.copy, carry)

    def window(loops: int) -> float:
        """Seconds of so many loops."""
        nonlocal carry
        jax.block_until_ready(carry)
        start = time.perf_counter()
        for _ in range(loops):
            carry = chain(carry, data)
        jax.block_until_ready(carry)
        return time.perf_counter() - start

    window(3)
    loops = max(1, round(window_ms / 1e3 / (window(10) / 10)))
    return figures([window(loops) / (loops * length) * 1e6 for _ in range(runs)])


def figures(times_us: Sequence[float]) -> dict[str, float]:
    """What a row of the results says of repeated times."""
    return {
        "median_us": statistics.median(times_us),
        "min_us": min(times_us),
        "max_us": max(times_us),
        "runs": len(times_us),
    }


def time_alternately(
    chains: dict[str, Chain],
    *,
    length: int = 32,
    runs: int = 40,
    window_ms: float = 4,
) -> dict[str, dict[str, float]]:
    """Times several chains a window each in turn: what slows the device down slows all alike.

    Arguments and figures as of `time_chain`, and `over_first`: how much longer a step takes than
    the first chain's in the same turn, as a fraction, median of all turns.
    """
    makers = {name: functools.partial(tuple, chain) for name, chain in chains.items()}
    programs = {name: x.result() for name, x in compile_all(makers, length=length).items()}
    carries = {name: jax.tree.map(jnp.copy, carry) for name, (_, carry, _) in chains.items()}
    times: dict[str, list[float]] = {name: [] for name in chains}
    loops = dict.fromkeys(chains, 4)
    for turn in range(runs + 2):  # the first warms up, the second says how many loops fill a window
        for name in list(chains)[:: 1 if turn % 2 else -1]:
            carry, data = carries[name], chains[name][2]
            jax.block_until_ready(carry)
            start = time.perf_counter()
            for _ in range(loops[name]):
                carry = programs[name](carry, data)
            jax.block_until_ready(carry)
            seconds = (time.perf_counter() - start) / loops[name]
            carries[name] = carry
            if turn == 1:
                loops[name] = max(1, round(window_ms / 1e3 / seconds))
            elif turn > 1:
                times[name].append(seconds / length * 1e6)
    first = next(iter(times.values()))
    return {
        name: figures(x)
        | {"over_first": statistics.median(a / b - 1 for a, b in zip(x, first, strict=True))}
        for name, x in times.items()
    }


def copies(size: int, total: int = 400_000_000) -> int:
    """How many copies of `size` bytes the caches cannot hold between two uses of one."""
    return max(2, min(UNROLL, -(-total // size)))


# --- Ceilings ---------------------------------------------------------------------------------


def ceilings(sizes: Sequence[int], *, length: int = 32, **options) -> dict[int, float]:
    """GB/s of a kernel that only reads so many bytes: the best of a few block sizes."""
    makers = {
        (size, i): maker for size in sizes for i, maker in enumerate(_touching(size, copy=False))
    }
    programs = compile_all(makers, length=length)
    times: dict[int, list[float]] = {size: [] for size in sizes}
    for key, make in makers.items():
        timed = time_chain(*make(), chain=programs[key].result(), length=length, **options)
        times[key[0]].append(timed["median_us"])
    return {size: size / min(here) / 1e3 for size, here in times.items()}


def copy_chains(size: int) -> list[Chain]:
    """What `time_chain` takes: copying half of `size` bytes, with a few block sizes."""
    return [make() for make in _touching(size, copy=True)]


def _touching(size: int, copy: bool) -> list[Callable[[], Chain]]:
    touch, blocks = {
        "gpu": (touch_by_triton, (8192, 16384, 32768)),
        "tpu": (touch_by_mosaic, (1 << 19, 1 << 20, 1 << 21)),
    }[jax.default_backend()]
    return [functools.partial(touch, size, copy, block) for block in blocks]


def touch_by_triton(size: int, copy: bool, block_bytes: int) -> tuple[Step, jax.Array, jax.Array]:
    """What `time_chain` takes: reading `size` bytes, or copying half of them, on an NVIDIA GPU."""
    words = block_bytes // 4
    blocks = -(-size // block_bytes) // (2 if copy else 1)
    data = jax.random.bits(jax.random.key(0), (copies(size), blocks, words), jnp.uint32)

    def touch(data, carry, out, i):
        del carry
        x = plt.load(data.at[i, pl.program_id(0), jnp.arange(words)])
        if copy:
            plt.store(out.at[pl.program_id(0), jnp.arange(words)], x)
        else:
            plt.store(out.at[pl.program_id(0)], jnp.max(x))

    shape = (blocks, words) if copy else (blocks,)

    def step(i, carry, data):
        return pl.pallas_call(
            functools.partial(touch, i=i % data.shape[0]),
            grid=(blocks,),
            out_shape=jax.ShapeDtypeStruct(shape, jnp.uint32),
            in_specs=[pl.BlockSpec(memory_space=pl.ANY)] * 2,
            out_specs=pl.BlockSpec(memory_space=pl.ANY),
            compiler_params=plt.CompilerParams(num_warps=4, num_stages=1),
            name="touch",
        )(data, carry)

    return step, jnp.zeros(shape, jnp.uint32), data


def touch_by_mosaic(
    size: int, copy: bool, block_bytes: int, interpret: Any = False
) -> tuple[Step, jax.Array, jax.Array]:
    """The same on a TPU."""
    rows = block_bytes // 512
    blocks = max(1, -(-size // block_bytes) // (2 if copy else 1))
    data = jax.random.bits(jax.random.key(0), (copies(size), blocks * rows, 128), jnp.uint32)
    data = jax.lax.bitcast_convert_type(data, jnp.int32)
    shape = (blocks * rows, 128) if copy else (8, 128)

    def touch(data, carry, out):
        del carry
        if copy:
            out[...] = data[...]
            return

        @pl.when(pl.program_id(0) == 0)
        def _():
            out[...] = jnp.zeros_like(out)

        out[...] = jnp.maximum(out[...], data[...].reshape(-1, 8, 128).max(0))

    def step(i, carry, data):
        layer = i % data.shape[0]
        return pl.pallas_call(
            touch,
            grid=(blocks,),
            out_shape=jax.ShapeDtypeStruct(shape, jnp.int32),
            in_specs=[
                pl.BlockSpec((None, rows, 128), lambda j: (layer, j, 0)),
                pl.BlockSpec(memory_space=pl.ANY),
            ],
            out_specs=pl.BlockSpec(
                (rows if copy else 8, 128), lambda j: (j, 0) if copy else (0, 0)
            ),
            interpret=interpret,
            name="touch",
        )(data, carry)

    return step, jnp.zeros(shape, jnp.int32), data

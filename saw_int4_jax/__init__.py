"""SAW-INT4 for JAX: a paged INT4 KV cache with block-diagonal Hadamard rotation."""

from pallas_kernels import PageFormat, Pages, paged_attention, write_kv
from saw_int4_jax.cache import (
    Cache,
    CacheSpec,
    attend,
    extend,
    free,
    init_cache,
    last_token,
    positions,
    share,
    slots,
    truncate,
)
from saw_int4_jax.generate import (
    Generation,
    Sampling,
    decode,
    generate,
    make_sampling,
    prefill,
    step,
    stream,
)
from saw_int4_jax.rope import Rope, RopeScaling

__version__ = "0.1.0"

__all__ = [
    "Cache",
    "CacheSpec",
    "Generation",
    "PageFormat",
    "Pages",
    "Rope",
    "RopeScaling",
    "Sampling",
    "attend",
    "decode",
    "extend",
    "free",
    "generate",
    "init_cache",
    "last_token",
    "make_sampling",
    "paged_attention",
    "positions",
    "prefill",
    "share",
    "slots",
    "step",
    "stream",
    "truncate",
    "write_kv",
]

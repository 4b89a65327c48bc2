"""Paged INT4 KV cache operations for JAX: arrays in, arrays out. Knows no model and no Flax."""

from pallas_kernels.attention import paged_attention
from pallas_kernels.page_format import PageFormat, Pages, init_pages
from pallas_kernels.write import write_kv, write_qkv

__all__ = ["PageFormat", "Pages", "init_pages", "paged_attention", "write_kv", "write_qkv"]

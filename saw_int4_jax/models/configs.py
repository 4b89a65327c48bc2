"""Published models, as configs: shapes for benchmarks and tests, no weights.

Values are those of the base models' `config.json`.
"""

from __future__ import annotations

import functools

from saw_int4_jax.models.llama import LlamaConfig
from saw_int4_jax.rope import Rope, RopeScaling

_llama3 = functools.partial(LlamaConfig, vocab_size=128_256, max_length=131_072, num_kv_heads=8)
_mistral = functools.partial(
    LlamaConfig,
    embed_dim=4096,
    mlp_dim=14_336,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    max_length=32_768,
)
_qwen2 = functools.partial(LlamaConfig, rope=Rope(1e6), norm_eps=1e-6, qkv_bias=True)
_qwen3 = functools.partial(
    LlamaConfig,
    vocab_size=151_936,
    num_kv_heads=8,
    head_dim=128,
    max_length=40_960,
    rope=Rope(1e6),
    norm_eps=1e-6,
    qk_norm=True,
)
_ROPE_3_1 = Rope(5e5, RopeScaling(8.0, 1.0, 4.0, 8192))
_ROPE_3_2 = Rope(5e5, RopeScaling(32.0, 1.0, 4.0, 8192))

CONFIGS: dict[str, LlamaConfig] = {
    "Llama-2-7B": LlamaConfig(
        vocab_size=32_000,
        embed_dim=4096,
        mlp_dim=11_008,
        num_layers=32,
        num_heads=32,
        num_kv_heads=32,
        head_dim=128,
        max_length=4096,
    ),
    "Llama-3.1-8B": _llama3(
        embed_dim=4096,
        mlp_dim=14_336,
        num_layers=32,
        num_heads=32,
        head_dim=128,
        rope=_ROPE_3_1,
    ),
    "Llama-3.1-70B": _llama3(
        embed_dim=8192,
        mlp_dim=28_672,
        num_layers=80,
        num_heads=64,
        head_dim=128,
        rope=_ROPE_3_1,
    ),
    "Llama-3.2-1B": _llama3(
        embed_dim=2048,
        mlp_dim=8192,
        num_layers=16,
        num_heads=32,
        head_dim=64,
        rope=_ROPE_3_2,
        tie_embeddings=True,
    ),
    "Llama-3.2-3B": _llama3(
        embed_dim=3072,
        mlp_dim=8192,
        num_layers=28,
        num_heads=24,
        head_dim=128,
        rope=_ROPE_3_2,
        tie_embeddings=True,
    ),
    "Mistral-7B-v0.1": _mistral(vocab_size=32_000, window=4096),
    "Mistral-7B-v0.3": _mistral(vocab_size=32_768, rope=Rope(1e6)),
    "Qwen2.5-0.5B": _qwen2(
        vocab_size=151_936,
        embed_dim=896,
        mlp_dim=4864,
        num_layers=24,
        num_heads=14,
        num_kv_heads=2,
        head_dim=64,
        max_length=32_768,
        tie_embeddings=True,
    ),
    "Qwen2.5-1.5B": _qwen2(
        vocab_size=151_936,
        embed_dim=1536,
        mlp_dim=8960,
        num_layers=28,
        num_heads=12,
        num_kv_heads=2,
        head_dim=128,
        max_length=131_072,
        tie_embeddings=True,
    ),
    "Qwen2.5-7B": _qwen2(
        vocab_size=152_064,
        embed_dim=3584,
        mlp_dim=18_944,
        num_layers=28,
        num_heads=28,
        num_kv_heads=4,
        head_dim=128,
        max_length=131_072,
    ),
    "Qwen2.5-32B": _qwen2(
        vocab_size=152_064,
        embed_dim=5120,
        mlp_dim=27_648,
        num_layers=64,
        num_heads=40,
        num_kv_heads=8,
        head_dim=128,
        max_length=131_072,
        norm_eps=1e-5,
    ),
    "Qwen3-0.6B": _qwen3(
        embed_dim=1024, mlp_dim=3072, num_layers=28, num_heads=16, tie_embeddings=True
    ),
    "Qwen3-1.7B": _qwen3(
        embed_dim=2048, mlp_dim=6144, num_layers=28, num_heads=16, tie_embeddings=True
    ),
    "Qwen3-4B": _qwen3(
        embed_dim=2560, mlp_dim=9728, num_layers=36, num_heads=32, tie_embeddings=True
    ),
    "Qwen3-8B": _qwen3(embed_dim=4096, mlp_dim=12_288, num_layers=36, num_heads=32),
    "Qwen3-14B": _qwen3(embed_dim=5120, mlp_dim=17_408, num_layers=40, num_heads=40),
    "Qwen3-32B": _qwen3(embed_dim=5120, mlp_dim=25_600, num_layers=64, num_heads=64),
}

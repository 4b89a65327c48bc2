"""Small checkpoints written to disk, in the formats that the loaders read."""

from __future__ import annotations

import json
import pathlib
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from saw_int4_jax.models.llama import Llama, LlamaConfig

SIZES = dict(
    vocab_size=272,
    embed_dim=32,
    mlp_dim=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    max_length=128,
)


def random_params(config: LlamaConfig, seed: int = 0) -> dict[str, Any]:
    """Parameters without structure: norms and biases are random too."""
    tokens = jnp.zeros((1, 1), jnp.int32)
    shapes = jax.eval_shape(Llama(config).init, jax.random.key(0), tokens)["params"]
    rng = np.random.default_rng(seed)

    def draw(leaf):
        x = rng.normal(size=leaf.shape).astype(np.float32)
        return jnp.asarray(x / np.sqrt(config.embed_dim) if x.ndim == 2 else 1 + 0.3 * x)

    return jax.tree.map(draw, shapes)


# --- Hugging Face ---------------------------------------------------------------------------


def model_type(config: LlamaConfig) -> str:
    if config.qk_norm:
        return "qwen3"
    if config.qkv_bias and not config.o_bias:
        return "qwen2"
    return "llama" if config.window is None else "mistral"


def config_json(config: LlamaConfig) -> dict[str, Any]:
    """The fields of config.json as transformers 4 writes them."""
    kind, scaling = model_type(config), config.rope.scaling
    raw = dict(
        model_type=kind,
        vocab_size=config.vocab_size,
        hidden_size=config.embed_dim,
        intermediate_size=config.mlp_dim,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.max_length,
        hidden_act="silu",
        rms_norm_eps=config.norm_eps,
        rope_theta=config.rope.theta,
        rope_scaling=None if scaling is None else {"rope_type": "llama3", **vars(scaling)},
        tie_word_embeddings=config.tie_embeddings,
        attention_bias=config.o_bias,
        sliding_window=config.window,
        eos_token_id=2,
    )
    if kind in ("qwen2", "qwen3"):
        raw |= dict(
            use_sliding_window=config.window is not None, max_window_layers=config.full_layers
        )
    return raw


def tensors(config: LlamaConfig, params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The tensors of a Hugging Face checkpoint."""
    leaves = {
        "model.embed_tokens.weight": params["embed_tokens"]["embedding"],
        "model.norm.weight": params["norm"]["scale"],
    }
    if not config.tie_embeddings:
        leaves["lm_head.weight"] = params["lm_head"]["kernel"].T
    for i in range(config.num_layers):
        layer, prefix = params[f"layers_{i}"], f"model.layers.{i}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            leaves[f"{prefix}.{norm}.weight"] = layer[norm]["scale"]
        for block in ("self_attn", "mlp"):
            for name, module in layer[block].items():
                for leaf, value in module.items():
                    kind = "bias" if leaf == "bias" else "weight"
                    leaves[f"{prefix}.{block}.{name}.{kind}"] = value.T  # a vector is its own
    return {name: np.ascontiguousarray(leaf) for name, leaf in leaves.items()}


def write_hugging_face(
    directory: pathlib.Path,
    raw: Mapping[str, Any],
    weights: Mapping[str, np.ndarray],
    *,
    shards: int = 1,
) -> pathlib.Path:
    """Writes config.json, safetensors and a byte-level tokenizer.json; returns the directory."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(raw))
    byte_level().save(str(directory / "tokenizer.json"))
    if shards == 1:
        safetensors.numpy.save_file(dict(weights), directory / "model.safetensors")
        return directory
    names, weight_map = sorted(weights), {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = {name: weights[name] for name in names[shard::shards]}
        safetensors.numpy.save_file(part, directory / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


# --- llama2.c -------------------------------------------------------------------------------

LLAMA2C_PIECES = (
    *("<unk>", "\n<s>\n", "\n</s>\n"),
    *(f"<0x{byte:02X}>" for byte in range(256)),
    *(" ", "t", "h", "e", "o", "n", "c", "a", "p", "é"),
    *(" t", "he", " the", "on", "ce", "nce", " on", "aa", "aaa", " o", "once", "  "),
)
LLAMA2C_SCORES = (*[0.0] * 269, -5, -1, -2, -3, -4, -6, -8, -7, -9, -10, -11, -12)


def pairs_from_halves(kernel: np.ndarray, head_dim: int) -> np.ndarray:
    """Rows of [heads * D, in] so that the channel pairs (i, i + D/2) of a head lie side by side."""
    order = np.arange(head_dim).reshape(2, -1).T.reshape(-1)
    return kernel.reshape(-1, head_dim, kernel.shape[-1])[:, order].reshape(kernel.shape)


def llama2c_bytes(config: LlamaConfig, params: Mapping[str, Any]) -> bytes:
    """A checkpoint of version 0."""
    sizes = (
        *(config.embed_dim, config.mlp_dim, config.num_layers, config.num_heads),
        *(config.num_kv_heads, config.vocab_size * (1 if config.tie_embeddings else -1)),
        config.max_length,
    )
    layers = [params[f"layers_{i}"] for i in range(config.num_layers)]
    attention = [layer["self_attn"] for layer in layers]
    q, k = (
        [pairs_from_halves(np.asarray(a[name]["kernel"]).T, config.head_dim) for a in attention]
        for name in ("q_proj", "k_proj")
    )
    parts = [
        params["embed_tokens"]["embedding"],
        *[layer["input_layernorm"]["scale"] for layer in layers],
        *(q + k),
        *[a["v_proj"]["kernel"].T for a in attention],
        *[a["o_proj"]["kernel"].T for a in attention],
        *[layer["post_attention_layernorm"]["scale"] for layer in layers],
        *[layer["mlp"]["gate_proj"]["kernel"].T for layer in layers],
        *[layer["mlp"]["down_proj"]["kernel"].T for layer in layers],
        *[layer["mlp"]["up_proj"]["kernel"].T for layer in layers],
        params["norm"]["scale"],
        np.full((2, config.max_length, config.head_dim // 2), np.nan),
    ]
    if not config.tie_embeddings:
        parts.append(params["lm_head"]["kernel"].T)
    body = b"".join(np.asarray(part, "<f4").tobytes() for part in parts)
    return struct.pack("<7i", *sizes) + body


def llama2c_tokenizer_bytes(
    pieces: Sequence[str] = LLAMA2C_PIECES, scores: Sequence[float] = LLAMA2C_SCORES
) -> bytes:
    """A tokenizer.bin."""
    encoded = [piece.encode() for piece in pieces]
    parts = [struct.pack("<i", max(map(len, encoded)))]
    for piece, score in zip(encoded, scores):
        parts.append(struct.pack("<fi", score, len(piece)) + piece)
    return b"".join(parts)


# --- Tokenizers -----------------------------------------------------------------------------


def byte_level() -> tokenizers.Tokenizer:
    """GPT-2's scheme without merges: BOS, EOS, then one token a byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<bos>": 0, "unused": 1, "<eos>": 2}
    vocabulary |= {token: 3 + i for i, token in enumerate(alphabet)}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<bos>", "<eos>"])
    backend.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 0)]
    )
    return backend


def sentencepiece_like(metaspace: bool = False) -> tokenizers.Tokenizer:
    """Llama 2's scheme: U+2581 for spaces, byte tokens for unknown characters."""
    pieces = [piece.strip("\n").replace(" ", "▁") for piece in LLAMA2C_PIECES]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he")]
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True))
    if metaspace:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        spaces = [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first", split=False)]
    else:
        backend.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
        spaces = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        spaces.append(decoders.Strip(" ", 1, 0))
    backend.decoder = decoders.Sequence(spaces)
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return backend

"""llama2.c checkpoints (github.com/karpathy/llama2.c): version 0, and their tokenizers.

A checkpoint is seven int32 (dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size, seq_len)
and float32 tensors in a fixed order. A negative vocab_size means that the output projection is
its own tensor. Its RoPE turns the channel pairs (2i, 2i + 1); ours the pairs (i, i + D / 2).
"""

from __future__ import annotations

import math
import pathlib
import struct
from collections.abc import Iterator

import numpy as np
import tokenizers
from tokenizers import decoders, models, normalizers, processors

from saw_int4_jax.models.llama import LlamaConfig
from saw_int4_jax.models.tokenizer import Tokenizer

HEADER = struct.Struct("<7i")
VERSIONED_MAGIC = 0x616B3432  # "ak42", where versions 1 and 2 begin with it

# Token ids are fixed: these three, a token for each byte, then the rest.
SPECIAL_TOKENS = ("<unk>", "<s>", "</s>")
BOS, EOS = 1, 2
BYTE_TOKENS = tuple(f"<0x{byte:02X}>" for byte in range(256))


# --- Config and weights ---------------------------------------------------------------------


def read_config(file: pathlib.Path) -> LlamaConfig:
    """The config in a checkpoint's header.

    Raises:
      ValueError: it is no checkpoint of version 0, or its size is not what the header says.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        header = stream.read(HEADER.size)
    if len(header) < HEADER.size:
        raise ValueError(
            f"Expected {file} to hold a llama2.c header of {HEADER.size} bytes: {size=}"
        )
    embed_dim, mlp_dim, layers, heads, kv_heads, vocab_size, max_length = HEADER.unpack(header)
    if embed_dim == VERSIONED_MAGIC:
        raise ValueError(
            f"Expected {file} to be a llama2.c checkpoint of version 0, not a later one"
        )
    if min(embed_dim, mlp_dim, layers, heads, kv_heads, abs(vocab_size), max_length) < 1:
        raise ValueError(f"Expected {file} to be a llama2.c checkpoint: a size is not positive")
    config = LlamaConfig(
        vocab_size=abs(vocab_size),
        embed_dim=embed_dim,
        mlp_dim=mlp_dim,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=embed_dim // heads,
        max_length=max_length,
        tie_embeddings=vocab_size > 0,
    )
    expected = HEADER.size + 4 * sum(
        copies * math.prod(shape) for _, copies, shape in layout(config)
    )
    if size != expected:
        raise ValueError(f"Expected {file} to have {expected} bytes as its header says: {size=}")
    return config


def layout(config: LlamaConfig) -> list[tuple[str, int, tuple[int, ...]]]:
    """The tensors of a checkpoint in order: parameter, how many of them, and stored shape.

    `{}` in a name is the layer; a nameless tensor is not needed.
    """
    width, q_width = config.embed_dim, config.num_heads * config.head_dim
    kv_width, hidden = config.num_kv_heads * config.head_dim, config.mlp_dim
    layers, vocabulary = config.num_layers, (config.vocab_size, width)
    tensors = [
        ("embed_tokens.embedding", 1, vocabulary),
        ("layers_{}.input_layernorm.scale", layers, (width,)),
        ("layers_{}.self_attn.q_proj.kernel", layers, (q_width, width)),
        ("layers_{}.self_attn.k_proj.kernel", layers, (kv_width, width)),
        ("layers_{}.self_attn.v_proj.kernel", layers, (kv_width, width)),
        ("layers_{}.self_attn.o_proj.kernel", layers, (width, q_width)),
        ("layers_{}.post_attention_layernorm.scale", layers, (width,)),
        ("layers_{}.mlp.gate_proj.kernel", layers, (hidden, width)),
        ("layers_{}.mlp.down_proj.kernel", layers, (width, hidden)),
        ("layers_{}.mlp.up_proj.kernel", layers, (hidden, width)),
        ("norm.scale", 1, (width,)),
        ("", 2, (config.max_length, config.head_dim // 2)),  # RoPE's cosines and sines
    ]
    return tensors if config.tie_embeddings else [*tensors, ("lm_head.kernel", 1, vocabulary)]


def read_tensors(file: pathlib.Path, config: LlamaConfig) -> Iterator[tuple[str, np.ndarray]]:
    """Parameters, named as in the flattened tree, and their tensors; kernels are [out, in]."""
    with file.open("rb") as stream:
        stream.seek(HEADER.size)
        for name, copies, shape in layout(config):
            for layer in range(copies):
                tensor = np.fromfile(stream, "<f4", math.prod(shape)).reshape(shape)
                if ".q_proj." in name or ".k_proj." in name:
                    tensor = halves_from_pairs(tensor, config.head_dim)
                if name:
                    yield name.format(layer), tensor


def halves_from_pairs(kernel: np.ndarray, head_dim: int) -> np.ndarray:
    """Reorders the output channels of each head, [heads * D, in], from (2i, 2i + 1) pairs."""
    pairs = kernel.reshape(-1, head_dim // 2, 2, kernel.shape[-1])
    return pairs.swapaxes(1, 2).reshape(kernel.shape)


# --- Tokenizer ------------------------------------------------------------------------------


def read_tokenizer(
    checkpoint: pathlib.Path, config: LlamaConfig, file: pathlib.Path | None = None
) -> Tokenizer:
    """The tokenizer in `file`, or in `tok<vocab_size>.bin` or `tokenizer.bin` beside a checkpoint.

    Generation ends at EOS, and at BOS, which llama2.c's models write between texts.

    Raises:
      FileNotFoundError: there is none.
      ValueError: it is damaged or not that of the checkpoint.
    """
    names = (f"tok{config.vocab_size}.bin", "tokenizer.bin")
    candidates = [checkpoint.parent / name for name in names] if file is None else [file]
    for candidate in candidates:
        if candidate.is_file():
            pieces, scores = read_vocabulary(candidate, config.vocab_size)
            return Tokenizer(to_tokenizers(pieces, scores), (EOS, BOS))
    raise FileNotFoundError(f"Expected a tokenizer in {' or '.join(map(str, candidates))}")


def read_vocabulary(file: pathlib.Path, size: int) -> tuple[list[str], list[float]]:
    """The pieces and scores of a tokenizer: an int32, then (float32, int32, bytes) for each.

    Raises:
      ValueError: the file does not hold just `size` distinct pieces, or not llama2.c's first ones.
    """
    content = file.read_bytes()
    pieces: list[str] = []
    scores: list[float] = []
    offset = 4  # the length of the longest piece, not needed
    try:
        for _ in range(size):
            score, length = struct.unpack_from("<fi", content, offset)
            start, offset = offset + 8, offset + 8 + length
            pieces.append(content[start:offset].decode())
            scores.append(score)
    except (struct.error, UnicodeDecodeError) as error:
        raise ValueError(
            f"Expected {file} to be a llama2.c tokenizer of {size} tokens: {error}"
        ) from error
    if offset != len(content):
        raise ValueError(
            f"Expected {file} to hold {size} tokens in {offset} bytes: {len(content)=}"
        )
    pieces[: len(SPECIAL_TOKENS)] = SPECIAL_TOKENS  # BOS and EOS are stored between line ends
    if tuple(pieces[len(SPECIAL_TOKENS) :][:256]) != BYTE_TOKENS or len(set(pieces)) != size:
        raise ValueError(f"Expected {file} to hold distinct tokens, 3 to 258 standing for bytes")
    return pieces, scores


def to_tokenizers(pieces: list[str], scores: list[float]) -> tokenizers.Tokenizer:
    """llama2.c's tokenizer for the `tokenizers` library.

    llama2.c puts a space before a text, then joins the neighbours whose concatenation is the
    piece of the highest score, until none is. That is BPE: its merges are all ways to split each
    piece in two, those of higher scores first.
    """
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    first = len(SPECIAL_TOKENS) + len(BYTE_TOKENS)
    merges = [
        (piece[:cut], piece[cut:])
        for piece in sorted(pieces[first:], key=lambda piece: -scores[vocabulary[piece]])
        for cut in range(1, len(piece))
        if piece[:cut] in vocabulary and piece[cut:] in vocabulary
    ]
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True))
    backend.normalizer = normalizers.Prepend(" ")
    bos = SPECIAL_TOKENS[BOS]
    backend.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, BOS)]
    )
    backend.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(list(SPECIAL_TOKENS))
    backend.encode_special_tokens = True  # a text that spells one is still a text
    return backend

"""Methods that keep some tokens in BF16: what a query reads depends on where it stands."""

from __future__ import annotations

from saw_int4_jax.methods.integer import quantize_dequantize, token_wise
from saw_int4_jax.methods.method import Method

GROUP = 32  # tokens that share a channel's scale
RESIDUAL = 128  # KIVI: tokens kept in BF16

SINK = 4
WINDOW = 64


def channel_wise(x, found):
    """Each channel of GROUP tokens in a row gets a scale and a minimum."""
    del found
    batch, size, *rest = x.shape
    if size % GROUP:
        raise ValueError(f"Expected room for {size} tokens to be a multiple of {GROUP}")
    groups = x.reshape(batch, size // GROUP, GROUP, *rest)
    return quantize_dequantize(groups, axis=2).reshape(x.shape)


def kivi() -> Method:
    """Keys by channel, values by token, the newest in BF16 (KIVI, arXiv 2402.02750).

    Keys are quantized RESIDUAL at a time, when so many have gathered; values one at a time, when
    RESIDUAL newer ones follow.
    """

    def bits(kv_heads: int, head_dim: int, context: int) -> float:
        exact_keys, exact_values = (min(n, context) / context for n in (RESIDUAL / 2, RESIDUAL))
        keys = 16 * exact_keys + (4 + 32 / GROUP) * (1 - exact_keys)
        values = 16 * exact_values + (4 + 32 / head_dim) * (1 - exact_values)
        return (keys + values) / 2

    return Method(
        "kivi",
        f"INT4 keys by channel of {GROUP} tokens, values by token, newest {RESIDUAL} in BF16",
        bits,
        keys=channel_wise,
        values=token_wise(),
        recent_keys=lambda query, token: token >= query // RESIDUAL * RESIDUAL,
        recent_values=lambda query, token: query - token < RESIDUAL,
        paging=f"no: {GROUP} tokens share a scale and recent tokens lie in a second pool",
        regular="no: two formats in a sequence",
        fused="no: a pass for each format, joined",
    )


def sink_window(name: str, order: int) -> Method:
    """BDR, but the first SINK tokens (attention sinks, arXiv 2309.17453) and WINDOW newest BF16."""

    def bits(kv_heads: int, head_dim: int, context: int) -> float:
        exact = min(SINK + WINDOW, context) / context
        return 16 * exact + (4 + 32 / head_dim) * (1 - exact)

    def recent(query, token):
        return (token < SINK) | (query - token < WINDOW)

    return Method(
        name,
        f"BDR {order}, first {SINK} and newest {WINDOW} tokens in BF16",
        bits,
        keys=token_wise(order=order),
        values=token_wise(),
        recent_keys=recent,
        recent_values=recent,
        paging="no: tokens move from a BF16 pool to pages",
        regular="no: two formats in a sequence",
        fused="no: a pass for each format, joined",
    )

"""Methods that weigh errors by what they do, or follow the keys' covariance.

A key error e changes a score by q·e, in the mean square by eᵀ E[qqᵀ] e. A value error changes what
the layer adds to the residual stream through W_o, by eᵀ (Σ W_o W_oᵀ) e over the heads that share
the value. Both are called H here, the Hessian of the layer's squared error.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels.page_format import largest_order, rotate
from saw_int4_jax.methods.integer import grid, paged, quantize_dequantize, token_wise_bits
from saw_int4_jax.methods.method import LayerSample, Method
from saw_int4_jax.rotation import scale_keys, scale_values

DAMPING = 0.01  # of the mean of H's diagonal, as in GPTQ


def _product(equation: str, *operands: Array) -> Array:
    return jnp.einsum(equation, *operands, precision=lax.Precision.HIGHEST)


def key_hessian(sample: LayerSample) -> Float[Array, "K D D"]:
    """E[qqᵀ] over the queries that read each KV head."""
    tokens, kv_heads = sample.k.shape[:2]
    q = sample.q.reshape(tokens, kv_heads, -1, sample.q.shape[-1])
    return _product("nkgc,nkgd->kcd", q, q) / (tokens * q.shape[2])


def value_hessian(sample: LayerSample) -> Float[Array, "K D D"]:
    """W_o W_oᵀ, summed over the query heads that read each KV head."""
    output = sample.output.reshape(sample.k.shape[1], -1, *sample.output.shape[1:])
    return _product("kgce,kgde->kcd", output, output)


# --- A diagonal, folded into the weights --------------------------------------------------------


def diagonal(name: str, order: int) -> Method:
    """Channels scaled so that equal steps hurt equally: d = (H_cc / E[x_c²])^(1/4).

    It minimizes Σ H_cc / d_c² times Σ d_c² E[x_c²], the weighted error of a step that grows with
    the scaled vector's length. Folded into W_q and W_k, W_v and W_o; the kernels never see it.
    """

    def factors(hessian, x):
        h = jnp.diagonal(hessian, axis1=1, axis2=2)
        return h, (x**2).mean(0)

    def fold(params, config, samples, key):
        del key
        keys, values = [], []
        for sample in samples:
            h, square = factors(key_hessian(sample), sample.k)
            # RoPE wants the two channels of a pair alike, QK norm all heads.
            h, square = (x.reshape(-1, 2, x.shape[-1] // 2).sum(1) for x in (h, square))
            if config.qk_norm:
                h, square = (jnp.broadcast_to(x.mean(0), x.shape) for x in (h, square))
            keys.append(_balance(h, square))
            values.append(_balance(*factors(value_hessian(sample), sample.v)))
        params = scale_keys(params, config, jnp.stack(keys))
        return scale_values(params, config, jnp.stack(values))

    about = "channels scaled by the optimal diagonal, then "
    about += f"BDR {order}" if order > 1 else "INT4"
    return paged(name, about, order, fold=fold, uses_text=True)


def _balance(h: Array, square: Array) -> Array:
    """(h / square)^(1/4) with mean logarithm zero over the channels, bounded."""
    d = (jnp.maximum(h, 1e-12) / jnp.maximum(square, 1e-12)) ** 0.25
    return jnp.clip(d / jnp.exp(jnp.log(d).mean(-1, keepdims=True)), 2.0**-8, 2.0**8)


# --- Rounding that makes up for earlier errors --------------------------------------------------


def gptq(name: str, order: int) -> Method:
    """Channels rounded one after the other, the later ones making up for the earlier ones' error.

    GPTQ (arXiv 2210.17323) with a token's vector in the place of a weight row, its scale and
    minimum fixed before; channels in the order of falling H_cc.
    """

    @jax.jit
    def calibrate(sample: LayerSample, key: Array):
        del key
        keys = rotate(rotate(key_hessian(sample), order).swapaxes(1, 2), order)
        return _prepare(keys), _prepare(value_hessian(sample))

    return Method(
        name,
        "GPTQ-style rounding" + (f" after rotation by {order}" if order > 1 else ""),
        token_wise_bits(),
        keys=lambda x, found: rotate(_round(rotate(x, order), found), order),
        values=_round,
        calibrate=calibrate,
        uses_text=True,
        fused="no: writing a token takes D dependent steps",
    )


def _prepare(hessian: Float[Array, "K D D"]) -> tuple[Array, Array]:
    """The order of channels, and the upper Cholesky factor of H⁻¹ in it."""
    mean = jnp.diagonal(hessian, axis1=1, axis2=2).mean(-1)[:, None, None]
    eye = jnp.eye(hessian.shape[-1])
    hessian = hessian + (DAMPING * mean + 1e-20) * eye
    order = jnp.argsort(-jnp.diagonal(hessian, axis1=1, axis2=2), axis=-1)
    ordered = jax.vmap(lambda h, o: h[o][:, o])(hessian, order)
    scale = jnp.diagonal(ordered, axis1=1, axis2=2) ** -0.5  # H may span many magnitudes
    unit = ordered * scale[:, :, None] * scale[:, None, :]
    inverse = jnp.linalg.inv(unit) * scale[:, :, None] * scale[:, None, :]
    return order, jnp.linalg.cholesky(inverse).swapaxes(1, 2)


def _round(x: Float[Array, "B S K D"], found: tuple[Array, Array]) -> Float[Array, "B S K D"]:
    order, upper = found
    index = jnp.broadcast_to(order, x.shape)
    row = jnp.take_along_axis(x, index, axis=-1)
    scale, low = grid(x)  # that of plain rounding
    inverse = 1 / jnp.where(scale > 0, scale, 1)

    def one(c, carry):
        row, read = carry
        value = lax.dynamic_index_in_dim(row, c, axis=-1)
        rounded = jnp.clip(jnp.round((value - low) * inverse), 0, 15) * scale + low
        factors = lax.dynamic_index_in_dim(upper, c, axis=1, keepdims=False)  # [K, D]
        error = (value - rounded) / lax.dynamic_index_in_dim(factors, c, axis=-1)
        later = jnp.arange(row.shape[-1]) > c
        row = row - jnp.where(later, error * factors, 0)
        return row, lax.dynamic_update_index_in_dim(read, rounded, c, axis=-1)

    _, read = lax.fori_loop(0, x.shape[-1], one, (row, jnp.zeros_like(row)))
    return jnp.take_along_axis(read, jnp.argsort(index, axis=-1), axis=-1)


# --- A rotation from the keys' covariance -------------------------------------------------------


def covariance_rotation(name: str) -> Method:
    """Keys turned to their principal axes, then Hadamard: every channel has the same variance.

    The axes of E[kkᵀ] for each KV head; a Hadamard rotation of the natural axes spreads variance
    evenly only if the keys' channels are uncorrelated.
    """

    @jax.jit
    def calibrate(sample: LayerSample, key: Array):
        del key
        second_moment = _product("nkc,nkd->kcd", sample.k, sample.k) / len(sample.k)
        _, axes = jnp.linalg.eigh(second_moment)
        return rotate(axes, largest_order(axes.shape[-1])), ()

    def keys(x, matrix):
        turned = _product("bskc,kcd->bskd", x, matrix)
        return _product("bskd,kcd->bskc", quantize_dequantize(turned), matrix)

    def values(x, found):
        del found
        return quantize_dequantize(x)

    return Method(
        name,
        "keys turned to the principal axes of calibration keys, then Hadamard",
        token_wise_bits(),
        keys=keys,
        values=values,
        calibrate=calibrate,
        uses_text=True,
    )


# --- The mean subtracted -------------------------------------------------------------------------


def centered(name: str, order: int) -> Method:
    """The calibration mean of each channel subtracted before quantization.

    A constant in all keys adds the same to all scores of a query, and so nothing to the softmax;
    a constant in all values adds itself to the output. Neither has to be read per token: k-means
    with one centroid, without its look-up.
    """

    @jax.jit
    def calibrate(sample: LayerSample, key: Array):
        del key
        return sample.k.mean(0), sample.v.mean(0)

    def around(x, mean, order):
        return mean + rotate(quantize_dequantize(rotate(x - mean, order)), order)

    return Method(
        name,
        "mean of calibration keys and values subtracted, then "
        + (f"BDR {order}" if order > 1 else "INT4"),
        token_wise_bits(),
        keys=lambda x, mean: around(x, mean, order),
        values=lambda x, mean: around(x, mean, 1),
        calibrate=calibrate,
        uses_text=True,
    )

"""The norm between a model's layers."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


class RMSNorm(nn.Module):
    """x over its root mean square, times a weight: `nn.RMSNorm` as one kernel on a GPU.

    XLA makes one of a reduction, and an operation on its result and what it reduced. Flax
    multiplies the result with the weight first: a kernel sums squares and another multiplies.

    Attributes:
      epsilon: added to the mean square before its root is taken.
      dtype: of the output; `None`: that of input and weight. It is computed in float32.
    """

    epsilon: float = 1e-6
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "*lead E"]) -> Float[Array, "*lead E"]:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        y = x.astype(jnp.float32)
        y *= lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.epsilon)
        return (y * scale).astype(self.dtype or jnp.result_type(x, scale))

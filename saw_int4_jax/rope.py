"""Rotary position embedding (Su et al., arXiv 2104.09864), halves rotated against each other."""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Llama 3's stretching of the low frequencies; field names as in published configs."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclasses.dataclass(frozen=True)
class Rope:
    """What angle a position turns each channel pair by."""

    theta: float = 10_000.0
    scaling: RopeScaling | None = None

    def frequencies(self, head_dim: int) -> Float[np.ndarray, "half"]:
        """Radians per position for the channel pairs (i, i + head_dim / 2)."""
        frequency = self.theta ** -(np.arange(0, head_dim, 2, dtype=np.float32) / head_dim)
        if self.scaling is None:
            return frequency
        scaling = self.scaling
        turns = scaling.original_max_position_embeddings * frequency / (2 * math.pi)
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        kept = np.clip((turns - low) / (high - low), 0, 1)
        return frequency * (kept + (1 - kept) / scaling.factor)

    def __call__(
        self, x: Float[Array, "B T heads D"], positions: Int[Array, "B T"]
    ) -> Float[Array, "B T heads D"]:
        """Turns x by its positions; computed in float32, returned in x's dtype."""
        angle = positions[..., None, None] * self.frequencies(x.shape[-1])
        cos, sin = jnp.cos(angle), jnp.sin(angle)
        a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
        return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)

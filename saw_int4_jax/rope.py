"""Rotary position embedding (Su et al., arXiv 2104.09864), halves rotated against each other."""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pallas_kernels.xla.write import rope


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

    def angles(
        self, positions: Int[Array, "B T"], head_dim: int
    ) -> tuple[Float[Array, "B T half"], Float[Array, "B T half"]]:
        """Cosine and sine of the angle that each channel pair of a position is turned by."""
        angle = positions[..., None] * self.frequencies(head_dim)
        return jnp.cos(angle), jnp.sin(angle)

    def __call__(
        self, x: Float[Array, "B T heads D"], positions: Int[Array, "B T"]
    ) -> Float[Array, "B T heads D"]:
        """Turns x by its positions; computed in float32, returned in x's dtype."""
        return rope(x, *self.angles(positions, x.shape[-1]))

"""Attention as a Pallas kernel for NVIDIA's Hopper, in Mosaic GPU (`plgpu`)."""

import jax

if jax.__version_info__ < (0, 11):
    raise ImportError(f"Expected {jax.__version__=} to be at least 0.11")

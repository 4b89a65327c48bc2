"""Flax attention modules over the paged cache: `linen` and `nnx`."""

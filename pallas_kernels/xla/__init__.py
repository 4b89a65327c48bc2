"""The two operations as plain `jnp`, compiled by XLA: any device, and the reference for kernels."""

"""Pallas kernels for TPU, compiled by Mosaic, over `paired` and `bf16` pages."""

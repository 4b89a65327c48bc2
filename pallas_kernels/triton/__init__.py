"""The two operations as Pallas kernels lowered through Triton: any NVIDIA GPU from T4 up."""

"""The kernels for NVIDIA GPUs from Hopper on, in Pallas Mosaic GPU (`plgpu`)."""

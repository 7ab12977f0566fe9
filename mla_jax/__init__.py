"""MLA decoding for JAX on NVIDIA GPUs."""

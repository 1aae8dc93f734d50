"""Kernels in Pallas. They know jax and nothing of `jaxdl`, and can be imported alone."""

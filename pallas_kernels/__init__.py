"""Kernels in Pallas. They know jax and nothing of `jaxdl`, and can be imported alone."""

from pallas_kernels.attention.api import dot_product_attention, flash_attention, supports

__all__ = ["dot_product_attention", "flash_attention", "supports"]

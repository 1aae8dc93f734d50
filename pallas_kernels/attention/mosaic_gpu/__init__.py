"""FlashAttention for Hopper (H100, H200) in Pallas's Mosaic GPU.

`forward_pass` and `backward_pass` are the kernels, `tiles` chooses their tiles, `scores` is what they have in common, `dialect` the few words for which GPU and interpreter need different ones, `api` how the operands reach them. Begin with the forward pass.
"""

from pallas_kernels.attention.mosaic_gpu.api import backward, forward, supports

__all__ = ["backward", "forward", "supports"]

"""FlashAttention for TPUs (v5e, v5p, v6e, tpu7x) in Pallas's Mosaic.

`forward_pass` and `backward_pass` are the kernels, `scores` is what they have in common, `schedule` the list of tiles that they visit, `api` how the operands reach them. Begin with the forward pass.
"""

from pallas_kernels.attention.mosaic_tpu.api import backward, forward, supports

__all__ = ["backward", "forward", "supports"]

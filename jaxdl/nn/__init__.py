"""Building blocks: the maths as plain functions, the Linen modules thin around them."""

from jaxdl.nn.attention import Attention, MultiHeadAttention
from jaxdl.nn.embedding import LearnedPositions, PatchEmbedding, patchify
from jaxdl.nn.normalization import LayerNorm, layer_norm
from jaxdl.nn.transformer import AttentionPooling, Encoder, EncoderBlock, FeedForward

__all__ = [
    "Attention",
    "AttentionPooling",
    "Encoder",
    "EncoderBlock",
    "FeedForward",
    "LayerNorm",
    "LearnedPositions",
    "MultiHeadAttention",
    "PatchEmbedding",
    "layer_norm",
    "patchify",
]

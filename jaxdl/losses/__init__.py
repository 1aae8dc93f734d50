"""Objectives: pure functions from a model's outputs and its targets to a scalar."""

from jaxdl.losses.classification import cross_entropy, soft_cross_entropy
from jaxdl.losses.contrastive import sigmoid_loss, softmax_loss

__all__ = ["cross_entropy", "sigmoid_loss", "soft_cross_entropy", "softmax_loss"]

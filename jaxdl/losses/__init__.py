"""Objectives: pure functions from outputs and targets to a scalar."""

from jaxdl.losses.contrastive import sigmoid_loss

__all__ = ["sigmoid_loss"]

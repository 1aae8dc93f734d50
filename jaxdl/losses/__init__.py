"""Objectives: pure functions from a model's outputs and its targets to a scalar."""

from jaxdl.losses.classification import cross_entropy, soft_cross_entropy
from jaxdl.losses.contrastive import sigmoid_loss, softmax_loss
from jaxdl.losses.reinforcement import (
    clipped_surrogate,
    clipped_value_loss,
    dueling,
    explained_variance,
    generalized_advantages,
    n_step,
    policy_change,
    q_targets,
    standardized,
    td_errors,
)

__all__ = [
    "clipped_surrogate",
    "clipped_value_loss",
    "cross_entropy",
    "dueling",
    "explained_variance",
    "generalized_advantages",
    "n_step",
    "policy_change",
    "q_targets",
    "sigmoid_loss",
    "soft_cross_entropy",
    "softmax_loss",
    "standardized",
    "td_errors",
]

"""What is measured on held-out data, in numpy."""

from jaxdl.metrics.classification import accuracy, classify
from jaxdl.metrics.retrieval import recall_at

__all__ = ["accuracy", "classify", "recall_at"]

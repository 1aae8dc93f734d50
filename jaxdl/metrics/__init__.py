"""What is measured on held-out data, in numpy."""

from jaxdl.metrics.classification import accuracy
from jaxdl.metrics.retrieval import recall_at

__all__ = ["accuracy", "recall_at"]

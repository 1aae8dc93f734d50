"""What is measured on held-out data, in numpy."""

from jaxdl.metrics.classification import accuracy, classify
from jaxdl.metrics.retrieval import recall_at
from jaxdl.metrics.translation import bleu

__all__ = ["accuracy", "bleu", "classify", "recall_at"]

"""What is measured on held-out data, in numpy."""

from jaxdl.metrics.classification import accuracy, classify
from jaxdl.metrics.detection import box_iou, matched_iou
from jaxdl.metrics.retrieval import recall_at
from jaxdl.metrics.translation import bleu

__all__ = ["accuracy", "bleu", "box_iou", "classify", "matched_iou", "recall_at"]

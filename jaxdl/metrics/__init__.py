"""What is measured on held-out data, in numpy."""

from jaxdl.metrics.agents import interquartile_interval, interquartile_mean
from jaxdl.metrics.average_precision import AveragePrecision, Detections, average_precision, constant_detections
from jaxdl.metrics.baselines import NGrams, naive_bayes
from jaxdl.metrics.classification import accuracy, classify
from jaxdl.metrics.detection import box_iou, matched_iou
from jaxdl.metrics.generation import frechet_distance, inception_score, kernel_distance, precision_recall
from jaxdl.metrics.retrieval import recall_at
from jaxdl.metrics.segmentation import IGNORE, class_counts, class_dice, class_iou, mean_dice, mean_iou, pixel_accuracy
from jaxdl.metrics.translation import bleu

__all__ = [
    "IGNORE",
    "AveragePrecision",
    "Detections",
    "NGrams",
    "accuracy",
    "average_precision",
    "bleu",
    "box_iou",
    "class_counts",
    "class_dice",
    "class_iou",
    "classify",
    "constant_detections",
    "frechet_distance",
    "inception_score",
    "interquartile_interval",
    "interquartile_mean",
    "kernel_distance",
    "matched_iou",
    "mean_dice",
    "mean_iou",
    "naive_bayes",
    "pixel_accuracy",
    "precision_recall",
    "recall_at",
]

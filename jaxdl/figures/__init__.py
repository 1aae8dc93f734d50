"""Figures of arrays and texts, each a function that returns a matplotlib `Figure`, and the one that saves them."""

from jaxdl.figures.agents import interval_curve
from jaxdl.figures.answers import answers
from jaxdl.figures.attention import attention_maps, attention_rollout, cross_attention, rollout_maps
from jaxdl.figures.canvas import Animation, Picture, pixels, save, show, subplots
from jaxdl.figures.classification import confusion_matrix, mistakes, verdicts
from jaxdl.figures.comparison import heatmaps, means_by_class, timings
from jaxdl.figures.convolution import feature_maps, filters
from jaxdl.figures.curves import curves, layer_curves, learning_curves
from jaxdl.figures.detection import boxes, masks
from jaxdl.figures.images import grid, image_rows
from jaxdl.figures.layers import OCTAVES, layer_stats
from jaxdl.figures.points import scatter
from jaxdl.figures.retrieval import ranked_images, ranked_texts, retrieval, similarity_matrix
from jaxdl.figures.scaling import scaling
from jaxdl.figures.sequences import prefix_predictions, segmentations, symbol_probabilities, texts_by_class

__all__ = [
    "OCTAVES",
    "Animation",
    "Picture",
    "answers",
    "attention_maps",
    "attention_rollout",
    "boxes",
    "confusion_matrix",
    "cross_attention",
    "curves",
    "feature_maps",
    "filters",
    "grid",
    "heatmaps",
    "image_rows",
    "interval_curve",
    "layer_curves",
    "layer_stats",
    "learning_curves",
    "masks",
    "means_by_class",
    "mistakes",
    "pixels",
    "prefix_predictions",
    "ranked_images",
    "ranked_texts",
    "retrieval",
    "rollout_maps",
    "save",
    "scaling",
    "scatter",
    "segmentations",
    "show",
    "similarity_matrix",
    "subplots",
    "symbol_probabilities",
    "texts_by_class",
    "timings",
    "verdicts",
]

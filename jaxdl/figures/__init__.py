"""Pictures that experiments share, and the sheet for those that only one of them draws."""

from jaxdl.figures.answers import answers, boxes
from jaxdl.figures.attention import attention_maps
from jaxdl.figures.canvas import save, show, subplots
from jaxdl.figures.classification import confusion_matrix, mistakes
from jaxdl.figures.inside import OCTAVES, inside
from jaxdl.figures.retrieval import ranked_images, ranked_texts, similarity_matrix
from jaxdl.figures.rollout import attention_rollout, looked_at
from jaxdl.figures.sequences import bits_by_class, copied, readings, words_found, written_names
from jaxdl.figures.training import beside, learning_curves

__all__ = [
    "OCTAVES",
    "answers",
    "attention_maps",
    "attention_rollout",
    "beside",
    "bits_by_class",
    "boxes",
    "confusion_matrix",
    "copied",
    "inside",
    "learning_curves",
    "looked_at",
    "mistakes",
    "ranked_images",
    "ranked_texts",
    "readings",
    "save",
    "show",
    "similarity_matrix",
    "subplots",
    "words_found",
    "written_names",
]

"""A source of a few captions."""

import numpy as np

from jaxdl.data import CaptionedImage, Source
from jaxdl.data.sources import Info


class Listed(Source[CaptionedImage]):
    """Grey images with captions."""

    def __init__(self, captions, labels=None, classes=()):
        self.captions, self.labels, self.info = captions, labels or [None] * len(captions), Info(classes=classes)

    def __len__(self) -> int:
        return len(self.captions)

    def __getitem__(self, index: int) -> CaptionedImage:
        image = np.full((8, 8, 3), 20 * index, np.uint8)
        return CaptionedImage(image, self.captions[index], self.labels[index])

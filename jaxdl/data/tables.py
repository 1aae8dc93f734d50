"""Tables that come with scikit-learn."""

import dataclasses

import numpy as np
from jaxtyping import Float32

from jaxdl.data.digests import digest_of
from jaxdl.data.elements import TableRow
from jaxdl.data.sources import Info, Source, Split

TABLES = ("iris", "wine", "breast_cancer", "diabetes", "digits")
TEST_SHARE = 0.2


class Table(Source[TableRow]):
    """Rows of numbers: `features`, of which `info.columns` are the names, and a `target`."""

    def __init__(self, features: Float32[np.ndarray, "N F"], target: Float32[np.ndarray, "N"], info: Info):
        self.features, self.target = features, target
        self.info = dataclasses.replace(info, digest=digest_of(features, target))

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, index: int) -> TableRow:
        return TableRow(self.features[index], float(self.target[index]))


def table(name: str, split: Split) -> Table:
    """One of `TABLES` in its published units; of `diabetes` too, where scikit-learn's default is scaled. A fifth is held out, by a fixed seed; where the target is a class, a fifth of each class."""
    from sklearn import datasets, model_selection  # Takes a second to import.

    options = {"scaled": False} if name == "diabetes" else {}
    data = getattr(datasets, f"load_{name}")(**options)
    classes = tuple(str(each) for each in getattr(data, "target_names", ()))
    parts = model_selection.train_test_split(
        np.arange(len(data.target)), test_size=TEST_SHARE, random_state=0, stratify=data.target if classes else None
    )
    chosen = np.sort(parts[0 if split == "train" else 1])
    info = Info(classes=classes, columns=tuple(map(str, data.feature_names)))
    return Table(data.data[chosen].astype(np.float32), data.target[chosen].astype(np.float32), info)

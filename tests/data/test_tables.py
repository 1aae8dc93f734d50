"""Tables of scikit-learn: every row once, columns by name."""

import numpy as np
import pytest
from sklearn import datasets

from jaxdl.data import TABLES
from jaxdl.data.tables import TABLES as NAMES


@pytest.mark.parametrize("name", NAMES)
def test_every_row_is_in_one_part_with_its_target(name):
    published = getattr(datasets, f"load_{name}")(**({"scaled": False} if name == "diabetes" else {}))
    train, test = TABLES.open(f"builtin:{name}")
    rows = sorted((*row.features.tolist(), row.target) for part in (train, test) for row in part)
    wanted = np.column_stack([published.data, published.target]).astype(np.float32)
    np.testing.assert_array_equal(rows, sorted(map(tuple, wanted.tolist())))
    assert train.info.columns == tuple(published.feature_names) and train.features.shape == (len(train), len(train.info.columns))
    assert abs(len(test) - len(wanted) / 5) <= 1
    if train.info.classes:
        assert len(train.info.classes) == len(set(published.target))
        shares = [np.bincount(part.target.astype(int)) / len(part) for part in (train, test)]
        np.testing.assert_allclose(*shares, atol=0.02)


def test_columns_have_their_units():
    train, _ = TABLES.open("builtin:diabetes")
    age = train.features[:, train.info.columns.index("age")]
    assert 18 < age.min() < age.max() < 80 and train.info.classes == ()

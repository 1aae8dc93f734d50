"""What all tests share: shapes are checked at run time, compiled programs are kept, no test asks the network."""

import os
import tempfile
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["HF_HUB_OFFLINE"] = "1"
# XLA's threads. Each warpgroup of an interpreted kernel keeps one waiting: with a thread for each of two cores all would wait for each other.
os.environ.setdefault("NPROC", "16")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(tempfile.gettempdir()) / "jaxdl-tests-xla"))

from jaxtyping import install_import_hook

install_import_hook(["jaxdl", "experiments"], "typechecker.check")

import hypothesis_profiles  # noqa: F401, registers them
import jax
import numpy as np
import pytest
from PIL import Image

jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


@pytest.fixture(scope="session")
def caption_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image folder as people keep them: `train` and `val`, each with eight pictures and a `metadata.jsonl`."""
    root = tmp_path_factory.mktemp("captions")
    random = np.random.default_rng(0)
    names = ("red", "green", "blue", "white", "black", "grey", "pink", "brown")
    for split in ("train", "val"):
        folder = root / split
        folder.mkdir()
        rows = []
        for index, name in enumerate(names):
            Image.fromarray(random.integers(0, 256, (20 + index, 24, 3), np.uint8)).save(folder / f"{index}.png")
            text = f'"a {name} picture"' if index % 2 else f'["a {name} picture", "something {name}"]'
            rows.append(f'{{"file_name": "{index}.png", "text": {text}}}\n')
        (folder / "metadata.jsonl").write_text("".join(rows))
    return root


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real data that is too large to be kept with the code: `JAXDL_TEST_DATA`, or a folder `shared` beside the checkout."""
    folder = Path(os.environ.get("JAXDL_TEST_DATA") or Path(__file__).parents[2] / "shared")
    if not (folder / "tfds").is_dir():
        pytest.skip(f"no test data in {folder}: set JAXDL_TEST_DATA")
    return folder

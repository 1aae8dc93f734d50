"""What is made of the training data once and kept in the run, so that a resumed run and a finished one read as it did."""

from collections.abc import Callable
from pathlib import Path

from jaxdl.data.text import Tokenizer
from jaxdl.files import written_whole


def kept_tokenizer(directory: Path, make: Callable[[], Tokenizer]) -> Tokenizer:
    """The tokenizer in a run's directory. It is made where there is none yet; what an interrupted process leaves is not taken for one."""
    if not (directory / "tokenizer_config.json").exists():
        with written_whole(directory, last="tokenizer_config.json") as folder:
            make().save(folder)
    return Tokenizer.load(directory)

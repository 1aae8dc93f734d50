"""Data sets that TensorFlow Datasets has prepared in array_record format, read without TensorFlow."""

from collections.abc import Mapping
from typing import Any

from jaxdl.data.digests import digest_of
from jaxdl.data.sources import Info, Source
from jaxdl.errors import UserError, unknown
from jaxdl.files import local_path

Record = Mapping[str, Any]


class TFDS(Source[Record]):
    """The split `part` of a data set `NAME[/CONFIG][:VERSION]`, record by record; or else the first of `splits` that it has. It lies in `data_dir`, TFDS' own default where empty.

    Raises `UserError` where there is none, or one that cannot be read.
    """

    def __init__(self, name: str, *, splits: tuple[str, ...], part: str = "", data_dir: str = ""):
        import tensorflow_datasets as tfds  # Not everybody needs it.

        directory = str(local_path(data_dir)) if data_dir else ""
        where = directory or "TFDS' default folder"
        try:
            builder = tfds.builder(name, data_dir=directory or None)
            available = tuple(builder.info.splits)
        except (tfds.core.DatasetNotFoundError, ValueError, AssertionError) as error:
            raise UserError(
                f"TFDS has no data set {name!r} in {where} ({_first_line(error)}): see its catalog, or name the folder of data sets (data_dir)"
            ) from None
        wanted = next((split for split in ((part,) if part else splits) if split in available), None)
        if part and available and not wanted:
            raise unknown(f"split of TFDS {name!r}", part, available)
        if wanted is None:
            prepare = f"python -c \"import tensorflow_datasets as t; t.builder('{name}', file_format='array_record').download_and_prepare()\""
            raise UserError(
                f"TFDS {name!r} has no split {part or ' or '.join(splits)} in {where}: name the folder of data sets (data_dir), or prepare it: pip install 'jaxdl[prepare]', then {prepare}"
            )
        try:
            self._records = builder.as_data_source(wanted)
        except (NotImplementedError, ValueError, OSError) as error:
            raise UserError(
                f"TFDS {name!r} in {where} cannot be read ({_first_line(error)}): prepare it with file_format='array_record'"
            ) from None
        self.features: Mapping[str, Any] = dict(builder.info.features.items())
        label = self.features["label"] if "label" in self.features else None
        digest = digest_of(builder.info.full_name, wanted, len(self._records))
        self.info = Info(classes=tuple(getattr(label, "names", ())), digest=digest)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Record:
        return self._records[index]


def text_of(value: Any) -> str:
    """A text of a record, which may come as bytes. Raises `UserError` for what is none."""
    if not isinstance(value, bytes | str):
        raise UserError(f"a record has {type(value).__name__} in the place of a text: choose other data")
    try:
        return value.decode() if isinstance(value, bytes) else str(value)
    except UnicodeDecodeError as error:
        raise UserError(f"a record has a text that is no UTF-8 (byte {error.start}): choose other data") from None


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]

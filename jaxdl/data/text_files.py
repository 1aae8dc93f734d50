"""Files of text: which encodings and ends of lines there are, and where in a file something is wrong."""

import codecs
import gzip
import zlib
from pathlib import Path

from jaxdl.errors import UserError

_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
"""What files may begin with, and what it says about the rest. That of UTF-32 begins as that of UTF-16 does."""


def read_text(path: Path) -> str:
    """The text of a file, plain or `.gz`, in UTF-8, or in UTF-16 or UTF-32 where it begins with the mark of these. The mark is dropped, and lines end with "\\n", however they did.

    Raises `UserError` for a file that cannot be read or is no such text, with the line.
    """
    try:
        content = path.read_bytes()
        content = gzip.decompress(content) if path.suffix.lower() == ".gz" else content
    except FileNotFoundError:
        raise UserError(f"there is no file {path}: check the path") from None
    except PermissionError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): change its permissions") from None
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read ({error}): fetch it again") from None
    encoding = next((name for mark, name in _MARKS if content.startswith(mark)), "utf-8")
    try:
        text = content.decode(encoding).removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = content[: error.start].decode(encoding, "ignore").count("\n") + 1
        raise UserError(
            f"{path} is no text in {encoding.upper()} (byte {error.start}) in line {line:,}: convert it, as iconv -f latin1 -t utf-8 does"
        ) from None
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise UserError(f"{path} is no text, since it has a NUL in line {line:,}: convert it to UTF-8, or remove it")
    # A carriage return within a line is no end of it: that would tear sentences away from their translations.
    return text.replace("\r\n", "\n") if "\n" in text else text.replace("\r", "\n")


def read_lines(path: Path) -> list[str]:
    """The lines of `read_text`. Characters that occur in sentences and in JSON, such as U+2028, end none, as they would with `str.splitlines`."""
    text = read_text(path)
    return text.removesuffix("\n").split("\n") if text else []


def replace_surrogates(text: str) -> str:
    """The text with U+FFFD for each half of a surrogate pair that is alone, as JSON may hold it where an emoji was cut: no tokenizer can read it, and no file in UTF-8 hold it."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")

"""Python's standard library as data: the source of its modules, and its docstrings with the functions that they describe."""

import ast
import functools
import sysconfig
import textwrap
from collections.abc import Iterator
from pathlib import Path

from jaxdl.data.digests import digest_of
from jaxdl.data.elements import TextPair
from jaxdl.data.sources import Info, Source, Split
from jaxdl.errors import UserError

_NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "lib-dynload", "_pyrepl"}


def modules(split: Split) -> list[Path]:
    """The files of the library's top-level modules. Every tenth, by name, is held out. Raises `UserError` where Python comes without them."""
    files = sorted(library().glob("*.py"))
    if len(files) < 20:
        raise UserError("this Python comes without the source of its standard library: give folder:PATH")
    return [path for index, path in enumerate(files) if (index % 10 == 9) == (split == "test")]


class Docstrings(Source[TextPair]):
    """The docstring of each function of the standard library, and its body without it, in the order of the files.

    Every tenth top-level module or package, by name, is held out. Copies are common in the library, so that held-out functions with a docstring of the training part are left out.
    """

    def __init__(self, split: Split):
        train, test = _docstrings()
        self.pairs = train
        if split == "test":
            known = {pair.query for pair in train}
            self.pairs = [pair for pair in test if pair.query not in known]
        left_out = len(test) - len(self.pairs) if split == "test" else 0
        digest = digest_of(*(text for pair in self.pairs for text in (pair.query, pair.document)))
        self.info = Info(left_out=left_out, reason="have a docstring that is trained on", digest=digest)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> TextPair:
        return self.pairs[index]


@functools.cache
def _docstrings() -> tuple[list[TextPair], list[TextPair]]:
    """Of the part to train on, and of that which is held out."""
    folder = library()
    files = [path for path in folder.rglob("*.py") if not _NOT_LIBRARY & set(path.relative_to(folder).parts)]
    names = sorted({path.relative_to(folder).parts[0].removesuffix(".py") for path in files})
    if len(names) < 20:
        raise UserError("this Python comes without the source of its standard library")
    held_out = set(names[9::10])
    train: list[TextPair] = []
    test: list[TextPair] = []
    for path in sorted(files):
        place = path.relative_to(folder).with_suffix("").parts
        place = place[:-1] if place[-1] == "__init__" and len(place) > 1 else place
        (test if place[0] in held_out else train).extend(_pairs(path, ".".join(place)))
    return train, test


def _pairs(path: Path, module: str) -> Iterator[TextPair]:
    source = path.read_text("utf-8", errors="replace")
    lines = source.split("\n")  # As ast counts them: not at form feeds, of which the library has some.
    try:
        tree = ast.parse(source)
    except SyntaxError:  # Templates that are no Python yet.
        return
    pending: list[tuple[ast.AST, str]] = [(tree, module)]
    while pending:
        node, name = pending.pop()
        for child in reversed(list(ast.iter_child_nodes(node))):
            named = isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
            pending.append((child, f"{name}.{child.name}" if named else name))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node)
            if docstring and docstring.strip() and len(node.body) > 1:
                first = node.body[1]
                start = min(each.lineno for each in (first, *getattr(first, "decorator_list", ())))
                yield TextPair(docstring, textwrap.dedent("\n".join(lines[start - 1 : node.end_lineno])), name)


def library() -> Path:
    """The folder of Python's standard library."""
    return Path(sysconfig.get_paths()["stdlib"])

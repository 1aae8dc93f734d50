"""Writes `docs/blocks.md`: what `jaxdl.nn` offers, from its docstrings, and how far each block is from the library it was compared with.

    python -m benchmarks.reference [--measure]

Words come from the source files; bounds come from the page as it is, so that a change of words needs no measurement. Rows of `benchmarks.counterparts` that the page has no bounds for are measured, and with `--measure` all of them. A bound is a power of ten at least twice what was measured, and not below 1e-6: it is the same on every machine, but for a number that happens to lie at a limit.
"""

import argparse
import ast
import inspect
import math
import re
import textwrap
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import jaxdl.nn
from benchmarks.counterparts import ROWS, differences

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "blocks.md"
ROOMS = sorted(path for path in (ROOT / "jaxdl" / "nn").glob("*.py") if path.name != "__init__.py")
WIDTH = 110
"""Longest line of a signature."""
LEAST = 1e-6
"""Some eight roundings of float32."""

Bounds = Mapping[str, tuple[str, str]]
"""By row: of values and of gradients, as the page has them."""

HEAD = """\
# The building blocks

What `jaxdl.nn` offers, room by room: signature, what it computes and where that is written, and how far it is from another library. The docstrings say more: `help(jaxdl.nn.rope)`.

In signatures a string is an array of that shape, of floating-point numbers unless `Bool`, `Int` … says otherwise; `""` is a single number, `*batch` stands for any axes, and `#B` is B or 1. Types of arguments that have a default are left out. `(...)` under a module is its call; names with a dot are its other methods.

Differences are the largest that were found between us and the library named, in float32 on a CPU, with one draw of arrays of a realistic size: absolute, divided by the largest number of the array where that is above 1, doubled, and rounded up to a power of ten, 1e-6 at least. – is where there is no gradient. The comparisons are the rows of `benchmarks/counterparts.py`; `python -m benchmarks.reference --measure` repeats them and writes this page, `python -m benchmarks.blocks --only ROW` measures the speeds of both. Closer looks, at many shapes, at extremes and at every option, are in `tests/nn` and `tests/parity`; a block without a row here has its tests there.
"""

_ROW = re.compile(r"^- row `(\w+)`, .*: values (≤ \S+), gradients (–|≤ \S+)$", re.MULTILINE)


def bound(difference: float) -> str:
    """The least power of ten that is twice the difference, from 1e-6 on: less is a matter of the machine."""
    return f"≤ 1e{math.ceil(math.log10(max(2 * difference, LEAST)))}"


def number(bound: str) -> float:
    """What a bound on the page allows."""
    return 0.0 if bound == "–" else float(bound.removeprefix("≤ "))


def measured(row: str) -> tuple[str, str]:
    """The bounds of a row, found now."""
    sides = ROWS[row].sides()
    values, gradients = differences(sides)
    differentiable = any(array.dtype.kind == "f" for array in sides.arrays)
    return bound(values), bound(gradients) if differentiable else "–"


def bounds_of(page: str) -> dict[str, tuple[str, str]]:
    """Those that a page has."""
    return {row: (values, gradients) for row, values, gradients in _ROW.findall(page)}


# From source to signature. -----------------------------------------------------------------------------------------------------


class _Shapes(ast.NodeTransformer):
    """`Float[Array, "B T"]` becomes `"B T"`, and `Bool[Array, "B T"]` `Bool["B T"]`."""

    def visit_Subscript(self, node: ast.Subscript) -> ast.AST:
        self.generic_visit(node)
        match node:
            case ast.Subscript(ast.Name(kind), ast.Tuple([ast.Name("Array"), ast.Constant() as shape])):
                return shape if kind == "Float" else ast.Subscript(node.value, shape)
        return node


def _text(node: ast.AST) -> str:
    """A type, as the page has it. A class that is not defined yet is named by a string."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    return ast.unparse(_Shapes().visit(ast.parse(ast.unparse(node), mode="eval"))).replace("'", '"')


def _parameter(source: str, name: str, kind: ast.expr | None, default: ast.expr | None) -> str:
    given = None if kind is None else _text(kind)
    if default is None:
        return name if given is None else f"{name}: {given}"
    value = ast.get_source_segment(source, default)
    return f"{name}: {given} = {value}" if given and '"' in given and "Literal" not in given else f"{name}={value}"


def _parameters(source: str, function: ast.FunctionDef) -> list[str]:
    """Of a function or a method."""
    arguments = function.args
    plain = arguments.posonlyargs + arguments.args
    defaults = [None] * (len(plain) - len(arguments.defaults)) + arguments.defaults
    parts = [_parameter(source, a.arg, a.annotation, d) for a, d in zip(plain, defaults) if a.arg not in ("self", "cls")]
    if arguments.kwonlyargs:
        parts += ["*"] + [_parameter(source, a.arg, a.annotation, d) for a, d in zip(arguments.kwonlyargs, arguments.kw_defaults)]
    return parts + ([f"**{arguments.kwarg.arg}"] if arguments.kwarg else [])


def _call(head: str, parts: list[str], tail: str = "") -> str:
    line = f"{head}({', '.join(parts)}){tail}"
    if len(line) <= WIDTH:
        return line
    whole = " ".join(part.replace(" ", "\0") + "," for part in parts)
    lines = textwrap.wrap(whole, WIDTH, initial_indent="    ", subsequent_indent="    ", break_long_words=False)
    return "\n".join([f"{head}(", *lines, f"){tail}"]).replace("\0", " ")


def _function(source: str, name: str, function: ast.FunctionDef) -> str:
    return _call(name, _parameters(source, function), f" -> {_text(function.returns)}")


def _class(source: str, node: ast.ClassDef, classes: Mapping[str, ast.ClassDef]) -> str:
    """Fields of the class and of its bases in the same file, then its call and its methods."""
    chain = [classes[base.id] for base in node.bases if isinstance(base, ast.Name) and base.id in classes] + [node]
    body = [statement for each in chain for statement in each.body]
    fields = [_parameter(source, f.target.id, f.annotation, f.value) for f in body if isinstance(f, ast.AnnAssign)]
    methods = {f.name: f for f in body if isinstance(f, ast.FunctionDef)}
    lines = [_call(node.name, fields)]
    for name, method in methods.items():
        is_property = any(isinstance(d, ast.Name) and d.id == "property" for d in method.decorator_list)
        if name == "__call__" or not (name.startswith("_") or name == "setup" or is_property):
            lines.append(_function(source, "" if name == "__call__" else f".{name}", method))
    return "\n".join(lines)


def _paragraph(docstring: str) -> str:
    return inspect.cleandoc(docstring).split("\n\n")[0].strip()


def _blocks(source: str) -> Iterator[tuple[str, str, str]]:
    """Name, signature and first paragraph of everything public in a file, in its order."""
    tree = ast.parse(source)
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    for node, following in zip(tree.body, [*tree.body[1:], None]):
        match node:
            case ast.FunctionDef(name):
                yield name, _function(source, name, node), _paragraph(ast.get_docstring(node) or "")
            case ast.ClassDef(name):
                yield name, _class(source, node, classes), _paragraph(ast.get_docstring(node) or "")
            case ast.Assign([ast.Name(name)], value):
                words = following.value.value if isinstance(following, ast.Expr) else ""
                yield name, f"{name} = {_text(value)}", _paragraph(str(words))


# The page. ---------------------------------------------------------------------------------------------------------------------


def _comparisons(block: str, bounds: Bounds) -> str:
    lines = [
        f"- row `{name}`, as {_library(row.library)}: values {bounds[name][0]}, gradients {bounds[name][1]}"
        for name, row in ROWS.items()
        if block in row.blocks and name in bounds
    ]
    return "".join(f"{line}\n" for line in lines)


def _library(name: str) -> str:
    """Dotted names as code."""
    return re.sub(r"\b(?:torch|transformers)(?:\.\w+)+(?:\([^)]*\))?", lambda found: f"`{found[0]}`", name)


def page(bounds: Bounds) -> str:
    """All of it, with these differences."""
    public = set(jaxdl.nn.__all__)
    index, rooms = [], []
    seen: Counter[str] = Counter()
    for path in ROOMS:
        source = path.read_text(encoding="utf-8")
        blocks = [block for block in _blocks(source) if block[0] in public]
        if not blocks:
            continue
        links = []
        for name, *_ in blocks:
            # GitHub's anchors have no capitals, and a number from the second of the same name on: `prelu` and `PReLU`.
            links.append(f"[{name}](#{name.lower()}" + (f"-{seen[name.lower()]})" if seen[name.lower()] else ")"))
            seen[name.lower()] += 1
        index.append(f"- [{path.name}](#{path.name.replace('.', '')}): {', '.join(links)}")
        rooms.append(f"## {path.name}\n\n{_paragraph(ast.get_docstring(ast.parse(source)) or '')}\n")
        for name, signature, words in blocks:
            comparisons = _comparisons(name, bounds)
            rooms.append(f"### {name}\n\n```python\n{signature}\n```\n\n{words}\n" + (f"\n{comparisons}" if comparisons else ""))
    return "\n".join([HEAD, "\n".join(index) + "\n", *rooms])


def main() -> None:
    """Writes the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true", help="compare every row again, and not only new ones")
    options = parser.parse_args()
    known = bounds_of(PAGE.read_text(encoding="utf-8")) if PAGE.exists() and not options.measure else {}
    bounds = {}
    for name in ROWS:
        bounds[name] = known.get(name) or measured(name)
        if name not in known:
            print(f"{name:28} values {bounds[name][0]}, gradients {bounds[name][1]}", flush=True)
    PAGE.write_text(page(bounds), encoding="utf-8")
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    main()

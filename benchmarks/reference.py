"""Writes `docs/blocks.md`: what `jaxdl.nn` offers, from its docstrings, and how far each block is from the library it was compared with.

    python -m benchmarks.reference [--measure]

Words come from the source files; differences come from the page as it is, so that a change of words needs no measurement. Rows of `benchmarks.counterparts` that the page has no differences for are measured, and with `--measure` all of them.
"""

import argparse
import ast
import inspect
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

Differences = Mapping[str, tuple[str, str]]
"""By row: of values and of gradients, as the page has them."""

_OF_PAIRS = "a loop over pairs of queries and keys, in `tests/nn/test_masks.py`"
APART = {
    "Attention": "a type",
    "Rotary": "a type",
    "Places": "a type",
    "PerAxis": "a type",
    "ATTENTIONS": "names of functions, which are compared under their own",
    "Cache": "decoding with it is compared with whole sequences, in `tests/nn/test_attention.py` for every kind of attention",
    "DeformableConv": "`torchvision.ops`, which has it, is not installed: a gather written in torch, in `tests/parity/test_deformable.py`",
    "LearnedPositions": "an addition, and a look-up of the same rows in decoding: `tests/nn/test_positions.py`",
    "interpolate_positions": "`torch.nn.functional.interpolate`, in `tests/parity/test_vit.py`",
    "SequenceModel": "no library has the modes as one: each is compared with the steps it is made of, in `tests/nn/test_recurrence.py`",
    "Transformer": "its blocks are compared as `TransformerBlock`, and stacks with Llama's and Gemma's of transformers, whole and decoded, in `tests/parity/test_transformer.py`",
    "stack_blocks": "stacks that are looped and scanned are compared with each other, in `tests/nn/test_transformer.py`",
    "unstack_blocks": "the inverse of `stack_blocks`, in `tests/nn/test_transformer.py`",
    "attention_weights": "softmax written out, in `tests/models/test_gpt2.py`",
    "gated_mlp_dim": "the width of Llama 7B, in `tests/nn/test_activations.py`",
    "stochastic_depth": "what is left and its mean are counted, in `tests/nn/test_transformer.py`",
    "random_projection": "orthogonality, norms and the fall of the error are measured, in `tests/nn/test_linear_attention.py`",
    "window_mask": _OF_PAIRS,
    "padding_mask": _OF_PAIRS,
    "known_tokens": "a check, and padding is compared where it is used: `tests/test_generate_from_outside.py`",
    "length_mask": _OF_PAIRS,
    "segment_mask": _OF_PAIRS,
    "prefix_mask": _OF_PAIRS,
    "token_positions": "written out by hand, in `tests/nn/test_masks.py`",
}
"""What has no row, and why, or what it is compared with instead."""

HEAD = """\
# The building blocks

What `jaxdl.nn` offers, room by room: signature, what it computes and where that is written, and how far it is from another library. The words are the docstrings': `help(jaxdl.nn.rope)`.

In signatures a string is an array of that shape, of floating-point numbers unless `Bool`, `Int` … says otherwise; `""` is a single number, `*batch` stands for any axes, and `#B` is B or 1. Types of arguments that have a default are left out. `(...)` under a module is its call; names with a dot are its other methods.

Differences are the largest that were found between us and the library named, in float32 on a CPU, with one draw of arrays of a realistic size: absolute, and divided by the largest number of the array where that is above 1. A rounding of float32 is 6e-8. – is where there is no gradient. On another machine sums are taken in another order: tests allow four times as much, and 1e-6 at least. The comparisons are the rows of `benchmarks/counterparts.py`; `python -m benchmarks.reference --measure` repeats them and writes this page, `python -m benchmarks.blocks --only ROW` measures the speeds of both. Closer looks, at many shapes, in float64, at extremes and at every option, are in `tests/nn` and `tests/parity`.
"""

_ROW = re.compile(r"^- row `(\w+)`, .*: values (\S+), gradients (–|\S+)$", re.MULTILINE)


def shown(difference: float) -> str:
    """To two digits: 1.2e-7."""
    return re.sub(r"e([+-])0?", r"e\1", f"{difference:.1e}").replace("e+", "e") if difference else "0"


def allowed(difference: str) -> float:
    """How far a row may be from what the page says, on any machine."""
    return 0.0 if difference == "–" else max(4 * float(difference), LEAST)


def measured(row: str) -> tuple[str, str]:
    """The differences of a row, found now."""
    sides = ROWS[row].sides()
    values, gradients = differences(sides)
    differentiable = any(array.dtype.kind == "f" for array in sides.arrays)
    return shown(values), shown(gradients) if differentiable else "–"


def differences_of(page: str) -> dict[str, tuple[str, str]]:
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


def _blocks(source: str) -> Iterator[tuple[str, str, str]]:
    """Name, signature and words of everything public in a file, in its order."""
    tree = ast.parse(source)
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    for node, following in zip(tree.body, [*tree.body[1:], None]):
        match node:
            case ast.FunctionDef(name):
                yield name, _function(source, name, node), ast.get_docstring(node) or ""
            case ast.ClassDef(name):
                yield name, _class(source, node, classes), ast.get_docstring(node) or ""
            case ast.Assign([ast.Name(name)], value):
                words = following.value.value if isinstance(following, ast.Expr) else ""
                yield name, f"{name} = {_text(value)}", inspect.cleandoc(str(words))


# The page. ---------------------------------------------------------------------------------------------------------------------


def _comparisons(block: str, found: Differences) -> str:
    lines = [
        f"- row `{name}`, as {_library(row.library)}: values {found[name][0]}, gradients {found[name][1]}"
        for name, row in ROWS.items()
        if block in row.blocks and name in found
    ]
    lines += [f"- no row: {APART[block]}"] if block in APART else []
    return "".join(f"{line}\n" for line in lines)


def _library(name: str) -> str:
    """Dotted names as code."""
    return re.sub(r"\b(?:torch|transformers)(?:\.\w+)+(?:\([^)]*\))?", lambda found: f"`{found[0]}`", name)


def page(found: Differences) -> str:
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
        rooms.append(f"## {path.name}\n\n{ast.get_docstring(ast.parse(source)) or ''}\n")
        for name, signature, words in blocks:
            rooms.append(f"### {name}\n\n```python\n{signature}\n```\n\n{words}\n\n{_comparisons(name, found)}")
    return "\n".join([HEAD, "\n".join(index) + "\n", *rooms])


def main() -> None:
    """Writes the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true", help="compare every row again, and not only new ones")
    options = parser.parse_args()
    known = differences_of(PAGE.read_text(encoding="utf-8")) if PAGE.exists() and not options.measure else {}
    found = {}
    for name in ROWS:
        found[name] = known.get(name) or measured(name)
        if name not in known:
            print(f"{name:28} values {found[name][0]}, gradients {found[name][1]}", flush=True)
    PAGE.write_text(page(found), encoding="utf-8")
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    main()

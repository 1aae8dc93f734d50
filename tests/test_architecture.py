"""The house stands as it is drawn."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from families import FAMILIES

from jaxdl import models

ROOT = Path(__file__).parent.parent


def test_imports_only_go_down():
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_kernels_can_be_imported_alone():
    code = "import sys, pallas_kernels; print([name for name in sys.modules if name.startswith('jaxdl')])"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout.strip() == "[]"


def test_kernels_need_nothing_but_jax():
    """Beside the standard library and what jax itself imports."""
    code = (
        "import sys, jax, jax.numpy; roots = lambda: {name.split('.')[0] for name in sys.modules} - set(sys.stdlib_module_names);"
        "before = roots(); import pallas_kernels; print(sorted(roots() - before))"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout.strip()
        == "['pallas_kernels']"
    )


def test_every_public_function_says_what_it_does():
    silent = []
    for path in [*ROOT.glob("jaxdl/**/*.py"), *ROOT.glob("experiments/*.py"), *ROOT.glob("pallas_kernels/**/*.py")]:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if ast.get_docstring(tree) is None and path.read_text():
            silent.append(str(path))
        for node in tree.body:
            if (
                isinstance(node, ast.FunctionDef | ast.ClassDef)
                and not node.name.startswith("_")
                and ast.get_docstring(node) is None
            ):
                silent.append(f"{path.relative_to(ROOT)}: {node.name}")
    assert silent == []


GENERAL = "data", "metrics", "figures", "pretrained", "nn", "losses", "generate", "weights.py", "settings.py", "files.py"
"""What serves all families, and names none."""

# `clip` is a verb too.
FAMILY = re.compile("|".join([*(f"(?i:{name})(?![a-z])" for name in {*models.FAMILIES.values()} - {"clip"}), "CLIP", "Gemma"]))


@pytest.mark.parametrize("part", GENERAL)
def test_what_serves_all_families_names_none(part):
    """In no name and in no text, but for docstrings, which say where something comes from."""
    folder = ROOT / "jaxdl" / part
    found = []
    for path in [folder] if part.endswith(".py") else sorted(folder.rglob("*.py")):
        for line, word in words(ast.parse(path.read_text(encoding="utf-8"))):
            if FAMILY.search(word):
                found.append(f"{path.relative_to(ROOT)}:{line}: {word}")
    assert found == []


def words(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """The names and texts of a module, each with its line, without docstrings."""
    docstrings = {
        id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.lineno, node.value
        for field in ("id", "attr", "arg", "name", "module"):
            if isinstance(getattr(node, field, None), str):
                yield getattr(node, "lineno", 0), getattr(node, field)


def test_every_experiment_is_held_against_the_contracts():
    names = {path.stem for path in (ROOT / "experiments").glob("*.py") if not path.stem.startswith("_")}
    assert names == FAMILIES.keys()
    assert all(family.name == name for name, family in FAMILIES.items())

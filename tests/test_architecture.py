"""The house stands as it is drawn."""

import subprocess
import sys
from pathlib import Path

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
    import ast

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

"""What the README says is so."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from published_siglip import write_published_siglip

from experiments.__main__ import main

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def test_the_lines_of_python_run(tmp_path):
    lines = "\n".join(re.findall(r"```python\n(.*?)```", README, re.DOTALL))
    write_published_siglip(tmp_path)
    Image.fromarray(np.arange(30 * 40 * 3, dtype=np.uint8).reshape(30, 40, 3)).save(tmp_path / "cat.jpg")
    lines = lines.replace("google/siglip-base-patch16-224", str(tmp_path))
    done = subprocess.run([sys.executable, "-W", "error", "-c", lines], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("(1, 8) [["), done


def test_pictures_and_folders_that_it_names_are_there():
    root = Path(__file__).parent.parent
    for path in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (root / path).exists(), path
    for path in re.findall(r"^([a-z_]+/[\w./]*) ", README, re.MULTILINE):
        assert (root / path).exists(), path


def test_its_table_of_experiments_is_the_one_that_they_print(capsys):
    main(["--table"])
    printed = capsys.readouterr().out.strip()
    head = printed.splitlines()[0]
    rows = README[README.index(head) :].partition("\n\n")[0] if head in README else ""
    assert rows == printed, "put into README.md what `python -m experiments --table` prints"

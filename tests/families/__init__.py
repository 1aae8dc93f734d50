"""The families, one file each: what the contracts in this folder are held against."""

import importlib
import pkgutil

from family import Family

FAMILIES: dict[str, Family] = {
    info.name: importlib.import_module(f"{__name__}.{info.name}").FAMILY
    for info in pkgutil.iter_modules(__path__)
    if not info.name.startswith(("test_", "conftest"))
}
"""By the name of the experiment."""

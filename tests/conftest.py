"""What all tests share: shapes are checked at run time, programs are compiled quickly and kept, no test asks the network, and each family has its time."""

import contextlib
import importlib.metadata
import os
import signal
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["HF_HUB_OFFLINE"] = "1"
# XLA's threads. Each warpgroup of an interpreted kernel keeps one waiting: with a thread for each of two cores all would wait for each other.
os.environ.setdefault("NPROC", "16")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(tempfile.gettempdir()) / "jaxdl-tests-xla"))
# Almost all programs of tests run once and for milliseconds, and take much longer to compile. Tests marked `optimized` are of speed, of memory, or of the last digit.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

signal.signal(signal.SIGHUP, signal.SIG_DFL)  # A suite that is run by nohup ignores it, and what it starts would too.
# Later versions know no way but the slower one, and end at a flag that they do not know.
QUICKER = importlib.metadata.version("jaxlib").startswith("0.10.")
if QUICKER:
    flags = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()

from jaxtyping import install_import_hook

install_import_hook(["jaxdl", "experiments", "pallas_kernels.attention.benchmark"], "typechecker.check")

import hypothesis_profiles  # noqa: F401, registers them
import jax
import numpy as np
import pytest
from jax._src import compiler
from PIL import Image

from jaxdl.launch import take_wide_vectors

jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
jax.config.update("jax_num_cpu_devices", 8)
take_wide_vectors()  # As commands do, so that the same config has the same bits here and there.

_all_devices = jax.devices

SECONDS = 12
"""Of one core, for all contracts of a family."""

_spent = 0.0


def _core_seconds() -> float:
    return sum(os.times()[:4])


@contextlib.contextmanager
def _optimized() -> Iterator[None]:
    """Programs are compiled as XLA compiles them by default."""
    quick, options = jax.config.read("jax_disable_most_optimizations"), compiler.get_compile_options
    default = {"xla_cpu_use_fusion_emitters": True, "xla_cpu_parallel_codegen_split_count": 32} if QUICKER else {}

    def default_options(*given: Any, env_options_overrides: dict[str, Any] | None = None, **more: Any) -> Any:
        return options(*given, env_options_overrides=default | (env_options_overrides or {}), **more)

    jax.clear_caches()
    jax.config.update("jax_disable_most_optimizations", False)
    compiler.get_compile_options = default_options
    try:
        yield
    finally:
        compiler.get_compile_options = options
        jax.config.update("jax_disable_most_optimizations", quick)
        jax.clear_caches()


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[None]:
    """Tests see one device, or all of them where they are marked `eight_devices`, and have optimized programs where they are marked so. When a group of tests ends, its programs go: those of all would be several GB."""
    global _spent
    _spent = _core_seconds()
    eight, optimized = (
        item.get_closest_marker("eight_devices"),
        item.get_closest_marker("optimized") or item.get_closest_marker("aot"),
    )
    jax.devices = _all_devices if eight else lambda *given: _all_devices(*given)[:1]
    try:
        with _optimized() if optimized else contextlib.nullcontext():
            return (yield)
    finally:
        jax.devices = _all_devices
        if nextitem is None or nextitem.get_closest_marker("xdist_group").args != item.get_closest_marker("xdist_group").args:
            jax.clear_caches()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The tests of a file stay together, as those of a family do (tests/families), so that what is made for one is there for the next."""
    for item in items:
        if not item.get_closest_marker("xdist_group"):
            item.add_marker(pytest.mark.xdist_group(item.nodeid.partition("::")[0]))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Each phase of a test is reported with the time that it took of all cores, that of its subprocesses too."""
    global _spent
    report = yield
    before, _spent = _spent, _core_seconds()
    report.family = item.callspec.id.partition("-")[0] if "family" in getattr(item, "fixturenames", ()) else None
    report.core_seconds = _spent - before
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The families that take longer than they may."""
    seconds: Counter[str] = Counter()
    for report in [report for reports in terminalreporter.stats.values() for report in reports]:
        if getattr(report, "family", None):
            seconds[report.family] += report.core_seconds
    slow = {family: spent for family, spent in seconds.most_common() if spent > SECONDS}
    if seconds:
        named = ", ".join(f"{family} {spent:.0f} s" for family, spent in slow.items()) or "none"
        terminalreporter.write_line(f"families that take more than {SECONDS} s of one core: {named}")


@pytest.fixture(scope="session")
def caption_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image folder as people keep them: `train` and `val`, each with eight pictures and a `metadata.jsonl`."""
    root = tmp_path_factory.mktemp("captions")
    random = np.random.default_rng(0)
    names = ("red", "green", "blue", "white", "black", "grey", "pink", "brown")
    for split in ("train", "val"):
        folder = root / split
        folder.mkdir()
        rows = []
        for index, name in enumerate(names):
            Image.fromarray(random.integers(0, 256, (20 + index, 24, 3), np.uint8)).save(folder / f"{index}.png")
            text = f'"a {name} picture"' if index % 2 else f'["a {name} picture", "something {name}"]'
            rows.append(f'{{"file_name": "{index}.png", "text": {text}}}\n')
        (folder / "metadata.jsonl").write_text("".join(rows))
    return root


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real data that is too large to be kept with the code: `JAXDL_TEST_DATA`, or a folder `shared` beside the checkout."""
    folder = Path(os.environ.get("JAXDL_TEST_DATA") or Path(__file__).parents[2] / "shared")
    if not (folder / "tfds").is_dir():
        pytest.skip(f"no test data in {folder}: set JAXDL_TEST_DATA")
    return folder

"""Whatever is in the files of a published model, it is read as transformers reads it, or one line says what is wrong: no other error."""

import copy
import functools
import json
import string
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from published_models import KINDS, call, publish
from safetensors.numpy import load_file, save, save_file

from jaxdl import pretrained
from jaxdl.errors import UserError
from jaxdl.models import clip, gemma, gpt2, marian, paligemma, siglip, vit
from jaxdl.pretrained.files import Tensors, family_of
from jaxdl.weights import convert

MODULES = {"clip": clip, "gpt2": gpt2, "marian": marian, "paligemma": paligemma, "siglip": siglip, "vit": vit}
SPECS = [
    gpt2._SETTINGS, vit._SETTINGS, marian._SETTINGS, clip._SETTINGS, clip._VISION, clip._TEXT, siglip.VISION, siglip._TEXT,
    paligemma._SETTINGS, *gemma.SETTINGS.values(),
]  # fmt: skip
NAMES = sorted({name for spec in SPECS for name in (*spec.fields, *spec.aliases, *spec.unused)})
VALUES = st.one_of(
    st.sampled_from([
        None, True, False, 0, 1, 2, 3, 4, 8, 16, 17, -1, 0.0, 0.5, 1.5, 1e-5, 10**30, float("inf"), float("nan"), "", "2", "gelu",
        "relu", "gelu_new", "quick_gelu", "gelu_pytorch_tanh", "swish", "tanh", [], {}, [1, 2], [8, 8], {"rope_type": "default"},
        {"rope_type": "linear", "factor": 2.0}, {"0": "a"}, ["full_attention", "full_attention"], {"rope_theta": 100.0},
    ]),
    st.integers(-4, 40), st.floats(), st.text(string.printable, max_size=9),
)  # fmt: skip


def draws(count: int) -> settings:
    """So many, always the same, and shown as they are: to make one smaller would take minutes."""
    phases = (Phase.explicit, Phase.generate)
    return settings(max_examples=count, deadline=None, derandomize=True, phases=phases, suppress_health_check=list(HealthCheck))


class Published:
    """The files of a small model, and transformers' own reading of them."""

    def __init__(self, name: str, folder: Path):
        publish(name, folder)
        self.name, self.folder, self.inputs = name, folder, KINDS[name][2]
        self.family = MODULES[name.split()[0]]
        self.config = json.loads((folder / "config.json").read_text())
        self.tensors = load_file(folder / "model.safetensors")
        self.kind = getattr(transformers, KINDS[name][0])
        self.state = self.kind.from_pretrained(folder).state_dict()
        self.module, self.params = pretrained.load(folder)
        self.shapes = jax.eval_shape(lambda: self.params)
        self.ours = functools.lru_cache(self._ours)

    def _ours(self, module: Any) -> np.ndarray:
        return np.asarray(module.apply({"params": self.params}, *map(jnp.asarray, self.inputs)).logits)

    def theirs(self, config: dict) -> np.ndarray | None:
        """Transformers' logits, if it builds such a model and the weights fit it."""
        try:
            model = self.kind(self.kind.config_class.from_dict(copy.deepcopy(config))).eval()
            state = {name: tensor for name, tensor in self.state.items() if "embed_positions" not in name}
            missing = model.load_state_dict(state, strict=False)
            if missing.unexpected_keys or any(
                "embed_positions" not in name and "head.probe" not in name for name in missing.missing_keys
            ):
                return None
            return call(self.name, model, self.inputs)
        except Exception:
            return None


@pytest.fixture(scope="module", params=KINDS)
def published(request, tmp_path_factory) -> Published:
    return Published(request.param, tmp_path_factory.mktemp("published"))


def one_line(error: UserError) -> None:
    assert "\n" not in str(error) and len(str(error)) < 1500, error


def parts_of(config: dict) -> list[str]:
    return ["", *(name for name in ("vision_config", "text_config") if name in config)]


def fuzzed_config(draw, config: dict) -> tuple[dict, list[str]]:
    """Some settings dropped, renamed, or with another value."""
    config, touched = copy.deepcopy(config), []
    for _ in range(draw(st.integers(1, 3))):
        where = draw(st.sampled_from(parts_of(config)))
        part = config[where] if where else config
        if not isinstance(part, dict):
            continue
        field = draw(st.sampled_from(sorted(part)) if part and draw(st.booleans()) else st.sampled_from(NAMES))
        how = draw(st.sampled_from(["drop", "rename", "value", "value", "value"]))
        touched.append(field)
        if how == "drop":
            part.pop(field, None)
        elif how == "rename" and field in part:
            part[draw(st.sampled_from([field + "s", field.upper(), field[:-1], f"{field}_dict", *NAMES[::9]]))] = part.pop(field)
        else:
            part[field] = copy.deepcopy(draw(VALUES))
    return config, touched


def check_configs(published: Published, count: int, modules: int) -> None:
    """Logits are those of so many different modules, which take the time."""
    read, compared, seen = [0], [0], {published.module}

    @draws(count)
    @given(st.data())
    def holds(data):
        config, _ = fuzzed_config(data.draw, published.config)
        config = json.loads(json.dumps(config))
        try:
            family = family_of(config, published.folder)
            assert family is published.family
            module, inputs = family.from_config(config)
            same = module == published.module or jax.tree.map(
                lambda leaf: leaf.shape, jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
            ) == jax.tree.map(lambda leaf: leaf.shape, published.shapes)
        except UserError as error:
            one_line(error)
            return
        read[0] += 1
        if same and (module in seen or len(seen) < modules) and (wanted := published.theirs(config)) is not None:
            compared[0] += 1
            seen.add(module)
            np.testing.assert_allclose(published.ours(module), wanted, rtol=2e-4, atol=2e-4, err_msg=str(config))

    holds()
    assert read[0] > count // 20 and compared[0] > count // 50


@pytest.mark.slow
def test_2000_files_of_settings_are_read_as_transformers_reads_them_or_refused(published):
    check_configs(published, 2000, modules=100)


def test_settings_are_read_as_transformers_reads_them_or_refused(published):
    check_configs(published, 100, modules=5)


DTYPES = [np.float16, ml_dtypes.bfloat16, np.float64, np.int8, np.uint8, np.int32, np.int64, np.bool_]


def fuzzed_tensor(draw, tensors: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], str]:
    """One tensor missing, too many, of another type, form or name; and whether what is read must be what was there ("same"), rounded, or nothing."""
    name = draw(st.sampled_from(sorted(tensors)))
    tensor, rest = tensors[name], {other: value for other, value in tensors.items() if other != name}
    how = draw(st.sampled_from(["drop", "rename", "type", "form", "more", "again"]))
    if how == "drop":
        return rest, "zero" if name == "final_logits_bias" else "refused"
    if how == "rename":
        return rest | {draw(st.sampled_from([f"{name}s", name[1:], f"x.{name}", name.upper()])): tensor}, "refused"
    if how == "type":
        dtype = np.dtype(draw(st.sampled_from(DTYPES)))
        return rest | {name: tensor.astype(dtype)}, "rounded" if dtype in DTYPES[:3] else "refused"
    if how == "form":
        forms = [tensor.shape[::-1], (tensor.size,), (1, *tensor.shape), (*tensor.shape, 1), (2, *tensor.shape), (0,), ()]
        form = tuple(draw(st.sampled_from(forms)))
        same = form == tensor.shape or (tensor.size == 1 and int(np.prod(form)) == 1 and name.startswith("logit_"))
        return rest | {name: np.resize(tensor, form) if tensor.size else tensor}, "same" if same else "refused"
    if how == "again":
        return tensors | {f"copy.{name}": tensor}, "refused"
    return tensors | {draw(st.text(string.ascii_letters + "._", min_size=1, max_size=20)) + "!": tensor}, "refused"


def check_tensors(published: Published, count: int) -> None:
    table = published.family.published(published.module)

    @draws(count)
    @given(st.data())
    def holds(data):
        tensors, expected = fuzzed_tensor(data.draw, published.tensors)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "model.safetensors"
            save_file({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, file)
            try:
                params = convert(Tensors([file]), table, published.shapes)
            except UserError as error:
                one_line(error)
                assert expected == "refused", error
                return
        assert expected != "refused"
        if expected != "zero":
            tolerance = 0 if expected == "same" else 0.01
            jax.tree.map(
                lambda a, b: np.testing.assert_allclose(np.float32(a), b, rtol=tolerance, atol=tolerance),
                params,
                published.params,
            )

    holds()


@pytest.mark.slow
def test_2000_files_of_tensors_are_read_or_refused(published):
    check_tensors(published, 2000)


def test_tensors_are_read_or_refused(published):
    check_tensors(published, 100)


@draws(200)
@given(st.data())
def test_broken_files_are_refused_in_one_line(data):
    """Bytes of headers, of JSON and of an index that are others, or not there."""
    tensors = {"a.weight": np.zeros((2, 3), np.float32), "b.bias": np.ones(4, np.float16)}
    kind = data.draw(st.sampled_from(["config.json", "model.safetensors", "model.safetensors.index.json"]))
    content = {
        "config.json": json.dumps({"model_type": "vit", "architectures": ["ViTModel"], "hidden_size": 8}).encode(),
        "model.safetensors": save(tensors),
        "model.safetensors.index.json": json.dumps({"weight_map": {"a.weight": "model-1.safetensors"}}).encode(),
    }
    raw = bytearray(content[kind])
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, max(0, len(raw) - 1)))
        how = data.draw(st.sampled_from(["set", "cut", "insert"]))
        if how == "set" and raw:
            raw[place] = data.draw(st.integers(0, 255))
        elif how == "cut":
            del raw[place:]
        else:
            raw[place:place] = data.draw(st.binary(max_size=5))
    with tempfile.TemporaryDirectory() as folder:
        for name in ("config.json", kind):
            (Path(folder) / name).write_bytes(content[name] if name != kind else bytes(raw))
        with pytest.raises(UserError) as error:
            pretrained.load(folder)
        one_line(error.value)


@pytest.mark.parametrize(
    "index",
    [None, [], {}, {"weight_map": None}, {"weight_map": []}, {"weight_map": {"a": 3}}, {"weight_map": {"a": "../b"}}, "[" * 9999],
)
def test_an_index_of_another_form_is_refused(tmp_path, index):
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    (tmp_path / "model.safetensors.index.json").write_text(index if isinstance(index, str) else json.dumps(index))
    with pytest.raises(UserError, match=r"index\.json"):
        pretrained.load(tmp_path)

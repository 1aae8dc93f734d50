"""What a `preprocessor_config.json` leaves out, and what it asks for, is as transformers' class of it has it, or is refused in a line."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

transformers = pytest.importorskip("transformers")
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from jaxdl.data.image import ImageProcessor
from jaxdl.errors import UserError

THEIRS = {"CLIP": CLIPImageProcessorPil, "Siglip": SiglipImageProcessorPil, "ViT": ViTImageProcessorPil}
SIZED = {"CLIP": dict(size=20, crop_size=16), "Siglip": dict(size={"height": 16, "width": 20}), "ViT": dict(size=16)}
IMAGE = np.random.default_rng(1).integers(0, 256, (45, 70, 3)).astype(np.uint8)


def write(directory: Path, config: Any, name: str = "preprocessor_config.json") -> Path:
    (directory / name).write_text(json.dumps(config))
    return directory


def theirs(kind: str, directory: Path, image: np.ndarray = IMAGE) -> np.ndarray:
    made = THEIRS[kind].from_pretrained(directory)(image, return_tensors="np", input_data_format="channels_last")
    return np.moveaxis(made["pixel_values"][0], 0, -1)


def equal(kind: str, directory: Path) -> None:
    np.testing.assert_allclose(ImageProcessor.from_pretrained(directory)(IMAGE), theirs(kind, directory), atol=2e-6)


@pytest.mark.parametrize("named", [("image_processor_type", "ImageProcessor"), ("image_processor_type", "ImageProcessorFast")])
@pytest.mark.parametrize("older", [("feature_extractor_type", "FeatureExtractor"), ("image_processor_type", "FeatureExtractor")])
@pytest.mark.parametrize("kind", THEIRS)
def test_what_is_left_out_has_the_default_of_the_class(kind, named, older, tmp_path):
    for field, end in (named, older):
        equal(kind, write(tmp_path, {field: kind + end}))
        equal(kind, write(tmp_path, {field: kind + end, **SIZED[kind]}))


@pytest.mark.parametrize(
    "kind, model_type",
    [("CLIP", "clip"), ("Siglip", "siglip"), ("Siglip", "paligemma"), ("Siglip", "siglip_vision_model"), ("ViT", "vit")],
)
def test_the_class_is_that_of_the_model_where_the_file_names_none(kind, model_type, tmp_path):
    write(tmp_path, {"model_type": model_type}, "config.json")
    equal(kind, write(tmp_path, SIZED[kind]))


@pytest.mark.parametrize(
    "kind, processor", [("CLIP", "CLIPProcessor"), ("Siglip", "SiglipProcessor"), ("Siglip", "PaliGemmaProcessor")]
)
def test_the_class_is_that_of_the_processor_where_nothing_else_names_one(kind, processor, tmp_path):
    equal(kind, write(tmp_path, {"processor_class": processor, **SIZED[kind]}))


@pytest.mark.parametrize("kind", THEIRS)
def test_a_processor_of_several_parts_goes_before_the_file_beside_it(kind, tmp_path):
    write(tmp_path, {"image_processor_type": f"{kind}ImageProcessor", "size": 3, "crop_size": 3})
    nested = {"image_processor_type": f"{kind}ImageProcessor", **SIZED[kind]}
    equal(kind, write(tmp_path, {"image_processor": nested, "processor_class": "AnyProcessor"}, "processor_config.json"))


FORMS = [
    *(("ViT", dict(size=size)) for size in (9, [9, 12], {"height": 9, "width": 12})),
    *(("Siglip", dict(size=size)) for size in ([9, 12], {"height": 9, "width": 12})),
    ("Siglip", dict(size=9, default_to_square=True)),
    *(
        ("CLIP", dict(size=size, crop_size=crop))
        for size in (12, {"shortest_edge": 12})
        for crop in (9, [9, 12], {"height": 9, "width": 7})
    ),
    ("CLIP", dict(size=12, crop_size=12, default_to_square=True)),
    ("CLIP", dict(size=[9, 12], do_center_crop=None)),
    ("CLIP", dict(size={"height": 9, "width": 12}, do_center_crop=False)),
    *(("ViT", dict(size=9, resample=number)) for number in range(6)),
    *((kind, dict(SIZED[kind], image_mean=0.3, image_std=0.2)) for kind in THEIRS),
    *((kind, dict(SIZED[kind], do_normalize=off, image_mean=None)) for kind in THEIRS for off in (False, None)),
    *((kind, dict(SIZED[kind], do_pad=False, pad_size=3, crop_pct=None, do_flip=False)) for kind in THEIRS),
]


@pytest.mark.parametrize("kind, config", FORMS)
def test_every_form_of_a_field_means_what_the_class_takes_it_for(kind, config, tmp_path):
    equal(kind, write(tmp_path, {"image_processor_type": f"{kind}ImageProcessor", **config}))


REFUSED = [
    ("ViT", dict(size=16, default_to_square=False), "default_to_square"),
    ("Siglip", dict(size=16), "size"),
    ("CLIP", dict(size=20, do_center_crop=None), "do_center_crop"),
    ("CLIP", dict(size=20, crop_size=None), "crop_size"),
    ("CLIP", dict(size=20, crop_size=24), "crop_size"),
    ("CLIP", dict(size=20, crop_size=16, default_to_square=True), "default_to_square"),
    ("CLIP", dict(size=20, crop_size=16, use_square_size=True), "use_square_size"),
    ("ViT", dict(size=16, do_center_crop=True, crop_size=12), "do_center_crop"),
    ("CLIP", dict(size={"shortest_edge": 20, "longest_edge": 30}), "size"),
    *(
        (kind, {**SIZED[kind], field: value}, field)
        for kind in THEIRS
        for field, value in dict(
            do_pad=True,
            do_flip=True,
            crop_pct=0.9,
            rescale_offset=True,
            do_convert_rgb=False,
            do_resize=None,
            do_rescale=False,
            rescale_factor=1 / 127.5,
            resample=None,
            max_size=16,
            image_mean=None,
            image_std=[0.5, 0.0, 0.5],
            image_processor_type="DeiTImageProcessor",
            feature_extractor_type=7,
        ).items()
        if field != "feature_extractor_type" or kind == "ViT"
    ),
]


@pytest.mark.parametrize("kind, config, field", REFUSED)
def test_what_no_image_processor_does_is_refused_by_its_name(kind, config, field, tmp_path):
    named = {} if "feature_extractor_type" in config else {"image_processor_type": f"{kind}ImageProcessor"}
    with pytest.raises(UserError, match=rf"preprocessor_config\.json.*{field}"):
        ImageProcessor.from_pretrained(write(tmp_path, {**named, **config}))


SOUND: dict[str, st.SearchStrategy[Any]] = dict(
    do_resize=st.just(True),
    do_rescale=st.just(True),
    rescale_factor=st.just(1 / 255),
    do_normalize=st.booleans(),
    do_center_crop=st.booleans(),
    do_convert_rgb=st.just(True),
    default_to_square=st.booleans(),
    resample=st.integers(0, 5),
    image_mean=st.floats(0, 1) | st.lists(st.floats(0, 1), min_size=3, max_size=3),
    image_std=st.floats(0.1, 1) | st.lists(st.floats(0.1, 1), min_size=3, max_size=3),
    size=st.integers(8, 12)
    | st.lists(st.integers(8, 12), min_size=2, max_size=2)
    | st.builds(lambda side: {"shortest_edge": side}, st.integers(8, 12)),
    crop_size=st.integers(3, 12)
    | st.builds(lambda high, wide: {"height": high, "width": wide}, st.integers(3, 8), st.integers(3, 8)),
)
numbers = st.integers() | st.floats() | st.sampled_from([0, -1, 10**12, 10**400, True])
WRONG = st.none() | st.text(max_size=5) | numbers | st.lists(numbers | st.none() | st.text(max_size=3), max_size=4)
WRONG |= st.dictionaries(
    st.sampled_from(["height", "width", "shortest_edge", "longest_edge", "x"]), numbers | st.none(), max_size=3
)


@st.composite
def configs(draw) -> tuple[dict[str, Any], set[str]]:
    """A file that is sound but for a few fields, and the names of these."""
    config = {name: draw(values) for name, values in SOUND.items() if draw(st.booleans())}
    changed = set()
    for name in draw(st.lists(st.sampled_from([*sorted(SOUND), "image_processor_type", "do_pad"]), max_size=2, unique=True)):
        fault = draw(st.sampled_from(["dropped", "renamed", "wrong"]))
        if fault == "wrong":
            config[name] = draw(WRONG)
        elif name in config:
            value = config.pop(name)
            if fault == "renamed":
                config[name + "s"] = value
        changed |= {name, name + "s"} if fault == "renamed" else {name}
    return config, changed


def holds_for_any_file(kind: str, directory: Path, count: int) -> None:
    write(directory, {"model_type": kind.lower()}, "config.json")  # Which names the class where the file has lost its name.

    @settings(max_examples=count, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(configs())
    def equals_or_is_refused(drawn):
        config, changed = drawn
        write(directory, {"image_processor_type": f"{kind}ImageProcessor", **config})
        try:
            ours = ImageProcessor.from_pretrained(directory)
        except UserError as error:
            assert "\n" not in str(error) and "preprocessor_config.json" in str(error)
            assert any(name in str(error) for name in {*config, *changed, *SOUND, "image_processor_type"}), str(error)
            return
        np.testing.assert_allclose(ours(IMAGE), theirs(kind, directory), atol=2e-5, rtol=1e-5)

    equals_or_is_refused()


@pytest.mark.parametrize("kind", THEIRS)
def test_any_file_means_what_transformers_takes_it_for_or_is_refused(kind, tmp_path):
    holds_for_any_file(kind, tmp_path, 100)


@pytest.mark.slow
@pytest.mark.parametrize("kind", THEIRS)
def test_any_of_many_files_means_what_transformers_takes_it_for_or_is_refused(kind, tmp_path):
    holds_for_any_file(kind, tmp_path, 2000)


@pytest.mark.parametrize("content", ["", "{", "[]", "7", "null", '"a"', "[" * 100_000, b"\xff\xfe"])
@pytest.mark.parametrize("name", ["preprocessor_config.json", "processor_config.json", "config.json"])
def test_a_file_that_is_no_object_is_named(name, content, tmp_path):
    write(tmp_path, dict(size=9))
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=rf"/{name}.*fetch it again") as error:
        ImageProcessor.from_pretrained(tmp_path)
    assert "\n" not in str(error.value)

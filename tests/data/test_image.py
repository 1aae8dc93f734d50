"""Images are read, and brought to a model's size and range."""

import io
import json
from unittest import mock

import chex
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from jaxdl.data import LABELLED_IMAGES
from jaxdl.data import image as images
from jaxdl.data.image import IMAGENET, ImageProcessor, decode
from jaxdl.errors import UserError
from jaxdl.models import clip

sides = st.integers(1, 40)
FIELDS = [{}, IMAGENET, dict(mean=(0.3, 0.6, 0.4), std=(0.2, 0.25, 0.3), resample="lanczos", resize_mode="crop")]
quick = settings(max_examples=50, deadline=None, derandomize=True)


def noise(height: int, width: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), np.uint8)


def encoded(picture: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def test_a_file_and_its_bytes_decode_to_the_pixels(tmp_path):
    image = noise(5, 7)
    (tmp_path / "image.png").write_bytes(encoded(Image.fromarray(image)))
    chex.assert_trees_all_equal(decode(tmp_path / "image.png"), image)
    chex.assert_trees_all_equal(decode((tmp_path / "image.png").read_bytes()), image)


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "1", "I;16"])
def test_every_mode_decodes_to_rgb(mode):
    picture = (
        Image.fromarray(noise(4, 6)).convert("L").convert(mode) if mode != "P" else Image.fromarray(noise(4, 6)).convert("P")
    )
    image = decode(encoded(picture, "TIFF" if mode == "CMYK" else "PNG"))
    assert image.shape == (4, 6, 3) and image.dtype == np.uint8


def test_a_palette_with_transparency_decodes_without_a_warning():
    picture = Image.fromarray(noise(4, 6)).convert("P")
    assert decode(encoded(picture, transparency=bytes(range(256)))).shape == (4, 6, 3)


@pytest.mark.parametrize("orientation, turned", [(1, lambda x: x), (3, lambda x: x[::-1, ::-1]), (6, lambda x: np.rot90(x, -1))])
def test_the_orientation_of_a_photograph_is_respected(orientation, turned):
    image, exif = noise(5, 7), Image.Exif()
    exif[0x0112] = orientation
    chex.assert_trees_all_equal(decode(encoded(Image.fromarray(image), exif=exif)), turned(image))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP"])
@pytest.mark.parametrize("fault", ["cut short", "no image", "empty"])
def test_a_broken_image_is_named(kind, fault, tmp_path):
    path, whole = tmp_path / "broken.image", encoded(Image.fromarray(noise(64, 64)), kind)
    path.write_bytes({"cut short": whole[: len(whole) // 2], "no image": b"hello" * 99, "empty": b""}[fault])
    for source in (path, path.read_bytes()):
        with pytest.raises(UserError, match=r"cannot be read as an image") as error:
            decode(source)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"broken\.image"):
        decode(path)


def test_a_missing_image_is_named(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.png does not exist"):
        decode(tmp_path / "nowhere.png")


@pytest.mark.parametrize("fields", FIELDS)
def test_a_pixel_is_standardised(fields):
    """(x / 255 − mean) / std, pixel by pixel."""
    image = noise(4, 4)
    processor = ImageProcessor.symmetric(4, **fields)
    expected = [[[(value / 255 - m) / s for value, m, s in zip(p, processor.mean, processor.std)] for p in row] for row in image]
    processed = processor(image)
    assert processed.dtype == np.float32
    chex.assert_trees_all_close(processed, np.float32(expected), atol=1e-6)


def test_symmetric_is_from_minus_one_to_one():
    processed = ImageProcessor.symmetric(16)(np.arange(256, dtype=np.uint8).reshape(16, 16, 1))
    assert processed.min() == -1 and processed.max() == 1 and processed.shape == (16, 16, 3)


@quick
@given(st.sampled_from(FIELDS), sides, sides, sides, sides, st.sampled_from([1, 3]))
def test_the_result_has_the_size_asked_for(fields, height, width, high, wide, channels):
    processor = ImageProcessor.symmetric((high, wide), **fields)
    chex.assert_shape(processor(noise(height, width, channels)), (high, wide, 3))


def test_a_grey_image_is_the_same_as_its_rgb_form():
    grey = noise(20, 30, 1)
    for fields in FIELDS:
        processor = ImageProcessor.symmetric(8, **fields)
        chex.assert_trees_all_equal(processor(grey), processor(grey.repeat(3, -1)))


@pytest.mark.parametrize("channels", [1, 3])
def test_a_training_set_comes_out_with_mean_0_and_deviation_1(channels):
    random = np.random.default_rng(0)
    levels = np.array([40, 90, 160])[:channels]
    images = [np.clip(random.normal(levels, 30, (9, 7, channels)), 0, 255).astype(np.uint8) for _ in range(20)]
    process = ImageProcessor.fit(iter(images), (9, 7))
    processed = np.stack([process(image) for image in images])
    chex.assert_shape(processed, (20, 9, 7, channels))
    chex.assert_trees_all_close(processed.mean((0, 1, 2)), np.zeros(channels, np.float32), atol=1e-6)
    chex.assert_trees_all_close(processed.std((0, 1, 2)), np.ones(channels, np.float32), atol=1e-5)
    chex.assert_trees_all_equal(process.unprocess(processed), np.stack(images))


def test_mean_and_deviation_are_those_of_what_the_model_sees():
    """Of images that are resized on the way, each counts as much as any other."""
    large, small = np.full((40, 40, 1), 200, np.uint8), np.full((4, 4, 1), 100, np.uint8)
    process = ImageProcessor.fit([large, small], 4, resample="box")
    assert process.mean == pytest.approx([150 / 255]) and process.std == pytest.approx([50 / 255])


def test_mnist_has_the_mean_and_deviation_that_everyone_uses(shared):
    """0.1307 and 0.3081: github.com/pytorch/examples, mnist/main.py."""
    source = LABELLED_IMAGES.open_part("tfds:mnist", "train", data_dir=f"{shared / 'tfds'}")
    process = ImageProcessor.fit((source[index].image for index in range(0, len(source), 10)), 28)
    assert process.mean == pytest.approx([0.1307], abs=1e-3) and process.std == pytest.approx([0.3081], abs=1e-3)


@quick
@given(sides, sides, st.sampled_from(["stretch", "crop"]))
def test_one_mean_keeps_a_grey_image_grey_and_equal_to_its_rgb_form(height, width, mode):
    grey, rgb = (ImageProcessor((8, 8), (0.3,) * n, (0.2,) * n, resize_mode=mode) for n in (1, 3))
    image = noise(height, width, 1)
    chex.assert_trees_all_equal(grey(image).repeat(3, -1), rgb(image))


def test_grey_and_coloured_images_are_not_mixed_up():
    grey = ImageProcessor((4, 4), (0.5,), (0.5,))
    with pytest.raises(UserError, match="a coloured image came to a processor for grey ones"):
        grey(noise(4, 4, 3))
    with pytest.raises(UserError, match="coloured image"):
        ImageProcessor.fit([noise(4, 4, 1), noise(4, 4, 3)], 4)
    mixed = ImageProcessor.fit([noise(4, 4, 3), noise(4, 4, 1)], 4)
    chex.assert_shape(mixed(noise(4, 4, 1)), (4, 4, 3))
    with pytest.raises(ValueError, match="one of each"):
        ImageProcessor((4, 4), (0.5,), (0.5, 0.5, 0.5))


def test_a_blank_training_set_has_a_deviation_above_0_and_an_empty_one_is_refused():
    process = ImageProcessor.fit([np.full((3, 3, 1), 7, np.uint8)] * 2, 3)
    assert process.std == (1 / 255,) and not process(np.full((3, 3, 1), 7, np.uint8)).any()
    with pytest.raises(UserError, match="empty"):
        ImageProcessor.fit([], 3)


def test_cropping_takes_the_centre_and_stretching_the_whole():
    image = np.zeros((10, 30, 3), np.uint8)
    image[:, 10:20] = 255
    crop = ImageProcessor.symmetric(10, resize_mode="crop")
    chex.assert_trees_all_equal(crop.resize(image), np.full((10, 10, 3), 255, np.uint8))
    assert ImageProcessor.symmetric(10).resize(image).mean() == pytest.approx(85, abs=1)


def test_shrinking_averages_rather_than_skips():
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    for resample in ("box", "bilinear", "bicubic", "lanczos"):
        resized = ImageProcessor.symmetric(8, resample=resample).resize(stripes)
        assert np.abs(resized[:, 1:-1].astype(int) - 127).max() <= 2


def test_an_image_of_the_right_size_is_not_resampled(monkeypatch):
    monkeypatch.setattr(Image, "fromarray", lambda *_: pytest.fail("PIL was called"))
    for fields in FIELDS:
        for size in ((32, 32), (8, 12), (12, 8)):
            chex.assert_trees_all_equal(ImageProcessor.symmetric(size, **fields).resize(noise(*size)), noise(*size))


@quick
@given(sides, sides, sides, sides)
def test_cropping_loses_no_more_than_the_aspect_ratio_asks_for(height, width, high, wide):
    """The picture is scaled until it covers the size, and no further: one side of it is shown whole."""
    scaled = []
    with mock.patch.object(
        images, "_resize", lambda picture, size, resample: scaled.append(size) or np.zeros((*size, 3), np.uint8)
    ):
        ImageProcessor.symmetric((high, wide), resize_mode="crop").resize(noise(height, width))
    ((up, across),) = scaled
    assert up >= high and across >= wide and (up == high or across == wide)


@quick
@given(st.sampled_from(FIELDS), st.integers(0, 2**32 - 1))
def test_unprocessing_gives_back_every_grey_level(fields, seed):
    image = np.random.default_rng(seed).integers(0, 256, (2, 8, 8, 3), np.uint8)
    processor = ImageProcessor.symmetric(8, **fields)
    chex.assert_trees_all_equal(processor.unprocess(np.stack([processor(one) for one in image])), image)


def test_unprocessing_clips_what_no_picture_shows():
    picture = ImageProcessor.symmetric(1).unprocess(np.array([[[-9.0, 0.5, 9.0]]]))
    assert picture.tolist() == [[[0, 191, 255]]]


def test_a_crop_larger_than_the_scaled_image_is_refused():
    with pytest.raises(ValueError, match="shorter side of 200"):
        ImageProcessor.symmetric(224, resize_mode="crop", shorter_side=200)


BAD_IMAGES = {
    "of floats": (np.zeros((4, 4, 3), np.float32), "float32"),
    "of int64": (np.zeros((4, 4, 3), np.int64), "int64"),
    "of booleans": (np.zeros((4, 4, 3), bool), "bool"),
    "without channels": (np.zeros((4, 4), np.uint8), r"\(4, 4\)"),
    "channels first": (np.zeros((3, 4, 5), np.uint8), r"\(3, 4, 5\)"),
    "of four channels": (np.zeros((4, 4, 4), np.uint8), r"\(4, 4, 4\)"),
    "of two channels": (np.zeros((4, 4, 2), np.uint8), r"\(4, 4, 2\)"),
    "a batch": (np.zeros((1, 4, 4, 3), np.uint8), r"\(1, 4, 4, 3\)"),
    "empty": (np.zeros((0, 4, 3), np.uint8), r"\(0, 4, 3\)"),
    "of no channels": (np.zeros((4, 4, 0), np.uint8), r"\(4, 4, 0\)"),
    "a scalar": (np.uint8(3), "uint8"),
    "a list": ([[[0, 0, 0]]], "list"),
    "of PIL": (Image.new("RGB", (3, 3)), "Image"),
    "none": (None, "NoneType"),
}


@pytest.mark.parametrize("image, message", BAD_IMAGES.values(), ids=BAD_IMAGES)
@pytest.mark.parametrize("fields", FIELDS)
def test_what_is_no_image_is_refused(fields, image, message):
    process = ImageProcessor.symmetric(8, **fields)
    for use in (process, process.resize, lambda given: ImageProcessor.fit([given], 8, **fields)):
        with pytest.raises(UserError, match=message) as error:
            use(image)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("fields", FIELDS)
@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (3000, 1)])
def test_an_image_of_any_shape_comes_out_with_the_size(fields, size):
    chex.assert_shape(ImageProcessor.symmetric((8, 6), **fields)(noise(*size)), (8, 6, 3))


def test_an_image_that_memory_would_not_hold_is_refused():
    with pytest.raises(UserError, match="1×3000000"):
        ImageProcessor.symmetric(224, resize_mode="crop")(np.zeros((1, 3_000_000, 3), np.uint8))


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(size=(0, 8)), "size"),
        (dict(size=(8, -1)), "size"),
        (dict(size=(8, 10**9)), "size"),
        (dict(size=(True, 8)), "size"),
        (dict(std=(0.5, 0.0, 0.5)), "deviations"),
        (dict(std=(0.5, -0.5, 0.5)), "deviations"),
        (dict(std=(0.5, float("nan"), 0.5)), "std"),
        (dict(mean=(0.5, float("inf"), 0.5)), "mean"),
        (dict(mean=(0.5, 0.5)), "means"),
        (dict(mean=(), std=()), "means"),
        (dict(mean=(0.5,) * 4, std=(0.5,) * 4), "means"),
        (dict(resample="bicubik"), "did you mean 'bicubic'"),
        (dict(resize_mode="cropp"), "did you mean 'crop'"),
        (dict(resize_mode="crop", shorter_side=0), "shorter_side"),
        (dict(resize_mode="crop", shorter_side=4), "shorter side of 4"),
    ],
)
def test_fields_that_make_no_processor_are_refused(fields, message):
    with pytest.raises(UserError, match=message) as error:
        ImageProcessor(**{**dict(size=(8, 8), mean=(0.5,) * 3, std=(0.5,) * 3), **fields})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("width", range(16, 32))
def test_the_crop_begins_where_transformers_lets_it_begin(width):
    """torchvision's, which OpenAI's code calls, begins at int(round((width − size) / 2)), one pixel later where 3 of 4 are left over."""
    image = np.zeros((16, width, 3), np.uint8) + np.arange(width, dtype=np.uint8)[:, None]
    begins = clip.image_processor(16).resize(image)[0, 0, 0]
    assert begins == (width - 16) // 2 == round((width - 16) / 2) - (width % 4 == 3)


def test_older_and_newer_configurations_are_read(tmp_path):
    config = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": 40, "crop_size": 32, "do_center_crop": True}
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": config}))
    expected = ImageProcessor.symmetric(32, resize_mode="crop", shorter_side=40)
    assert ImageProcessor.from_pretrained(tmp_path) == expected
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))
    assert ImageProcessor.from_pretrained(tmp_path) == expected


resamples = st.sampled_from(["nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"])


@quick
@given(sides, sides, st.sampled_from([1, 3]), resamples, st.sampled_from(["stretch", "crop"]), st.integers(0, 9) | st.none())
def test_what_is_written_down_is_read_as_the_same_processor(tmp_path_factory, high, wide, channels, resample, mode, beyond):
    shorter = None if beyond is None or mode == "stretch" else max(high, wide) + beyond
    process = ImageProcessor((high, wide), (0.1,) * channels, (0.7,) * channels, resample, mode, shorter)
    if mode == "crop" and shorter is None and high != wide:
        with pytest.raises(UserError, match="shorter_side"):
            process.to_config()
    else:
        directory = tmp_path_factory.mktemp("processor")
        (directory / "preprocessor_config.json").write_text(json.dumps(process.to_config()))
        assert ImageProcessor.from_pretrained(directory) == process


def test_a_directory_without_a_configuration_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"no preprocessor_config\.json"):
        ImageProcessor.from_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(UserError, match="fetch it again"):
        ImageProcessor.from_pretrained(tmp_path)

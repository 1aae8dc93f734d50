"""What a published `preprocessor_config.json` says of images, and what the code of its class adds where it says nothing."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxdl.errors import UserError
from jaxdl.files import read_json, refused

RESAMPLES = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")
"""The filters of PIL, in the order of their numbers."""

LARGEST_SIDE = 2**14
"""Of an image in pixels: beyond it, memory ends before the model begins."""
SMALLEST_STD = 1e-6
"""Of a channel, from 0 to 1: one that is divided by less has no digits left."""

_STEPS = dict(do_resize=True, do_rescale=True, rescale_factor=1 / 255, do_normalize=True, do_center_crop=None, crop_size=None)
_STEPS |= dict(do_convert_rgb=None, do_pad=None, pad_size=None, default_to_square=True)
_PUBLISHED = read_json(Path(__file__).with_name("image_processors.json"))
CLASSES: dict[str, dict[str, Any]] = {name: _STEPS | changes for name, changes in _PUBLISHED["classes"].items()}
"""The classes of transformers that are read here, with what each does where its file says nothing (transformers 5, `models/*/image_processing_*.py`)."""
_OF_MODEL: dict[str, str] = _PUBLISHED["class_of_model_type"]
"""The class by the `model_type` of `config.json`, or by the beginning of `processor_class`, where the file names none itself."""
_THAT_CROPS = next(name for name, config in CLASSES.items() if config["do_center_crop"])

_OF_NO_ACCOUNT = (
    *("image_processor_type", "feature_extractor_type", "processor_class", "auto_map", "_valid_processor_keys"),
    *("data_format", "input_data_format", "return_tensors", "device", "disable_grouping", "image_seq_length"),
    *("transformers_version", "_name_or_path", "_auto_class"),
)
"""What such files hold that changes no pixel."""


def read_fields(directory: Path) -> tuple[Path, dict[str, Any]]:
    """The file that describes a model's images, and what it says as fields of `ImageProcessor`.

    What it leaves out has the default of its class; a null is no omission, it switches off, as in transformers. Where nothing names a class, size, mean and deviation have to be there, and the filter is bicubic. Raises `UserError`, naming file and field, where there is none, its class is not read here, or it asks for what no `ImageProcessor` does.
    """
    path, config = _described(directory)
    kind = _class(config, path)
    if unknown := [name for name, value in config.items() if not (name in _known() or value in (None, False))]:
        raise refused(path, unknown[0], config[unknown[0]], "is not known here: leave it out if it changes nothing")
    if kind is None and (left_out := [name for name in ("size", "image_mean", "image_std") if name not in config]):
        reason = f"leaves out {left_out[0]!r}, and names no image_processor_type whose default would hold"
        raise UserError(f"{path} {reason}: add one of {', '.join(CLASSES)}, or give `mean` and `std` yourself")
    return path, _fields({**(CLASSES[kind] if kind else _STEPS | dict(resample=3)), **config}, path)


def _known() -> set[str]:
    return {*CLASSES[_THAT_CROPS], *_OF_NO_ACCOUNT}


def _described(directory: Path) -> tuple[Path, dict[str, Any]]:
    """Transformers saves processors of several parts in one file, which goes before the others that may lie beside it."""
    path = directory / "processor_config.json"
    if path.is_file() and (nested := read_json(path).get("image_processor")) is not None:
        if not isinstance(nested, dict):
            raise refused(path, "image_processor", nested, "is no JSON object")
        return path, nested
    if (path := directory / "preprocessor_config.json").is_file():
        return path, read_json(path)
    raise UserError(
        f"{directory} holds no preprocessor_config.json: give a published model's directory, or `mean` and `std` yourself"
    )


def _class(config: dict[str, Any], path: Path) -> str | None:
    """The class that the file names, or its model has. Only one of them crops, so that its file may go without a name."""
    for field in ("image_processor_type", "feature_extractor_type"):
        if (named := config.get(field)) is not None:
            name = named if isinstance(named, str) else ""
            name = name.removesuffix("Fast").removesuffix("Pil").replace("FeatureExtractor", "ImageProcessor")
            if name not in CLASSES:
                raise refused(path, field, named, f"is not read here: those of {', '.join(CLASSES)} are")
            return name
    model = path.parent / "config.json"
    family = str(read_json(model).get("model_type")).removesuffix("_vision_model") if model.is_file() else ""
    processor = str(config.get("processor_class")).removesuffix("Processor").lower()
    found = _OF_MODEL.get(family, _OF_MODEL.get(processor))
    return found or (_THAT_CROPS if config.get("do_center_crop") else None)


def _fields(config: dict[str, Any], path: Path) -> dict[str, Any]:
    flags = ("do_resize", "do_rescale", "do_normalize", "do_center_crop", "do_convert_rgb", "do_pad", "default_to_square")
    for flag in flags:
        if not (config[flag] is None or isinstance(config[flag], bool)):
            raise refused(path, flag, config[flag], "is neither true nor false")
    for step in ("do_resize", "do_rescale"):
        if not config[step]:
            raise refused(path, step, config[step], "is off, and is always done here")
    if config["do_pad"]:
        raise refused(path, "do_pad", True, "is not done here")
    factor = config["rescale_factor"]
    if not _is_number(factor) or not math.isclose(factor, 1 / 255):
        raise refused(path, "rescale_factor", factor, "is not 1/255")
    resample = config["resample"]
    if type(resample) is not int or not 0 <= resample < len(RESAMPLES):
        filters = ", ".join(f"{number} ({name})" for number, name in enumerate(RESAMPLES))
        raise refused(path, "resample", resample, f"is no filter of PIL: give one of {filters}")
    grey = config["do_convert_rgb"] is False
    mean, std = (_channels(config, field, grey, path) for field in ("image_mean", "image_std"))
    if len(mean) != len(std):
        raise refused(path, "image_std", config["image_std"], f"has not as many numbers as image_mean, {config['image_mean']}")
    if grey and len(mean) == 3:
        raise refused(path, "do_convert_rgb", False, "with three means is not done here: images become RGB")
    return dict(mean=mean, std=std, resample=RESAMPLES[resample], **_sizes(config, path))


def _sizes(config: dict[str, Any], path: Path) -> dict[str, Any]:
    size = _size(config, "size", bool(config["default_to_square"]), path)
    for unused in ("crop_size", "pad_size"):  # Transformers refuses nonsense there too.
        if config[unused] is not None:
            _size(config, unused, True, path)
    if not config["do_center_crop"]:
        if len(size) == 1:
            reason = "fixes the shorter side alone (default_to_square is off): give height and width, or a do_center_crop"
            raise refused(path, "size", config["size"], reason)
        return dict(size=size, resize_mode="stretch")
    crop = _size(config, "crop_size", True, path)
    if size == crop:  # The crop leaves all there is.
        return dict(size=size, resize_mode="stretch")
    if len(size) == 2:
        reason = "is stretched to (default_to_square is on) before do_center_crop to another crop_size: give shortest_edge"
        raise refused(path, "size", config["size"], reason)
    if size[0] < max(crop):
        raise refused(path, "size", config["size"], f"is smaller than crop_size, {config['crop_size']}")
    return dict(size=crop, resize_mode="crop", shorter_side=size[0])


def _size(config: dict[str, Any], field: str, square: bool, path: Path) -> tuple[int, ...]:
    """Height and width, or the shorter side alone, of a size as any version of transformers has written it."""
    given = config[field]
    if isinstance(given, dict) and {*given} == {"height", "width"}:
        sides = (given["height"], given["width"])
    elif isinstance(given, dict) and {*given} == {"shortest_edge"} and field == "size":
        sides = (given["shortest_edge"],)
    elif isinstance(given, Sequence) and len(given) == 2:
        sides = tuple(given)
    elif type(given) is int:
        sides = (given, given) if square else (given,)
    else:
        raise refused(path, field, given, "is neither height and width nor a side")
    if not all(type(side) is int and 0 < side <= LARGEST_SIDE for side in sides):
        raise refused(path, field, given, f"is not from 1 to {LARGEST_SIDE} pixels")
    return sides


def _channels(config: dict[str, Any], field: str, grey: bool, path: Path) -> tuple[float, ...]:
    """Mean or deviation of each channel, of which one number may stand for all. Where nothing is normalised, those that change nothing."""
    if not config["do_normalize"]:
        return ({"image_mean": 0.0, "image_std": 1.0}[field],) * 3
    given = config[field]
    values = [given] * 3 if _is_number(given) else given
    if not isinstance(values, list) or len(values) not in ((1, 3) if grey else (3,)) or not all(map(_is_number, values)):
        raise refused(path, field, given, "is not three numbers")
    if field == "image_std" and min(values) < SMALLEST_STD:
        raise refused(path, field, given, "is not above 0")
    return tuple(values)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= 1e6  # A NaN is not.

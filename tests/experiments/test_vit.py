"""The ViT experiment: it mixes and distorts, fine-tunes published weights, and says what it looked at."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from published_siglip import write_published_siglip

from experiments import vit
from experiments.vit import EXPERIMENT, PRESETS, Config
from jaxdl import figures, launch, pretrained
from jaxdl.data import LABELLED_IMAGES, LabelledImage, Source
from jaxdl.data.augment import cutmix, mixup
from jaxdl.data.sources import Info
from jaxdl.errors import UserError
from jaxdl.models.vit import VARIANTS, ViT
from jaxdl.nn import interpolate_positions
from jaxdl.training import Execution, TrainState

TINY = dict(
    data="builtin:digits",
    steps=2,
    batch_size=4,
    patch_size=4,
    width=16,
    depth=1,
    num_heads=2,
    evaluate_every=2,
    optimizer="adamw",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    """Three classes of coloured pictures."""
    root, random = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for split in ("train", "test"):
        for name in ("red", "green", "blue"):
            (root / split / name).mkdir(parents=True)
            for index in range(3):
                Image.fromarray(random.integers(0, 256, (8, 12, 3), np.uint8)).save(root / split / name / f"{index}.png")
    return f"folder:{root}"


def main(config: Config, directory: Path, execution: Execution = Execution()) -> dict:
    return launch.run(EXPERIMENT, config, directory, execution)


@pytest.mark.parametrize(
    "how",
    [
        dict(pool="map", attention="flash", scan_layers=True, optimizer="muon", mixup=0.2, cutmix=1.0, label_smoothing=0.1),
        dict(
            pool="mean", positions="sincos", stochastic_depth=0.1, dropout=0.1, remat=True, precision="bf16", ema_decay=0.9,
            resolution=12, augment=("crop", "flip", "randaugment"),
        ),
    ],
)  # fmt: skip
def test_it_runs_with_other_settings(tmp_path, folder, how):
    result = main(Config(**TINY | dict(data=folder) | how), tmp_path)
    assert 0 <= result["metrics"]["test_accuracy"] <= 1
    assert (tmp_path / "figures" / "attention_rollout.png").is_file()


def test_a_new_head_costs_what_a_guess_costs_and_smoothing_takes_its_share():
    """The head starts from zeros: each class is as likely, whatever the targets are. What is surely right costs what smoothing says."""
    module = ViT(4, 16, 1, 2, num_classes=10)
    images, target = (
        jnp.asarray(np.random.default_rng(0).standard_normal((2, 8, 8, 1), np.float32)),
        jnp.eye(10)[jnp.array([3, 7])],
    )
    params = module.init(jax.random.key(0), images)["params"]
    batch = {"image": images, "target": target}
    cost = lambda smoothing, params: vit.objective(
        module, smoothing, params, TrainState(0, params, {}, {}, None), batch, jax.random.key(0)
    )[0]
    np.testing.assert_allclose([cost(0.0, params), cost(0.3, params)], np.log(10), rtol=1e-5)
    sure = params | {"head": {"kernel": jnp.zeros((16, 10)), "bias": jnp.zeros(10).at[3].set(20.0)}}
    one, other = (-np.log(np.exp(20.0) / (np.exp(20.0) + 9)), 20.0)  # Of the picture that is a three, and of the other.
    spread = (0.1 * one + 0.9 * (20 + one)) * 0.3
    np.testing.assert_allclose(cost(0.0, sure), (one + other) / 2, rtol=1e-4)
    np.testing.assert_allclose(cost(0.3, sure), 0.7 * (one + other) / 2 + spread, rtol=1e-4)


@pytest.mark.parametrize("mixes", [(mixup,), (cutmix,), (mixup, cutmix)])
def test_targets_are_mixed_as_their_pictures_are(mixes):
    """Every picture is as bright as its class says, so that the mixture's brightness says what its target must be."""

    class Plain(Source):
        info = Info(classes=("zero", "one", "two", "three"))

        def __len__(self) -> int:
            return 4

        def __getitem__(self, index: int) -> LabelledImage:
            return LabelledImage(np.full((8, 8, 1), 60 * index, np.uint8), index)

    source = Plain()
    process = vit.ImageProcessor((8, 8), (0.0,), (60 / 255,))  # Brightness becomes the number of the class.
    several = 0
    for seed in range(40):
        given = source[seed % 4]
        made = [
            vit.row(given, np.random.default_rng(seed), source=source, augment=[], process=process, mixes=mixes) for _ in range(2)
        ]
        np.testing.assert_array_equal(made[0]["image"], made[1]["image"])
        target = made[0]["target"]
        assert np.isclose(target.sum(), 1) and target.dtype == np.float32
        np.testing.assert_allclose(made[0]["image"].mean(), target @ np.arange(4), atol=1e-4)
        several += np.count_nonzero(target) > 1
    assert several > 10
    plain = vit.row(source[2], np.random.default_rng(0), source=source, augment=[], process=process, mixes=[])
    np.testing.assert_array_equal(plain["target"], [0, 0, 1, 0])


def test_the_papers_presets_make_the_papers_models():
    class ImageNet(Source):
        info = Info(classes=tuple(map(str, range(1000))))

        def __len__(self) -> int:
            return 2

        def __getitem__(self, index: int) -> LabelledImage:
            return LabelledImage(np.random.default_rng(index).integers(0, 256, (300, 250, 3), np.uint8), index)

    for preset, variant in (("s16", "S/16"), ("b16", "B/16")):
        module, params, process = vit.build(PRESETS[preset], ImageNet())
        row = dataclasses.asdict(VARIANTS[variant])
        assert row.items() <= {name: getattr(module, name) for name in row}.items()
        assert (module.pool, module.positions, module.num_classes, params) == ("mean", "sincos", 1000, None)
        assert process.size == (224, 224) and process.resize_mode == "crop"
        assert np.isclose(PRESETS[preset].schedule()(10_000), 1e-3, rtol=1e-3)


def test_published_weights_are_fine_tuned_at_another_resolution_for_other_classes(tmp_path, folder):
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=12, patch_size=4, num_labels=5
    )  # fmt: skip
    weights = tmp_path / "published"
    transformers.ViTForImageClassification(config).save_pretrained(weights)
    (weights / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": {"height": 12, "width": 12}, "resample": 2})
    )
    settings = Config(**TINY | dict(data=folder), init=str(weights), resolution=20, scan_layers=True, stochastic_depth=0.2)
    source, _ = LABELLED_IMAGES.open(folder)
    module, params, process = vit.build(dataclasses.replace(settings, scan_layers=False), source)
    published = pretrained.load(weights)[1]
    jax.tree.map(np.testing.assert_array_equal, params["encoder"], published["encoder"])
    moved = interpolate_positions(published["positions"]["table"], (3, 3), (5, 5))
    np.testing.assert_array_equal(params["positions"]["table"], moved)
    assert (module.num_classes, module.stochastic_depth) == (3, 0.2) and not params["head"]["kernel"].any()
    assert process.size == (20, 20) and process(source[0].image).shape == (20, 20, 3)
    assert vit.build(dataclasses.replace(settings, resolution=0), source)[2].size == (12, 12)

    result = main(settings, tmp_path / "run", Execution(log_every=1))
    assert 0 <= result["metrics"]["test_accuracy"] <= 1
    rows = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    first = next(row["loss"] for row in rows if "loss" in row)
    assert np.isclose(first, np.log(3), rtol=1e-3)  # The new head knows nothing yet.


def test_rollout_sums_over_all_ways_through_the_blocks():
    """Of two blocks: each place either stays where it is or is fetched from another one, with a half each."""
    random = np.random.default_rng(0)
    weights = random.random((2, 3, 4, 5, 5))
    weights /= weights.sum(-1, keepdims=True)
    found = figures.attention_rollout(weights)
    first, second = weights.mean(2)
    for picture in range(3):
        for top in range(5):
            for bottom in range(5):
                ways = 0.0
                for middle in range(5):
                    above = (second[picture, top, middle] + (top == middle)) / 2
                    below = (first[picture, middle, bottom] + (middle == bottom)) / 2
                    ways += above * below
                assert np.isclose(found[picture, top, bottom], ways)
    np.testing.assert_allclose(found.sum(-1), 1)


@pytest.mark.parametrize(("pool", "share"), [("class", 1.0), ("mean", (5 * 3 / 4 + 1) / 6), ("map", 1.0)])
def test_what_is_looked_at_is_where_all_attention_goes(pool, share):
    """Every query of both blocks looks at the fifth place, so that a quarter of each place stays there and the rest is the fifth's."""
    module = ViT(patch_size=4, width=16, depth=2, num_heads=2, num_classes=3, pool=pool, scan=pool == "mean")
    image = np.zeros((1, 8, 12, 1), np.float32)
    seen = np.random.default_rng(0).standard_normal(16)
    seen = (seen - seen.mean()) / seen.std()

    def made(path: tuple, leaf: jax.Array) -> jax.Array:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name == "positions/table":
            return jnp.zeros_like(leaf).at[-2].set(seen)
        if name.endswith("scale"):
            return jnp.ones_like(leaf)
        if name.endswith("key/kernel"):
            return jnp.broadcast_to(jnp.eye(16), leaf.shape)
        return jnp.broadcast_to(10 * seen, leaf.shape) if name.endswith("query/bias") else jnp.zeros_like(leaf)

    params = module.init(jax.random.key(0), jnp.asarray(image))["params"]
    shares = vit.looks(module, jax.tree_util.tree_map_with_path(made, params), image)
    wanted = np.full((1, 2, 3), (1 - share) / 5)
    wanted[0, 1, 1] = share
    np.testing.assert_allclose(shares, wanted, atol=1e-5)


def test_rollout_holds_the_weights_of_one_picture_at_a_time(monkeypatch):
    module = ViT(patch_size=4, width=8, depth=2, num_heads=2, num_classes=3)
    images = np.random.default_rng(0).standard_normal((3, 8, 8, 1), np.float32)
    params = module.init(jax.random.key(0), jnp.asarray(images[:1]))["params"]
    counts = []
    weights = vit.attention_weights
    monkeypatch.setattr(vit, "attention_weights", lambda *given: counts.append(len(given[2])) or weights(*given))
    assert vit.looks(module, params, images).shape == (3, 2, 2) and counts == [1, 1, 1]


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (dict(patch_size=3), "8×8 cannot be cut into patches of 3"),
        (dict(num_heads=3), "cannot be split into 3 heads"),
        (dict(init="/nowhere"), "there is no directory /nowhere"),
        (dict(mixup=-1.0), "--mixup"),
    ],
)
def test_bad_input_is_refused(tmp_path, how, message):
    with pytest.raises(UserError, match=message):
        main(Config(**TINY | how), tmp_path / "run")


def test_weights_of_another_family_are_refused(tmp_path):
    write_published_siglip(tmp_path)
    with pytest.raises(UserError, match="those of a SigLIP: give those of a ViT"):
        main(Config(init=str(tmp_path), **TINY), tmp_path / "run")

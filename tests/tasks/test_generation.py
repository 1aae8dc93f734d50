"""Generation: what the numbers say of models that are known: of one that draws unseen images, of one that copies, of noise, and of one that draws a single class."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.spatial
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxdl import launch
from jaxdl.data import LABELLED_IMAGES, Subset
from jaxdl.data.image import ImageProcessor
from jaxdl.errors import UserError
from jaxdl.tasks.generation import ImageGeneration, draw_interpolations, interpolate, nearest, train_judge
from jaxdl.training import Aux, Run, configured, setup_training, train

PROCESS = ImageProcessor((8, 8), (0.5,), (0.5,))
CONFIG = launch.Config(data="builtin:digits", steps=2)
KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def digits():
    """Four quarters: to train a judge on, real ones to compare with, others that an ideal model draws, those that a model has learned from. And the held-out ones."""
    source, held_out = LABELLED_IMAGES.open("builtin:digits")
    return *(Subset(source, range(first, len(source), 4)) for first in range(4)), held_out


@pytest.fixture(scope="module")
def judge(digits):
    return train_judge(digits[0], digits[4], steps=200)


@pytest.fixture
def run(tmp_path):
    with Run.open(tmp_path, "generator", CONFIG) as opened:
        yield opened


def table(source) -> dict:
    """A model that draws one of these images."""
    images = np.stack([PROCESS(example.image) for example in source])
    return {"params": {"images": images, "labels": np.array([example.label for example in source], np.int32)}}


def draw(variables, keys):
    images = variables["params"]["images"]
    return jax.vmap(lambda key: images[jax.random.randint(key, (), 0, len(images))])(keys)


def draw_as_asked(variables, keys, label):
    params = variables["params"]
    pick = lambda key, label: params["images"][jax.random.categorical(key, jnp.where(params["labels"] == label, 0, -jnp.inf))]
    return jax.vmap(pick)(keys, label)


def generation(run, digits, judge, sample=draw, **options) -> ImageGeneration:
    return ImageGeneration(run, sample, digits[1], judge.features, PROCESS, learned=digits[3], judge=judge, **options)


def test_the_judge_knows_digits_and_is_the_same_each_time(digits, judge):
    assert judge.accuracy > 0.9 and len(judge.classes) == 10
    images = np.stack([example.image for example in digits[4]])
    probabilities, features = judge.probabilities(images), judge.features(images)
    np.testing.assert_allclose(probabilities.sum(1), 1, atol=1e-5)
    assert (probabilities.argmax(1) == [example.label for example in digits[4]]).mean() == pytest.approx(judge.accuracy)
    # Logits are a linear function of the features: as many images as there are features would fit anything.
    logits = np.log(probabilities[:, 1:]) - np.log(probabilities[:, :1])
    inputs = np.column_stack([features, np.ones(len(features))])
    assert features.min() == 0 and len(features) > 2 * inputs.shape[1]
    weights, *_ = np.linalg.lstsq(inputs, logits, rcond=None)
    assert np.abs(inputs @ weights - logits).max() < 0.01 * logits.std()
    few = Subset(digits[0], range(64))
    one, again, other = (train_judge(few, few, steps=3, seed=seed).features(images[:4]) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, again)
    assert np.abs(one - other).max() > 0.01


def test_an_ideal_model_is_at_the_bounds_and_does_not_copy(run, digits, judge):
    watched = generation(run, digits, judge)
    found = watched.evaluate(table(digits[2]), KEY)
    assert watched.count == len(digits[1]) // 2
    assert found["frechet_distance"] < 2.5 * found["real_frechet_distance"]
    assert abs(found["kernel_distance"]) < 0.1 * abs(generation(run, digits, judge).evaluate(noise(), KEY)["kernel_distance"])
    for name in ("precision", "recall", "inception_score"):
        assert found[name] == pytest.approx(found[f"real_{name}"], abs=0.12, rel=0.1)
    assert found["class_histogram_distance"] < 0.25 and found["copies"] < 0.06 and not {"as_asked", "real_as_asked"} & set(found)


def noise() -> dict:
    images = np.random.default_rng(0).uniform(-1, 1, (200, 8, 8, 1)).astype(np.float32)
    return {"params": {"images": images}}


def test_noise_is_far_from_real_images(run, digits, judge):
    found = generation(run, digits, judge).evaluate(noise(), KEY)
    assert found["frechet_distance"] > 10 * found["real_frechet_distance"]
    assert found["recall"] < 0.1 < 0.7 < found["real_recall"] and found["copies"] == 0


def test_a_model_that_copies_is_found_out_by_its_neighbours_only(run, digits, judge):
    watched = generation(run, digits, judge)
    found = watched.evaluate(table(digits[3]), KEY)
    assert found["frechet_distance"] < 2.5 * found["real_frechet_distance"] and found["copies"] == 1
    shown = watched.show(table(digits[3]), KEY)
    assert set(shown) == {"samples", "class_histogram", "neighbours"} and None not in shown.values()


def test_a_model_of_one_class_lacks_the_others(run, digits, judge):
    zeros = digits[2].where(lambda example: example.label == 0, "")
    found = generation(run, digits, judge).evaluate(table(zeros), KEY)
    assert found["class_histogram_distance"] > 0.8 and found["inception_score"] < 1.5 < 6 < found["real_inception_score"]
    assert found["recall"] < 0.3 < 0.7 < found["real_recall"]


def test_of_conditional_samples_it_is_told_how_many_are_as_asked(run, digits, judge):
    conditions = lambda example: {"label": np.int32(example.label)}
    told = lambda sample: generation(run, digits, judge, sample, conditions=conditions).evaluate(table(digits[2]), KEY)
    obedient = told(draw_as_asked)
    assert obedient["as_asked"] > 0.9 and obedient["real_as_asked"] > 0.9
    deaf = told(lambda variables, keys, label: draw(variables, keys))
    assert deaf["as_asked"] < 0.25


def test_numbers_and_pictures_come_out_of_a_run(run, digits):
    """By features of one's choice: pixels, without a judge."""
    features = lambda images: images.reshape(len(images), -1).astype(np.float32)
    watched = ImageGeneration(run, draw, digits[1], features, PROCESS, learned=digits[3], count=20)
    objective = lambda params, state, batch, key: ((params["images"] ** 2).mean(), Aux())
    update = configured(CONFIG, objective, optax.adam)
    step, state = setup_training(CONFIG, run.layout, update, init=lambda key: {"params": {"images": jnp.zeros((5, 8, 8, 1))}})
    result = train(run, step, state, None, evaluate=watched.evaluate, show=watched.show)
    names = {f"{part}{name}" for part in ("", "real_") for name in ("frechet_distance", "kernel_distance", "precision", "recall")}
    assert set(result["metrics"]) == names | {"copies"}
    assert {"samples.png", "neighbours.png"} <= {path.name for path in run.figures.iterdir()}


def test_too_few_real_images_are_refused(run, digits, judge):
    with pytest.raises(UserError, match="7 real images are too few"):
        ImageGeneration(run, draw, Subset(digits[1], range(7)), judge.features, PROCESS)


def test_the_nearest_images_are_those_of_the_loop(digits):
    images, among = (
        np.stack([example.image for example in Subset(source, range(count))]) for source, count in zip(digits, (9, 40))
    )
    indices, distances = nearest(images, among, 2)
    for image, which, far in zip(images, indices, distances):
        each = [float(np.sqrt(np.mean((image.astype(float) - other) ** 2))) for other in among]
        assert which.tolist() == np.argsort(each)[:2].tolist()
        np.testing.assert_allclose(far, sorted(each)[:2], rtol=1e-5)


@settings(max_examples=25)
@given(st.integers(0, 10_000), st.integers(2, 6))
def test_between_codes_of_one_length_the_way_is_the_geodesic(seed, steps):
    codes = np.random.default_rng(seed).normal(size=(2, 3, 5))
    codes /= np.linalg.norm(codes, axis=-1, keepdims=True)
    path = interpolate(*codes, steps)
    for row, start, end in zip(path, *codes):
        np.testing.assert_allclose(row, scipy.spatial.geometric_slerp(start, end, np.linspace(0, 1, steps)), atol=1e-9)
    straight = interpolate(*codes, steps, spherical=False)
    np.testing.assert_allclose(straight, np.linspace(*codes, steps, axis=1), atol=1e-12)


def test_on_the_way_between_noises_their_length_is_kept_and_both_ends_are_exact():
    first, second = np.random.default_rng(0).normal(size=(2, 4, 8, 8, 3)).astype(np.float32)
    path = interpolate(first, second, 5)
    assert path.shape == (4, 5, 8, 8, 3) and path.dtype == np.float32
    np.testing.assert_allclose(path[:, 0], first, atol=1e-6)
    np.testing.assert_allclose(path[:, -1], second, atol=1e-6)
    length = np.sqrt((path**2).sum((2, 3, 4)))
    assert (np.abs(length / length.mean() - 1) < 0.15).all()
    np.testing.assert_allclose(interpolate(first, first, 3), np.stack([first] * 3, 1), atol=1e-6)
    seen = []
    decode = lambda codes: seen.append(codes) or np.tanh(codes[..., :1])
    assert draw_interpolations(decode, PROCESS, first, second, steps=5) is not None
    assert seen[0].shape == (20, 8, 8, 3)

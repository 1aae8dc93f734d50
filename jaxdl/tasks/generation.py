"""Generation of images: samples beside real images, by features of one's choice and by a judge that was trained on the same images; interpolations, and whether samples are copies.

Distances of own features are not the published FID and KID, which are those of Inception-v3's: they compare models on the same data by the same features, and nothing else.
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, Key, PyTree, UInt8

from jaxdl import figures
from jaxdl.data import Image, LabelledImage, Source, Subset, evenly_spaced, train_batches
from jaxdl.data.image import ImageProcessor
from jaxdl.errors import UserError
from jaxdl.losses import cross_entropy
from jaxdl.metrics import accuracy, classify, frechet_distance, inception_score, kernel_distance, precision_recall
from jaxdl.models.lenet import LeNet
from jaxdl.tasks.memory import Latest
from jaxdl.training import Aux, Layout, Report, Run, Update, init_state, make_step, to_host

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Images = UInt8[np.ndarray, "N H W C"]
Features = Callable[[Images], Float[np.ndarray, "N D"]]

LEARNED, NEAR, SAMPLES, NEIGHBOURS = 50_000, 1_000, 64, 12
"""Training images among which neighbours are sought, those of them of which the distance to the others is known, samples that are drawn, and such with a neighbour, at most."""


@dataclasses.dataclass(frozen=True)
class Judge:
    """A classifier of the images that are to be generated, which does not take part in generating them."""

    features: Features
    """What it makes of images ahead of its last layer."""
    probabilities: Callable[[Images], Float[np.ndarray, "N C"]]
    """Of the classes."""
    classes: tuple[str, ...]
    accuracy: float
    """Share of held-out images that it recognises. Of images that are as asked for, it finds about as many to be so."""


def train_judge(train: Source[LabelledImage], held_out: Source[LabelledImage], *, steps: int = 500, seed: int = 0) -> Judge:
    """LeNet, trained for some seconds: the same judge for the same images, whatever is to be judged. A generator that uses a classifier for itself is judged by one of another seed. All images are brought to the size of the first. Raises `UserError` if that is below 4×4 pixels."""
    first, classes = train[0].image, train.info.classes
    process = ImageProcessor.fit((example.image for example in evenly_spaced(train, 10_000)), first.shape[:2])
    module = LeNet(num_classes=len(classes), dropout=0.3)

    def objective(params: PyTree, state: Any, batch: dict[str, Array], key: Key[Array, ""]) -> tuple[Float[Array, ""], Aux]:
        logits = module.apply({"params": params}, batch["image"], train=True, rngs={"dropout": key})
        return cross_entropy(logits, batch["label"]), Aux()

    update = Update(objective, optax.adam(optax.cosine_decay_schedule(2e-3, steps)))
    state = init_state(lambda key: module.init(key, jnp.asarray(process(first))[None]), [update], seed=seed)
    row = lambda example, rng: {"image": process(example.image), "label": np.int32(example.label)}
    batches, step = train_batches(train, row, batch_size=64, seed=seed), jax.jit(make_step(update))
    for _ in range(steps):
        state, _ = step(state, next(batches))

    def look(variables: PyTree, images: Float[Array, "B H W C"]) -> tuple[Float[Array, "B D"], Float[Array, "B classes"]]:
        name = f"dense_{len(module.hidden) - 1}"
        logits, kept = module.apply(variables, images, capture_intermediates=lambda part, _: part.name == name)
        return jax.nn.relu(kept["intermediates"][name]["__call__"][0]), jax.nn.softmax(logits)

    variables, looked = {"params": jax.tree.map(to_host, state.params)}, Layout().inference(look)
    features, probabilities = (lambda images, part=part: looked(variables, map(process, images))[part] for part in (0, 1))
    right = accuracy(
        *classify(lambda images: probabilities(list(images)), ((example.image, example.label) for example in held_out))
    )
    return Judge(features, probabilities, classes, right)


class ImageGeneration:
    """How like real images samples are, and whether they are copies: what `train` takes as `evaluate` and `show`."""

    def __init__(
        self,
        run: Run,
        sample: Callable[..., Array],
        real: Source[Image],
        features: Features,
        process: ImageProcessor,
        *,
        learned: Source[Image] | None = None,
        judge: Judge | None = None,
        conditions: Callable[[Any], dict[str, np.ndarray]] | None = None,
        count: int = 1000,
        batch_size: int = 64,
    ):
        """`sample(variables, keys, **conditions)` draws an image in the range of `process` for each key, as `Layout.sample` wants it, and where there are `conditions`, of what these say about a real image, such as `lambda example: {"label": np.int32(example.label)}`. `features` are of images from 0 to 255.

        As many images are drawn as the half of `real` has, `count` at most: they are compared with that half, and beside them the other half is, which says how good a number can be. `learned` are the images that were learned from, for copies. With a `judge`, real images must have labels. Raises `UserError` for fewer than eight real images.
        """
        if len(real) < 8:
            raise UserError(f"{len(real)} real images are too few to compare with: give at least 8")
        order = np.random.default_rng(0).permutation(len(real))
        self.count = min(count, len(real) // 2)
        half, other = (Subset(real, part) for part in (order[: self.count], order[self.count : 2 * self.count]))
        self.features, self.process, self.judge, self.classes = features, process, judge, real.info.classes
        images, self._labels, self._conditions = self._read(half, conditions)
        self._learned = None if learned is None else self._read(evenly_spaced(learned, LEARNED))[0]
        self._reference = features(images)
        images, labels, _ = self._read(other)
        bounds = self._measure(images, labels if conditions else None)
        self._bounds = {f"real_{name}": value for name, value in bounds.items()}
        self._draw = run.layout.sample(sample, batch_size)
        self.samples = Latest(self._drawn)
        """`(variables, key)` to the images that are measured; drawn once for the same variables."""

    def _read(
        self, examples: Iterable[Image], conditions: Callable[[Any], dict[str, np.ndarray]] | None = None
    ) -> tuple[Images, list[int | None], dict[str, np.ndarray]]:
        """The images of examples at the size that is measured, their labels if they have any, and what is asked for by them. The examples are not kept: they may be photographs."""
        images, labels, given = [], [], []
        for example in examples:
            images.append(self.process.resize(example.image))
            labels.append(getattr(example, "label", None))
            given.append(conditions(example) if conditions else {})
        return np.stack(images), labels, {name: np.stack([each[name] for each in given]) for name in given[0]}

    def _drawn(self, variables: PyTree, key: Key[Array, ""]) -> Images:
        return self.process.unprocess(self._draw(variables, key, self.count, **self._conditions))

    def evaluate(self, variables: PyTree, key: Key[Array, ""]) -> Report:
        """`frechet_distance`, `kernel_distance`, `precision`, `recall`; with a judge `inception_score`, `class_histogram_distance` (total variation, from 0 to 1), and of conditional samples `as_asked`, the share that is what was asked for; with images that were learned from `copies`, the share that is nearer to one of them than all but 1 % of these are to each other. As `real_NAME`, the same of real images."""
        samples = self.samples(variables, key)
        report = self._measure(samples, self._labels if self._conditions else None) | self._bounds
        return report | ({"copies": self._copies(samples)} if self._learned is not None else {})

    def _measure(self, images: Images, asked: list[int | None] | None) -> Report:
        """Of images, of which the i-th should be of the i-th class that was asked for."""
        found = self.features(images)
        precision, recall = precision_recall(self._reference, found)
        report: Report = {"frechet_distance": frechet_distance(self._reference, found)}
        report |= {"kernel_distance": kernel_distance(self._reference, found), "precision": precision, "recall": recall}
        if self.judge is not None:
            probabilities = self.judge.probabilities(images)
            report["inception_score"], _ = inception_score(probabilities, splits=1)
            report["class_histogram_distance"] = float(np.abs(np.diff(self._histogram(probabilities), axis=0)).sum() / 2)
            if asked is not None:
                report["as_asked"] = accuracy(probabilities, np.array(asked))
        return report

    def _histogram(self, probabilities: Float[np.ndarray, "N C"]) -> Float[np.ndarray, "2 C"]:
        """The shares of the classes among the real images that are compared with, and among those of which the judge says this."""
        labels = np.array(self._labels)
        return np.stack(
            [np.bincount(each, minlength=len(self.classes)) / len(each) for each in (labels, probabilities.argmax(1))]
        )

    def _copies(self, samples: Images) -> float:
        chosen = self._learned[np.linspace(0, len(self._learned) - 1, min(len(self._learned), NEAR)).astype(int)]
        usual = nearest(chosen, self._learned, 2)[1][:, 1]  # The nearest is the image itself.
        return float((nearest(samples, self._learned)[1][:, 0] < np.quantile(usual, 0.01)).mean())

    def show(self, variables: PyTree, key: Key[Array, ""]) -> Report:
        """Samples, with what was asked for where that is a class; the classes that the judge sees in all; and beside samples the images nearest to them of those that were learned from."""
        samples = self.samples(variables, key)
        asked = [self.classes[label] for label in self._labels[:SAMPLES]] if "label" in self._conditions else []
        drawn: Report = {"samples": figures.grid(samples[:SAMPLES], titles=asked, title="samples")}
        if self.judge is not None:
            real, generated = self._histogram(self.judge.probabilities(samples))
            numbers = range(len(self.classes))
            lines = {"real": (numbers, real), "generated": (numbers, generated)}
            drawn["class_histogram"] = figures.curves({"shares of the classes": lines}, xlabel="class", final=False)
        if self._learned is not None:
            some = samples[:NEIGHBOURS]
            near = self._learned[nearest(some, self._learned)[0][:, 0]]
            drawn["neighbours"] = figures.image_rows({"sample": some, "nearest training image": near})
        return drawn


def nearest(
    images: UInt8[np.ndarray, "N H W C"], among: UInt8[np.ndarray, "M H W C"], k: int = 1
) -> tuple[Int[np.ndarray, "N k"], Float[np.ndarray, "N k"]]:
    """Which of `among` are nearest to each image, the nearest first, and their distances: the roots of the mean squared differences of pixels, from 0 to 255."""
    from sklearn.neighbors import NearestNeighbors  # Takes half a second to import.

    flat = lambda images: images.reshape(len(images), -1).astype(np.float32)
    distances, indices = NearestNeighbors(n_neighbors=k, algorithm="brute").fit(flat(among)).kneighbors(flat(images))
    return indices, distances / np.sqrt(images[0].size)


def interpolate(
    first: Float[np.ndarray, "N *shape"], second: Float[np.ndarray, "N *shape"], steps: int, *, spherical: bool = True
) -> Float[np.ndarray, "N steps *shape"]:
    """Codes from each of the first to its partner, both included: along an arc, which keeps the length that Gaussian noise has (White 2016, arXiv:1609.04468), or a straight line."""
    rows = (len(first), *[1] * (first.ndim - 1))
    a, b = (codes.reshape(len(codes), -1).astype(np.float64) for codes in (first, second))
    cosine = (a * b).sum(1) / np.maximum(np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1), 1e-12)
    angle = np.arccos(np.clip(cosine, -1, 1)).reshape(rows)
    weight = lambda share: np.sin(share * angle) / np.sin(angle) if spherical else share
    straight = np.sin(angle) < 1e-6
    with np.errstate(invalid="ignore", divide="ignore"):
        path = [
            np.where(straight, 1 - t, weight(1 - t)) * first + np.where(straight, t, weight(t)) * second
            for t in np.linspace(0, 1, steps)
        ]
    return np.stack(path, 1).astype(first.dtype)


def draw_interpolations(
    decode: Callable[[Float[np.ndarray, "M ..."]], Float[np.ndarray, "M H W C"]],
    process: ImageProcessor,
    first: Float[np.ndarray, "N ..."],
    second: Float[np.ndarray, "N ..."],
    *,
    steps: int = 9,
    spherical: bool = True,
) -> "Figure | None":
    """A row for each pair of codes or noises, of the images that `decode`, such as a `Layout.inference`, makes on the way from one to the other."""
    path = interpolate(first, second, steps, spherical=spherical)
    images = process.unprocess(decode(path.reshape(-1, *path.shape[2:]))).reshape(*path.shape[:2], *process.size, -1)
    return figures.image_rows({str(number + 1): row for number, row in enumerate(images)}, title="from one code to another")

"""Tasks on names and the copying task: what is read, what is asked and what is measured; and a network as they see it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdl.data import NAMES, LabelledText
from jaxdl.data.names import Alphabet, Names
from jaxdl.errors import UserError
from jaxdl.metrics import NGrams
from jaxdl.nn import Recurrent, SequenceModel
from jaxdl.tasks.names import Classify, Generate, Tag, joined
from jaxdl.tasks.sequences import Copy, Network, read
from jaxdl.training import Layout


@pytest.fixture(scope="module")
def sources():
    """Two languages that differ in their vowels, some of their names with two words."""
    random = np.random.default_rng(0)
    word = lambda vowels: "".join(random.choice(list("bdk")) + random.choice(list(vowels)) for _ in range(3))
    entries = []
    for language, vowels in (("Aish", "aå"), ("Oish", "oö")):
        entries += [(f"{word(vowels)} {word(vowels)}" if index % 2 else word(vowels), language) for index in range(60)]
    names = Names(entries)
    return names.part("train"), names.part("test")


def classify(sources, directory, length=8, blank=0.1):
    return Classify(*sources, directory=directory, length=length, blank=blank)


def generate(sources, directory, length=8, blank=0.1):
    return Generate(*sources, directory=directory, length=length, blank=blank, temperature=0.8, seed=0)


def tag(sources, directory, length=8, blank=0.1):
    return Tag(*sources, directory=directory, length=length, blank=blank)


RNG = np.random.default_rng(0)


def test_cut_and_blanked_names_are_what_is_learned_from(tmp_path, sources):
    task = classify(sources, tmp_path, length=6, blank=0.5)
    rng = np.random.default_rng(0)
    rows = np.stack([task.example(LabelledText("badadakakada", 1), rng)["symbols"] for _ in range(400)])
    plain = task.alphabet(["badada"], 6)[0]
    assert rows.shape == (400, 6) and np.all((rows == plain) | (rows == Alphabet.UNKNOWN))
    np.testing.assert_allclose((rows == Alphabet.UNKNOWN).mean(), 0.5, atol=0.05)


def test_the_alphabet_is_kept_whole_or_not_at_all(tmp_path, sources, monkeypatch):
    """A run reads it again, whatever letters its names have by now; one that was killed while it wrote leaves none."""
    save = Alphabet.save

    def killed(alphabet, path):
        save(alphabet, path)
        path.write_text(path.read_text()[:10])
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Alphabet, "save", killed)
        classify(sources, tmp_path)
    assert not (tmp_path / "alphabet.json").exists()
    first = classify(sources, tmp_path).alphabet
    others = [Names([("xyz", "X"), ("uvw", "Y")])] * 2
    assert classify(others, tmp_path).alphabet.characters == first.characters == " abdkoåö"


class Certain(Network):
    """A network that gives these answers, with certainty."""

    def __init__(self, answers, count):
        self.scores = np.log(np.eye(count)[answers] + 1e-9).astype(np.float32)

    def __call__(self, variables, rows):
        assert len(rows) == len(self.scores)
        return self.scores


def test_languages_are_scored_by_accuracy_and_macro_f1(tmp_path, sources):
    task = classify(sources, tmp_path)
    labels = task.held_out_labels
    assert task.measure(Certain(labels, 2), {}) == {"test_accuracy": 1, "test_macro_f1": 1}
    always = task.measure(Certain(np.zeros_like(labels), 2), {})
    share = (labels == 0).mean()  # Precision of the one class; recall is 1, and of the other both are 0.
    np.testing.assert_allclose([always["test_accuracy"], always["test_macro_f1"]], [share, share / (1 + share)])
    baselines = task.simple_baselines()
    assert baselines["majority_accuracy"] in (share, 1 - share)
    assert baselines["naive_bayes_accuracy"] == baselines["naive_bayes_macro_f1"] == 1  # The vowels tell.


def test_generating_reads_the_language_and_tells_the_end(tmp_path, sources):
    task = generate(sources, tmp_path, length=4, blank=0.0)
    arrays = task.example(LabelledText("bada", 1), RNG)
    written = task.alphabet(["bada"], 5)[0]
    np.testing.assert_array_equal(arrays["symbols"], [len(task.alphabet) + 1, *written[:-1]])
    np.testing.assert_array_equal(arrays["targets"], written)
    assert arrays["targets"][-1] == Alphabet.END and arrays["counts"].all()
    longer = task.example(LabelledText("badaba", 0), RNG)
    assert (longer["targets"] != Alphabet.END).all()  # A name that was cut has no end.


def test_drawn_symbols_follow_the_networks_probabilities_at_any_temperature():
    module, width = SequenceModel(Recurrent(4, "gru"), 5, "n:n"), 5
    params = module.init(jax.random.key(0), jnp.zeros((1, 2, 5)))["params"]
    params["head"]["bias"] = jnp.log(jnp.asarray([0.1, 0.2, 0.3, 0.2, 0.2]))
    network, first, variables = Network(module, width, Layout()), np.full(4000, 4, np.int32), {"params": params}
    drawn = network.generate(variables, first, 2, temperature=0.5, allowed=[0, 1, 2], seed=0)
    assert drawn.shape == (4000, 2) and set(drawn.ravel().tolist()) == {0, 1, 2}
    logits = np.asarray(read(module, width, params, jnp.asarray([[4]])))[0, 0, :3] / 0.5
    np.testing.assert_allclose(np.bincount(drawn[:, 0]) / 4000, np.exp(logits) / np.exp(logits).sum(), atol=0.03)
    following = np.asarray(read(module, width, params, jnp.asarray([[4, 2]])))[0, 1, :3] / 0.5
    after = np.bincount(drawn[drawn[:, 0] == 2, 1], minlength=3)
    np.testing.assert_allclose(after / after.sum(), np.exp(following) / np.exp(following).sum(), atol=0.05)
    assert (drawn != network.generate(variables, first, 2, temperature=0.5, allowed=[0, 1, 2], seed=1)).any()


def test_the_bits_of_a_network_are_those_of_its_parts(tmp_path, sources):
    task = generate(sources, tmp_path)
    module = SequenceModel(Recurrent(6), task.num_answers, "n:n")
    params = module.init(jax.random.key(0), jnp.zeros((1, 2, task.num_symbols)))["params"]
    network = Network(module, task.num_symbols, Layout())
    bits = task.bits(network, {"params": params})
    lengths = np.array([len(name) for name in task.held_out])
    long, short = int(lengths.argmax()), int(lengths.argmin())
    symbols = [len(task.alphabet) + int(task.held_out_labels[long])]
    assert lengths[long] > 9  # Cut: its last symbol is no end.
    for place, target in enumerate(task.alphabet([task.held_out[long]], 9)[0]):
        scores = module.apply({"params": params}, jax.nn.one_hot(jnp.asarray([symbols]), task.num_symbols))[0][0, -1]
        np.testing.assert_allclose(bits[long, place], -jax.nn.log_softmax(scores)[target] / np.log(2), rtol=1e-4)
        symbols.append(target)
    assert np.isfinite(bits[short, :7]).all() and np.isnan(bits[short, 7:]).all()
    np.testing.assert_allclose(task.measure(network, {"params": params})["generation_bits"], np.nanmean(bits))


def test_counting_knows_its_language_better_than_single_letters_do(tmp_path, sources):
    task = generate(sources, tmp_path)
    baselines = task.simple_baselines()
    assert 0 < baselines["ngram_bits"] < baselines["unigram_bits"]
    by_counting = task.counted[NGrams.ORDER]
    assert [len(bits) for bits in by_counting] == [min(len(name) + 1, 9) for name in task.held_out]


def test_what_is_written_is_counted_as_new_distinct_and_of_its_language(tmp_path, sources):
    """Writes one known name for the first language, and another that is new for the second."""
    task = generate(sources, tmp_path)
    known = next(name for name, label in zip(task.names, task.labels) if label == 0 and len(name) == 6)

    class Writer(Certain):
        def generate(self, variables, first, steps, *, temperature, allowed, seed):
            languages = first - len(task.alphabet)
            assert steps == 9 and temperature == 0.8 and Alphabet.UNKNOWN not in allowed and max(allowed) < len(task.alphabet)
            return task.alphabet([(known, "bobobobo")[language] for language in languages], 9)

    report = task.show(Writer(task.targets, task.num_answers), {})
    assert "bobobobo" not in task.names
    assert report["generation_novelty"] == 0.5 and report["generation_distinct"] == 2 / (2 * Generate.WRITTEN)
    assert report["generation_recognised"] == 1
    assert report.keys() - {"names", "bits"} == {"generation_novelty", "generation_distinct", "generation_recognised"}


def test_words_are_joined_and_their_beginnings_told():
    text, begins = joined("Isole  Åland x")
    assert text == "isoleålandx"
    np.testing.assert_array_equal(np.flatnonzero(begins), [0, 5, 10])


def test_tags_are_scored_without_the_first_character(tmp_path, sources):
    task = tag(sources, tmp_path, length=14)
    perfect = task.scores(task.tags, "x")
    assert perfect == {"x_accuracy": 1, "x_f1": 1, "x_names_restored": 1}
    spoiled = task.tags.copy()
    spoiled[:, 0] ^= 1
    assert task.scores(spoiled, "x") == perfect
    never = task.scores(np.zeros_like(task.tags), "x")
    assert never["x_f1"] == never["x_names_restored"] == 0 and 0.5 < never["x_accuracy"] < 1
    baselines = task.simple_baselines()
    assert baselines["majority_accuracy"] == never["x_accuracy"]
    assert baselines["counting_accuracy"] >= never["x_accuracy"] - 0.02


def test_names_of_one_word_have_nothing_to_tag(tmp_path, sources):
    train, held_out = sources
    with pytest.raises(UserError, match="no held-out name has two words"):
        tag((train, held_out.where(lambda example: " " not in example.text, "have two words")), tmp_path)


def test_copying_asks_for_the_symbols_after_the_sign():
    task = Copy(count=3, lag=4)
    arrays = task.example(np.asarray([5, 1, 8], np.int32), RNG)
    b, s = Copy.BLANK, Copy.SIGN
    assert arrays["symbols"].tolist() == [5, 1, 8, b, b, b, b, s, b, b]
    assert arrays["targets"].tolist() == [0] * 7 + [5, 1, 8] and arrays["counts"].tolist() == [False] * 7 + [True] * 3
    np.testing.assert_array_equal(task.source[7], task.source[7])
    assert task.source[7].tolist() != task.source[8].tolist()
    assert task.measure(Certain(task.targets, 9), {}) == {"copy_accuracy": 1}
    assert abs(task.measure(Certain(np.ones_like(task.targets), 9), {})["copy_accuracy"] - 1 / 8) < 0.03


def test_a_gradient_cut_in_the_pause_does_not_reach_the_symbols():
    task = Copy(count=2, lag=6)

    def answers(x, truncate):
        module = SequenceModel(Recurrent(4, truncate=truncate), task.num_answers)
        params = module.init(jax.random.key(0), x)["params"]
        return module.apply({"params": params}, x)[0][:, -2:].sum()

    x = jax.nn.one_hot(task.rows[:3], task.num_symbols)
    full, cut = (np.abs(jax.grad(answers)(x, truncate)).sum((0, 2)) for truncate in (None, 4))
    assert (full > 0).all() and (cut[:8] == 0).all() and (cut[8:] > 0).all()


def test_names_of_a_folder_serve_as_the_built_in_ones_do(tmp_path):
    """The tasks ask nothing of a source but its elements."""
    train, held_out = NAMES.open("builtin:names")
    task = classify((train.where(lambda example: example.label < 2, "are of others"), held_out), tmp_path)
    assert len(task.names) == sum(label < 2 for label in train.labels) and len(task.classes) == 18


def test_of_many_languages_some_have_a_row_in_a_figure(tmp_path):
    many = Names((f"{chr(97 + index % 26)}{chr(97 + number)}o", f"L{index:03}") for index in range(120) for number in range(12))
    task = generate((many.part("train"), many.part("test")), tmp_path)

    class Writer(Certain):
        def generate(self, variables, first, steps, **options):
            return task.alphabet(["abo"] * len(first), steps)

    report = task.show(Writer(task.targets, task.num_answers), {})
    for name in ("names", "bits"):
        assert "of the first 40 languages" in report[name].axes[0].get_title() and report[name].get_size_inches()[1] < 14
    assert report["generation_distinct"] == 1 / Generate.WRITTEN

"""Images and texts reach the model as transformers' processors send them."""

import io
import string

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
siglip_images = pytest.importorskip("transformers.models.siglip.image_processing_pil_siglip")
clip_images = pytest.importorskip("transformers.models.clip.image_processing_pil_clip")
siglip_texts = pytest.importorskip("transformers.models.siglip.tokenization_siglip")
tokenizers_backend = pytest.importorskip("transformers.tokenization_utils_tokenizers")

import sentencepiece

from jaxdl import pretrained
from jaxdl.data.image import ImageProcessor
from jaxdl.data.location_tokens import WORDS
from jaxdl.data.prompts import PromptProcessor
from jaxdl.data.text import Tokenizer
from jaxdl.models import TOKENIZERS, clip, paligemma, siglip, vit
from jaxdl.models.gemma import Gemma

EXACT = 1e-6
"""In units of the normalised image, where a grey level is at least 1/255."""
SIZES = [(224, 224), (37, 91), (300, 200), (333, 500), (64, 65)]


def picture(height: int, width: int) -> np.ndarray:
    """Noise of every scale, as real edges and textures are."""
    random = np.random.default_rng(height * width)
    coarse = random.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3)).repeat(8, 0).repeat(8, 1)[:height, :width]
    return (0.5 * coarse + 0.5 * random.integers(0, 256, (height, width, 3))).astype(np.uint8)


def theirs(processor, image: np.ndarray) -> np.ndarray:
    return np.moveaxis(processor(image, return_tensors="np", input_data_format="channels_last")["pixel_values"][0], 0, -1)


@pytest.mark.parametrize("size", SIZES)
def test_siglips_images_are_equal(size, tmp_path):
    processor = siglip_images.SiglipImageProcessorPil(size={"height": 32, "width": 48})
    processor.save_pretrained(tmp_path)
    ours = ImageProcessor.from_pretrained(tmp_path)
    assert ours == siglip.image_processor((32, 48))
    image = picture(*size)
    np.testing.assert_allclose(ours(image), theirs(processor, image), atol=EXACT)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("shorter_side, crop", [(32, (32, 32)), (40, (32, 24))])
def test_clips_images_are_equal(size, shorter_side, crop, tmp_path):
    crop_size = dict(zip(("height", "width"), crop))
    processor = clip_images.CLIPImageProcessorPil(size={"shortest_edge": shorter_side}, crop_size=crop_size)
    processor.save_pretrained(tmp_path)
    ours = ImageProcessor.from_pretrained(tmp_path)
    assert ours == clip.image_processor(crop, shorter_side=shorter_side)
    image = picture(*size)
    np.testing.assert_allclose(ours(image), theirs(processor, image), atol=EXACT)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """SigLIP's tokenizer as it is published, but of a small vocabulary: ids 0, 1, 2 are `<pad>`, `</s>`, `<unk>`, as in c4_en."""
    random = np.random.default_rng(0)
    words = ["".join(random.choice(list(string.ascii_lowercase), size)) for size in random.integers(1, 9, 200)]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([" ".join(random.choice(words, 9)) for _ in range(500)]),
        model_writer=model,
        vocab_size=200,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    directory = tmp_path_factory.mktemp("tokenizer")
    (directory / "spiece.model").write_bytes(model.getvalue())
    tokenizer = siglip_texts.SiglipTokenizer(str(directory / "spiece.model"))
    tokenizer.save_pretrained(directory)
    return tokenizer, directory, words


def test_siglips_tokens_are_equal(published):
    tokenizer, directory, words = published
    ours = pretrained.load_tokenizer(directory)
    assert (ours.pad, ours.end, ours.length, ours.vocab_size) == (1, 1, 64, 200)
    known = st.lists(st.sampled_from(words), max_size=40).map(" ".join)
    anything = st.text(st.characters(exclude_categories=["Cs"]), max_size=80)

    @settings(max_examples=200, deadline=None, derandomize=True)
    @given(st.lists(known | anything | st.builds("{}{}".format, known, anything), min_size=1, max_size=4), st.integers(1, 70))
    def equal(texts, length):
        expected = tokenizer(texts, padding="max_length", truncation=True, max_length=length, return_tensors="np")["input_ids"]
        np.testing.assert_array_equal(ours(texts, length), expected)

    equal()


def test_a_saved_tokenizer_is_the_published_one(published, tmp_path):
    _, directory, words = published
    """What transformers' class does without being told is told in what is saved."""
    Tokenizer.load(directory, TOKENIZERS).save(tmp_path)
    texts = ["A photo of a cat.", "  Two, DOGS! ", "", " ".join(words)]
    np.testing.assert_array_equal(Tokenizer.load(tmp_path)(texts), pretrained.load_tokenizer(directory)(texts))
    again = siglip_texts.SiglipTokenizer.from_pretrained(str(tmp_path))
    np.testing.assert_array_equal(
        again(texts, padding="max_length", truncation=True, return_tensors="np")["input_ids"], Tokenizer.load(tmp_path)(texts)
    )


@pytest.mark.parametrize("make", [Tokenizer.train, Tokenizer.of_characters, Tokenizer.of_bytes])
def test_transformers_reads_a_tokenizer_that_was_made_here(make, tmp_path):
    texts = ["A red circle left of a blue square.", "two green rings", "one  triangle!", "<p>it ends with </s> and <pad></p>"]
    ours = make(texts)
    ours.save(tmp_path)
    theirs = tokenizers_backend.TokenizersBackend.from_pretrained(str(tmp_path))
    for text, expected, row in zip(texts, theirs(texts)["input_ids"], ours(texts, 80)):
        assert row[: len(expected)].tolist() == expected, text
        assert row[len(expected)] in (ours.end, ours.pad)


def test_both_processors_come_from_one_directory(published, tmp_path):
    _, directory, _ = published
    siglip_images.SiglipImageProcessorPil().save_pretrained(directory)
    processor, tokenizer = pretrained.load_processors(directory)
    assert processor == siglip.image_processor(224) and tokenizer(["a cat"]).shape == (1, 64)


TEXTS = ["a red ring left of a blue square", "two green rings", "it ends with </s> and <pad>"]


@pytest.mark.parametrize("size", SIZES[1:3])
@pytest.mark.parametrize(
    "process",
    [
        siglip.image_processor((24, 40)),
        vit.image_processor(32),
        clip.image_processor((32, 24), shorter_side=40),
        clip.image_processor(32),
        ImageProcessor((16, 16), (0.13,), (0.31,)),
    ],
)
def test_transformers_makes_the_same_of_an_image_by_a_processor_that_was_saved(process, size, tmp_path):
    module = vit.ViT(4, 8, 1, 2, 3)
    shapes = jax.eval_shape(module.init, jax.random.key(0), np.zeros((1, 16, 16, 3)))["params"]
    pretrained.save_config(module, shapes, tmp_path, process=process)
    assert pretrained.load_image_processor(tmp_path) == process
    image = picture(*size)[..., : len(process.mean)]
    theirs_too = theirs(transformers.AutoImageProcessor.from_pretrained(tmp_path), image)
    np.testing.assert_allclose(process(image), theirs_too, atol=EXACT)


def test_a_prompt_processor_that_was_saved_is_transformers_processor_and_ours(tmp_path):
    tokenizer = Tokenizer.of_bytes(TEXTS, 300)
    text = PromptProcessor.extending(tokenizer, 4, WORDS)
    module = paligemma.PaliGemma(
        siglip.VisionTower(8, 8, 1, 2, 8, head=False), Gemma(text.vocab_size, 8, 1, 2, 1, 4, 8), text.image_token
    )
    inputs = np.zeros((1, 16, 16, 3)), np.zeros((1, 5), int), np.zeros(1, int)
    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
    process = siglip.image_processor(16)
    pretrained.save_config(module, shapes, tmp_path, tokenizer=text, process=process)
    again, words = pretrained.load_processors(tmp_path)
    assert again == process and isinstance(words, PromptProcessor)
    questions, answers = ["detect ring", "what is it?"], ["<loc0256><loc0000><loc1023><loc0512> ring", "a  <seg007> square"]
    rows = text(questions, answers)
    np.testing.assert_array_equal(words(questions, answers).tokens, rows.tokens)
    processor = transformers.AutoProcessor.from_pretrained(tmp_path)
    image = [[picture(20, 30)] for _ in questions]
    made = processor(
        images=image,
        text=[f"<image>{each}" for each in questions],
        suffix=answers,
        return_tensors="np",
        padding="longest",
        padding_side="right",
    )
    np.testing.assert_array_equal(made["input_ids"], rows.tokens)
    np.testing.assert_allclose(np.moveaxis(made["pixel_values"][0], 0, -1), process(picture(20, 30)), atol=EXACT)

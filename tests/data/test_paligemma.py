"""PaliGemma's rows and pictures are those of transformers' `PaliGemmaProcessor`; boxes become words and come back."""

import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxdl.data.image import ImageProcessor
from jaxdl.data.paligemma import IMAGE, OUTLINES, PLACES, START, TextProcessor, boxes, places
from jaxdl.data.text import Tokenizer
from jaxdl.errors import UserError

PATCHES = 4
QUESTIONS = ["what colour is the ring", "detect ring ; square", "", "caption en  größe 🦆\ttwice"]
ANSWERS = [
    "it is red",
    "<loc0256><loc0000><loc0512><loc1023> ring ; <loc0001><loc0002><loc0003><loc0004><seg007> square",
    "",
    "zwölf",
]
MARKS = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> tuple:
    """A processor with a tokenizer of Gemma's kind (bytes where no piece fits, spaces kept), trained here, and its directory."""
    pytest.importorskip("torch")
    gemma = pytest.importorskip("transformers.models.gemma.tokenization_gemma")
    paligemma = pytest.importorskip("transformers.models.paligemma.processing_paligemma")
    siglip = pytest.importorskip("transformers.models.siglip.image_processing_pil_siglip")
    model = tokenizers.Tokenizer(tokenizers.models.BPE(byte_fallback=True, unk_token="<unk>"))
    model.normalizer = tokenizers.normalizers.Replace(" ", "▁")
    model.pre_tokenizer = tokenizers.pre_tokenizers.Split(" ", "merged_with_previous")
    letters = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=420, special_tokens=[*MARKS, *letters, "\n"], show_progress=False)
    model.train_from_iterator(
        ["what colour is the ring", "detect ring ; square", "it is red and the square is blue"] * 5, trainer
    )
    learned = json.loads(model.to_str())["model"]
    tokenizer = gemma.GemmaTokenizer(learned["vocab"], [tuple(pair) for pair in learned["merges"]])
    images = siglip.SiglipImageProcessorPil(size={"height": 16, "width": 16}, image_seq_length=PATCHES)
    images.image_seq_length = PATCHES
    processor = paligemma.PaliGemmaProcessor(images, tokenizer)
    directory = tmp_path_factory.mktemp("processor")
    processor.save_pretrained(directory)
    return processor, directory


def picture(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (23, 31, 3)).astype(np.uint8)


def theirs(processor, questions, answers=None, **options) -> dict:
    texts = [IMAGE + question for question in questions]
    pictures = [[picture(row)] for row in range(len(texts))]
    more = {} if answers is None else {"suffix": answers}
    return processor(images=pictures, text=texts, return_tensors="np", padding="longest", **more, **options)


def test_questions_with_answers_and_without_are_their_rows_id_by_id(published):
    processor, directory = published
    ours = TextProcessor.from_pretrained(directory)
    assert ours.patches == PATCHES
    for answers, side in ((ANSWERS, "right"), (None, "left")):
        wanted = theirs(processor, QUESTIONS, answers, padding_side=side)
        rows = ours(QUESTIONS, answers)
        np.testing.assert_array_equal(rows.tokens, wanted["input_ids"])
        np.testing.assert_array_equal(rows.valid, wanted["attention_mask"])
        prefix = ((wanted["token_type_ids"] == 0) & (wanted["attention_mask"] == 1)).sum(1)
        np.testing.assert_array_equal(rows.prefix, prefix)
        if answers:
            np.testing.assert_array_equal(rows.answer, (wanted["token_type_ids"] == 1) & rows.valid)
            np.testing.assert_array_equal(np.where(rows.answer, rows.tokens, -100)[rows.valid], wanted["labels"][rows.valid])
    assert (rows.tokens == ours.image).sum(1).tolist() == [PATCHES] * len(QUESTIONS)


def test_any_text_has_their_tokens(published):
    processor, directory = published
    ours = TextProcessor.from_pretrained(directory)
    words = st.sampled_from(["ring", "<loc0007>", "<seg127>", "<loc1024>", " ", "\n", "ü", "two  spaces", ";", "🦆"])
    texts = st.lists(words, max_size=6).map("".join)

    @settings(max_examples=60, deadline=None, derandomize=True)
    @given(texts, texts)
    def equal(question, answer):
        wanted = theirs(processor, [question], [answer], padding_side="right")
        np.testing.assert_array_equal(ours([question], [answer]).tokens, wanted["input_ids"])

    equal()


def test_pictures_are_theirs_pixel_by_pixel(published):
    processor, directory = published
    process = ImageProcessor.from_pretrained(directory)
    assert process == ImageProcessor.preset("siglip", 16)
    wanted = theirs(processor, QUESTIONS)["pixel_values"]
    ours = np.stack([process(picture(row)) for row in range(len(QUESTIONS))])
    np.testing.assert_allclose(ours, np.moveaxis(wanted, 1, -1), atol=1e-6)


def test_answers_are_read_up_to_their_end(published):
    _, directory = published
    ours = TextProcessor.from_pretrained(directory)
    rows = ours(QUESTIONS, ANSWERS)
    spelled = [row[row_answer] for row, row_answer in zip(rows.tokens, rows.answer)]
    longest = max(map(len, spelled))
    padded = np.stack([np.pad(row, (0, longest - len(row)), constant_values=5) for row in spelled])
    assert ours.decode(padded) == ANSWERS


@pytest.fixture(scope="module")
def trained() -> TextProcessor:
    return TextProcessor.extending(Tokenizer.train(["a red ring left of a blue square"] * 3, vocabulary=60), PATCHES)


def test_a_tokenizer_of_ones_own_gets_the_words_and_stays_as_it_is(trained, tmp_path):
    own = Tokenizer.train(["a red ring left of a blue square"] * 3, vocabulary=60)
    before = own.vocabulary
    text = TextProcessor.extending(own, PATCHES)
    assert own.model.token_to_id(IMAGE) is None and own.vocabulary == before
    words = (START, IMAGE, *PLACES, *OUTLINES, "\n")
    assert text.vocabulary == before + len(words)
    ids = [text.model.token_to_id(word) for word in words]
    assert sorted(ids) == list(range(before, text.vocabulary))
    rows = text(["a red ring"], ["<loc0003> blue"])
    (tokens,) = rows.tokens
    assert tokens[: PATCHES + 1].tolist() == [text.image] * PATCHES + [text.start]
    assert tokens[rows.prefix[0] - 1] == text.model.token_to_id("\n") and tokens[-1] == text.end
    text.save(tmp_path)
    again = TextProcessor.from_pretrained(tmp_path, PATCHES)
    np.testing.assert_array_equal(again(["a red ring"], ["<loc0003> blue"]).tokens, rows.tokens)


def test_an_answer_that_is_too_long_is_cut_and_ends_and_a_question_is_not(trained):
    whole = trained(["a red ring"], ["a blue square left of a red ring"])
    count = int(whole.prefix[0])
    cut = trained(["a red ring"], ["a blue square left of a red ring"], length=count + 3)
    np.testing.assert_array_equal(cut.tokens[0, :-1], whole.tokens[0, : count + 2])
    assert cut.tokens[0, -1] == trained.end and cut.answer.sum() == 3
    with pytest.raises(UserError, match=f"{count} tokens have no room for {PATCHES} of an image"):
        trained(["a red ring"], ["blue"], length=count)
    assert trained(["a red ring"], length=count).valid.all()


def test_wrong_calls_are_refused(trained, tmp_path):
    with pytest.raises(UserError, match="1 answers to 2 questions"):
        trained(["a", "b"], ["c"])
    with pytest.raises(UserError, match="give a list"):
        trained("a red ring")
    Tokenizer.train(["a red ring"], vocabulary=30).save(tmp_path)
    with pytest.raises(UserError, match="holds no preprocessor_config"):
        TextProcessor.from_pretrained(tmp_path)
    (Path(tmp_path) / "preprocessor_config.json").write_text("{}")
    with pytest.raises(UserError, match="image_seq_length"):
        TextProcessor.from_pretrained(tmp_path)


def test_boxes_become_words_by_the_part_in_which_an_edge_lies():
    given = np.array([[0.0, 0.25, 0.5, 1.0], [-1.0, 0.2499, 0.9999, 2.0]])
    assert places(given) == ["<loc0000><loc0256><loc0512><loc1023>", "<loc0000><loc0255><loc1023><loc1023>"]


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.lists(st.tuples(*[st.floats(0, 1)] * 4), max_size=4))
def test_boxes_come_back_within_half_a_part(given):
    given = np.array(given, np.float64).reshape(-1, 4)
    text = " ; ".join(f"{words} thing {row}" for row, words in enumerate(places(given)))
    found, names = boxes(text)
    assert names == [f"thing {row}" for row in range(len(given))] and found.shape == given.shape
    np.testing.assert_allclose(found, given, atol=0.5 / 1024 + 1e-6)


def test_what_is_no_box_is_passed_over_and_outlines_too():
    outline = "".join(OUTLINES[:16])
    text = f"<loc0001><loc0002><loc0003> short ; <loc0000><loc0000><loc1024><loc0001> beyond ; <loc0000><loc0512><loc0512><loc1023>{outline} a red ring"
    found, names = boxes(text)
    assert names == ["a red ring"]
    np.testing.assert_allclose(found * 1024, [[0.5, 512.5, 512.5, 1023.5]])
    assert boxes("nothing here")[0].shape == (0, 4)

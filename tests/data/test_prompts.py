"""Rows and images are those of transformers' `PaliGemmaProcessor`."""

import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxdl.data.image import ImageProcessor
from jaxdl.data.location_tokens import WORDS
from jaxdl.data.prompts import BOS, IMAGE_TOKEN, PromptProcessor
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
    texts = [IMAGE_TOKEN + question for question in questions]
    pictures = [[picture(row)] for row in range(len(texts))]
    more = {} if answers is None else {"suffix": answers}
    return processor(images=pictures, text=texts, return_tensors="np", padding="longest", **more, **options)


def test_questions_with_answers_and_without_are_their_rows_id_by_id(published):
    processor, directory = published
    ours = PromptProcessor.from_pretrained(directory, words=WORDS)
    assert ours.num_image_tokens == PATCHES
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
    assert (rows.tokens == ours.image_token).sum(1).tolist() == [PATCHES] * len(QUESTIONS)


def test_any_text_has_their_tokens(published):
    processor, directory = published
    ours = PromptProcessor.from_pretrained(directory, words=WORDS)
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
    assert process == ImageProcessor.symmetric(16)
    wanted = theirs(processor, QUESTIONS)["pixel_values"]
    ours = np.stack([process(picture(row)) for row in range(len(QUESTIONS))])
    np.testing.assert_allclose(ours, np.moveaxis(wanted, 1, -1), atol=1e-6)


def test_answers_are_read_up_to_their_end(published):
    _, directory = published
    ours = PromptProcessor.from_pretrained(directory, words=WORDS)
    rows = ours(QUESTIONS, ANSWERS)
    spelled = [row[row_answer] for row, row_answer in zip(rows.tokens, rows.answer)]
    longest = max(map(len, spelled))
    padded = np.stack([np.pad(row, (0, longest - len(row)), constant_values=5) for row in spelled])
    assert ours.decode(padded) == ANSWERS


@pytest.fixture(scope="module")
def trained() -> PromptProcessor:
    return PromptProcessor.extending(Tokenizer.train(["a red ring left of a blue square"] * 3, vocab_size=60), PATCHES, WORDS)


def test_a_tokenizer_of_ones_own_gets_the_words_and_stays_as_it_is(trained, tmp_path):
    own = Tokenizer.train(["a red ring left of a blue square"] * 3, vocab_size=60)
    before = own.vocab_size
    text = PromptProcessor.extending(own, PATCHES, WORDS)
    assert own.model.token_to_id(IMAGE_TOKEN) is None and own.vocab_size == before
    words = (BOS, IMAGE_TOKEN, *WORDS, "\n")
    assert text.vocab_size == before + len(words)
    ids = [text.model.token_to_id(word) for word in words]
    assert sorted(ids) == list(range(before, text.vocab_size))
    rows = text(["a red ring"], ["<loc0003> blue"])
    (tokens,) = rows.tokens
    assert tokens[: PATCHES + 1].tolist() == [text.image_token] * PATCHES + [text.bos]
    assert tokens[rows.prefix[0] - 1] == text.model.token_to_id("\n") and tokens[-1] == text.end
    text.save(tmp_path)
    again = PromptProcessor.from_pretrained(tmp_path, PATCHES)
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
    Tokenizer.train(["a red ring"], vocab_size=30).save(tmp_path)
    with pytest.raises(UserError, match="holds no preprocessor_config"):
        PromptProcessor.from_pretrained(tmp_path)
    (Path(tmp_path) / "preprocessor_config.json").write_text("{}")
    with pytest.raises(UserError, match="image_seq_length"):
        PromptProcessor.from_pretrained(tmp_path)


def test_questions_and_answers_are_texts_and_half_of_a_character_is_shown_as_what_it_is():
    text = PromptProcessor.extending(Tokenizer.of_bytes(["a red ring"], 258), 2)
    shown = text(["a \N{REPLACEMENT CHARACTER}"], ["\N{REPLACEMENT CHARACTER} b"]).tokens
    np.testing.assert_array_equal(text(["a \ud83d"], ["\udc00 b"]).tokens, shown)
    for questions, answers in ((["a", None], None), ([b"a"], None), (7, None), (None, None), (["a"], [3])):
        with pytest.raises(UserError, match="text"):
            text(questions, answers)

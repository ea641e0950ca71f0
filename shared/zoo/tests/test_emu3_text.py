"""The language of emu3-world: words, codes and marks, as transformers' Emu3 expects them."""

from __future__ import annotations

import pytest
import torch
from pared_zoo.recipes.emu3_text import (
    BEGIN,
    IMAGE_START,
    IMAGE_TOKEN,
    LINE_END,
    MARKS,
    emu3_processor,
    emu3_tokenizer,
    picture_codes,
    picture_prompt,
    picture_tokens,
)
from pared_zoo.recipes.sd_world import SCENES
from pared_zoo.world import caption, sample_scenes
from transformers.models.emu3.modeling_emu3 import Emu3ImageVocabularyMapping

CODES = 12


@pytest.fixture(scope="module")
def tokenizer():
    return emu3_tokenizer(CODES, 512)


def test_every_word_of_captions_is_one_token(tokenizer):
    for i, scene in enumerate(sample_scenes(300, 3, SCENES)):
        text = caption(scene, i)
        assert len(tokenizer(text)["input_ids"]) == len(text.split()), text
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_marks_are_never_parts_of_words_and_codes_come_last_in_order(tokenizer):
    ids = tokenizer("a large ring" + "".join(MARKS))["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids[3:]) == list(MARKS)
    codes = tokenizer.convert_tokens_to_ids([f"<|visual token {k:06d}|>" for k in range(CODES)])
    assert codes == list(range(len(tokenizer) - CODES, len(tokenizer)))


def test_prompts_are_those_of_the_processor_of_transformers(tokenizer, tmp_path):
    emu3_processor(tokenizer, 64, 4).save_pretrained(tmp_path)
    processor = type(emu3_processor(tokenizer, 64, 4)).from_pretrained(tmp_path)
    texts = ["a large red circle on a gray background", "two small rings", ""]
    found = processor(
        text=texts, return_for_image_generation=True, image_area=(16 * 8) ** 2, padding=True, return_tensors="pt"
    )
    expected = tokenizer([picture_prompt(text, 16) for text in texts], padding=True, return_tensors="pt")
    assert torch.equal(found["input_ids"], expected["input_ids"])
    assert torch.equal(found["attention_mask"], expected["attention_mask"])
    # Without a caption nothing is left but the mark of the beginning and the header.
    header = [BEGIN, IMAGE_START, *"16*16", IMAGE_TOKEN]
    assert tokenizer.convert_ids_to_tokens(found["input_ids"][2])[-len(header) :] == header
    assert not found["attention_mask"][2, : -len(header)].any()


def test_pictures_are_rows_with_ends_as_the_vocabulary_mapping_of_transformers_has_them(tokenizer):
    codes = torch.randint(0, CODES, (2, 3, 4), generator=torch.Generator().manual_seed(4))
    tokens = picture_tokens(codes, tokenizer)
    assert tokens.shape == (2, 3 * 5 + 3)
    mapping = Emu3ImageVocabularyMapping(tokenizer.get_vocab())
    assert mapping.eol_token_id == tokenizer.convert_tokens_to_ids(LINE_END)
    for row in range(2):
        assert mapping.convert_img2bpe(codes[row]).flatten().tolist() == tokens[row, :-3].tolist()
    assert tokenizer.convert_ids_to_tokens(tokens[0, -3:]) == ["<|extra_201|>", "<|image end|>", "<|extra_204|>"]


def test_codes_come_back_and_broken_rules_are_seen(tokenizer):
    codes = torch.randint(0, CODES, (3, 4, 4), generator=torch.Generator().manual_seed(5))
    tokens = picture_tokens(codes, tokenizer)
    found, right = picture_codes(tokens, 4, tokenizer)
    assert torch.equal(found, codes)
    assert right.all()
    tokens[0, 4], tokens[1, 7] = tokens[0, 3], tokens[1, 4]
    found, right = picture_codes(tokens, 4, tokenizer)
    assert right.tolist() == [False, False, True]
    assert found[1, 1, 2] == 0
    assert torch.equal(found[0], codes[0])

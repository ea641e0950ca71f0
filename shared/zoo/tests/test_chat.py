"""Talk about the world in whole words, laid out as the processor lays it out."""

from __future__ import annotations

import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from pared_zoo.recipes.chat import END, chat_processor, chat_tokenizer, chat_words
from pared_zoo.recipes.turns import IGNORED, Turns, right_answers, turn_mask
from pared_zoo.world import questions, sample_clips, sample_scenes

pytest.importorskip("torchvision")
CLIPS = sample_clips(120, 41)


@pytest.fixture(scope="module")
def processor():
    return chat_processor(64, 64)


@pytest.fixture(scope="module")
def turns() -> Turns:
    return Turns(chat_tokenizer())


def said(question, kind="video"):
    return [{"role": "user", "content": [{"type": kind}, {"type": "text", "text": question.text}]}]


def test_every_word_of_questions_and_answers_is_one_token():
    tokenizer = chat_tokenizer()
    asked = [q for i, s in enumerate([*sample_scenes(400, 3), *CLIPS]) for q in questions(s, i, 12)]
    words = {w for q in asked for w in re.findall("[a-z]+", f"{q.text} {q.answer}")}
    assert words <= set(chat_words())
    assert all(len(tokenizer.tokenize(f" {word}")) == 1 for word in words)


def test_other_texts_come_back_from_bytes():
    tokenizer = chat_tokenizer()
    text = "Ein Sechseck, bitte: ⬡!"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_ids_are_the_same_in_another_process():
    text = "<|im_start|>user which way does the red ring move first?"
    code = f"from pared_zoo.recipes.chat import chat_tokenizer as t; print(t()({text!r})['input_ids'])"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=200)
    assert other.stdout.strip() == str(chat_tokenizer()(text)["input_ids"])


def test_the_processor_survives_saving(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    again = type(processor).from_pretrained(tmp_path)
    chat, frames = said(questions(CLIPS[0], 0, 1)[0]), [np.full((8, 64, 64, 3), 40, np.uint8)]
    a, b = (p(text=[p.apply_chat_template(chat)], videos=frames, return_tensors="pt") for p in (processor, again))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("frames", [1, 8, 16])
def test_a_clip_becomes_sixteen_tokens_a_frame_and_a_newline(processor, frames):
    text = processor.apply_chat_template(said(questions(CLIPS[0], 0, 1)[0]), add_generation_prompt=True)
    x = processor(text=[text], videos=[np.zeros((frames, 64, 64, 3), np.uint8)], return_tensors="pt")
    assert x["pixel_values_videos"].shape == (1, frames, 3, 64, 64)
    assert (x["input_ids"] == processor.video_token_id).sum() == 16 * frames + 1


def test_a_packed_turn_has_the_tokens_of_the_chat_template(processor, turns):
    asked = questions(CLIPS[3], 3, 5)
    packed = turns.pack([asked])
    for number, question in enumerate(asked, 1):
        chat = [*said(question), {"role": "assistant", "content": question.answer}]
        ids = processor.tokenizer(processor.apply_chat_template(chat))["input_ids"]
        mine = packed["turns"][0] == number
        assert [*turns.opening, processor.video_token_id, *packed["ids"][0, mine].tolist()] == ids
        assert packed["offsets"][0, mine].tolist() == list(range(int(mine.sum())))


def test_labels_are_the_answers_and_their_end(turns):
    tokenizer = chat_tokenizer()
    asked = questions(CLIPS[5], 5, 6)
    packed = turns.pack([asked])
    for number, question in enumerate(asked, 1):
        mine = (packed["turns"][0] == number) & (packed["labels"][0] != IGNORED)
        assert tokenizer.decode(packed["labels"][0, mine]) == f" {question.answer}{END}"


def test_a_turn_sees_the_clip_and_itself_and_nothing_later(turns):
    packed = turns.pack([questions(CLIPS[0], 0, 3), questions(CLIPS[1], 0, 2)])
    mask = turn_mask(packed["turns"], 4)[:, 0]
    for row in range(2):
        number = [0] * 4 + packed["turns"][row].tolist()
        for q in range(len(number)):
            for k in range(len(number)):
                allowed = k <= q and (k < 4 or (q >= 4 and number[k] == number[q]))
                assert bool(mask[row, q, k]) == allowed


def test_an_answer_is_right_only_if_every_token_is(turns):
    packed = turns.pack([questions(CLIPS[0], 0, 3), questions(CLIPS[1], 0, 2)])
    logits = torch.nn.functional.one_hot(packed["labels"].clamp(min=0), 600).float()
    perfect = right_answers(logits, packed["labels"], packed["turns"])
    assert perfect.nansum() == 5
    assert perfect.isnan().sum() == 1
    last = int((packed["labels"][0] != IGNORED).nonzero().max())
    logits[0, last] = 0
    assert right_answers(logits, packed["labels"], packed["turns"])[0].tolist() == [1, 1, 0]

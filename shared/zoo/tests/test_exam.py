"""The held-out questions, and what the shipped vision-language model makes of them."""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise

import numpy as np
import pared_zoo
import pytest
import torch
from pared_zoo.recipes.chat import chat_tokenizer
from pared_zoo.recipes.exam import NEEDLE, TASKS, exam, exam_pixels, examine
from pared_zoo.recipes.turns import Turns, right_answers
from pared_zoo.recipes.vlm_world import CLIPS, SHOWN, SIDE, Pupil, VlmWorld, interview, to_pixels
from pared_zoo.shipped import FOLDER
from pared_zoo.world import iter_clips, render_clip, sample_clips
from pared_zoo.world.clip_question import CLIP_QUESTIONS

trained = pytest.mark.skipif(not (FOLDER / "vlm-world").is_dir(), reason="vlm-world is not trained here")
#: Neither trained on nor behind the numbers of the card.
SEED = 50_000


def plain(items, *_):
    return items


@pytest.fixture(scope="module")
def model():
    return pared_zoo.load("vlm-world")


@pytest.fixture(scope="module")
def processor():
    pytest.importorskip("torchvision")
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(pared_zoo.path("vlm-world"))


def test_every_task_is_asked_equally_often_and_about_another_clip_each_time():
    sheets = exam(per_task=5, seed=SEED)
    assert Counter(task for _, _, asked in sheets for task in asked) == dict.fromkeys(TASKS, 5)
    assert len({number for number, _, _ in sheets}) == len(sheets)
    stream = list(zip(range(sheets[-1][0] + 1), iter_clips(SEED, 16), strict=False))
    assert all(stream[number][1] == clip for number, clip, _ in sheets)


def test_a_needle_shows_in_one_frame_and_nowhere_else():
    needles = [(clip, asked[NEEDLE]) for _, clip, asked in exam(per_task=8, seed=SEED) if NEEDLE in asked]
    assert {q.kind for _, q in needles} == {"agent_color", "agent_shape"}
    for clip, question in needles:
        (k,) = np.flatnonzero(clip.visible.sum(axis=0) == 1)
        assert question.answer in (clip.objects[k].color, clip.objects[k].shape)


def test_pixels_of_an_exam_are_noisy_pictures_of_its_clips():
    sheets = exam(per_task=1, seed=SEED)[:3]
    pixels = exam_pixels(sheets, SEED)
    clean = np.stack([render_clip(clip, SIDE) for _, clip, _ in sheets]).transpose(0, 1, 4, 2, 3)
    difference = pixels.numpy().astype(int) - clean
    assert pixels.shape == (3, 16, 3, SIDE, SIDE)
    assert 2 < difference.std() < 3.5
    assert torch.equal(pixels[1:2], exam_pixels(sheets[1:2], SEED))


def test_batches_of_every_stage_can_be_learnt_from():
    recipe = VlmWorld()
    recipe.prepare(FOLDER, torch.device("cpu"), plain)
    pupil = recipe.build()
    steps = [0, *(int(s.until * recipe.schedule.steps) - 1 for s in recipe.stages)]
    for step in steps:
        batch = recipe.batch(step, 0, 1)
        terms = recipe.loss(pupil, batch, torch.Generator())
        terms["loss"].backward()
        assert terms["loss"].isfinite()
        assert all(p.grad is not None for p in pupil.parameters())
        pupil.zero_grad()
        assert torch.equal(batch["pixels"], recipe.batch(step, 0, 1)["pixels"])
        assert not torch.equal(batch["pixels"], recipe.batch(step, 1, 1)["pixels"])


def test_training_asks_mostly_about_what_happens():
    clips = sample_clips(40, SEED, 16, CLIPS)
    asked = [interview(clip, i, 16) for i, clip in enumerate(clips)]
    kinds = Counter(q.kind for questions in asked for q in questions)
    assert set(kinds) == set(CLIP_QUESTIONS)
    assert sum(n for kind, n in kinds.items() if kind not in SHOWN) > 0.5 * kinds.total()
    assert all(len({q.text for q in questions}) == len(questions) <= 16 for questions in asked)


def test_how_things_move_is_told_alike_with_and_without_questions():
    pupil, turns = VlmWorld().build().eval(), Turns(chat_tokenizer())
    sheets = exam(per_task=1, seed=SEED)[:2]
    with torch.no_grad():
        tokens = pupil.see(to_pixels(exam_pixels(sheets, SEED)))
        _, told = pupil.answer(tokens, turns.opening, turns.pack([list(asked.values()) for _, _, asked in sheets]))
        alone = pupil.follow(tokens, turns.opening)
    assert alone.shape == told.shape == tokens.shape
    assert torch.allclose(alone, told, atol=1e-4)


def test_an_untrained_model_knows_nothing():
    assert examine(VlmWorld().build().model.eval(), plain, per_task=1, seed=SEED)["accuracy_mean"] < 0.2


@trained
def test_answers_on_fresh_clips_are_as_right_as_the_card_says(model):
    card = json.loads((pared_zoo.path("vlm-world") / "metrics.json").read_text())
    fresh = examine(model, plain, per_task=6, seed=SEED)
    # 6 questions a task: the mean over tasks has a standard deviation of at most 0.5 / sqrt(6 * tasks).
    assert abs(fresh["accuracy_mean"] - card["accuracy_mean"]) < 3 * 0.5 / np.sqrt(6 * len(TASKS))


@trained
def test_asking_through_the_processor_gives_the_answers_that_are_counted(model, processor):
    turns, pupil = Turns(processor.tokenizer), Pupil(model)
    for number, clip, asked in exam(per_task=1, seed=SEED)[:4]:
        batch = turns.pack([list(asked.values())])
        pixels = to_pixels(exam_pixels([(number, clip, asked)], SEED))
        with torch.no_grad():
            logits, _ = pupil.answer(pupil.see(pixels), turns.opening, batch)
        verdicts = right_answers(logits, batch["labels"], batch["turns"])[0].tolist()
        frames = exam_pixels([(number, clip, asked)], SEED)[0].permute(0, 2, 3, 1).numpy()
        for question, verdict in zip(asked.values(), verdicts, strict=True):
            chat = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": question.text}]}]
            prompt = processor.apply_chat_template(chat, add_generation_prompt=True)
            inputs = processor(text=[prompt], videos=[frames], return_tensors="pt")
            output = model.generate(**inputs, max_new_tokens=4, do_sample=False)[0, inputs["input_ids"].shape[1] :]
            answer = processor.decode(output, skip_special_tokens=True).strip()
            assert (answer == question.answer) == bool(verdict), (question, answer)


@trained
def test_without_the_clip_the_model_can_only_guess(model):
    sheets = exam(per_task=3, seed=SEED)
    turns, pupil = Turns(chat_tokenizer()), Pupil(model)
    right = []
    for sheet, other in pairwise(sheets):
        batch = turns.pack([list(sheet[2].values())])
        with torch.no_grad():
            logits, _ = pupil.answer(pupil.see(to_pixels(exam_pixels([other], SEED))), turns.opening, batch)
        right += right_answers(logits, batch["labels"], batch["turns"])[0].tolist()
    assert np.mean(right) < 0.55

"""What every cell of every frame shows, and the noise of the camera."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pared_zoo.recipes.sight import GRID, LOOKS, MOTIONS, NOTHING, cells, look_loss, look_words, motion_loss
from pared_zoo.world import COLORS, SHAPES, Clip, Move, Object, Program, camera_noise, sample_clips

RING = Object("ring", "red", "small", "striped", 0.3, 0.6, 0.11)
#: Shape, colour, size and texture of RING as places in their lists.
RING_WORDS = [SHAPES.index("ring"), list(COLORS).index("red"), 0, 1]


def clip_of(*programs: Program, frames: int = 8) -> Clip:
    return Clip((RING,) * len(programs), programs, "navy", "still", frames)


def told(motions: torch.Tensor, frame: int, cell: int) -> dict[str, int]:
    return dict(zip(MOTIONS, motions[0, frame, cell].tolist(), strict=True))


def test_an_object_is_in_the_cell_of_its_centre():
    right = cells([clip_of(Program())])
    looks, places = right.looks, right.places
    cell = 2 * GRID + 1
    assert looks[0, :, :, 0].sum(dim=1).tolist() == [1] * 8
    assert looks[0, 0, cell].tolist() == [1, 2, *RING_WORDS]
    assert places[0, 0, cell].tolist() == pytest.approx([0.3 * GRID - 2, 0.6 * GRID - 2], abs=1e-5)
    assert looks[0, 0, 0].tolist() == [0, 2, *[NOTHING] * 4]


def test_an_object_that_does_not_show_is_in_no_cell():
    right = cells([clip_of(Program(appears=3, vanishes=4))])
    assert right.looks[0, :, :, 0].sum(dim=1).tolist() == [0, 0, 0, 1, 0, 0, 0, 0]
    assert told(right.motions, 3, 9)["entered"] == 1


def test_way_pace_and_path_are_those_of_the_program():
    right = cells([clip_of(Program((Move(1, 3, "right", 0.15), Move(4, 7, "up", 0.15))))])
    at = [int(right.looks[0, f, :, 0].argmax()) for f in range(8)]
    seen = [told(right.motions, f, at[f]) for f in range(1, 8)]
    assert [s["way"] for s in seen] == [0, 2, 2, 0, 3, 3, 3]
    assert [s["pace"] for s in seen] == [0, 2, 2, 0, 2, 2, 2]
    last = right.paths[0, 7, at[7]].tolist()
    assert last == pytest.approx([0.3 * GRID, -0.45 * GRID, 0, -0.15 * 7, 1], abs=1e-5)
    assert right.paths[0, 0, at[0]].tolist() == [0] * 5


def test_a_new_colour_is_shown_and_the_old_one_remembered():
    right = cells([clip_of(Program(recolor=(4, "cyan")))])
    looks, motions = right.looks, right.motions
    cyan, red = list(COLORS).index("cyan"), list(COLORS).index("red")
    assert looks[0, :, 9, 3].tolist() == [red] * 4 + [cyan] * 4
    assert [told(motions, f, 9)["was"] for f in (1, 3, 4, 7)] == [0, 0, 1 + red, 1 + red]


def one_hot(answers: torch.Tensor, sizes) -> torch.Tensor:
    parts = [torch.nn.functional.one_hot(answers[..., k].clamp(min=0), n) for k, n in enumerate(sizes)]
    return 50.0 * torch.cat(parts, dim=-1).float()


def test_losses_vanish_for_right_guesses_and_not_for_wrong_ones():
    answers = cells(sample_clips(6, 8))
    right = torch.cat([one_hot(answers.looks, LOOKS.values()), answers.places], dim=-1)
    loss, share = look_loss(right, answers.looks, answers.places)
    assert (loss.item(), share.item()) == (pytest.approx(0, abs=1e-5), 1)
    assert look_loss(right.flip(-1), answers.looks, answers.places)[0] > 1
    right = torch.cat([one_hot(answers.motions, MOTIONS.values()), answers.paths], dim=-1)
    loss, share = motion_loss(right, answers.motions, answers.paths)
    assert (loss.item(), share.item()) == (pytest.approx(0, abs=1e-5), 1)
    assert motion_loss(right.flip(-1), answers.motions, answers.paths)[0] > 1


def test_there_is_a_word_for_every_answer():
    assert len(look_words()) == len(set(look_words())) == sum(LOOKS.values()) - LOOKS["object"]


def test_noise_is_repeatable_of_the_given_strength_and_leaves_its_input_alone():
    gray = np.full((40, 64, 64, 3), 112, dtype=np.uint8)
    noisy = camera_noise(gray, 5, sigma=4.0)
    assert noisy.std() == pytest.approx(4.0, rel=0.02)
    assert abs(float(noisy.mean()) - 112) < 0.05
    assert np.array_equal(noisy, camera_noise(gray, 5, sigma=4.0))
    assert not np.array_equal(noisy, camera_noise(gray, 6, sigma=4.0))
    assert (gray == 112).all()
    assert np.array_equal(camera_noise(gray, 5, sigma=0.0), gray)


def test_noise_refuses_other_pixels_and_negative_strength():
    with pytest.raises(ValueError, match="pictures is float32 and must be uint8"):
        camera_noise(np.zeros((2, 2), np.float32), 0)
    with pytest.raises(ValueError, match=r"sigma=-1\.0"):
        camera_noise(np.zeros((2, 2), np.uint8), 0, sigma=-1.0)

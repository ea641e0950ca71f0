"""Captions of motion by grammar, with paraphrases that mean the same clip."""

from __future__ import annotations

import random

from pared_zoo.world.attributes import COUNT_WORDS
from pared_zoo.world.caption import adjectives, listed, noun, pick, plural
from pared_zoo.world.clip import Clip
from pared_zoo.world.motion import Move, Program

WAYS: dict[str, tuple[str, ...]] = {
    "left": ("to the left", "left", "leftwards"),
    "right": ("to the right", "right", "rightwards"),
    "up": ("up", "upwards", "to the top"),
    "down": ("down", "downwards", "to the bottom"),
}


def clip_caption(clip: Clip, seed: int | None = None) -> str:
    """Say what happens in a clip.

    Args:
        clip: the clip.
        seed: picks among the paraphrases; None gives the canonical wording.

    Returns:
        One lower-case sentence without a full stop, such as ``"a large red circle moves quickly to the right, then
        stops while a small blue square stays still on a gray background"``.
    """
    rng = None if seed is None else random.Random(seed)
    background = pick(rng, (f" on a {clip.background} background", f" in front of {clip.background}"))
    return _story(clip, rng) + background


def _story(clip: Clip, rng: random.Random | None) -> str:
    names = [noun(o, rng) for o in clip.objects]
    if clip.kind == "count":
        subject = f"{COUNT_WORDS[len(names)]} {adjectives(clip.objects[0])} {plural(clip.objects[0].shape)}"
        return f"{subject} {_action(clip, 0, rng, many=True)}"
    if clip.kind == "still":
        verb = _verb(("stays still", "does not move", "stands still"), rng, many=len(names) > 1)
        return f"{listed(names)} {verb}"
    if clip.relation is not None:
        return f"{names[0]} is {clip.relation} {names[1]} and both {_action(clip, 0, rng, many=True)}"
    others = names[1:]
    if clip.kind == "order":
        first, second = (_action(clip, k, rng) for k in (0, 1))
        story = pick(
            rng,
            (
                f"first {names[0]} {first}, then {names[1]} {second}",
                f"{names[0]} {first} before {names[1]} {second}",
                f"{names[1]} {second} after {names[0]} {first}",
            ),
        )
        others = names[2:]
    else:
        story = f"{names[0]} {_action(clip, 0, rng)}"
    if not others:
        return story
    verb = _verb(("stays still", "does not move", "stands still"), rng, many=len(others) > 1)
    return f"{story} while {listed(others)} {verb}"


def _action(clip: Clip, k: int, rng: random.Random | None, many: bool = False) -> str:
    program = clip.programs[k]
    if program.recolor is not None:
        turn = pick(rng, ("turns", "changes"))
        return f"{turn} from {clip.objects[k].color} to {program.recolor[1]}"
    if program.vanishes is not None and program.appears > 0:
        return pick(rng, ("flashes", "shows for a moment", "appears for a single frame"))
    if program.vanishes is not None:
        return pick(rng, ("disappears", "vanishes"))
    if program.appears > 0:
        return pick(rng, ("appears", "comes into view"))
    if not program.moves:
        return _verb(("stays still", "does not move", "stands still"), rng, many)
    if program.bounces:
        axis = "left and right" if program.moves[0].direction in ("left", "right") else "up and down"
        return f"{_verb(('bounces', 'moves back and forth'), rng, many)} {axis}"
    return _moves(program, clip, rng, many)


def _moves(program: Program, clip: Clip, rng: random.Random | None, many: bool) -> str:
    first, last = program.moves[0], clip.frames - 1
    verb = _verb(("moves",) if first.distance < 0.3 else ("moves", "moves", "travels"), rng, many)
    if len(program.moves) == 2:
        joint = pick(rng, (", then ", " and then "))
        return f"{verb} {_way(first, rng)}{joint}{_way(program.moves[1], rng)}"
    if clip.kind == "order":
        return f"{verb} {_way(first, rng)}"
    speed = "slowly" if first.distance < 0.3 else "quickly"
    phrase = pick(rng, (f"{verb} {speed} {{way}}", f"{speed} {verb} {{way}}")).format(way=_way(first, rng))
    halt = _verb(("stays still", "waits"), rng, many)
    if first.start > 0:
        phrase = f"{halt}, then {phrase}"
    if first.stop < last:
        phrase += pick(rng, (", then stops", " and then stops"))
    return phrase


def _way(move: Move, rng: random.Random | None) -> str:
    return pick(rng, WAYS[move.direction])


def _verb(options: tuple[str, ...], rng: random.Random | None, many: bool) -> str:
    verb = pick(rng, options)
    if not many:
        return verb
    word, _, rest = verb.partition(" ")
    return f"{'do' if word == 'does' else word[:-1]} {rest}".rstrip()

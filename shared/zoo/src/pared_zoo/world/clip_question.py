"""Questions about what happens in a clip."""

from __future__ import annotations

import random
from collections.abc import Callable

from pared_zoo.world.attributes import COLORS, COUNT_WORDS, RELATIONS, SHAPES, SIZES, TEXTURES
from pared_zoo.world.caption import INVERSE
from pared_zoo.world.clip import Clip
from pared_zoo.world.motion import DIRECTIONS, SPEEDS, Program
from pared_zoo.world.question import YES_NO, Question, ask_attribute, ask_background
from pared_zoo.world.reference import refer

EVENTS: tuple[str, ...] = ("stay still", "move", "bounce", "appear", "disappear", "flash", "change color")


def event(program: Program) -> str:
    """The word of ``EVENTS`` for what a program does."""
    if program.recolor is not None:
        return "change color"
    if program.vanishes is not None:
        return "flash" if program.appears > 0 else "disappear"
    if program.appears > 0:
        return "appear"
    if program.moves:
        return "bounce" if program.bounces else "move"
    return "stay still"


def _attribute(kind: str, choices: tuple[str, ...]) -> Callable[[random.Random, Clip], Question | None]:
    def make(rng: random.Random, clip: Clip) -> Question | None:
        k = rng.randrange(len(clip.objects))
        if kind == "color" and clip.programs[k].recolor is not None:
            return None
        return ask_attribute(rng, kind, clip.objects[k], clip.objects, choices, _unreliable(clip))

    return make


def _unreliable(clip: Clip) -> tuple[str, ...]:
    """Attributes that cannot tell objects apart throughout the clip."""
    return ("color",) if any(p.recolor is not None for p in clip.programs) else ()


def _name(rng: random.Random, clip: Clip, k: int, hidden: tuple[str, ...] = ()) -> tuple[str, str] | None:
    """(phrase, the verb that goes with it) for object ``k``, or None if it cannot be told from the others."""
    group = ("shape", "color", "size", "texture") if clip.kind == "count" else ()
    found = refer(rng, clip.objects[k], clip.objects, hidden=(*_unreliable(clip), *hidden), group=group)
    if found is None:
        return None
    return f"the {found[0]}", "do" if found[1] else "does"


def _doing(clip: Clip, *events: str) -> list[int]:
    return [k for k, p in enumerate(clip.programs) if event(p) in events]


def _agent(asked: str, choices: tuple[str, ...]) -> Callable[[random.Random, Clip], Question | None]:
    """Ask for an attribute of the one object that does something."""

    def make(rng: random.Random, clip: Clip) -> Question | None:
        active = _doing(clip, *EVENTS[1:])
        if len(active) != 1 or (asked == "color" and clip.kind == "recolor"):
            return None
        third = {"move": "moves", "bounce": "bounces", "change color": "changes color", "flash": "flashes"}
        deed = event(clip.programs[active[0]])
        text = f"what {asked} is the object that {third.get(deed, deed + 's')}?"
        return Question(text, getattr(clip.objects[active[0]], asked), f"agent_{asked}", choices)

    return make


def _event(rng: random.Random, clip: Clip) -> Question | None:
    by_event: dict[str, list[int]] = {}
    for k, program in enumerate(clip.programs):
        by_event.setdefault(event(program), []).append(k)
    answer = rng.choice(sorted(by_event))
    named = _name(rng, clip, rng.choice(by_event[answer]))
    if named is None:
        return None
    return Question(f"what {named[1]} {named[0]} do?", answer, "event", EVENTS)


def _moves(rng: random.Random, clip: Clip) -> Question | None:
    moving, still = _doing(clip, "move", "bounce"), _doing(clip, "stay still")
    if not moving or not still:
        return None
    answer = rng.choice(YES_NO)
    named = _name(rng, clip, rng.choice(moving if answer == "yes" else still))
    return None if named is None else Question(f"{named[1]} {named[0]} move?", answer, "moves", YES_NO)


def _count_moving(rng: random.Random, clip: Clip) -> Question:
    moving = len(_doing(clip, "move", "bounce"))
    return Question("how many objects move?", COUNT_WORDS[moving], "count_moving", COUNT_WORDS)


def _direction(rng: random.Random, clip: Clip) -> Question | None:
    movers = _doing(clip, "move")
    if not movers:
        return None
    k = rng.choice(movers)
    named = _name(rng, clip, k)
    if named is None:
        return None
    legs = clip.programs[k].moves
    leg = rng.randrange(len(legs))
    when = "" if len(legs) == 1 else (" first", " last")[leg]
    text = f"which way {named[1]} {named[0]} move{when}?"
    return Question(text, legs[leg].direction, "direction", tuple(DIRECTIONS))


def _speed(rng: random.Random, clip: Clip) -> Question | None:
    # A clip of several moves or a move after a pause is always quick: asking there would teach the answer.
    steady = [k for k in _doing(clip, "move") if _lasts(clip, k) == (True, True) and len(clip.programs[k].moves) == 1]
    if not steady:
        return None
    k = rng.choice(steady)
    named = _name(rng, clip, k)
    if named is None:
        return None
    answer = "slowly" if clip.programs[k].moves[0].distance <= SPEEDS["slowly"][1] else "quickly"
    return Question(f"{named[1]} {named[0]} move slowly or quickly?", answer, "speed", tuple(SPEEDS))


def _lasts(clip: Clip, k: int) -> tuple[bool, bool]:
    """Whether object ``k`` moves from the first frame on, and up to the last."""
    moves = clip.programs[k].moves
    return moves[0].start == 0, moves[-1].stop == clip.frames - 1


def _pause(rng: random.Random, clip: Clip) -> Question | None:
    if clip.kind not in ("fast", "still_then_fast", "fast_then_still", "burst"):
        return None
    named = _name(rng, clip, 0)
    assert named is not None
    starts, ends = _lasts(clip, 0)
    if rng.random() < 0.5:
        text, waits = f"{named[1]} {named[0]} wait before moving?", not starts
    else:
        text, waits = f"{named[1]} {named[0]} stop before the end?", not ends
    return Question(text, YES_NO[0] if waits else YES_NO[1], "pause", YES_NO)


def _order(rng: random.Random, clip: Clip) -> Question | None:
    if clip.kind != "order":
        return None
    answer = rng.choice(YES_NO)
    first, second = (0, 1) if answer == "yes" else (1, 0)
    a, b = _name(rng, clip, first), _name(rng, clip, second)
    assert a is not None
    assert b is not None
    if rng.random() < 0.5:
        return Question(f"does {a[0]} move before {b[0]}?", answer, "order", YES_NO)
    return Question(f"does {b[0]} move after {a[0]}?", answer, "order", YES_NO)


def _first(asked: str, choices: tuple[str, ...]) -> Callable[[random.Random, Clip], Question | None]:
    def make(rng: random.Random, clip: Clip) -> Question | None:
        if clip.kind != "order":
            return None
        which = rng.randrange(2)
        text = f"what {asked} is the object that moves {('first', 'last')[which]}?"
        return Question(text, getattr(clip.objects[which], asked), f"first_{asked}", choices)

    return make


def _recolor(rng: random.Random, clip: Clip) -> Question | None:
    recolor = clip.programs[0].recolor
    if recolor is None:
        return None
    named = _name(rng, clip, 0)
    if named is None:
        return None
    if rng.random() < 0.5:
        return Question(f"what color does {named[0]} turn to?", recolor[1], "recolor", tuple(COLORS))
    return Question(f"what color is {named[0]} at first?", clip.objects[0].color, "recolor", tuple(COLORS))


def _relation(rng: random.Random, clip: Clip) -> Question | None:
    if clip.relation is None:
        return None
    swap = rng.random() < 0.5
    relation = INVERSE[clip.relation] if swap else clip.relation
    a, b = (_name(rng, clip, k) for k in ((1, 0) if swap else (0, 1)))
    assert a is not None
    assert b is not None
    return Question(f"where is {a[0]} relative to {b[0]}?", relation, "relation", RELATIONS)


#: Kinds of questions about a clip and how each is made; a maker returns None where its kind does not apply.
CLIP_QUESTIONS: dict[str, Callable[[random.Random, Clip], Question | None]] = {
    "color": _attribute("color", tuple(COLORS)),
    "shape": _attribute("shape", SHAPES),
    "size": _attribute("size", tuple(SIZES)),
    "texture": _attribute("texture", TEXTURES),
    "background": ask_background,
    "agent_color": _agent("color", tuple(COLORS)),
    "agent_shape": _agent("shape", SHAPES),
    "event": _event,
    "moves": _moves,
    "count_moving": _count_moving,
    "direction": _direction,
    "speed": _speed,
    "pause": _pause,
    "order": _order,
    "first_color": _first("color", tuple(COLORS)),
    "first_shape": _first("shape", SHAPES),
    "recolor": _recolor,
    "relation": _relation,
}

"""How fast pictures are drawn: ``python -m pared_zoo.world.speed``."""

from __future__ import annotations

import time

from pared_zoo.world.render import render
from pared_zoo.world.scene import sample_scenes


def render_speed(size: int = 64, pictures: int = 1024, rounds: int = 3, seed: int = 0) -> float:
    """Pictures of ``size`` drawn per second of processor time, best of ``rounds``; sampling is not counted."""
    scenes = sample_scenes(pictures, seed)
    render(scenes[:64], size)
    best = float("inf")
    for _ in range(rounds):
        start = time.process_time()
        render(scenes, size)
        best = min(best, time.process_time() - start)
    return pictures / best


if __name__ == "__main__":
    for side in (32, 64, 128):
        print(f"{side}x{side}: {render_speed(side, 65536 // side):.0f} pictures per second of one core")

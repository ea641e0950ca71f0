"""What is compiled ahead of time for `dato_score_select`."""

from __future__ import annotations

from collections.abc import Iterator

from ...aot import Specialization
from .triton import constants, score_select_kernel


def kernels() -> Iterator[Specialization]:
    """Yield the kernel for four-channel latents and 2 x 2 patches: per pixel, pooled by two, and noise alone."""
    sizes = ("height", "width", "grid_height", "grid_width", "patch_rows", "patch_columns", "groups")
    words = ("seed_low", "seed_high", "call", "block")
    for dtype in ("fp16", "bf16", "fp32"):
        for label, pixel, has_score in (("pixel", 1, True), ("pooled", 2, True), ("noise alone", 1, False)):
            chosen, options = constants(4, (pixel, pixel), (2, 2), has_score, True, True)
            yield Specialization(
                score_select_kernel,
                f"{dtype} {label}",
                {"current_ptr": f"*{dtype}", "previous_ptr": f"*{dtype}", "out_ptr": "*i64"}
                | dict.fromkeys((*sizes, *words), "i32")
                | dict.fromkeys(("gamma", "alpha"), "fp32"),
                chosen,
                options,
                aligned=("current_ptr", "previous_ptr", "out_ptr"),
            )

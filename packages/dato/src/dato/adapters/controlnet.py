"""ControlNet in front of the UNet: not computed when the UNet's next call reads none of its residuals (section 7.4)."""

from __future__ import annotations

from typing import Any

from pared_hooks import Patch
from torch import Tensor, nn

from dato.functional import FULL
from dato.state import RunState


def install(patch: Patch, controlnet: nn.Module, run: RunState) -> None:
    """Wrap a `ControlNetModel` or `MultiControlNetModel`; with `reuse_controlnet` it runs at FULL calls alone."""
    stored: dict[tuple[object, ...], Any] = {}
    run.on_forget(stored.clear)

    def forward(original: Any, *args: Any, **kwargs: Any) -> Any:
        sample: Tensor = args[0] if args else kwargs["sample"]
        timestep = args[1] if len(args) > 1 else kwargs["timestep"]
        if (run.clock.calls_per_step or 1) > 1:
            # Which of the guidance branches this is for cannot be told.
            return original(*args, **kwargs)
        depth = run.foresee(sample, timestep)
        is_unread = depth == 0 or (run.config.reuse_controlnet and depth != FULL)
        # The two forms of the output are stored apart: a caller asks for the same one at each step.
        key = (tuple(sample.shape), sample.dtype, sample.device, kwargs.get("return_dict", True))
        if is_unread and key in stored:
            run.statistics.controlnet("reused")
            return stored[key]
        try:
            output = original(*args, **kwargs)
        except BaseException:
            run.fail()
            raise
        run.statistics.controlnet("computed")
        stored.clear()
        stored[key] = output
        return output

    patch.wrap_forward(controlnet, forward)

"""The zoo's models that draw the world token by token, and ways to draw with them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from pared_zoo.recipes.ar_world import GUIDANCE_SCALE
from torch import Tensor

from sjd.adapters.llamagen import LlamaGen
from sjd.config import SJDConfig
from sjd.doors import llamagen_request
from sjd.engine import Engine
from sjd.processing import Processing
from sjd.stats import Run
from sjd.window import Window

BATCH = 16
GUIDANCE = GUIDANCE_SCALE
"""That of the zoo's card."""


class FreshNoise(Window):
    """Jacobi decoding of samples: accept what equals a fresh sample, with new noise in every pass."""

    def advance(self, target: Tensor) -> Tensor:
        """As `Window.advance`."""
        self.stream += 1
        return super().advance(target)


@dataclass(frozen=True)
class Sampling:
    """What is drawn from; the defaults are those of the zoo's card."""

    guidance: float = GUIDANCE
    temperature: float = 1.0
    top_k: int = 0
    greedy: bool = False

    def processing(self) -> Processing:
        """The same for an engine."""
        return Processing(temperature=self.temperature, top_k=self.top_k or None)

    def describe(self) -> dict[str, Any]:
        """As JSON values."""
        return {"guidance": self.guidance, "temperature": self.temperature, "top-k": self.top_k or None}


@dataclass(frozen=True)
class Arm:
    """A way to decode; `window` 0 is one token a pass, `jacobi` the equality test with fresh samples."""

    name: str
    window: int = 0
    refresh: str = "maximal"
    init: str = "auto"
    verify: str = "speculative"
    jacobi: bool = False
    relax: float = 0.0

    @property
    def config(self) -> SJDConfig:
        """The options it stands for."""
        return SJDConfig.from_dict(
            {
                "window": max(self.window, 1),
                "refresh": "gumbel" if self.jacobi else self.refresh,
                "init": self.init,
                "verify": "match" if self.jacobi else self.verify,
                "relax": self.relax,
            }
        )


PLAIN = Arm("plain")


@dataclass
class Outcome:
    """Tokens (images, length) of an arm, its runs by batch, and seconds an image (process time on a CPU)."""

    arm: Arm
    tokens: Tensor
    runs: list[Run]
    seconds: float

    @property
    def passes(self) -> list[int]:
        """Forward passes of each image."""
        return [image.passes for run in self.runs for image in run.images]


class World:
    """The pipeline of ar-world and captions of scenes it was not trained on."""

    def __init__(self, pipeline: Any, captions: Sequence[str], scenes: Sequence[Any] = ()) -> None:
        self.pipeline, self.captions, self.scenes = pipeline, list(captions), list(scenes)
        self.adapter = LlamaGen(pipeline.transformer, pipeline)

    @classmethod
    def load(cls, device: torch.device, images: int, name: str = "ar-world") -> World:
        """Raises FileNotFoundError, with the training command, where the zoo has no weights of it."""
        import pared_zoo
        from pared_zoo.recipes.sd_world import held_out_scenes
        from pared_zoo.world import caption

        pipeline = pared_zoo.load(name).to(device)
        scenes = held_out_scenes(images)
        return cls(pipeline, [caption(scene) for scene in scenes], scenes)

    def condition(self, captions: Sequence[str]) -> tuple[Tensor, Tensor | None]:
        """What the model reads of captions, and which of its places hold words, None for all of them."""
        condition, mask = self.pipeline.encode_prompt(list(captions))
        return condition, None if bool(mask.all()) else mask

    def pictures(self, tokens: Tensor) -> Tensor:
        """Pictures (images, 3, height, width) in 0..1."""
        return torch.cat([self.pipeline.decode_tokens(block) for block in tokens.split(64)])

    @torch.no_grad()
    def draw(
        self,
        arm: Arm,
        images: int,
        seed: int,
        sampling: Sampling | None = None,
        *,
        batch: int = BATCH,
        track: Callable[..., Iterable[Any]] = lambda items, description: items,
    ) -> Outcome:
        """One picture for each of the first `images` captions, in batches."""
        sampling = Sampling() if sampling is None else sampling
        tokens, runs, seconds = [], [], 0.0
        for start in track(range(0, images, batch), arm.name):
            captions = [self.captions[i % len(self.captions)] for i in range(start, min(start + batch, images))]
            engine = self.engine(arm, captions, sampling, seed * 7919 + start)
            began = _now(engine.device)
            tokens.append(engine.run()[0])
            seconds += _now(engine.device) - began
            runs.append(engine.report())
        return Outcome(arm, torch.cat(tokens), runs, seconds / images)

    def engine(self, arm: Arm, captions: Sequence[str], sampling: Sampling, seed: int) -> Engine:
        """A generation that has not begun."""
        request = llamagen_request(
            self.adapter,
            *self.condition(captions),
            sampling.processing(),
            guidance_scale=sampling.guidance,
            do_sample=not sampling.greedy,
            generator=torch.Generator().manual_seed(seed),
        )
        config = arm.config if arm.relax == 0 else replace(arm.config, backend="torch")
        return Engine(self.adapter, request, config, arm.window, kind=FreshNoise if arm.jacobi else None)

    @torch.no_grad()
    def entropy(self, tokens: Tensor, sampling: Sampling) -> float:
        """Mean entropy in nats of what each of these tokens (images, length) was drawn from."""
        model = self.pipeline.transformer
        total, count = 0.0, 0
        for start in range(0, len(tokens), BATCH):
            block = tokens[start : start + BATCH]
            captions = [self.captions[i % len(self.captions)] for i in range(start, start + len(block))]
            condition, mask = self.condition(captions)
            conditional = model(block[:, :-1], condition, mask)
            guided = sampling.guidance != 1
            other = model(block[:, :-1], model.null_condition(condition), mask) if guided else None
            processing = self.engine(PLAIN, captions, sampling, 0).request.processing
            probs = processing.probs(conditional, other, None, None)
            total += float(torch.special.entr(probs).sum())
            count += probs.shape[0] * probs.shape[1]
        return total / count


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time()

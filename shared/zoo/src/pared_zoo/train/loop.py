"""The training loop shared by all recipes, on Accelerate."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from pared_zoo.recipes import Batch, Recipe, Schedule, recipe
from pared_zoo.shipped import replace_folder
from pared_zoo.train.card import write_card
from pared_zoo.train.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from pared_zoo.train.history import note_start
from pared_zoo.train.log import LossLog
from pared_zoo.train.optimizers import optimizers

CHECKPOINTS_PER_RUN = 40
GRAD_CLIP = 1.0


class Objective(torch.nn.Module):
    """The recipe's loss as a forward, so that wrappers for several processes or compilation see one module."""

    def __init__(self, recipe: Recipe, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module
        self._recipe = recipe

    def forward(self, batch: Batch, generator: torch.Generator) -> dict[str, torch.Tensor]:
        return self._recipe.loss(self.module, batch, generator)


def run(
    name: str,
    *,
    resume: bool = False,
    size: str = "small",
    out: Path | str | None = None,
    seed: int = 0,
    steps: int | None = None,
    evaluate: bool = True,
    compile: bool = False,
) -> Path:
    """Train a model of the zoo and export it.

    Args:
        name: a name of ``pared_zoo.recipes.RECIPES``.
        resume: go on from the newest checkpoint in ``out``; without one, start.
        size: ``"small"`` (two CPU cores, an hour or two) or ``"base"`` (a GPU).
        out: working folder for checkpoints, ``loss.csv`` and ``export/``; default ``runs/NAME``.
        seed: initialisation and data.
        steps: optimizer steps; default is that of the recipe's schedule.
        evaluate: measure the exported model and write its card's numbers to ``export/metrics.json``.
        compile: run the module's forward through ``torch.compile``; pays off after some hundred steps.

    Returns:
        The exported ``from_pretrained`` directory.

    Raises:
        ValueError: for an unknown name or size, ``steps`` below 1, or a run that was begun with another size or seed.
        FileExistsError: if ``out`` holds checkpoints and ``resume`` is false.
    """
    from accelerate import Accelerator
    from accelerate.utils import set_seed
    from diffusers.training_utils import EMAModel

    recipe_ = recipe(name)(size=size, seed=seed)
    schedule = recipe_.schedule
    total = schedule.steps if steps is None else steps
    if total < 1:
        raise ValueError(f"steps={steps!r} must be at least 1")
    folder = Path(out) if out is not None else Path("runs") / name
    folder.mkdir(parents=True, exist_ok=True)
    if not resume and latest_checkpoint(folder) is not None:
        raise FileExistsError(
            f"out={str(folder)!r} holds checkpoints of an earlier run; pass resume=True or another folder"
        )

    accelerator = Accelerator(mixed_precision="bf16" if _has_bfloat16() else "no")
    set_seed(recipe_.seed_of(3))
    with accelerator.main_process_first():
        recipe_.prepare(folder, accelerator.device, _track(accelerator))
    module = recipe_.build()
    if compile:
        module.compile()
    trainable = [p for p in module.parameters() if p.requires_grad]
    steppers = optimizers(recipe_, module)
    rates = [torch.optim.lr_scheduler.LambdaLR(one, lambda step: _rate(step, schedule, total)) for one in steppers]
    objective, *steppers = accelerator.prepare(Objective(recipe_, module), *steppers)
    average = EMAModel(
        trainable, decay=schedule.ema_decay, use_ema_warmup=True, inv_gamma=10.0, power=0.9, foreach=True
    )
    average.to(accelerator.device)

    start = 0
    checkpoint = latest_checkpoint(folder) if resume else None
    if checkpoint is not None:
        start = load_checkpoint(checkpoint, module, *steppers, *rates, average)
    facts: dict[str, Any] = {"name": name, "size": size, "seed": seed, "steps": total}
    starts = note_start(folder, start, facts, write=accelerator.is_main_process)
    log = LossLog(folder, start, enabled=accelerator.is_main_process)
    share = max(1, schedule.batch_size // accelerator.num_processes)
    every = max(1, total // CHECKPOINTS_PER_RUN)
    began = time.monotonic()
    for step in _track(accelerator)(range(start, total), f"train {name}", total - start):
        rank = accelerator.process_index
        batch = {k: v.to(accelerator.device) for k, v in recipe_.batch(step, rank, share).items()}
        generator = torch.Generator(accelerator.device).manual_seed(recipe_.seed_of(4, step, rank))
        with accelerator.autocast():
            terms = objective(batch, generator)
        accelerator.backward(terms["loss"])
        accelerator.clip_grad_norm_(trainable, GRAD_CLIP)
        for one in (*steppers, *rates):
            one.step()
        objective.zero_grad()
        average.step(trainable)
        log.add(step, time.monotonic() - began, terms)
        if (step + 1) % every == 0 or step + 1 == total:
            log.flush()
            if accelerator.is_main_process:
                save_checkpoint(folder, step + 1, module, *steppers, *rates, average)

    accelerator.wait_for_everyone()
    exported = folder / "export"
    if accelerator.is_main_process:
        average.copy_to(trainable)
        with replace_folder(exported) as target:
            recipe_.save(module, target)
            log.plot(target / "loss.png")
            log.copy(target / "loss.csv")
            facts["starts"] = [[one["from_step"], one["steps"]] for one in starts]
            facts["parameters"] = sum(p.numel() for p in trainable)
            facts["schedule"] = vars(schedule)
            (target / "training.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        if evaluate:
            measure(recipe_, exported, accelerator.device, _track(accelerator))
    return exported


def measure(recipe_: Recipe, exported: Path, device: torch.device, track: Any) -> dict[str, float]:
    """Evaluate an exported directory and write ``metrics.json`` into it."""
    metrics = recipe_.evaluate(exported, device, track)
    temporary = exported / "metrics.json.tmp"
    temporary.write_text(json.dumps(metrics, indent=1) + "\n", encoding="utf-8")
    temporary.replace(exported / "metrics.json")
    write_card(exported, recipe_)
    return metrics


def _has_bfloat16() -> bool:
    """Whether this machine multiplies bfloat16 faster than float32."""
    return torch.cuda.is_available() or bool(torch.cpu.get_capabilities().get("avx512_bf16"))


def _rate(step: int, schedule: Schedule, total: int) -> float:
    warmup = min(schedule.warmup, total // 10 + 1)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, total - warmup))))


def _track(accelerator: Any) -> Any:
    from tqdm.auto import tqdm

    def track(items: Iterable[Any], description: str, total: int | None = None) -> Iterable[Any]:
        return tqdm(items, description, total, disable=not accelerator.is_main_process, mininterval=2.0)

    return track

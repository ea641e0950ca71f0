"""`ditfastattn2` and `pared ditfastattn2`: calibrate, apply, show, bench."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from ditfastattn2.plan import Plan

app = typer.Typer(no_args_is_help=True, help="Head-wise attention compression for diffusion transformers.")

ModelOption = Annotated[str, typer.Option("--model", help="Folder or hub name of a pipeline, or one of the zoo.")]
PromptsOption = Annotated[Path, typer.Option(help="Text file with one prompt per line.")]
GuidanceOption = Annotated[float | None, typer.Option(help="Guidance scale; none: the pipeline's own.")]
SizeOption = Annotated[int | None, typer.Option(help="Pixels; none: the pipeline's own size.")]
FramesOption = Annotated[int | None, typer.Option(help="Frames of a video pipeline.")]
TextOption = Annotated[int | None, typer.Option(help="max_sequence_length of the pipeline: text tokens.")]
DeviceOption = Annotated[str, typer.Option(help="Device of the pipeline.")]
DtypeOption = Annotated[str, typer.Option(help="float32, bfloat16 or float16.")]
SeedOption = Annotated[int, typer.Option(help="Seed of the noise.")]


@app.command()
def calibrate(
    model: ModelOption,
    prompts: PromptsOption,
    steps: Annotated[int, typer.Option(help="Inference steps the plan is for.")],
    out: Annotated[Path, typer.Option(help="The plan.")] = Path("plan.json"),
    delta: Annotated[float, typer.Option(help="Error that a layer may make at a step; more removes more.")] = 0.6,
    coef: Annotated[float, typer.Option(help="Largest share of it for a head, times the heads.")] = 1.5,
    methods: Annotated[str, typer.Option(help="Methods, with commas.")] = "cached,arrow:1/8,arrow:1/16,arrow:1/32",
    dense_above: Annotated[float, typer.Option(help="Layers that compute a larger share are computed in full.")] = 1.0,
    height: SizeOption = None,
    width: SizeOption = None,
    frames: FramesOption = None,
    text: TextOption = None,
    guidance: GuidanceOption = None,
    seed: SeedOption = 0,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "float32",
) -> None:
    """Make a plan; an interrupted run goes on from the file beside it."""
    import torch

    from ditfastattn2.calibrate import calibrate as run
    from ditfastattn2.config import DiTFastAttnV2Config

    try:
        config = DiTFastAttnV2Config(delta=delta, coef=coef, methods=tuple(methods.split(",")), dense_above=dense_above)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    lines = _prompts(prompts)
    pipe = _load_pipeline(model, device, dtype)
    checkpoint = out.with_suffix(".calibration.json")
    plan = run(
        pipe,
        lines,
        config,
        num_inference_steps=steps,
        generator=torch.Generator("cpu").manual_seed(seed),
        checkpoint=checkpoint,
        progress=lambda step, total: typer.echo(f"step {step + 1}/{total}", err=True),
        **_call_options(height, width, frames, text, guidance),
    )
    plan.save(out)
    checkpoint.unlink()
    typer.echo(plan.summary())
    typer.echo(f"Plan: {out}")


@app.command()
def apply(
    plan: Annotated[Path, typer.Argument(help="Plan to run by.")],
    model: ModelOption,
    prompts: PromptsOption,
    out: Annotated[Path, typer.Option(help="Folder of the pictures.")] = Path("pictures"),
    compare: Annotated[bool, typer.Option(help="Make each picture without the plan too.")] = False,
    strict: Annotated[bool, typer.Option(help="Refuse another resolution or number of steps.")] = True,
    steps: Annotated[int | None, typer.Option(help="Inference steps; none: those of the plan.")] = None,
    height: SizeOption = None,
    width: SizeOption = None,
    frames: FramesOption = None,
    text: TextOption = None,
    guidance: GuidanceOption = None,
    seed: SeedOption = 0,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "float32",
) -> None:
    """Make pictures by a plan and tell what it removed."""
    import torch

    from ditfastattn2.apply import applied

    chosen, lines = _read_plan(plan), _prompts(prompts)
    pipe = _load_pipeline(model, device, dtype)
    options = _call_options(height or chosen.height, width or chosen.width, frames, text, guidance)
    options["num_inference_steps"] = steps or chosen.num_steps

    def make(suffix: str) -> None:
        for number, line in enumerate(lines):
            generator = torch.Generator("cpu").manual_seed(seed + number)
            _save(pipe(prompt=line, generator=generator, **options), out, f"{number:03}{suffix}")

    out.mkdir(parents=True, exist_ok=True)
    if compare:
        make("-full")
    with applied(pipe, chosen, strict=strict) as handle:
        make("")
        stats = handle.stats()
    flops = stats["attention_flops"]
    typer.echo(f"{stats['removed']:.1%} of {flops['full'] / 1e12:.3g} TFLOP of attention removed")
    typer.echo(f"largest caches: {stats['peak_cache_bytes'] / 2**20:.1f} MiB, cache misses: {stats['cache_misses']}")
    typer.echo(f"Pictures: {out}")


@app.command()
def show(
    plan: Annotated[Path, typer.Argument(help="Plan to show.")],
    picture: Annotated[Path | None, typer.Option(help="File for a picture of heads and steps, .png or .svg.")] = None,
) -> None:
    """Tell what a plan removes by layer and step; with --picture, draw which head does what at which step."""
    chosen = _read_plan(plan)
    typer.echo(chosen.summary())
    if picture is not None:
        from ditfastattn2.picture import draw

        for branch in chosen.choices:
            suffix = f"-{branch}" if len(chosen.choices) > 1 else ""
            target = picture.with_stem(picture.stem + suffix)
            draw(chosen, branch).savefig(target, dpi=150)
            typer.echo(f"Picture: {target}")


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def bench(context: typer.Context) -> None:
    """Measure ditfastattn2: the same as `pared bench ditfastattn2`, with the same options."""
    try:
        from pared_bench.cli import main
    except ModuleNotFoundError:
        raise typer.BadParameter("the bench needs the extra: pip install 'ditfastattn2[demo]'") from None
    main(["bench", "ditfastattn2", *context.args])


def _call_options(
    height: int | None, width: int | None, frames: int | None, text: int | None, guidance: float | None
) -> dict[str, Any]:
    options = {
        "height": height,
        "width": width,
        "num_frames": frames,
        "max_sequence_length": text,
        "guidance_scale": guidance,
    }
    return {name: value for name, value in options.items() if value is not None}


def _prompts(path: Path) -> list[str]:
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not lines:
        raise typer.BadParameter(f"{path} holds no prompt", param_hint="--prompts")
    return lines


def _read_plan(path: Path) -> Plan:
    from ditfastattn2.plan import Plan

    try:
        return Plan.load(path)
    except (OSError, ValueError) as error:
        raise typer.BadParameter(f"{path}: {error}", param_hint="PLAN") from None


def _load_pipeline(name: str, device: str, dtype: str) -> Any:
    import torch
    from diffusers import DiffusionPipeline

    if dtype not in ("float32", "bfloat16", "float16"):
        raise typer.BadParameter(f"{dtype} is none of float32, bfloat16, float16", param_hint="--dtype")
    if not Path(name).exists():
        try:
            import pared_zoo

            name = str(pared_zoo.path(name))
        except (ImportError, KeyError, ValueError, FileNotFoundError):
            pass  # Not a model of the zoo: diffusers looks the name up, or says that there is none.
    pipe = DiffusionPipeline.from_pretrained(name, torch_dtype=getattr(torch, dtype), use_safetensors=True)
    return pipe.to(device)


def _save(result: Any, folder: Path, name: str) -> None:
    """Save a picture, or the frames of a video as one GIF."""
    if hasattr(result, "images"):
        result.images[0].save(folder / f"{name}.png")
        return
    from diffusers.utils import export_to_gif

    export_to_gif(result.frames[0], str(folder / f"{name}.gif"))


if __name__ == "__main__":
    app()

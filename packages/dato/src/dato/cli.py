"""`pared dato`: presets, cost tables, policy search, bench. torch and diffusers load when a command needs them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from dato.costs import UnitCosts
    from dato.policy import Policy
    from dato.search import Generation

app = typer.Typer(no_args_is_help=True, help="Dynamics-aware token pruning and feature caching for diffusion models.")

PresetOption = Annotated[str, typer.Option("--preset", help="A preset, uniform-N, or a JSON file of a policy.")]


@app.command()
def presets() -> None:
    """List the policies that come with dato."""
    from dato.policy import Policy, preset_description, preset_names

    for name in preset_names():
        actions = ", ".join(f"{count} {action}" for action, count in Policy.from_preset(name).actions().items())
        typer.echo(f"{name}: {actions}. {preset_description(name)}")
    typer.echo("uniform-N: everything at every N-th call, depth 1 between (DeepCache).")


@app.command()
def plan(
    model: Annotated[str, typer.Argument(help="config.json of a denoiser, or sd15, sd21, sdxl.")],
    preset: PresetOption = "sd15-coco",
    size: Annotated[int | None, typer.Option(help="Side of the image in pixels; default: the model's own.")] = None,
    ratio: Annotated[float | None, typer.Option(help="One pruning ratio in place of the policy's.")] = None,
    calls: Annotated[int | None, typer.Option(help="Denoiser calls of a run; default: the policy's.")] = None,
    batch: Annotated[int, typer.Option(help="Samples of one call, guidance included.")] = 2,
    vae_scale: Annotated[int, typer.Option(help="Pixels per latent cell.")] = 8,
    max_downsample: Annotated[int, typer.Option(help="Prune grids down to the latent divided by this.")] = 1,
) -> None:
    """Print what every kind of call of a model costs, and what a policy makes of it."""
    from dato.config import DaToConfig
    from dato.costs import model_on_meta, unit_costs

    policy = _read_policy(preset)
    if calls is not None:
        policy = policy.resample(calls)
    if ratio is not None:
        policy = policy.with_ratio(ratio)
    config = DaToConfig(policy=policy, max_downsample=max_downsample)
    cls, options = _read_model(model)
    denoiser = model_on_meta(cls, options)
    side = denoiser.config.sample_size if size is None else size // vae_scale
    costs = unit_costs(denoiser, (batch, denoiser.config.in_channels, side, side), config)
    for line in _plan_lines(costs, policy):
        typer.echo(line)


@app.command()
def search(
    model: Annotated[str, typer.Argument(help="A pipeline folder or hub name, or a model of the zoo (sd-world).")],
    prompts: Annotated[Path, typer.Option(help="Text file with one prompt per line.")],
    out: Annotated[Path, typer.Option(help="JSON file for the policies found.")] = Path("dato-search.json"),
    steps: Annotated[int, typer.Option(help="Inference steps of a run.")] = 50,
    guidance: Annotated[float, typer.Option(help="Guidance scale.")] = 7.5,
    population: Annotated[int, typer.Option(help="Policies per generation.")] = 12,
    generations: Annotated[int, typer.Option(help="Generations, the random first one included.")] = 12,
    checkpoint: Annotated[Path | None, typer.Option(help="File that an interrupted search continues from.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the search and of the latents.")] = 0,
    device: Annotated[str, typer.Option(help="Device of the pipeline.")] = "cpu",
) -> None:
    """Search a policy for a pipeline: closeness to its own unaccelerated images against FLOPs."""
    from pared_hooks.files import write_whole

    from dato.config import DaToConfig
    from dato.costs import unit_costs
    from dato.fidelity import FidelityEvaluator
    from dato.policy import Policy, preset_names
    from dato.search import search as run_search

    lines = [line.strip() for line in prompts.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not lines:
        raise typer.BadParameter(f"{prompts} holds no prompt", param_hint="--prompts")
    pipe = _load_pipeline(model, device)
    pipe.set_progress_bar_config(disable=True)
    evaluate = FidelityEvaluator(pipe, lines, seed=seed, num_inference_steps=steps, guidance_scale=guidance)
    denoiser = pipe.unet if getattr(pipe, "unet", None) is not None else pipe.transformer
    side = denoiser.config.sample_size
    samples = 2 if guidance > 1 else 1
    costs = unit_costs(denoiser, (samples, denoiser.config.in_channels, side, side), DaToConfig())
    num_calls = len(pipe.scheduler.timesteps)

    def report(generation: Generation) -> None:
        quality, cost = generation.front[-1]
        typer.echo(
            f"generation {generation.index + 1}/{generations}: {len(generation.front)} policies on the front, "
            f"best {quality:.2f} dB at {num_calls * costs.full / cost:.2f}x"
        )

    result = run_search(
        evaluate,
        num_calls=num_calls,
        unit_costs=costs,
        population=population,
        generations=generations,
        seed=seed,
        init=[Policy.from_preset(name) for name in preset_names()],
        callback=report,
        checkpoint=checkpoint,
    )
    write_whole(out, result.to_json())
    typer.echo("speed-up   PSNR")
    for _, quality, cost in result.front:
        typer.echo(f"{num_calls * costs.full / cost:7.2f}x {quality:6.2f} dB")
    typer.echo(f"Policies: {out}")


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def bench(context: typer.Context) -> None:
    """Measure dato: the same as `pared bench dato`, with the same options."""
    try:
        from pared_bench.cli import main
    except ModuleNotFoundError:
        raise typer.BadParameter("the bench needs the extra: pip install 'dato[demo]'") from None
    main(["bench", "dato", *context.args])


def _plan_lines(costs: UnitCosts, policy: Policy) -> list[str]:
    """The cost table of one denoiser and the speed-ups of one policy."""
    from dato.functional import FULL
    from dato.policy import action_name

    ratio = max(policy.ratio)
    lines = [f"{'call':<10}{'GFLOP':>12}{'of full':>9}{'attention':>11}{f'pruned {ratio:g}':>13}{'matching':>10}"]
    for depth in [FULL, *range(1, costs.num_units + 1)]:
        call = costs.call(depth, ratio)
        attention = sum(cost.total for cost in costs.attention if depth == FULL or cost.unit < depth)
        lines.append(
            f"{action_name(depth):<10}{call.computed / 1e9:>12.1f}{call.computed / costs.full:>9.2%}"
            f"{attention / call.computed:>11.1%}{-call.saved / 1e9:>13.1f}{call.matching / 1e9:>10.1f}"
        )
    run = policy.num_calls * costs.full
    calls = [costs.call(depth, share) for depth, share in zip((FULL, *policy.depth[1:]), policy.ratio, strict=True)]
    actions = ", ".join(f"{count} {action}" for action, count in policy.actions().items())
    cache = sum(call.computed for call in calls)
    pruned = cache - sum(call.saved for call in calls)
    lines += [
        "",
        f"{policy.num_calls} calls: {actions}",
        f"without dato          {run / 1e12:9.2f} TFLOP",
        f"cache alone           {cache / 1e12:9.2f} TFLOP {run / cache:6.2f}x",
        f"cache and pruning     {pruned / 1e12:9.2f} TFLOP {run / pruned:6.2f}x",
        f"matching included     {policy.cost(costs) / 1e12:9.2f} TFLOP {policy.speedup(costs):6.2f}x",
    ]
    return lines


def _read_policy(name: str) -> Policy:
    from dato.policy import Policy

    if name.endswith(".json"):
        return Policy.from_json(Path(name).read_text(encoding="utf-8"))
    return Policy.from_preset(name)


def _read_model(name: str) -> tuple[Any, dict[str, Any]]:
    """The diffusers class and the configuration that `name` stands for."""
    import diffusers

    from dato.adapters.base import SUPPORTED
    from dato.adapters.known_configs import KNOWN_CONFIGS

    if name in KNOWN_CONFIGS:
        options = KNOWN_CONFIGS[name]
    elif Path(name).is_file():
        options = json.loads(Path(name).read_text(encoding="utf-8"))
    else:
        known = ", ".join(KNOWN_CONFIGS)
        raise typer.BadParameter(f"{name} is neither a config.json nor one of {known}", param_hint="MODEL")
    kind = options.get("_class_name") if isinstance(options, dict) else None
    if kind not in SUPPORTED:
        raise typer.BadParameter(f"{name} configures {kind!r}; supported: {', '.join(SUPPORTED)}", param_hint="MODEL")
    return getattr(diffusers, kind), options


def _load_pipeline(name: str, device: str) -> Any:
    from diffusers import DiffusionPipeline

    if not Path(name).exists():
        try:
            import pared_zoo

            name = str(pared_zoo.path(name))
        except (ImportError, KeyError, ValueError, FileNotFoundError):
            pass  # Not a model of the zoo: diffusers looks the name up, or says that there is none.
    return DiffusionPipeline.from_pretrained(name, use_safetensors=True).to(device)

"""`pared framefusion`: look at what is redundant in a clip, and measure."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(no_args_is_help=True, help="Merge similar video tokens, then prune unimportant ones.")


@app.command()
def inspect(
    clip: Annotated[str, typer.Argument(help="A video file, or one of bikes, bigbuckbunny, carphone.")],
    question: Annotated[str, typer.Option(help="What is asked about it.")] = "what happens in this video?",
    model: Annotated[str, typer.Option(help="Id or folder of a model; default: vlm-world of the zoo.")] = "",
    cost: Annotated[float, typer.Option(help="Share of vision tokens present, averaged over layers.")] = 0.3,
    threshold: Annotated[float, typer.Option(help="Cosine from which tokens are merged.")] = 0.9,
    frames: Annotated[int, typer.Option(help="Frames taken from the clip.")] = 16,
    out: Annotated[Path, typer.Option(help="Picture to write.")] = Path("framefusion.png"),
    device: Annotated[str, typer.Option(help="Device.")] = "cpu",
) -> None:
    """Print a histogram of similarities at every stage, and draw the tokens that are left."""
    import torch

    from framefusion.config import FrameFusionConfig
    from framefusion.inspection import inspect_film

    try:
        config = FrameFusionConfig(cost=cost, similarity_threshold=threshold)
        film = _film(clip, frames)
        language_model, processor = _model(model, torch.device(device))
    except (ValueError, FileNotFoundError) as error:
        raise typer.BadParameter(str(error)) from None
    except ModuleNotFoundError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from None
    found = inspect_film(language_model, processor, film, question, config)
    for line in found.lines():
        typer.echo(line)
    if found.picture is not None:
        found.picture.save(out)
        typer.echo(f"Tokens that are left: {out}")


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def bench(context: typer.Context) -> None:
    """Measure framefusion: the same as `pared bench framefusion`, with the same options."""
    try:
        from pared_bench.cli import main
    except ModuleNotFoundError:
        raise typer.BadParameter("the bench needs the extra: pip install 'framefusion[demo]'") from None
    main(["bench", "framefusion", *context.args])


def _film(clip: str, frames: int) -> Any:
    import numpy as np

    from framefusion.film import read_film

    if not Path(clip).exists():
        try:
            from pared_zoo.real.clips import CLIPS
            from pared_zoo.real.clips import clip as film
        except ModuleNotFoundError:
            return read_film(clip, frames)
        if clip in CLIPS:
            pictures = film(clip, frames=4 * frames)
            return pictures[np.linspace(0, len(pictures) - 1, frames).round().astype(int)]
    return read_film(clip, frames)


def _model(name: str, device: Any) -> Any:
    from framefusion.demo import load

    return load(name, device)


if __name__ == "__main__":
    sys.exit(app())

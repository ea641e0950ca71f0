"""`pared sjd`: measure a model of yours, and show that the law of the output is kept."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="Speculative Jacobi decoding: exact, and several tokens a pass.")


@app.command()
def bench(
    model: Annotated[str, typer.Argument(help="ar-world, or id or folder of a model of transformers.")] = "ar-world",
    windows: Annotated[str, typer.Option(help="Drafts per pass, with commas.")] = "7,15,31,63",
    prompt: Annotated[str, typer.Option(help="What to draw.")] = "",
    images: Annotated[int, typer.Option(help="Pictures for each window.")] = 2,
    refresh: Annotated[str, typer.Option(help="independent, maximal or gumbel.")] = "maximal",
    guidance: Annotated[float, typer.Option(help="Guidance scale; 1 is none.")] = 2.0,
    top_k: Annotated[int, typer.Option(help="0 keeps all tokens.")] = 0,
    device: Annotated[str, typer.Option(help="Device.")] = "cpu",
    size: Annotated[int, typer.Option(help="Side of the picture in tokens; 0 is what the processor asks for.")] = 0,
) -> None:
    """Count passes and seconds of a picture, by window and without sjd."""
    try:
        sizes = [int(one) for one in windows.split(",")]
    except ValueError:
        raise typer.BadParameter(f"windows = {windows!r}: numbers with commas, such as 7,15") from None
    try:
        from sjd.bench.of_model import measure_model

        lines = measure_model(model, sizes, prompt, images, refresh, guidance, top_k, device, size)
        for line in lines:
            typer.echo(line)
    except (ValueError, FileNotFoundError) as error:
        raise typer.BadParameter(str(error)) from None
    except OSError as error:
        raise typer.BadParameter(f"model = {model!r}: {error}") from None
    except ModuleNotFoundError as error:
        typer.echo(f"{error}; pip install 'sjd[demo]'", err=True)
        raise typer.Exit(1) from None


@app.command()
def exactness(seed: Annotated[int, typer.Option(help="Of the toy models.")] = 0) -> None:
    """Enumerate every random choice on toy models; print how far the output's law is from plain sampling."""
    from sjd.exactness import deviations

    worst = 0.0
    typer.echo(f"{'mode':45} V L W  total variation")
    for one in deviations(seed):
        typer.echo(f"{one.mode:45} {one.vocab} {one.length} {one.window}  {one.total_variation:.1e}")
        worst = max(worst, one.total_variation if one.exact else 0.0)
    typer.echo(f"largest of the modes, the control left out: {worst:.1e}")
    if worst > 1e-9:
        raise typer.Exit(1)


if __name__ == "__main__":
    sys.exit(app())

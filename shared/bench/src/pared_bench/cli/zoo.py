"""`pared zoo`: the small trained models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from pared_bench.cli.demo import SeedOption
from pared_bench.errors import MissingExtraError, UsageError, did_you_mean

app = typer.Typer(help="The small trained models: list, train, show.", no_args_is_help=True, rich_markup_mode=None)


@app.command("ls")
def list_models() -> None:
    """List the models and whether each is shipped here."""
    zoo = _zoo()
    for name in zoo.models():
        try:
            place = str(zoo.path(name))
        except FileNotFoundError:
            place = f"not trained here; pared zoo train {name}"
        typer.echo(f"{name:<16} {place}")


@app.command()
def show(name: Annotated[str, typer.Argument(help="The model.")]) -> None:
    """Show a model's card: what it is, how it was trained, what was measured."""
    from rich.console import Console
    from rich.markdown import Markdown

    zoo = _zoo()
    text = zoo.card(_known(zoo, name))
    console = Console()
    console.print(Markdown(text) if console.is_terminal else text, markup=False, highlight=False, soft_wrap=True)


@app.command()
def train(
    name: Annotated[str, typer.Argument(help="The model.")],
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint.")] = False,
    size: Annotated[Literal["small", "base"], typer.Option(help="base is meant for a GPU.")] = "small",
    out: Annotated[Path | None, typer.Option(help="Folder of the run.", show_default="the recipe's own")] = None,
    seed: SeedOption = 0,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps.", show_default="the recipe's own", min=1)] = None,
) -> None:
    """Train a model from its recipe."""
    _known(_zoo(), name)
    try:
        from pared_zoo import train as trainer
    except ModuleNotFoundError as error:
        raise MissingExtraError(f"training needs {error.name!r}. Type: pip install 'pared-zoo[train]'") from error
    trainer.run(name, resume=resume, size=size, out=out, seed=seed, steps=steps)


def _zoo() -> Any:
    try:
        import pared_zoo
    except ModuleNotFoundError as error:
        raise MissingExtraError(f"the zoo needs {error.name!r}. Type: pip install pared-zoo") from error
    return pared_zoo


def _known(zoo: Any, name: str) -> str:
    models = zoo.models()
    if name not in models:
        raise UsageError(f"the zoo has no model {name!r}.{did_you_mean(name, models)} Models: {', '.join(models)}.")
    return name

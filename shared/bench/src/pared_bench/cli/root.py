"""The top of the command line: built-in commands first, then one group per installed method."""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from pared_bench import registry
from pared_bench.errors import BenchError


class MethodCommand(TyperCommand):
    """Stands for a method's own command line until it is used; only then is the method's package imported."""

    def __init__(self, method: registry.Method) -> None:
        super().__init__(name=method.name, help=method.summary)
        self._method = method

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        """Import `<module>.cli` and hand over to its `app`."""
        app = getattr(self._method.load("cli"), "app", None)
        if not isinstance(app, typer.Typer):
            raise BenchError(f"{self._method.name}'s cli has no typer.Typer called app")
        return typer.main.get_group(app).make_context(info_name, args, parent=parent, **extra)


class RootGroup(TyperGroup):
    """Adds the installed methods that bring a command line, and ends Ctrl-C with one line and exit code 130."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the built-in commands in the order of a first visit, then the methods."""
        return [*self.commands, *(m.name for m in self._methods().values() if "cli" in m.parts())]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Return a built-in command or a method's; None lets typer suggest the nearest."""
        if cmd_name in self.commands:
            return self.commands[cmd_name]
        method = self._methods().get(cmd_name)
        return None if method is None else MethodCommand(method)

    def invoke(self, ctx: Any) -> Any:
        """Run the chosen command."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            typer.echo("\nstopped; no half-written file was left behind", err=True)
            raise typer.Exit(130) from None

    def _methods(self) -> dict[str, registry.Method]:
        return {name: m for name, m in registry.methods().items() if name not in self.commands}

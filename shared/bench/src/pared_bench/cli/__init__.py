"""The `pared` command."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from pared_bench.errors import BenchError


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and leave with its exit code; errors become one message on standard error."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    try:
        if given and given[0] == "list" and set(given[1:]) <= {"--json"}:
            # typer checks options through pydantic, whose import takes longer than the answer
            from pared_bench.cli.listing import list_methods

            list_methods(as_json="--json" in given)
            return
        import typer

        from pared_bench.cli.app import app

        typer.main.get_command(app).main(args=given, prog_name="pared")
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        # the reader of a pipe has seen enough; nothing may be flushed to it when the interpreter ends
        sys.stdout = None  # type: ignore[assignment]
        sys.exit(1)
    except Exception as error:
        from pared_bench.runner import explain

        print(f"pared: {explain(error)}", file=sys.stderr)
        sys.exit(error.exit_code if isinstance(error, BenchError) else 1)

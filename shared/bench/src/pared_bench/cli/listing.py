"""`pared list`: which methods are installed. Imports no library, to answer at once."""

from __future__ import annotations

import json
import shutil
import textwrap

from pared_bench import registry


def list_methods(*, as_json: bool) -> None:
    """Print the installed methods and what each offers, as a table or as JSON."""
    found = list(registry.methods().values())
    if as_json:
        rows = [{"name": m.name, "version": m.version, "offers": list(m.parts()), "summary": m.summary} for m in found]
        print(json.dumps(rows, indent=1))
    elif found:
        print("\n".join(_lines(found, shutil.get_terminal_size().columns)))
    else:
        print("No method is installed. Each is a package of its own, for example: pip install framefusion")


def _lines(methods: list[registry.Method], width: int) -> list[str]:
    """Lay the table out in `width` columns, the summaries wrapped."""
    table = [("method", "version", "offers", "what it does")]
    table += [(m.name, m.version, " ".join(m.parts()), m.summary) for m in methods]
    sizes = [max(len(row[column]) for row in table) for column in range(3)]
    indent = sum(sizes) + 2 * len(sizes)
    lines = []
    for row in table:
        head = "".join(f"{text:<{size}}  " for text, size in zip(row, sizes, strict=False))
        summary = textwrap.wrap(row[3], max(width - indent, 20)) or [""]
        lines += [head + summary[0], *(" " * indent + line for line in summary[1:])]
    return [line.rstrip() for line in lines]


def complete_method(incomplete: str) -> list[tuple[str, str]]:
    """Return the method names that begin like `incomplete`, with their summaries, for shell completion."""
    return [(m.name, m.summary) for m in registry.methods().values() if m.name.startswith(incomplete)]

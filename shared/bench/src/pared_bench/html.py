"""One HTML file that needs nothing beside it: styles inline, pictures as data URIs, no script."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from pared_bench.charts import chart_svg
from pared_bench.files import atomic_write
from pared_bench.results import DemoResult, Figure, Table
from pared_bench.tables import cell, is_number, sections

if TYPE_CHECKING:
    from pared_bench.environment import Environment
    from pared_bench.runner import DemoOutcome
    from pared_bench.store import StoredRecord


def write_demo_page(path: Path, outcomes: Sequence[DemoOutcome], environment: Environment) -> Path:
    """Write the page of a `pared demo` run and return its path; raises OSError."""
    names = [outcome.method.name for outcome in outcomes]
    contents = "".join(f'<a href="#{escape(name)}">{escape(name)}</a>' for name in names) if len(names) > 1 else ""
    body = "".join(_demo(outcome) for outcome in outcomes)
    title = f"pared demo: {', '.join(names)}" if len(names) < 4 else f"pared demo: {len(names)} methods"
    atomic_write(path, _page(title, contents, body, _where(environment)))
    return path


def write_results_page(path: Path, stored: Iterable[StoredRecord]) -> Path:
    """Write stored records, a table and bars per experiment and device, and return the path; raises OSError."""
    body = [
        f"<section>{_table(part.table)}{''.join(map(chart_svg, part.charts))}{_where(part.environment)}</section>"
        for part in sections(stored)
    ]
    text = "".join(body) or "<p>Nothing has been measured yet.</p>"
    atomic_write(path, _page("pared results", "", text, ""))
    return path


def _demo(outcome: DemoOutcome) -> str:
    method = outcome.method
    head = f"<p class=kicker>{escape(method.name)} {escape(method.version)} · {outcome.seconds:.1f} s</p>"
    if outcome.result is None:
        inner = f"<h2>{escape(method.name)}</h2><p class=error>{escape(outcome.error)}</p>"
    else:
        inner = f"<h2>{escape(outcome.result.title)}</h2>{_result(outcome.result)}"
    options = "".join(
        f"<code>--{escape(name.replace('_', '-'))} {escape(str(value))}</code> "
        for name, value in outcome.options.items()
    )
    return f'<section id="{escape(method.name)}">{head}{inner}{f"<p>{options}</p>" if options else ""}</section>'


def _result(result: DemoResult) -> str:
    parts = [_prose(result.summary)]
    if result.metrics:
        tiles = "".join(
            f"<div><dt>{escape(name)}</dt><dd>{escape(cell(float(value)))}</dd></div>"
            for name, value in result.metrics.items()
        )
        parts.append(f"<dl class=tiles>{tiles}</dl>")
    parts += [_figure(figure) for figure in result.figures]
    parts += [_table(table) for table in result.tables]
    return "".join(parts)


def _prose(text: str) -> str:
    """Return paragraphs, with `backticks` as code."""
    marked = re.sub(r"`([^`\n]+)`", r"<code>\1</code>", escape(text))
    return "".join(f"<p>{paragraph.strip()}</p>" for paragraph in marked.split("\n\n") if paragraph.strip())


def _figure(figure: Figure) -> str:
    data = base64.b64encode(figure.png).decode()
    caption = f"<figcaption>{escape(figure.caption)}</figcaption>" if figure.caption else ""
    image = f'<img alt="{escape(figure.title)}" src="data:image/png;base64,{data}">'
    return f"<figure><h3>{escape(figure.title)}</h3>{image}{caption}</figure>"


def _table(table: Table) -> str:
    right = [all(is_number(row[i]) for row in table.rows) for i in range(len(table.columns))]
    marks = [" class=num" if flush else "" for flush in right]
    header = "".join(f"<th{mark}>{escape(name)}</th>" for name, mark in zip(table.columns, marks, strict=True))
    rows = "".join(
        "<tr>" + "".join(f"<td{mark}>{escape(cell(v))}</td>" for v, mark in zip(row, marks, strict=True)) + "</tr>"
        for row in table.rows
    )
    note = f"<p class=note>{escape(table.note)}</p>" if table.note else ""
    grid = f"<div class=scroll><table><thead><tr>{header}</tr></thead><tbody>{rows}</tbody></table></div>"
    return f"<h3>{escape(table.title)}</h3>{grid}{note}"


def _where(environment: Environment) -> str:
    facts = [environment.device, environment.date, f"seed {environment.seed}"]
    facts += [f"commit {environment.commit}"] if environment.commit else []
    facts += [f"{name} {version}" for name, version in environment.versions.items()]
    return f"<p class=where>{escape(' · '.join(facts))}</p>"


def _page(title: str, contents: str, body: str, footer: str) -> str:
    style = Path(__file__).with_name("report.css").read_text(encoding="utf-8")
    nav = f"<nav>{contents}</nav>" if contents else ""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n"
        f"<header><h1>{escape(title)}</h1>{nav}</header>\n<main>{body}</main>\n<footer>{footer}</footer>\n</body>\n</html>\n"
    )

"""What a calibration found, as lines of text and as a picture."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mbq.result import MBQResult


def lines(result: MBQResult) -> Iterator[str]:
    """A line for each group that was searched: exponent, weight of vision tokens, errors beside plain rounding's."""
    heads = "".join(f" {name:>10}" for name in ("answer", "(rtn)", "vision", "(rtn)"))
    yield f"{'layer':>5} {'group':<26} {'exponent':>8} {'lambda':>8}{heads}"
    for entry in result.errors():
        names = " ".join(name.rpartition(".")[2].removesuffix("_proj") for name in entry["linears"])
        weight = result.weights[entry["layer"]][entry["kind"]]
        errors = " ".join(f"{entry[key]:>10.3e}" for key in ("answer", "rtn answer", "vision", "rtn vision"))
        shown = "-" if weight is None else f"{weight:.4f}"
        yield f"{entry['layer']:>5} {names:<26} {entry['ratio']:>8.2f} {shown:>8} {errors}"


def sensitivity_plot(sensitivity: dict[str, dict[str, list[float]]]) -> Any:
    """A figure of mean |gradient| by layer for both kinds of token; needs matplotlib, which the extra `demo` has."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    for axes, kind, title in zip(figure.subplots(1, 2), ("attn", "mlp"), ("attention", "MLP"), strict=True):
        for modality, marker in (("answer", "o"), ("vision", "s")):
            axes.semilogy(sensitivity[modality][kind], marker=marker, label=f"{modality} tokens")
        axes.set(xlabel="layer", ylabel="mean |gradient|", title=f"at the output of the {title}")
        axes.legend()
    return figure

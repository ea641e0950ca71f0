from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
from pared_bench.errors import OptionError
from pared_bench.options import parse_options, split_tokens


def run(
    context: Any,
    *,
    prompt: str = "a",
    steps: int = 2,
    scale: float | None = 1.0,
    mode: Literal["fast", "good"] = "fast",
    guidance: bool = True,
    sizes: tuple[int, ...] = (1,),
    pair: tuple[int, float] = (1, 1.0),
    names: list[str] | None = None,
    where: Path = Path("."),
    either: int | str = 1,
    plain=3,
) -> None: ...


def parse(*tokens: str) -> dict[str, Any]:
    return parse_options(run, tokens, "fake's demo")


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (["--prompt", "a red circle"], {"prompt": "a red circle"}),
        (["--prompt=--odd"], {"prompt": "--odd"}),
        (["--steps", "-4"], {"steps": -4}),
        (["--scale", "none"], {"scale": None}),
        (["--scale=0.5"], {"scale": 0.5}),
        (["--mode", "good"], {"mode": "good"}),
        (["--guidance"], {"guidance": True}),
        (["--no-guidance", "--steps", "3"], {"guidance": False, "steps": 3}),
        (["--guidance", "off"], {"guidance": False}),
        (["--sizes", "3,4,5"], {"sizes": (3, 4, 5)}),
        (["--pair", "3,0.5"], {"pair": (3, 0.5)}),
        (["--names", "a, b"], {"names": ["a", "b"]}),
        (["--where", "x/y"], {"where": Path("x/y")}),
        (["--either", "7"], {"either": 7}),
        (["--either", "seven"], {"either": "seven"}),
        (["--plain", "5"], {"plain": 5}),
        ([], {}),
    ],
)
def test_values_are_converted_by_annotation(tokens: list[str], expected: dict[str, Any]) -> None:
    assert parse(*tokens) == expected


def test_an_unknown_option_lists_the_valid_ones_and_the_nearest() -> None:
    with pytest.raises(
        OptionError, match=r"no option --promt. Did you mean '--prompt'\? Valid options: --prompt, --steps"
    ):
        parse("--promt", "x")


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        (["--steps", "many"], "--steps must be a whole number, got 'many'"),
        (["--mode", "best"], "--mode must be one of fast, good, got 'best'"),
        (["--pair", "1,2,3"], "--pair must be values with commas"),
        (["--steps"], "--steps needs a value"),
        (["--steps", "1", "--steps", "2"], "--steps is given twice"),
        (["--no-steps"], "--no-steps is no switch; write --steps VALUE"),
        (["--guidance", "--", "x"], "unexpected '--'"),
        (["-p", "x"], "unexpected '-p'"),
    ],
)
def test_a_wrong_value_names_the_option_and_what_is_valid(tokens: list[str], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        parse(*tokens)


def test_a_method_without_options_says_so() -> None:
    with pytest.raises(OptionError, match="takes no options of its own"):
        parse_options(lambda context: None, ["--x", "1"], "fake's demo")


def test_names_end_where_options_begin() -> None:
    assert split_tokens(["one", "two", "--prompt", "three"]) == (["one", "two"], ["--prompt", "three"])

"""Passing command-line options on to the keyword-only parameters of a method's `run`."""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, Union

from pared_bench.errors import OptionError, did_you_mean

_WORDS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}


def split_tokens(tokens: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split what the shell gave into leading names and the options that follow them."""
    for index, token in enumerate(tokens):
        if token.startswith("-"):
            return list(tokens[:index]), list(tokens[index:])
    return list(tokens), []


def parse_options(run: Callable[..., Any], tokens: Sequence[str], owner: str) -> dict[str, Any]:
    """Turn `--some-name VALUE`, `--some-name=VALUE`, `--flag` and `--no-flag` into keyword arguments of `run`.

    Values are converted by the parameter's annotation: str, int, float, bool, Path, Literal, optional ones, and tuples
    or lists written with commas. Raises OptionError that names the option of `owner` and lists the valid ones.
    """
    parameters = _keyword_only(run)
    values: dict[str, Any] = {}
    queue = list(tokens)
    while queue:
        token = queue.pop(0)
        if not token.startswith("--") or len(token) == 2:
            raise OptionError(f"{owner}: unexpected {token!r}. {_valid(parameters)}")
        flag, equals, text = token[2:].partition("=")
        name = flag.replace("-", "_")
        negated = name.startswith("no_") and name[3:] in parameters and name not in parameters
        name = name[3:] if negated else name
        if name not in parameters:
            hint = did_you_mean(f"--{flag}", map(_flag, parameters))
            raise OptionError(f"{owner} has no option --{flag}.{hint} {_valid(parameters)}")
        if name in values:
            raise OptionError(f"{owner}: --{flag} is given twice")
        kind = _kind(run, parameters[name])
        if negated or (_allows(kind, bool) and not equals and not (queue and queue[0].lower() in _WORDS)):
            if equals or not _allows(kind, bool):
                raise OptionError(f"{owner}: --{flag} is no switch; write {_flag(name)} VALUE")
            values[name] = not negated
            continue
        if not equals:
            if not queue:
                raise OptionError(f"{owner}: --{flag} needs a value ({_describe(kind)})")
            text = queue.pop(0)
        try:
            values[name] = _convert(kind, text)
        except ValueError:
            raise OptionError(f"{owner}: --{flag} must be {_describe(kind)}, got {text!r}") from None
    required = [p.name for p in parameters.values() if p.default is inspect.Parameter.empty and p.name not in values]
    if required:
        raise OptionError(f"{owner} needs {_flag(required[0])}. {_valid(parameters)}")
    return values


def _keyword_only(run: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    return {p.name: p for p in inspect.signature(run).parameters.values() if p.kind is inspect.Parameter.KEYWORD_ONLY}


def _kind(run: Callable[..., Any], parameter: inspect.Parameter) -> Any:
    """Return the parameter's type: its annotation, else the type of its default."""
    annotation = parameter.annotation
    if annotation is inspect.Parameter.empty:
        return str if parameter.default in (None, inspect.Parameter.empty) else type(parameter.default)
    if not isinstance(annotation, str):
        return annotation
    # One at a time: the context parameter is often annotated with a name that exists for the type checker alone.
    holder = types.FunctionType((lambda: None).__code__, getattr(run, "__globals__", {}))
    holder.__annotations__ = {parameter.name: annotation}
    try:
        return typing.get_type_hints(holder)[parameter.name]
    except NameError:
        return str


def _arms(kind: Any) -> tuple[Any, ...]:
    if typing.get_origin(kind) in (Union, types.UnionType):
        return typing.get_args(kind)
    return (kind,)


def _allows(kind: Any, wanted: type) -> bool:
    return wanted in _arms(kind)


def _convert(kind: Any, text: str) -> Any:
    arms = _arms(kind)
    if len(arms) > 1:
        if type(None) in arms and text.lower() == "none":
            return None
        # str accepts anything, so it is tried last
        for arm in sorted((arm for arm in arms if arm is not type(None)), key=lambda arm: arm is str):
            try:
                return _convert(arm, text)
            except ValueError:
                continue
        raise ValueError(text)
    origin, parts = typing.get_origin(kind) or kind, typing.get_args(kind)
    if origin is Literal:
        for choice in parts:
            if str(choice) == text:
                return choice
        raise ValueError(text)
    if origin is bool:
        if text.lower() not in _WORDS:
            raise ValueError(text)
        return _WORDS[text.lower()]
    if origin in (int, float, str, Path):
        return origin(text)
    if origin in (tuple, list) or (isinstance(origin, type) and issubclass(origin, Sequence)):
        pieces = [piece.strip() for piece in text.split(",")]
        if origin is tuple and parts and Ellipsis not in parts:
            if len(pieces) != len(parts):
                raise ValueError(text)
            return tuple(_convert(part, piece) for part, piece in zip(parts, pieces, strict=True))
        converted = [_convert(parts[0] if parts else str, piece) for piece in pieces]
        return converted if origin is list else tuple(converted)
    raise ValueError(text)


def _describe(kind: Any) -> str:
    arms = [arm for arm in _arms(kind) if arm is not type(None)]
    if len(arms) > 1:
        return " or ".join(_describe(arm) for arm in arms)
    kind = arms[0]
    origin, parts = typing.get_origin(kind) or kind, typing.get_args(kind)
    if origin is Literal:
        return "one of " + ", ".join(str(choice) for choice in parts)
    if origin in (tuple, list):
        inner = [_describe(part) for part in parts if part is not Ellipsis]
        return "values with commas between them" + (f" (each {inner[0]})" if inner else "")
    names = {int: "a whole number", float: "a number", bool: "true or false", Path: "a path", str: "text"}
    return names.get(origin, str(kind))


def _valid(parameters: dict[str, inspect.Parameter]) -> str:
    if not parameters:
        return "It takes no options of its own."
    return "Valid options: " + ", ".join(map(_flag, parameters)) + "."


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")

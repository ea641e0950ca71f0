"""`Config`: frozen dataclasses that validate themselves and survive a round trip through dicts and JSON."""

from __future__ import annotations

import dataclasses
import difflib
import enum
import json
import numbers
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, TypeVar

from pared_hooks.errors import ConfigError

ConfigType = TypeVar("ConfigType", bound="Config")


@dataclasses.dataclass(frozen=True)
class Config:
    """Base of all configurations: subclass it as a frozen dataclass.

    `__post_init__` checks every field against its annotation, turns lists into the tuples the annotation asks for and
    integers into floats. A subclass adds its own rules after `super().__post_init__()`, each one a call of `check`.
    When `schema` is set, `to_dict` writes it under the key "schema" and `from_dict` refuses a different one.

    Raises `ConfigError` (a `ValueError`) that names the field, the value and what is valid.
    """

    schema: ClassVar[str | None] = None

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            converted = _convert(value, hints[field.name], f"{type(self).__name__}.{field.name}", field.name)
            if converted is not value:
                object.__setattr__(self, field.name, converted)

    def check(self, condition: bool, field: str, value: object, valid: str) -> None:
        """Raise `ConfigError` for `field` unless `condition` holds; `valid` says what would be accepted."""
        if not condition:
            raise ConfigError(f"{type(self).__name__}.{field} = {value!r} is not valid: {valid}", field)

    def replace(self: ConfigType, **changes: Any) -> ConfigType:
        """Return a validated copy with some fields changed."""
        _refuse_unknown(type(self), changes)
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON types: nested configs become dicts, tuples become lists."""
        plain = {field.name: _plain(getattr(self, field.name), field.name) for field in dataclasses.fields(self)}
        return plain if self.schema is None else {"schema": self.schema, **plain}

    @classmethod
    def from_dict(cls: type[ConfigType], values: Mapping[str, Any]) -> ConfigType:
        """Build from `to_dict` output; an unknown key raises `ConfigError` naming it and the nearest valid one."""
        if not isinstance(values, Mapping):
            raise ConfigError(f"{cls.__name__}.from_dict takes a mapping, got {type(values).__name__}")
        values = dict(values)
        if cls.schema is not None:
            schema = values.pop("schema", None)
            if schema != cls.schema:
                raise ConfigError(f"{cls.__name__} reads schema {cls.schema!r}, got {schema!r}", "schema")
        _refuse_unknown(cls, values)
        missing = [
            field.name
            for field in dataclasses.fields(cls)
            if field.name not in values
            and field.default is dataclasses.MISSING
            and field.default_factory is dataclasses.MISSING
        ]
        if missing:
            raise ConfigError(f"{cls.__name__} needs {', '.join(missing)}", missing[0])
        return cls(**values)

    def to_json(self, indent: int | None = 2) -> str:
        """Return the configuration as standard JSON; a NaN or infinite number raises `ConfigError`."""
        values = self.to_dict()
        for name, value in values.items():
            try:
                json.dumps(value, allow_nan=False)
            except ValueError:
                raise ConfigError(f"{type(self).__name__}.{name} = {value!r} has no JSON form", name) from None
        return json.dumps(values, indent=indent)

    @classmethod
    def from_json(cls: type[ConfigType], text: str | bytes) -> ConfigType:
        """Build from `to_json` output; text that is not a JSON object raises `ConfigError`."""
        try:
            values = json.loads(text)
        except ValueError as error:
            raise ConfigError(f"{cls.__name__}.from_json: not JSON ({error})") from None
        return cls.from_dict(values)


def _refuse_unknown(cls: type[Config], values: Mapping[str, Any]) -> None:
    valid = [field.name for field in dataclasses.fields(cls)]
    for key in values:
        if key in valid:
            continue
        near = difflib.get_close_matches(str(key), valid, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ConfigError(f"{cls.__name__} has no field {key!r}; {hint}valid: {', '.join(valid) or 'none'}", str(key))


def _plain(value: Any, field: str) -> Any:
    if isinstance(value, Config):
        return value.to_dict()
    if isinstance(value, enum.Enum):
        return value.value
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item, field) for key, item in value.items()}
    if isinstance(value, Sequence | set | frozenset):
        return [_plain(item, field) for item in value]
    raise ConfigError(f"{field}: {type(value).__name__} has no JSON form", field)


def _convert(value: Any, expected: Any, path: str, field: str) -> Any:
    """Return `value` as `expected`, converting only what JSON cannot tell apart; otherwise raise `ConfigError`."""
    origin, arguments = typing.get_origin(expected), typing.get_args(expected)
    if expected is Any or isinstance(expected, TypeVar):
        return value
    if origin in (typing.Union, types.UnionType):
        return _convert_union(value, expected, path, field)
    if origin is typing.Annotated:
        return _convert(value, arguments[0], path, field)
    if origin is typing.Literal:
        if any(value == choice and type(value) is type(choice) for choice in arguments):
            return value
        raise _type_error(value, expected, path, field)
    if expected is tuple or origin is tuple:
        return _convert_tuple(value, arguments, path, field, expected)
    if origin is not None and isinstance(origin, type) and issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            raise _type_error(value, expected, path, field)
        return {
            _convert(key, arguments[0], path, field): _convert(item, arguments[1], f"{path}[{key!r}]", field)
            for key, item in value.items()
        }
    if origin is not None:
        expected = origin
    if expected is None or expected is type(None):
        if value is None:
            return value
    elif not isinstance(expected, type):
        return value
    elif issubclass(expected, Config) and isinstance(value, Mapping):
        return expected.from_dict(value)
    elif issubclass(expected, enum.Enum) and not isinstance(value, expected):
        try:
            return expected(value)
        except ValueError:
            valid = ", ".join(repr(member.value) for member in expected)
            raise ConfigError(f"{path} = {value!r} is not valid: one of {valid}", field) from None
    elif expected is float:
        if isinstance(value, numbers.Real) and not isinstance(value, bool):
            return value if type(value) is float else float(value)
    elif expected is int:
        if isinstance(value, numbers.Integral) and not isinstance(value, bool):
            return value if type(value) is int else int(value)
    elif isinstance(value, expected):
        return value
    raise _type_error(value, expected, path, field)


def _convert_union(value: Any, expected: Any, path: str, field: str) -> Any:
    members = typing.get_args(expected)
    # An exact match wins, so that `int | float` keeps an integer an integer.
    if any(isinstance(member, type) and type(value) is member for member in members):
        return value
    errors: list[ConfigError] = []
    for member in members:
        try:
            return _convert(value, member, path, field)
        except ConfigError as error:
            errors.append(error)
    if isinstance(value, Mapping):
        raise errors[0]
    raise _type_error(value, expected, path, field)


def _convert_tuple(value: Any, arguments: tuple[Any, ...], path: str, field: str, expected: Any) -> Any:
    if not isinstance(value, list | tuple):
        raise _type_error(value, expected, path, field)
    if not arguments:
        return tuple(value)
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        item_types: Sequence[Any] = [arguments[0]] * len(value)
    elif len(arguments) == len(value):
        item_types = arguments
    else:
        raise ConfigError(f"{path} = {value!r} is not valid: {len(arguments)} items", field)
    items = tuple(
        _convert(item, item_type, f"{path}[{index}]", field)
        for index, (item, item_type) in enumerate(zip(value, item_types, strict=True))
    )
    unchanged = isinstance(value, tuple) and all(new is old for new, old in zip(items, value, strict=True))
    return value if unchanged else items


def _type_error(value: Any, expected: Any, path: str, field: str) -> ConfigError:
    if typing.get_origin(expected) is typing.Literal:
        valid = "one of " + ", ".join(repr(choice) for choice in typing.get_args(expected))
    else:
        valid = expected.__name__ if isinstance(expected, type) else str(expected).replace("typing.", "")
    return ConfigError(f"{path} = {value!r} is not valid: {valid}", field)

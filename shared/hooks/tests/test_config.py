"""Config: validation on construction and the round trip through dicts and JSON."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pared_hooks import Config, ConfigError


class Mode(enum.Enum):
    FAST = "fast"
    EXACT = "exact"


@dataclass(frozen=True)
class Policy(Config):
    schema: ClassVar[str | None] = "test.policy/1"
    depth: tuple[int, ...]
    ratio: tuple[float, ...] | float = 0.4


@dataclass(frozen=True)
class Settings(Config):
    policy: Policy | str = "uniform-10"
    patch: tuple[int, int] = (2, 2)
    gamma: float = 1.0
    seed: int | None = 0
    choice: Literal["kept", "base"] = "kept"
    mode: Mode = Mode.FAST
    normalize: bool = True
    names: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(self.gamma >= 0, "gamma", self.gamma, "a number >= 0")


policies = st.builds(
    Policy,
    depth=st.lists(st.integers(-1, 50), max_size=5).map(tuple),
    ratio=st.floats(0, 1) | st.lists(st.floats(0, 1), max_size=5).map(tuple),
)
settings_ = st.builds(
    Settings,
    policy=policies | st.text(),
    patch=st.tuples(st.integers(), st.integers()),
    gamma=st.floats(0, 1e300),
    seed=st.none() | st.integers(),
    choice=st.sampled_from(["kept", "base"]),
    mode=st.sampled_from(list(Mode)),
    normalize=st.booleans(),
    names=st.dictionaries(st.text(), st.lists(st.integers(), max_size=3).map(tuple), max_size=3),
)


@given(settings_)
def test_json_brings_back_an_equal_config(settings):
    assert Settings.from_json(settings.to_json()) == settings


@given(settings_)
def test_a_dict_brings_back_an_equal_config(settings):
    assert Settings.from_dict(settings.to_dict()) == settings


def test_a_nested_config_becomes_a_config_again():
    settings = Settings(policy=Policy((0, 1)), patch=(1, 2))
    assert settings.to_dict()["policy"] == {"schema": "test.policy/1", "depth": [0, 1], "ratio": 0.4}
    assert Settings.from_json(settings.to_json()).policy == Policy((0, 1))


def test_an_unknown_key_names_itself_and_the_nearest_valid_one():
    with pytest.raises(ConfigError, match="no field 'gama'; did you mean 'gamma'") as caught:
        Settings.from_dict({"gama": 1})
    assert caught.value.field == "gama"


def test_replace_refuses_an_unknown_field():
    with pytest.raises(ConfigError, match="no field 'sead'"):
        Settings().replace(sead=1)


def test_replace_validates():
    with pytest.raises(ConfigError, match=r"Settings\.gamma = -1\.0 is not valid: a number >= 0") as caught:
        Settings().replace(gamma=-1)
    assert caught.value.field == "gamma"


@pytest.mark.parametrize(
    ("field_name", "value", "message"),
    [
        ("seed", 1.5, "int | None"),
        ("seed", True, "int | None"),
        ("gamma", "1", "float"),
        ("normalize", 1, "bool"),
        ("choice", "best", "one of 'kept', 'base'"),
        ("mode", "slow", "one of 'fast', 'exact'"),
        ("patch", (1, 2, 3), "2 items"),
        ("patch", 3, "tuple"),
    ],
)
def test_a_wrong_type_names_field_value_and_what_is_valid(field_name, value, message):
    with pytest.raises(ConfigError) as caught:
        Settings(**{field_name: value})
    assert caught.value.field == field_name
    assert message in str(caught.value)
    assert repr(value) in str(caught.value)


def test_a_missing_required_field_is_named():
    with pytest.raises(ConfigError, match="Policy needs depth"):
        Policy.from_dict({"schema": "test.policy/1"})


def test_another_schema_is_refused():
    with pytest.raises(ConfigError, match=r"reads schema 'test\.policy/1', got 'test\.policy/2'"):
        Policy.from_dict({"schema": "test.policy/2", "depth": []})


def test_an_infinite_number_has_no_json_form():
    with pytest.raises(ConfigError, match=r"Settings\.gamma = inf has no JSON form"):
        Settings(gamma=float("inf")).to_json()


def test_text_that_is_no_json_object_is_refused():
    with pytest.raises(ConfigError, match="not JSON"):
        Settings.from_json("{")
    with pytest.raises(ConfigError, match="takes a mapping"):
        Settings.from_json("[1]")


def test_integers_become_floats_where_a_float_is_declared():
    assert isinstance(Settings(gamma=2).gamma, float)

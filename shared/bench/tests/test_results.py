from __future__ import annotations

import numpy as np
import pytest
from pared_bench import Figure, Record, Table


def test_a_table_row_of_the_wrong_length_is_refused_with_its_place() -> None:
    with pytest.raises(ValueError, match=r"rows\[1\] of table 't' has 1 cells for 2 columns"):
        Table("t", ["a", "b"], [[1, 2], [3]])


def test_a_figure_refuses_bytes_that_are_no_png() -> None:
    with pytest.raises(ValueError, match="is not PNG data"):
        Figure("f", b"<svg>")


def test_an_array_becomes_a_png_of_its_size() -> None:
    from io import BytesIO

    from PIL import Image

    figure = Figure.from_image("f", np.zeros((4, 6, 3), np.uint8))
    assert Image.open(BytesIO(figure.png)).size == (6, 4)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "fast"])
def test_a_record_refuses_a_value_that_is_no_finite_number(value: object) -> None:
    with pytest.raises(ValueError, match="value of 'time'"):
        Record("m", "v", "time", value, "ms")  # type: ignore[arg-type]


def test_an_absent_value_needs_a_reason() -> None:
    with pytest.raises(ValueError, match="note must say why"):
        Record("m", "v", "energy", None, "J")
    assert Record("m", "v", "energy", None, "J", note="no counter").value is None


def test_a_setting_that_json_cannot_hold_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"settings\['shape'\]"):
        Record("m", "v", "time", 1.0, "ms", {"shape": {1, 2}})


def test_a_tuple_and_a_list_setting_give_the_same_key() -> None:
    first = Record("m", "v", "time", 1.0, "ms", {"shape": (1, 2), "dtype": "float16"})
    second = Record("m", "v", "time", 2.0, "ms", {"dtype": "float16", "shape": [1, 2]})
    assert first.key() == second.key()


def test_a_record_survives_the_round_trip_through_a_dict() -> None:
    record = Record("m", "v", "time", 1.5, "ms", {"steps": 50}, spread=(1.4, 1.7), samples=20, note="why")
    assert Record.from_dict(record.to_dict()) == record


def test_a_reversed_spread_is_refused() -> None:
    with pytest.raises(ValueError, match=r"must be \(low, high\)"):
        Record("m", "v", "time", 1.0, "ms", spread=(2.0, 1.0))


def test_an_unknown_field_is_named() -> None:
    with pytest.raises(ValueError, match="no field 'speed'"):
        Record.from_dict({**Record("m", "v", "time", 1.0, "ms").to_dict(), "speed": 1})

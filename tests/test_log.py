"""Numbers as people read them."""

from __future__ import annotations

import pytest

from internlm.log import Progress, duration, quantity, size


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (999.4, "999"), (999.9, "1k"), (41234, "41.2k"), (999_960, "1M"), (7.32e9, "7.32B"), (1.6e12, "1.6T")],
)
def test_quantities_have_three_digits_and_a_unit(value: float, text: str) -> None:
    assert quantity(value) == text


@pytest.mark.parametrize(("value", "text"), [(0, "0 B"), (999, "999 B"), (1e3, "1 kB"), (1.61e9, "1.61 GB")])
def test_bytes_are_no_counts(value: float, text: str) -> None:
    assert size(value) == text


@pytest.mark.parametrize("unit", ["bytes", "texts"])
def test_progress_says_how_much_of_how_much(unit: str, capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("copying", 4e9, unit) as shown:
        shown.advance(1e9)
    said = {"bytes": "copying: 1 GB of 4 GB (25%) | ", "texts": "copying: 1B texts of 4B texts (25%) | "}[unit]
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("seconds", "text"), [(8, "8s"), (59.6, "1m00s"), (200, "3m20s"), (18720, "5h12m"), (183600, "2d3h")]
)
def test_durations_are_said_in_two_units(seconds: float, text: str) -> None:
    assert duration(seconds) == text

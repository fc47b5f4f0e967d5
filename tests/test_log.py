"""Numbers as people read them."""

from __future__ import annotations

import pytest

from internlm.log import duration, quantity


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (999.4, "999"), (999.9, "1k"), (41234, "41.2k"), (999_960, "1M"), (7.32e9, "7.32B"), (1.6e12, "1.6T")],
)
def test_quantities_have_three_digits_and_a_unit(value: float, text: str) -> None:
    assert quantity(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(8, "8s"), (59.6, "1m00s"), (200, "3m20s"), (18720, "5h12m"), (183600, "2d3h")]
)
def test_durations_are_said_in_two_units(seconds: float, text: str) -> None:
    assert duration(seconds) == text

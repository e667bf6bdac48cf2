"""Quantities and times as people read them."""

import pytest

from tproxy_relay.cli.humanize import amount, lasted


@pytest.mark.parametrize(
    "seconds, text",
    [
        (0, "0 ms"), (0.0005, "0.5 ms"), (0.0234, "23 ms"), (0.9994, "999 ms"), (1, "1 s"), (59.4, "59.4 s"),
        (60, "1 min"), (3599, "59 min 59 s"), (3600, "1 h"), (86399, "23 h 59 min"), (90000, "1 d 1 h"),
    ],
)  # fmt: skip
def test_how_long(seconds: float, text: str) -> None:
    assert lasted(seconds) == text


@pytest.mark.parametrize(
    "number, text",
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (102400, "100 KiB"), (1 << 20, "1.0 MiB"), (5 << 50, "5120 TiB")],
)
def test_how_much(number: float, text: str) -> None:
    assert amount(number) == text

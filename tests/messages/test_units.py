from __future__ import annotations

import pytest

from paca.messages.errors import PacaError
from paca.messages.units import format_bytes, format_duration, parse_bytes


@pytest.mark.parametrize(
    ("text", "count"),
    [("24GiB", 24 * 2**30), ("80 GB", 80 * 10**9), ("1.5g", 1_500_000_000), ("500MiB", 500 * 2**20), ("4096", 4096)],
)
def test_memory_is_read_as_people_write_it(text: str, count: int) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "much", "-3GiB", "0GB", "24 PiB", "2 giga", "GiB"])
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(PacaError, match="24GiB"):
        parse_bytes(text)


@pytest.mark.parametrize(("text", "meant"), [("24", "24GiB"), (" 1.5", "1.5GiB"), ("2048", "2048MiB")])
def test_a_few_bytes_are_taken_for_a_forgotten_unit(text: str, meant: str) -> None:
    with pytest.raises(PacaError, match=rf"Did you mean {meant}\?"):
        parse_bytes(text)
    assert parse_bytes("24B") == 24


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.50 KiB"), (-(3 * 2**30), "-3.00 GiB"), (2**52, "4096.00 TiB")],
)
def test_memory_is_shown_in_the_largest_unit(count: int, text: str) -> None:
    assert format_bytes(count) == text


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00"), (65, "1:05"), (3599.6, "1:00:00"), (3725, "1:02:05")])
def test_durations_are_shown_as_on_a_clock(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text

"""Counts in messages."""

from __future__ import annotations

from forgetfilter_callback.utils.counted import counted


def test_one_of_a_kind_is_in_the_singular():
    assert [counted(number, "check") for number in (0, 1, 2, 2000)] == [
        "0 checks",
        "1 check",
        "2 checks",
        "2,000 checks",
    ]

"""Counts in messages."""

from __future__ import annotations

from forgetfilter_callback.utils.counted import counted, counted_of


def test_one_of_a_kind_is_in_the_singular():
    assert [counted(number, "check") for number in (0, 1, 2, 2000)] == [
        "0 checks",
        "1 check",
        "2 checks",
        "2,000 checks",
    ]


def test_a_share_agrees_with_its_verb():
    assert counted_of(1, 12, "row", "have") == "1 of 12 rows has"
    assert counted_of(2, 1200, "row", "were") == "2 of 1,200 rows were"
    assert counted_of(0, 2, "row", "do") == "0 of 2 rows do"
    assert counted_of(1, 1, "row", "are") == "1 of 1 row is"

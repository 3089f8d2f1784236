"""The tables of the measures are complete."""

from __future__ import annotations

from forgetfilter_callback.filtering.thresholds import BASE_THRESHOLD
from forgetfilter_callback.measures.names import DEFAULT_MEASURE, MEANINGS, MEASURES, UNITS


def test_each_measure_has_a_unit_a_meaning_and_a_threshold():
    assert list(UNITS) == list(MEANINGS) == list(MEASURES) and set(BASE_THRESHOLD) == set(MEASURES)
    assert DEFAULT_MEASURE in MEASURES

"""Writing rows as JSON lines."""

from __future__ import annotations

from pathlib import Path

from forgetfilter_callback.data.output_lines import to_json_lines


def test_rows_as_json_lines():
    assert list(to_json_lines([{"é": Path("a"), "b": 1}, {}])) == ['{"é": "a", "b": 1}', "{}"]

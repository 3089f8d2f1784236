"""A failed write leaves the old file unchanged."""

from __future__ import annotations

import numpy as np
import pytest
from trace_helpers import STEPS

from forgetfilter_callback.utils.atomic_files import write_json, write_lines, write_text


def test_a_failed_write_leaves_the_old_file(tmp_path, trace):
    for write, content in ((write_text, "old"), (write_json, {"ä": [1]}), (write_lines, ["a", "ü"])):
        file = tmp_path / write.__name__
        write(content, file)
        written = file.read_bytes()
        with pytest.raises((TypeError, UnicodeEncodeError)):
            write({"a": object()} if write is write_json else "\ud800", file)
        assert file.read_bytes() == written
    assert (tmp_path / "write_text").read_text() == "old"
    assert (tmp_path / "write_json").read_text(encoding="utf-8") == '{\n  "ä": [\n    1\n  ]\n}\n'
    assert (tmp_path / "write_lines").read_text(encoding="utf-8") == "a\nü\n"
    before = trace.token_losses(STEPS[0])

    def broken():
        yield from ()
        raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError):
        trace.append(STEPS[0], broken())
    np.testing.assert_array_equal(trace.token_losses(STEPS[0]), before)
    assert not [file for file in tmp_path.rglob("*") if file.name.endswith(".tmp")]

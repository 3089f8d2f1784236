"""Audit labels mean the same wherever they are given."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import hostile_trace

from forgetfilter_callback import FilterConfig, ForgetTracker, find_forgotten
from forgetfilter_callback.data.audit_labels import as_labels
from forgetfilter_callback.errors import DataError
from forgetfilter_callback.reports.review_page import write_review_page


UNSAFE = [True, 1, 0.5, -1, "true", "TRUE", "1", np.True_, np.int64(3), np.float32(2), torch.tensor(True)]
SAFE = [False, 0, 0.0, "false", "False", "0", np.False_, np.int8(0), torch.tensor(0)]
MISSING = [None, float("nan"), np.float64("nan"), np.nan, pd.NA, pd.NaT, "", "nan", "yes", [True], {"unsafe": True}]


def test_booleans_numbers_and_their_text_are_labels():
    labels = as_labels([*UNSAFE, *SAFE], "The column 'x'")
    assert labels.dtype == bool and labels.tolist() == [True] * len(UNSAFE) + [False] * len(SAFE)


@pytest.mark.parametrize("missing", MISSING, ids=repr)
def test_the_tracker_and_the_column_of_a_file_refuse_the_same_labels(missing):
    message = "The column 'unsafe' must hold true/false or numbers in each row, but row 2 holds "
    with pytest.raises(DataError, match=message):
        as_labels([True, False, missing], "The column 'unsafe'")
    rows = [{"input_ids": [1, 2], "unsafe": value} for value in ("False", 1, missing)]
    with pytest.raises(DataError, match=message):
        ForgetTracker(rows, audit_column="unsafe")
    assert ForgetTracker(rows[:2], audit_column="unsafe")._unsafe.tolist() == [False, True]


@pytest.mark.parametrize("missing", [None, float("nan")])
def test_missing_labels_are_refused_as_arguments_too(missing, tmp_path, byte_tokenizer):
    trace, _ = hostile_trace(tmp_path / "trace", byte_tokenizer, samples=6)
    unsafe = [True, False, True, False, missing, True]
    with pytest.raises(DataError, match="`unsafe` must hold true/false or numbers in each row, but row 4 holds"):
        write_review_page(trace, tmp_path / "page.html", byte_tokenizer, FilterConfig("loss"), unsafe)
    with pytest.raises(DataError, match=r"`unsafe` must hold .* row 4"):
        find_forgotten(trace, FilterConfig("loss")).by_source(["a"] * 6, unsafe=unsafe)

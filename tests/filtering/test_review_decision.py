"""Reading a decision exported from the review page."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset
from helpers import sample_ids
from trace_helpers import STEPS, scores_of

from forgetfilter_callback import FilterConfig
from forgetfilter_callback.errors import DecisionError
from forgetfilter_callback.filtering.filter_by_values import filter_by_values
from forgetfilter_callback.filtering.review_decision import ReviewDecision
from forgetfilter_callback.measures.names import MEASURES
from forgetfilter_callback.trace.records import Record


REVIEW = {"measure": "loss", "threshold": 0.5, "overrides": {"id-1": "keep", "id-2": "remove"}, "trace": "t"}


def load_review(folder: Path, **changes: object) -> ReviewDecision:
    (folder / "review_decision.json").write_text(json.dumps(REVIEW | changes), encoding="utf-8")
    return ReviewDecision.load(folder / "review_decision.json")


def test_an_exported_decision_is_read(tmp_path):
    assert load_review(tmp_path, more="is ignored") == ReviewDecision(**REVIEW)
    nothing = load_review(tmp_path, threshold=None, overrides={})
    assert nothing.threshold is None and nothing.overrides == {}


def test_a_decision_on_other_records_is_refused(trace, tmp_path):
    """Only decisions by `relative` depend on the base model. Those of older versions did not say so, and stay valid."""
    decided = {measure: load_review(tmp_path, measure=measure, trace=trace.identity(measure)) for measure in MEASURES}
    older = load_review(tmp_path, measure="relative", trace=trace.identity())

    def refused() -> set[str]:
        names = set()
        for name, decision in (*decided.items(), ("older", older)):
            try:
                decision.check(trace)
            except DecisionError as error:
                assert "or before a record of this trace was written or replaced" in str(error)
                names.add(name)
        return names

    assert refused() == set()
    trace.append(STEPS[0], [scores_of(trace.rows, Record("noisy", 99))])  # another base model
    assert refused() == {"relative"}
    trace.append(STEPS[4], [scores_of(trace.rows, Record("safety", 99))])
    assert refused() == {*MEASURES, "older"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"measure": "bleu"}, '"measure" must be one of combined, loss, relative, pooled, smoothed, rouge1'),
        ({"threshold": math.inf}, '"threshold" a number or null'),
        ({"overrides": {"id-1": "perhaps"}}, 'every value of "overrides" "keep" or "remove"'),
        ({"threshold": "high"}, '"threshold" a number or null'),
        ({"threshold": "0.5"}, '"threshold" a number or null'),
        ({"threshold": True}, '"threshold" a number or null'),
        ({"threshold": [0.5]}, '"threshold" a number or null'),
        ({"measure": ["loss"]}, '"measure" must be one of combined, loss'),
        ({"overrides": 3}, 'every value of "overrides" "keep" or "remove"'),
        ({"overrides": ["keep"]}, 'every value of "overrides" "keep" or "remove"'),
        ({"overrides": {"id-1": ["keep"]}}, 'every value of "overrides" "keep" or "remove"'),
    ],
    ids=str,
)
def test_invalid_decisions_are_refused(changes, message, tmp_path):
    with pytest.raises(DecisionError, match=rf"review_decision\.json is not a.*{message}"):
        load_review(tmp_path, **changes)


def test_files_that_are_not_a_decision_are_refused(tmp_path):
    with pytest.raises(DecisionError, match=r"does not exist\. Export review_decision\.json from the report"):
        ReviewDecision.load(tmp_path / "nothing.json")
    for name in REVIEW:
        (tmp_path / "review_decision.json").write_text(json.dumps({key: REVIEW[key] for key in REVIEW if key != name}))
        with pytest.raises(DecisionError, match=rf"is not a reviewer's decision: it has no {name}\."):
            ReviewDecision.load(str(tmp_path / "review_decision.json"))
    for content in (b"", b"{", b"[]", b"[1]", b"3", b"null", b'"loss"', b"{}", b"\xff\xfe", b"model: m\n", b"PAR1\x00"):
        (tmp_path / "review_decision.json").write_bytes(content)
        with pytest.raises(DecisionError, match="is not a reviewer's decision"):
            ReviewDecision.load(tmp_path / "review_decision.json")
    with pytest.raises(DecisionError, match="is not a reviewer's decision"):
        ReviewDecision.load(tmp_path)


def test_a_decision_with_a_byte_order_mark_is_read(tmp_path):
    (tmp_path / "review_decision.json").write_text(json.dumps(REVIEW), encoding="utf-8-sig")
    assert ReviewDecision.load(tmp_path / "review_decision.json") == ReviewDecision(**REVIEW)


def test_other_files_of_the_library_are_named(trace, tmp_path):
    trace.begin_session("noisy", "out", 6, "abc")
    (tmp_path / "early_stopping.json").write_text(json.dumps([{"step": 8, "spearman": None, "forgetting": [0.5]}]))
    for file, message in (
        (trace.folder / "manifest.json", r"manifest\.json is the manifest of a trace"),
        (tmp_path / "early_stopping.json", r"early_stopping\.json is the checks of early stopping"),
    ):
        with pytest.raises(DecisionError, match=message):
            ReviewDecision.load(file)


@pytest.mark.parametrize("with_rows", [False, True])
def test_a_filter_result_is_not_a_decision(with_rows, tmp_path):
    result = filter_by_values(sample_ids(3), np.array([0.0, 0.1, 3.0]), FilterConfig("loss"))
    result.save(tmp_path, Dataset.from_list([{"text": "a"}]) if with_rows else None)
    with pytest.raises(DecisionError) as raised:
        ReviewDecision.load(tmp_path / "filter_result.json")
    message = str(raised.value)
    assert message.startswith(f"{tmp_path / 'filter_result.json'} is a filter result (filter_result.json)")
    assert "A reviewer's decision is needed here" in message
    assert "Export review_decision.json from the report" in message


def test_a_filter_result_is_recognized_under_another_name(tmp_path):
    filter_by_values(sample_ids(3), np.array([0.0, 0.1, 3.0]), FilterConfig("loss")).save(tmp_path)
    (tmp_path / "filter_result.json").rename(tmp_path / "review_decision.json")
    with pytest.raises(DecisionError, match=r"review_decision\.json is a filter result \(filter_result\.json\)"):
        ReviewDecision.load(tmp_path / "review_decision.json")

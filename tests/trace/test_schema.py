"""Manifests, rows and records that do not fit the schema are refused."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import train_tracked
from trace_helpers import STEPS, scores_of

from forgetfilter_callback import ForgetTracker, Trace
from forgetfilter_callback.errors import TraceError
from forgetfilter_callback.scoring.scores import Scores
from forgetfilter_callback.trace.records import Record


def test_missing_columns_name_the_option(trace, rows):
    trace.append(Record("noisy", 2), [Scores(scores_of(rows, STEPS[0]).losses)])
    with pytest.raises(TraceError, match=r"has no column 'rouge1'\. Record with `ForgetTracker\(rouge1=True\)`"):
        trace.rouge1(Record("noisy", 2))
    with pytest.raises(TraceError, match=r"has no column 'state'\..*measure pooled or loss"):
        trace.states(Record("noisy", 2))
    pq.write_table(pa.table({"other": [1]}), trace.folder / "records" / "noisy-00000003.parquet")
    with pytest.raises(TraceError, match=r"has no column 'loss'\. The file is not a record of this library"):
        trace.token_losses(Record("noisy", 3))


def test_rows_without_padding(trace, rows):
    """With a mask and without one: older versions wrote none."""
    file = trace.folder / "rows.parquet"
    opened = [Trace.open(trace.folder)]
    pq.write_table(pq.read_table(file).drop_columns("attention_mask"), file)
    opened.append(Trace.open(trace.folder))
    for each in opened:
        assert each.rows.attention_mask.all() and each.rows.attention_mask.shape == rows.tokens.shape
        assert each.rows.attention_mask.strides == (0,)  # it takes no memory
    pq.write_table(pq.read_table(file).append_column("attention_mask", pa.array([1] * len(rows))), file)
    expected = r"^rows\.parquet in .* must have the columns id, input_ids, loss_mask, attention_mask"
    with pytest.raises(TraceError, match=expected):
        Trace.open(trace.folder)


def test_records_of_other_data_are_refused(trace, rows):
    file = trace.folder / "records" / "noisy-00000004.parquet"
    pq.write_table(pa.table({"loss": [[1.0]]}), file)
    with pytest.raises(TraceError, match="has 1 row, but the trace has 7"):
        trace.token_losses(Record("noisy", 4))
    losses = pa.array([[0.5] * 3] * 7, pa.large_list(pa.float32()))
    pq.write_table(pa.table({"loss": losses}), file)
    with pytest.raises(TraceError, match="does not have one loss per loss token of the trace"):
        trace.token_losses(Record("noisy", 4))
    pq.write_table(pa.table({"loss": [0.5] * 7}), file)
    with pytest.raises(TraceError, match=r"column 'loss' of the record .* has a wrong type or missing values"):
        trace.token_losses(Record("noisy", 4))
    pq.write_table(pa.table({"loss": pa.array([[0.5] * 3 + [None]] * 7, pa.large_list(pa.float32()))}), file)
    with pytest.raises(TraceError, match=r"column 'loss' of the record .* has a wrong type or missing values"):
        trace.token_losses(Record("noisy", 4))
    file.unlink()
    with pytest.raises(TraceError, match="cannot be read"):
        trace.token_losses(Record("noisy", 4))


def changed(trace: Trace, **others: object) -> None:
    (trace.folder / "manifest.json").write_text(json.dumps(trace.manifest | others))


def test_invalid_manifests_are_refused(trace, tmp_path):
    with pytest.raises(TraceError, match=r"contains no trace \(no manifest.json\)"):
        Trace.open(tmp_path / "elsewhere")
    assert not Trace.exists(tmp_path / "elsewhere") and Trace.exists(trace.folder)
    for name in ("fingerprint", "samples", "sessions"):
        changed(trace, **{name: None})
        with pytest.raises(TraceError, match=f"these keys are missing or have a wrong value: {name}\\."):
            Trace.open(trace.folder)
    entry = {"session": "noisy", "output_dir": "out", "max_steps": 6}
    for sessions in ([3], [entry | {"max_steps": "6"}], [entry | {"training_rows": 6}]):
        changed(trace, sessions=sessions)
        with pytest.raises(TraceError, match=r"missing or have a wrong value: sessions\."):
            Trace.open(trace.folder)
    changed(trace, sessions=[entry])  # of an older version
    assert Trace.open(trace.folder).manifest["sessions"] == [entry]
    changed(trace, schema_version=0)
    with pytest.raises(TraceError, match=r"missing or have a wrong value: schema_version\."):
        Trace.open(trace.folder)
    changed(trace, samples=None, model=3)
    with pytest.raises(TraceError, match=r"missing or have a wrong value: samples, model\."):
        Trace.open(trace.folder)
    changed(trace, schema_version=3)
    with pytest.raises(TraceError, match=r"newer forgetfilter-callback \(schema 3; this version reads schema 2\)"):
        Trace.open(trace.folder)
    changed(trace, schema_version=1)
    with pytest.raises(TraceError, match=r"older forgetfilter-callback \(schema 1; .* Record it again into another"):
        Trace.open(trace.folder)
    changed(trace, fingerprint="other")
    message = r"rows.parquet .* does not match manifest.json: fingerprint is \w+, but the manifest says other"
    with pytest.raises(TraceError, match=message):
        Trace.open(trace.folder)
    for content in ("[]", "{", ""):
        (trace.folder / "manifest.json").write_text(content)
        with pytest.raises(TraceError, match=r"missing or have a wrong value: schema_version|cannot be read"):
            Trace.open(trace.folder)
    changed(trace)
    (trace.folder / "rows.parquet").unlink()
    with pytest.raises(TraceError, match="cannot be read"):
        Trace.open(trace.folder)


def test_unreadable_traces_are_refused(tmp_path, noisy, make_args, collator):
    with pytest.raises(TraceError, match="contains no trace"):
        Trace.open(tmp_path)
    tracker = ForgetTracker()
    train_tracked(noisy, make_args, collator, tracker)
    folder = tracker.trace.folder
    record = folder / "records" / "noisy-00000012.parquet"
    record.write_bytes(record.read_bytes()[:100])
    with pytest.raises(TraceError, match=r"noisy-00000012\.parquet cannot be read"):
        Trace.open(folder).losses()
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "fingerprint": "other"}))
    with pytest.raises(TraceError, match="fingerprint"):
        Trace.open(folder)
    (folder / "manifest.json").write_text(json.dumps({**manifest, "schema_version": 99}))
    with pytest.raises(TraceError, match="Upgrade"):
        Trace.open(folder)

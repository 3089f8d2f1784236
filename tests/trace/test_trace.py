"""What a trace on disk contains, what is read back, and when records are moved to `superseded`."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from trace_helpers import STEPS, record_files, rouge1_of, scores_of

from forgetfilter_callback import Trace, encode_rows
from forgetfilter_callback.data.encoded_rows import WINDOW, EncodedRows
from forgetfilter_callback.errors import TraceError
from forgetfilter_callback.measures.combined import combined_forgetting, forgetting_estimates
from forgetfilter_callback.measures.common import mean_losses
from forgetfilter_callback.measures.loss import loss_forgetting
from forgetfilter_callback.measures.pooled import pooled_forgetting
from forgetfilter_callback.measures.relative import relative_forgetting
from forgetfilter_callback.measures.rouge import rouge_forgetting
from forgetfilter_callback.measures.smoothed import (
    loss_changes,
    nats_per_unit,
    smoothed_forgetting,
    smoothed_over_states,
)
from forgetfilter_callback.scoring.scores import Scores
from forgetfilter_callback.trace.forgetting import compute_forgetting
from forgetfilter_callback.trace.records import Record


def test_the_manifest_describes_the_trace(trace, rows):
    libraries = ("forgetfilter-callback", "transformers", "torch", "peft", "datasets")
    expected = {
        "schema_version": 2,
        "fingerprint": rows.fingerprint,
        "samples": 7,
        "loss_tokens": 28,
        "truncated": 0,
        "model": "a model",
        "tokenizer": "a tokenizer",
        "max_length": 64,
        "encoding": {},
        "versions": {name: version(name) for name in libraries},
        "sessions": [],
    }
    assert trace.manifest == expected
    assert json.loads((trace.folder / "manifest.json").read_text(encoding="utf-8")) == expected
    trace.begin_session("noisy", "out", 6)
    trace.begin_session("safety", "/safe", 8)
    trace.begin_session("noisy", "again", 7, "a hash", loads_best=True)
    trace.set_source("rows.jsonl", "abc", 3, "vendor")
    sessions = [
        {"session": "safety", "output_dir": "/safe", "max_steps": 8, "training_rows": None, "loads_best": False},
        {
            "session": "noisy", "output_dir": os.path.abspath("again"), "max_steps": 7, "training_rows": "a hash",
            "loads_best": True,
        },
    ]  # fmt: skip
    again = Trace.open(trace.folder)
    assert again.manifest == expected | {
        "sessions": sessions,
        "source": "rows.jsonl",
        "source_digest": "abc",
        "source_column": "vendor",
        "truncated": 3,
    }
    assert again.rows.truncated == 3


def test_the_rows_are_read_back(trace, rows):
    table = pq.read_table(trace.folder / "rows.parquet")
    assert table["id"].to_pylist() == rows.ids.to_pylist()
    assert table["input_ids"].to_pylist() == [rows.sample(index)[0].tolist() for index in range(7)]
    assert table["loss_mask"].to_pylist() == [rows.sample(index)[1].tolist() for index in range(7)]
    assert table["attention_mask"].to_pylist() == [[True] * len(tokens) for tokens in table["input_ids"].to_pylist()]
    again = Trace.open(str(trace.folder)).rows
    assert again.ids == rows.ids
    for name in ("tokens", "loss_mask", "attention_mask", "offsets"):
        np.testing.assert_array_equal(getattr(again, name), getattr(rows, name))


def test_records_are_read_back_in_order(trace, rows):
    for name in ("noisy-x.parquet", "S2-00000001.parquet", "notes.txt", ".noisy-00000009.parquet.1.tmp"):
        (trace.folder / "records" / name).write_text("not a record")
    assert trace.records() == STEPS
    assert [record.file_name for record in STEPS[1:3]] == ["noisy-00000006.parquet", "safety-00000000.parquet"]
    means = []
    for record in STEPS:
        scores = scores_of(rows, record)
        assert trace.token_losses(record).tobytes() == scores.losses.tobytes()
        np.testing.assert_array_equal(trace.states(record), scores.states)
        means.append(scores.losses.reshape(7, 4).mean(axis=1, dtype=np.float64))
        np.testing.assert_allclose(trace.mean_losses(record), means[-1], rtol=1e-12)
    np.testing.assert_allclose(trace.losses(), means, rtol=1e-12)
    np.testing.assert_array_equal(trace.rouge1(STEPS[3]), rouge1_of(rows, STEPS[3]))
    texts = pq.read_table(trace.folder / "records" / STEPS[3].file_name)["completion"].to_pylist()
    assert texts == [f"text {i}" for i in range(7)]
    assert repr(trace).endswith(
        "7 rows, records: noisy session, step 0; noisy session, step 6; safety session, step 0; "
        "safety session, step 3; safety session, step 8)"
    )
    assert "trace', 7" in repr(trace)


def test_an_empty_trace(rows, tmp_path):
    trace = Trace.create(tmp_path, rows, "a model", None, None)
    assert trace.records() == [] and trace.losses().shape == (0, 7)
    assert repr(trace).endswith("records: none)")
    with pytest.raises(TraceError, match="already contains a trace"):
        Trace.create(tmp_path, rows, "a model", None, None)


def test_a_trace_of_more_rows_than_a_window(tmp_path):
    count = WINDOW + 3
    tokens = np.random.default_rng(1).integers(0, 9, (count, 3)).astype(np.int32)
    loss_mask = np.tile([False, True, True], count)
    digests = pa.array([f"{index:024x}-0" for index in range(count)])
    rows = EncodedRows(digests, tokens.ravel(), loss_mask, np.ones_like(loss_mask), np.arange(count + 1) * 3)
    trace = Trace.create(tmp_path, rows, "a model", None, None)
    losses = np.random.default_rng(2).random(2 * count).astype(np.float32)
    rouge1 = np.random.default_rng(3).random(count)
    texts = [str(index) for index in range(count)]
    parts = (Scores(losses[start : start + 2 * WINDOW]) for start in (0, 2 * WINDOW))
    trace.append(Record("noisy", 0), parts, texts, rouge1)
    again = Trace.open(tmp_path)
    assert again.rows.ids == rows.ids and again.rows.fingerprint == rows.fingerprint
    assert again.token_losses(Record("noisy", 0)).tobytes() == losses.tobytes()
    np.testing.assert_array_equal(again.rouge1(Record("noisy", 0)), rouge1)
    table = pq.read_table(tmp_path / "records" / "noisy-00000000.parquet")
    assert table["completion"].to_pylist() == texts
    with pytest.raises(ValueError, match="zip"):  # one of two windows
        trace.append(Record("noisy", 1), [Scores(losses[: 2 * WINDOW])])
    assert trace.records() == [Record("noisy", 0)]


@pytest.mark.parametrize("step", [None, 3])
def test_trace_forgetting_equals_the_measure_functions(trace, rows, step):
    offsets, tokens = rows.loss_offsets, rows.loss_tokens
    last = STEPS[3] if step else STEPS[4]
    base, before, after = (scores_of(rows, record).losses for record in (STEPS[0], STEPS[2], last))
    means = [mean_losses(losses, offsets) for losses in (base, before, after)]
    states = scores_of(rows, STEPS[2]).states
    expected = {
        "combined": combined_forgetting(tokens, offsets, before, after, states),
        "loss": loss_forgetting(*means[1:]),
        "relative": relative_forgetting(*means),
        "pooled": pooled_forgetting(tokens, offsets, before, after),
        "smoothed": smoothed_forgetting(tokens, offsets, before, after, states),
        "rouge1": rouge_forgetting(rouge1_of(rows, STEPS[2]), rouge1_of(rows, last)),
    }
    for measure, values in expected.items():
        np.testing.assert_array_equal(trace.forgetting(measure, step), values)
    np.testing.assert_array_equal(trace.forgetting(step=step), expected["combined"])
    assert trace.first_and_last(step) == (STEPS[2], last)
    rises, counts = means[2] - means[1], np.diff(offsets)
    nats = nats_per_unit(expected["smoothed"], rises, counts)
    assert compute_forgetting(trace, "smoothed", step)[1] == pytest.approx(nats)
    # `combined` contains the mean loss, so it would agree with it by construction. Its last estimate decides.
    estimates = forgetting_estimates(loss_changes(tokens, offsets, before, after))
    agreed = smoothed_over_states(estimates[:, 2], states)
    found = compute_forgetting(trace, "combined", step)[1]
    assert found == pytest.approx(nats_per_unit(agreed, rises, counts))
    assert found != pytest.approx(nats_per_unit(expected["combined"], rises, counts))
    assert compute_forgetting(trace, "loss", step)[1] is None


def test_identity_hashes_the_rows_and_the_records_of_the_measure(trace, rows):
    digest = hashlib.blake2b(rows.fingerprint.encode(), digest_size=16)
    for record in (STEPS[2], STEPS[4]):
        digest.update(scores_of(rows, record).losses.tobytes())
    assert trace.identity() == trace.identity("loss") == digest.hexdigest()
    digest.update(scores_of(rows, STEPS[0]).losses.tobytes())  # the base model
    assert trace.identity("relative") == digest.hexdigest()


def test_copying_and_dropping_records(trace):
    trace.copy_record(STEPS[4], Record("safety", 9))
    trace.copy_record(STEPS[4], STEPS[4])
    names = [trace.folder / "records" / record.file_name for record in (STEPS[4], Record("safety", 9))]
    assert names[0].read_bytes() == names[1].read_bytes()
    assert trace.drop_after("safety", 8) == [Record("safety", 9)]
    assert trace.drop_after("noisy", 6) == [] and trace.records() == STEPS
    assert trace.drop_after("safety", 0) == STEPS[3:]
    assert trace.drop_after("noisy", 0) == [STEPS[1], STEPS[2]]  # later sessions are stale too
    assert trace.records() == STEPS[:1]


@pytest.mark.parametrize("copied", [False, True], ids=["appended", "copied"])
@pytest.mark.parametrize(("record", "left"), [(STEPS[0], STEPS[:1]), (STEPS[2], STEPS[:3])], ids=["noisy", "safety"])
def test_a_restarted_session_moves_its_old_records(record, left, copied, trace, rows):
    scores, later = scores_of(rows, STEPS[1]), [other for other in STEPS if other not in left]
    if copied:
        assert trace.copy_record(STEPS[1], record, restart=True) == later
    else:
        assert trace.append(record, [scores], restart=True) == later
    assert trace.records() == left
    assert trace.token_losses(record).tobytes() == scores.losses.tobytes()
    assert trace.append(record, [scores]) == trace.copy_record(record, record) == []  # not a restart


@pytest.mark.parametrize("copied", [False, True], ids=["appended", "copied"])
@pytest.mark.parametrize(("record", "left"), [(STEPS[0], STEPS[:1]), (STEPS[2], STEPS[:3])], ids=["noisy", "safety"])
def test_a_restarted_session_keeps_the_bytes_of_its_old_records(record, left, copied, trace, rows):
    records, superseded = trace.folder / "records", trace.folder / "superseded"
    old = record_files(records)
    if copied:
        trace.copy_record(STEPS[1], record, restart=True)
    else:
        trace.append(record, [scores_of(rows, STEPS[1])], restart=True)
    replaced = [old_record.file_name for old_record in STEPS if old_record not in left] + [record.file_name]
    assert record_files(superseded / "1") == {name: old[name] for name in replaced}
    assert [folder.name for folder in superseded.iterdir()] == ["1"]
    new = record_files(records)
    assert new.keys() == {kept.file_name for kept in left}
    assert [name for name in new if new[name] != old[name]] == [record.file_name]


@pytest.mark.parametrize("copied", [False, True], ids=["appended", "copied"])
def test_a_replaced_record_is_kept_without_a_restart(copied, trace, rows):
    old = record_files(trace.folder / "records")
    if copied:
        trace.copy_record(STEPS[1], STEPS[3])
    else:
        trace.append(STEPS[3], [scores_of(rows, STEPS[1])])
    assert record_files(trace.folder / "superseded") == {f"1/{STEPS[3].file_name}": old[STEPS[3].file_name]}
    new = record_files(trace.folder / "records")
    assert [name for name in old if new[name] != old[name]] == [STEPS[3].file_name]


def test_no_trace_is_created_over_records(trace, rows):
    (trace.folder / "manifest.json").unlink()
    old = record_files(trace.folder)
    with pytest.raises(TraceError, match=r"has records, but no manifest\.json\. Restore it"):
        Trace.create(trace.folder, rows, "another model", None, None)
    assert record_files(trace.folder) == old


def test_no_trace_is_created_of_rows_without_loss_tokens(tmp_path):
    rows = encode_rows([{"input_ids": [5, 6, 7], "labels": [5, -100, -100]}])  # nothing predicts the first token
    with pytest.raises(TraceError, match="No sample has a token that contributes to the loss"):
        Trace.create(tmp_path / "trace", rows, "a model", None, None)
    assert not (tmp_path / "trace").exists()


def test_every_move_gets_its_own_folder(trace, rows):
    old = record_files(trace.folder / "records")
    trace.drop_after("safety", 3)
    trace.drop_after("safety", 0)
    trace.append(STEPS[0], [scores_of(rows, STEPS[1])], restart=True)
    moved = record_files(trace.folder / "superseded")
    assert moved == {
        f"{number}/{record.file_name}": old[record.file_name]
        for number, record in ((1, STEPS[4]), (2, STEPS[3]), (3, STEPS[0]), (3, STEPS[1]), (3, STEPS[2]))
    }
    shutil.rmtree(trace.folder / "superseded" / "1")  # a user makes room
    trace.append(STEPS[0], [scores_of(rows, STEPS[2])], restart=True)
    assert sorted(folder.name for folder in (trace.folder / "superseded").iterdir()) == ["2", "3", "4"]


def test_a_record_that_cannot_be_superseded_is_not_replaced(trace, rows, monkeypatch):
    def on_a_full_disk(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    old = record_files(trace.folder / "records")
    monkeypatch.setattr(shutil, "copyfile", on_a_full_disk)
    with pytest.raises(OSError, match="No space left"):
        trace.append(STEPS[0], [scores_of(rows, STEPS[1])], restart=True)
    assert record_files(trace.folder / "records") == old and record_files(trace.folder / "superseded") == {}


def test_a_first_session_moves_no_records(trace, rows):
    for record in STEPS[:2]:
        (trace.folder / "records" / record.file_name).unlink()
    assert trace.append(STEPS[0], [scores_of(rows, STEPS[0])], restart=True) == []
    assert trace.records() == [STEPS[0], *STEPS[2:]]


def test_records_are_moved_last_first(trace, monkeypatch):
    """If a crash interrupts the move, the remaining records of the session show that later records are stale."""
    moved: list[str] = []
    monkeypatch.setattr(os, "replace", lambda source, target: moved.append(Path(source).name))
    trace.drop_after("noisy", 0)
    assert moved == [record.file_name for record in STEPS[:0:-1]]


@pytest.mark.parametrize(
    ("gone", "measure", "step", "message"),
    [
        (STEPS[2:], "loss", None, "has records of noisy finetuning only"),
        (STEPS[2:3], "loss", None, r"no record at step 0 \(its first record is at step 3\)"),
        (STEPS[3:], "loss", None, "a record at step 0 only"),
        ([], "loss", 5, r"no record at step 5\. Its records are at steps \[0, 3, 8\]"),
        ([], "loss", 0, "measured from step 0 of the safety session"),
        (STEPS[:1], "relative", None, "measure='relative' needs the losses of all rows under the base model"),
    ],
)
def test_missing_records_are_explained(trace, gone, measure, step, message):
    for record in gone:
        (trace.folder / "records" / record.file_name).unlink()
    with pytest.raises(TraceError, match=message):
        trace.forgetting(measure, step)


@pytest.mark.parametrize("step", [True, 3.0, -1, "8"])
def test_steps_are_whole_numbers(trace, step):
    """`True` would be step 1."""
    with pytest.raises(ValueError, match=rf"^step={step!r} must be a whole number of at least 0\.$"):
        trace.forgetting("loss", step)


def test_unknown_measures_are_refused(trace):
    with pytest.raises(
        ValueError, match=r"'bleu' is unknown\. Choose one of combined, loss, relative, pooled, smoothed, rouge1"
    ):
        trace.forgetting("bleu")


def test_the_base_record_is_the_first_noisy_record(trace):
    assert trace.base_record == Record("noisy", 0)
    (trace.folder / "records" / STEPS[0].file_name).unlink()
    assert trace.base_record is None


def test_completions_without_scores_are_not_written(rows, tmp_path):
    trace = Trace.create(tmp_path, rows, "a model", None, None)
    trace.append(Record("noisy", 0), [scores_of(rows, STEPS[0])], completions=["text"] * 7)
    assert pq.read_schema(tmp_path / "records" / "noisy-00000000.parquet").names == ["loss", "state"]


def test_a_file_is_not_a_trace(trace):
    with pytest.raises(TraceError, match=r"manifest\.json is a file\. Pass the folder of a trace"):
        Trace.open(trace.folder / "manifest.json")

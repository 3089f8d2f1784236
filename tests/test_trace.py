"""A trace on disk, made by hand: what its files hold, what is read from them, and what is refused."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from forgetfilter_callback import Trace, encode_rows
from forgetfilter_callback.data.encoded_rows import WINDOW, EncodedRows
from forgetfilter_callback.data.json_lines import to_json_lines
from forgetfilter_callback.errors import TraceError
from forgetfilter_callback.measures.common import mean_losses
from forgetfilter_callback.measures.loss import loss_forgetting
from forgetfilter_callback.measures.pooled import pooled_forgetting
from forgetfilter_callback.measures.relative import relative_forgetting
from forgetfilter_callback.measures.rouge import rouge_forgetting
from forgetfilter_callback.measures.smoothed import nats_per_unit, smoothed_forgetting
from forgetfilter_callback.scoring.scores import Scores
from forgetfilter_callback.trace.records import Record
from forgetfilter_callback.utils.atomic_files import write_json, write_lines, write_text
from forgetfilter_callback.utils.paths import absolute_path_or_hub_id


HOLDS = """
import sys
from filelock import FileLock
lock = FileLock(sys.argv[1])
lock.acquire()
print("held", flush=True)
sys.stdin.readline()
"""
STEPS = [Record("noisy", 0), Record("noisy", 6), Record("safety", 0), Record("safety", 3), Record("safety", 8)]


@pytest.fixture(scope="module")
def rows() -> EncodedRows:
    rng = np.random.default_rng(0)
    return encode_rows([{"input_ids": rng.integers(0, 9, 5).tolist()} for _ in range(7)], disable_tqdm=True)


def scores_of(rows: EncodedRows, record: Record) -> Scores:
    rng = np.random.default_rng([len(record.session), record.step])
    losses = rng.gamma(2, 1, rows.loss_offsets[-1]).astype(np.float32)
    return Scores(losses, rng.normal(size=(len(rows), 4)).astype(np.float16))


def rouge1_of(rows: EncodedRows, record: Record) -> np.ndarray:
    return np.random.default_rng([7, record.step]).random(len(rows))


@pytest.fixture
def trace(rows, tmp_path) -> Trace:
    """With five records, of which those of S1+ have ROUGE-1 too."""
    trace = Trace.create(tmp_path / "trace", rows, "a model", "a tokenizer", 64)
    for record in STEPS:
        more = ([f"text {i}" for i in range(len(rows))], rouge1_of(rows, record)) if record.session == "safety" else ()
        trace.append(record, [scores_of(rows, record)], *more)
    return trace


def test_the_manifest_says_what_was_recorded(trace, rows):
    libraries = ("forgetfilter-callback", "transformers", "torch", "peft", "datasets")
    expected = {
        "schema_version": 1,
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
    trace.begin_session("noisy", "again", 7)
    trace.note_source("rows.jsonl", 3)
    sessions = [
        {"session": "safety", "output_dir": "/safe", "max_steps": 8},
        {"session": "noisy", "output_dir": os.path.abspath("again"), "max_steps": 7},
    ]
    again = Trace.open(trace.folder)
    assert again.manifest == expected | {"sessions": sessions, "source": "rows.jsonl", "truncated": 3}
    assert again.rows.truncated == 3


def test_the_rows_come_back(trace, rows):
    table = pq.read_table(trace.folder / "rows.parquet")
    assert table["id"].to_pylist() == rows.ids.to_pylist()
    assert table["input_ids"].to_pylist() == [rows.sample(index)[0].tolist() for index in range(7)]
    assert table["loss_mask"].to_pylist() == [rows.sample(index)[1].tolist() for index in range(7)]
    again = Trace.open(str(trace.folder)).rows
    assert again.ids == rows.ids
    for name in ("tokens", "loss_mask", "offsets"):
        np.testing.assert_array_equal(getattr(again, name), getattr(rows, name))


def test_records_come_back_in_order(trace, rows):
    for name in ("S1-x.parquet", "S2-00000001.parquet", "notes.txt", ".noisy-00000009.parquet.1.tmp"):
        (trace.folder / "records" / name).write_text("of somebody else")
    assert trace.records() == STEPS
    assert [record.file_name for record in STEPS[1:3]] == ["noisy-00000006.parquet", "safety-00000000.parquet"]
    means = []
    for record in STEPS:
        losses, states = scores_of(rows, record)
        assert trace.token_losses(record).tobytes() == losses.tobytes()
        np.testing.assert_array_equal(trace.states(record), states)
        means.append(losses.reshape(7, 4).mean(axis=1, dtype=np.float64))
    np.testing.assert_allclose(trace.losses(), means, rtol=1e-12)
    np.testing.assert_array_equal(trace.rouge1(STEPS[3]), rouge1_of(rows, STEPS[3]))
    texts = pq.read_table(trace.folder / "records" / STEPS[3].file_name)["completion"].to_pylist()
    assert texts == [f"text {i}" for i in range(7)]
    assert repr(trace).endswith("7 samples, records: S1 step 0, S1 step 6, S1+ step 0, S1+ step 3, S1+ step 8)")
    assert "trace', 7" in repr(trace)


def test_an_empty_trace(rows, tmp_path):
    trace = Trace.create(tmp_path, rows, "a model", None, None)
    assert trace.records() == [] and trace.losses().shape == (0, 7)
    assert repr(trace).endswith("records: none)")
    with pytest.raises(TraceError, match="holds a trace already"):
        Trace.create(tmp_path, rows, "a model", None, None)


def test_more_rows_than_a_window(tmp_path):
    count = WINDOW + 3
    tokens = np.random.default_rng(1).integers(0, 9, (count, 3)).astype(np.int32)
    loss_mask = np.tile([False, True, True], count)
    digests = pa.array([f"{index:024x}-0" for index in range(count)])
    rows = EncodedRows(digests, tokens.ravel(), loss_mask, np.arange(count + 1) * 3)
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
    with pytest.raises(ValueError, match="zip"):  # one window of two
        trace.append(Record("noisy", 1), [Scores(losses[: 2 * WINDOW])])
    assert trace.records() == [Record("noisy", 0)]


@pytest.mark.parametrize("step", [None, 3])
def test_forgetting_is_that_of_the_measures(trace, rows, step):
    offsets, tokens = rows.loss_offsets, rows.loss_tokens
    last = STEPS[3] if step else STEPS[4]
    base, before, after = (scores_of(rows, record).losses for record in (STEPS[0], STEPS[2], last))
    means = [mean_losses(losses, offsets) for losses in (base, before, after)]
    states = scores_of(rows, STEPS[2]).states
    expected = {
        "loss": loss_forgetting(*means[1:]),
        "relative": relative_forgetting(*means),
        "pooled": pooled_forgetting(tokens, offsets, before, after),
        "smoothed": smoothed_forgetting(tokens, offsets, before, after, states),
        "rouge1": rouge_forgetting(rouge1_of(rows, STEPS[2]), rouge1_of(rows, last)),
    }
    for measure, values in expected.items():
        np.testing.assert_array_equal(trace.forgetting(measure, step), values)
    np.testing.assert_array_equal(trace.forgetting(step=step), expected["smoothed"])
    assert trace.first_and_last(step) == (STEPS[2], last)
    nats = nats_per_unit(expected["smoothed"], before, after, offsets)
    assert trace.nats_per_unit(trace.forgetting(step=step), step) == nats


def test_an_identity_is_of_the_rows_and_of_the_records_measured_between(trace, rows):
    digest = hashlib.blake2b(rows.fingerprint.encode(), digest_size=16)
    for record in (STEPS[2], STEPS[4]):
        digest.update(scores_of(rows, record).losses.tobytes())
    assert trace.identity() == digest.hexdigest()


def test_repeating_and_dropping_records(trace):
    trace.repeat(STEPS[4], Record("safety", 9))
    trace.repeat(STEPS[4], STEPS[4])
    names = [trace.folder / "records" / record.file_name for record in (STEPS[4], Record("safety", 9))]
    assert names[0].read_bytes() == names[1].read_bytes()
    assert trace.drop_after("safety", 8) == [Record("safety", 9)]
    assert trace.drop_after("noisy", 6) == [] and trace.records() == STEPS
    assert trace.drop_after("safety", 0) == STEPS[3:]
    assert trace.drop_after("noisy", 0) == [STEPS[1], STEPS[2]]  # what follows a dropped session is stale
    assert trace.records() == STEPS[:1]


@pytest.mark.parametrize("again", [False, True], ids=["taken", "repeated"])
@pytest.mark.parametrize(("record", "left"), [(STEPS[0], STEPS[:1]), (STEPS[2], STEPS[:3])], ids=["noisy", "safety"])
def test_a_session_that_begins_anew_drops_what_was_there(record, left, again, trace, rows):
    scores, later = scores_of(rows, STEPS[1]), [other for other in STEPS if other not in left]
    if again:
        assert trace.repeat(STEPS[1], record, restart=True) == later
    else:
        assert trace.append(record, [scores], restart=True) == later
    assert trace.records() == left
    assert trace.token_losses(record).tobytes() == scores.losses.tobytes()
    assert trace.append(record, [scores]) == trace.repeat(record, record) == []  # not anew


def test_a_session_that_begins_for_the_first_time_drops_nothing(trace, rows):
    for record in STEPS[:2]:
        (trace.folder / "records" / record.file_name).unlink()
    assert trace.append(STEPS[0], [scores_of(rows, STEPS[0])], restart=True) == []
    assert trace.records() == [STEPS[0], *STEPS[2:]]


def test_records_are_deleted_from_the_last_on(trace, monkeypatch):
    gone: list[str] = []
    monkeypatch.setattr(Path, "unlink", lambda file, missing_ok=False: gone.append(file.name))
    trace.drop_after("noisy", 0)
    assert gone == [record.file_name for record in STEPS[:0:-1]]


@pytest.mark.parametrize(
    ("gone", "measure", "step", "message"),
    [
        (STEPS[2:], "loss", None, "the session on the noisy set only"),
        (STEPS[2:3], "loss", None, r"no record at step 0 \(its first is at step 3\)"),
        (STEPS[3:], "loss", None, "a record at step 0 only"),
        ([], "loss", 5, r"no record at step 5, only at \[0, 3, 8\]"),
        ([], "loss", 0, "measured from step 0 of S1"),
        (STEPS[:1], "relative", None, "needs the base model's losses"),
    ],
)
def test_what_has_no_forgetting_says_why(trace, gone, measure, step, message):
    for record in gone:
        (trace.folder / "records" / record.file_name).unlink()
    with pytest.raises(TraceError, match=message):
        trace.forgetting(measure, step)


def test_unknown_measures_are_refused(trace):
    with pytest.raises(ValueError, match="'bleu' is none of loss, relative, pooled, smoothed, rouge1"):
        trace.forgetting("bleu")


def test_without_the_first_record_of_s1_there_is_no_base(trace):
    assert trace.base_record == Record("noisy", 0)
    (trace.folder / "records" / STEPS[0].file_name).unlink()
    assert trace.base_record is None


def test_columns_that_are_not_there_say_how_to_get_them(trace, rows):
    trace.append(Record("noisy", 2), [Scores(scores_of(rows, STEPS[0]).losses)])
    with pytest.raises(TraceError, match=r"has no rouge1\. Record with `ForgetTracker\(rouge1=True\)`"):
        trace.rouge1(Record("noisy", 2))
    with pytest.raises(TraceError, match=r"has no state.*measure='pooled' or 'loss'"):
        trace.states(Record("noisy", 2))
    pq.write_table(pa.table({"other": [1]}), trace.folder / "records" / "noisy-00000003.parquet")
    with pytest.raises(TraceError, match=r"has no loss. The file is not one of a record"):
        trace.token_losses(Record("noisy", 3))


def test_records_of_other_data_are_refused(trace, rows):
    file = trace.folder / "records" / "noisy-00000004.parquet"
    pq.write_table(pa.table({"loss": [[1.0]]}), file)
    with pytest.raises(TraceError, match="has 1 samples, the trace 7"):
        trace.token_losses(Record("noisy", 4))
    losses = pa.array([[0.5] * 3] * 7, pa.large_list(pa.float32()))
    pq.write_table(pa.table({"loss": losses}), file)
    with pytest.raises(TraceError, match="not have one loss for each counted token"):
        trace.token_losses(Record("noisy", 4))
    pq.write_table(pa.table({"loss": [0.5] * 7}), file)
    with pytest.raises(TraceError, match="a loss of another type, or gaps in it"):
        trace.token_losses(Record("noisy", 4))
    pq.write_table(pa.table({"loss": pa.array([[0.5] * 3 + [None]] * 7, pa.large_list(pa.float32()))}), file)
    with pytest.raises(TraceError, match="a loss of another type, or gaps in it"):
        trace.token_losses(Record("noisy", 4))
    file.unlink()
    with pytest.raises(TraceError, match="cannot be read"):
        trace.token_losses(Record("noisy", 4))


def changed(trace: Trace, **others: object) -> None:
    (trace.folder / "manifest.json").write_text(json.dumps(trace.manifest | others))


def test_traces_that_do_not_open(trace, tmp_path):
    with pytest.raises(TraceError, match="holds no trace"):
        Trace.open(tmp_path / "elsewhere")
    assert not Trace.exists(tmp_path / "elsewhere") and Trace.exists(trace.folder)
    for name in ("fingerprint", "samples", "sessions"):
        changed(trace, **{name: None})
        with pytest.raises(TraceError, match=f"lacks {name}, or has something else there"):
            Trace.open(trace.folder)
    for sessions in ([3], [{"session": "noisy", "output_dir": "out", "max_steps": "6"}]):
        changed(trace, sessions=sessions)
        with pytest.raises(TraceError, match="lacks sessions, or has"):
            Trace.open(trace.folder)
    changed(trace, schema_version=0)
    with pytest.raises(TraceError, match="names no schema version"):
        Trace.open(trace.folder)
    changed(trace, samples=None, model=3)
    with pytest.raises(TraceError, match="lacks samples, model"):
        Trace.open(trace.folder)
    changed(trace, schema_version=2)
    with pytest.raises(TraceError, match=r"newer forgetfilter-callback .schema 2, this one reads up to 1"):
        Trace.open(trace.folder)
    changed(trace, fingerprint="other")
    with pytest.raises(TraceError, match=r"rows.parquet .* is not the one its manifest was written for"):
        Trace.open(trace.folder)
    for content in ("[]", "{", ""):
        (trace.folder / "manifest.json").write_text(content)
        with pytest.raises(TraceError, match=r"lacks schema_version|cannot be read"):
            Trace.open(trace.folder)
    changed(trace)
    (trace.folder / "rows.parquet").unlink()
    with pytest.raises(TraceError, match="cannot be read"):
        Trace.open(trace.folder)


def test_a_write_that_fails_leaves_what_was_there(tmp_path, trace):
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


def test_completions_without_scores_are_not_written(rows, tmp_path):
    trace = Trace.create(tmp_path, rows, "a model", None, None)
    trace.append(Record("noisy", 0), [scores_of(rows, STEPS[0])], completions=["text"] * 7)
    assert pq.read_schema(tmp_path / "records" / "noisy-00000000.parquet").names == ["loss", "state"]


def test_a_folder_is_locked_until_it_is_let_go(trace):
    lock = Trace.lock(trace.folder)
    assert lock.is_locked and Path(lock.lock_file) == trace.folder / ".lock"
    assert Trace.lock(str(trace.folder)) is lock  # the same process may go on
    lock.release(force=True)
    other = subprocess.Popen(
        [sys.executable, "-c", HOLDS, lock.lock_file], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout.readline() == "held\n"
    with pytest.raises(
        TraceError, match=r"Another process is recording into .*trace. Give this run another `trace_dir`"
    ):
        Trace.lock(trace.folder)
    other.kill()
    other.wait()
    Trace.lock(trace.folder).release(force=True)


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOTSUP])
def test_a_file_system_without_locks_is_gone_on_with(code, trace, monkeypatch, caplog):
    def none(*arguments: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", none)
    assert Trace.lock(trace.folder) is None
    assert "cannot be locked" in caplog.text


def test_rows_as_json_lines():
    assert list(to_json_lines([{"é": Path("a"), "b": 1}, {}])) == ['{"é": "a", "b": 1}', "{}"]


def test_files_have_whole_names_and_hub_ids_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    assert absolute_path_or_hub_id("model") == str(tmp_path / "model")
    assert absolute_path_or_hub_id("org/model") == "org/model" and absolute_path_or_hub_id("") == ""

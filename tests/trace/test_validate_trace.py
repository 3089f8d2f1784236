"""Every command refuses a damaged trace, and `forgetfilter doctor` finds the damage."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import call, refused

from forgetfilter_callback import Trace
from forgetfilter_callback.errors import TraceError
from forgetfilter_callback.scoring.scores import Scores
from forgetfilter_callback.trace.records import Record
from forgetfilter_callback.trace.validate_trace import validate_trace


@pytest.fixture
def run_folder(finished_run, tmp_path) -> Path:
    """A copy of a finished run for a test to damage."""
    shutil.copytree(finished_run, tmp_path / "out")
    return tmp_path / "out"


def edit(folder: Path, **changes: object) -> None:
    file = folder / "_forgetfilter" / "manifest.json"
    manifest = json.loads(file.read_text())
    file.write_text(json.dumps({key: value for key, value in (manifest | changes).items() if value != "DELETED"}))


DAMAGES = {
    "a newer version": lambda out: edit(out, schema_version=99),
    "an older version": lambda out: edit(out, schema_version=1),
    "no version": lambda out: edit(out, schema_version="DELETED"),
    "a version that is text": lambda out: edit(out, schema_version="one"),
    "another fingerprint": lambda out: edit(out, fingerprint="0" * 32),
    "no sessions": lambda out: edit(out, sessions="DELETED"),
    "a manifest that is a list": lambda out: (out / "_forgetfilter" / "manifest.json").write_text("[]"),
    "an empty manifest": lambda out: (out / "_forgetfilter" / "manifest.json").write_text(""),
    "no rows": lambda out: (out / "_forgetfilter" / "rows.parquet").unlink(),
    "truncated rows": lambda out: truncate(out / "_forgetfilter" / "rows.parquet"),
    "rows of another trace": lambda out: swap_rows(out),
    "a truncated record": lambda out: truncate(last_record(out)),
    "an empty record": lambda out: last_record(out).write_bytes(b""),
    "a record of other data": lambda out: other_record(out),
    "no samples": lambda out: edit(out, samples="DELETED"),
    "another number of samples": lambda out: edit(out, samples=999_999),
    "fewer loss tokens": lambda out: edit(out, loss_tokens=-1),
    "no tokenizer": lambda out: edit(out, tokenizer="DELETED"),
    "a negative version": lambda out: edit(out, schema_version=-3),
    "sessions without keys": lambda out: edit(out, sessions=[{}]),
    "rows without a column": lambda out: edit_rows(out, lambda table: table.drop_columns("loss_mask")),
    "rows that are not lists": lambda out: edit_rows(out, lambda table: replaced(table, "input_ids", table["id"])),
    "rows with gaps": lambda out: edit_rows(out, with_gaps),
    "a record of text": lambda out: edit_record(out, lambda losses: pa.array(["a"] * len(losses))),
    "a record with gaps": lambda out: edit_record(
        out, lambda losses: pa.array([None, *losses.to_pylist()[1:]], losses.type)
    ),
    "no manifest": lambda out: (out / "_forgetfilter" / "manifest.json").unlink(),
}


def replaced(table: pa.Table, name: str, column: object) -> pa.Table:
    return table.set_column(table.column_names.index(name), name, column)


def with_gaps(table: pa.Table) -> pa.Table:
    rows = table["input_ids"].to_pylist()
    return replaced(table, "input_ids", pa.array([[None, *rows[0][1:]], *rows[1:]], table["input_ids"].type))


def edit_rows(out: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    file = out / "_forgetfilter" / "rows.parquet"
    pq.write_table(change(pq.read_table(file)), file)


def edit_record(out: Path, change: Callable[[pa.Array], pa.Array]) -> None:
    table = pq.read_table(last_record(out))
    pq.write_table(replaced(table, "loss", change(table["loss"].combine_chunks())), last_record(out))


def last_record(out: Path) -> Path:
    return sorted((out / "_forgetfilter" / "records").glob("safety-*"))[-1]


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def swap_rows(out: Path) -> None:
    trace = Trace.open(out / "_forgetfilter")
    Trace.create(out / "other", trace.rows.select([0, 1, 2]), "m", None, None)
    shutil.copyfile(out / "other" / "rows.parquet", trace.folder / "rows.parquet")


def other_record(out: Path) -> None:
    trace = Trace.open(out / "_forgetfilter")
    rows = trace.rows.select([0, 1, 2])
    other = Trace.create(out / "other", rows, "m", None, None)
    other.append(Record("safety", 0), [Scores(np.ones(rows.loss_offsets[-1], np.float32))])
    shutil.copyfile(out / "other" / "records" / Record("safety", 0).file_name, last_record(out))


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_traces_are_refused_by_every_command(damage, run_folder, tmp_path):
    DAMAGES[damage](run_folder)
    output = tmp_path / "new"
    refused(call("doctor", run_folder))
    refused(call("show", run_folder))
    refused(call("report", run_folder, "--output", tmp_path / "page.html"))
    refused(call("filter", run_folder, "--output", output))
    assert not output.exists() and not (tmp_path / "page.html").exists()
    with pytest.raises(TraceError):
        Trace.open(run_folder / "_forgetfilter").forgetting()


def test_a_missing_record_is_reported(run_folder):
    (run_folder / "_forgetfilter" / "records" / Record("safety", 0).file_name).unlink()
    refused(call("show", run_folder), "no record at step 0")
    refused(call("doctor", run_folder), "no record at step 0")


def test_a_missing_records_folder_is_reported(run_folder):
    shutil.rmtree(run_folder / "_forgetfilter" / "records")
    refused(call("show", run_folder), "has no records yet")
    doctor = call("doctor", run_folder).output
    assert "has no records yet" in doctor and "is complete" not in doctor


def test_doctor_finds_rows_that_do_not_match_their_ids(run_folder):
    edit_rows(
        run_folder,
        lambda table: replaced(
            table,
            "input_ids",
            pa.array([[7] * len(row) for row in table["input_ids"].to_pylist()], table["input_ids"].type),
        ),
    )
    refused(call("doctor", run_folder), "rows.parquet: 12 of 12 rows do not match the stored ids (rows 0, 1, 2")


def test_doctor_finds_a_flipped_bit_in_a_record(run_folder):
    file = last_record(run_folder)
    column = pq.read_metadata(file).row_group(0).column(0)
    content = bytearray(file.read_bytes())
    content[column.data_page_offset + column.total_compressed_size - 1] ^= 1  # the last byte of the losses
    file.write_bytes(content)
    refused(call("doctor", run_folder), f"{file}: ")


def test_states_in_all_records_of_the_noisy_session(trace):
    """As older versions stored them. Only those at step 0 of the safety session are read."""
    assert validate_trace(trace.folder) == ([], [])
    opened = Trace.open(trace.folder)
    assert opened.states(Record("noisy", 6)).shape == (7, 4)
    values = opened.forgetting("combined")
    rewritten = opened.folder / "records" / Record("noisy", 6).file_name
    pq.write_table(pq.read_table(rewritten).drop_columns("state"), rewritten)
    np.testing.assert_array_equal(Trace.open(trace.folder).forgetting("combined"), values)
    assert validate_trace(trace.folder) == ([], [])
    needed = opened.folder / "records" / Record("safety", 0).file_name
    pq.write_table(pq.read_table(needed).drop_columns("state"), needed)
    problems, (note,) = validate_trace(trace.folder)
    assert problems == [] and f"{needed} has no hidden states" in note


def test_an_intact_trace_has_no_problems(finished_run):
    result = call("doctor", finished_run)
    assert result.exit_code == 0 and result.output == f"{finished_run} is complete, and its files are intact.\n"
    assert json.loads(call("doctor", finished_run, "--json").stdout) == {"problems": [], "notes": []}

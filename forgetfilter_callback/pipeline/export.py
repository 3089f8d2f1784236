"""Rows together with what is known about them: losses, forgetting, verdicts and weights."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Sequence, Sized
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..data.json_rows import JsonRows
from ..data.output_lines import source_lines
from ..errors import DataError, DecisionError, UnsupportedDatasetError
from ..filtering.config import FilterConfig, filter_config_or_default
from ..filtering.differing_verdicts import differing_verdicts
from ..filtering.find_forgotten import align_values, find_forgotten, with_estimate
from ..filtering.result import RESULT_FILE, FilterResult
from ..review.verdicts import review_folder, trace_verdicts
from ..trace.as_trace import TraceOrFolder, as_trace
from ..trace.output_file import check_output_file
from ..trace.source_files import find_source, load_trace_tokenizer
from ..trace.trace import Trace
from ..trace.trace_folder import TRACE_FOLDER
from ..utils.atomic_files import atomic_write, write_lines
from .outputs import ids_in_trace, load_source_rows


if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

ExportFormat = Literal["jsonl", "parquet"]
PREFIX = "forgetfilter_"
COLUMNS = ("loss_base", "loss_noisy", "loss_safety", "forgetting", "verdict", "removed", "weight")
ROWS_PER_BATCH = 10_000
_VERDICT = {1.0: "unsafe", 0.0: "safe"}


def to_dataset(
    trace: TraceOrFolder,
    rows: Any,
    filter_config: FilterConfig | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Dataset:
    """Returns the rows of a trace as they came, with what is known about each of them in extra columns.

    | column | type | meaning |
    |---|---|---|
    | `forgetfilter_loss_base` | float | mean loss of the base model, in nats per token |
    | `forgetfilter_loss_noisy` | float | mean loss after noisy finetuning |
    | `forgetfilter_loss_safety` | float | mean loss after safety finetuning |
    | `forgetfilter_forgetting` | float | forgetting, in the unit of the measure |
    | `forgetfilter_verdict` | str | the reviewer's verdict: `"unsafe"` or `"safe"` |
    | `forgetfilter_removed` | bool | whether the filter removes the row |
    | `forgetfilter_weight` | float | 1 − the probability of being unsafe |

    Unknown values are null. The weights of all rows are null where there are no or too few verdicts, because nothing else
    tells how likely a row is unsafe: a warning says so. Weights come from the ranking of the review at the last record, also
    if `filter_config` has another measure or step.

    Args:
        trace ([`Trace`], or the folder of one):
            A trace with records of the safety session.
        rows (`Dataset`, `DataFrame` or a sequence of dictionaries):
            The rows that the trace was created from, in any order.
        filter_config ([`FilterConfig`], *optional*):
            Which rows are removed, and by which measure. Defaults to the result that `forgetfilter run` stored beside the
            trace, and without one to `FilterConfig()`. Its `reviewed` is the folder of the verdicts, which defaults to the
            folder `review` in the trace's folder.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Defaults to the tokenizer that the trace names. Rows with `input_ids` need none.

    Returns:
        [`~datasets.Dataset`]: one row per row of `rows`, in their order.

    Raises:
        DataError: if more than 1 % of the rows are not in the trace, if a row has a column with one of these names, or if
            the rows cannot become columns.
        DecisionError, TraceError: as in [`find_forgotten`].
        TypeError: if `trace` or `filter_config` is something else.
        UnsupportedDatasetError: if `rows` is a stream.
    """
    from ..data.as_rows import as_rows  # imports torch
    from ..data.encode_text import encode_rows

    trace, config = as_trace(trace), filter_config_or_default(filter_config)
    rows = as_rows(rows, "`rows`")
    is_stream = not isinstance(rows, Sized)
    if is_stream:
        raise UnsupportedDatasetError("`rows` is a stream. Load the dataset with `streaming=False`.")
    is_encoded = len(rows) > 0 and "input_ids" in rows[0]
    if tokenizer is None and not is_encoded:
        tokenizer = load_trace_tokenizer(trace)
    encoded = encode_rows(
        rows, tokenizer, trace.manifest["max_length"], disable_tqdm=True, **trace.manifest["encoding"]
    )
    ids = ids_in_trace(encoded, trace)
    result = _stored_result(trace) if filter_config is None else None
    if result is None:
        result = find_forgotten(trace, config, ids)
    return _joined(rows, row_columns(trace, ids, result, review_folder(trace, config.reviewed)))


def export_rows(
    trace: Trace,
    file: Path,
    file_format: ExportFormat = "jsonl",
    filter_config: FilterConfig | None = None,
    source: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> str:
    """Writes the rows of a trace with the columns of [`to_dataset`] to a file.

    Args:
        trace ([`Trace`]):
            A trace with records of the safety session.
        file (`Path`):
            The file to write. An earlier export is replaced.
        file_format (`"jsonl"` or `"parquet"`, defaults to `"jsonl"`):
            JSON Lines, in which the text of rows from a JSON file stays as it is, or Parquet.
        filter_config ([`FilterConfig`], *optional*):
            Which rows are removed. Defaults to the result that `forgetfilter run` stored beside the trace, and without one
            to `FilterConfig()`.
        source (`str`, *optional*):
            The noisy set, as [`load_rows`] takes it. Defaults to the file that the trace names.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Defaults to the tokenizer that the trace names. It is needed if the file has changed since it was recorded.

    Returns:
        `str`: which rows count as removed, and whether there are verdicts that say otherwise.

    Raises:
        DataError: as in [`to_dataset`], or if `file` is the noisy set, in the folder of a trace, or an existing file that is
            not an export.
        DecisionError, TraceError: as in [`to_dataset`].
        ValueError: if the format is unknown, or if the extension of `file` is that of the other one.
    """
    source = source if source is not None else find_source(trace)
    if file_format not in get_args(ExportFormat):
        raise ValueError(f"The format {file_format!r} is unknown. Choose jsonl or parquet.")
    check_output_file(trace, file, _is_export, source)
    other_format = "parquet" if file_format == "jsonl" else "jsonl"
    if file.suffix.lower() == f".{other_format}":
        raise ValueError(
            f"{file} has the extension of another format than {file_format}. Pass `--format {other_format}`, or choose "
            "another name."
        )
    ids, rows = load_source_rows(trace, source, tokenizer)
    config = filter_config_or_default(filter_config)
    result = _stored_result(trace) if filter_config is None else None
    origin = "by the filter result of the run"
    if result is None:
        result, origin = find_forgotten(trace, config, ids), "by the given filter"
        if filter_config is None:
            origin = "by the automatic threshold"
    verdicts_folder = review_folder(trace, config.reviewed)
    columns = row_columns(trace, ids, result, verdicts_folder)
    file.parent.mkdir(parents=True, exist_ok=True)
    if file_format == "jsonl":
        _check_names(rows)
        write_lines(_lines(source_lines(rows), columns), file)
    else:
        with atomic_write(file) as unfinished:
            try:
                _joined(rows, columns).to_parquet(unfinished)
            except pa.ArrowException as error:  # such as an object without keys
                raise _no_columns(error) from error
    removed = f"Removed {origin}: {result.counts['removed']} of {result.counts['samples']} rows ({result.explanation})."
    differing = differing_verdicts(result, trace_verdicts(trace, verdicts_folder), verdicts_folder)
    return removed if differing is None else f"{removed} {differing}"


def row_columns(
    trace: Trace, ids: pa.StringArray | None, result: FilterResult, verdicts_folder: Path
) -> dict[str, np.ndarray]:
    """Returns the extra columns of the rows. See [`to_dataset`].

    Args:
        trace ([`Trace`]):
            A trace with records of the safety session.
        ids (`pa.StringArray` of length `rows`, *optional*):
            Sample ids of the rows. Rows that are not in the trace have unknown values. Defaults to the rows of the trace.
        result ([`FilterResult`]):
            Which rows are removed, and their forgetting.
        verdicts_folder (`Path`):
            The folder of the verdicts. It need not exist.

    Returns:
        `dict[str, np.ndarray]`: columns of shape `(rows,)`. Unknown numbers are NaN, and unknown verdicts are `None`.
    """
    trace_ids = trace.rows.ids
    ids = ids if ids is not None else trace_ids

    def of_rows(values: np.ndarray, known_ids: pa.StringArray = trace_ids) -> np.ndarray:
        values = np.where(np.isfinite(values), values, np.nan)
        # Aligning imports pandas, which takes longer than reading a trace.
        return values if ids.equals(known_ids) else align_values(ids, known_ids, values)

    before, after = trace.first_and_last(result.step)
    unknown = np.full(len(trace_ids), np.nan)
    labels = {each.row: each.verdict for each in trace_verdicts(trace, verdicts_folder)}
    unsafe = unknown.copy()
    unsafe[list(labels)] = [label == "unsafe" for label in labels.values()]
    if not labels:
        logger.warning(
            f"`{PREFIX}weight` is null: only verdicts tell how likely a row is unsafe, and there are none in "
            f"{verdicts_folder}. Review rows with `forgetfilter review`."
        )
    columns = {
        "loss_base": of_rows(trace.mean_losses(trace.base_record) if trace.base_record is not None else unknown),
        "loss_noisy": of_rows(trace.mean_losses(before)),
        "loss_safety": of_rows(trace.mean_losses(after)),
        "forgetting": of_rows(result.values, result.ids),
        "verdict": np.array([_VERDICT.get(value) for value in of_rows(unsafe).tolist()], dtype=object),
        "removed": of_rows(result.removed.astype(np.float64), result.ids) == 1,
        "weight": of_rows(_weights(trace, verdicts_folder) if labels else unknown),
    }
    return {f"{PREFIX}{name}": values for name, values in columns.items()}


def _weights(trace: Trace, verdicts_folder: Path) -> np.ndarray:
    """1 − the probability of being unsafe: shape `(samples,)`. NaN if the verdicts do not tell it."""
    from ..review.review_queue import ReviewQueue  # imports scikit-learn, which takes more than a second
    from ..review.unsafe_probabilities import unsafe_probabilities

    queue = ReviewQueue(trace, verdicts_folder)
    try:
        return 1 - unsafe_probabilities(queue)
    except DecisionError as error:
        logger.warning(f"`{PREFIX}weight` is null: {error}")
        return np.full(len(trace.rows), np.nan)


def _is_export(file: Path) -> bool:
    """Whether the last columns of the first row of a JSON Lines file, or of a Parquet file, are those of an export."""
    try:
        with file.open("rb") as stream:
            if stream.read(4) == b"PAR1":
                names = pq.read_schema(file).names
            else:
                stream.seek(0)
                names = [*json.loads(stream.readline())]
    except (OSError, ValueError, TypeError, pa.ArrowException):
        return False
    return names[-len(COLUMNS) :] == [f"{PREFIX}{name}" for name in COLUMNS]


def _stored_result(trace: Trace) -> FilterResult | None:
    """The result that `forgetfilter run` stored beside the trace, if there is one.

    Raises:
        DecisionError: if it belongs to another trace, or if the records of the trace have changed since.
    """
    folder = trace.folder.parent / "filter_result"
    if trace.folder.name != TRACE_FOLDER or not (folder / RESULT_FILE).is_file():
        return None
    result = FilterResult.load(folder)
    advice = "Filter again, or pass filter options, such as `--fraction`."
    if result.fingerprint != trace.manifest["fingerprint"]:
        raise DecisionError(f"The filter result in {folder} belongs to another trace. {advice}")
    if result.identity is None:
        logger.warning(
            f"The filter result in {folder} does not say which records it was computed from. If the trace was recorded "
            f"again after the filter, the exported forgetting is out of date. {advice}"
        )
    elif result.identity != trace.identity(result.measure) and result.identity != trace.identity():  # of older versions
        raise DecisionError(
            f"The records of the trace in {trace.folder} have changed since the filter result in {folder} was written. "
            f"{advice}"
        )
    return with_estimate(result, trace)  # rows may have been reviewed since


def _lines(lines: Iterable[str], columns: dict[str, np.ndarray]) -> Iterator[str]:
    """Add the columns at the end of each line's JSON object. The rest of its text stays as it is."""
    rows = zip(*(_values(column) for column in columns.values()), strict=True)
    for line, values in zip(lines, rows, strict=True):
        body = line.rstrip().removesuffix("}").rstrip()
        added = json.dumps(dict(zip(columns, values, strict=True)))
        yield f"{body}{'' if body.endswith('{') else ', '}{added[1:]}"


def _values(column: np.ndarray) -> Iterator[Any]:
    """The values of a column as Python objects, `None` for NaN."""
    for start in range(0, len(column), ROWS_PER_BATCH):
        for value in column[start : start + ROWS_PER_BATCH].tolist():
            yield value if value == value else None


def _joined(rows: Any, columns: dict[str, np.ndarray]) -> Dataset:
    """The rows as a dataset, with the columns beside their own."""
    from datasets import Dataset, concatenate_datasets
    from datasets.fingerprint import generate_random_fingerprint

    _check_names(rows)
    if not isinstance(rows, Dataset):
        try:
            table = pa.concat_tables(_tables(rows), promote_options="permissive")
            rows = Dataset(table, fingerprint=generate_random_fingerprint())  # hashing the table would copy all texts
        except (pa.ArrowException, TypeError, OverflowError) as error:
            raise _no_columns(error) from error
    types = {name: pa.string() if values.dtype == object else None for name, values in columns.items()}
    table = pa.table({name: pa.array(columns[name], types[name], from_pandas=True) for name in columns})  # NaN is null
    return concatenate_datasets([rows, Dataset(table)], axis=1)


def _tables(rows: Sequence[dict[str, Any]]) -> Iterator[pa.Table]:
    """The rows as tables of some thousand rows each, so that not all of them are Python objects at once."""
    for start in range(0, len(rows), ROWS_PER_BATCH):
        batch = [rows[index] for index in range(start, min(start + ROWS_PER_BATCH, len(rows)))]
        names = dict.fromkeys(name for row in batch for name in row)  # some versions of pyarrow sort them
        yield pa.Table.from_struct_array(pa.array(batch)).select(list(names))


def _check_names(rows: Any) -> None:
    """Refuse rows that have a column with the prefix of the extra columns.

    Raises:
        DataError: if there is one.
    """
    if isinstance(rows, JsonRows):
        names = {name for row in rows for name in row if name.startswith(PREFIX)}
    else:
        names = {name for name in _column_names(rows) if name.startswith(PREFIX)}
    if names:
        raise DataError(
            f"The rows have the columns {', '.join(sorted(names))}, but {PREFIX!r} is how the names of the added columns "
            "begin. Rename or remove them. Perhaps these rows were exported before."
        )


def _column_names(rows: Any) -> set[str]:
    from datasets import Dataset

    from ..data.as_rows import each_row

    return (
        set(rows.column_names) if isinstance(rows, Dataset) else {str(name) for row in each_row(rows) for name in row}
    )


def _no_columns(error: Exception) -> DataError:
    return DataError(
        f"The rows cannot become columns of one type each: {error}. Export them as JSON Lines (`--format jsonl --output "
        "rows.jsonl`), or make the values of each column alike."
    )

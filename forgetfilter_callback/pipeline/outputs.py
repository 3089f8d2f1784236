"""Write the kept and removed rows of a filter, and filter the rows of a finished run again."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..data.columns import column_values
from ..data.encoded_rows import EncodedRows
from ..data.json_rows import JsonRows, read_text_file
from ..data.output_lines import source_lines
from ..errors import DataError
from ..filtering.by_source import with_source_counts
from ..filtering.config import FilterConfig, filter_config_or_default
from ..filtering.find_forgotten import find_forgotten
from ..filtering.result import RESULT_FILE, FilterResult
from ..reports.dataset_card import dataset_card
from ..trace.as_trace import TraceOrFolder, as_trace
from ..trace.source_files import find_source, is_unchanged, load_trace_tokenizer
from ..trace.trace import Trace
from ..utils.arrow_arrays import to_numpy
from ..utils.atomic_files import atomic_writes
from ..utils.counted import counted_of
from .output_record import FILTER_OUTPUTS, check_files_are_ours, recorded


if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


def filter_rows(
    trace: TraceOrFolder,
    output: str | Path,
    filter_config: FilterConfig | None = None,
    source: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    source_column: str | None = None,
) -> FilterResult:
    """Filter the rows of a trace and write the kept and the removed ones. No model is needed.

    The outputs of an earlier filter in the same folder are replaced, and a warning says so.

    Args:
        trace ([`Trace`], or the folder of one):
            A trace with records of the safety session.
        output (`str` or `Path`):
            The folder that [`write_filter_outputs`] writes to.
        filter_config ([`FilterConfig`], *optional*):
            Which rows are removed.
        source (`str`, *optional*):
            The noisy set, as [`load_rows`] takes it. Defaults to the file that the trace names.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Defaults to the tokenizer that the trace names. It is needed if the file has changed since it was recorded.
        source_column (`str`, *optional*):
            A column of the rows that says where a row came from. The card and `source_counts` of the result then say how
            many rows of each source are kept and removed.

    Raises:
        DataError: if the rows cannot be found or loaded, if more than 1 % of them are not in the trace, if they have no
            `source_column`, or if files with the names of the outputs come from elsewhere or were changed.
        DecisionError, TraceError: as in [`find_forgotten`].
        TypeError: if `trace` or `filter_config` is something else.
    """
    trace, config = as_trace(trace), filter_config_or_default(filter_config)
    source = source if source is not None else find_source(trace)
    check_output_folder(source, Path(output))
    check_files_are_ours(Path(output), FILTER_OUTPUTS)
    ids, rows = load_source_rows(trace, source, tokenizer)
    result = find_forgotten(trace, config, ids)
    if source_column is not None:
        result = with_source_counts(
            result,
            trace,
            column_values(rows, source_column),
            reviewed=config.reviewed,
        )
    replaces = has_outputs(Path(output))
    write_filter_outputs(Path(output), source_lines(rows), result, trace)
    if replaces:
        logger.warning(f"The rows and the filter result of an earlier filter in {output} were replaced.")
    return result


def load_source_rows(
    trace: Trace, source: str, tokenizer: PreTrainedTokenizerBase | None
) -> tuple[pa.StringArray | None, Dataset | JsonRows]:
    """The sample id of each row of `source` (`None` if they are the rows of the trace; see [`ids_in_trace`]), and the
    rows.
    """
    if is_unchanged(trace, source):
        return None, read_text_file(Path(source))
    from ..data.load_rows import encode_source, load_rows  # imports torch

    rows = load_rows(source)
    tokenizer = tokenizer if tokenizer is not None else load_trace_tokenizer(trace)
    encoded = encode_source(source, rows, tokenizer, trace.manifest["max_length"], **trace.manifest["encoding"])
    found = pc.is_in(trace.rows.ids, value_set=encoded.ids).true_count
    if found < len(trace.rows):
        logger.warning(
            f"{counted_of(len(trace.rows) - found, len(trace.rows), 'recorded row', 'are')} not in {source}. If you have "
            "changed rows, what was recorded of the old rows does not count for the new ones."
        )
    return ids_in_trace(encoded, trace), rows


def ids_in_trace(rows: EncodedRows, trace: Trace) -> pa.StringArray:
    """The sample ids of rows. Null for rows without a loss token that are not in the trace: SFTTrainer drops such rows."""
    is_in_trace = to_numpy(pc.is_in(rows.ids, value_set=trace.rows.ids))
    return pc.if_else((np.diff(rows.loss_offsets) > 0) | is_in_trace, rows.ids, None)


def write_filter_outputs(output: Path, lines: Iterable[str], result: FilterResult, trace: Trace) -> None:
    """Write `kept.jsonl`, `removed.jsonl`, `card.md` and `filter_result`: all of them, or none if one cannot be written.

    Args:
        output (`Path`):
            The output folder.
        lines (`Iterable[str]`):
            One line per row, in the order of `result`.
        result ([`FilterResult`]):
            What is removed.
        trace ([`Trace`]):
            The trace that `result` was computed from, for the card.

    Raises:
        DataError: if files with these names come from elsewhere or were changed.
    """
    check_files_are_ours(output, FILTER_OUTPUTS)
    output.mkdir(parents=True, exist_ok=True)
    files = [output / name for name in ("card.md", "removed.jsonl", "kept.jsonl")]
    save_result = partial(result.save, output / "filter_result")
    with recorded(output, FILTER_OUTPUTS), atomic_writes(files, before_commit=save_result) as (card, removed, kept):
        write_kept_and_removed(kept, removed, lines, result.removed)
        card.write_text(dataset_card(result, trace), encoding="utf-8")


def write_kept_and_removed(kept: Path, removed: Path, lines: Iterable[str], is_removed: np.ndarray) -> None:
    """Write each line to the file `kept` or, where `is_removed` is true, to the file `removed`."""
    with (
        kept.open("w", encoding="utf-8", newline="") as kept_stream,
        removed.open("w", encoding="utf-8", newline="") as removed_stream,
    ):
        for line, to_removed in zip(lines, is_removed.tolist(), strict=True):
            (removed_stream if to_removed else kept_stream).write(f"{line}\n")


def has_outputs(output: Path) -> bool:
    """Whether `output` contains what [`write_filter_outputs`] writes."""
    return (output / "filter_result" / RESULT_FILE).exists()


def check_output_folder(source: str, output: Path) -> None:
    """Refuse an output folder that is a file, and to overwrite `source` with its own kept or removed rows.

    Raises:
        DataError: if `output` is a file, or if `source` is `kept.jsonl` or `removed.jsonl` in it.
    """
    if output.is_file():
        raise DataError(f"{output} is a file. Choose a folder for the output.")
    if Path(source).resolve() in [(output / f"{name}.jsonl").resolve() for name in ("kept", "removed")]:
        raise DataError(f"{source} would be overwritten by its own kept or removed rows. Choose another output folder.")

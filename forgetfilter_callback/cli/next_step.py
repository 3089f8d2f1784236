"""What to type next. Commands print it as their last line."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from ..filtering.result import FilterResult
    from ..trace.trace import Trace


# The options `noisy`, `tokenizer` and `source-column` that the user gave. `None` for those that were left out.
RowOptions = Mapping[str, str | None]


def command_to_review(path: Path, row_options: RowOptions = MappingProxyType({})) -> str:
    """The command that reviews the rows of the trace in `path`, with the options that the user gave."""
    return _command("review", path, row_options)


def command_to_filter(trace: Trace, path: Path, settings: Mapping[str, Any], row_options: RowOptions) -> str:
    """The command that filters with these settings of a [`FilterConfig`], and with the options that the user gave. If
    nothing says where the rows are, it has a word to replace.
    """
    if row_options["noisy"] is None and "source" not in trace.manifest:
        row_options = {**row_options, "noisy": "NOISY"}
    return _command("filter", path, {**settings, **row_options, "output": "reviewed"})


def _command(name: str, path: Path, options: Mapping[str, Any]) -> str:
    given = [word for option, value in options.items() if value is not None for word in (f"--{option}", str(value))]
    return shlex.join(["forgetfilter", name, str(path), *given])


def after_looking(trace: Trace, path: Path, settings: Mapping[str, Any], row_options: RowOptions) -> str:
    """After `show` and `report`: filter as people have decided, or review rows if they have found nothing yet.

    Args:
        trace ([`Trace`]):
            The trace.
        path (`Path`):
            The trace, or the output folder of its run, as the user named it.
        settings (`Mapping[str, Any]`):
            The filter options that the user gave.
        row_options (`Mapping[str, str | None]`):
            The options `noisy`, `tokenizer` and `source-column` that the user gave.
    """
    from ..review.verdicts import review_folder, trace_verdicts

    if "decision" in settings or "reviewed" in settings:
        return command_to_filter(trace, path, settings, row_options)
    labels = {verdict.row: verdict.verdict for verdict in trace_verdicts(trace)}
    if "unsafe" in labels.values():
        return command_to_filter(trace, path, {"reviewed": review_folder(trace)}, row_options)
    return command_to_review(path, row_options)


def after_filter(
    result: FilterResult,
    trace: Trace,
    path: Path,
    output: Path,
    settings: Mapping[str, Any],
    row_options: RowOptions,
) -> str:
    """After `filter`: finetune on the kept rows. If nobody has checked φ or decided on a row, first what [`after_looking`]
    says. After a review that removed nothing, review more rows.

    Args:
        result ([`FilterResult`]):
            The filter result.
        output (`Path`):
            Its folder.
        trace, path, settings, row_options:
            As in [`after_looking`].
    """
    from ..review.verdicts import review_folder

    has_removed, reviewed = bool(result.counts["removed"]), settings.get("reviewed")
    if not has_removed and reviewed is not None and Path(reviewed).absolute() == review_folder(trace).absolute():
        random_fraction = "1" if settings.get("threshold") == "fdr" else None
        return _command("review", path, {"random-fraction": random_fraction, **row_options})
    if result.method == "auto" or not (has_removed or reviewed is not None or "decision" in settings):
        return after_looking(trace, path, settings, row_options)
    kept = str(output / "kept.jsonl")
    return (
        f"finetune the base model on {kept}, as you would on all rows. TRL's SFTTrainer takes "
        f'load_dataset("json", data_files={json.dumps(kept, ensure_ascii=False)}, split="train") as `train_dataset`.'
    )

"""What to type next. Commands print it as their last line."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from ..filtering.result import FilterResult
    from ..trace.trace import Trace


def command_to_review(path: Path, noisy: str | None = None, tokenizer: str | None = None) -> str:
    """The command that reviews the rows of the trace in `path`, with the rows and the tokenizer that the user gave."""
    return _command("review", path, {"noisy": noisy, "tokenizer": tokenizer})


def command_to_filter(
    trace: Trace, path: Path, settings: Mapping[str, Any], noisy: str | None = None, tokenizer: str | None = None
) -> str:
    """The command that filters with these settings of a [`FilterConfig`], and with the rows and the tokenizer that the user
    gave. If nothing says where the rows are, it has a word to replace.
    """
    if noisy is None and "source" not in trace.manifest:
        noisy = "NOISY"
    return _command("filter", path, {**settings, "noisy": noisy, "tokenizer": tokenizer, "output": "reviewed"})


def _command(name: str, path: Path, options: Mapping[str, Any]) -> str:
    given = [word for option, value in options.items() if value is not None for word in (f"--{option}", str(value))]
    return shlex.join(["forgetfilter", name, str(path), *given])


def after_looking(
    trace: Trace, path: Path, settings: Mapping[str, Any], noisy: str | None, tokenizer: str | None
) -> str:
    """After `show` and `report`: filter as people have decided, or review rows if they have found nothing yet.

    Args:
        trace ([`Trace`]):
            The trace.
        path (`Path`):
            The trace, or the output folder of its run, as the user named it.
        settings (`Mapping[str, Any]`):
            The filter options that the user gave.
        noisy, tokenizer (`str`, *optional*):
            The options that the user gave.
    """
    from ..review.verdicts import review_folder, trace_verdicts

    if "decision" in settings or "reviewed" in settings:
        return command_to_filter(trace, path, settings, noisy, tokenizer)
    labels = {verdict.row: verdict.verdict for verdict in trace_verdicts(trace)}
    if "unsafe" in labels.values():
        return command_to_filter(trace, path, {"reviewed": review_folder(trace)}, noisy, tokenizer)
    return command_to_review(path, noisy, tokenizer)


def after_filter(
    result: FilterResult,
    trace: Trace,
    path: Path,
    output: Path,
    settings: Mapping[str, Any],
    noisy: str | None,
    tokenizer: str | None,
) -> str:
    """After `filter`: finetune on the kept rows. If none was removed or nobody has checked φ, first what [`after_looking`]
    says.

    Args:
        result ([`FilterResult`]):
            The filter result.
        output (`Path`):
            Its folder.
        trace, path, settings, noisy, tokenizer:
            As in [`after_looking`].
    """
    if not result.counts["removed"] or result.method == "auto":
        return after_looking(trace, path, settings, noisy, tokenizer)
    kept = str(output / "kept.jsonl")
    return (
        f"finetune the base model on {kept}, as you would on all rows. TRL's SFTTrainer takes "
        f'load_dataset("json", data_files={json.dumps(kept, ensure_ascii=False)}, split="train") as `train_dataset`.'
    )

"""What to type next. Commands print it as their last line."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from ..filtering.result import FilterResult
    from ..trace.trace import Trace


def command_to_review(path: Path) -> str:
    """The command that reviews the rows of the trace in `path`."""
    return shlex.join(["forgetfilter", "review", str(path)])


def command_to_filter(path: Path, settings: Mapping[str, Any]) -> str:
    """The command that filters with these settings of a [`FilterConfig`]."""
    options = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    return shlex.join(["forgetfilter", "filter", str(path), *options, "--output", "reviewed"])


def after_recording(path: Path, is_separable: bool = True) -> str:
    """After `run` and `score`: look at the rows. If no threshold was found, a review is the way to find unsafe rows."""
    return shlex.join(["forgetfilter", "show", str(path)]) if is_separable else command_to_review(path)


def after_looking(trace: Trace, path: Path, settings: Mapping[str, Any]) -> str:
    """After `show` and `report`: filter as people have decided, or review rows if they have found nothing yet.

    Args:
        trace ([`Trace`]):
            The trace.
        path (`Path`):
            The trace, or the output folder of its run, as the user named it.
        settings (`Mapping[str, Any]`):
            The filter options that the user gave.
    """
    from ..review.verdicts import review_folder, trace_verdicts

    if "decision" in settings or "reviewed" in settings:
        return command_to_filter(path, settings)
    labels = {verdict.row: verdict.verdict for verdict in trace_verdicts(trace)}
    if "unsafe" in labels.values():
        return command_to_filter(path, {"reviewed": review_folder(trace)})
    return command_to_review(path)


def after_filter(result: FilterResult, path: Path, output: Path) -> str:
    """After `filter`: finetune on the kept rows, or review rows if none was removed."""
    if not result.counts["removed"]:
        return command_to_review(path)
    return (
        f"finetune the base model on {output / 'kept.jsonl'}. The page docs/how-to/few-unsafe-rows.md shows how, under "
        "“Finetune on the kept rows”."
    )

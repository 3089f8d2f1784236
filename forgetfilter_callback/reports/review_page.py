"""The review page: an HTML file that shows a filter result and exports a reviewer's decision.

The page works offline: plotly.js is embedded, and a content security policy blocks every network request. The texts of
the samples are untrusted: they are stored as JSON and displayed as text, never as markup.
"""

from __future__ import annotations

import base64
import hashlib
import json
import shlex
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, get_args

import numpy as np

from ..data.audit_labels import as_labels
from ..data.decode import Decoder, is_conversation, special_ids
from ..data.identical_rows import content_numbers
from ..filtering.by_source import with_source_counts
from ..filtering.config import FilterConfig, filter_config_or_default
from ..filtering.differing_verdicts import count_differing_verdicts
from ..filtering.find_forgotten import decide, with_decision
from ..filtering.result import FilterResult
from ..measures.names import DEFAULT_MEASURE, MEANINGS, UNITS
from ..review.verdicts import Verdict, VerdictLabel, known_labels, review_folder, trace_verdicts
from ..trace.as_trace import TraceOrFolder, as_trace
from ..trace.forgetting import compute_forgetting_by_record
from ..trace.output_file import check_output_file
from ..trace.trace import Trace
from ..utils.atomic_files import atomic_write
from ..utils.optional_packages import requires_extra
from ..utils.paths import short_model_name
from .source_table import page_sources
from .summary import page_summary
from .token_text import MAX_TEXT_LENGTH, last_characters, split_text


# These limits keep the page below 10 MB.
MAX_PLOTTED = 50_000  # samples in the plots
MAX_RECORDS = 5  # records of the safety session
# Samples with text: a third each of the most forgotten, those closest to φ, and samples drawn at random. Overridden and
# reviewed samples are added, up to another third.
MAX_TEXTS = 600
# One script, because each file alone is shorter than 400 lines. The order matters.
SCRIPTS = (
    "shared/common.js",
    "page/data.js",
    "page/plots.js",
    "page/rows.js",
    "page/sources.js",
    "page/decision.js",
    "page/start.js",
)
STYLES = ("shared/look.css", "page/review.css")


def write_review_page(
    trace: TraceOrFolder,
    file: str | Path,
    tokenizer: Decoder,
    filter_config: FilterConfig | None = None,
    unsafe: Sequence[bool] | np.ndarray | None = None,
    sources: Sequence[Any] | None = None,
) -> FilterResult:
    """Writes the review page of a trace.

    Args:
        trace ([`Trace`], or the folder of one):
            A trace with records of the safety session.
        file (`str` or `Path`):
            The HTML file to write. Missing parent folders are created. An earlier review page is replaced.
        tokenizer ([`tokenizers.Tokenizer`] or [`~transformers.PreTrainedTokenizerBase`]):
            Decodes the token ids of the trace.
        filter_config ([`FilterConfig`], *optional*):
            Which samples are removed when the page opens. Samples that it overrides, or that a review decides, are
            overridden on the page. The page shows the last record, so `step` cannot be given. It shows the verdicts in
            `reviewed`, which defaults to the folder `review` in the trace's folder.
        unsafe (`Sequence[bool]` of length `samples`, *optional*):
            Audit labels in the order of the trace. The page shows precision and recall against them. They do not
            affect the filter result.
        sources (`Sequence` of length `samples`, *optional*):
            Where each row came from, in the order of the trace. The page shows a table by source and filters by it.

    Returns:
        [`FilterResult`]: the filter result that the page shows when it opens.

    Raises:
        ImportError: if plotly or jinja2 is not installed.
        TraceError: if the trace lacks the records that `measure` needs.
        TypeError: if `trace` or `filter_config` is something else.
        ValueError: if `filter_config.step` is given.
        DecisionError: if the verdicts belong to another trace.
        DataError: if an audit label is missing, or if `file` is the noisy set, in the folder of a trace, or an existing file
            that is not a review page.
    """
    with requires_extra("report", "The report"):
        from jinja2 import Environment, PackageLoader, StrictUndefined
        from plotly.offline import get_plotlyjs

    trace, config = as_trace(trace), filter_config_or_default(filter_config)
    if config.step is not None:
        raise ValueError(f"step={config.step}: the report shows the last record. Leave out `step`.")
    check_output_file(trace, Path(file), _is_review_page)

    undecided, overrides = with_decision(trace, config)
    steps = _shown_steps(trace)
    values, nats = compute_forgetting_by_record(trace, undecided.measure or DEFAULT_MEASURE, steps)
    result = decide(trace, undecided, overrides, values[-1], nats)
    unsafe = None if unsafe is None else as_labels(unsafe, "`unsafe`")
    if sources is not None:
        result = with_source_counts(result, trace, sources, unsafe, config.reviewed)
    # With a folder, verdicts that cannot be read are an error: the page would not show them.
    verdicts = trace_verdicts(trace, review_folder(trace, config.reviewed))
    differing = count_differing_verdicts(result, verdicts)[0] if config.reviewed is None else 0
    data = _page_data(trace, result, steps, values, tokenizer, unsafe, sources, verdicts) | {"differing": differing}
    script = _joined(SCRIPTS)
    environment = Environment(
        loader=PackageLoader("forgetfilter_callback.reports", "page"), autoescape=True, undefined=StrictUndefined
    )
    html = environment.get_template("review.html").render(
        # Escape "<", so that a text that contains "</script>" cannot end the JSON block.
        data=json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c"),
        meaning=MEANINGS[result.measure],
        unit=data["unit"],
        initial_model=data["initial_model"],
        folder=repr(str(trace.folder)),
        command=_command_to_filter(trace),
        style=_joined(STYLES),
        plotly=get_plotlyjs(),
        script=script,
        script_hashes=[_csp_hash(text) for text in (get_plotlyjs(), script)],
    )
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(Path(file)) as unfinished:
        unfinished.write_text(html, encoding="utf-8")
    return result


def _command_to_filter(trace: Trace) -> str:
    """The command that applies the exported decision. `NOISY` is to be replaced if the trace does not name its rows."""
    rows = [] if "source" in trace.manifest else ["--noisy", "NOISY"]
    decision = ["--decision", "review_decision.json", "--output", "decided"]
    return shlex.join(["forgetfilter", "filter", str(trace.folder), *rows, *decision])


def _is_review_page(file: Path) -> bool:
    with file.open("rb") as stream:
        start = stream.read(4096)
    return start.startswith(b"<!DOCTYPE html>") and b"<title>ForgetFilter report</title>" in start


def _joined(names: Sequence[str]) -> str:
    folder = files("forgetfilter_callback.reports")
    return "\n".join((folder / name).read_text(encoding="utf-8") for name in names)


def _csp_hash(script: str) -> str:
    """Returns the hash that allows this script in a content security policy."""
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode()


def _page_data(
    trace: Trace,
    result: FilterResult,
    steps: Sequence[int],
    values: np.ndarray,
    tokenizer: Decoder,
    unsafe: np.ndarray | None,
    sources: Sequence[Any] | None,
    verdicts: Sequence[Verdict],
) -> dict[str, Any]:
    samples = len(trace.rows)
    plotted = np.arange(samples)
    if samples > MAX_PLOTTED:
        plotted = np.sort(np.random.default_rng(0).choice(samples, MAX_PLOTTED, replace=False))
    initial = trace.base_record if trace.base_record is not None else trace.first_and_last()[0]
    initial_losses = trace.mean_losses(initial)
    overridden = _overridden_samples(result)
    reviewed = {verdict.row for verdict in verdicts if verdict.identical_to is None}
    labels = known_labels(verdicts, content_numbers(trace.rows.ids))
    drawn = _draw_samples(result)
    shown = _shown_samples(result, drawn, np.union1d(overridden, np.array([*reviewed], dtype=int)))
    return {
        "summary": page_summary(result),
        "measure": result.measure,
        "unit": UNITS[result.measure],
        "threshold": result.threshold,
        # Position of the φ line if nothing is removed.
        "tested_threshold": result.separability.threshold,
        "overrides": [
            {"id": trace.rows.ids[index].as_py(), "row": index, "choice": "remove" if result.removed[index] else "keep"}
            for index in overridden.tolist()
        ],
        "trace": result.identity,
        "model": short_model_name(trace.manifest["model"]),
        "samples": samples,
        "sampled": len(plotted) < samples,
        "all_shown": len(shown) == samples,
        "steps": steps,
        "forgetting": [_packed(of_record[plotted]) for of_record in values],
        "length": _packed(np.diff(trace.rows.loss_offsets)[plotted]),
        "initial_loss": _packed(initial_losses[plotted]),
        "initial_model": "base model" if initial.session == "noisy" else "model after noisy finetuning",
        "unsafe": None if unsafe is None else _packed(unsafe[plotted]),
        "by_source": None if sources is None else page_sources(result, sources, shown, len(plotted) < samples),
        "reviewed": len(reviewed),
        "verdicts": {label: list(labels.values()).count(label) for label in get_args(VerdictLabel)},
        "rows": _text_rows(trace, result, tokenizer, shown, drawn, initial_losses, unsafe, labels),
    }


def _shown_steps(trace: Trace) -> list[int]:
    """Selects at most `MAX_RECORDS` evenly spaced records of the safety session. The last one is among them."""
    first, last = trace.first_and_last()
    steps = [record.step for record in trace.records() if record.session == "safety" and record > first] or [last.step]
    return [steps[i] for i in np.unique(np.linspace(0, len(steps) - 1, MAX_RECORDS).round().astype(int))]


def _packed(values: np.ndarray) -> str:
    """Encodes values as base64 of little-endian float32, about five characters each."""
    return base64.b64encode(values.astype("<f4").tobytes()).decode()


def _overridden_samples(result: FilterResult) -> np.ndarray:
    """Indices of the samples that φ does not decide: those overridden, and those that a review removes without φ."""
    above_phi = result.values > (np.inf if result.threshold is None else result.threshold)
    given = [id_ in result.overrides for id_ in result.ids.to_pylist()]  # `pa.array` would import pandas
    return np.flatnonzero(given | (result.removed != above_phi))


def _draw_samples(result: FilterResult) -> np.ndarray:
    """Draws samples with a known value at random: all of them, or a third of `MAX_TEXTS` if there are more."""
    known = np.flatnonzero(np.isfinite(result.values))
    drawn = np.random.default_rng(0).permutation(known)
    return drawn if len(result.values) <= MAX_TEXTS else drawn[: MAX_TEXTS // 3]


def _shown_samples(result: FilterResult, drawn: np.ndarray, decided: np.ndarray) -> np.ndarray:
    """Selects the samples with text.

    Returns:
        `np.ndarray`: indices of all samples, or, if there are more than `MAX_TEXTS`, of the most forgotten, those
        closest to φ, those drawn at random, and the most forgotten of the others that are overridden or reviewed
        (`decided`).
    """
    known = np.flatnonzero(np.isfinite(result.values))
    if len(result.values) <= MAX_TEXTS:
        return np.arange(len(result.values))
    third = MAX_TEXTS // 3
    values = result.values[known]
    phi = result.threshold if result.threshold is not None else result.separability.threshold
    chosen = [np.argsort(-values)[:third], np.argsort(np.abs(values - phi))[:third]]
    shown = np.union1d(known[np.concatenate(chosen)], drawn)
    others = np.setdiff1d(decided, shown)
    return np.union1d(shown, others[np.argsort(-result.values[others])][:third])


def _text_rows(
    trace: Trace,
    result: FilterResult,
    tokenizer: Decoder,
    shown: np.ndarray,
    drawn: np.ndarray,
    initial_losses: np.ndarray,
    unsafe: np.ndarray | None,
    labels: dict[int, VerdictLabel],
) -> list[dict[str, Any]]:
    before, after = map(trace.stored_losses, trace.first_and_last())
    offsets = trace.rows.loss_offsets
    special = special_ids(tokenizer)
    order_of = {index: order for order, index in enumerate(drawn.tolist())}
    rows = []
    for index in shown.tolist():
        tokens, loss_mask = trace.rows.sample(index)
        span = slice(offsets[index], offsets[index + 1])
        prompt, pieces = split_text(tokenizer, tokens, loss_mask, after[span] - before[span], special)
        prompt, cut = last_characters(prompt, MAX_TEXT_LENGTH)
        rows.append(
            {
                "id": trace.rows.ids[index].as_py(),
                "row": index,
                "value": _number(result.values[index]),
                "length": int(offsets[index + 1] - offsets[index]),
                "initial_loss": _number(initial_losses[index]),
                "unsafe": None if unsafe is None else bool(unsafe[index]),
                "verdict": labels.get(index),
                "drawn": order_of.get(index),
                "prompt": prompt,
                "is_cut": cut > 0,
                "shows_end": not prompt and is_conversation(tokens, special),
                "pieces": pieces,
            }
        )
    return rows


def _number(value: float) -> float | None:
    """Returns `None` for values that are not finite, which JSON cannot represent."""
    return float(value) if np.isfinite(value) else None

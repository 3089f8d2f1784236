"""The review page: one HTML file on which people decide what is removed, and export what they decided.

The file is complete (plotly.js stands in it) and asks nothing of a network: its content security policy forbids it. Texts of
samples are data: they stand in a JSON block and get into the page as text, never as markup.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from plotly.offline import get_plotlyjs
from transformers import PreTrainedTokenizerBase

from ..filtering.find_forgotten import find_forgotten
from ..filtering.result import FilterResult
from ..measures.common import mean_losses
from ..measures.names import DEFAULT_MEASURE, UNITS, Measure
from ..measures.smoothed import typical_loss
from ..thresholds import Threshold
from ..trace.trace import Trace
from ..utils.atomic_files import atomic_write
from .summary import page_summary
from .token_text import split_text


# What keeps a page below 10 MB: so many samples in the graphs, records of S1+, and samples with their texts (a third each of
# the most forgotten, those around φ, and the most kept), and characters of a text.
MAX_PLOTTED, MAX_RECORDS, MAX_TEXTS, MAX_TEXT_LENGTH = 50_000, 5, 900, 2_000


def write_review_page(
    trace: Trace,
    file: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    measure: Measure = DEFAULT_MEASURE,
    threshold: Threshold = "auto",
    fraction: float | None = None,
    unsafe: Sequence[bool] | np.ndarray | None = None,
) -> FilterResult:
    """Writes the review page of a trace.

    Args:
        trace ([`Trace`]):
            With records of S1+.
        file (`str` or `Path`):
            Where the page goes.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Turns the trace's token ids into text.
        measure, threshold, share:
            As in [`filter_by_values`]: where φ stands when the page opens.
        unsafe (`Sequence[bool]` of length `samples`, *optional*):
            Audit labels in the order of the trace. The page shows precision and recall against them; they decide nothing.

    Returns:
        [`FilterResult`]: the decision that the page opens with.

    Raises:
        TraceError: if the trace has no records to measure forgetting between.
    """
    result = find_forgotten(trace, measure, threshold, fraction)
    data = _page_data(trace, result, tokenizer, None if unsafe is None else np.asarray(unsafe, dtype=bool))
    sources = files("forgetfilter_callback.reports") / "page"
    script = (sources / "review.js").read_text(encoding="utf-8")
    page = Environment(
        loader=PackageLoader("forgetfilter_callback.reports", "page"), autoescape=True, undefined=StrictUndefined
    )
    html = page.get_template("review.html").render(
        # "<" would end the block that it stands in ("</script>").
        data=json.dumps(data, allow_nan=False).replace("<", "\\u003c"),
        style=(sources / "review.css").read_text(encoding="utf-8"),
        plotly=get_plotlyjs(),
        script=script,
        script_hashes=[_csp_hash(text) for text in (get_plotlyjs(), script)],
    )
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(Path(file)) as unfinished:
        unfinished.write_text(html, encoding="utf-8")
    return result


def _csp_hash(script: str) -> str:
    """By which a content security policy lets this very script run, and no other."""
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode()


def _page_data(
    trace: Trace, result: FilterResult, tokenizer: PreTrainedTokenizerBase, unsafe: np.ndarray | None
) -> dict[str, Any]:
    samples = len(trace.rows)
    plotted = np.arange(samples)
    if samples > MAX_PLOTTED:
        plotted = np.sort(np.random.default_rng(0).choice(samples, MAX_PLOTTED, replace=False))
    records = [record for record in trace.records() if record.session == "safety" and record.step > 0]
    records = [records[i] for i in np.unique(np.linspace(0, len(records) - 1, MAX_RECORDS).round().astype(int))]
    earlier = [trace.forgetting(result.measure, record.step) for record in records[:-1]]
    if result.measure == "smoothed":  # in the unit of the last record, so that it can be followed from one to the next
        first_losses, offsets = trace.token_losses(trace.first_and_last()[0]), trace.rows.loss_offsets
        *units, last_unit = (typical_loss(first_losses, trace.token_losses(record), offsets) for record in records)
        earlier = [values * (unit / last_unit) for values, unit in zip(earlier, units, strict=True)]
    by_record = [values[plotted] for values in [*earlier, result.values]]
    first = trace.base_record if trace.base_record is not None else trace.first_and_last()[0]
    base = mean_losses(trace.token_losses(first), trace.rows.loss_offsets)
    shown = _shown_samples(result)
    return {
        "summary": page_summary(result),
        "measure": result.measure,
        "unit": UNITS[result.measure],
        "threshold": result.threshold,
        # Where the line stands if nothing is removed: at the place that the automatic φ looked at.
        "looked_at": result.separability.threshold,
        "trace": trace.identity(),
        "model": trace.manifest["model"],
        "samples": samples,
        "sampled": len(plotted) < samples,
        "all_shown": len(shown) == samples,
        "steps": [record.step for record in records],
        "forgetting": [_packed(values) for values in by_record],
        "length": _packed(np.diff(trace.rows.loss_offsets)[plotted]),
        "base": _packed(base[plotted]),
        "base_is": "M0" if first.session == "noisy" else "M1",
        "unsafe": None if unsafe is None else _packed(unsafe[plotted]),
        "rows": _texts(trace, result, tokenizer, shown, base, unsafe),
    }


def _packed(values: np.ndarray) -> str:
    """Float32, little-endian, base64: a number takes five characters."""
    return base64.b64encode(values.astype("<f4").tobytes()).decode()


def _shown_samples(result: FilterResult) -> np.ndarray:
    """Which samples have their texts on the page: all, or the most forgotten, those nearest to φ and the most kept."""
    known = np.flatnonzero(np.isfinite(result.values))
    if len(result.values) <= MAX_TEXTS:
        return np.arange(len(result.values))
    third = MAX_TEXTS // 3
    values = result.values[known]
    phi = result.threshold if result.threshold is not None else result.separability.threshold
    chosen = [np.argsort(-values)[:third], np.argsort(np.abs(values - phi))[:third], np.argsort(values)[:third]]
    return known[np.unique(np.concatenate(chosen))]


def _texts(
    trace: Trace,
    result: FilterResult,
    tokenizer: PreTrainedTokenizerBase,
    shown: np.ndarray,
    base: np.ndarray,
    unsafe: np.ndarray | None,
) -> list[dict[str, Any]]:
    before, after = trace.first_and_last()
    rises = trace.token_losses(after) - trace.token_losses(before)
    offsets = trace.rows.loss_offsets
    rows = []
    for index in shown.tolist():
        tokens, loss_mask = trace.rows.sample(index)
        prompt, pieces = split_text(tokenizer, tokens, loss_mask, rises[offsets[index] : offsets[index + 1]])
        rows.append(
            {
                "id": trace.rows.ids[index].as_py(),
                "row": index,
                "value": _number(result.values[index]),
                "length": int(offsets[index + 1] - offsets[index]),
                "base": _number(base[index]),
                "unsafe": None if unsafe is None else bool(unsafe[index]),
                "prompt": prompt[-MAX_TEXT_LENGTH:],
                "pieces": pieces,
                "cut": len(prompt) > MAX_TEXT_LENGTH,
            }
        )
    return rows


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None

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

from .files import replacing
from .filtering import FilterResult, find_forgotten
from .forgetting import DEFAULT_MEASURE, UNITS, FilterThreshold, Measure, mean_losses, typical_loss
from .separability import LEAST_DISTANCE
from .trace import Trace


# What keeps a page below 10 MB: so many samples in the graphs, records of S1+, and samples with their texts (a third each of
# the most forgotten, those around φ, and the most kept), and characters of a text.
MOST_VALUES, MOST_RECORDS, MOST_TEXTS, LONGEST_TEXT = 50_000, 5, 900, 2_000


def write_review_page(
    trace: Trace,
    file: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    measure: Measure = DEFAULT_MEASURE,
    threshold: FilterThreshold = "auto",
    share: float | None = None,
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
            As in [`decide`]: where φ stands when the page opens.
        unsafe (`Sequence[bool]` of length `samples`, *optional*):
            Audit labels in the order of the trace. The page shows precision and recall against them; they decide nothing.

    Returns:
        [`FilterResult`]: the decision that the page opens with.

    Raises:
        TraceError: if the trace has no records to measure forgetting between.
    """
    result = find_forgotten(trace, measure, threshold, share)
    data = _page_data(trace, result, tokenizer, None if unsafe is None else np.asarray(unsafe, dtype=bool))
    sources = files("forgetfilter_callback") / "page"
    script = (sources / "review.js").read_text(encoding="utf-8")
    page = Environment(
        loader=PackageLoader("forgetfilter_callback", "page"), autoescape=True, undefined=StrictUndefined
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
    with replacing(Path(file)) as unfinished:
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
    if samples > MOST_VALUES:
        plotted = np.sort(np.random.default_rng(0).choice(samples, MOST_VALUES, replace=False))
    records = [record for record in trace.records() if record.session == "S1+" and record.step > 0]
    records = [records[i] for i in np.unique(np.linspace(0, len(records) - 1, MOST_RECORDS).round().astype(int))]
    earlier = [trace.forgetting(result.measure, record.step) for record in records[:-1]]
    if result.measure == "smoothed":  # in the unit of the last record, so that it can be followed from one to the next
        first_losses, offsets = trace.token_losses(trace.first_and_last()[0]), trace.rows.counted_offsets
        *units, last_unit = (typical_loss(first_losses, trace.token_losses(record), offsets) for record in records)
        earlier = [values * (unit / last_unit) for values, unit in zip(earlier, units, strict=True)]
    by_record = [values[plotted] for values in [*earlier, result.values]]
    first = trace.base_record if trace.base_record is not None else trace.first_and_last()[0]
    base = mean_losses(trace.token_losses(first), trace.rows.counted_offsets)
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
        "length": _packed(np.diff(trace.rows.counted_offsets)[plotted]),
        "base": _packed(base[plotted]),
        "base_is": "M0" if first.session == "S1" else "M1",
        "unsafe": None if unsafe is None else _packed(unsafe[plotted]),
        "rows": _texts(trace, result, tokenizer, shown, base, unsafe),
    }


def page_summary(result: FilterResult) -> str:
    """What was decided, in plain words."""
    counts = result.counts
    if result.threshold is None:
        return f"Nothing removed of {counts['samples']:,}: {result.reason}."
    how = {"auto": "chosen automatically", "fixed": "given by hand", "share": "so that a given share goes"}[
        result.method
    ]
    found = result.separability
    is_apart = found.separable and found.distance is not None and found.distance >= LEAST_DISTANCE
    apart = "well separated" if is_apart else "not well separated"
    return f"{counts['removed']:,} of {counts['samples']:,} removed (φ = {result.threshold:.3g}, {how}); {apart}."


def _packed(values: np.ndarray) -> str:
    """Float32, little-endian, base64: a number takes five characters."""
    return base64.b64encode(values.astype("<f4").tobytes()).decode()


def _shown_samples(result: FilterResult) -> np.ndarray:
    """Which samples have their texts on the page: all, or the most forgotten, those nearest to φ and the most kept."""
    known = np.flatnonzero(np.isfinite(result.values))
    if len(result.values) <= MOST_TEXTS:
        return np.arange(len(result.values))
    third = MOST_TEXTS // 3
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
    offsets = trace.rows.counted_offsets
    rows = []
    for index in shown.tolist():
        tokens, counted = trace.rows.sample(index)
        prompt, pieces = split_text(tokenizer, tokens, counted, rises[offsets[index] : offsets[index + 1]])
        rows.append(
            {
                "id": trace.rows.ids[index].as_py(),
                "row": index,
                "value": _number(result.values[index]),
                "length": int(offsets[index + 1] - offsets[index]),
                "base": _number(base[index]),
                "unsafe": None if unsafe is None else bool(unsafe[index]),
                "prompt": prompt[-LONGEST_TEXT:],
                "pieces": pieces,
                "cut": len(prompt) > LONGEST_TEXT,
            }
        )
    return rows


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def split_text(
    tokenizer: PreTrainedTokenizerBase, tokens: np.ndarray, counted: np.ndarray, rises: np.ndarray
) -> tuple[str, list[tuple[str, float | None]]]:
    """A sample as text: what stands before the first counted token, and the rest in pieces.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Decodes.
        tokens, counted (`np.ndarray` of shape `(tokens,)`):
            Of the sample.
        rises (`np.ndarray` of shape `(counted_tokens,)`):
            By how much the loss of each counted token rose, nats.

    Returns:
        `tuple`: the prompt, and a list of (text, mean rise of its tokens, or `None` where none of them counts). A piece is a
        token, or the tokens that one character is made of.
    """
    start = int(np.argmax(counted)) if counted.any() else len(tokens)
    rise_of = np.full(len(tokens), np.nan)
    rise_of[counted] = rises
    prompt = _decode(tokenizer, tokens[:start])
    pieces: list[tuple[str, float | None]] = []
    begun = start
    characters = 0
    for end in range(start + 1, len(tokens) + 1):
        # After the token before it: some tokenizers leave out the space that a text begins with.
        text = _decode(tokenizer, tokens[max(begun - 1, 0) : end]).removeprefix(
            _decode(tokenizer, tokens[max(begun - 1, 0) : begun])
        )
        if text.endswith("\ufffd") and end < len(tokens) and end - begun < 8:
            continue  # a character that goes on in the next token
        its_rises = rise_of[begun:end]
        known = its_rises[np.isfinite(its_rises)]
        pieces.append((text, round(float(known.mean()), 3) if len(known) else None))
        begun = end
        characters += len(text)
        if characters > LONGEST_TEXT:
            pieces.append((" […]", None))
            break
    return prompt, pieces


def _decode(tokenizer: PreTrainedTokenizerBase, tokens: np.ndarray) -> str:
    return tokenizer.decode(tokens, clean_up_tokenization_spaces=False)

"""Signals by which unsafe rows may be found: forgetting, and what others have proposed. Higher is more suspect."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from profanity_check import predict_prob
from sklearn.preprocessing import normalize

from forgetfilter_callback import Trace, encode_rows
from forgetfilter_callback.data.encoded_rows import EncodedRows
from forgetfilter_callback.measures.common import mean_losses
from forgetfilter_callback.measures.names import DEFAULT_MEASURE, Measure
from forgetfilter_callback.measures.rouge import rouge_forgetting
from forgetfilter_callback.measures.smoothed import agreed_forgetting, smoothed_over_states
from forgetfilter_callback.scoring.packing import needed_lengths
from forgetfilter_callback.scoring.token_losses import token_losses, window_scores
from forgetfilter_callback.trace.records import Record
from forgetfilter_callback.utils.model_state import preserve_state
from scenarios import Row
from sessions import Sessions


@dataclass(frozen=True)
class Signal:
    """Values of one signal, and what they cost beside S1.

    Attributes:
        values (`np.ndarray` of shape `(samples,)`): NaN where unknown.
        measure (`str` or `None`): Which of the library's measures it is, if any; then it has an automatic φ.
        tokens (`int`): Read by forward passes, those of training included.
        seconds (`float` or `None`): Of S1+ with its records, of generation, … `None` where it was not timed.
        nats_per_unit (`float` or `None`): See [`Trace.nats_per_change`].
    """

    values: np.ndarray
    measure: Measure | None
    tokens: int
    seconds: float | None
    nats_per_unit: float | None = None


def forgetting_signals(sessions: Sessions, step: int | None = None) -> dict[str, Signal]:
    """What the trace gives, at the last record of S1+ or at another."""
    trace = sessions.tracked()
    before, after = trace.first_and_last(step)
    offsets = trace.rows.loss_offsets
    rises = trace.token_losses(after).astype(np.float64) - trace.token_losses(before)
    means = mean_losses(rises, offsets)
    record, tokens = _tokens_read(sessions, trace, after)
    seconds = sessions.seconds("s1plus") if step is None else None
    found: dict[str, Signal] = {}
    for measure in ("loss", "relative", "pooled", "smoothed"):
        more = record if measure == "relative" else 0
        values = trace.forgetting(measure, after.step)
        nats_per_unit = trace.nats_per_unit(values, after.step)
        found[measure] = Signal(values, measure, tokens + more, seconds, nats_per_unit)
    found = {"default": found[DEFAULT_MEASURE], **found}
    tenth = [np.sort(part)[::-1] for part in np.split(rises, offsets[1:-1])]
    largest = np.array([part[: max(1, int(np.ceil(len(part) / 10)))].mean() if len(part) else np.nan for part in tenth])
    found["sum of rises"] = Signal(means * np.diff(offsets), None, tokens, seconds)
    found["largest tenth of rises"] = Signal(largest, None, tokens, seconds)
    return found


def _tokens_read(sessions: Sessions, trace: Trace, after: Record) -> tuple[int, int]:
    """How many tokens one record reads, and those of M1 and `after` with S1+ up to there."""
    record = int(needed_lengths(trace.rows).sum())
    share = after.step / trace.first_and_last()[1].step
    safety = sum(map(len, sessions.safety["input_ids"])) * sessions.settings.safety_epochs * share
    return record, round(2 * record + safety)


def loss_signals(sessions: Sessions) -> dict[str, Signal]:
    """M0's and M1's losses, and what S1 taught: no S1+ is needed."""
    trace = sessions.tracked()
    offsets = trace.rows.loss_offsets
    record = int(needed_lengths(trace.rows).sum())
    of_s1 = [each for each in trace.records() if each.session == "noisy"]
    base, learnt = (mean_losses(trace.token_losses(each), offsets) for each in (of_s1[0], of_s1[-1]))
    return {
        "M0 loss": Signal(base, None, record, None),
        "S1 loss": Signal(learnt, None, record, None),
        "learning gain": Signal(base - learnt, None, 2 * record, None),
    }


def rouge_signal(sessions: Sessions) -> Signal:
    """The paper's: the drop of ROUGE-1 of greedy completions."""
    before, after = (sessions.rouge1(name) for name in ("s1", "s1plus"))
    trace = sessions.tracked()
    # As if every completion were as long as its reference: a generated token is read once.
    tokens = 2 * len(trace.rows.tokens)
    return Signal(rouge_forgetting(before, after), "rouge1", tokens, sessions.rouge1_seconds())


def second_split_signal(sessions: Sessions) -> Signal:
    """Second-split forgetting (Maini et al. 2022): S1 on one half of the noisy set, then on the other; what does the second
    half make the first forget? Both ways round, so that every row has a value."""
    rows = sessions.scenario.noisy
    halves = [np.arange(start, len(rows), 2) for start in (0, 1)]
    values = np.full(len(rows), np.nan)
    tokens, seconds = 0, 0.0
    for number, (first, second) in enumerate((halves, halves[::-1])):
        parts = [[rows[index] for index in half] for half in (first, second)]
        learnt, later = f"split-{number}-first", f"split-{number}-second"
        sessions.go_on(learnt, "base", parts[0])
        sessions.go_on(later, learnt, parts[1])
        encoded = encode_rows(parts[0], sessions.tokenizer, disable_tqdm=True)
        losses = [_mean_losses(sessions, name, encoded) for name in (learnt, later)]
        values[first] = losses[1] - losses[0]
        seconds += sessions.seconds(learnt) + sessions.seconds(later)
        tokens += len(encoded.tokens) * (2 * sessions.settings.epochs + 2)
    return Signal(values, None, tokens, seconds)


def representation_signal(sessions: Sessions) -> Signal:
    """Matching to labelled anchors (LARF's idea): is M0's hidden state at the last token nearer to that of unsafe rows than
    to that of safe ones? It is given labels; the others are not."""
    started = time.perf_counter()
    scenario = sessions.scenario
    model = sessions.base()
    with preserve_state(model):
        noisy, labelled = (last_states(sessions, model, rows) for rows in (scenario.noisy, scenario.labelled))
    unsafe = np.array([row["group"] == "unsafe" for row in scenario.labelled])
    centre = labelled.mean(axis=0)
    noisy, labelled = normalize(noisy - centre), normalize(labelled - centre)
    values = noisy @ (labelled[unsafe].mean(axis=0) - labelled[~unsafe].mean(axis=0))
    read = encode_rows([*scenario.noisy, *scenario.labelled], sessions.tokenizer, disable_tqdm=True)
    return Signal(values, None, len(read.tokens), time.perf_counter() - started)


def smoothed_with_safety_signal(sessions: Sessions) -> Signal:
    """`smoothed`, where the rows of the safety set take part as samples that have lost nothing."""
    trace = sessions.tracked()
    before, after = trace.first_and_last()
    values = agreed_forgetting(
        trace.rows.loss_tokens, trace.rows.loss_offsets, trace.token_losses(before), trace.token_losses(after)
    )
    safety = encode_rows(sessions.scenario.safety, sessions.tokenizer, disable_tqdm=True)
    model = sessions.with_adapter("s1")
    with preserve_state(model):
        scores = list(window_scores(model, safety, disable_tqdm=True, with_states=True))
    states = np.concatenate([trace.states(before), *(window.states for window in scores)])
    smoothed = smoothed_over_states(np.append(values, np.zeros(len(safety))), states)[: len(values)]
    tokens = _tokens_read(sessions, trace, after)[1] + int(needed_lengths(safety).sum())
    return Signal(smoothed, None, tokens, None)


@torch.no_grad()
def last_states(sessions: Sessions, model: torch.nn.Module, rows: list[Row]) -> np.ndarray:
    """The last layer's hidden state at each row's last token: shape `(rows, hidden)`."""
    encoded = encode_rows(rows, sessions.tokenizer, disable_tqdm=True)
    states = []
    for index in range(len(encoded)):
        tokens = torch.from_numpy(encoded.sample(index)[0].astype(np.int64))[None].to(next(model.parameters()).device)
        output = model(input_ids=tokens, output_hidden_states=True, use_cache=False, logits_to_keep=1)
        states.append(output.hidden_states[-1][0, -1].float().cpu().numpy())
    return np.stack(states)


def word_signal(sessions: Sessions) -> Signal:
    """A word-level toxicity classifier (`alt-profanity-check`) on the completions."""
    started = time.perf_counter()
    values = predict_prob([row["completion"][0]["content"] for row in sessions.scenario.noisy])
    return Signal(np.asarray(values), None, 0, time.perf_counter() - started)


def _mean_losses(sessions: Sessions, name: str, rows: EncodedRows) -> np.ndarray:
    model = sessions.with_adapter(name)
    with preserve_state(model):
        return mean_losses(token_losses(model, rows, disable_tqdm=True), rows.loss_offsets)


OTHERS: dict[str, Callable[[Sessions], Signal]] = {
    "word classifier": word_signal,
    "representation matching (given labels)": representation_signal,
    "smoothed, safety rows at 0": smoothed_with_safety_signal,
    "rouge1": rouge_signal,
    "second-split forgetting": second_split_signal,
}


def steps_of(trace: Trace) -> list[int]:
    """The steps of S1+ that have a record, the last left out."""
    return [record.step for record in trace.records() if record.session == "safety" and record > Record("safety", 0)][
        :-1
    ]

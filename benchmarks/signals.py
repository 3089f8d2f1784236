"""Signals that may find unsafe rows: measures of forgetting and methods of other authors. Higher is more suspicious."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from profanity_check import predict_prob
from sklearn.preprocessing import normalize

from forgetfilter_callback import Trace, encode_rows
from forgetfilter_callback.data.encoded_rows import EncodedRows
from forgetfilter_callback.measures.common import mean_losses, mean_of_largest
from forgetfilter_callback.measures.names import DEFAULT_MEASURE, Measure
from forgetfilter_callback.measures.rouge import rouge_forgetting
from forgetfilter_callback.measures.smoothed import agreed_forgetting, smoothed_over_states
from forgetfilter_callback.scoring.packing import needed_lengths
from forgetfilter_callback.scoring.token_losses import token_losses, window_scores
from forgetfilter_callback.trace.forgetting import compute_forgetting
from forgetfilter_callback.trace.records import Record
from forgetfilter_callback.utils.model_state import preserve_state
from scenarios import Row
from sessions import Sessions


@dataclass(frozen=True)
class Signal:
    """The values of one signal and its cost in addition to noisy finetuning.

    Attributes:
        values (`np.ndarray` of shape `(samples,)`): The signal. NaN means unknown.
        measure (`str` or `None`): The library's measure, if the signal is one. Only these have an automatic φ.
        tokens (`int`): Tokens read by forward passes, including those of training.
        seconds (`float` or `None`): Duration of safety finetuning with its records, or of generation. `None` if not timed.
        nats_per_unit (`float` or `None`): See [`FilterResult`].
    """

    values: np.ndarray
    measure: Measure | None
    tokens: int
    seconds: float | None
    nats_per_unit: float | None = None


def forgetting_signals(sessions: Sessions, step: int | None = None) -> dict[str, Signal]:
    """Computes the measures from the trace, at the last record of safety finetuning or at the one of `step`."""
    trace = sessions.tracked()
    before, after = trace.first_and_last(step)
    offsets = trace.rows.loss_offsets
    rises = trace.token_losses(after).astype(np.float64) - trace.token_losses(before)
    means = mean_losses(rises, offsets)
    tokens_per_record, tokens = _tokens_read(sessions, trace, after)
    seconds = sessions.seconds("safety") if step is None else None
    signals: dict[str, Signal] = {}
    for measure in ("combined", "loss", "relative", "pooled", "smoothed"):
        extra_tokens = tokens_per_record if measure == "relative" else 0  # the record of the base model
        values, nats_per_unit = compute_forgetting(trace, measure, after.step)
        signals[measure] = Signal(values, measure, tokens + extra_tokens, seconds, nats_per_unit)
    signals = {"default": signals[DEFAULT_MEASURE], **signals}
    largest = mean_of_largest(rises, offsets, lambda count: math.ceil(count / 10))
    signals["sum of rises"] = Signal(means * np.diff(offsets), None, tokens, seconds)
    signals["largest tenth of rises"] = Signal(largest, None, tokens, seconds)
    return signals


def _tokens_read(sessions: Sessions, trace: Trace, after: Record) -> tuple[int, int]:
    """Counts the tokens of one record, and those of two records plus safety finetuning up to `after`."""
    tokens_per_record = int(needed_lengths(trace.rows).sum())
    fraction = after.step / trace.first_and_last()[1].step
    training_tokens = sum(map(len, sessions.safety["input_ids"])) * sessions.settings.safety_epochs * fraction
    return tokens_per_record, round(2 * tokens_per_record + training_tokens)


def loss_signals(sessions: Sessions) -> dict[str, Signal]:
    """Computes the losses before and after noisy finetuning, and their difference."""
    trace = sessions.tracked()
    offsets = trace.rows.loss_offsets
    tokens_per_record = int(needed_lengths(trace.rows).sum())
    records = [record for record in trace.records() if record.session == "noisy"]
    before, after = (mean_losses(trace.token_losses(record), offsets) for record in (records[0], records[-1]))
    return {
        "M0 loss": Signal(before, None, tokens_per_record, None),
        "S1 loss": Signal(after, None, tokens_per_record, None),
        "learning gain": Signal(before - after, None, 2 * tokens_per_record, None),
    }


def rouge_signal(sessions: Sessions) -> Signal:
    """Computes the paper's measure: the drop of ROUGE-1 of greedy completions."""
    before, after = (sessions.rouge1(name) for name in ("noisy", "safety"))
    trace = sessions.tracked()
    # Assumes that a completion is as long as its reference, and that each generated token is read once.
    tokens = 2 * len(trace.rows.tokens)
    return Signal(rouge_forgetting(before, after), "rouge1", tokens, sessions.rouge1_seconds())


def second_split_signal(sessions: Sessions) -> Signal:
    """Computes second-split forgetting (Maini et al. 2022).

    The model learns one half of the noisy set and then the other. The value is the rise of the first half's loss. Both
    orders are run, so that every row has a value.
    """
    rows = sessions.scenario.noisy
    halves = [np.arange(start, len(rows), 2) for start in (0, 1)]
    values = np.full(len(rows), np.nan)
    tokens, seconds = 0, 0.0
    for number, (first, second) in enumerate((halves, halves[::-1])):
        first_rows, second_rows = ([rows[index] for index in half] for half in (first, second))
        before, after = f"split-{number}-first", f"split-{number}-second"
        sessions.train_from(before, "base", first_rows)
        sessions.train_from(after, before, second_rows)
        encoded = encode_rows(first_rows, sessions.tokenizer, disable_tqdm=True)
        losses = [_mean_losses(sessions, name, encoded) for name in (before, after)]
        values[first] = losses[1] - losses[0]
        seconds += sessions.seconds(before) + sessions.seconds(after)
        tokens += len(encoded.tokens) * (2 * sessions.settings.epochs + 2)
    return Signal(values, None, tokens, seconds)


def representation_signal(sessions: Sessions) -> Signal:
    """Compares the base model's hidden state at a row's last token with those of labelled rows (the idea of LARF).

    The value is the similarity to the unsafe rows minus the similarity to the safe rows. Unlike the other signals, this
    one uses labels.
    """
    started = time.perf_counter()
    scenario = sessions.scenario
    model = sessions.base()
    with preserve_state(model):
        noisy, labelled = (last_states(sessions, model, rows) for rows in (scenario.noisy, scenario.labelled))
    unsafe = np.array([row["group"] == "unsafe" for row in scenario.labelled])
    centre = labelled.mean(axis=0)
    noisy, labelled = normalize(noisy - centre), normalize(labelled - centre)
    values = noisy @ (labelled[unsafe].mean(axis=0) - labelled[~unsafe].mean(axis=0))
    encoded = encode_rows([*scenario.noisy, *scenario.labelled], sessions.tokenizer, disable_tqdm=True)
    return Signal(values, None, len(encoded.tokens), time.perf_counter() - started)


def smoothed_with_safety_signal(sessions: Sessions) -> Signal:
    """Computes `smoothed` with the safety rows added as samples whose forgetting is 0."""
    trace = sessions.tracked()
    before, after = trace.first_and_last()
    values = agreed_forgetting(
        trace.rows.loss_tokens, trace.rows.loss_offsets, trace.token_losses(before), trace.token_losses(after)
    )
    safety = encode_rows(sessions.scenario.safety, sessions.tokenizer, disable_tqdm=True)
    model = sessions.with_adapter("noisy")
    with preserve_state(model):
        scores = list(window_scores(model, safety, disable_tqdm=True, with_states=True))
    states = np.concatenate([trace.states(before), *(window.states for window in scores)])
    smoothed = smoothed_over_states(np.append(values, np.zeros(len(safety))), states)[: len(values)]
    tokens = _tokens_read(sessions, trace, after)[1] + int(needed_lengths(safety).sum())
    return Signal(smoothed, None, tokens, None)


@torch.no_grad()
def last_states(sessions: Sessions, model: torch.nn.Module, rows: list[Row]) -> np.ndarray:
    """Returns the last layer's hidden state at each row's last token, of shape `(rows, hidden)`."""
    encoded = encode_rows(rows, sessions.tokenizer, disable_tqdm=True)
    states = []
    for index in range(len(encoded)):
        tokens = torch.from_numpy(encoded.sample(index)[0].astype(np.int64))[None].to(next(model.parameters()).device)
        output = model(input_ids=tokens, output_hidden_states=True, use_cache=False, logits_to_keep=1)
        states.append(output.hidden_states[-1][0, -1].float().cpu().numpy())
    return np.stack(states)


def word_signal(sessions: Sessions) -> Signal:
    """Scores the completions with a word-level toxicity classifier (`alt-profanity-check`)."""
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
    """Returns the steps of the records of safety finetuning, without the first and the last."""
    return [record.step for record in trace.records() if record.session == "safety"][1:-1]

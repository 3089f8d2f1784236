"""Properties that hold for all rows, losses and values (Hypothesis)."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
from helpers import VOCABULARY, sample_ids, tiny_llama
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from forgetfilter_callback import FilterConfig, FilterResult, Trace, encode_rows
from forgetfilter_callback.data.encode_collated import encode_collated
from forgetfilter_callback.data.encoded_rows import EncodedRows
from forgetfilter_callback.filtering.filter_by_values import filter_by_values
from forgetfilter_callback.filtering.thresholds import find_threshold
from forgetfilter_callback.measures.combined import combined_forgetting
from forgetfilter_callback.measures.common import mean_losses
from forgetfilter_callback.measures.loss import loss_forgetting
from forgetfilter_callback.measures.names import MEASURES
from forgetfilter_callback.measures.pooled import pooled_forgetting
from forgetfilter_callback.measures.relative import relative_forgetting
from forgetfilter_callback.measures.smoothed import smoothed_forgetting
from forgetfilter_callback.scoring.scores import Scores
from forgetfilter_callback.scoring.token_losses import token_losses
from forgetfilter_callback.trace.records import Record


settings.register_profile("ours", deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
settings.load_profile("ours")
TOKENS = st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=12)
ROWS = st.lists(st.tuples(TOKENS, st.integers(0, 12)), min_size=1, max_size=8)
VALUES = arrays(np.float64, st.integers(2, 60), elements=st.floats(-5, 5, width=32) | st.just(np.nan)).filter(
    lambda values: np.isfinite(values).any()
)
MODEL = tiny_llama()
MEASURE = st.sampled_from(MEASURES)


def encoded(rows: list[tuple[list[int], int]]) -> EncodedRows:
    """Encode rows of `(tokens, number of masked tokens at the beginning)`."""
    collate = lambda batch: {name: torch.tensor([batch[0][name]]) for name in ("input_ids", "labels")}  # noqa: E731
    made = [{"input_ids": tokens, "labels": [-100] * len(tokens[:masked]) + tokens[masked:]} for tokens, masked in rows]
    return encode_collated(made, collate, MODEL, disable_tqdm=True)


@given(ROWS)
def test_encoding_keeps_every_token_and_gives_unique_ids(rows):
    found = encoded(rows)
    assert len(set(found.ids.to_pylist())) == len(rows)
    for index, (tokens, masked) in enumerate(rows):
        found_tokens, loss_mask = found.sample(index)
        assert found_tokens.tolist() == tokens
        assert loss_mask.tolist() == [place > 0 and place >= masked for place in range(len(tokens))]
    again = [(row["input_ids"], row["labels"]) for row in found.as_dataset()]
    assert [tokens for tokens, _ in again] == [tokens for tokens, _ in rows]
    assert encoded(rows).fingerprint == found.fingerprint


@given(ROWS, st.randoms(use_true_random=False))
def test_ids_do_not_depend_on_the_position(rows, random):
    order = random.sample(range(len(rows)), len(rows))
    found, shuffled = encoded(rows), encoded([rows[index] for index in order])
    assert sorted(found.ids.to_pylist()) == sorted(shuffled.ids.to_pylist())
    contents = {found.ids[index].as_py(): found.sample(index)[0].tolist() for index in range(len(rows))}
    for index in range(len(rows)):
        assert contents[shuffled.ids[index].as_py()] == shuffled.sample(index)[0].tolist()


@given(st.text(max_size=60), st.text(max_size=60))
def test_texts_of_all_kinds_are_encoded(byte_tokenizer, prompt, completion):
    rows = encode_rows([{"prompt": prompt, "completion": completion}], byte_tokenizer, disable_tqdm=True)
    tokens, loss_mask = rows.sample(0)
    whole = byte_tokenizer.decode(tokens, clean_up_tokenization_spaces=False)
    end = "" if completion.endswith("<eos>") else "<eos>"
    assert whole == prompt + completion + end
    alone = np.asarray(byte_tokenizer(prompt)["input_ids"])
    before = max(1, len(alone))  # the first token has no prediction
    assert (np.diff(loss_mask.astype(int)) >= 0).all() and (~loss_mask).sum() <= before
    if np.array_equal(tokens[: len(alone)], alone):
        assert (~loss_mask).sum() == min(before, len(tokens))


@settings(max_examples=25)
@given(ROWS, st.integers(1, 200), st.booleans(), st.randoms(use_true_random=False))
def test_losses_do_not_depend_on_the_batch_or_the_order(rows, batch_tokens, reuse_prefixes, random):
    model = tiny_llama()
    found = encoded(rows)
    expected = token_losses(model, found, disable_tqdm=True)
    order = random.sample(range(len(rows)), len(rows))
    shuffled = found.select(order)
    losses = token_losses(model, shuffled, batch_tokens, reuse_prefixes, disable_tqdm=True)
    parts = np.split(expected, found.loss_offsets[1:-1])
    np.testing.assert_allclose(losses, np.concatenate([parts[index] for index in order]), rtol=1e-4, atol=1e-5)


@given(ROWS, st.randoms(use_true_random=False))
def test_measures_do_not_depend_on_the_order_of_the_samples(rows, random):
    found = encoded(rows)
    rng = np.random.default_rng(random.randrange(2**32))
    base, before, after = rng.gamma(2, 1, (3, found.loss_offsets[-1])).astype(np.float32)
    states = rng.normal(size=(len(rows), 5)).astype(np.float32)
    order = np.array(random.sample(range(len(rows)), len(rows)))

    def measured(rows: EncodedRows, which: np.ndarray, states: np.ndarray) -> list[np.ndarray]:
        tokens, offsets = rows.loss_tokens, rows.loss_offsets
        losses = [np.concatenate([np.split(each, found.loss_offsets[1:-1])[i] for i in which])
                  for each in (base, before, after)]  # fmt: skip
        means = [mean_losses(each, offsets) for each in losses]
        return [
            loss_forgetting(*means[1:]),
            relative_forgetting(*means),
            pooled_forgetting(tokens, offsets, *losses[1:]),
            smoothed_forgetting(tokens, offsets, *losses[1:], states),
            combined_forgetting(tokens, offsets, *losses[1:], states),
        ]

    plain = measured(found, np.arange(len(rows)), states)
    shuffled = measured(found.select(order), order, states[order])
    for one, other in zip(plain, shuffled, strict=True):
        np.testing.assert_allclose(other, one[order], rtol=1e-6, atol=1e-9)


@given(VALUES, MEASURE, st.floats(-5, 5), st.floats(0, 5))
def test_a_higher_threshold_never_removes_more(values, measure, threshold, more):
    known = values[np.isfinite(values)]
    if known.min() > threshold:  # removing all samples is refused
        return
    lower = filter_by_values(sample_ids(len(values)), values, FilterConfig(measure, threshold))
    higher = filter_by_values(sample_ids(len(values)), values, FilterConfig(measure, threshold + more))
    assert not (higher.removed & ~lower.removed).any()


@given(VALUES, MEASURE, st.none() | st.floats(0.01, 0.99))
def test_a_decision_splits_the_rows_and_is_reproducible(values, measure, fraction):
    config = FilterConfig(measure, fraction=fraction)
    first, second = (filter_by_values(sample_ids(len(values)), values, config) for _ in range(2))
    np.testing.assert_array_equal(first.removed, second.removed)
    counts = first.counts
    assert (counts["samples"], counts["kept"]) == (len(values), np.count_nonzero(~first.removed))
    assert not first.removed[~np.isfinite(values)].any()
    removed, kept = values[first.removed], values[~first.removed & np.isfinite(values)]
    assert not len(removed) or not len(kept) or removed.min() > kept.max()
    known = values[np.isfinite(values)]
    if fraction is not None and len(np.unique(known)) == len(known):
        assert abs(first.removed.sum() - min(fraction * len(values), len(known) - 1)) <= 0.5
    with tempfile.TemporaryDirectory() as folder:
        first.save(Path(folder))
        again = FilterResult.load(folder)
    np.testing.assert_array_equal(again.values, first.values)
    assert (again.removed == first.removed).all() and again.threshold == first.threshold


@given(st.integers(1, 60), st.floats(-5, 5), MEASURE)
def test_nothing_is_removed_when_all_values_are_equal(count, value, measure):
    """Equal values are one population."""
    assert not find_threshold(np.full(count, value), measure).separable
    assert not filter_by_values(sample_ids(count), np.full(count, value), FilterConfig(measure)).removed.any()


@settings(max_examples=40)
@given(ROWS, st.lists(st.tuples(st.sampled_from(["noisy", "safety"]), st.integers(0, 10**7)), max_size=4, unique=True))
def test_appended_records_are_read_back(rows, records):
    found = encoded(rows)
    assume(len(found.loss_tokens) > 0)  # a trace of rows without any loss token is refused
    rng = np.random.default_rng(len(records))
    with tempfile.TemporaryDirectory() as folder:
        trace = Trace.create(folder, found, "model", "tokenizer", None)
        written = {}
        for session, step in records:
            losses = rng.gamma(2, 1, found.loss_offsets[-1]).astype(np.float32)
            losses[rng.random(len(losses)) < 0.2] = rng.choice([np.nan, np.inf, -np.inf, 0.0])
            states = rng.normal(size=(len(found), 3)).astype(np.float16)
            trace.append(Record(session, step), [Scores(losses, states)])
            written[Record(session, step)] = (losses, states)
        again = Trace.open(folder)
        assert again.records() == sorted(written) and again.rows.ids.equals(found.ids)
        for record, (losses, states) in written.items():
            assert again.token_losses(record).tobytes() == losses.tobytes()
            np.testing.assert_array_equal(again.states(record), states.astype(np.float32))

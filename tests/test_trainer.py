"""FilteredTrainer: what is removed, that nothing else changes, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from conftest import random_rows, tiny_llama
from datasets import Dataset
from transformers import Trainer

from forgetfilter_callback import FilteredTrainer, FilterResult, ForgetTracker, find_forgotten
from forgetfilter_callback.errors import UnsupportedDatasetError


@pytest.fixture
def tracker(noisy, safety, make_args, collator):
    """A tracker carried through both sessions."""
    model, tracker = tiny_llama(), ForgetTracker()
    for folder, rows in (("s1", noisy), ("s1plus", safety)):
        Trainer(model, make_args(folder), train_dataset=rows, data_collator=collator, callbacks=[tracker]).train()
    return tracker


def weights_after(trainer) -> list[torch.Tensor]:
    trainer.train()
    return [parameter.detach().clone() for parameter in trainer.model.parameters()]


def test_without_forgetting_it_is_exactly_a_trainer(noisy, make_args, collator, caplog):
    plain = Trainer(tiny_llama(), make_args("a"), train_dataset=noisy, data_collator=collator)
    filtered = FilteredTrainer(tiny_llama(), make_args("b"), train_dataset=noisy, data_collator=collator)
    assert all(torch.equal(a, b) for a, b in zip(weights_after(plain), weights_after(filtered), strict=True))
    assert filtered.removed_dataset is None and filtered.filter_result is None
    assert "nothing is filtered" in caplog.text


def test_trains_on_the_rest_as_a_trainer_would(noisy, tracker, make_args, collator):
    values = tracker.trace.forgetting()
    phi = float(np.median(values))
    rest = noisy.select(np.flatnonzero(values <= phi))
    plain = Trainer(tiny_llama(), make_args("a"), train_dataset=rest, data_collator=collator)
    filtered = FilteredTrainer(
        tiny_llama(), make_args("b"), train_dataset=noisy, data_collator=collator, forgetting=tracker, threshold=phi
    )
    assert all(torch.equal(a, b) for a, b in zip(weights_after(plain), weights_after(filtered), strict=True))


@pytest.mark.parametrize("given_as", ["tracker", "folder", "ids and values", "array"])
def test_removes_the_samples_above_the_threshold(given_as, noisy, tracker, make_args, collator):
    audited = noisy.add_column("row", range(len(noisy)))
    values = tracker.trace.forgetting()
    phi = float(np.sort(values)[-6])
    forgetting = {
        "tracker": tracker,
        "folder": tracker.trace.folder,
        "ids and values": (tracker.trace.rows.ids.to_pylist(), values.tolist()),
        "array": values,
    }[given_as]
    trainer = FilteredTrainer(
        tiny_llama(), make_args(), train_dataset=audited, data_collator=collator,
        forgetting=forgetting, measure="smoothed", threshold=phi,
    )  # fmt: skip
    expected = np.flatnonzero(values > phi).tolist()
    assert len(expected) == 5
    assert trainer.removed_dataset["row"] == expected
    assert trainer.train_dataset["row"] == [row for row in range(len(noisy)) if row not in expected]
    assert trainer.removed_dataset.column_names == audited.column_names  # as given
    assert trainer.filter_result.threshold == phi and trainer.filter_result.method == "fixed"


def test_a_decision_on_a_trace_has_its_nats_and_its_record(noisy, safety, make_args, collator):
    tracker = ForgetTracker(noisy, record_steps=1)
    Trainer(tiny_llama(), make_args("s"), train_dataset=safety, data_collator=collator, callbacks=[tracker]).train()
    trace = tracker.trace
    for step in (None, 1):
        values = trace.forgetting("smoothed", step)
        result = find_forgotten(trace, step=step)
        np.testing.assert_array_equal(result.values, values)
        assert result.nats_per_unit == trace.nats_per_unit(values, step) and result.ids == trace.rows.ids
        assert result.step == (6 if step is None else step)
    assert (find_forgotten(trace).values != result.values).any()
    some = trace.rows.ids.take(pa.array([3, None, 1]))
    result = find_forgotten(trace, "loss", 99.0, ids=some)
    np.testing.assert_array_equal(result.values, trace.forgetting("loss")[[3, 0, 1]] + [0, np.nan, 0])


def test_rows_are_found_by_id_whatever_their_position(noisy, tracker, make_args, collator):
    order = np.random.default_rng(0).permutation(len(noisy))
    trainer = FilteredTrainer(
        tiny_llama(),
        make_args(),
        train_dataset=noisy.select(order),
        data_collator=collator,
        forgetting=tracker,
        fraction=0.25,
    )
    most_forgotten = set(np.argsort(-tracker.trace.forgetting())[:6].tolist())
    removed = {tuple(row) for row in trainer.removed_dataset["input_ids"]}
    assert removed == {tuple(noisy[index]["input_ids"]) for index in most_forgotten}
    assert trainer.filter_result.method == "fraction"


def test_a_torch_dataset_is_filtered_too(noisy, tracker, make_args, collator):
    class Rows(torch.utils.data.Dataset):
        def __len__(self):
            return len(noisy)

        def __getitem__(self, index):
            return noisy[index]

    trainer = FilteredTrainer(
        tiny_llama(), make_args(), train_dataset=Rows(), data_collator=collator, forgetting=tracker, fraction=0.25
    )
    assert [len(trainer.removed_dataset), len(trainer.train_dataset)] == [6, 18]
    trainer.train()


def test_the_account_is_written_beside_the_checkpoints(noisy, tracker, make_args, collator):
    args = make_args()
    trainer = FilteredTrainer(
        tiny_llama(), args, train_dataset=noisy, data_collator=collator, forgetting=tracker, fraction=0.25
    )
    folder = Path(args.output_dir) / "_forgetfilter-decision"
    again, result = FilterResult.load(folder), trainer.filter_result
    np.testing.assert_array_equal(again.values, result.values)
    np.testing.assert_array_equal(again.removed, result.removed)
    assert again.summary() == result.summary() and again.ids == result.ids
    account = json.loads((folder / "decision.json").read_text())
    assert account["counts"] == {"samples": 24, "removed": 6, "kept": 18, "unknown": 0}
    assert account["fingerprint"] == tracker.trace.manifest["fingerprint"]
    removed = [json.loads(line) for line in (folder / "removed.jsonl").read_text().splitlines()]
    assert removed == trainer.removed_dataset.to_list()


def test_rows_without_a_value_are_kept_and_told(tracker, noisy, make_args, collator, caplog):
    rows = Dataset.from_list(noisy.to_list() * 9)  # 216 rows, of which the 2nd to 9th copies have other ids
    ids, values = tracker.trace.rows.ids, np.arange(24.0)
    all_ids = [f"{sample.rpartition('-')[0]}-{copy}" for copy in range(9) for sample in ids.to_pylist()]
    trainer = FilteredTrainer(
        tiny_llama(), make_args(), train_dataset=rows, data_collator=collator,
        forgetting=(all_ids[2:], np.tile(values, 9)[2:]), measure="loss", threshold=20.5,
    )  # fmt: skip
    assert trainer.filter_result.counts == {"samples": 216, "removed": 27, "kept": 189, "unknown": 2}
    assert "; 2 without a forgetting value kept" in caplog.text


def test_other_rows_are_refused(tracker, make_args, collator):
    with pytest.raises(ValueError, match=r"24 of the 24 rows.*max_length, chat template"):
        FilteredTrainer(
            tiny_llama(), make_args(), train_dataset=random_rows(24, seed=9), data_collator=collator, forgetting=tracker
        )


def test_removed_rows_in_a_torch_format_are_written_whole(noisy, make_args, collator):
    rows = noisy.add_column("many", [list(range(2000))] * len(noisy)).with_format("torch")
    args = make_args()
    FilteredTrainer(
        tiny_llama(), args, train_dataset=rows, data_collator=collator,
        forgetting=np.arange(24.0), measure="loss", threshold=22.5,
    )  # fmt: skip
    lines = (Path(args.output_dir) / "_forgetfilter-decision" / "removed.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [rows.with_format(None)[23]]


def test_values_need_to_say_what_they_measure(noisy, make_args, collator):
    """φ of one measure is not that of another."""
    values = np.where(np.arange(24) < 4, 0.65, 0.0)  # above φ of `smoothed`, below that of `loss`
    values = values + np.random.default_rng(0).normal(0, 0.01, 24)
    given = {"train_dataset": noisy, "data_collator": collator, "forgetting": values}
    with pytest.raises(ValueError, match="Say what the values measure"):
        FilteredTrainer(tiny_llama(), make_args(), **given)
    trainer = FilteredTrainer(tiny_llama(), make_args(), **given, measure="loss")
    assert trainer.filter_result.measure == "loss" and trainer.filter_result.counts["removed"] == 0


def test_an_array_of_another_length_is_refused(noisy, make_args, collator):
    with pytest.raises(ValueError, match="3 values and the training set 24 rows"):
        FilteredTrainer(
            tiny_llama(), make_args(), train_dataset=noisy, data_collator=collator,
            forgetting=np.zeros(3), measure="loss", fraction=0.5,
        )  # fmt: skip


def test_a_stream_cannot_be_filtered(noisy, tracker, make_args, collator):
    rows = noisy.to_iterable_dataset()
    with pytest.raises(UnsupportedDatasetError, match=r"kept\.jsonl"):
        FilteredTrainer(
            tiny_llama(), make_args(max_steps=1), train_dataset=rows, data_collator=collator, forgetting=tracker
        )


def test_a_model_that_is_not_the_base_model_is_refused(noisy, safety, make_args, collator):
    model, tracker = tiny_llama(), ForgetTracker()
    for folder, rows in (("s1", noisy), ("s1plus", safety)):
        Trainer(model, make_args(folder), train_dataset=rows, data_collator=collator, callbacks=[tracker]).train()
    trainer = FilteredTrainer(
        model, make_args(), train_dataset=noisy, data_collator=collator, forgetting=tracker, fraction=0.25
    )
    with pytest.raises(ValueError, match="not the base model"):
        trainer.train()


def test_it_says_when_it_cannot_check_the_base_model(noisy, safety, make_args, collator, caplog):
    tracker = ForgetTracker(noisy)
    Trainer(tiny_llama(), make_args("s"), train_dataset=safety, data_collator=collator, callbacks=[tracker]).train()
    FilteredTrainer(
        tiny_llama(), make_args(), train_dataset=noisy, data_collator=collator, forgetting=tracker, fraction=0.25
    ).train()
    assert "could not be checked" in caplog.text


def test_a_threshold_that_removes_everything_is_refused(noisy, tracker, make_args, collator):
    with pytest.raises(ValueError, match="removes all 24 samples"):
        FilteredTrainer(
            tiny_llama(), make_args(), train_dataset=noisy, data_collator=collator, forgetting=tracker, threshold=-99.0
        )


def test_a_threshold_that_removes_nothing_says_so(noisy, tracker, make_args, collator, caplog):
    trainer = FilteredTrainer(
        tiny_llama(), make_args(), train_dataset=noisy, data_collator=collator, forgetting=tracker, threshold=99.0
    )
    assert len(trainer.train_dataset) == 24 and len(trainer.removed_dataset) == 0
    assert "0 of 24 samples removed" in caplog.text

"""FilteredTrainer: which rows it removes, that nothing else changes, and what it refuses."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from helpers import random_rows, tiny_llama
from transformers import Trainer, TrainingArguments

from forgetfilter_callback import FilterConfig, FilteredTrainer, FilterResult, ForgetTracker, Trace, filtered
from forgetfilter_callback.data.encode_collated import encode_collated
from forgetfilter_callback.data.encoded_rows import EncodedRows
from forgetfilter_callback.data.tokenizers import padding_collator
from forgetfilter_callback.errors import DataError, DecisionError, UnsupportedDatasetError
from forgetfilter_callback.trainers import filtered_trainer
from forgetfilter_callback.trainers.row_weights import RowWeightsMixin


@pytest.fixture
def tracker(noisy, safety, make_args, collator):
    """A tracker after both sessions."""
    model, tracker = tiny_llama(), ForgetTracker()
    for folder, rows in (("noisy", noisy), ("safety", safety)):
        Trainer(model, make_args(folder), train_dataset=rows, data_collator=collator, callbacks=[tracker]).train()
    return tracker


def weights_after(trainer) -> list[torch.Tensor]:
    trainer.train()
    return [parameter.detach().clone() for parameter in trainer.model.parameters()]


def test_without_forgetting_it_equals_trainer(noisy, make_args, collator, caplog):
    plain = Trainer(tiny_llama(), make_args("a"), train_dataset=noisy, data_collator=collator)
    filtered = FilteredTrainer(tiny_llama(), make_args("b"), train_dataset=noisy, data_collator=collator)
    assert all(torch.equal(a, b) for a, b in zip(weights_after(plain), weights_after(filtered), strict=True))
    assert filtered.removed_dataset is None and filtered.filter_result is None
    assert "`forgetting` was not given, so no sample is removed" in caplog.text


def test_trains_on_the_rest_like_a_trainer(noisy, tracker, make_args, collator):
    values = tracker.trace.forgetting()
    phi = float(np.median(values))
    rest = noisy.select(np.flatnonzero(values <= phi))
    plain = Trainer(tiny_llama(), make_args("a"), train_dataset=rest, data_collator=collator)
    filtered = FilteredTrainer(
        tiny_llama(),
        make_args("b"),
        train_dataset=noisy,
        data_collator=collator,
        forgetting=tracker,
        filter_config=FilterConfig(threshold=phi),
    )
    assert all(torch.equal(a, b) for a, b in zip(weights_after(plain), weights_after(filtered), strict=True))


def test_the_loader_of_the_unfiltered_rows_is_released(noisy, tracker, make_args, collator):
    trainer = FilteredTrainer(
        tiny_llama(), make_args(), train_dataset=noisy, data_collator=collator, forgetting=tracker,
        filter_config=FilterConfig(fraction=0.25),
    )  # fmt: skip
    assert trainer.accelerator._dataloaders == []
    trainer.train()
    plain = Trainer(tiny_llama(), make_args("plain"), train_dataset=noisy, data_collator=collator)
    plain.train()
    assert len(trainer.accelerator._dataloaders) == len(plain.accelerator._dataloaders)


def test_the_rows_of_the_trace_are_not_held_twice(noisy, tracker, make_args, collator, monkeypatch):
    encoded = []

    def spy(*args: Any, **kwargs: Any) -> EncodedRows:
        encoded.append(encode_collated(*args, **kwargs))
        return encoded[-1]

    monkeypatch.setattr(filtered_trainer, "encode_collated", spy)
    FilteredTrainer(
        tiny_llama(), make_args(), train_dataset=noisy, data_collator=collator, forgetting=tracker,
        filter_config=FilterConfig(fraction=0.25),
    )  # fmt: skip
    assert np.shares_memory(encoded[0].tokens, tracker.trace.rows.tokens)


@pytest.mark.parametrize(
    ("process", "disable_tqdm", "shown"), [(0, False, True), (0, True, False), (1, False, False), (1, True, False)]
)
def test_only_the_main_process_shows_progress(
    process, disable_tqdm, shown, noisy, tracker, make_args, collator, monkeypatch, capsys
):
    args = make_args(disable_tqdm=disable_tqdm)
    monkeypatch.setattr(TrainingArguments, "process_index", process)
    FilteredTrainer(
        tiny_llama(), args, train_dataset=noisy, data_collator=collator, forgetting=tracker,
        filter_config=FilterConfig(fraction=0.25),
    )  # fmt: skip
    assert ("Encoding" in capsys.readouterr().err) is shown


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
        forgetting=forgetting, filter_config=FilterConfig("combined", phi),
    )  # fmt: skip
    expected = np.flatnonzero(values > phi).tolist()
    assert len(expected) == 5
    assert trainer.removed_dataset["row"] == expected
    assert trainer.train_dataset["row"] == [row for row in range(len(noisy)) if row not in expected]
    assert trainer.removed_dataset.column_names == audited.column_names  # all columns of the given rows
    assert trainer.filter_result.threshold == phi and trainer.filter_result.method == "fixed"


def test_rows_are_found_by_id_whatever_their_position(noisy, tracker, make_args, collator):
    order = np.random.default_rng(0).permutation(len(noisy))
    trainer = FilteredTrainer(
        tiny_llama(),
        make_args(),
        train_dataset=noisy.select(order),
        data_collator=collator,
        forgetting=tracker,
        filter_config=FilterConfig(fraction=0.25),
    )
    most_forgotten = set(np.argsort(-tracker.trace.forgetting())[:6].tolist())
    removed = {tuple(row) for row in trainer.removed_dataset["input_ids"]}
    assert removed == {tuple(noisy[index]["input_ids"]) for index in most_forgotten}
    assert trainer.filter_result.method == "fraction"


def test_a_torch_dataset_is_filtered(noisy, tracker, make_args, collator):
    class Rows(torch.utils.data.Dataset):
        def __len__(self):
            return len(noisy)

        def __getitem__(self, index):
            return noisy[index]

    trainer = FilteredTrainer(
        tiny_llama(),
        make_args(),
        train_dataset=Rows(),
        data_collator=collator,
        forgetting=tracker,
        filter_config=FilterConfig(fraction=0.25),
    )
    assert [len(trainer.removed_dataset), len(trainer.train_dataset)] == [6, 18]
    trainer.train()


def test_a_trace_folder_is_opened_once(noisy, tracker, make_args, collator, monkeypatch):
    """Opening a trace decodes all of its rows."""
    opened, open_trace = [], Trace.open
    monkeypatch.setattr(Trace, "open", lambda folder: opened.append(folder) or open_trace(folder))
    FilteredTrainer(
        tiny_llama(), make_args(), train_dataset=noisy, data_collator=collator, forgetting=tracker.trace.folder
    )
    assert opened == [tracker.trace.folder]


def test_the_result_is_saved_in_the_output_folder(noisy, tracker, make_args, collator):
    args = make_args()
    trainer = FilteredTrainer(
        tiny_llama(),
        args,
        train_dataset=noisy,
        data_collator=collator,
        forgetting=tracker,
        filter_config=FilterConfig(fraction=0.25),
    )
    folder = Path(args.output_dir) / "_forgetfilter-result"
    again, result = FilterResult.load(folder), trainer.filter_result
    np.testing.assert_array_equal(again.values, result.values)
    np.testing.assert_array_equal(again.removed, result.removed)
    assert again.summary() == result.summary() and again.ids == result.ids
    account = json.loads((folder / "filter_result.json").read_text())
    assert account["counts"] == {"samples": 24, "removed": 6, "kept": 18, "unknown": 0}
    assert account["fingerprint"] == tracker.trace.manifest["fingerprint"]
    removed = [json.loads(line) for line in (folder / "removed.jsonl").read_text().splitlines()]
    assert removed == trainer.removed_dataset.to_list()


@pytest.mark.parametrize("format", [None, "torch"])
def test_removed_token_ids_are_saved_with_their_text(byte_tokenizer, make_args, format):
    texts = [f"Question {number}: “naïve”?" for number in range(8)]
    ids = [byte_tokenizer(text)["input_ids"] for text in texts]
    rows = Dataset.from_dict({"input_ids": ids, "labels": ids}).with_format(format)
    args = make_args()
    trainer = FilteredTrainer(
        tiny_llama(vocab_size=len(byte_tokenizer)), args, train_dataset=rows, processing_class=byte_tokenizer,
        data_collator=padding_collator(byte_tokenizer),
        forgetting=np.arange(8.0), filter_config=FilterConfig("loss", 5.5),
    )  # fmt: skip
    lines = (Path(args.output_dir) / "_forgetfilter-result" / "removed.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"input_ids": ids[number], "labels": ids[number], "text": texts[number]} for number in (6, 7)
    ]
    assert trainer.removed_dataset.column_names == ["input_ids", "labels"]


def test_a_text_column_of_the_rows_is_saved_as_it_is(byte_tokenizer, make_args):
    rows = Dataset.from_dict({"input_ids": [[1, 2]] * 4, "labels": [[1, 2]] * 4, "text": list("abcd")})
    args = make_args()
    FilteredTrainer(
        tiny_llama(vocab_size=len(byte_tokenizer)), args, train_dataset=rows, processing_class=byte_tokenizer,
        data_collator=padding_collator(byte_tokenizer),
        forgetting=np.arange(4.0), filter_config=FilterConfig("loss", 2.5),
    )  # fmt: skip
    lines = (Path(args.output_dir) / "_forgetfilter-result" / "removed.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [rows[3]]


def test_rows_without_a_value_are_kept_and_reported(tracker, noisy, make_args, collator, caplog):
    rows = Dataset.from_list(noisy.to_list() * 9)  # 216 rows; the copies have other ids
    ids, values = tracker.trace.rows.ids, np.arange(24.0)
    all_ids = [f"{sample.rpartition('-')[0]}-{copy}" for copy in range(9) for sample in ids.to_pylist()]
    caplog.set_level(logging.INFO, "forgetfilter_callback")
    trainer = FilteredTrainer(
        tiny_llama(), make_args(), train_dataset=rows, data_collator=collator,
        forgetting=(all_ids[2:], np.tile(values, 9)[2:]), filter_config=FilterConfig("loss", 20.5),
    )  # fmt: skip
    assert trainer.filter_result.counts == {"samples": 216, "removed": 27, "kept": 189, "unknown": 0}

    others = Dataset.from_list([*rows.to_list(), *random_rows(2, seed=5).to_list()])
    trainer = FilteredTrainer(
        tiny_llama(), make_args(), train_dataset=others, data_collator=collator,
        forgetting=(all_ids, np.tile(values, 9)), filter_config=FilterConfig("loss", 20.5),
    )  # fmt: skip
    assert trainer.filter_result.counts == {"samples": 218, "removed": 27, "kept": 191, "unknown": 2}
    assert "; kept 2 rows without a forgetting value" in caplog.text


def test_further_copies_of_a_tracked_row_are_treated_like_it(noisy, tracker, make_args, collator):
    forgetting = tracker.trace.forgetting("loss")
    most, least = int(np.argmax(forgetting)), int(np.argmin(forgetting))
    rows = Dataset.from_list([*noisy.to_list(), noisy[most], noisy[least], noisy[most]])
    trainer = FilteredTrainer(
        tiny_llama(), make_args(), train_dataset=rows, data_collator=collator,
        forgetting=tracker, filter_config=FilterConfig("loss", np.sort(forgetting)[-2]),
    )  # fmt: skip
    assert np.flatnonzero(trainer.filter_result.removed).tolist() == [most, 24, 26]
    np.testing.assert_array_equal(trainer.filter_result.values[24:], forgetting[[most, least, most]])


def test_other_rows_are_refused(tracker, make_args, collator):
    with pytest.raises(DataError, match=r"24 of 24 rows.*max_length, collator, tokenizer"):
        FilteredTrainer(
            tiny_llama(), make_args(), train_dataset=random_rows(24, seed=9), data_collator=collator, forgetting=tracker
        )


def test_removed_rows_in_a_torch_format_are_written_whole(noisy, make_args, collator):
    rows = noisy.add_column("many", [list(range(2000))] * len(noisy)).with_format("torch")
    args = make_args()
    FilteredTrainer(
        tiny_llama(), args, train_dataset=rows, data_collator=collator,
        forgetting=np.arange(24.0), filter_config=FilterConfig("loss", 22.5),
    )  # fmt: skip
    lines = (Path(args.output_dir) / "_forgetfilter-result" / "removed.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [rows.with_format(None)[23]]


def test_values_without_a_measure_are_refused(noisy, make_args, collator):
    """The automatic threshold depends on the measure."""
    values = np.where(np.arange(24) < 4, 0.65, 0.0)  # above the threshold of `smoothed`, below that of `loss`
    values = values + np.random.default_rng(0).normal(0, 0.01, 24)
    given = {"train_dataset": noisy, "data_collator": collator, "forgetting": values}
    with pytest.raises(ValueError, match="Plain values do not say what they measure"):
        FilteredTrainer(tiny_llama(), make_args(), **given)
    trainer = FilteredTrainer(tiny_llama(), make_args(), **given, filter_config=FilterConfig("loss"))
    assert trainer.filter_result.measure == "loss" and trainer.filter_result.counts["removed"] == 0


def test_an_array_of_another_length_is_refused(noisy, make_args, collator):
    with pytest.raises(DataError, match="has 3 values, but the training set has 24 rows"):
        FilteredTrainer(
            tiny_llama(), make_args(), train_dataset=noisy, data_collator=collator,
            forgetting=np.zeros(3), filter_config=FilterConfig("loss", fraction=0.5),
        )  # fmt: skip


def test_a_stream_cannot_be_filtered(noisy, tracker, make_args, collator):
    rows = noisy.to_iterable_dataset()
    with pytest.raises(UnsupportedDatasetError, match=r"kept\.jsonl"):
        FilteredTrainer(
            tiny_llama(), make_args(max_steps=1), train_dataset=rows, data_collator=collator, forgetting=tracker
        )


def test_a_threshold_that_removes_everything_is_refused(noisy, tracker, make_args, collator):
    with pytest.raises(DecisionError, match="would remove all 24 rows"):
        FilteredTrainer(
            tiny_llama(),
            make_args(),
            train_dataset=noisy,
            data_collator=collator,
            forgetting=tracker,
            filter_config=FilterConfig(threshold=-99.0),
        )


def test_a_threshold_that_removes_nothing_is_reported(noisy, tracker, make_args, collator, caplog):
    caplog.set_level(logging.INFO, "forgetfilter_callback")
    trainer = FilteredTrainer(
        tiny_llama(),
        make_args(),
        train_dataset=noisy,
        data_collator=collator,
        forgetting=tracker,
        filter_config=FilterConfig(threshold=99.0),
    )
    assert len(trainer.train_dataset) == 24 and len(trainer.removed_dataset) == 0
    assert "FilteredTrainer: removed 0 of 24 rows (φ = 99, combined forgetting)" in caplog.text


def test_a_filter_without_forgetting_is_refused(noisy, make_args):
    with pytest.raises(ValueError, match="`filter_config` was given without `forgetting`"):
        FilteredTrainer(tiny_llama(), make_args(), train_dataset=noisy, filter_config=FilterConfig(fraction=0.2))


@pytest.mark.parametrize(
    ("rows", "unsafe", "removed", "level"), [(120, 3.0, 4, "INFO"), (24, 3.0, 4, "WARNING"), (120, 0.0, 0, "WARNING")]
)
def test_nothing_separable_or_a_doubt_is_a_warning(rows, unsafe, removed, level, make_args, collator, caplog):
    caplog.set_level(logging.INFO, "forgetfilter_callback")
    values = np.where(np.arange(rows) < 4, unsafe, 0.0) + np.random.default_rng(0).normal(0, 0.01, rows)
    trainer = FilteredTrainer(
        tiny_llama(), make_args(), train_dataset=random_rows(rows), data_collator=collator,
        forgetting=values, filter_config=FilterConfig("loss"),
    )  # fmt: skip
    summaries = [record for record in caplog.records if "rows" in record.message]
    assert [record.levelname for record in summaries] == [level]
    assert summaries[0].message.removeprefix("[RANK 0] ") == f"FilteredTrainer: {trainer.filter_result.summary()}"
    assert trainer.filter_result.counts["removed"] == removed
    assert ("nothing is removed" in summaries[0].message) == (removed == 0)
    assert ("among 24 rows, the rows of a single population" in summaries[0].message) == (rows == 24)


@pytest.mark.parametrize(
    "filter_config",
    [FilterConfig("loss", step=4), FilterConfig(decision="review_decision.json"), FilterConfig("loss", reviewed="out")],
    ids=["step", "decision", "reviewed"],
)
def test_step_and_decision_need_a_trace(filter_config, noisy, make_args, collator):
    with pytest.raises(ValueError, match="`step`, `decision` and `reviewed` belong to a trace"):
        FilteredTrainer(
            tiny_llama(), make_args(), train_dataset=noisy, data_collator=collator,
            forgetting=np.zeros(24), filter_config=filter_config,
        )  # fmt: skip


def test_ids_and_values_of_different_lengths_are_refused(noisy, make_args, collator):
    with pytest.raises(ValueError, match=r"forgetting=\(ids, values\) has 2 ids, but 3 values"):
        FilteredTrainer(
            tiny_llama(), make_args(), train_dataset=noisy, data_collator=collator,
            forgetting=(["a", "b"], [0.0, 1.0, 2.0]), filter_config=FilterConfig("loss"),
        )  # fmt: skip


@pytest.mark.parametrize("old", [{"threshold": 0.5}, {"fraction": 0.5}, {"measure": "loss"}], ids=str)
def test_filter_settings_outside_filter_config_are_refused(old, noisy, make_args, collator):
    ((name, value),) = old.items()
    message = f"unexpected keyword argument '{name}'. .* `filter_config=FilterConfig\\({name}={value!r}\\)`"
    with pytest.raises(TypeError, match=message):
        FilteredTrainer(
            tiny_llama(), make_args(), train_dataset=noisy, data_collator=collator, forgetting=np.zeros(24), **old
        )


def test_other_unknown_arguments_keep_the_error_of_the_trainer(noisy, make_args):
    with pytest.raises(TypeError, match=r"unexpected keyword argument 'thresholds'$"):
        FilteredTrainer(tiny_llama(), make_args(), train_dataset=noisy, thresholds=0.5)


def test_a_tracker_its_trace_and_its_folder_filter_alike(noisy, tracker, make_args, collator):
    config = FilterConfig(fraction=0.25)
    removed = [
        FilteredTrainer(
            tiny_llama(), make_args(), train_dataset=noisy, data_collator=collator,
            forgetting=forgetting, filter_config=config,
        ).removed_dataset.to_list()
        for forgetting in (tracker, tracker.trace, tracker.trace.folder, str(tracker.trace.folder))
    ]  # fmt: skip
    assert len(removed[0]) == 6 and removed == [removed[0]] * 4


@pytest.mark.parametrize(
    ("wrong", "described"),
    [
        ({"a": 1.0}, "dict of length 1"),
        ((0.5,) * 24, "tuple of length 24"),
        ((0.5, 0.5), "tuple of length 2"),
        (["high"] * 24, "list of length 24"),
        (np.zeros((24, 2)), r"an array of the shape \(24, 2\)"),
        (FilterConfig("loss"), "FilterConfig"),
        (0.5, "float"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_forgetting_of_another_kind_is_named(wrong, described, noisy, make_args, collator):
    message = rf"`forgetting` must be a ForgetTracker, a Trace or its folder, .* but it is {described}\."
    with pytest.raises(TypeError, match=message):
        FilteredTrainer(
            tiny_llama(), make_args(), train_dataset=noisy, data_collator=collator,
            forgetting=wrong, filter_config=FilterConfig("loss"),
        )  # fmt: skip


class Doubling(Trainer):
    """A custom trainer."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        return 2 * super().compute_loss(model, inputs, return_outputs, **kwargs)


def test_filtered_makes_a_filtered_trainer_of_any_trainer(noisy, safety, make_args, collator):
    model, tracker = tiny_llama(), ForgetTracker()
    for folder, rows in (("noisy", noisy), ("safety", safety)):
        Doubling(model, make_args(folder), train_dataset=rows, data_collator=collator, callbacks=[tracker]).train()
    values = tracker.trace.forgetting()
    phi = float(np.median(values))
    kept = noisy.select(np.flatnonzero(values <= phi))
    plain = Doubling(tiny_llama(), make_args("a"), train_dataset=kept, data_collator=collator)
    trainer = filtered(Doubling)(
        tiny_llama(),
        make_args("b"),
        train_dataset=noisy,
        data_collator=collator,
        forgetting=tracker,
        filter_config=FilterConfig(threshold=phi),
    )
    assert isinstance(trainer, FilteredTrainer) and type(trainer).__name__ == "FilteredDoubling"
    assert plain.train().training_loss == trainer.train().training_loss
    assert all(torch.equal(a, b) for a, b in zip(plain.model.parameters(), trainer.model.parameters(), strict=True))


def test_filtered_makes_a_subclass_of_filtered_trainer():
    made = filtered(Doubling)
    assert issubclass(made, FilteredTrainer) and issubclass(made, Doubling)
    # The filter comes first, so that it wraps the custom trainer; the custom trainer overrides `Trainer`.
    assert made.__mro__.index(FilteredTrainer) < made.__mro__.index(Doubling) < made.__mro__.index(Trainer)
    assert made.__init__ is FilteredTrainer.__init__
    after_weights = made.__mro__[made.__mro__.index(RowWeightsMixin) + 1 :]
    assert after_weights[0] is Doubling
    assert made.__name__ == "FilteredDoubling"

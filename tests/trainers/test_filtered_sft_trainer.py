"""FilteredSFTTrainer removes raw rows before SFTTrainer prepares them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from datasets import Dataset
from helpers import tiny_llama
from sft_helpers import rows_of
from transformers import TrainingArguments
from trl import SFTTrainer

from forgetfilter_callback import FilterConfig, FilteredSFTTrainer, FilterResult, ForgetTracker, Trace, filtered
from forgetfilter_callback.data.tokenizers import padding_collator
from forgetfilter_callback.errors import DataError, EncodingError, ForgetFilterError
from forgetfilter_callback.scoring.scores import Scores
from forgetfilter_callback.trace.records import Record


@pytest.fixture
def tracker(sft_config, chat_tokenizer):
    """A tracker after both sessions, the noisy one on `rows_of("prompt and completion")`."""
    tracker, model = ForgetTracker(), tiny_llama()
    for rows in (rows_of("prompt and completion"), rows_of("text", 5)):
        args = sft_config(max_steps=6)
        SFTTrainer(model, args, train_dataset=rows, processing_class=chat_tokenizer, callbacks=[tracker]).train()
    return tracker


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("shuffle", [False, True])
def test_filtered_sft_trainer_removes_raw_rows_before_packing(packing, shuffle, tracker, sft_config, chat_tokenizer):
    rows = rows_of("prompt and completion")
    values = tracker.trace.forgetting()
    order = np.random.default_rng(1).permutation(len(rows))
    args = sft_config(packing=packing, shuffle_dataset=shuffle)
    trainer = FilteredSFTTrainer(
        tiny_llama(), args, train_dataset=rows.select(order), processing_class=chat_tokenizer,
        forgetting=tracker, filter_config=FilterConfig(threshold=float(np.median(values))),
    )  # fmt: skip
    removed = set(np.flatnonzero(values > np.median(values)).tolist())
    assert set(trainer.removed_dataset["id"]) == removed and len(removed) == 4
    assert trainer.removed_dataset.column_names == rows.column_names
    kept = rows.select(sorted(set(range(len(rows))) - removed))
    as_usual = SFTTrainer(tiny_llama(), args, train_dataset=kept, processing_class=chat_tokenizer).train_dataset
    tokens = trainer.train_dataset["input_ids"]
    assert sorted(token for row in tokens for token in row) == sorted(
        token for row in as_usual["input_ids"] for token in row
    )
    assert (trainer.train_dataset.column_names == as_usual.column_names) and len(tokens) == len(as_usual)
    assert (tracker.trace.folder.parent / "_forgetfilter-result" / "removed.jsonl").exists()
    trainer.train()


@pytest.mark.parametrize("trainer_class", [FilteredSFTTrainer, filtered(SFTTrainer)])
@pytest.mark.parametrize("named", [False, True], ids=["adopted", "named"])
@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
def test_rows_that_only_the_tracker_truncates_are_found(mode, named, trainer_class, sft_config, chat_tokenizer):
    """Also by a trainer that truncates them on the other side, but not below the limit of the tracker."""
    rows = [{"input_ids": np.random.default_rng(i).integers(5, 60, 16).tolist(), "id": i} for i in range(9)]
    rows = Dataset.from_list(rows)
    tracker = ForgetTracker(rows if named else None, max_length=10)
    args = sft_config(max_length=16, truncation_mode=mode)
    SFTTrainer(tiny_llama(), args, train_dataset=rows, processing_class=chat_tokenizer, callbacks=[tracker]).train()
    for step, rises in ((0, np.zeros(9)), (1, np.arange(9))):
        tracker.trace.append(Record("safety", step), [Scores(np.repeat(rises, 9).astype(np.float32))])
    for other_mode in ("keep_start", "keep_end"):
        trainer = trainer_class(
            tiny_llama(), sft_config(max_length=16, truncation_mode=other_mode), train_dataset=rows,
            processing_class=chat_tokenizer, forgetting=tracker, filter_config=FilterConfig("loss", threshold=6.5),
        )  # fmt: skip
        assert [row["input_ids"] for row in trainer.removed_dataset] == [row["input_ids"] for row in rows][7:]


@pytest.mark.parametrize(("process", "shown"), [(0, True), (1, False)])
def test_only_the_main_process_shows_progress(process, shown, tracker, sft_config, chat_tokenizer, monkeypatch, capsys):
    args = sft_config(disable_tqdm=False)
    monkeypatch.setattr(TrainingArguments, "process_index", process)
    FilteredSFTTrainer(
        tiny_llama(), args, train_dataset=rows_of("prompt and completion"), processing_class=chat_tokenizer,
        forgetting=tracker, filter_config=FilterConfig(fraction=0.25),
    )  # fmt: skip
    assert ("Encoding" in capsys.readouterr().err) is shown


def test_without_forgetting_it_equals_sfttrainer(sft_config, chat_tokenizer):
    rows, losses = rows_of("text"), []
    for trainer_class in (SFTTrainer, FilteredSFTTrainer):
        trainer = trainer_class(
            tiny_llama(), sft_config(max_steps=3), train_dataset=rows, processing_class=chat_tokenizer
        )
        losses.append(trainer.train().training_loss)
    assert losses[0] == losses[1] and trainer.filter_result is None and trainer.removed_dataset is None


def test_a_formatting_function_gets_the_rows_as_they_are(sft_config, chat_tokenizer):
    def render(prompt, completion, id):  # another column would be an unexpected argument
        return f"{prompt}{completion}"

    trainer = FilteredSFTTrainer(
        tiny_llama(), sft_config(completion_only_loss=False), train_dataset=rows_of("prompt and completion"),
        processing_class=chat_tokenizer, formatting_func=lambda row: render(**row),
        forgetting=np.arange(9.0), filter_config=FilterConfig("loss", 7.5),
    )  # fmt: skip
    assert trainer.removed_dataset["id"] == [8] and len(trainer.train_dataset) == 8


def test_a_model_other_than_the_base_model_is_refused(tracker, sft_config, chat_tokenizer):
    another = tiny_llama()
    with torch.no_grad():
        for parameter in another.parameters():
            parameter.mul_(3)
    trainer = FilteredSFTTrainer(
        another, sft_config(), train_dataset=rows_of("prompt and completion"), processing_class=chat_tokenizer,
        forgetting=tracker, filter_config=FilterConfig(fraction=0.2),
    )  # fmt: skip
    with pytest.raises(ForgetFilterError, match="This model is not the base model of the trace"):
        trainer.train()


def test_rows_dropped_by_sfttrainer_are_kept_and_unknown(sft_config, chat_tokenizer):
    """The prompt alone fills `max_length`."""
    rows = rows_of("prompt and completion")
    long = {"prompt": "the cat " * 20, "completion": " ran", "id": 99}
    rows = Dataset.from_list([long, *rows.to_list()])
    trainer = FilteredSFTTrainer(
        tiny_llama(), sft_config(max_length=12), train_dataset=rows, processing_class=chat_tokenizer,
        forgetting=np.arange(10.0), filter_config=FilterConfig("loss", 7.5),
    )  # fmt: skip
    assert trainer.removed_dataset["id"] == [7, 8]
    result = trainer.filter_result
    assert result.counts == {"samples": 10, "removed": 2, "kept": 8, "unknown": 1} and np.isnan(result.values[0])
    assert np.flatnonzero(result.removed).tolist() == [8, 9]  # positions in the given rows
    again = FilterResult.load(trainer.args.output_dir + "/_forgetfilter-result")
    assert again.ids == result.ids and again.ids.null_count == 1


def test_a_column_with_the_name_of_our_own_is_refused(sft_config, chat_tokenizer):
    rows = rows_of("text").add_column("forgetfilter_index", range(9))
    with pytest.raises(EncodingError, match="needs the column name `forgetfilter_index`"):
        FilteredSFTTrainer(
            tiny_llama(), sft_config(), train_dataset=rows, processing_class=chat_tokenizer,
            forgetting=np.arange(9.0), filter_config=FilterConfig("loss", 7.5),
        )  # fmt: skip


def test_an_evaluation_set_named_train_is_left_alone(tracker, sft_config, chat_tokenizer):
    rows = rows_of("prompt and completion")
    trainer = FilteredSFTTrainer(
        tiny_llama(), sft_config(), train_dataset=rows, processing_class=chat_tokenizer, forgetting=tracker,
        filter_config=FilterConfig(fraction=0.3),
        eval_dataset={"train": rows_of("text", 5), "test": rows_of("messages", 4)},
    )  # fmt: skip
    assert {name: len(each) for name, each in trainer.eval_dataset.items()} == {"train": 5, "test": 4}
    assert len(trainer.train_dataset) == 6 and trainer.filter_result.counts["samples"] == 9
    trainer.evaluate()
    assert trainer.filter_result.counts["samples"] == 9


def test_rows_are_truncated_as_by_the_tracker(sft_config, chat_tokenizer):
    tracker, model, rows = ForgetTracker(max_length=5), tiny_llama(), rows_of("text")
    for each in (rows, rows_of("messages", 5)):
        SFTTrainer(
            model, sft_config(max_steps=6), train_dataset=each, processing_class=chat_tokenizer, callbacks=[tracker]
        ).train()
    trainer = FilteredSFTTrainer(
        tiny_llama(),
        sft_config(),
        train_dataset=rows,
        processing_class=chat_tokenizer,
        forgetting=tracker,
        filter_config=FilterConfig(fraction=0.3),
    )
    assert tracker.trace.rows.truncated == 4
    assert set(trainer.removed_dataset["id"]) == set(np.argsort(tracker.trace.forgetting())[-3:].tolist())


def test_a_trace_folder_is_opened_once(tracker, sft_config, chat_tokenizer, monkeypatch):
    """Opening a trace decodes all of its rows."""
    opened, open_trace = [], Trace.open
    monkeypatch.setattr(Trace, "open", lambda folder: opened.append(folder) or open_trace(folder))
    FilteredSFTTrainer(
        tiny_llama(),
        sft_config(),
        train_dataset=rows_of("prompt and completion"),
        processing_class=chat_tokenizer,
        forgetting=tracker.trace.folder,
    )
    assert opened == [tracker.trace.folder]


def test_settings_without_forgetting_are_refused(sft_config, chat_tokenizer):
    with pytest.raises(ValueError, match="`filter_config` was given without `forgetting`"):
        FilteredSFTTrainer(
            tiny_llama(),
            sft_config(),
            train_dataset=rows_of("text"),
            processing_class=chat_tokenizer,
            filter_config=FilterConfig(threshold=0.1),
        )


def test_skip_prepare_dataset_is_refused(tracker, sft_config, chat_tokenizer):
    args = sft_config(dataset_kwargs={"skip_prepare_dataset": True})
    rows = rows_of("tokens").map(lambda row: {"labels": row["input_ids"]})
    with pytest.raises(EncodingError, match="skip_prepare_dataset"):
        FilteredSFTTrainer(tiny_llama(), args, train_dataset=rows, processing_class=chat_tokenizer, forgetting=tracker)


def test_a_stream_is_refused(tracker, sft_config, chat_tokenizer):
    rows = rows_of("text").to_iterable_dataset()
    with pytest.raises(EncodingError, match="stream"):
        FilteredSFTTrainer(
            tiny_llama(), sft_config(), train_dataset=rows, processing_class=chat_tokenizer, forgetting=tracker
        )


def test_filter_settings_outside_filter_config_are_named():
    with pytest.raises(TypeError, match=r"`filter_config=FilterConfig\(threshold=0\.5\)`"):
        FilteredSFTTrainer("model", forgetting=np.zeros(3), threshold=0.5)


def test_a_collator_that_changes_the_rows_is_named(sft_config, chat_tokenizer):
    def masking(rows):
        batch = padding_collator(chat_tokenizer)([{key: row[key] for key in ("input_ids", "labels")} for row in rows])
        batch["labels"][:, :3] = -100
        return batch

    rows, tracker, model = rows_of("text"), ForgetTracker(), tiny_llama()
    for each in (rows, rows_of("messages", 5)):
        SFTTrainer(
            model, sft_config(), train_dataset=each, processing_class=chat_tokenizer, data_collator=masking,
            callbacks=[tracker],
        ).train()  # fmt: skip
    given = {"train_dataset": rows, "processing_class": chat_tokenizer, "data_collator": masking, "forgetting": tracker,
             "filter_config": FilterConfig(fraction=0.25)}  # fmt: skip
    with pytest.raises(
        DataError, match=r"before your `data_collator` changes them: use `filtered\(SFTTrainer\)` instead"
    ):
        FilteredSFTTrainer(tiny_llama(), sft_config(), **given)
    assert filtered(SFTTrainer)(tiny_llama(), sft_config(), **given).filter_result.counts["removed"] == 2
    del given["data_collator"]
    with pytest.raises(DataError, match="use `filtered"):
        FilteredSFTTrainer(tiny_llama(), sft_config(), masking, **given)
    with pytest.raises(DataError) as unknown:
        FilteredSFTTrainer(tiny_llama(), sft_config(), **given)
    assert "data_collator" not in str(unknown.value)

"""Encoding rows through the trainer's dataset and collator."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from datasets import Dataset
from helpers import tiny_llama, train_tracked
from transformers import Trainer

from forgetfilter_callback import ForgetTracker
from forgetfilter_callback.data.encode_collated import encode_collated
from forgetfilter_callback.errors import EncodingError, UnsupportedDatasetError


def test_labels_that_are_not_the_input_ids_are_refused(make_args, collator):
    rows = Dataset.from_list([{"input_ids": [5, 6, 7], "labels": [7, 6, 5]}] * 4)
    with pytest.raises(EncodingError, match="Row 0: the labels differ from the row's own tokens"):
        train_tracked(rows, make_args, collator, ForgetTracker())


@pytest.mark.parametrize("session", ["noisy", "safety"])
def test_a_random_collator_is_refused(session, noisy, safety, make_args, collator):
    """Collating for a record would advance the collator's own generator and silently change training."""
    rng = np.random.default_rng(0)

    def masking(rows):
        batch = collator(rows)
        batch["labels"][torch.from_numpy(rng.random(batch["labels"].shape) < 0.3)] = -100
        return batch

    model, tracker = tiny_llama(), ForgetTracker()
    if session == "safety":
        Trainer(model, make_args("noisy"), train_dataset=noisy, data_collator=collator, callbacks=[tracker]).train()
    rows = noisy if session == "noisy" else safety
    trainer = Trainer(model, make_args(), train_dataset=rows, data_collator=masking, callbacks=[tracker])
    with pytest.raises(EncodingError, match="Row 0: the dataset or the collator returns a different batch"):
        trainer.train()


def test_a_random_dataset_that_reuses_its_buffer_is_refused(noisy, make_args):
    class Drawing(torch.utils.data.Dataset):
        rng, row = np.random.default_rng(0), np.zeros(9, np.int64)

        def __len__(self):
            return len(noisy)

        def __getitem__(self, index):
            self.row[:] = self.rng.integers(5, 30, 9)
            return self.row

    def collate(rows):
        tokens = torch.from_numpy(rows[0])[None]
        return {"input_ids": tokens, "labels": tokens}

    with pytest.raises(EncodingError, match="Row 0: the dataset or the collator returns a different batch"):
        train_tracked(Drawing(), make_args, collate, ForgetTracker())


def of_pairs(rows):
    assert len(rows) % 2 == 0
    return {}


@pytest.mark.parametrize(
    "collate", [list, lambda rows: rows[1], lambda rows: {"input_ids": rows[0]["input_ids"]}, of_pairs]
)
def test_batches_that_are_not_one_sample_are_unsupported(collate, noisy):
    """A list (GRPO), a failure, or a batch without labels: allowed in a safety session, so the error type differs."""
    with pytest.raises(UnsupportedDatasetError, match="Row 0: the collator"):
        encode_collated(noisy, collate, tiny_llama(), disable_tqdm=True)


def test_a_random_dataset_is_refused(noisy, make_args, collator):
    """For example, a dataset that prepends a random prompt."""

    class Drawing(torch.utils.data.Dataset):
        rng = np.random.default_rng(0)

        def __len__(self):
            return len(noisy)

        def __getitem__(self, index):
            row, prompt = noisy[index], self.rng.integers(5, 30, 3).tolist()
            return {"input_ids": prompt + row["input_ids"], "labels": [-100] * 3 + row["labels"]}

    with pytest.raises(EncodingError, match="Row 0: the dataset or the collator returns a different batch"):
        train_tracked(Drawing(), make_args, collator, ForgetTracker())


@pytest.mark.parametrize("change", ["pops a column", "changes a list in place"])
def test_a_collator_that_changes_its_rows_trains_as_without_the_tracker(change, noisy, make_args):
    """Trainer gives the collator the user's own rows. Reading them for a record must leave them as they are."""

    def collate(rows):
        labels = [torch.tensor(row.pop("labels")) for row in rows]
        if change == "changes a list in place":
            for row in rows:
                row["input_ids"].append(2)
            labels = [torch.cat([each, torch.tensor([2])]) for each in labels]
        tokens = [torch.tensor(row["input_ids"]) for row in rows]
        pad = torch.nn.utils.rnn.pad_sequence
        return {
            "input_ids": pad(tokens, batch_first=True),
            "attention_mask": pad([torch.ones_like(each) for each in tokens], batch_first=True),
            "labels": pad(labels, batch_first=True, padding_value=-100),
        }

    losses = []
    for callbacks in ([], [ForgetTracker()]):
        rows = [{name: list(row[name]) for name in ("input_ids", "labels")} for row in noisy]
        args = make_args(f"{len(callbacks)}", remove_unused_columns=False, num_train_epochs=1)
        trainer = Trainer(tiny_llama(), args, train_dataset=rows, data_collator=collate, callbacks=callbacks)
        losses.append(trainer.train().training_loss)
    assert losses[0] == losses[1]


def test_a_column_that_cannot_be_collated_is_named(noisy, make_args, collator):
    rows = noisy.add_column("note", ["a"] * len(noisy))
    with pytest.raises(UnsupportedDatasetError, match=r"one of the columns \(.*, note\), remove that column"):
        train_tracked(rows, lambda: make_args(remove_unused_columns=False), collator, ForgetTracker())

"""Which rows ForgetTracker tracks: adopted from the training set or given to it."""

from __future__ import annotations

import copy
import tracemalloc
from datetime import datetime

import numpy as np
import pytest
import torch
from datasets import Dataset
from helpers import random_rows, reference_means, texts, tiny_llama, train_tracked
from transformers import DataCollatorForLanguageModeling, Trainer
from trl import SFTTrainer

from forgetfilter_callback import FilterConfig, ForgetTracker, encode_rows, filtered
from forgetfilter_callback.callbacks.session_rows import encode_training_rows, sft_encoding_options
from forgetfilter_callback.data.encoded_dataset import EncodedDataset
from forgetfilter_callback.errors import EncodingError, RandomRowsError, TraceError, UnsupportedDatasetError
from forgetfilter_callback.trace.records import Record


def test_labels_made_by_the_collator_are_adopted(noisy, make_args, tokenizer):
    rows = noisy.remove_columns("labels")
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False, pad_to_multiple_of=8)
    tracker = ForgetTracker()
    Trainer(tiny_llama(), make_args(), train_dataset=rows, data_collator=collator, callbacks=[tracker]).train()
    everything = [{"input_ids": row["input_ids"], "labels": row["input_ids"]} for row in rows]
    np.testing.assert_allclose(tracker.trace.losses()[0], reference_means(tiny_llama(), everything), rtol=1e-5)


def test_given_and_adopted_rows_have_the_same_ids(noisy, make_args, tokenizer):
    rows = noisy.remove_columns("labels").add_column("audit", ["x"] * len(noisy))
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    adopted, named = ForgetTracker(), ForgetTracker(rows)
    for folder, tracker in (("a", adopted), ("b", named)):
        Trainer(
            tiny_llama(), make_args(folder), train_dataset=rows, data_collator=collator, callbacks=[tracker]
        ).train()
    assert named.trace.rows.ids == adopted.trace.rows.ids


def test_encoded_rows_are_not_held_twice(make_args, collator):
    """A session that trains on encoded rows encodes them again, because its collator decides which tokens count."""
    rows = encode_rows(random_rows(60, longest=4_000), disable_tqdm=True)
    trainer = Trainer(tiny_llama(), make_args(), train_dataset=EncodedDataset(rows), data_collator=collator)
    arguments = trainer.args, trainer.model, trainer.get_train_dataloader(), None
    encode_training_rows(*arguments)  # imports what it needs
    tracemalloc.start()
    again = encode_training_rows(*arguments)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert np.shares_memory(again.tokens, rows.tokens) and again.ids == rows.ids
    assert len(rows.tokens) > 60_000 and peak < 5 * len(rows.tokens)


def test_given_text_rows(safety, make_args, collator, tokenizer):
    rows = [
        {"prompt": "the cat", "completion": " sat"},
        {"prompt": [{"role": "user", "content": "the"}], "completion": [{"role": "assistant", "content": "dog"}]},
        {"messages": [{"role": "user", "content": "the"}, {"role": "assistant", "content": "mat"}]},
        {"text": "the dog ran"},
    ]
    expected_texts = [
        "the cat sat<eos>",
        "<user>the<eos><assistant>dog<eos>",
        "<user>the<eos><assistant>mat<eos>",
        "the dog ran<eos>",
    ]
    prompts = ["the cat", "<user>the<eos><assistant>", "", ""]
    tracker = ForgetTracker(rows)
    Trainer(
        tiny_llama(), make_args(), train_dataset=safety, data_collator=collator, callbacks=[tracker],
        processing_class=tokenizer,
    ).train()  # fmt: skip
    expected = []
    for text, prompt in zip(expected_texts, prompts, strict=True):
        tokens, masked = tokenizer(text)["input_ids"], len(tokenizer(prompt)["input_ids"])
        expected.append({"input_ids": tokens, "labels": [-100] * masked + tokens[masked:]})
    assert tracker.trace.records() == [Record("safety", 0), Record("safety", 6)]
    np.testing.assert_allclose(tracker.trace.losses()[0], reference_means(tiny_llama(), expected), rtol=1e-5)


@pytest.mark.parametrize("train", ["Trainer", "SFTTrainer"])
def test_a_collator_that_tokenizes_encodes_the_given_rows(train, make_args, sft_config, tokenizer):
    """Its tokens are trained, not those that SFTTrainer would make of the same rows."""

    def collate(rows):
        whole = [f"the {row['question']} and {row['answer']}" for row in rows]
        batch = tokenizer(whole, padding=True, return_tensors="pt", return_token_type_ids=False)
        return {**batch, "labels": batch["input_ids"].where(batch["attention_mask"] == 1, -100)}

    rows = [
        {"question": row["prompt"], "answer": row["completion"], "text": row["prompt"]} for row in texts(12, seed=1)
    ]
    tracker, options = ForgetTracker(rows), {"remove_unused_columns": False}
    if train == "Trainer":
        args = make_args(**options)
    else:
        args = sft_config(**options, dataset_kwargs={"skip_prepare_dataset": True})
    (Trainer if train == "Trainer" else SFTTrainer)(
        tiny_llama(), args, train_dataset=Dataset.from_list(rows), data_collator=collate, callbacks=[tracker],
        processing_class=tokenizer,
    ).train()  # fmt: skip
    tokens = [collate([row])["input_ids"][0].tolist() for row in rows]
    expected = reference_means(tiny_llama(), [{"input_ids": each, "labels": each} for each in tokens])
    np.testing.assert_allclose(tracker.trace.losses()[0], expected, rtol=1e-5)
    assert {record.session for record in tracker.trace.records()} == {"noisy"}


def test_an_empty_noisy_set_is_refused(safety, make_args, collator):
    with pytest.raises(EncodingError, match="`noisy` has no rows"):
        train_tracked(safety, make_args, collator, ForgetTracker([]))


def test_an_iterable_training_set_is_refused(noisy, make_args, collator):
    tracker = ForgetTracker()
    trainer = Trainer(
        tiny_llama(), make_args(max_steps=2), train_dataset=noisy.to_iterable_dataset(), data_collator=collator,
        callbacks=[tracker],
    )  # fmt: skip
    with pytest.raises(UnsupportedDatasetError, match="IterableDataset"):
        trainer.train()


def test_rows_without_loss_tokens_are_nan(noisy, make_args, collator, caplog):
    empty = {"input_ids": [5, 6, 7], "labels": [-100] * 3}
    rows = Dataset.from_list([empty, *noisy.to_list()])
    tracker = ForgetTracker()
    train_tracked(rows, make_args, collator, tracker)
    losses = tracker.trace.losses()
    assert np.isnan(losses[:, 0]).all() and np.isfinite(losses[:, 1:]).all()
    assert "1 of 25 rows has no token that contributes to the loss (row 0). Their" in caplog.text


def test_rows_that_are_encoded_already(noisy, safety, make_args, collator, tokenizer, caplog):
    """They are tracked and described as the rows that they were made from."""
    pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
    padded = {"input_ids": [5, 6, 7, pad], "labels": [-100, 6, 7, pad], "attention_mask": [1, 1, 1, 0]}
    blank = {"input_ids": [5, 6, eos], "labels": [-100, -100, eos], "attention_mask": [1, 1, 1]}
    padded_on_the_left = {"input_ids": [pad, 6, 7], "labels": [pad, 6, 7], "attention_mask": [0, 1, 1]}
    rows = [padded, blank, padded_on_the_left, *[{**row, "attention_mask": [1] * len(row["labels"])} for row in noisy]]
    losses = []
    for folder, named in (("rows", rows), ("encoded", encode_rows(rows))):
        caplog.clear()
        tracker = ForgetTracker(named)
        train_tracked(safety, lambda folder=folder: make_args(folder), collator, tracker, processing_class=tokenizer)
        losses.append(tracker.trace.losses())
        assert "loss tokens is padding with a label other than -100" in caplog.text
        assert "1 of 27 rows has a completion that is empty or only white space" in caplog.text
    np.testing.assert_array_equal(*losses)


@pytest.mark.parametrize("named", [False, True])
def test_blank_completions_are_counted(named, noisy, make_args, collator, tokenizer, caplog):
    eos = tokenizer.eos_token_id
    blank = {"input_ids": [5, 6, eos], "labels": [-100, -100, eos]}
    rows = Dataset.from_list([blank, *noisy.to_list()])
    train_tracked(rows, make_args, collator, ForgetTracker(rows if named else None), processing_class=tokenizer)
    assert "1 of 25 rows has a completion that is empty or only white space" in caplog.text
    caplog.clear()
    args = lambda: make_args("other")  # noqa: E731
    train_tracked(noisy, args, collator, ForgetTracker(), processing_class=tokenizer)
    assert "empty or only white space" not in caplog.text


def test_rows_longer_than_the_context_are_truncated(make_args, collator, caplog):
    long = {"input_ids": list(range(5, 105)), "labels": list(range(5, 105))}
    tracker = ForgetTracker([long])
    train_tracked(random_rows(4), make_args, collator, tracker)
    truncated = {name: values[:64] for name, values in long.items()}
    np.testing.assert_allclose(tracker.trace.losses()[0], reference_means(tiny_llama(), [truncated]), rtol=1e-5)
    assert "1 of 1 row was truncated on the right, to 64 tokens" in caplog.text


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"chosen": "a", "rejected": "b"}, "preference"),
        ({"prompt": "a", "completion": "b", "image": b""}, "images"),
        ({"question": "a"}, "are not a supported form"),
    ],
)
def test_rows_that_are_not_samples_are_refused(row, message, safety, make_args, collator, tokenizer):
    with pytest.raises(EncodingError, match=f"Row 0: .*{message}"):
        train_tracked(safety, make_args, collator, ForgetTracker([row]), processing_class=tokenizer)


def test_a_missing_tokenizer_or_chat_template_is_refused(safety, make_args, collator, tokenizer, monkeypatch):
    with pytest.raises(EncodingError, match="processing_class=tokenizer"):
        train_tracked(safety, make_args, collator, ForgetTracker([{"text": "a"}]))
    monkeypatch.setattr(tokenizer, "chat_template", None)
    rows = [{"messages": [{"role": "user", "content": "a"}]}]
    with pytest.raises(EncodingError, match="chat_template"):
        train_tracked(safety, make_args, collator, ForgetTracker(rows), processing_class=tokenizer)


def test_a_packed_training_set_is_refused(noisy, make_args, tokenizer):
    def packing_collator(rows):
        tokens = torch.tensor([rows[0]["input_ids"] * 2])
        positions = torch.arange(len(rows[0]["input_ids"])).repeat(2)[None]
        return {"input_ids": tokens, "labels": tokens, "position_ids": positions}

    with pytest.raises(UnsupportedDatasetError, match=r"ForgetTracker\(noisy\)"):
        train_tracked(noisy, make_args, packing_collator, ForgetTracker())


class OwnLoader(Trainer):
    """Its data loader is a list of batches."""

    def get_train_dataloader(self):
        return [self.data_collator([row]) for row in self.train_dataset.select_columns(["input_ids", "labels"])]


@pytest.mark.parametrize("session", ["auto", "noisy", "safety"])
def test_a_trainer_with_its_own_data_loader(session, noisy, safety, make_args, collator):
    rows = noisy if session == "noisy" else safety
    training_losses, tracker = [], ForgetTracker(noisy, session=session)
    for callbacks in ([], [tracker]):
        trainer = OwnLoader(tiny_llama(), make_args(), train_dataset=rows, data_collator=collator, callbacks=callbacks)
        training_losses.append(trainer.train().training_loss)
    assert training_losses[0] == training_losses[1]
    assert [record.session for record in tracker.trace.records()] == ["noisy" if session == "noisy" else "safety"] * 2
    np.testing.assert_allclose(tracker.trace.losses()[0], reference_means(tiny_llama(), noisy), rtol=1e-5)


def test_the_rows_of_an_own_data_loader_are_not_known(noisy, make_args, collator):
    trainer = OwnLoader(
        tiny_llama(), make_args(), train_dataset=noisy, data_collator=collator, callbacks=[ForgetTracker()]
    )
    with pytest.raises(UnsupportedDatasetError, match=r"\(list\) has no dataset and no collator"):
        trainer.train()
    with pytest.raises(UnsupportedDatasetError, match=r"\(list\) has no dataset and no collator"):
        filtered(OwnLoader)(
            tiny_llama(), make_args(), train_dataset=noisy, data_collator=collator, forgetting=np.arange(24),
            filter_config=FilterConfig("loss", threshold=9.5),
        )  # fmt: skip


@pytest.mark.parametrize("session", ["auto", "safety"])
@pytest.mark.parametrize("changed", ["labels", "a random mask", "a random dataset"])
def test_a_safety_session_needs_no_rows_of_its_own(changed, session, noisy, safety, make_args, collator, caplog):
    """Its rows are not scored. They are refused only if reading them would change training, and then not if it is named."""
    model, tracker = tiny_llama(), ForgetTracker()
    Trainer(model, make_args("noisy"), train_dataset=noisy, data_collator=collator, callbacks=[tracker]).train()
    if session == "safety":
        tracker = ForgetTracker(trace_dir=tracker.trace.folder, session=session)

    def trainer(callbacks):
        rng, rows = np.random.default_rng(0), safety

        def collate(rows):
            batch = collator(rows)
            if changed == "labels":
                batch["labels"][batch["labels"] != -100] = 7
            if changed == "a random mask":
                batch["labels"][torch.from_numpy(rng.random(batch["labels"].shape) < 0.3)] = -100
            return batch

        def prepend(batch):
            prompts = rng.integers(5, 30, (len(batch["labels"]), 3)).tolist()
            return {
                "input_ids": [a + b for a, b in zip(prompts, batch["input_ids"], strict=True)],
                "labels": [[-100] * 3 + labels for labels in batch["labels"]],
            }

        if changed == "a random dataset":
            rows = rows.with_transform(prepend)
        args = make_args(remove_unused_columns=False)
        copied = copy.deepcopy(model)
        return Trainer(copied, args, train_dataset=rows, data_collator=collate, callbacks=callbacks)

    if changed != "labels" and session == "auto":
        with pytest.raises(
            RandomRowsError, match=r"Row 0: .* `ForgetTracker\(trace_dir=..., session='safety'\)` does not read"
        ):
            trainer([tracker]).train()
        return
    assert trainer([]).train().training_loss == trainer([tracker]).train().training_loss
    assert tracker.trace.records()[-2:] == [Record("safety", 0), Record("safety", 6)]
    np.testing.assert_allclose(tracker.trace.losses()[-2], reference_means(model.eval(), noisy), rtol=1e-5)
    is_told = "treated as safety finetuning. (Row 0: the labels differ from the row's own tokens" in caplog.text
    assert is_told == (session == "auto")


def test_named_rows_and_a_safety_session_with_its_own_labels(noisy, safety, make_args, collator):
    """The tracked rows have the labels of the noisy session."""

    def collate(rows):
        batch = collator(rows)
        batch["labels"][batch["labels"] != -100] = 7
        return batch

    tracker = ForgetTracker(noisy, session="safety")
    train_tracked(safety, make_args, collate, tracker)
    np.testing.assert_allclose(tracker.trace.losses()[0], reference_means(tiny_llama(), noisy), rtol=1e-5)
    with pytest.raises(EncodingError, match="Row 0: the labels differ from the row's own tokens"):
        train_tracked(safety, make_args, collate, ForgetTracker(noisy))


def test_given_rows_with_a_transform(noisy, safety, make_args, collator):
    texts = Dataset.from_list([{"row": index} for index in range(len(noisy))])
    made = texts.with_transform(lambda batch: noisy[batch["row"]])
    tracker = ForgetTracker(made)
    train_tracked(safety, make_args, collator, tracker)
    np.testing.assert_allclose(tracker.trace.losses()[0], reference_means(tiny_llama(), noisy), rtol=1e-5)


def test_an_iterable_noisy_set_is_refused(noisy, safety, make_args, collator):
    with pytest.raises(UnsupportedDatasetError, match="map-style dataset or a list of rows"):
        train_tracked(safety, make_args, collator, ForgetTracker(noisy.to_iterable_dataset()))


def test_given_rows_with_another_loss_mask_are_refused(noisy, make_args, collator):
    rows = [{"prompt": "", "input_ids": row["input_ids"], "labels": row["input_ids"]} for row in noisy]
    with pytest.raises(TraceError, match="texts of the noisy set, but with a loss on other tokens"):
        train_tracked(noisy, make_args, collator, ForgetTracker(rows))


def test_padding_of_given_rows_is_not_scored(safety, make_args, collator):
    row = {"input_ids": [1, 1, 9, 8, 7], "labels": [-100, -100, 9, 8, 7], "attention_mask": [0, 0, 1, 1, 1]}
    tracker = ForgetTracker([row])
    train_tracked(safety, make_args, collator, tracker)
    real = {"input_ids": [9, 8, 7], "labels": [9, 8, 7]}
    np.testing.assert_allclose(tracker.trace.losses()[0], reference_means(tiny_llama(), [real]), rtol=1e-5)


@pytest.fixture
def dated_tokenizer(byte_tokenizer):
    tokenizer = copy.deepcopy(byte_tokenizer)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }}{% for m in messages %}{{ m.content }}{% endfor %}"
    return tokenizer


@pytest.mark.parametrize("prints_date", [True, False])
@pytest.mark.parametrize("kind", ["messages", "text"])
def test_a_template_that_prints_the_date_is_named(kind, prints_date, sft_config, dated_tokenizer, caplog):
    """Texts need no template. The template is stored, because the tokenizer that a command loads can have another one."""
    if not prints_date:
        dated_tokenizer.chat_template = "{% if false %}" + dated_tokenizer.chat_template.replace(
            "}}", "}}{% endif %}", 1
        )
    text = f"the cat {datetime.now().year}"
    turns = [{"role": "user", "content": "the"}, {"role": "assistant", "content": text}]
    rows = Dataset.from_list([{"messages": turns} if kind == "messages" else {"text": text}] * 4)
    model, args, tracker = tiny_llama(vocab_size=len(dated_tokenizer)), sft_config(max_steps=1), ForgetTracker()
    SFTTrainer(model, args, train_dataset=rows, processing_class=dated_tokenizer, callbacks=[tracker]).train()
    is_named = "The chat template prints today's date (`strftime_now`)." in caplog.text
    assert is_named == (prints_date and kind == "messages")
    encoding = tracker.trace.manifest["encoding"]
    assert encoding["chat_template"] == dated_tokenizer.chat_template
    loaded = copy.deepcopy(dated_tokenizer)
    loaded.chat_template = None
    assert encode_rows(rows, loaded, disable_tqdm=True, **encoding).ids == tracker.trace.rows.ids


def test_one_of_several_templates_is_not_stored(chat_tokenizer, sft_config):
    """The trainer uses the one named "default", and so does a tokenizer that is loaded again."""
    tokenizer = copy.deepcopy(chat_tokenizer)
    tokenizer.chat_template = {"default": tokenizer.chat_template, "tool_use": "{{ messages }}"}
    assert sft_encoding_options(sft_config(), tokenizer)["chat_template"] is None

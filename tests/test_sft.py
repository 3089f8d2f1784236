"""TRL's SFTTrainer: the loss of a sample is the mean over the tokens that SFTTrainer counts for that sample alone."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from conftest import tiny_llama
from datasets import Dataset
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from forgetfilter_callback import FilterResult, ForgetTracker, encode_rows
from forgetfilter_callback.errors import EncodingError, UnsupportedDatasetError
from forgetfilter_callback.pipeline.outputs import filter_rows
from forgetfilter_callback.trace.records import Record
from forgetfilter_callback.trace.source import audit_labels
from forgetfilter_callback.trainers.filtered_sft_trainer import FilteredSFTTrainer


WORDS = ["the", "cat", "sat", "on", "the", "mat", "and", "the", "dog", "ran"]


def sentence(rng: np.random.Generator) -> str:
    return " ".join(rng.choice(WORDS, rng.integers(2, 8)))


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def rows_of(form: str, count: int = 9) -> Dataset:
    rng = np.random.default_rng(0)
    make = {
        "text": lambda: {"text": sentence(rng)},
        "body": lambda: {"body": sentence(rng)},
        "prompt and completion": lambda: {"prompt": sentence(rng), "completion": " " + sentence(rng)},
        "messages": lambda: {"messages": [said("user", sentence(rng)), said("assistant", sentence(rng))]},
        "prompt and completion messages": lambda: {
            "prompt": [said("user", sentence(rng))], "completion": [said("assistant", sentence(rng))]
        },
        "chat template arguments": lambda: {
            "messages": [said("user", sentence(rng)), said("assistant", sentence(rng))],
            "chat_template_kwargs": {"loud": bool(rng.integers(2))},
        },
        "tokens": lambda: {"input_ids": rng.integers(5, 60, rng.integers(4, 12)).tolist()},
        "masked tokens": lambda: {"input_ids": rng.integers(5, 60, 8).tolist(), "completion_mask": [0] * 3 + [1] * 5},
    }[form]  # fmt: skip
    return Dataset.from_list([{**make(), "id": index} for index in range(count)])


CASES = {
    **{form: (form, {}) for form in (
        "text", "prompt and completion", "messages", "prompt and completion messages", "chat template arguments",
        "tokens", "masked tokens",
    )},
    "another column": ("body", {"dataset_text_field": "body"}),
    "a mask that is heeded": ("masked tokens", {"completion_only_loss": True}),
    "prompts count too": ("prompt and completion", {"completion_only_loss": False}),
    "prompts of messages count too": ("prompt and completion messages", {"completion_only_loss": False}),
    "the assistant only": ("messages", {"assistant_only_loss": True}),
    "the assistant's completion only": ("prompt and completion messages", {"assistant_only_loss": True}),
    "another end of sequence": ("text", {"eos_token": "<pad>"}),
    "cut at the right": ("text", {"max_length": 4}),
    "cut at the left": ("text", {"max_length": 4, "truncation_mode": "keep_end"}),
    "without activation checkpointing": ("text", {"gradient_checkpointing": False}),
}  # fmt: skip


@pytest.fixture
def chat_tokenizer(tokenizer):
    fast = copy.deepcopy(tokenizer)
    fast.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<eos>"
        "{% endgeneration %}{% else %}{{ m.content }}{% if loud %} the dog{% endif %}<eos>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    return fast


@pytest.fixture
def config(tmp_path):
    def make(**overrides):
        return SFTConfig(**{
            "output_dir": str(tmp_path / "out"), "report_to": "none", "use_cpu": True, "bf16": False, "disable_tqdm": True,
            "max_steps": 1, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "save_strategy": "no",
            "max_length": 64, **overrides,
        })  # fmt: skip

    return make


def one_row_losses(rows: Dataset, config: SFTConfig, tokenizer, **kwargs) -> np.ndarray:
    """SFTTrainer's own evaluation of each row alone, before any training."""
    trainer = SFTTrainer(tiny_llama(), config, train_dataset=rows, processing_class=tokenizer, **kwargs)
    return np.array([trainer.evaluate(rows.select([index]))["eval_loss"] for index in range(len(rows))])


@pytest.mark.parametrize("named", [False, True], ids=["adopted", "named"])
@pytest.mark.parametrize("case", CASES)
def test_losses_are_those_of_sfttrainers_own_evaluation(case, named, config, chat_tokenizer):
    form, settings = CASES[case]
    rows, args = rows_of(form), config(**settings)
    tracker = ForgetTracker(rows if named else None)
    SFTTrainer(tiny_llama(), args, train_dataset=rows, processing_class=chat_tokenizer, callbacks=[tracker]).train()
    expected = one_row_losses(rows, config(**settings), chat_tokenizer)
    trace = tracker.trace
    np.testing.assert_allclose(trace.losses()[0], expected, rtol=1e-5)
    assert len(set(expected.round(6))) == len(rows)
    # What the trace keeps reads the rows again, as `forgetfilter filter` does.
    length, encoding = trace.manifest["max_length"], trace.manifest["encoding"]
    assert encode_rows(rows, chat_tokenizer, length, **encoding).ids == trace.rows.ids


def test_a_trace_reads_the_rows_again_as_the_trainer_did(config, chat_tokenizer, tmp_path):
    """`forgetfilter filter` and the audit need no settings of SFTTrainer: the trace has them."""
    rows = rows_of("prompt and completion").add_column("unsafe", [index % 2 == 0 for index in range(9)])
    model, tracker = tiny_llama(), ForgetTracker()
    for each in (rows, rows_of("text", 5)):
        args = config(completion_only_loss=False, max_length=6, truncation_mode="keep_end", max_steps=5)
        SFTTrainer(model, args, train_dataset=each, processing_class=chat_tokenizer, callbacks=[tracker]).train()
    assert tracker.trace.manifest["max_length"] == 6
    rows.to_parquet(tmp_path / "rows.parquet")
    result = filter_rows(
        tracker.trace, tmp_path / "out", str(tmp_path / "rows.parquet"), chat_tokenizer, "loss", fraction=0.3
    )
    assert result.ids == tracker.trace.rows.ids and result.counts["unknown"] == 0
    assert audit_labels(tracker.trace, rows, chat_tokenizer, "unsafe").tolist() == rows["unsafe"]


def test_a_formatting_function(config, chat_tokenizer):
    rows = rows_of("body")
    formatting = {"formatting_func": lambda row: f"the {row['body']}"}
    tracker = ForgetTracker()
    SFTTrainer(
        tiny_llama(), config(), train_dataset=rows, processing_class=chat_tokenizer, callbacks=[tracker], **formatting
    ).train()
    expected = one_row_losses(rows, config(), chat_tokenizer, **formatting)
    np.testing.assert_allclose(tracker.trace.losses()[0], expected, rtol=1e-5)


def test_a_shuffled_dataset_is_followed_by_id(config, chat_tokenizer):
    rows = rows_of("text")
    adopted, named = ForgetTracker(), ForgetTracker(rows, trace_dir=config().output_dir + "-named")
    for tracker in (adopted, named):
        args = config(shuffle_dataset=True)
        SFTTrainer(tiny_llama(), args, train_dataset=rows, processing_class=chat_tokenizer, callbacks=[tracker]).train()
    ids, other = adopted.trace.rows.ids.to_pylist(), named.trace.rows.ids.to_pylist()
    assert ids != other and set(ids) == set(other)
    by_id = dict(zip(ids, adopted.trace.losses()[0], strict=True))
    np.testing.assert_allclose([by_id[i] for i in other], named.trace.losses()[0], rtol=1e-5)
    np.testing.assert_allclose(named.trace.losses()[0], one_row_losses(rows, config(), chat_tokenizer), rtol=1e-5)


@pytest.mark.parametrize("strategy", ["bfd", "wrapped"])
def test_packed_safety_session_with_named_rows(strategy, config, chat_tokenizer):
    rows, safety = rows_of("text"), rows_of("messages")
    args = config(packing=True, packing_strategy=strategy, max_length=32)
    tracker = ForgetTracker(rows)
    SFTTrainer(tiny_llama(), args, train_dataset=safety, processing_class=chat_tokenizer, callbacks=[tracker]).train()
    assert [record.session for record in tracker.trace.records()] == ["safety", "safety"]
    expected = one_row_losses(rows, config(max_length=32), chat_tokenizer)
    np.testing.assert_allclose(tracker.trace.losses()[0], expected, rtol=1e-5)


@pytest.mark.parametrize("form", ["text", "tokens"])
def test_a_safety_session_of_preferences(form, config, chat_tokenizer, caplog):
    """Its rows cannot be followed, and need not."""
    rows = rows_of(form)
    safety = Dataset.from_list([{"prompt": "the cat", "chosen": " sat", "rejected": " ran"}] * 8)
    args = DPOConfig(config().output_dir, max_steps=2, report_to="none", use_cpu=True, bf16=False, disable_tqdm=True,
                     save_strategy="no")  # fmt: skip
    tracker = ForgetTracker(rows)
    DPOTrainer(
        tiny_llama(),
        tiny_llama(),
        args=args,
        train_dataset=safety,
        processing_class=chat_tokenizer,
        callbacks=[tracker],
    ).train()
    assert tracker.trace.records() == [Record("safety", 0), Record("safety", 2)]
    np.testing.assert_allclose(tracker.trace.losses()[0], one_row_losses(rows, config(), chat_tokenizer), rtol=1e-5)
    assert "cannot be followed, so it is taken for the safety session" in caplog.text


def test_packed_rows_cannot_be_adopted(config, chat_tokenizer):
    args = config(packing=True, max_length=32)
    trainer = SFTTrainer(
        tiny_llama(), args, train_dataset=rows_of("text"), processing_class=chat_tokenizer, callbacks=[ForgetTracker()]
    )
    with pytest.raises(UnsupportedDatasetError, match=r"ForgetTracker\(noisy\)"):
        trainer.train()


def test_padding_free_rows(config, chat_tokenizer):
    rows = rows_of("text")
    tracker = ForgetTracker()
    args = config(padding_free=True, max_length=None)
    SFTTrainer(tiny_llama(), args, train_dataset=rows, processing_class=chat_tokenizer, callbacks=[tracker]).train()
    expected = one_row_losses(rows, config(max_length=None), chat_tokenizer)
    np.testing.assert_allclose(tracker.trace.losses()[0], expected, rtol=1e-5)


def test_padding_free_rows_that_are_padded_all_the_same(config, chat_tokenizer):
    rows = rows_of("text")
    tracker, args = ForgetTracker(), config(padding_free=True, max_length=None, pad_to_multiple_of=8)
    SFTTrainer(tiny_llama(), args, train_dataset=rows, processing_class=chat_tokenizer, callbacks=[tracker]).train()
    expected = one_row_losses(rows, config(max_length=None), chat_tokenizer)
    np.testing.assert_allclose(tracker.trace.losses()[0], expected, rtol=1e-5)


def test_the_assistant_only_with_a_template_that_does_not_mark_it(config, chat_tokenizer, monkeypatch):
    """SFTTrainer takes a training template of TRL's then, and so do named rows."""
    marked = chat_tokenizer.chat_template
    chat_tokenizer.chat_template = marked.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    for module in ("trl.trainer.sft_trainer", "trl.chat_template_utils"):
        monkeypatch.setattr(f"{module}.get_training_chat_template", lambda tokenizer: marked)
    rows, losses = rows_of("messages"), []
    for tracker in (ForgetTracker(), ForgetTracker(rows, trace_dir=config().output_dir + "-named")):
        args = config(assistant_only_loss=True)
        SFTTrainer(tiny_llama(), args, train_dataset=rows, processing_class=chat_tokenizer, callbacks=[tracker]).train()
        losses.append(tracker.trace.losses()[0])
    np.testing.assert_array_equal(*losses)


@pytest.mark.parametrize("loss_type", ["nll", "dft"])
def test_label_smoothing_and_dft_do_not_reach_a_record(loss_type, config, chat_tokenizer):
    rows = rows_of("text")
    settings = {"loss_type": loss_type} | ({"label_smoothing_factor": 0.1} if loss_type == "nll" else {})
    tracker = ForgetTracker()
    SFTTrainer(
        tiny_llama(), config(**settings), train_dataset=rows, processing_class=chat_tokenizer, callbacks=[tracker]
    ).train()
    np.testing.assert_allclose(tracker.trace.losses()[0], one_row_losses(rows, config(), chat_tokenizer), rtol=1e-5)


# ---- FilteredSFTTrainer ----


@pytest.fixture
def tracker(config, chat_tokenizer):
    """Both sessions on `rows_of("prompt and completion")`, unpacked."""
    tracker, model = ForgetTracker(), tiny_llama()
    for rows in (rows_of("prompt and completion"), rows_of("text", 5)):
        args = config(max_steps=6)
        SFTTrainer(model, args, train_dataset=rows, processing_class=chat_tokenizer, callbacks=[tracker]).train()
    return tracker


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("shuffle", [False, True])
def test_filtered_sft_trainer_removes_raw_rows_before_packing(packing, shuffle, tracker, config, chat_tokenizer):
    rows = rows_of("prompt and completion")
    values = tracker.trace.forgetting()
    order = np.random.default_rng(1).permutation(len(rows))
    args = config(packing=packing, shuffle_dataset=shuffle)
    trainer = FilteredSFTTrainer(
        tiny_llama(), args, train_dataset=rows.select(order), processing_class=chat_tokenizer,
        forgetting=tracker, threshold=float(np.median(values)),
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
    assert (tracker.trace.folder.parent / "_forgetfilter-decision" / "removed.jsonl").exists()
    trainer.train()


def test_without_forgetting_it_is_an_sft_trainer(config, chat_tokenizer):
    rows, losses = rows_of("text"), []
    for trainer_class in (SFTTrainer, FilteredSFTTrainer):
        trainer = trainer_class(tiny_llama(), config(max_steps=3), train_dataset=rows, processing_class=chat_tokenizer)
        losses.append(trainer.train().training_loss)
    assert losses[0] == losses[1] and trainer.filter_result is None and trainer.removed_dataset is None


def test_another_model_than_the_base_is_refused(tracker, config, chat_tokenizer):
    another = tiny_llama()
    with torch.no_grad():
        for parameter in another.parameters():
            parameter.mul_(3)
    trainer = FilteredSFTTrainer(
        another, config(), train_dataset=rows_of("prompt and completion"), processing_class=chat_tokenizer,
        forgetting=tracker, fraction=0.2,
    )  # fmt: skip
    with pytest.raises(ValueError, match="not the base model"):
        trainer.train()


def test_rows_that_sfttrainer_drops_are_kept_and_not_known(config, chat_tokenizer):
    """Their prompt alone fills `max_length`."""
    rows = rows_of("prompt and completion")
    long = {"prompt": "the cat " * 20, "completion": " ran", "id": 99}
    rows = Dataset.from_list([long, *rows.to_list()])
    trainer = FilteredSFTTrainer(
        tiny_llama(), config(max_length=12), train_dataset=rows, processing_class=chat_tokenizer,
        forgetting=np.arange(10.0), measure="loss", threshold=7.5,
    )  # fmt: skip
    assert trainer.removed_dataset["id"] == [7, 8]
    result = trainer.filter_result
    assert result.counts == {"samples": 10, "removed": 2, "kept": 8, "unknown": 1} and np.isnan(result.values[0])
    assert np.flatnonzero(result.removed).tolist() == [8, 9]  # in the rows as given
    again = FilterResult.load(trainer.args.output_dir + "/_forgetfilter-decision")
    assert again.ids == result.ids and again.ids.null_count == 1


def test_an_evaluation_set_named_train_is_left_alone(tracker, config, chat_tokenizer):
    rows = rows_of("prompt and completion")
    trainer = FilteredSFTTrainer(
        tiny_llama(), config(), train_dataset=rows, processing_class=chat_tokenizer, forgetting=tracker, fraction=0.3,
        eval_dataset={"train": rows_of("text", 5), "test": rows_of("messages", 4)},
    )  # fmt: skip
    assert {name: len(each) for name, each in trainer.eval_dataset.items()} == {"train": 5, "test": 4}
    assert len(trainer.train_dataset) == 6 and trainer.filter_result.counts["samples"] == 9
    trainer.evaluate()
    assert trainer.filter_result.counts["samples"] == 9


def test_rows_are_cut_as_the_tracker_cut_them(config, chat_tokenizer):
    tracker, model, rows = ForgetTracker(max_length=5), tiny_llama(), rows_of("text")
    for each in (rows, rows_of("messages", 5)):
        SFTTrainer(
            model, config(max_steps=6), train_dataset=each, processing_class=chat_tokenizer, callbacks=[tracker]
        ).train()
    trainer = FilteredSFTTrainer(
        tiny_llama(), config(), train_dataset=rows, processing_class=chat_tokenizer, forgetting=tracker, fraction=0.3
    )
    assert tracker.trace.rows.truncated == 4
    assert set(trainer.removed_dataset["id"]) == set(np.argsort(tracker.trace.forgetting())[-3:].tolist())


def test_settings_without_forgetting_are_refused(config, chat_tokenizer):
    with pytest.raises(ValueError, match="nothing to filter by"):
        FilteredSFTTrainer(
            tiny_llama(), config(), train_dataset=rows_of("text"), processing_class=chat_tokenizer, threshold=0.1
        )


def test_skipped_preparation_is_refused(tracker, config, chat_tokenizer):
    args = config(dataset_kwargs={"skip_prepare_dataset": True})
    rows = rows_of("tokens").map(lambda row: {"labels": row["input_ids"]})
    with pytest.raises(EncodingError, match="skip_prepare_dataset"):
        FilteredSFTTrainer(tiny_llama(), args, train_dataset=rows, processing_class=chat_tokenizer, forgetting=tracker)


def test_a_stream_is_refused(tracker, config, chat_tokenizer):
    rows = rows_of("text").to_iterable_dataset()
    with pytest.raises(EncodingError, match="stream"):
        FilteredSFTTrainer(
            tiny_llama(), config(), train_dataset=rows, processing_class=chat_tokenizer, forgetting=tracker
        )


def test_training_is_untouched(config, chat_tokenizer):
    def train(tracked: bool):
        model = tiny_llama()
        args = config(max_steps=6, packing=True, max_length=32, logging_steps=1, eval_strategy="steps", eval_steps=2)
        trainer = SFTTrainer(
            model, args, train_dataset=rows_of("text"), eval_dataset=rows_of("messages"), processing_class=chat_tokenizer,
            callbacks=[ForgetTracker(rows_of("tokens"), record_steps=1)] if tracked else [],
        )  # fmt: skip
        trainer.train()
        logs = [
            {k: v for k, v in log.items() if not k.endswith(("runtime", "per_second"))}
            for log in trainer.state.log_history
            if "forgetfilter/loss" not in log
        ]
        return logs, [parameter.detach().numpy() for parameter in model.parameters()]

    (logs, weights), (tracked_logs, tracked_weights) = train(False), train(True)
    assert logs == tracked_logs
    for one, other in zip(weights, tracked_weights, strict=True):
        np.testing.assert_array_equal(one, other)

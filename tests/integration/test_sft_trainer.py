"""TRL's SFTTrainer: the loss of a sample is the mean over the tokens that SFTTrainer trains on for that sample alone."""

from __future__ import annotations

import copy
from contextlib import nullcontext as does_not_raise

import numpy as np
import pytest
from datasets import Dataset
from helpers import tiny_llama
from sft_helpers import one_row_losses, rows_of
from trl import DPOConfig, DPOTrainer, SFTTrainer

from forgetfilter_callback import FilterConfig, FilteredSFTTrainer, ForgetTracker, encode_rows
from forgetfilter_callback.errors import TraceError, UnsupportedDatasetError
from forgetfilter_callback.pipeline.outputs import filter_rows
from forgetfilter_callback.trace.records import Record
from forgetfilter_callback.trace.source_files import match_rows


CASES = {
    **{form: (form, {}) for form in (
        "text", "prompt and completion", "messages", "prompt and completion messages", "chat template arguments",
        "tokens", "masked tokens", "conversations", "prompt, completion and text",
    )},
    "another column": ("body", {"dataset_text_field": "body"}),
    "a completion mask in use": ("masked tokens", {"completion_only_loss": True}),
    "loss on prompts": ("prompt and completion", {"completion_only_loss": False}),
    "loss on prompts of messages": ("prompt and completion messages", {"completion_only_loss": False}),
    "the assistant only": ("messages", {"assistant_only_loss": True}),
    "the assistant's completion only": ("prompt and completion messages", {"assistant_only_loss": True}),
    "another end of sequence": ("text", {"eos_token": "<pad>"}),
    "truncated on the right": ("text", {"max_length": 4}),
    "truncated on the left": ("text", {"max_length": 4, "truncation_mode": "keep_end"}),
    "without activation checkpointing": ("text", {"gradient_checkpointing": False}),
}  # fmt: skip


@pytest.mark.parametrize("named", [False, True], ids=["adopted", "named"])
@pytest.mark.parametrize("case", CASES)
def test_losses_equal_sfttrainer_evaluation(case, named, sft_config, chat_tokenizer, caplog):
    form, settings = CASES[case]
    rows, args, loaded_again = rows_of(form), sft_config(**settings), copy.deepcopy(chat_tokenizer)
    tracker = ForgetTracker(rows if named else None)
    SFTTrainer(tiny_llama(), args, train_dataset=rows, processing_class=chat_tokenizer, callbacks=[tracker]).train()
    expected = one_row_losses(rows, sft_config(**settings), chat_tokenizer)
    trace = tracker.trace
    np.testing.assert_allclose(trace.losses()[0], expected, rtol=1e-5)
    assert len(set(expected.round(6))) == len(rows)
    if named:  # SFTTrainer has truncated adopted rows itself
        for side in ("left", "right"):
            assert (f"truncated on the {side}" in caplog.text) == case.endswith(side)
    # The settings in the trace encode the rows in the same way, as `forgetfilter filter` does. SFTTrainer has changed the
    # tokenizer in memory.
    length, encoding = trace.manifest["max_length"], trace.manifest["encoding"]
    assert encode_rows(rows, loaded_again, length, **encoding).ids == trace.rows.ids


@pytest.mark.parametrize("named", [False, True], ids=["adopted", "named"])
@pytest.mark.parametrize("limit", ["tracker", "context"])
@pytest.mark.parametrize(("mode", "side"), [("keep_start", "right"), ("keep_end", "left")])
def test_rows_that_only_the_tracker_truncates(mode, side, limit, named, sft_config, chat_tokenizer, caplog):
    """The tracker's limit is below SFTTrainer's. The loss of a row is that of SFTTrainer with the lower limit."""
    rows = Dataset.from_list([{"input_ids": np.random.default_rng(i).integers(5, 60, 30).tolist()} for i in range(9)])
    args = sft_config(max_length=20, truncation_mode=mode)
    max_length = 10 if limit == "tracker" else None
    tracker = ForgetTracker(rows if named else None, max_length=max_length)
    model = tiny_llama(max_position_embeddings=10 if limit == "context" else 64)
    SFTTrainer(model, args, train_dataset=rows, processing_class=chat_tokenizer, callbacks=[tracker]).train()
    trace = tracker.trace
    assert trace.records() == [Record("noisy", 0), Record("noisy", 1)]
    expected = one_row_losses(rows, sft_config(max_length=10, truncation_mode=mode), chat_tokenizer)
    np.testing.assert_allclose(trace.losses()[0], expected, rtol=1e-5)
    assert f"9 of 9 rows were truncated on the {side}, to 10 tokens" in caplog.text


def test_the_trace_encodes_the_rows_as_the_trainer_did(sft_config, chat_tokenizer, tmp_path):
    """The trace stores the settings of SFTTrainer for `forgetfilter filter` and the audit."""
    rows = rows_of("prompt and completion").add_column("unsafe", [index % 2 == 0 for index in range(9)])
    model, tracker = tiny_llama(), ForgetTracker()
    for each in (rows, rows_of("text", 5)):
        args = sft_config(completion_only_loss=False, max_length=6, truncation_mode="keep_end", max_steps=5)
        SFTTrainer(model, args, train_dataset=each, processing_class=chat_tokenizer, callbacks=[tracker]).train()
    assert tracker.trace.manifest["max_length"] == 6
    rows.to_parquet(tmp_path / "rows.parquet")
    result = filter_rows(
        tracker.trace,
        tmp_path / "out",
        FilterConfig(measure="loss", fraction=0.3),
        str(tmp_path / "rows.parquet"),
        chat_tokenizer,
    )
    assert result.ids == tracker.trace.rows.ids and result.counts["unknown"] == 0
    assert match_rows(tracker.trace, rows, chat_tokenizer).tolist() == list(range(len(rows)))


def test_a_formatting_function(sft_config, chat_tokenizer):
    rows = rows_of("body")
    formatting = {"formatting_func": lambda row: f"the {row['body']}"}
    tracker = ForgetTracker()
    SFTTrainer(
        tiny_llama(),
        sft_config(),
        train_dataset=rows,
        processing_class=chat_tokenizer,
        callbacks=[tracker],
        **formatting,
    ).train()
    expected = one_row_losses(rows, sft_config(), chat_tokenizer, **formatting)
    np.testing.assert_allclose(tracker.trace.losses()[0], expected, rtol=1e-5)


def test_a_shuffled_dataset_is_followed_by_id(sft_config, chat_tokenizer):
    rows = rows_of("text")
    adopted, named = ForgetTracker(), ForgetTracker(rows, trace_dir=sft_config().output_dir + "-named")
    for tracker in (adopted, named):
        args = sft_config(shuffle_dataset=True)
        SFTTrainer(tiny_llama(), args, train_dataset=rows, processing_class=chat_tokenizer, callbacks=[tracker]).train()
    ids, other = adopted.trace.rows.ids.to_pylist(), named.trace.rows.ids.to_pylist()
    assert ids != other and set(ids) == set(other)
    by_id = dict(zip(ids, adopted.trace.losses()[0], strict=True))
    np.testing.assert_allclose([by_id[i] for i in other], named.trace.losses()[0], rtol=1e-5)
    np.testing.assert_allclose(named.trace.losses()[0], one_row_losses(rows, sft_config(), chat_tokenizer), rtol=1e-5)


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
@pytest.mark.parametrize(("first", "second"), [(4, 6), (6, 4)])
def test_the_rows_of_a_run_with_another_max_length_are_found(first, second, mode, sft_config, chat_tokenizer):
    """Otherwise noisy finetuning that starts again would be recorded as safety finetuning."""
    tracker = ForgetTracker()
    for max_length, refused in (
        (first, does_not_raise()),
        (second, pytest.raises(TraceError, match="a noisy session")),
    ):
        args = sft_config(max_length=max_length, truncation_mode=mode)
        rows, callbacks = rows_of("text"), [tracker]
        trainer = SFTTrainer(
            tiny_llama(), args, train_dataset=rows, processing_class=chat_tokenizer, callbacks=callbacks
        )
        with refused:
            trainer.train()
    assert max(np.diff(tracker.trace.rows.offsets)) == first


@pytest.mark.parametrize("named", [False, True], ids=["adopted", "named"])
def test_a_warning_says_that_its_row_numbers_are_those_of_the_prepared_rows(named, sft_config, chat_tokenizer, caplog):
    blank = {"prompt": "the cat", "completion": "", "id": 9}
    rows = Dataset.from_list([blank, *rows_of("prompt and completion")])
    tracker = ForgetTracker(rows if named else None)
    args = sft_config(shuffle_dataset=True)
    trainer = SFTTrainer(tiny_llama(), args, train_dataset=rows, processing_class=chat_tokenizer, callbacks=[tracker])
    trainer.train()
    position = 0 if named else [*trainer.train_dataset["id"]].index(9)
    assert f"is empty or only white space (row {position})" in caplog.text
    assert ("row numbers are those of the set that SFTTrainer has prepared" in caplog.text) == (not named)


@pytest.mark.parametrize("strategy", ["bfd", "wrapped"])
@pytest.mark.parametrize("session", ["auto", "noisy"])
def test_packed_session_with_given_rows(session, strategy, sft_config, chat_tokenizer):
    rows = rows_of("text")
    trained_on = rows if session == "noisy" else rows_of("messages")
    args = sft_config(packing=True, packing_strategy=strategy, max_length=32)
    tracker = ForgetTracker(rows, session=session)
    SFTTrainer(
        tiny_llama(), args, train_dataset=trained_on, processing_class=chat_tokenizer, callbacks=[tracker]
    ).train()
    assert {record.session for record in tracker.trace.records()} == {"noisy" if session == "noisy" else "safety"}
    assert len(tracker.trace.records()) == 2
    expected = one_row_losses(rows, sft_config(max_length=32), chat_tokenizer)
    np.testing.assert_allclose(tracker.trace.losses()[0], expected, rtol=1e-5)


@pytest.mark.parametrize("form", ["text", "tokens"])
def test_safety_session_on_preference_pairs(form, sft_config, chat_tokenizer, caplog):
    """Preference pairs cannot be tracked, and need not be."""
    rows = rows_of(form)
    safety = Dataset.from_list([{"prompt": "the cat", "chosen": " sat", "rejected": " ran"}] * 8)
    args = DPOConfig(sft_config().output_dir, max_steps=2, report_to="none", use_cpu=True, bf16=False, disable_tqdm=True,
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
    np.testing.assert_allclose(tracker.trace.losses()[0], one_row_losses(rows, sft_config(), chat_tokenizer), rtol=1e-5)
    assert "cannot be followed, so it is treated as safety finetuning" in caplog.text


def test_packed_rows_cannot_be_adopted(sft_config, chat_tokenizer):
    args = sft_config(packing=True, max_length=32)
    trainer = SFTTrainer(
        tiny_llama(), args, train_dataset=rows_of("text"), processing_class=chat_tokenizer, callbacks=[ForgetTracker()]
    )
    with pytest.raises(UnsupportedDatasetError, match=r"ForgetTracker\(noisy\)"):
        trainer.train()


def test_padding_free_rows(sft_config, chat_tokenizer):
    rows = rows_of("text")
    tracker = ForgetTracker()
    args = sft_config(padding_free=True, max_length=None)
    SFTTrainer(tiny_llama(), args, train_dataset=rows, processing_class=chat_tokenizer, callbacks=[tracker]).train()
    expected = one_row_losses(rows, sft_config(max_length=None), chat_tokenizer)
    np.testing.assert_allclose(tracker.trace.losses()[0], expected, rtol=1e-5)


def test_padding_free_rows_with_pad_to_multiple_of(sft_config, chat_tokenizer):
    rows = rows_of("text")
    tracker, args = ForgetTracker(), sft_config(padding_free=True, max_length=None, pad_to_multiple_of=8)
    SFTTrainer(tiny_llama(), args, train_dataset=rows, processing_class=chat_tokenizer, callbacks=[tracker]).train()
    expected = one_row_losses(rows, sft_config(max_length=None), chat_tokenizer)
    np.testing.assert_allclose(tracker.trace.losses()[0], expected, rtol=1e-5)


def test_assistant_only_loss_with_a_template_without_generation_markers(sft_config, chat_tokenizer, monkeypatch):
    """SFTTrainer then uses a training template of TRL, and so do given rows."""
    marked = chat_tokenizer.chat_template
    chat_tokenizer.chat_template = marked.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    for module in ("trl.trainer.sft_trainer", "trl.chat_template_utils"):
        monkeypatch.setattr(f"{module}.get_training_chat_template", lambda tokenizer: marked)
    rows, losses = rows_of("messages"), []
    for tracker in (ForgetTracker(), ForgetTracker(rows, trace_dir=sft_config().output_dir + "-named")):
        args = sft_config(assistant_only_loss=True)
        SFTTrainer(tiny_llama(), args, train_dataset=rows, processing_class=chat_tokenizer, callbacks=[tracker]).train()
        losses.append(tracker.trace.losses()[0])
    np.testing.assert_array_equal(*losses)


@pytest.mark.parametrize("loss_type", ["nll", "dft"])
def test_label_smoothing_and_dft_do_not_affect_records(loss_type, sft_config, chat_tokenizer):
    rows = rows_of("text")
    settings = {"loss_type": loss_type} | ({"label_smoothing_factor": 0.1} if loss_type == "nll" else {})
    tracker = ForgetTracker()
    SFTTrainer(
        tiny_llama(), sft_config(**settings), train_dataset=rows, processing_class=chat_tokenizer, callbacks=[tracker]
    ).train()
    np.testing.assert_allclose(tracker.trace.losses()[0], one_row_losses(rows, sft_config(), chat_tokenizer), rtol=1e-5)


@pytest.mark.parametrize("named", [False, True], ids=["adopted", "named"])
def test_parts_of_messages_equal_sfttrainer_evaluation(named, sft_config, chat_tokenizer):
    """With a chat template that reads parts."""
    chat_tokenizer.chat_template = chat_tokenizer.chat_template.replace(
        "{{ m.content }}", "{% for part in m.content %}{{ part.text }} {% endfor %}"
    )
    rows = rows_of("parts")
    tracker = ForgetTracker(rows if named else None)
    SFTTrainer(
        tiny_llama(), sft_config(), train_dataset=rows, processing_class=chat_tokenizer, callbacks=[tracker]
    ).train()
    expected = one_row_losses(rows, sft_config(), chat_tokenizer)
    np.testing.assert_allclose(tracker.trace.losses()[0], expected, rtol=1e-5)


@pytest.mark.parametrize("form", ["conversations", "parts"])
def test_forms_of_messages_are_filtered(form, sft_config, chat_tokenizer):
    """FilteredSFTTrainer removes the rows with the given ids, which `encode_rows` computes from the raw rows."""
    chat_tokenizer.chat_template = (
        "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}{{ m.content[0].text }}"
        "{% endif %}<eos>{% endfor %}"
    )
    rows = rows_of(form)
    ids = encode_rows(rows, chat_tokenizer, 64).ids.to_pylist()
    trainer = FilteredSFTTrainer(
        tiny_llama(), sft_config(), train_dataset=rows.to_pandas(), processing_class=chat_tokenizer,
        forgetting=(ids, range(9)), filter_config=FilterConfig(measure="loss", threshold=6.5),
    )  # fmt: skip
    assert trainer.removed_dataset["id"] == [7, 8] and trainer.filter_result.counts["unknown"] == 0

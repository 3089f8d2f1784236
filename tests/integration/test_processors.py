"""A `processing_class` that is a processor: SFTTrainer's default (`AutoProcessor`) for vision-language models."""

from __future__ import annotations

import copy

import numpy as np
import pytest
from helpers import reference_means, tiny_llama
from sft_helpers import one_row_losses, rows_of
from transformers import AutoProcessor, PreTrainedTokenizerBase, ProcessorMixin, Trainer
from trl import SFTTrainer

from forgetfilter_callback import FilterConfig, FilteredSFTTrainer, ForgetTracker, encode_rows
from forgetfilter_callback.data.tokenizers import unwrap_tokenizer
from forgetfilter_callback.errors import EncodingError
from forgetfilter_callback.trace.records import Record


class TextProcessor(ProcessorMixin):
    """Returns a batch also for one text, as processors of vision-language models do."""

    def __init__(self, tokenizer, chat_template=None):
        super().__init__(tokenizer, chat_template=chat_template)

    def __call__(self, text=None, **kwargs):
        return super().__call__(text=[text] if isinstance(text, str) else text, **kwargs)


@pytest.fixture
def processor(chat_tokenizer) -> TextProcessor:
    """Its chat template reads parts only. Its tokenizer has none, and has a name."""
    tokenizer = copy.deepcopy(chat_tokenizer)
    tokenizer.chat_template, tokenizer.name_or_path = None, "org/tokenizer"
    template = (
        "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}{% generation %}{% for part in m.content %}"
        "{{ part.text }}{% endfor %}<eos>{% endgeneration %}{% else %}{% for part in m.content %}{{ part.text }}{% endfor %}"
        "{% if loud %} the dog{% endif %}<eos>{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    return TextProcessor(tokenizer, chat_template=template)


CASES = {
    **{form: (form, {}) for form in (
        "text", "prompt and completion", "messages", "prompt and completion messages", "chat template arguments", "tokens",
    )},
    "the assistant only": ("messages", {"assistant_only_loss": True}),
}  # fmt: skip


@pytest.mark.parametrize("named", [False, True], ids=["adopted", "named"])
@pytest.mark.parametrize("case", CASES)
def test_losses_equal_sfttrainer_evaluation(case, named, sft_config, processor):
    form, settings = CASES[case]
    rows, args = rows_of(form), sft_config(**settings)
    tracker = ForgetTracker(rows if named else None)
    SFTTrainer(tiny_llama(), args, train_dataset=rows, processing_class=processor, callbacks=[tracker]).train()
    expected = one_row_losses(rows, sft_config(**settings), processor)
    np.testing.assert_allclose(tracker.trace.losses()[0], expected, rtol=1e-5)
    assert len(set(expected.round(6))) == len(rows)
    # The trace names the tokenizer, which encodes the rows in the same way, as `forgetfilter filter` does.
    manifest = tracker.trace.manifest
    assert manifest["tokenizer"] == "org/tokenizer"
    assert encode_rows(rows, processor.tokenizer, manifest["max_length"], **manifest["encoding"]).ids == (
        tracker.trace.rows.ids
    )


def test_all_three_runs_with_the_default_processor(sft_config, processor, monkeypatch):
    monkeypatch.setattr(AutoProcessor, "from_pretrained", lambda *args, **kwargs: processor)
    noisy, tracker, model = rows_of("messages"), ForgetTracker(rouge1=True, max_new_tokens=4), tiny_llama()
    for rows in (noisy, rows_of("text", 5)):
        SFTTrainer(model, sft_config(max_steps=6), train_dataset=rows, callbacks=[tracker]).train()
    trace = tracker.trace
    assert trace.records() == [Record("noisy", 0), Record("noisy", 6), Record("safety", 0), Record("safety", 6)]
    assert np.isfinite(trace.rouge1(Record("safety", 6))).all()
    trainer = FilteredSFTTrainer(
        tiny_llama(), sft_config(), train_dataset=noisy, forgetting=tracker, filter_config=FilterConfig(fraction=0.25)
    )
    trainer.train()
    assert trainer.filter_result.counts == {"samples": 9, "kept": 7, "removed": 2, "unknown": 0}
    assert trainer.filter_result.ids == trace.rows.ids


def test_named_text_in_a_plain_trainer(safety, make_args, collator, processor):
    rows = [{"prompt": "the cat", "completion": " sat"}, {"text": "the dog ran"}]
    tracker = ForgetTracker(rows)
    Trainer(
        tiny_llama(), make_args(max_steps=1), train_dataset=safety, data_collator=collator, processing_class=processor,
        callbacks=[tracker],
    ).train()  # fmt: skip
    expected = []
    for text, prompt in (("the cat sat<eos>", "the cat"), ("the dog ran<eos>", "")):
        tokens, masked = processor.tokenizer(text)["input_ids"], len(processor.tokenizer(prompt)["input_ids"])
        expected.append({"input_ids": tokens, "labels": [-100] * masked + tokens[masked:]})
    np.testing.assert_allclose(tracker.trace.losses()[0], reference_means(tiny_llama(), expected), rtol=1e-5)


class ImageProcessor(ProcessorMixin):
    """A processor without a tokenizer."""

    def __init__(self):
        super().__init__()


def test_what_a_processing_class_contains(processor):
    assert isinstance(processor.tokenizer, PreTrainedTokenizerBase)
    assert unwrap_tokenizer(processor) is unwrap_tokenizer(processor.tokenizer) is processor.tokenizer
    assert unwrap_tokenizer(ImageProcessor()) is unwrap_tokenizer(None) is None
    with pytest.raises(EncodingError, match="rows of text require a tokenizer"):
        encode_rows([{"text": "the cat"}], ImageProcessor())

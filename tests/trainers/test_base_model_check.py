"""FilteredTrainer checks that it starts from the base model."""

from __future__ import annotations

import pytest
from helpers import tiny_llama
from transformers import Trainer

from forgetfilter_callback import FilterConfig, FilteredTrainer, ForgetTracker
from forgetfilter_callback.errors import ForgetFilterError


def test_a_model_that_is_not_the_base_model_is_refused(noisy, safety, make_args, collator):
    model, tracker = tiny_llama(), ForgetTracker()
    for folder, rows in (("noisy", noisy), ("safety", safety)):
        Trainer(model, make_args(folder), train_dataset=rows, data_collator=collator, callbacks=[tracker]).train()
    trainer = FilteredTrainer(
        model,
        make_args(),
        train_dataset=noisy,
        data_collator=collator,
        forgetting=tracker,
        filter_config=FilterConfig(fraction=0.25),
    )
    with pytest.raises(ForgetFilterError, match=r"not the base model of the trace\. On 24 samples its mean loss is"):
        trainer.train()


def test_a_missing_base_record_is_reported(noisy, safety, make_args, collator, caplog):
    tracker = ForgetTracker(noisy)
    Trainer(tiny_llama(), make_args("s"), train_dataset=safety, data_collator=collator, callbacks=[tracker]).train()
    FilteredTrainer(
        tiny_llama(),
        make_args(),
        train_dataset=noisy,
        data_collator=collator,
        forgetting=tracker,
        filter_config=FilterConfig(fraction=0.25),
    ).train()
    assert (
        "Could not check that this model is the base model: there is no record of it (step 0 of the noisy session)."
        in caplog.text
    )

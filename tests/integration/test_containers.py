"""Every entry point that takes rows accepts a pandas DataFrame and refuses a DatasetDict with a sentence."""

from __future__ import annotations

import numpy as np
import pytest
from datasets import Dataset, DatasetDict
from helpers import texts, tiny_llama, train_tracked
from sft_helpers import rows_of
from transformers import Trainer

from forgetfilter_callback import (
    FilterConfig,
    FilteredSFTTrainer,
    FilteredTrainer,
    ForgetFilter,
    ForgetTracker,
    encode_rows,
)
from forgetfilter_callback.errors import EncodingError


FORGETTING = {"filter_config": FilterConfig(measure="loss", threshold=0.5)}


@pytest.mark.parametrize("form", ["text", "tokens"])
def test_named_rows_of_a_data_frame(form, safety, make_args, collator, tokenizer):
    rows = Dataset.from_list(texts(6, seed=0)) if form == "text" else safety.add_column("unsafe", [True, False] * 6)
    losses = []
    for folder, named in (("a", rows), ("b", rows.to_pandas())):
        tracker = ForgetTracker(named, audit_column="unsafe")
        Trainer(
            tiny_llama(), make_args(folder), train_dataset=safety, data_collator=collator, callbacks=[tracker],
            processing_class=tokenizer,
        ).train()  # fmt: skip
        losses.append(tracker.trace.losses())
    np.testing.assert_array_equal(*losses)


def test_the_training_rows_of_a_data_frame(noisy, safety, make_args, collator):
    values = np.arange(24) / 24
    trainer = FilteredTrainer(
        tiny_llama(), make_args(), train_dataset=noisy.to_pandas(), data_collator=collator, forgetting=values, **FORGETTING
    )  # fmt: skip
    assert trainer.removed_dataset.to_list() == noisy.to_list()[13:]
    pipeline = ForgetFilter(tiny_llama, noisy.to_pandas(), safety.to_pandas(), make_args("p"), data_collator=collator)
    pipeline.finetune()
    assert pipeline.tracker.trace.rows.ids == encode_rows(noisy).ids


@pytest.mark.parametrize(
    "use",
    {
        "named": lambda rows, args, sft: train_tracked(rows["train"], args, None, ForgetTracker(rows)),
        "audited": lambda rows, args, sft: ForgetTracker(rows, audit_column="unsafe"),
        "adopted": lambda rows, args, sft: train_tracked(rows, args, None, ForgetTracker()),
        "FilteredTrainer": lambda rows, args, sft: FilteredTrainer(
            tiny_llama(), args(), train_dataset=rows, forgetting=np.ones(2), **FORGETTING
        ),
        "FilteredSFTTrainer": lambda rows, args, sft: FilteredSFTTrainer(
            tiny_llama(), sft(), train_dataset=rows, forgetting=np.ones(2), **FORGETTING
        ),
        "ForgetFilter": lambda rows, args, sft: ForgetFilter(tiny_llama, rows, rows, args()),
        "ForgetFilter's safety set": lambda rows, args, sft: ForgetFilter(tiny_llama, rows["train"], rows, args()),
        "encode_rows": lambda rows, args, sft: encode_rows(rows),
    }.items(),
    ids=lambda item: item[0],
)
def test_a_dictionary_of_splits_is_refused_everywhere(use, make_args, sft_config):
    rows = DatasetDict({"train": rows_of("tokens"), "test": rows_of("tokens")})
    with pytest.raises(EncodingError, match=r"is a DatasetDict with the splits 'train', 'test'. Choose a split"):
        use[1](rows, make_args, sft_config)

"""Every entry point that takes rows accepts a DataFrame or a map-style dataset, and refuses a DatasetDict by name."""

from __future__ import annotations

import numpy as np
import pytest
from datasets import Dataset, DatasetDict
from helpers import MapStyle, texts, tiny_llama, train_tracked
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


CONTAINERS = {"DataFrame": Dataset.to_pandas, "map-style": MapStyle}


@pytest.mark.parametrize("contained", CONTAINERS.values(), ids=CONTAINERS)
@pytest.mark.parametrize("form", ["text", "tokens"])
def test_named_rows(form, contained, safety, make_args, collator, tokenizer):
    rows = Dataset.from_list(texts(6, seed=0)) if form == "text" else safety.add_column("unsafe", [True, False] * 6)
    losses = []
    for folder, named in (("a", rows), ("b", contained(rows))):
        tracker = ForgetTracker(named, audit_column="unsafe")
        Trainer(
            tiny_llama(), make_args(folder), train_dataset=safety, data_collator=collator, callbacks=[tracker],
            processing_class=tokenizer,
        ).train()  # fmt: skip
        losses.append(tracker.trace.losses())
    np.testing.assert_array_equal(*losses)
    assert encode_rows(contained(rows), tokenizer).ids == tracker.trace.rows.ids


@pytest.mark.parametrize("contained", CONTAINERS.values(), ids=CONTAINERS)
def test_training_rows(contained, noisy, safety, make_args, collator):
    values = np.arange(24) / 24
    trainer = FilteredTrainer(
        tiny_llama(), make_args(), train_dataset=contained(noisy), data_collator=collator, forgetting=values, **FORGETTING
    )  # fmt: skip
    assert [*trainer.removed_dataset] == noisy.to_list()[13:]
    pipeline = ForgetFilter(tiny_llama, contained(noisy), contained(safety), make_args("p"), data_collator=collator)
    pipeline.finetune()
    assert pipeline.tracker.trace.rows.ids == encode_rows(noisy).ids


# Each use takes good rows and bad ones. Messages name the bad ones.
USES = {
    "named": ("`noisy`", lambda good, bad, args, sft: train_tracked(good, args, None, ForgetTracker(bad))),
    "audited": ("`noisy`", lambda good, bad, args, sft: ForgetTracker(bad, audit_column="unsafe")),
    "FilteredTrainer": (
        "`train_dataset`",
        lambda good, bad, args, sft: FilteredTrainer(
            tiny_llama(), args(), train_dataset=bad, forgetting=np.ones(2), **FORGETTING
        ),
    ),
    "FilteredSFTTrainer": (
        "`train_dataset`",
        lambda good, bad, args, sft: FilteredSFTTrainer(
            tiny_llama(), sft(), train_dataset=bad, forgetting=np.ones(2), **FORGETTING
        ),
    ),
    "ForgetFilter": ("`noisy`", lambda good, bad, args, sft: ForgetFilter(tiny_llama, bad, good, args())),
    "ForgetFilter's safety set": ("`safety`", lambda good, bad, args, sft: ForgetFilter(tiny_llama, good, bad, args())),
    "encode_rows": ("`rows`", lambda good, bad, args, sft: encode_rows(bad)),
}


@pytest.mark.parametrize(("name", "use"), USES.values(), ids=USES)
def test_bad_containers_are_named_everywhere(name, use, make_args, sft_config):
    good = rows_of("tokens")
    splits = DatasetDict({"train": good, "test": good})
    with pytest.raises(
        EncodingError, match=f"^{name} is a DatasetDict with the splits 'train', 'test'. Choose a split"
    ):
        use(good, splits, make_args, sft_config)
    with pytest.raises(EncodingError, match=f"^{name} has no rows"):
        use(good, good.select([]), make_args, sft_config)


def test_an_adopted_dictionary_of_splits_is_refused(make_args):
    rows = DatasetDict({"train": rows_of("tokens"), "test": rows_of("tokens")})
    with pytest.raises(
        EncodingError, match=r"^The training set is a DatasetDict with the splits 'train', 'test'. Choose"
    ):
        train_tracked(rows, make_args, None, ForgetTracker())

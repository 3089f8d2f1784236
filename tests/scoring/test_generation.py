"""Greedy completions and their ROUGE-1."""

from __future__ import annotations

import numpy as np
import torch
from helpers import tiny_llama
from transformers import Trainer

from forgetfilter_callback import ForgetTracker
from forgetfilter_callback.trace.records import Record


def test_rouge_is_recorded_from_greedy_completions(noisy, safety, make_args, collator, tokenizer):
    from rouge_score.rouge_scorer import RougeScorer

    model, tracker = tiny_llama(), ForgetTracker(noisy, rouge1=True, max_new_tokens=8)
    rows = [(r["input_ids"], r["labels"]) for r in noisy]
    scorer, expected = RougeScorer(["rouge1"], use_stemmer=True), []
    for tokens, labels in rows:
        start = next(i for i, label in enumerate(labels) if label != -100 and i > 0)
        output = model.generate(torch.tensor([tokens[:start]]), max_new_tokens=8, do_sample=False, pad_token_id=1)
        reference = tokenizer.decode(tokens[start:], skip_special_tokens=True)
        answer = tokenizer.decode(output[0, start:], skip_special_tokens=True)
        score = scorer.score(reference, answer)["rouge1"].fmeasure
        expected.append(score if reference.strip() else np.nan)
    Trainer(
        model,
        make_args(),
        train_dataset=safety,
        data_collator=collator,
        callbacks=[tracker],
        processing_class=tokenizer,
    ).train()
    np.testing.assert_allclose(tracker.trace.rouge1(Record("safety", 0)), expected)
    before, after = (tracker.trace.rouge1(record) for record in tracker.trace.records())
    np.testing.assert_allclose(tracker.trace.forgetting("rouge1"), before - after)

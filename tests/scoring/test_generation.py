"""Greedy completions and their ROUGE-1."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import tiny_llama, tiny_lora
from shipped_tokenizers import SHIPPED, shipped_tokenizer
from transformers import Trainer

from forgetfilter_callback import ForgetTracker
from forgetfilter_callback.scoring.generation import greedy_completions
from forgetfilter_callback.trace.records import Record


@torch.no_grad()
def most_likely_tokens(model, prompt: np.ndarray, count: int) -> list[int]:
    """Takes the most likely token `count` times, without `generate`."""
    tokens = torch.from_numpy(prompt)[None].long()
    for _ in range(count):
        tokens = torch.cat([tokens, model(input_ids=tokens).logits[:, -1:].argmax(-1)], dim=1)
    return tokens[0, len(prompt) :].tolist()


@pytest.mark.parametrize("make_model", [tiny_llama, tiny_lora])
@pytest.mark.parametrize(
    "settings",
    [
        {"repetition_penalty": 3.0},
        {"no_repeat_ngram_size": 1},
        {"num_beams": 4},
        {"suppress_tokens": list(range(6, 60))},
        {"return_dict_in_generate": True},
        {"num_return_sequences": 2, "num_beams": 2},
    ],
    ids=str,
)
def test_settings_of_the_model_do_not_change_completions(settings, make_model, tokenizer):
    model = make_model()
    prompts = [np.array([5, 6, 7, 8]), np.array([9, 10, 11])]
    expected = [tokenizer.decode(most_likely_tokens(model, prompt, 8), skip_special_tokens=True) for prompt in prompts]
    model.generation_config.update(**settings)
    given = model.generation_config.to_dict()
    assert greedy_completions(model, tokenizer, prompts, 8, disable_tqdm=True) == expected
    assert model.generation_config.to_dict() == given and given.items() >= settings.items()


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


@pytest.mark.parametrize("name", SHIPPED)
def test_completions_end_where_the_model_ends_them(name):
    """At the end of a turn, often with another token than the tokenizer's EOS token. Prompts of a batch differ in length."""
    tokenizer = shipped_tokenizer(name)
    model = tiny_llama(vocab_size=len(tokenizer), eos_token_id=None, pad_token_id=None)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(6, len(tokenizer), length) for length in (3, 9, 5, 2)]

    def of_transformers(prompt: np.ndarray) -> list[int]:
        output = model.generate(torch.from_numpy(prompt)[None], max_new_tokens=8, do_sample=False, pad_token_id=0)
        return output[0, len(prompt) :].tolist()

    endless = [of_transformers(prompt) for prompt in prompts]
    # Tokens that the model generates in the middle of a completion.
    model.generation_config.eos_token_id = [endless[0][3], endless[1][5]]
    expected = [tokenizer.decode(of_transformers(prompt), skip_special_tokens=True) for prompt in prompts]
    if tokenizer.eos_token_id is not None:
        assert not any(tokenizer.eos_token_id in tokens for tokens in endless)
    assert greedy_completions(model, tokenizer, prompts, 8, disable_tqdm=True) == expected
    assert expected != [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in endless]
    assert tokenizer.pad_token == shipped_tokenizer(name).pad_token


def test_the_head_gets_contiguous_states(tokenizer):
    """For the view of the last states of a batch, torch would copy the head's weights once per prompt."""
    model = tiny_llama()
    contiguous = []
    head = model.get_output_embeddings()
    head.register_forward_hook(lambda module, args, output: contiguous.append(args[0].is_contiguous()))
    prompts = [np.arange(6, 6 + length) for length in (3, 5)]
    greedy_completions(model, tokenizer, prompts, 2, disable_tqdm=True)
    assert len(contiguous) == 2 and all(contiguous)
    assert len(head._forward_pre_hooks) == 0

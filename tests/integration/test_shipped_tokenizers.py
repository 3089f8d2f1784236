"""Tokenizers as they ship: without a pad token, without bos, with eos in the chat template only, and with pad = eos."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from helpers import call, run_options, texts, tiny_llama
from sft_helpers import one_row_losses, rows_of
from shipped_tokenizers import SHIPPED, shipped_tokenizer, special_tokens
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, Trainer
from trl import SFTTrainer

from forgetfilter_callback import ForgetTracker, Trace
from forgetfilter_callback.data.tokenizers import padding_collator


def as_messages(rows):
    return [
        {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "completion": [{"role": "assistant", "content": row["completion"]}],
        }
        for row in rows
    ]


def transformers_loss(model, tokenizer, row) -> float:
    """transformers' own loss of the completion, after its own tokenizer or chat template."""
    if isinstance(row["prompt"], str):
        text = row["prompt"] + row["completion"] + (tokenizer.eos_token or "")
        prompt, whole = tokenizer(row["prompt"])["input_ids"], tokenizer(text)["input_ids"]
    else:
        prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True)["input_ids"]
        whole = tokenizer.apply_chat_template(row["prompt"] + row["completion"])["input_ids"]
    assert whole[: len(prompt)] == prompt
    labels = [-100] * len(prompt) + whole[len(prompt) :]
    with torch.no_grad():
        return float(model(input_ids=torch.tensor([whole]), labels=torch.tensor([labels])).loss)


@pytest.mark.parametrize("form", [list, as_messages], ids=["text", "messages"])
@pytest.mark.parametrize("name", SHIPPED)
def test_run_and_score(name, form, tmp_path):
    tokenizer = shipped_tokenizer(name)
    tiny_llama(vocab_size=len(tokenizer)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows, files = form(texts(8, seed=1)), {"model": tmp_path / "model"}
    for split, of_split in (("noisy", rows), ("safety", form(texts(5, seed=2)))):
        files[split] = tmp_path / f"{split}.jsonl"
        files[split].write_text("".join(json.dumps(row) + "\n" for row in of_split))
    options = run_options(files, tmp_path / "out")
    assert call("run", *options, "--dry-run").exit_code == 0
    result = call("run", *options, "--fraction", 0.25, "--refit")
    assert result.exit_code == 0, result.output
    scored = call("score", "--noisy", files["noisy"], "--before", files["model"], "--output", tmp_path / "scored")
    assert scored.exit_code == 0, scored.output
    expected = [transformers_loss(tiny_llama(vocab_size=len(tokenizer)), tokenizer, row) for row in rows]
    for folder in (tmp_path / "out" / "_forgetfilter", tmp_path / "scored"):
        np.testing.assert_allclose(Trace.open(folder).losses()[0], expected, rtol=1e-5)
    # The finetuned model has the tokenizer as it ships.
    assert special_tokens(AutoTokenizer.from_pretrained(tmp_path / "out" / "model")) == special_tokens(tokenizer)


@pytest.mark.parametrize("form", ["text", "prompt and completion messages"])
@pytest.mark.parametrize("name", list(SHIPPED)[:-1])  # SFTTrainer refuses a tokenizer without eos
def test_named_rows_in_sfttrainer(name, form, sft_config):
    rows = rows_of(form)
    tracker, tokenizer = ForgetTracker(rows), shipped_tokenizer(name)
    model = tiny_llama(vocab_size=len(tokenizer))
    SFTTrainer(model, sft_config(), train_dataset=rows, processing_class=tokenizer, callbacks=[tracker]).train()
    expected = one_row_losses(rows, sft_config(), shipped_tokenizer(name))
    np.testing.assert_allclose(tracker.trace.losses()[0], expected, rtol=1e-5)


@pytest.mark.parametrize("name", SHIPPED)
def test_named_rows_of_text_in_trainer(name, safety, make_args):
    tokenizer = shipped_tokenizer(name)
    before, rows = special_tokens(tokenizer), texts(6, seed=1)
    tracker = ForgetTracker(rows)
    model = tiny_llama(vocab_size=len(tokenizer))
    Trainer(
        model, make_args(), train_dataset=safety, data_collator=padding_collator(tokenizer), callbacks=[tracker],
        processing_class=tokenizer,
    ).train()  # fmt: skip
    expected = [transformers_loss(tiny_llama(vocab_size=len(tokenizer)), tokenizer, row) for row in rows]
    np.testing.assert_allclose(tracker.trace.losses()[0], expected, rtol=1e-5)
    assert special_tokens(tokenizer) == before


@pytest.mark.parametrize("name", SHIPPED)
def test_the_collator_of_a_run_does_not_change_the_loss(name, noisy):
    """A batch has the loss of its rows alone, also for a model with absolute positions, and the tokenizer is unchanged."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=4, n_positions=64)).eval()
    tokenizer, rows = shipped_tokenizer(name), noisy.select(range(3)).to_list()
    before = special_tokens(tokenizer)
    collate = padding_collator(tokenizer)
    counts = [sum(label != -100 for label in row["labels"][1:]) for row in rows]
    with torch.no_grad():
        alone = [model(**collate([row])).loss for row in rows]
        together = model(**collate(rows)).loss
    torch.testing.assert_close(together, sum(a * c for a, c in zip(alone, counts, strict=True)) / sum(counts))
    assert special_tokens(tokenizer) == before

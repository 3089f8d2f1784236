"""Encoding rows of text, messages and token ids."""

from __future__ import annotations

import copy
import re

import numpy as np
import pytest
from datasets import Dataset
from helpers import tiny_llama

from forgetfilter_callback import encode_rows
from forgetfilter_callback.errors import EncodingError
from forgetfilter_callback.scoring.token_losses import token_losses


def test_chat_template_error_names_the_row(byte_tokenizer):
    picky = copy.deepcopy(byte_tokenizer)
    picky.chat_template = "{{ raise_exception('System role not supported') }}"
    with pytest.raises(EncodingError, match=r"Row 0: System role not supported \(TemplateError\)"):
        encode_rows([{"messages": [{"role": "system", "content": "a"}]}], picky, disable_tqdm=True)


def test_template_arguments_of_some_rows(byte_tokenizer):
    polite = copy.deepcopy(byte_tokenizer)
    polite.chat_template = "{% for m in messages %}{{ m.content }}{% if loud %}!{% endif %}{% endfor %}"
    rows = [{"messages": [{"role": "user", "content": "a"}]}] * 2
    rows = Dataset.from_list([{**rows[0], "chat_template_kwargs": {"loud": True}}, rows[1]])
    assert rows[1]["chat_template_kwargs"] is None
    encoded = encode_rows(rows, polite, disable_tqdm=True)
    assert [polite.decode(encoded.sample(index)[0]) for index in range(2)] == ["a!", "a"]


def test_a_row_of_a_hundred_thousand_tokens_is_truncated(byte_tokenizer):
    rows = encode_rows([{"text": "ab" * 50_000}, {"text": "the cat"}], byte_tokenizer, 64, disable_tqdm=True)
    assert rows.truncated == 1 and len(rows.sample(0)[0]) == 64
    assert np.isfinite(token_losses(tiny_llama(vocab_size=len(byte_tokenizer)), rows, disable_tqdm=True)).all()


def test_columns_of_another_form_are_refused_with_an_example(byte_tokenizer):
    alpaca = {"instruction": "Say hi", "input": "", "output": "hi"}
    with pytest.raises(
        EncodingError, match=r"Row 0: columns \['input', 'instruction', 'output'\] are not a supported form"
    ):
        encode_rows([alpaca], byte_tokenizer, disable_tqdm=True)
    rows = Dataset.from_list([{"question": "What is 2 + 2?", "answer": "4"}])
    with pytest.raises(EncodingError) as error:
        encode_rows(rows, byte_tokenizer, disable_tqdm=True)
    example = re.search(r"rows\.map\(.*\)$", str(error.value))[0]
    encoded = encode_rows(eval(example, {"rows": rows}), byte_tokenizer, disable_tqdm=True)
    tokens, loss_mask = encoded.sample(0)
    assert byte_tokenizer.decode(tokens) == "What is 2 + 2?\n4<eos>"
    assert byte_tokenizer.decode(tokens[loss_mask]) == "4<eos>"

"""Decoding token ids."""

from __future__ import annotations

import copy

import pytest

from forgetfilter_callback.data.decode import decode


@pytest.mark.parametrize("kind", ["transformers", "tokenizers"])
def test_tokens_that_the_tokenizer_does_not_know_are_shown_by_id(kind, byte_tokenizer):
    """They were added in memory, so a tokenizer that is loaded again does not have them."""
    in_memory = copy.deepcopy(byte_tokenizer)
    in_memory.add_tokens(["<think>", "</think>"])
    begin, end = in_memory.convert_tokens_to_ids(["<think>", "</think>"])
    tokenizer = byte_tokenizer if kind == "transformers" else byte_tokenizer.backend_tokenizer
    tokens = in_memory("<think>na\u00efve 👩‍👩‍👧</think></think> cat<eos>")["input_ids"]
    assert decode(tokenizer, tokens) == f"[{begin}]na\u00efve 👩‍👩‍👧[{end}][{end}] cat<eos>"
    assert decode(tokenizer, tokens, skip_special_tokens=True) == f"[{begin}]na\u00efve 👩‍👩‍👧[{end}][{end}] cat"
    assert decode(in_memory, tokens) == "<think>na\u00efve 👩‍👩‍👧</think></think> cat<eos>"

"""Splitting a text into the pieces of its tokens."""

from __future__ import annotations

import copy

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from forgetfilter_callback.data.decode import completion_text, special_ids
from forgetfilter_callback.reports.token_text import Piece, last_characters, split_text


def metaspace_tokenizer() -> PreTrainedTokenizerFast:
    """Like the first Llama tokenizer: the decoder drops the leading space."""
    words = {word: place for place, word in enumerate(["<unk>", "▁the", "▁cat", "▁dog", "s", "▁naive"])}
    raw = Tokenizer(models.BPE(vocab=words, merges=[], unk_token="<unk>"))
    raw.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>")


@pytest.mark.parametrize("kind", ["bytes", "metaspace"])
def test_pieces_add_up_to_the_text(kind, byte_tokenizer):
    if kind == "bytes":
        tokenizer = byte_tokenizer
        tokens = np.array(tokenizer("<eos>the cat<eos> naïve 👩‍👩‍👧 dog<eos>")["input_ids"], np.int32)
    else:
        tokenizer, tokens = metaspace_tokenizer(), np.array([1, 2, 4, 1, 3, 4, 5], np.int32)
    loss_mask = np.arange(len(tokens)) >= 2
    rises = np.arange(loss_mask.sum(), dtype=np.float32)
    prompt, pieces = split_text(tokenizer, tokens, loss_mask, rises, special_ids(tokenizer))
    assert "".join(piece.text for piece in prompt + pieces) == tokenizer.decode(tokens)
    assert pieces[0].rise == 0.0 and all(piece.rise is not None for piece in pieces)
    assert len(pieces) > 4


@pytest.mark.parametrize("kind", ["transformers", "tokenizers"])
def test_special_tokens_are_pieces_of_their_own(kind, byte_tokenizer):
    with_tool = copy.deepcopy(byte_tokenizer)
    with_tool.add_tokens(["<tool>"])  # not a special token
    tokenizer = with_tool if kind == "transformers" else with_tool.backend_tokenizer
    tokens = np.array(with_tool("<eos>the cat<eos><eos>on<tool>the mat<eos>")["input_ids"], np.int32)
    loss_mask = np.arange(len(tokens)) == len(tokens) - 1
    prompt, pieces = split_text(tokenizer, tokens, loss_mask, np.ones(1, np.float32), special_ids(tokenizer))
    eos = Piece("<eos>", None, True)
    assert prompt == [eos, Piece("the cat", None, False), eos, eos, Piece("on<tool>the mat", None, False)]
    assert pieces == [Piece("<eos>", 1.0, True)]


def test_the_last_characters_of_a_prompt_begin_with_a_word():
    prompt = [Piece("<s>", None, True), Piece("the cat sat", None, False), Piece("<e>", None, True)]
    assert last_characters(prompt, 17) == (prompt, 0)
    assert last_characters(prompt, 16) == (prompt[1:], 3)
    assert last_characters(prompt, 3) == (prompt[2:], 14)
    assert last_characters(prompt, 9) == ([Piece("sat", None, False), Piece("<e>", None, True)], 11)
    assert last_characters([Piece("x" * 50, None, False)], 10) == ([Piece("x" * 10, None, False)], 40)


@pytest.mark.parametrize("kind", ["transformers", "tokenizers"])
def test_a_row_that_is_trained_on_as_a_whole(kind, byte_tokenizer):
    """Nothing predicts its first token, but it is no prompt. A list of rows shows the last turn of a conversation."""
    tokenizer = byte_tokenizer if kind == "transformers" else byte_tokenizer.backend_tokenizer
    tokens = np.array(byte_tokenizer("<eos>user the cat?<eos><eos>assistant the mat<eos> <eos>")["input_ids"], np.int32)
    loss_mask = np.arange(len(tokens)) > 0
    rises = np.ones(len(tokens) - 1, np.float32)
    prompt, pieces = split_text(tokenizer, tokens, loss_mask, rises, special_ids(tokenizer))
    assert prompt == [] and "".join(piece.text for piece in pieces) == byte_tokenizer.decode(tokens)
    assert pieces[0] == Piece("<eos>", None, True) and {piece.rise for piece in pieces[1:]} == {1.0}
    assert completion_text(tokenizer, tokens, loss_mask) == "assistant the mat"
    assert completion_text(tokenizer, tokens[:1], loss_mask[:1]) == ""
    loss_mask[1] = False
    assert completion_text(tokenizer, tokens, loss_mask) == byte_tokenizer.decode(tokens[2:], skip_special_tokens=True)


@pytest.mark.parametrize("text", ["the cat " * 50, "ก" * 400, "👩" * 400], ids=["words", "three bytes", "four bytes"])
def test_a_long_conversation_without_a_prompt_loses_its_beginning(text, byte_tokenizer):
    tokens = np.array(byte_tokenizer(f"<eos>user hi<eos>assistant {text}<eos>")["input_ids"], np.int32)
    loss_mask = np.arange(len(tokens)) > 0
    rises = np.ones(len(tokens) - 1, np.float32)
    special = special_ids(byte_tokenizer)
    prompt, (first, *pieces) = split_text(byte_tokenizer, tokens, loss_mask, rises, special, max_length=100)
    shown = "".join(piece.text for piece in pieces)
    assert prompt == [] and first == Piece("[…] ", None, False)
    assert f"{text}<eos>".endswith(shown) and 90 <= len(shown) <= 100 and not shown.startswith(" ")
    whole = split_text(byte_tokenizer, tokens, loss_mask, rises, special, max_length=10_000)[1]
    assert "".join(piece.text for piece in whole) == byte_tokenizer.decode(tokens)

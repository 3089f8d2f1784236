"""Splitting a text into the pieces of its tokens."""

from __future__ import annotations

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from forgetfilter_callback.reports.token_text import split_text


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
        tokens = np.array(tokenizer("the cat naïve 👩‍👩‍👧 dog")["input_ids"], np.int32)
    else:
        tokenizer, tokens = metaspace_tokenizer(), np.array([1, 2, 4, 1, 3, 4, 5], np.int32)
    loss_mask = np.arange(len(tokens)) >= 2
    prompt, pieces = split_text(tokenizer, tokens, loss_mask, np.arange(loss_mask.sum(), dtype=np.float32))
    assert prompt + "".join(piece for piece, _ in pieces) == tokenizer.decode(tokens)
    assert pieces[0][1] == 0.0 and all(rise is not None for _, rise in pieces)
    assert len(pieces) > 4

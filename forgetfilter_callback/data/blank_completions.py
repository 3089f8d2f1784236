"""Find samples whose completion is empty or only white space: they train nothing but the end token."""

from __future__ import annotations

import numpy as np
from transformers import PreTrainedTokenizerBase

from ..utils.counted import counted_of
from ..utils.row_numbers import describe_rows
from .encoded_rows import EncodedRows


# What a tokenizer decodes for a part of a character.
_REPLACEMENT_CHARACTER = "\ufffd"


def find_blank_completions(rows: EncodedRows, tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """Find the samples whose loss tokens are only special tokens and white space.

    Samples without loss tokens are left out: they have no loss at all.

    Args:
        rows ([`EncodedRows`]):
            The encoded rows.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The tokenizer that they were encoded with.

    Returns:
        `np.ndarray` of shape `(blank_samples,)`: their row numbers.
    """
    vocabulary_size = len(tokenizer)
    # Byte-level tokenizers (GPT-2) have no unknown tokens. They name the end token instead, which is no text.
    ends = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    unknown = None if tokenizer.unk_token_id in ends else tokenizer.unk_token_id

    def visible_text(tokens: np.ndarray) -> str:
        if unknown in tokens or tokens.max() >= vocabulary_size:  # `decode` skips both
            return "?"
        return str(tokenizer.decode(tokens.tolist(), skip_special_tokens=True)).strip()

    blank: list[int] = []
    first = 0  # row number of the first sample of the window
    for window in rows.windows():
        loss_tokens, offsets = window.loss_tokens, window.loss_offsets
        with_loss = np.flatnonzero(np.diff(offsets))
        # Most samples are ruled out by their first token, which is decoded once for all of them.
        first_tokens, inverse = np.unique(loss_tokens[offsets[with_loss]], return_inverse=True)
        may_be_blank = np.array(
            [not visible_text(first_tokens[[i]]).strip(_REPLACEMENT_CHARACTER) for i in range(len(first_tokens))], bool
        )
        for sample in with_loss[may_be_blank[inverse]].tolist():
            if not visible_text(loss_tokens[offsets[sample] : offsets[sample + 1]]):
                blank.append(first + sample)
        first += len(window)
    return np.array(blank, dtype=np.int64)


def describe_blank_completions(rows: EncodedRows, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """A sentence for a warning that says which completions are blank, or `None` if there are none."""
    blank = find_blank_completions(rows, tokenizer)
    if not len(blank):
        return None
    return (
        f"{counted_of(len(blank), len(rows), 'row', 'have')} a completion that is empty or only white space "
        f"({describe_rows(blank)}), so only its end token and white space are trained and scored. Remove such rows if that "
        "is not intended."
    )

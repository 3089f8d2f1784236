"""TODO"""

from __future__ import annotations

import numpy as np
from transformers import PreTrainedTokenizerBase

from .review_page import MAX_TEXT_LENGTH


def split_text(
    tokenizer: PreTrainedTokenizerBase, tokens: np.ndarray, loss_mask: np.ndarray, rises: np.ndarray
) -> tuple[str, list[tuple[str, float | None]]]:
    """A sample as text: what stands before the first counted token, and the rest in pieces.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Decodes.
        tokens, loss_mask (`np.ndarray` of shape `(tokens,)`):
            Of the sample.
        rises (`np.ndarray` of shape `(counted_tokens,)`):
            By how much the loss of each counted token rose, nats.

    Returns:
        `tuple`: the prompt, and a list of (text, mean rise of its tokens, or `None` where none of them counts). A piece is a
        token, or the tokens that one character is made of.
    """
    start = int(np.argmax(loss_mask)) if loss_mask.any() else len(tokens)
    rise_of = np.full(len(tokens), np.nan)
    rise_of[loss_mask] = rises
    prompt = _decode(tokenizer, tokens[:start])
    pieces: list[tuple[str, float | None]] = []
    begun = start
    characters = 0
    for end in range(start + 1, len(tokens) + 1):
        # After the token before it: some tokenizers leave out the space that a text begins with.
        text = _decode(tokenizer, tokens[max(begun - 1, 0) : end]).removeprefix(
            _decode(tokenizer, tokens[max(begun - 1, 0) : begun])
        )
        if text.endswith("\ufffd") and end < len(tokens) and end - begun < 8:
            continue  # a character that goes on in the next token
        its_rises = rise_of[begun:end]
        known = its_rises[np.isfinite(its_rises)]
        pieces.append((text, round(float(known.mean()), 3) if len(known) else None))
        begun = end
        characters += len(text)
        if characters > MAX_TEXT_LENGTH:
            pieces.append((" […]", None))
            break
    return prompt, pieces


def _decode(tokenizer: PreTrainedTokenizerBase, tokens: np.ndarray) -> str:
    return tokenizer.decode(tokens, clean_up_tokenization_spaces=False)

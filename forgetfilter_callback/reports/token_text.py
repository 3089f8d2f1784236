"""Text of a sample, split into pieces with the loss rise of their tokens."""

from __future__ import annotations

from typing import cast

import numpy as np
from transformers import PreTrainedTokenizerBase


MAX_TEXT_LENGTH = 2_000  # characters; bounds the size of the review page
_MAX_PIECE_TOKENS = 8


def split_text(
    tokenizer: PreTrainedTokenizerBase, tokens: np.ndarray, loss_mask: np.ndarray, rises: np.ndarray
) -> tuple[str, list[tuple[str, float | None]]]:
    """Splits a sample into its prompt and the pieces of its completion.

    The prompt ends before the first loss token. A piece is the text of one token, or of several tokens if they form a
    single character together.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Decodes the tokens.
        tokens (`np.ndarray` of shape `(tokens,)`, integer):
            Token ids of the sample.
        loss_mask (`np.ndarray` of shape `(tokens,)`, bool):
            Which tokens contribute to the loss.
        rises (`np.ndarray` of shape `(loss_tokens,)`, float32):
            Loss rise of each loss token, in nats.

    Returns:
        `tuple[str, list[tuple[str, float | None]]]`: the prompt, and the pieces as pairs of text and mean loss rise in
        nats (`None` if no token of the piece contributes to the loss). Pieces beyond 2,000 characters are replaced
        with " […]".
    """
    start = int(np.argmax(loss_mask)) if loss_mask.any() else len(tokens)
    token_rises = np.full(len(tokens), np.nan)
    token_rises[loss_mask] = rises
    prompt = _decode(tokenizer, tokens[:start])
    pieces: list[tuple[str, float | None]] = []
    piece_start = start
    characters = 0
    for end in range(start + 1, len(tokens) + 1):
        # Decode after the previous token, because some tokenizers drop the space at the start of a text.
        text = _decode(tokenizer, tokens[max(piece_start - 1, 0) : end]).removeprefix(
            _decode(tokenizer, tokens[max(piece_start - 1, 0) : piece_start])
        )
        if text.endswith("\ufffd") and end < len(tokens) and end - piece_start < _MAX_PIECE_TOKENS:
            continue  # the character is incomplete: it continues in the next token
        piece_rises = token_rises[piece_start:end]
        known = piece_rises[np.isfinite(piece_rises)]
        pieces.append((text, round(float(known.mean()), 3) if len(known) else None))
        piece_start = end
        characters += len(text)
        if characters > MAX_TEXT_LENGTH:
            pieces.append((" […]", None))
            break
    return prompt, pieces


def _decode(tokenizer: PreTrainedTokenizerBase, tokens: np.ndarray) -> str:
    return cast(str, tokenizer.decode(tokens, clean_up_tokenization_spaces=False))

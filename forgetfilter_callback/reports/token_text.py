"""Text of a sample, split into pieces with the loss rise of their tokens."""

from __future__ import annotations

import math

import numpy as np

from ..data.decode import Decoder, decode


MAX_TEXT_LENGTH = 2_000  # characters; bounds the size of the review page
_MAX_PIECE_TOKENS = 8


def split_text(
    tokenizer: Decoder,
    tokens: np.ndarray,
    loss_mask: np.ndarray,
    rises: np.ndarray,
    max_length: int = MAX_TEXT_LENGTH,
) -> tuple[str, list[tuple[str, float | None]]]:
    """Splits a sample into its prompt and the pieces of its completion.

    The prompt ends before the first loss token. A piece is the text of one token, or of several tokens if they form a
    single character together.

    Args:
        tokenizer ([`tokenizers.Tokenizer`] or [`~transformers.PreTrainedTokenizerBase`]):
            Decodes the tokens.
        tokens (`np.ndarray` of shape `(tokens,)`, integer):
            Token ids of the sample.
        loss_mask (`np.ndarray` of shape `(tokens,)`, bool):
            Which tokens contribute to the loss.
        rises (`np.ndarray` of shape `(loss_tokens,)`, float32):
            Loss rise of each loss token, in nats.
        max_length (`int`, defaults to 2,000):
            Characters of the completion.

    Returns:
        `tuple[str, list[tuple[str, float | None]]]`: the prompt, and the pieces as pairs of text and mean loss rise in
        nats (`None` if no token of the piece contributes to the loss). Pieces beyond `max_length` characters are
        replaced with " […]".
    """
    start = int(np.argmax(loss_mask)) if loss_mask.any() else len(tokens)
    all_rises = np.full(len(tokens), np.nan)
    all_rises[loss_mask] = rises
    token_rises = all_rises.tolist()
    token_ids = tokens.tolist()
    prompt = decode(tokenizer, token_ids[:start])
    pieces: list[tuple[str, float | None]] = []
    piece_start = start
    characters = 0
    for end in range(start + 1, len(tokens) + 1):
        # Decode after the previous token, because some tokenizers drop the space at the start of a text.
        previous = max(piece_start - 1, 0)
        text = decode(tokenizer, token_ids[previous:end]).removeprefix(
            decode(tokenizer, token_ids[previous:piece_start])
        )
        if text.endswith("\ufffd") and end < len(tokens) and end - piece_start < _MAX_PIECE_TOKENS:
            continue  # the character is incomplete: it continues in the next token
        known = [rise for rise in token_rises[piece_start:end] if math.isfinite(rise)]
        pieces.append((text, round(sum(known) / len(known), 3) if known else None))
        piece_start = end
        characters += len(text)
        if characters > max_length:
            pieces.append((" […]", None))
            break
    return prompt, pieces

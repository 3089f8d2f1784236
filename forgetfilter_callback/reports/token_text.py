"""Text of a sample, split into pieces with the loss rise of their tokens."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from ..data.decode import Decoder, decode, is_conversation, prompt_length


MAX_TEXT_LENGTH = 2_000  # characters; bounds the size of the review page
_MAX_PIECE_TOKENS = 8


class Piece(NamedTuple):
    """A part of a text.

    Attributes:
        text (`str`):
            The untrusted text.
        rise (`float` or `None`):
            Mean loss rise of its tokens, in nats. `None` if no token contributes to the loss.
        is_special (`bool`):
            Whether it is a special token, such as a mark of the chat template.
    """

    text: str
    rise: float | None
    is_special: bool


def split_text(
    tokenizer: Decoder,
    tokens: np.ndarray,
    loss_mask: np.ndarray,
    rises: np.ndarray,
    special: frozenset[int],
    max_length: int = MAX_TEXT_LENGTH,
) -> tuple[list[Piece], list[Piece]]:
    """Splits a sample into the pieces of its prompt and of its completion.

    The prompt ends before the first loss token (see [`prompt_length`]). Its pieces are the special tokens and the texts
    between them. A piece of the completion is the text of one token, or of several tokens if they form a single character
    together.

    Args:
        tokenizer ([`tokenizers.Tokenizer`] or [`~transformers.PreTrainedTokenizerBase`]):
            Decodes the tokens.
        tokens (`np.ndarray` of shape `(tokens,)`, integer):
            Token ids of the sample.
        loss_mask (`np.ndarray` of shape `(tokens,)`, bool):
            Which tokens contribute to the loss.
        rises (`np.ndarray` of shape `(loss_tokens,)`, float32):
            Loss rise of each loss token, in nats.
        special (`frozenset[int]`):
            Ids of the special tokens (see [`special_ids`]).
        max_length (`int`, defaults to 2,000):
            Characters of the completion.

    Returns:
        `tuple[list[Piece], list[Piece]]`: the prompt and the completion. Pieces beyond `max_length` characters are replaced
        with "[…]". A conversation without a prompt loses its beginning, and other completions their end.
    """
    start = prompt_length(loss_mask)
    keeps_end = start == 0 and is_conversation(tokens, special)
    all_rises = np.full(len(tokens), np.nan)
    all_rises[loss_mask] = rises
    token_rises = all_rises.tolist()
    token_ids = tokens.tolist()
    pieces: list[Piece] = []
    # A character has up to four bytes, and each can be a token.
    first = max(0, len(tokens) - 4 * max_length) if keeps_end else start
    piece_start = first
    characters = 0
    for end in range(first + 1, len(tokens) + 1):
        text = _text_between(tokenizer, token_ids, piece_start, end)
        is_special = token_ids[piece_start] in special
        if text.endswith("\ufffd") and not is_special and end < len(tokens) and end - piece_start < _MAX_PIECE_TOKENS:
            continue  # the character is incomplete: it continues in the next token
        known = [rise for rise in token_rises[piece_start:end] if math.isfinite(rise)]
        pieces.append(Piece(text, round(sum(known) / len(known), 3) if known else None, is_special))
        piece_start = end
        characters += len(text)
        if characters > max_length and not keeps_end:
            pieces.append(Piece(" […]", None, False))
            break
    if keeps_end:
        pieces, cut = last_characters(pieces, max_length)
        if first or cut:
            pieces = [
                Piece("[…] ", None, False),
                pieces[0]._replace(text=pieces[0].text.lstrip(" \ufffd")),
                *pieces[1:],
            ]
    return _split_prompt(tokenizer, token_ids[:start], special), pieces


def last_characters(prompt: list[Piece], length: int) -> tuple[list[Piece], int]:
    """The last `length` characters of a prompt, from the beginning of a word.

    Returns:
        `tuple[list[Piece], int]`: the pieces, and the number of characters that were cut off.
    """
    kept: list[Piece] = []
    for piece in reversed(prompt):
        if len(piece.text) > length:
            if length and not piece.is_special:
                text = piece.text[-length:]
                _, space, words = text.partition(" ")
                kept.append(piece._replace(text=words if space else text))
            break
        kept.append(piece)
        length -= len(piece.text)
    cut = sum(len(piece.text) for piece in prompt) - sum(len(piece.text) for piece in kept)
    return kept[::-1], cut


def _split_prompt(tokenizer: Decoder, token_ids: list[int], special: frozenset[int]) -> list[Piece]:
    pieces: list[Piece] = []
    start = 0
    for end in range(1, len(token_ids) + 1):
        is_special = token_ids[start] in special
        if end == len(token_ids) or is_special or token_ids[end] in special:
            pieces.append(Piece(_text_between(tokenizer, token_ids, start, end), None, is_special))
            start = end
    return pieces


def _text_between(tokenizer: Decoder, token_ids: list[int], start: int, end: int) -> str:
    """Decodes after the previous token, because some tokenizers drop the space at the start of a text."""
    previous = max(start - 1, 0)
    before = decode(tokenizer, token_ids[previous:start])
    return decode(tokenizer, token_ids[previous:end]).removeprefix(before)

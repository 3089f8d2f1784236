"""Turn token ids back into text. Fast tokenizers are read without transformers, which takes seconds to import."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, cast

import numpy as np
from tokenizers import Tokenizer

from .source_paths import check_model


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Decoder: TypeAlias = "Tokenizer | PreTrainedTokenizerBase"


def load_decoder(name: str) -> Decoder:
    """Load a tokenizer for [`decode`] from a folder or the Hub.

    Returns:
        [`tokenizers.Tokenizer`] if the folder, or the local cache of the Hub, contains `tokenizer.json`. Otherwise
        the tokenizer that transformers loads.

    Raises:
        DataError: if it cannot be loaded.
    """
    check_model(name, "tokenizer")
    file = _tokenizer_file(name)
    if file is not None:
        return Tokenizer.from_file(file)
    from .tokenizers import load_tokenizer  # imports transformers

    return load_tokenizer(name)


def _tokenizer_file(name: str) -> str | None:
    if Path(name).is_dir():
        file = Path(name) / "tokenizer.json"
        return str(file) if file.is_file() else None
    from huggingface_hub import try_to_load_from_cache  # not needed for folders

    cached = try_to_load_from_cache(name, "tokenizer.json")
    return cached if isinstance(cached, str) else None


def decode(tokenizer: Decoder, tokens: list[int], skip_special_tokens: bool = False) -> str:
    """Decode token ids as they are, without removing spaces before punctuation.

    A token that a fast tokenizer does not know, because it was added in memory, becomes its id: `[49152]`. Otherwise, nobody
    would notice that a part of the text is missing.
    """
    unknown = _unknown_ids(tokenizer, tokens)
    if unknown:
        parts = (
            "".join(f"[{token}]" for token in group)
            if is_unknown
            else decode(tokenizer, list(group), skip_special_tokens)
            for is_unknown, group in groupby(tokens, unknown.__contains__)
        )
        return "".join(parts)
    if isinstance(tokenizer, Tokenizer):
        return tokenizer.decode(tokens, skip_special_tokens=skip_special_tokens)
    text = tokenizer.decode(tokens, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)
    return cast(str, text)


def _unknown_ids(tokenizer: Decoder, tokens: list[int]) -> set[int]:
    if isinstance(tokenizer, Tokenizer):
        backend = tokenizer
    else:
        from transformers import PreTrainedTokenizerFast  # imported already, as the tokenizer is of transformers

        if not isinstance(tokenizer, PreTrainedTokenizerFast):
            return set()
        backend = tokenizer.backend_tokenizer
    return {token for token in set(tokens) if backend.id_to_token(token) is None}


def special_ids(tokenizer: Decoder) -> frozenset[int]:
    """Ids of the special tokens of a tokenizer, such as the marks of a chat template."""
    added = tokenizer.get_added_tokens_decoder() if isinstance(tokenizer, Tokenizer) else tokenizer.added_tokens_decoder
    return frozenset(id_ for id_, token in added.items() if token.special)


def prompt_length(loss_mask: np.ndarray) -> int:
    """Number of tokens before the first loss token of a row, but 0 instead of 1.

    Nothing predicts the first token, so a row that is trained on as a whole has its first loss at the second one.
    """
    start = int(np.argmax(loss_mask)) if loss_mask.any() else len(loss_mask)
    return 0 if start == 1 else start


def is_conversation(tokens: np.ndarray, special: frozenset[int]) -> bool:
    """Whether there are special tokens within a text, such as those between the turns of a conversation."""
    return bool(np.isin(tokens[1:-1], list(special)).any())


def completion_text(tokenizer: Decoder, tokens: np.ndarray, loss_mask: np.ndarray) -> str:
    """The text of a completion without special tokens. If there is no prompt, it is the last turn of the conversation."""
    if prompt_length(loss_mask):
        return decode(tokenizer, tokens[loss_mask].tolist(), skip_special_tokens=True)
    special = special_ids(tokenizer)
    if not is_conversation(tokens, special):
        return decode(tokenizer, tokens.tolist(), skip_special_tokens=True)
    turns = np.split(tokens, np.flatnonzero(np.isin(tokens, list(special))))
    texts = (decode(tokenizer, turn.tolist(), skip_special_tokens=True) for turn in reversed(turns))
    return next((text for text in texts if text.strip()), "")

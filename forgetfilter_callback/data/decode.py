"""Turn token ids back into text. Fast tokenizers are read without transformers, which takes seconds to import."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, cast

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
    """Decode token ids as they are, without removing spaces before punctuation."""
    if isinstance(tokenizer, Tokenizer):
        return tokenizer.decode(tokens, skip_special_tokens=skip_special_tokens)
    text = tokenizer.decode(tokens, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)
    return cast(str, text)


def special_ids(tokenizer: Decoder) -> frozenset[int]:
    """Ids of the special tokens of a tokenizer, such as the marks of a chat template."""
    added = tokenizer.get_added_tokens_decoder() if isinstance(tokenizer, Tokenizer) else tokenizer.added_tokens_decoder
    return frozenset(id_ for id_, token in added.items() if token.special)

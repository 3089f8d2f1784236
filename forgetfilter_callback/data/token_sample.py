"""[`Sample`]: one row as token ids, and how it is made from the inputs and labels of a causal language model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import EncodingError, UnsupportedInputError
from .encoded_rows import IGNORE_INDEX


# Segments of a row. Tokenizers return zeros for them.
TOKEN_TYPES = ("token_type_ids", "mm_token_type_ids")
# Columns of a tokenized row that are inputs of some models. Other columns may be ids or audit columns.
_OTHER_INPUTS = (
    "pixel_values", "pixel_values_videos", "image", "images", "input_features", "input_values", "inputs_embeds",
    "decoder_input_ids", "shift_labels", "weights", "loss_weights",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Sample:
    """One row. The three arrays have the same shape, `(tokens,)`.

    Attributes:
        tokens (`np.ndarray`, int32):
            Token ids.
        loss_mask (`np.ndarray`, bool):
            Whether a token contributes to the loss.
        attention_mask (`np.ndarray`, bool):
            Whether other tokens attend to a token. It is `False` for padding that contributes to the loss.
        left_padded (`bool`, defaults to `False`):
            Whether padding before the first token was removed, although the model counts positions from the padding.
    """

    tokens: np.ndarray
    loss_mask: np.ndarray
    attention_mask: np.ndarray
    left_padded: bool = False


def plain_sample(tokens: np.ndarray, loss_mask: np.ndarray) -> Sample:
    """Return a sample without padding."""
    return Sample(tokens, loss_mask, np.ones(len(tokens), dtype=bool))


def sample_of_inputs(
    input_ids: Any, labels: Any | None, attention_mask: Any | None = None, position_ids: Any | None = None
) -> Sample:
    """Return the sample that a model trains on when it is given these inputs.

    Padding that has labels is kept: they are trained, so they count. Other padding before and after the tokens is
    removed, because losses do not depend on it (with absolute positions they do: see `left_padded`).

    Args:
        input_ids (sequence of shape `(tokens,)`):
            The token ids of one row.
        labels, attention_mask, position_ids (sequences of shape `(tokens,)`, *optional*):
            The other inputs. Without `labels`, all tokens but padding contribute to the loss.

    Raises:
        EncodingError: if `input_ids` are not token ids, or if a label is neither the token itself nor -100.
        UnsupportedInputError: if the mask or the positions are not those of one run of tokens.
    """
    tokens = _token_ids(input_ids)
    attended = np.ones(len(tokens), dtype=bool)
    if attention_mask is not None:
        attended = _attended(np.asarray(attention_mask), tokens)
    counted = attended if labels is None else _counted(np.asarray(labels), tokens)
    start, stop = _span(attended, counted)
    first_position = start
    if position_ids is not None:
        first_position = _first_position(np.asarray(position_ids), tokens, start, stop)
    return Sample(tokens[start:stop], counted[start:stop], attended[start:stop], left_padded=first_position > 0)


def refuse_other_inputs(row: Mapping[str, Any]) -> None:
    """Check that a tokenized row has no inputs that a model reads beside its tokens.

    Raises:
        UnsupportedInputError: if it has.
    """
    others = [name for name in _OTHER_INPUTS if row.get(name) is not None]
    others += [name for name in TOKEN_TYPES if row.get(name) is not None and np.any(row[name])]
    if others:
        raise other_inputs_error(others)


def other_inputs_error(names: list[str]) -> UnsupportedInputError:
    """Return the error for inputs that are not scored."""
    return UnsupportedInputError(
        f"the row has {', '.join(f'`{name}`' for name in names)}, but only its tokens are scored. Rows with images, "
        "audio, token types, weights or other inputs are not supported. If the model does not need them, remove them "
        "from the rows, or from what the collator returns."
    )


def _token_ids(values: Any) -> np.ndarray:
    """Return the token ids of a row as int32, after checking them."""
    tokens = np.asarray(values)
    if tokens.ndim != 1 or (len(tokens) and tokens.dtype.kind not in "iu"):
        raise EncodingError(
            f"`input_ids` must be a list of integers, but it is {tokens.dtype} of shape {tokens.shape}."
        )
    if len(tokens) and not 0 <= tokens.min() <= tokens.max() < 2**31:
        raise EncodingError(
            f"`input_ids` must be between 0 and 2**31 - 1, but they range from {tokens.min()} to {tokens.max()}."
        )
    return tokens.astype(np.int32)


def _counted(labels: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    counted = labels != IGNORE_INDEX
    is_integer = labels.dtype.kind in "iu" or not len(tokens)
    if labels.shape != tokens.shape or not is_integer or not np.array_equal(labels[counted], tokens[counted]):
        raise EncodingError(
            "the labels differ from the row's own tokens. `labels` must equal `input_ids`, or be -100 for tokens that "
            "do not contribute to the loss: ForgetFilter supports causal language modeling only."
        )
    return counted


def _attended(attention_mask: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    if attention_mask.shape != tokens.shape or not np.isin(attention_mask, (0, 1)).all():
        raise UnsupportedInputError(
            f"`attention_mask` has shape {attention_mask.shape} and values up to {attention_mask.max(initial=0)}, but "
            f"must have one value per token of the row ({len(tokens):,}): 1, or 0 for padding. Masks of more "
            "dimensions and masks of packed rows are not supported. If the row is one sequence with causal attention, "
            "remove its mask."
        )
    return attention_mask.astype(bool)


def _span(attended: np.ndarray, counted: np.ndarray) -> tuple[int, int]:
    """Return the first and the last position (exclusive) of a row, without padding that has no labels."""
    used = np.flatnonzero(attended | counted)
    if not len(used):
        return 0, 0
    padding = int(np.argmax(attended)) if attended.any() else len(attended)
    return 0 if counted[:padding].any() else padding, int(used[-1]) + 1


def _first_position(position_ids: np.ndarray, tokens: np.ndarray, start: int, stop: int) -> int:
    """Return the position of the first token: 0, or the length of the padding on the left, if positions count that too."""
    if position_ids.shape == tokens.shape:
        for first in (0, start):
            if np.array_equal(position_ids[start:stop], np.arange(first, first + stop - start)):
                return first
    raise UnsupportedInputError(
        f"`position_ids` are {position_ids.tolist()!r:.80}, but only positions that count the row's tokens from 0 are "
        "supported. Remove `position_ids`: the model then counts them itself."
    )

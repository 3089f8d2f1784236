"""Encode rows one at a time into `EncodedRows`: truncation, sample ids and error messages that name the row."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pyarrow as pa
from jinja2 import TemplateError
from tqdm.auto import tqdm

from ..errors import EncodingError
from ..utils.argument_checks import check_max_length
from .encoded_rows import WINDOW, EncodedRows
from .token_buffers import TokenBuffers
from .token_sample import Sample


_DIGEST_BYTES = 12


def encode_each(
    rows: Iterable[Any],
    encode_one: Callable[[Any], Sample],
    total: int,
    max_length: int | None,
    disable_tqdm: bool,
    keep_end: bool = False,
    known: EncodedRows | None = None,
) -> EncodedRows:
    """Encode each row with `encode_one`, truncate it, and give it an id.

    Args:
        rows (`Iterable`):
            The rows, in order. There is at least one.
        encode_one (`Callable`):
            Returns the [`Sample`] of a row.
        total (`int`):
            The number of rows.
        max_length (`int`, *optional*):
            Rows with more tokens are truncated.
        disable_tqdm (`bool`):
            Whether to hide the progress bar.
        keep_end (`bool`, defaults to `False`):
            Whether to truncate on the left instead of the right.
        known ([`EncodedRows`], *optional*):
            Rows in memory that are probably the same. If they are, the result shares their arrays.

    Raises:
        EncodingError: if a row cannot be encoded. The message names the row.
        ValueError: if `max_length` is not an integer of at least 2.
    """
    check_max_length(max_length)
    buffers, offsets, ids = TokenBuffers(known), array("q", [0]), bytearray()
    truncated = left_padded = 0
    for index, row in enumerate(tqdm(rows, total=total, desc="Encoding", disable=disable_tqdm, leave=False)):
        try:
            sample = encode_one(row)
        except EncodingError as error:
            raise type(error)(f"Row {index}: {error}") from error
        except (TypeError, ValueError, OverflowError, TemplateError) as error:
            raise EncodingError(f"Row {index}: {error} ({type(error).__name__})") from error
        left_padded += sample.left_padded
        span = slice(None)
        if max_length is not None and len(sample.tokens) > max_length:
            span = slice(-max_length, None) if keep_end else slice(max_length)
            truncated += 1
        loss_mask, attention_mask = sample.loss_mask[span].copy(), sample.attention_mask[span]
        loss_mask[:1] = False  # nothing predicts the first token
        token_bytes, mask_bytes = sample.tokens[span].tobytes(), loss_mask.tobytes()
        attention_bytes = None if attention_mask.all() else attention_mask.tobytes()
        hashed = token_bytes + mask_bytes + (attention_bytes or b"")
        ids += hashlib.blake2b(hashed, digest_size=_DIGEST_BYTES).hexdigest().encode() + b"-0"
        buffers.append(token_bytes, mask_bytes, attention_bytes)
        offsets.append(len(buffers))
    all_tokens, all_loss_masks, all_attention_masks = buffers.arrays()
    return EncodedRows(
        ids=_with_occurrence_numbers(ids),
        tokens=all_tokens,
        loss_mask=all_loss_masks,
        attention_mask=all_attention_masks,
        offsets=np.frombuffer(offsets, np.int64),
        truncated=truncated,
        left_padded=left_padded,
        max_length=max_length,
    )


def _with_occurrence_numbers(ids: bytearray) -> pa.StringArray:
    """Number duplicates: replace the `-0` at the end of an id by `-1` for its second occurrence, and so on."""
    width = 2 * _DIGEST_BYTES + 2
    id_array = np.frombuffer(ids, f"S{width}")
    order = np.argsort(id_array, kind="stable")
    # Positions in `order` at which the id equals the id before it. Ids are compared in windows to bound memory.
    windows = ((start, id_array[order[start : start + WINDOW + 1]]) for start in range(0, len(id_array), WINDOW))
    repeats = np.concatenate([np.flatnonzero(window[1:] == window[:-1]) + start + 1 for start, window in windows])
    # Consecutive positions belong to the same id, so occurrences are numbered from 1 within each run of positions.
    run_starts = np.flatnonzero(np.diff(repeats, prepend=-1) != 1)
    numbers = 1 + np.arange(len(repeats)) - np.repeat(run_starts, np.diff(run_starts, append=len(repeats)))
    repeats = order[repeats]
    del order
    # Byte length of each id, then its cumulative sum: the offsets of the Arrow array.
    ends = np.full(len(id_array) + 1, width, np.int32)
    ends[0] = 0
    if len(repeats):
        numbered, copied = bytearray(), 0
        for row, number in sorted(zip(repeats.tolist(), numbers.tolist(), strict=True)):
            digits = str(number).encode()
            numbered += ids[copied : (row + 1) * width - 1] + digits
            copied = (row + 1) * width
            ends[row + 1] += len(digits) - 1
        ids = numbered + ids[copied:]
    np.cumsum(ends, out=ends)
    return pa.StringArray.from_buffers(len(id_array), pa.py_buffer(ends), pa.py_buffer(ids))

"""TODO"""

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
from .encoded_rows import WINDOW, EncodedRows


_DIGEST_BYTES = 12


def _encode(
    rows: Iterable[Any],
    encode_one: Callable[[Any], tuple[np.ndarray, np.ndarray]],
    total: int,
    max_length: int | None,
    disable_tqdm: bool,
    keep_end: bool = False,
) -> EncodedRows:
    if total == 0:
        raise EncodingError("The noisy set is empty: there is nothing to track. Pass the rows you finetune on.")
    # Grown in place: a Python object a row would be larger than most rows.
    all_tokens, all_counted, offsets, ids = array("i"), bytearray(), array("q", [0]), bytearray()
    truncated = 0
    for index, row in enumerate(tqdm(rows, total=total, desc="Encoding", disable=disable_tqdm, leave=False)):
        try:
            tokens, loss_mask = encode_one(row)
        except EncodingError as error:
            raise type(error)(f"Row {index}: {error}") from error
        except (TypeError, ValueError, OverflowError, TemplateError) as error:
            raise EncodingError(f"Row {index}: {error} ({type(error).__name__})") from error
        if max_length is not None and len(tokens) > max_length:
            within = slice(-max_length, None) if keep_end else slice(max_length)
            tokens, loss_mask = tokens[within], loss_mask[within]
            truncated += 1
        loss_mask[:1] = False
        token_bytes, counted_bytes = tokens.tobytes(), loss_mask.tobytes()
        ids += hashlib.blake2b(token_bytes + counted_bytes, digest_size=_DIGEST_BYTES).hexdigest().encode() + b"-0"
        all_tokens.frombytes(token_bytes)
        all_counted += counted_bytes
        offsets.append(len(all_tokens))
    return EncodedRows(
        ids=_numbered(ids),
        tokens=np.frombuffer(all_tokens, np.int32),
        loss_mask=np.frombuffer(all_counted, bool),
        offsets=np.frombuffer(offsets, np.int64),
        truncated=truncated,
    )


def _numbered(ids: bytearray) -> pa.StringArray:
    """The ids, which all end in `-0`, with the number of times a row stood before: `…-1` for its first duplicate."""
    width = 2 * _DIGEST_BYTES + 2
    rows = np.frombuffer(ids, f"S{width}")
    order = np.argsort(rows, kind="stable")
    # Places in that order whose row is that of the place before; few, in most sets.
    windows = ((start, rows[order[start : start + WINDOW + 1]]) for start in range(0, len(rows), WINDOW))
    repeats = np.concatenate([np.flatnonzero(some[1:] == some[:-1]) + start + 1 for start, some in windows])
    begins = np.flatnonzero(np.diff(repeats, prepend=-1) != 1)
    numbers = 1 + np.arange(len(repeats)) - np.repeat(begins, np.diff(begins, append=len(repeats)))
    repeats = order[repeats]
    del order
    ends = np.full(len(rows) + 1, width, np.int32)
    ends[0] = 0
    if len(repeats):
        numbered, begin = bytearray(), 0
        for place, number in sorted(zip(repeats.tolist(), numbers.tolist(), strict=True)):
            digits = str(number).encode()
            numbered += ids[begin : (place + 1) * width - 1] + digits
            begin = (place + 1) * width
            ends[place + 1] += len(digits) - 1
        ids = numbered + ids[begin:]
    np.cumsum(ends, out=ends)
    return pa.StringArray.from_buffers(len(rows), pa.py_buffer(ends), pa.py_buffer(ids))

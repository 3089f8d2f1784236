"""Pack rows that share a prefix into one sequence, so that the prefix is computed once.

Finetuning rows often share a prefix: a system prompt, an instruction, a passage with several questions. A pack is a
token tree (a prefix tree) written as one sequence. Each row is a path from the root of the tree. Each token attends to
its own path only, and has the position that it has in its row. One forward pass over a pack therefore gives the same
losses as one pass over each of its rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..data.encoded_rows import EncodedRows, common_prefix_length


# Attending to this many tokens costs as much as all other work on one token. Measured for SmolLM2-135M on a CPU; the
# number is higher for larger models. It decides when a pack of its own is cheaper for a row than a place in an existing
# pack.
_ATTENDED_TOKENS_PER_TOKEN_COST = 1024
# Maximum number of entries in the attention mask of several rows: packs times width times width. Attention may convert it
# to float32, 134 MB.
_MAX_MASK_ENTRIES = 2**25


@dataclass(frozen=True, eq=False)
class Pack:
    """Rows that are run as one sequence.

    Attributes:
        rows (`np.ndarray` of shape `(rows,)`, int64):
            Indices of the rows.
        prefix (`np.ndarray` of shape `(rows,)`, int64):
            Length of the prefix that each row shares with the row before it, in tokens; 0 for the first row.
        length (`int`):
            Length of the sequence, in tokens.
    """

    rows: np.ndarray
    prefix: np.ndarray
    length: int


@dataclass(frozen=True, eq=False)
class Layout:
    """Packs as the input arrays of one forward pass, and the predictions to read from its output.

    Attributes:
        input_ids, position_ids (`np.ndarray` of shape `(packs, width)`, int64):
            Token ids, and their positions in their rows. Padded on the right.
        token_mask (`np.ndarray` of shape `(packs, width)`, bool):
            `True` for tokens, `False` for padding on the right.
        attention_mask (`np.ndarray` of shape `(packs, width)`, bool):
            `True` for tokens that other tokens attend to: all but padding, of the batch or of a sample.
        tree_mask (`np.ndarray` of shape `(packs, width, width)`, bool, *optional*):
            `tree_mask[pack, i, j]` is `True` if token `i` attends to token `j`. `None` if every pack has a single row:
            causal attention is enough then.
        pack_index, column, target (`np.ndarray` of shape `(predictions,)`, int64):
            The predictions, without duplicates: the token at `[pack_index, column]` predicts the token id `target`.
        prediction_index (`np.ndarray` of shape `(loss_tokens,)`, int64):
            Index of the prediction of each loss token. Rows are in the order of the packs.
    """

    input_ids: np.ndarray
    position_ids: np.ndarray
    token_mask: np.ndarray
    attention_mask: np.ndarray
    tree_mask: np.ndarray | None
    pack_index: np.ndarray
    column: np.ndarray
    target: np.ndarray
    prediction_index: np.ndarray


def needed_lengths(rows: EncodedRows) -> np.ndarray:
    """Return the number of tokens of each row that a model must read: those before the last loss token.

    For padded rows it is all of them. Padding may attend to nothing (on the left, or far from the row's tokens with a
    sliding window), and eager attention then averages over all tokens of the row.

    Returns:
        `np.ndarray` of shape `(samples,)`, int64. It is 0 for rows without loss tokens.
    """
    loss_positions = np.flatnonzero(rows.loss_mask)
    lengths = np.zeros(len(rows), dtype=np.int64)
    scorable = np.flatnonzero(np.diff(rows.loss_offsets))
    lengths[scorable] = loss_positions[rows.loss_offsets[scorable + 1] - 1] - rows.offsets[scorable]
    padded = scorable[rows.is_padded[scorable]]
    lengths[padded] = np.diff(rows.offsets)[padded]
    return lengths


def plan_packs(rows: EncodedRows, longest: int | None) -> list[Pack]:
    """Assign rows to packs, sorted from the longest pack to the shortest. Rows without loss tokens are left out.

    Args:
        rows ([`EncodedRows`]):
            The rows to score.
        longest (`int`, *optional*):
            Maximum length of a pack of several rows, in tokens, and maximum number of their loss tokens, which is larger
            if rows share loss tokens. Rows that share a prefix are put into one pack if that is cheaper than separate
            packs. Padded rows do not share. If `None`, every row is a pack of its own.
    """
    needed = needed_lengths(rows)
    scorable = np.flatnonzero(needed)
    if longest is None:
        packs = _build_single_packs(needed, scorable)
    else:
        sharing = scorable[~rows.is_padded[scorable]]
        packs = _build_shared_packs(rows, needed, sharing[_order_by_prefix(rows, sharing)], longest)
        packs += _build_single_packs(needed, scorable[rows.is_padded[scorable]])
    return sorted(packs, key=lambda pack: pack.length, reverse=True)


def _build_single_packs(needed: np.ndarray, scorable: np.ndarray) -> list[Pack]:
    return [Pack(np.array([row]), np.zeros(1, np.int64), int(needed[row])) for row in scorable]


def _order_by_prefix(rows: EncodedRows, scorable: np.ndarray) -> np.ndarray:
    """Return an order of `scorable` in which rows with a common prefix are adjacent: the order of their token bytes."""
    if len(scorable) == 0:
        return scorable
    token_bytes = pa.Array.from_buffers(
        pa.large_binary(),
        len(rows),
        [None, pa.py_buffer(rows.offsets * rows.tokens.itemsize), pa.py_buffer(np.ascontiguousarray(rows.tokens))],
    )
    if len(scorable) < len(rows):
        token_bytes = token_bytes.take(pa.array(scorable))
    return pc.sort_indices(token_bytes).to_numpy()


def _build_shared_packs(rows: EncodedRows, needed: np.ndarray, order: np.ndarray, longest: int) -> list[Pack]:
    """Build packs greedily: add each row to the current pack if it shares a prefix, fits, and is cheaper there."""
    packs: list[Pack] = []
    members: list[int] = []
    prefixes: list[int] = []
    loss_token_counts = np.diff(rows.loss_offsets)
    used = loss_tokens = 0

    def finish() -> None:
        if members:
            packs.append(Pack(np.array(members), np.array(prefixes), used))

    previous = np.zeros(0, np.int32)
    for row in order.tolist():
        tokens = rows.tokens[rows.offsets[row] : rows.offsets[row] + needed[row]]
        prefix = common_prefix_length(previous, tokens)
        new = len(tokens) - prefix
        fits = used + new <= longest and loss_tokens + loss_token_counts[row] <= longest
        if prefix and fits and mask_fits(used + new, 1) and _cost(used + new) - _cost(used) <= _cost(len(tokens)):
            used += new
        else:
            finish()
            members, prefixes, used, prefix = [], [], len(tokens), 0
            loss_tokens = 0
        loss_tokens += loss_token_counts[row]
        members.append(row)
        prefixes.append(prefix)
        previous = tokens
    finish()
    return packs


def mask_fits(width: int, packs: int) -> bool:
    """Return whether the attention mask of a batch fits into the memory bound."""
    return packs * width * width <= _MAX_MASK_ENTRIES


def _cost(length: int) -> float:
    """Return the cost of a forward pass over a pack, in units of one token without attention."""
    return length + length * length / _ATTENDED_TOKENS_PER_TOKEN_COST


def split_pack(rows: EncodedRows, pack: Pack) -> list[Pack]:
    """Split a pack of several rows into two packs."""
    needed = needed_lengths(rows)
    halves = []
    for half in np.array_split(np.arange(len(pack.rows)), 2):
        members, prefixes = pack.rows[half], pack.prefix[half]
        prefixes[0] = 0
        halves.append(Pack(members, prefixes, int((needed[members] - prefixes).sum())))
    return halves


def lay_out(rows: EncodedRows, packs: list[Pack]) -> Layout:
    """Build the arrays of one forward pass over `packs`."""
    width = max(pack.length for pack in packs)
    input_ids = np.zeros((len(packs), width), dtype=np.int64)
    position_ids = np.zeros((len(packs), width), dtype=np.int64)
    token_mask = np.arange(width) < np.array([[pack.length] for pack in packs])
    attention_mask = token_mask.copy()
    tree_mask = None
    if any(len(pack.rows) > 1 for pack in packs):
        tree_mask = np.zeros((len(packs), width, width), dtype=bool)
        # Padding attends to itself: a token that attends to nothing would give NaN.
        tree_mask[:, range(width), range(width)] = True
    pack_indices: list[np.ndarray] = []
    columns: list[np.ndarray] = []
    targets: list[np.ndarray] = []
    for index, pack in enumerate(packs):
        path, used = np.zeros(0, np.int64), 0  # columns of the current row's tokens
        for row, prefix in zip(pack.rows.tolist(), pack.prefix.tolist(), strict=True):
            tokens, loss_mask = rows.sample(row)
            loss_positions = np.flatnonzero(loss_mask)
            needed = len(tokens) if rows.is_padded[row] else loss_positions[-1]
            new = slice(used, used + needed - prefix)
            used = new.stop
            path = np.concatenate([path[:prefix], np.arange(new.start, new.stop)])
            input_ids[index, new] = tokens[prefix:needed]
            position_ids[index, new] = np.arange(prefix, needed)
            start = rows.offsets[row]
            attention_mask[index, new] = rows.attention_mask[start + prefix : start + needed]
            if tree_mask is not None:
                tree_mask[index, new, path[:prefix]] = True
                tree_mask[index, new, new] = np.tri(needed - prefix, dtype=bool) & attention_mask[index, new]
            pack_indices.append(np.full(len(loss_positions), index))
            columns.append(path[loss_positions - 1])
            targets.append(tokens[loss_positions])
    # Rows of a pack may share a loss token; its prediction is computed once. One number per prediction sorts faster than
    # a column of three.
    target = np.concatenate(targets)
    base = int(target.max()) + 1
    numbers = (np.concatenate(pack_indices) * width + np.concatenate(columns)) * base + target
    numbers, prediction_index = np.unique(numbers, return_inverse=True)
    place, target = np.divmod(numbers, base)
    pack_index, column = np.divmod(place, width)
    return Layout(
        input_ids, position_ids, token_mask, attention_mask, tree_mask, pack_index, column, target, prediction_index
    )

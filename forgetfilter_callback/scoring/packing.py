"""Encoded rows → packs: token sequences in which what several rows begin with stands once.

Finetuning rows repeat themselves: a system prompt, an instruction, a passage with several questions. A pack is a token
tree written out as one sequence: every row is a path in it, and a token sees (attends to) its own path only, at the
position that it has in its row. One forward pass over the pack gives what a pass over each of its rows would give.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..data.encoded_rows import EncodedRows, common_prefix_length


# Seeing this many tokens costs as much as all the rest of the work on one token (measured for SmolLM2-135M on a CPU; larger
# models see more for that). It decides when one more row in a pack is dearer than a pack of its own.
_SEEN_TOKENS_A_TOKEN = 1024


@dataclass(frozen=True)
class Pack:
    """Rows that are run as one sequence.

    Attributes:
        rows (`np.ndarray` of shape `(rows,)`, int64):
            Which rows.
        shared (`np.ndarray` of shape `(rows,)`, int64):
            How many of its first tokens a row has from the row before it; 0 for the first.
        length (`int`):
            Tokens of the sequence.
    """

    rows: np.ndarray
    shared: np.ndarray
    length: int


@dataclass(frozen=True)
class Layout:
    """Packs as the arrays of a forward pass of shape `(packs, width)`, and where the loss of each counted token comes from.

    Attributes:
        input_ids, position_ids (`np.ndarray` of shape `(packs, width)`, int64):
            Tokens, and their positions in their rows. Padded at the right.
        filled (`np.ndarray` of shape `(packs, width)`, bool):
            Whether a place holds a token.
        visible (`np.ndarray` of shape `(packs, width, width)`, bool, *optional*):
            Whether the token at the second index sees the one at the third. None where every pack is one row: plain causal
            attention does there.
        pack, place, target (`np.ndarray` of shape `(predictions,)`, int64):
            What has to be predicted: after the token at (`pack`, `place`), `target`. Each prediction stands once.
        prediction (`np.ndarray` of shape `(counted_tokens,)`, int64):
            Which prediction each counted token of each row is, rows in the order of the packs.
    """

    input_ids: np.ndarray
    position_ids: np.ndarray
    filled: np.ndarray
    visible: np.ndarray | None
    pack: np.ndarray
    place: np.ndarray
    target: np.ndarray
    prediction: np.ndarray


def needed_lengths(rows: EncodedRows) -> np.ndarray:
    """How many tokens of each row a model has to read: those before the last counted one. Shape `(samples,)`, int64."""
    places = np.flatnonzero(rows.loss_mask)
    last = np.zeros(len(rows), dtype=np.int64)
    scorable = np.flatnonzero(np.diff(rows.loss_offsets))
    last[scorable] = places[rows.loss_offsets[scorable + 1] - 1] - rows.offsets[scorable]
    return last


def plan_packs(rows: EncodedRows, longest: int | None) -> list[Pack]:
    """Lays `rows` together, longest pack first. Rows without a counted token are left out.

    Args:
        rows ([`EncodedRows`]):
            What to score.
        longest (`int`, *optional*):
            Rows that begin alike share packs of up to so many tokens, wherever that costs less than packs of their own.
            None: every row is a pack.
    """
    needed = needed_lengths(rows)
    scorable = np.flatnonzero(needed)
    if longest is None:
        packs = [Pack(np.array([row]), np.zeros(1, np.int64), int(needed[row])) for row in scorable]
    else:
        packs = _build_shared_packs(rows, needed, scorable[_in_tree_order(rows, scorable)], longest)
    return sorted(packs, key=lambda pack: pack.length, reverse=True)


def _in_tree_order(rows: EncodedRows, scorable: np.ndarray) -> np.ndarray:
    """An order in which rows that begin alike stand together: that of their bytes."""
    if len(scorable) == 0:
        return scorable
    texts = pa.Array.from_buffers(
        pa.large_binary(),
        len(rows),
        [None, pa.py_buffer(rows.offsets * rows.tokens.itemsize), pa.py_buffer(np.ascontiguousarray(rows.tokens))],
    )
    return pc.sort_indices(texts.take(pa.array(scorable)) if len(scorable) < len(rows) else texts).to_numpy()


def _build_shared_packs(rows: EncodedRows, needed: np.ndarray, order: np.ndarray, longest: int) -> list[Pack]:
    packs: list[Pack] = []
    members: list[int] = []
    shared_counts: list[int] = []
    loss_mask = np.diff(rows.loss_offsets)
    used = predictions = 0

    def finish() -> None:
        if members:
            packs.append(Pack(np.array(members), np.array(shared_counts), used))

    before = np.zeros(0, np.int32)
    for row in order.tolist():
        tokens = rows.tokens[rows.offsets[row] : rows.offsets[row] + needed[row]]
        shared = common_prefix_length(before, tokens)
        new = len(tokens) - shared
        fits = used + new <= longest and predictions + loss_mask[row] <= max_predictions(longest)
        if shared and fits and _cost(used + new) - _cost(used) <= _cost(len(tokens)):
            used += new
        else:
            finish()
            members, shared_counts, used, shared = [], [], len(tokens), 0
            predictions = 0
        predictions += loss_mask[row]
        members.append(row)
        shared_counts.append(shared)
        before = tokens
    finish()
    return packs


def max_predictions(batch_tokens: int) -> int:
    """How many counted tokens a batch of so many tokens may have: their logits are the largest tensors of a pass."""
    return batch_tokens // 4


def _cost(length: int) -> float:
    """Of a forward pass over one pack, in tokens."""
    return length + length * length / _SEEN_TOKENS_A_TOKEN


def split_pack(rows: EncodedRows, pack: Pack) -> list[Pack]:
    """The rows of a pack of several rows as two packs."""
    needed = needed_lengths(rows)
    halves = []
    for part in np.array_split(np.arange(len(pack.rows)), 2):
        members, shared = pack.rows[part], pack.shared[part]
        shared[0] = 0
        halves.append(Pack(members, shared, int((needed[members] - shared).sum())))
    return halves


def lay_out(rows: EncodedRows, packs: list[Pack]) -> Layout:
    """The arrays of one forward pass over `packs`."""
    width = max(members.length for members in packs)
    input_ids = np.zeros((len(packs), width), dtype=np.int64)
    position_ids = np.zeros((len(packs), width), dtype=np.int64)
    filled = np.arange(width) < np.array([[members.length] for members in packs])
    visible = None
    if any(len(members.rows) > 1 for members in packs):
        visible = np.zeros((len(packs), width, width), dtype=bool)
        visible[:, range(width), range(width)] = True  # padding too: a token that sees nothing would be NaN
    packs_of: list[np.ndarray] = []
    places_of: list[np.ndarray] = []
    targets_of: list[np.ndarray] = []
    for index, members in enumerate(packs):
        path, used = np.zeros(0, np.int64), 0
        for row, shared in zip(members.rows.tolist(), members.shared.tolist(), strict=True):
            tokens, loss_mask = rows.sample(row)
            counted_places = np.flatnonzero(loss_mask)
            needed = counted_places[-1]
            new = slice(used, used + needed - shared)
            used = new.stop
            path = np.concatenate([path[:shared], np.arange(new.start, new.stop)])
            input_ids[index, new] = tokens[shared:needed]
            position_ids[index, new] = np.arange(shared, needed)
            if visible is not None:
                visible[index, new, path[:shared]] = True
                visible[index, new, new] = np.tri(needed - shared, dtype=bool)
            packs_of.append(np.full(len(counted_places), index))
            places_of.append(path[counted_places - 1])
            targets_of.append(tokens[counted_places])
    predictions, prediction = np.unique(
        np.stack([np.concatenate(packs_of), np.concatenate(places_of), np.concatenate(targets_of)]),
        axis=1,
        return_inverse=True,
    )
    pack, place, target = predictions
    return Layout(input_ids, position_ids, filled, visible, pack, place, target, prediction.reshape(-1))

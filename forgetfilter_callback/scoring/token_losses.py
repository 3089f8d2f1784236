"""A model and encoded rows → the loss of each counted token. Knows nothing about training.

One forward pass, no gradients, over packs of rows whose shared beginnings stand once (see [`packing`](packing.py)). The
output head runs on counted tokens only: a pre-hook on it keeps just the hidden states that predict them (each row others,
which `logits_to_keep` could not say), so that everything around it (autocast, soft-capping, logit scaling, FSDP, adapters)
stays the model's own business. A model whose head cannot be reached that way is scored from its full logits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm

from ..data.encoded_rows import EncodedRows
from ..errors import ScoringError
from ..utils.distributed import gather_from_all, run_on_all, shard_indices
from ..utils.model_state import is_sharded
from .forward import _score_batch
from .model_support import _check_rows, _longrope_context, can_reuse_prefixes
from .packing import Pack, max_predictions, plan_packs, split_pack
from .scores import Scores


BATCH_TOKENS_ON_CPU, BATCH_TOKENS_ON_ACCELERATORS = 2048, 16384


def token_losses(
    model: nn.Module,
    rows: EncodedRows,
    batch_tokens: int | None = None,
    reuse_prefixes: bool = True,
    disable_tqdm: bool = False,
    description: str = "Scoring",
) -> np.ndarray:
    """The loss of every counted token of `rows` under `model`.

    Call it inside [`model_state.untouched`] when the model is being trained. Values do not depend on `batch_tokens`, on
    `reuse_prefixes`, on the order of the rows or on their padding: relative 1e-5 in float32.

    Args:
        model (`nn.Module`):
            A causal language model as transformers and PEFT make them.
        rows ([`EncodedRows`]):
            What to score.
        batch_tokens (`int`, *optional*):
            Padded tokens a batch; by default 2048 on a CPU, 16384 elsewhere. A batch that does not fit into the device's
            memory is halved.
        reuse_prefixes (`bool`, defaults to `True`):
            Whether rows that begin alike are run as one sequence in which the beginning stands once, where the model can
            (see [`can_reuse_prefixes`]).
        disable_tqdm (`bool`, defaults to `False`):
            Whether to hide the progress bar.
        description (`str`, defaults to `"Scoring"`):
            What stands before the bar.

    Returns:
        `np.ndarray` of shape `(counted_tokens,)`, float32: negative log-likelihoods in nats, in the order of
        `rows.counted_tokens`.

    Raises:
        ScoringError: if a single row does not fit into the device's memory, or is longer than the original context of a
            model with `dynamic` RoPE, which scales it by the longest row seen so far.
    """
    none = np.zeros(0, np.float32)  # of no rows
    windows = window_scores(model, rows, batch_tokens, reuse_prefixes, disable_tqdm, description)
    return np.concatenate([none, *(window.losses for window in windows)])


@torch.no_grad()
def window_scores(
    model: nn.Module,
    rows: EncodedRows,
    batch_tokens: int | None = None,
    reuse_prefixes: bool = True,
    disable_tqdm: bool = False,
    description: str = "Scoring",
    with_states: bool = False,
) -> Iterator[Scores]:
    """[`token_losses`], some 16,000 rows at a time (`rows.windows()`), so that nobody needs to hold them all; with the
    samples' states if they are asked for and the model's output head can be reached.

    In a run of several processes each scores a share of every window, and all of them get all losses: they must go through
    this together, with the same weights.
    """
    if batch_tokens is None:
        on_cpu = next(model.parameters()).device.type == "cpu"
        batch_tokens = BATCH_TOKENS_ON_CPU if on_cpu else BATCH_TOKENS_ON_ACCELERATORS
    total = sum(len(shard_indices(len(window))) for window in rows.windows())
    with tqdm(total=total, desc=description, disable=disable_tqdm, leave=False) as bar:
        for window in rows.windows():
            mine = window.select(shard_indices(len(window)))
            _check_rows(model, window)
            idle = window.select(np.flatnonzero(np.diff(window.loss_offsets))[:1])
            losses, states = zip(
                *run_on_all(partial(_score, model, mine, idle, batch_tokens, reuse_prefixes, bar, with_states)),
                strict=True,
            )
            yield Scores(np.concatenate(losses), _stacked(states) if with_states else None)


def _stacked(states: Sequence[np.ndarray]) -> np.ndarray | None:
    """The states of all processes' shares, in which nothing may count; None if nobody has any."""
    size = max(some.shape[1] for some in states)
    if size == 0:
        return None
    return np.concatenate([some if some.shape[1] else np.zeros((len(some), size), np.float16) for some in states])


def _score(
    model: nn.Module,
    rows: EncodedRows,
    idle: EncodedRows,
    batch_tokens: int,
    reuse_prefixes: bool,
    bar: tqdm,
    with_states: bool,
) -> Scores:
    """Of `rows`. `idle` is a row to go through where other processes that share the weights have more batches."""
    sharded = is_sharded(model)
    states = np.zeros((len(rows), 0), np.float16)
    losses = np.full(rows.loss_offsets[-1], np.nan, dtype=np.float32)
    packs = plan_packs(rows, batch_tokens if reuse_prefixes and can_reuse_prefixes(model, rows) else None)
    offsets = rows.loss_offsets
    todo = _batches(packs, rows, batch_tokens, _longrope_context(model))
    failed: Exception | None = None
    while _has_more(todo, failed) if sharded else todo:
        if not todo:
            _score_batch(model, idle, plan_packs(idle, None), with_states=False)
            continue
        batch = todo.pop()
        try:
            scored = _score_batch(model, rows, batch, with_states)
        except torch.OutOfMemoryError:
            if len(batch) == len(batch[0].rows) == 1:
                # Not the error of torch, which would make `auto_find_batch_size` halve the training batch.
                raise ScoringError(
                    f"A row of {batch[0].length} tokens does not fit into the device's memory beside the training "
                    "state. Lower `max_length`."
                ) from None
            scored = None
        except Exception as error:
            if not sharded:
                raise
            failed = error  # the others must hear of it, in the next round
            continue
        if scored is None:  # outside of `except`, which would keep the failed batch's tensors alive
            torch.cuda.empty_cache()
            todo += _halves(rows, batch)
            continue
        places = np.concatenate(
            [np.arange(offsets[row], offsets[row + 1]) for pack in batch for row in pack.rows.tolist()]
        )
        losses[places] = scored.losses
        if scored.states is not None:
            if not states.shape[1]:
                states = np.zeros((len(rows), scored.states.shape[1]), np.float16)
            states[np.concatenate([pack.rows for pack in batch])] = scored.states
        bar.update(sum(len(pack.rows) for pack in batch))
    return Scores(losses, states)


def _has_more(todo: list[list[Pack]], failed: Exception | None) -> bool:
    """Whether any process has more to do; raises on all of them if one has failed. (A pass that fails in its middle leaves
    the others waiting for its part of the weights, until torch's time limit ends them.)"""
    everyone = gather_from_all((bool(todo), failed))
    for _, error in everyone:
        if error is not None:
            raise error
    return any(has_more for has_more, _ in everyone)


def _batches(
    packs: list[Pack], rows: EncodedRows, batch_tokens: int, longrope_context: float = math.inf
) -> list[list[Pack]]:
    """Packs of like length together, the longest batch last.

    A batch has up to `batch_tokens` padded tokens, and counted ones up to [`max_predictions`]. Once it is a quarter full,
    it takes no pack that would be padded by an eighth. No batch has packs on both sides of `longrope_context`.
    """
    loss_mask = np.diff(rows.loss_offsets)
    batches: list[list[Pack]] = []
    width = predictions = 0
    for pack in packs:
        its_predictions = int(loss_mask[pack.rows].sum())
        if (
            not batches
            or width * (len(batches[-1]) + 1) > batch_tokens
            or predictions + its_predictions > max_predictions(batch_tokens)
            or (width * len(batches[-1]) > batch_tokens // 4 and pack.length < 7 / 8 * width)
            or pack.length <= longrope_context < width
        ):
            batches.append([])
            width, predictions = pack.length, 0
        batches[-1].append(pack)
        predictions += its_predictions
    return batches[::-1]


def _halves(rows: EncodedRows, batch: list[Pack]) -> list[list[Pack]]:
    if len(batch) == 1:
        return [[half] for half in split_pack(rows, batch[0])]
    return [batch[: len(batch) // 2], batch[len(batch) // 2 :]]

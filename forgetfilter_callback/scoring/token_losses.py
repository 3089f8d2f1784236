"""Compute the loss of each loss token (a token that contributes to the training loss) of encoded rows.

Rows that share a prefix are packed into one sequence (see [`packing`](packing.py)). The output head runs on the hidden
states that predict loss tokens only. A forward pre-hook on the head selects them, because `logits_to_keep` cannot
select different positions in each row. The rest of the model runs unchanged, including autocast, soft-capping, logit
scaling, FSDP and adapters. A model whose head cannot be hooked is scored from its full logits.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import chain

import numpy as np
import torch
from accelerate.utils.memory import clear_device_cache
from torch import nn
from tqdm.auto import tqdm

from ..data.encoded_rows import EncodedRows
from ..errors import ScoringError
from ..utils.counted import counted
from ..utils.distributed import gather_from_all, rank_and_world_size, run_on_all, shard_indices
from ..utils.parallelism import leaders_of_processes, shares_weights
from .forward_pass import count_passes, score_batch
from .joint_pass import FailedElsewhereError
from .model_capabilities import can_reuse_prefixes, check_is_causal, check_rows, longrope_context
from .packing import Pack, mask_fits, plan_packs, split_pack
from .scores import Scores


logger = logging.getLogger(__name__)

BATCH_TOKENS_ON_CPU, BATCH_TOKENS_ON_ACCELERATORS = 2048, 16384


def token_losses(
    model: nn.Module,
    rows: EncodedRows,
    batch_tokens: int | None = None,
    reuse_prefixes: bool = True,
    disable_tqdm: bool = False,
    description: str = "Scoring",
) -> np.ndarray:
    """Return the loss of each loss token of `rows` under `model`.

    If the model is being trained, call this function inside [`~model_state.preserve_state`]. Losses do not depend on
    `batch_tokens`, `reuse_prefixes`, the order of the rows or their padding, up to a relative error of 1e-5 in float32.

    Args:
        model (`nn.Module`):
            A causal language model from transformers or PEFT.
        rows ([`EncodedRows`]):
            The rows to score.
        batch_tokens (`int`, *optional*):
            Maximum number of padded tokens per batch. Defaults to 2048 on a CPU and 16384 on other devices. If a batch
            does not fit into the device's memory, the number is halved for all following batches, with a warning.
        reuse_prefixes (`bool`, defaults to `True`):
            Whether to run rows that share a prefix as one sequence that contains the prefix once. It has no effect on
            models that do not support this (see [`can_reuse_prefixes`]).
        disable_tqdm (`bool`, defaults to `False`):
            Whether to hide the progress bar.
        description (`str`, defaults to `"Scoring"`):
            Label of the progress bar.

    Returns:
        `np.ndarray` of shape `(loss_tokens,)`, float32: negative log-likelihoods in nats per token, in the order of
        `rows.loss_tokens`.

    Raises:
        EncodingError: if a token id is outside the model's vocabulary.
        ScoringError: if the model is not a causal language model, if a single row does not fit into the device's
            memory, or if a row reaches the original context of a model with `dynamic` RoPE, which scales such rows by
            the longest row seen so far.
    """
    no_losses = np.zeros(0, np.float32)  # the result for no rows
    windows = window_scores(model, rows, batch_tokens, reuse_prefixes, disable_tqdm, description)
    return np.concatenate([no_losses, *(window.losses for window in windows)])


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
    """Score `rows` in windows (`rows.windows()`), to bound memory.

    In a run of several processes, each process scores a shard of every window, and all processes get all scores of the
    window. They must iterate together and have the same weights. Under tensor parallelism, the processes that hold one
    copy of the weights together score the same shard.

    Args:
        model, rows, batch_tokens, reuse_prefixes, disable_tqdm, description:
            See [`token_losses`].
        with_states (`bool`, defaults to `False`):
            Whether to return the states of the samples too, if the model's output head can be hooked.

    Yields:
        [`Scores`]: the scores of one window.

    Raises:
        EncodingError, ScoringError: see [`token_losses`].
    """
    check_is_causal(model)
    if batch_tokens is None:
        on_cpu = next(model.parameters()).device.type == "cpu"
        batch_tokens = BATCH_TOKENS_ON_CPU if on_cpu else BATCH_TOKENS_ON_ACCELERATORS
    leaders = leaders_of_processes(model)
    total = sum(len(shard_indices(len(window), leaders)) for window in rows.windows())
    with tqdm(total=total, desc=description, disable=disable_tqdm, leave=False) as bar:
        for window in rows.windows():
            check_rows(model, window)
            shard = window.select(shard_indices(len(window), leaders))
            counts = np.diff(window.loss_offsets)
            scorable = np.flatnonzero(counts)
            filler = window.select(scorable[np.argsort(counts[scorable])[:1]])
            score_shard = partial(_score_shard, model, shard, filler, batch_tokens, reuse_prefixes, bar, with_states)
            scored = run_on_all(score_shard)
            shard_losses, shard_states, shard_batch_tokens = zip(
                *(scored[rank] for rank in sorted(set(leaders))), strict=True
            )
            fitting = min(shard_batch_tokens)
            if fitting < batch_tokens:
                if rank_and_world_size()[0] == 0:
                    logger.warning(
                        f"Scoring {counted(batch_tokens, 'token')} at a time does not fit into the device's memory. "
                        f"From here on, batches have at most {counted(fitting, 'token')}. With "
                        f"`ForgetTracker(batch_tokens={fitting})` or `forgetfilter score --batch-tokens {fitting}`, no "
                        "attempt fails."
                    )
                batch_tokens = fitting
            yield Scores(np.concatenate(shard_losses), _concatenate_states(shard_states) if with_states else None)


def _concatenate_states(shard_states: Sequence[np.ndarray]) -> np.ndarray | None:
    """Concatenate the states of all shards. Shards without states (0 columns) get zeros; `None` if no shard has any."""
    size = max(states.shape[1] for states in shard_states)
    if size == 0:
        return None
    return np.concatenate(
        [states if states.shape[1] else np.zeros((len(states), size), np.float16) for states in shard_states]
    )


def _score_shard(
    model: nn.Module,
    rows: EncodedRows,
    filler: EncodedRows,
    batch_tokens: int,
    reuse_prefixes: bool,
    bar: tqdm,
    with_states: bool,
) -> tuple[np.ndarray, np.ndarray, int]:
    """Score this process's shard of a window.

    Args:
        rows ([`EncodedRows`]):
            The shard.
        filler ([`EncodedRows`]):
            The row with the fewest loss tokens, so that no batch needs fewer passes. If processes share weights, one
            without batches runs it while others still have batches.

    Returns:
        The losses and the states of `rows`, as in [`Scores`], and the number of tokens per batch that fits into the
        device's memory. The states have 0 columns if none were computed.
    """
    shared = shares_weights(model)
    states = np.zeros((len(rows), 0), np.float16)
    losses = np.full(rows.loss_offsets[-1], np.nan, dtype=np.float32)
    packs = plan_packs(rows, batch_tokens if reuse_prefixes and can_reuse_prefixes(model, rows) else None)
    offsets = rows.loss_offsets
    batches = _build_batches(packs, rows, batch_tokens, longrope_context(model))
    not_finite: set[int] = set()
    failure: ScoringError | None = None
    while passes := (_passes_of_next_batch(model, rows, batches, failure) if shared else len(batches[:1])):
        batch = batches.pop() if batches else []
        scored: Scores | None = None
        try:
            if batch:
                scored = score_batch(model, rows, batch, with_states, passes)
            else:
                score_batch(model, filler, plan_packs(filler, None), with_states=False, passes=passes)
                continue
        except torch.OutOfMemoryError:
            if len(batch) <= 1 and all(len(pack.rows) == 1 for pack in batch):
                length = batch[0].length if batch else int(np.diff(filler.offsets).max())
                # Not torch's own error, because `auto_find_batch_size` would halve the training batch in response.
                failure = ScoringError(
                    f"A row of {counted(length, 'token')} does not fit into the device's memory in addition to the "
                    "training state. Lower `max_length`."
                )
        except FailedElsewhereError:
            pass
        if failure is not None:
            if not shared:
                raise failure
            continue  # the next `_passes_of_next_batch` raises it on all processes
        if scored is None:  # outside `except`, where the traceback would keep the failed batch's tensors alive
            clear_device_cache()
            batch_tokens = max(1, batch_tokens // 2)
            failed = split_pack(rows, batch[0]) if len(batch) == 1 and len(batch[0].rows) > 1 else batch
            remaining = sorted([*chain(*batches), *failed], key=lambda pack: pack.length, reverse=True)
            batches = _build_batches(remaining, rows, batch_tokens, longrope_context(model))
            continue
        positions = np.concatenate(
            [np.arange(offsets[row], offsets[row + 1]) for pack in batch for row in pack.rows.tolist()]
        )
        losses[positions] = scored.losses
        if scored.states is not None:
            if not states.shape[1]:
                states = np.zeros((len(rows), scored.states.shape[1]), np.float16)
            states[np.concatenate([pack.rows for pack in batch])] = scored.states
        repeated = _not_finite_in_shared_packs(batch, losses, offsets)
        bar.update(sum(len(pack.rows) for pack in batch) - len(repeated))
        not_finite.update(repeated)
        if not batches and not_finite:
            packs = [pack for pack in plan_packs(rows, None) if pack.rows[0] in not_finite]
            batches = _build_batches(packs, rows, batch_tokens, longrope_context(model))
            not_finite.clear()
    return losses, states, batch_tokens


def _not_finite_in_shared_packs(batch: list[Pack], losses: np.ndarray, offsets: np.ndarray) -> list[int]:
    """Return the rows that share a pack and have a loss that is not finite.

    NaN spreads to all rows of a pack, because attention multiplies it by a weight of 0. So these rows must be scored again,
    each alone.
    """
    shared = (row for pack in batch if len(pack.rows) > 1 for row in pack.rows.tolist())
    return [row for row in shared if not np.isfinite(losses[offsets[row] : offsets[row + 1]]).all()]


def _passes_of_next_batch(
    model: nn.Module, rows: EncodedRows, batches: list[list[Pack]], failure: ScoringError | None
) -> int:
    """Return how often all processes must run the output head for their next batches; 0 if no process has batches left.

    Each pass may gather weights, so processes that share weights make equal numbers of passes. If a process has failed,
    its error is raised on all of them.
    """
    reports = gather_from_all((count_passes(model, rows, batches[-1]) if batches else 0, failure))
    for _, error in reports:
        if error is not None:
            raise error
    return max(passes for passes, _ in reports)


def _build_batches(
    packs: list[Pack], rows: EncodedRows, batch_tokens: int, scaling_length: float = math.inf
) -> list[list[Pack]]:
    """Group packs of similar length into batches, with the longest batch last.

    A batch has at most `batch_tokens` padded tokens, as many loss tokens, and an attention mask of bounded size, except
    that a single pack may exceed all three. Once a batch is a quarter full, it accepts no pack that would
    be padded by more than an eighth of its width. No batch has packs on both sides of `scaling_length`, the
    [`longrope_context`] of the model.

    Args:
        packs (`list[Pack]`):
            The packs, sorted from the longest to the shortest.
    """
    loss_token_counts = np.diff(rows.loss_offsets)
    batches: list[list[Pack]] = []
    width = loss_tokens = 0
    for pack in packs:
        pack_loss_tokens = int(loss_token_counts[pack.rows].sum())
        if (
            not batches
            or width * (len(batches[-1]) + 1) > batch_tokens
            or not mask_fits(width, len(batches[-1]) + 1)
            or loss_tokens + pack_loss_tokens > batch_tokens
            or (width * len(batches[-1]) > batch_tokens // 4 and pack.length < 7 / 8 * width)
            or pack.length <= scaling_length < width
        ):
            batches.append([])
            width, loss_tokens = pack.length, 0
        batches[-1].append(pack)
        loss_tokens += pack_loss_tokens
    return batches[::-1]

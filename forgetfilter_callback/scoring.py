"""A model and encoded rows → the loss of each counted token. Knows nothing about training.

One forward pass, no gradients, over packs of rows whose shared beginnings stand once (see [`packing`](packing.py)). The
output head runs on counted tokens only: a pre-hook on it keeps just the hidden states that predict them (each row others,
which `logits_to_keep` could not say), so that everything around it (autocast, soft-capping, logit scaling, FSDP, adapters)
stays the model's own business. A model whose head cannot be reached that way is scored from its full logits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np
import torch
from peft import PeftModel
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedConfig

from .encoding import EncodedRows, EncodingError
from .model_state import is_sharded
from .packing import Layout, Pack, lay_out, most_predictions, needed_lengths, plan_packs, split_pack
from .processes import all_do, gathered, share_of


BATCH_TOKENS_ON_CPU, BATCH_TOKENS_ON_ACCELERATORS = 2048, 16384
# Logits of a big vocabulary are the largest tensors of a forward pass: float32 copies are made in slices of this many.
_LOGITS_IN_FLOAT32 = 64
# Architectures that take positions (and masks) of our own making in all their layers. Nothing in a model says so, and one
# that does not gives wrong losses silently: so each is tested against one row at a time.
_OWN_POSITIONS = {"gemma2", "gpt2", "llama", "mistral", "qwen2"}


# A sample's state has so many numbers; larger hidden states are projected at random, which keeps angles.
STATE_SIZE = 512


class Scores(NamedTuple):
    """What a forward pass says of some rows.

    Attributes:
        losses (`np.ndarray` of shape `(counted_tokens,)`, float32):
            Negative log-likelihoods in nats, in the order of `rows.counted_tokens`.
        states (`np.ndarray` of shape `(samples, size)`, float16, *optional*):
            The hidden states that predict a sample's counted tokens, as the output head gets them: their mean, projected to
            512 numbers where they are larger. Zero where no token counts.
    """

    losses: np.ndarray
    states: np.ndarray | None = None


class ScoringError(RuntimeError):
    """Scoring is not possible on this device."""


def token_losses(
    model: nn.Module,
    rows: EncodedRows,
    batch_tokens: int | None = None,
    share_prefixes: bool = True,
    disable_tqdm: bool = False,
    description: str = "Scoring",
) -> np.ndarray:
    """The loss of every counted token of `rows` under `model`.

    Call it inside [`model_state.untouched`] when the model is being trained. Values do not depend on `batch_tokens`, on
    `share_prefixes`, on the order of the rows or on their padding: relative 1e-5 in float32.

    Args:
        model (`nn.Module`):
            A causal language model as transformers and PEFT make them.
        rows ([`EncodedRows`]):
            What to score.
        batch_tokens (`int`, *optional*):
            Padded tokens a batch; by default 2048 on a CPU, 16384 elsewhere. A batch that does not fit into the device's
            memory is halved.
        share_prefixes (`bool`, defaults to `True`):
            Whether rows that begin alike are run as one sequence in which the beginning stands once, where the model can
            (see [`can_share_prefixes`]).
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
    windows = window_scores(model, rows, batch_tokens, share_prefixes, disable_tqdm, description)
    return np.concatenate([none, *(window.losses for window in windows)])


@torch.no_grad()
def window_scores(
    model: nn.Module,
    rows: EncodedRows,
    batch_tokens: int | None = None,
    share_prefixes: bool = True,
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
    total = sum(len(share_of(len(window))) for window in rows.windows())
    with tqdm(total=total, desc=description, disable=disable_tqdm, leave=False) as bar:
        for window in rows.windows():
            mine = window.select(share_of(len(window)))
            _check_rows(model, window)
            idle = window.select(np.flatnonzero(np.diff(window.counted_offsets))[:1])
            losses, states = zip(
                *all_do(partial(_score, model, mine, idle, batch_tokens, share_prefixes, bar, with_states)), strict=True
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
    share_prefixes: bool,
    bar: tqdm,
    with_states: bool,
) -> Scores:
    """Of `rows`. `idle` is a row to go through where other processes that share the weights have more batches."""
    sharded = is_sharded(model)
    states = np.zeros((len(rows), 0), np.float16)
    losses = np.full(rows.counted_offsets[-1], np.nan, dtype=np.float32)
    packs = plan_packs(rows, batch_tokens if share_prefixes and can_share_prefixes(model, rows) else None)
    offsets = rows.counted_offsets
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
    everyone = gathered((bool(todo), failed))
    for _, error in everyone:
        if error is not None:
            raise error
    return any(has_more for has_more, _ in everyone)


def can_share_prefixes(model: nn.Module, rows: EncodedRows) -> bool:
    """Whether all layers of `model` take an attention mask and positions of our own making, for rows as long as these."""
    config: PreTrainedConfig = model.config
    if not _takes_own_positions(model) or config._attn_implementation not in ("sdpa", "eager"):
        return False
    longest = int(needed_lengths(rows).max(initial=0))
    # Our mask would stand in for a sliding window.
    window = config.to_dict().get("sliding_window")
    return (window is None or longest <= window) and longest <= _longrope_context(model)


def _takes_own_positions(model: nn.Module) -> bool:
    if isinstance(model, PeftModel):
        adapters = [model.peft_config[name] for name in model.active_adapters]
        # Virtual tokens before the row; adapters that are switched on by the first invocation in a sequence.
        if any(each.is_prompt_learning or each.to_dict().get("alora_invocation_tokens") for each in adapters):
            return False
    # Not the text config's type: a model around it (vision) makes masks of its own.
    config: PreTrainedConfig = model.config
    return config.model_type in _OWN_POSITIONS


def _is_padding_free(model: nn.Module) -> bool:
    """Whether rows may stand one after another without padding: flash attention tells them apart by their positions."""
    config: PreTrainedConfig = model.config
    return config._attn_implementation.startswith("flash_attention") and _takes_own_positions(model)


def _rope(model: nn.Module, rope_type: str) -> list[dict[str, Any]]:
    """The RoPE parameters of this type: one set, or one a layer type, or none."""
    parameters = model.config.get_text_config().to_dict().get("rope_parameters") or {}  # type: ignore[union-attr, operator]
    sets = [parameters] if "rope_type" in parameters else [each for each in parameters.values() if each is not None]
    return [each for each in sets if each["rope_type"] == rope_type]


def _longrope_context(model: nn.Module) -> float:
    """The length beyond which LongRoPE scales *all* rows of a batch otherwise; infinite for other models."""
    contexts = (each["original_max_position_embeddings"] for each in _rope(model, "longrope"))
    return min(contexts, default=math.inf) - _virtual_tokens(model)


def _virtual_tokens(model: nn.Module) -> int:
    """How many tokens prompt-learning adapters put before a row."""
    if not isinstance(model, PeftModel) or not model.active_peft_config.is_prompt_learning:
        return 0
    return model.active_peft_config.num_virtual_tokens


def _check_rows(model: nn.Module, rows: EncodedRows) -> None:
    config: PreTrainedConfig = model.config
    vocabulary = config.get_text_config().vocab_size
    if len(rows.tokens) and not 0 <= rows.tokens.min() <= rows.tokens.max() < vocabulary:
        raise EncodingError(
            f"Token ids of the rows run from {rows.tokens.min()} to {rows.tokens.max()}, beyond the model's vocabulary of "
            f"{vocabulary}: they were encoded with another tokenizer."
        )
    _check_rope(model, rows)


def _check_rope(model: nn.Module, rows: EncodedRows) -> None:
    if not _rope(model, "dynamic"):
        return
    config = model.config.get_text_config()  # type: ignore[union-attr, operator]
    context = config.max_position_embeddings - _virtual_tokens(model)
    # At the very context, what the model has seen before still matters.
    too_long = int((needed_lengths(rows) >= context).sum())
    if too_long:
        raise ScoringError(
            f"{too_long} rows reach the {context} tokens beyond which this model's dynamic RoPE scales a row by "
            "the longest one seen so far, so they have no loss of their own. Set `max_length` to that."
        )


def _batches(
    packs: list[Pack], rows: EncodedRows, batch_tokens: int, longrope_context: float = math.inf
) -> list[list[Pack]]:
    """Packs of like length together, the longest batch last.

    A batch has up to `batch_tokens` padded tokens, and counted ones up to [`most_predictions`]. Once it is a quarter full,
    it takes no pack that would be padded by an eighth. No batch has packs on both sides of `longrope_context`.
    """
    counted = np.diff(rows.counted_offsets)
    batches: list[list[Pack]] = []
    width = predictions = 0
    for pack in packs:
        its_predictions = int(counted[pack.rows].sum())
        if (
            not batches
            or width * (len(batches[-1]) + 1) > batch_tokens
            or predictions + its_predictions > most_predictions(batch_tokens)
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


def _score_batch(model: nn.Module, rows: EncodedRows, batch: list[Pack], with_states: bool) -> Scores:
    """Of all rows of `batch`, in its order."""
    layout = lay_out(rows, batch)
    device = next(model.parameters()).device
    logits, hidden = _logits_that_predict(model, layout, device)
    targets = torch.from_numpy(layout.target).to(logits.device)
    losses = torch.cat(
        [
            torch.nn.functional.cross_entropy(some.float(), wanted, reduction="none")
            for some, wanted in zip(logits.split(_LOGITS_IN_FLOAT32), targets.split(_LOGITS_IN_FLOAT32), strict=True)
        ]
    )
    states = None
    if with_states and hidden is not None:
        counts = np.diff(rows.counted_offsets)[np.concatenate([pack.rows for pack in batch])]
        states = _states(hidden.float().cpu().numpy()[layout.prediction], counts)
    return Scores(losses.cpu().numpy()[layout.prediction], states)


def _states(hidden: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The mean of each row's `counts` (at least one) hidden states, projected: shape `(rows, size)`, float16."""
    begins = np.concatenate([[0], np.cumsum(counts)[:-1]])
    means = np.add.reduceat(hidden, begins) / counts[:, None]
    if means.shape[1] > STATE_SIZE:
        means = means @ _projection(means.shape[1])
    return means.astype(np.float16)


@cache
def _projection(size: int) -> np.ndarray:
    """A random matrix, the same each time, of shape `(size, STATE_SIZE)`: lengths and angles stay nearly what they are."""
    normal = np.random.default_rng(0).standard_normal((size, STATE_SIZE), dtype=np.float32)
    return normal / np.float32(math.sqrt(STATE_SIZE))


def _logits_that_predict(
    model: nn.Module, layout: Layout, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Logits of shape `(predictions, vocabulary)`, and what the head made them of, if it can be reached:
    `(predictions, hidden)`."""
    pack, place = layout.pack, layout.place
    inputs = {"input_ids": layout.input_ids}
    if _is_padding_free(model):
        inputs = {"input_ids": layout.input_ids[layout.filled][None]}
        inputs["position_ids"] = layout.position_ids[layout.filled][None]
        place = (np.cumsum(layout.filled) - 1).reshape(layout.filled.shape)[pack, place]
        pack = np.zeros_like(pack)
    elif layout.visible is None:
        inputs["attention_mask"] = layout.filled.astype(np.int64)
    else:
        inputs["attention_mask"] = layout.visible[:, None]
        inputs["position_ids"] = layout.position_ids
    tensors = {name: torch.from_numpy(each).to(device) for name, each in inputs.items()}
    if layout.visible is not None and model.config._attn_implementation == "eager":  # type: ignore[union-attr]
        dtype = next(model.parameters()).dtype  # it adds its mask to the scores
        hidden = ~tensors["attention_mask"]
        tensors["attention_mask"] = torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill(
            hidden, torch.finfo(dtype).min
        )
    packs, places = torch.from_numpy(pack), torch.from_numpy(place)
    width = tensors["input_ids"].shape[1]

    def keep_predicting(hidden: torch.Tensor) -> torch.Tensor:
        # Prompt-learning adapters put virtual tokens before the row, so places count from the right.
        # With layers on several devices (`device_map`) hidden states end on another one than rows begin on.
        return hidden[packs.to(hidden.device), places.to(hidden.device) + hidden.shape[1] - width]

    kept: torch.Tensor | None = None

    def before_the_head(module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        nonlocal kept
        kept = keep_predicting(args[0])
        return kept.unsqueeze(0), *args[1:]

    head: nn.Module | None = model.get_output_embeddings()  # type: ignore[operator] # every PreTrainedModel has it
    hook = head.register_forward_pre_hook(before_the_head) if head is not None else None
    try:
        logits = model(**tensors, use_cache=False).logits
    finally:
        if hook is not None:
            hook.remove()
    return (logits[0], kept) if kept is not None else (keep_predicting(logits), None)

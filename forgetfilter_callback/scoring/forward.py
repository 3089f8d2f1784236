"""TODO"""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import torch
from torch import nn

from ..data.encoded_rows import EncodedRows
from .model_support import _is_padding_free
from .packing import Layout, Pack, lay_out
from .scores import STATE_SIZE, Scores


# Logits of a big vocabulary are the largest tensors of a forward pass: float32 copies are made in slices of this many.
_LOGITS_IN_FLOAT32 = 64


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
        counts = np.diff(rows.loss_offsets)[np.concatenate([pack.rows for pack in batch])]
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

"""One forward pass over a batch of packs: losses of the loss tokens, and states of the samples."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import torch
from torch import nn

from ..data.encoded_rows import EncodedRows
from .model_capabilities import is_padding_free
from .packing import Layout, Pack, lay_out
from .scores import STATE_SIZE, Scores


# Logits are the largest tensors of a forward pass, so they are converted to float32 this many at a time.
_FLOAT32_LOGITS = 64


def score_batch(model: nn.Module, rows: EncodedRows, batch: list[Pack], with_states: bool) -> Scores:
    """Score the rows of `batch`, in its order. States are `None` if the model's output head cannot be reached."""
    layout = lay_out(rows, batch)
    device = next(model.parameters()).device
    logits, hidden = _predicting_logits(model, layout, device)
    targets = torch.from_numpy(layout.target).to(logits.device)
    losses = torch.cat(
        [
            torch.nn.functional.cross_entropy(logits_slice.float(), targets_slice, reduction="none")
            for logits_slice, targets_slice in zip(
                logits.split(_FLOAT32_LOGITS), targets.split(_FLOAT32_LOGITS), strict=True
            )
        ]
    )
    states = None
    if with_states and hidden is not None:
        counts = np.diff(rows.loss_offsets)[np.concatenate([pack.rows for pack in batch])]
        states = _mean_states(hidden.float().cpu().numpy()[layout.prediction_index], counts)
    return Scores(losses.cpu().numpy()[layout.prediction_index], states)


def _mean_states(hidden: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Average consecutive groups of hidden states, and project the means if they are large.

    Args:
        hidden (`np.ndarray` of shape `(counts.sum(), hidden_size)`, float32):
            Hidden states, row after row.
        counts (`np.ndarray` of shape `(rows,)`, int64):
            Number of hidden states of each row, at least one.

    Returns:
        `np.ndarray` of shape `(rows, min(hidden_size, STATE_SIZE))`, float16.
    """
    starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
    means = np.add.reduceat(hidden, starts) / counts[:, None]
    if means.shape[1] > STATE_SIZE:
        means = means @ _projection(means.shape[1])
    return means.astype(np.float16)


@cache
def _projection(size: int) -> np.ndarray:
    """Return a fixed random matrix of shape `(size, STATE_SIZE)` that nearly preserves lengths and angles."""
    normal = np.random.default_rng(0).standard_normal((size, STATE_SIZE), dtype=np.float32)
    return normal / np.float32(math.sqrt(STATE_SIZE))


def _predicting_logits(
    model: nn.Module, layout: Layout, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Run the model, and return the logits of each prediction in `layout`.

    Returns:
        The logits, of shape `(predictions, vocabulary)`, and the hidden states that the output head receives, of shape
        `(predictions, hidden_size)`. The latter are `None` if the output head cannot be reached.
    """
    pack_index, column = layout.pack_index, layout.column
    inputs = {"input_ids": layout.input_ids}
    if is_padding_free(model):
        inputs = {"input_ids": layout.input_ids[layout.token_mask][None]}
        inputs["position_ids"] = layout.position_ids[layout.token_mask][None]
        column = (np.cumsum(layout.token_mask) - 1).reshape(layout.token_mask.shape)[pack_index, column]
        pack_index = np.zeros_like(pack_index)
    elif layout.tree_mask is None:
        inputs["attention_mask"] = layout.token_mask.astype(np.int64)
    else:
        inputs["attention_mask"] = layout.tree_mask[:, None]
        inputs["position_ids"] = layout.position_ids
    tensors = {name: torch.from_numpy(array).to(device) for name, array in inputs.items()}
    if layout.tree_mask is not None and model.config._attn_implementation == "eager":  # type: ignore[union-attr]
        # Eager attention adds the mask to the attention scores, so it needs a float mask instead of a bool one.
        dtype = next(model.parameters()).dtype
        not_attended = ~tensors["attention_mask"]
        tensors["attention_mask"] = torch.zeros(not_attended.shape, dtype=dtype, device=device).masked_fill(
            not_attended, torch.finfo(dtype).min
        )
    pack_indices, columns = torch.from_numpy(pack_index), torch.from_numpy(column)
    width = tensors["input_ids"].shape[1]

    def select_predicting(output: torch.Tensor) -> torch.Tensor:
        # Prompt-learning adapters insert virtual tokens before the row, so columns are aligned to the end of the
        # sequence. Under `device_map`, the output may be on another device than the input.
        return output[pack_indices.to(output.device), columns.to(output.device) + output.shape[1] - width]

    hidden: torch.Tensor | None = None

    def keep_predicting_states(module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        nonlocal hidden
        hidden = select_predicting(args[0])
        return hidden.unsqueeze(0), *args[1:]

    head: nn.Module | None = model.get_output_embeddings()  # type: ignore[operator] # every PreTrainedModel has it
    hook = head.register_forward_pre_hook(keep_predicting_states) if head is not None else None
    try:
        logits = model(**tensors, use_cache=False).logits
    finally:
        if hook is not None:
            hook.remove()
    return (logits[0], hidden) if hidden is not None else (select_predicting(logits), None)

"""A model and encoded rows → the loss of each counted token. Knows nothing about training.

One forward pass, no gradients. The output head runs on counted tokens only: a pre-hook on it keeps just the hidden
states that predict them, so that everything around it (autocast, soft-capping, logit scaling, FSDP, adapters) stays the
model's own business. A model whose head cannot be reached that way is scored from its full logits.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm

from .encoding import EncodedRows


DEFAULT_BATCH_TOKENS = 2048
# Logits of a big vocabulary are the largest tensors of a forward pass: float32 copies are made in slices of this many.
_LOGITS_IN_FLOAT32 = 256


class ScoringError(RuntimeError):
    """Scoring is not possible on this device."""


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Evaluates `model` inside, and leaves it and all random generators exactly as they were.

    Restored are the training mode of every module, its buffers and plain numbers (dynamic RoPE replaces its buffers when
    it sees long rows), and the generators of Python, NumPy and torch (CPU and the model's device).
    """
    modules = list(model.modules())
    buffers = [dict(module._buffers) for module in modules]
    # `training` is one of the plain numbers
    numbers = [{k: v for k, v in vars(module).items() if isinstance(v, int | float)} for module in modules]
    python_state, numpy_state = random.getstate(), np.random.get_state()
    devices = [device.index for device in {p.device for p in model.parameters()} if device.type == "cuda"]
    try:
        with torch.random.fork_rng(devices=devices):
            model.eval()
            yield
    finally:
        for module, module_buffers, module_numbers in zip(modules, buffers, numbers, strict=True):
            module._buffers.update(module_buffers)
            vars(module).update(module_numbers)
        random.setstate(python_state)
        np.random.set_state(numpy_state)


@torch.no_grad()
def token_losses(
    model: nn.Module,
    rows: EncodedRows,
    batch_tokens: int = DEFAULT_BATCH_TOKENS,
    disable_tqdm: bool = False,
    description: str = "Scoring",
) -> np.ndarray:
    """The loss of every counted token of `rows` under `model`.

    Call it inside [`untouched`] when the model is being trained. Values do not depend on `batch_tokens`, on the order of
    the rows or on their padding: relative 1e-5 in float32.

    Args:
        model (`nn.Module`):
            A causal language model as transformers and PEFT make them.
        rows ([`EncodedRows`]):
            What to score.
        batch_tokens (`int`, defaults to 2048):
            Padded tokens a batch. A batch that does not fit into the device's memory is halved.
        disable_tqdm (`bool`, defaults to `False`):
            Whether to hide the progress bar.
        description (`str`, defaults to `"Scoring"`):
            What stands before the bar.

    Returns:
        `np.ndarray` of shape `(counted_tokens,)`, float32: negative log-likelihoods in nats, in the order of
        `rows.counted_tokens`.
    """
    offsets = rows.counted_offsets
    losses = np.full(offsets[-1], np.nan, dtype=np.float32)
    with tqdm(total=len(rows), desc=description, disable=disable_tqdm, leave=False) as bar:
        todo = _batches(rows, batch_tokens)
        while todo:
            batch = todo.pop()
            try:
                batch_losses = _score_batch(model, rows, batch)
            except torch.OutOfMemoryError:
                if len(batch) == 1:
                    # Not the error of torch, which would make `auto_find_batch_size` halve the training batch.
                    raise ScoringError(
                        f"A row of {len(rows.sample(batch[0])[0])} tokens does not fit into the device's memory beside the "
                        "training state. Lower `max_length`."
                    ) from None
                batch_losses = None
            if batch_losses is None:  # outside of `except`, which would keep the failed batch's tensors alive
                torch.cuda.empty_cache()
                todo += [batch[: len(batch) // 2], batch[len(batch) // 2 :]]
                continue
            for index, sample_losses in zip(batch, batch_losses, strict=True):
                losses[offsets[index] : offsets[index + 1]] = sample_losses
            bar.update(len(batch))
    return losses


def _batches(rows: EncodedRows, batch_tokens: int) -> list[np.ndarray]:
    """Row indices in batches of about `batch_tokens` padded tokens, rows of like length together, shortest first."""
    lengths = np.diff(rows.offsets)
    scorable = np.flatnonzero(np.diff(rows.counted_offsets))
    order = scorable[np.argsort(lengths[scorable], kind="stable")]
    batches, start = [], 0
    for end in range(1, len(order) + 1):
        if end == len(order) or lengths[order[end]] * (end + 1 - start) > batch_tokens:
            batches.append(order[start:end])
            start = end
    return batches


def _score_batch(model: nn.Module, rows: EncodedRows, batch: np.ndarray) -> list[np.ndarray]:
    """Losses of the counted tokens of each row of `batch`."""
    samples = [rows.sample(index) for index in batch]
    width = max(len(tokens) for tokens, _ in samples)
    input_ids = np.zeros((len(samples), width), dtype=np.int64)
    attention_mask = np.zeros((len(samples), width), dtype=np.int64)
    counted = np.zeros((len(samples), width), dtype=bool)
    for place, (tokens, sample_counted) in enumerate(samples):
        input_ids[place, : len(tokens)] = tokens
        attention_mask[place, : len(tokens)] = 1
        counted[place, : len(tokens)] = sample_counted

    device = next(model.parameters()).device
    row, column = (torch.from_numpy(axis).to(device) for axis in np.nonzero(counted))
    targets = torch.from_numpy(input_ids[counted]).to(device)
    logits = _logits_that_predict(
        model, torch.from_numpy(input_ids).to(device), torch.from_numpy(attention_mask).to(device), row, column
    )
    losses = torch.cat(
        [
            cross_entropy(some_logits.float(), some_targets, reduction="none")
            for some_logits, some_targets in zip(
                logits.split(_LOGITS_IN_FLOAT32), targets.split(_LOGITS_IN_FLOAT32), strict=True
            )
        ]
    )
    return np.split(losses.cpu().numpy(), np.cumsum(counted.sum(1))[:-1])


def _logits_that_predict(
    model: nn.Module, input_ids: torch.Tensor, attention_mask: torch.Tensor, row: torch.Tensor, column: torch.Tensor
) -> torch.Tensor:
    """Logits of shape `(len(row), vocabulary)` that predict the tokens at (`row`, `column`) of `input_ids`."""

    def places(length: int) -> torch.Tensor:
        # A token is predicted one place before it. Prompt-learning adapters put virtual tokens before the row, so places
        # count from the right.
        return column - 1 + length - input_ids.shape[1]

    def keep_counted(module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        hidden, *others = args
        return hidden[row, places(hidden.shape[1])].unsqueeze(0), *others

    head: nn.Module | None = model.get_output_embeddings()  # type: ignore[operator] # every PreTrainedModel has it
    hook = head.register_forward_pre_hook(keep_counted) if head is not None else None
    try:
        logits = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
    finally:
        if hook is not None:
            hook.remove()
    if logits.shape[:2] == (1, len(row)) and hook is not None:
        return logits[0]
    return logits[row, places(logits.shape[1])]

"""A model and encoded rows → the loss of each counted token. Knows nothing about training.

One forward pass, no gradients, over packs of rows whose shared beginnings stand once (see [`packing`](packing.py)). The
output head runs on counted tokens only: a pre-hook on it keeps just the hidden states that predict them (each row others,
which `logits_to_keep` could not say), so that everything around it (autocast, soft-capping, logit scaling, FSDP, adapters)
stays the model's own business. A model whose head cannot be reached that way is scored from its full logits.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from peft import PeftModel
from torch import nn
from tqdm.auto import tqdm

from .encoding import EncodedRows
from .packing import Layout, Pack, lay_out, plan_packs, split_pack


BATCH_TOKENS_ON_CPU, BATCH_TOKENS_ON_ACCELERATORS = 2048, 16384
# Logits of a big vocabulary are the largest tensors of a forward pass: float32 copies are made in slices of this many.
_LOGITS_IN_FLOAT32 = 64
_SHARING_ARCHITECTURES = {"gemma2", "gpt2", "llama", "mistral", "qwen2"}


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
    numbers = [
        {k: v for k, v in vars(module).items() if isinstance(v, int | float | torch.Tensor)} for module in modules
    ]
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
    batch_tokens: int | None = None,
    share_prefixes: bool = True,
    disable_tqdm: bool = False,
    description: str = "Scoring",
) -> np.ndarray:
    """The loss of every counted token of `rows` under `model`.

    Call it inside [`untouched`] when the model is being trained. Values do not depend on `batch_tokens`, on
    `share_prefixes`, on the order of the rows or on their padding: relative 1e-5 in float32. (`dynamic` and `longrope` RoPE
    are exceptions beyond the original context: their scale follows the longest row of a batch.)

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
        ScoringError: if a single row does not fit into the device's memory.
    """
    if batch_tokens is None:
        on_cpu = next(model.parameters()).device.type == "cpu"
        batch_tokens = BATCH_TOKENS_ON_CPU if on_cpu else BATCH_TOKENS_ON_ACCELERATORS
    packs = plan_packs(rows, batch_tokens if share_prefixes and can_share_prefixes(model, rows) else None)
    offsets = rows.counted_offsets
    losses = np.full(offsets[-1], np.nan, dtype=np.float32)
    todo = _batches(packs, rows, batch_tokens)
    with tqdm(total=len(rows), desc=description, disable=disable_tqdm, leave=False) as bar:
        while todo:
            batch = todo.pop()
            try:
                batch_losses = _score_batch(model, rows, batch)
            except torch.OutOfMemoryError:
                if len(batch) == len(batch[0].rows) == 1:
                    # Not the error of torch, which would make `auto_find_batch_size` halve the training batch.
                    raise ScoringError(
                        f"A row of {batch[0].length} tokens does not fit into the device's memory beside the training "
                        "state. Lower `max_length`."
                    ) from None
                batch_losses = None
            if batch_losses is None:  # outside of `except`, which would keep the failed batch's tensors alive
                torch.cuda.empty_cache()
                todo += _halves(rows, batch)
                continue
            places = np.concatenate(
                [np.arange(offsets[row], offsets[row + 1]) for pack in batch for row in pack.rows.tolist()]
            )
            losses[places] = batch_losses
            bar.update(sum(len(pack.rows) for pack in batch))
    return losses


def can_share_prefixes(model: nn.Module, rows: EncodedRows) -> bool:
    """Whether `model` takes an attention mask and positions of our own making in all its layers, for rows as long as these.

    Nothing in a model says so, and one that does not gives wrong losses silently: so it is a list of architectures, each
    tested against one row at a time.
    """
    if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
        return False  # virtual tokens before the row
    config = model.config.get_text_config()  # type: ignore[union-attr, operator]
    if config.model_type not in _SHARING_ARCHITECTURES or config._attn_implementation not in ("sdpa", "eager"):
        return False
    # Our mask would stand in for a sliding window.
    window = config.to_dict().get("sliding_window")
    return window is None or int(np.diff(rows.offsets).max()) <= window


def _batches(packs: list[Pack], rows: EncodedRows, batch_tokens: int) -> list[list[Pack]]:
    """Packs of like length together, the longest batch last.

    A batch has up to `batch_tokens` padded tokens, and counted ones up to a quarter of that: their logits over the
    vocabulary are the largest tensors of the pass. Once it is a quarter full, it takes no pack that would be padded by an
    eighth.
    """
    counted = np.diff(rows.counted_offsets)
    batches: list[list[Pack]] = []
    width = predictions = 0
    for pack in packs:
        its_predictions = int(counted[pack.rows].sum())
        full = not batches or width * (len(batches[-1]) + 1) > batch_tokens
        many_predictions = predictions + its_predictions > batch_tokens // 4
        if full or many_predictions or (width * len(batches[-1]) > batch_tokens // 4 and pack.length < 7 / 8 * width):
            batches.append([])
            width, predictions = pack.length, 0
        batches[-1].append(pack)
        predictions += its_predictions
    return batches[::-1]


def _halves(rows: EncodedRows, batch: list[Pack]) -> list[list[Pack]]:
    if len(batch) == 1:
        return [[half] for half in split_pack(rows, batch[0])]
    return [batch[: len(batch) // 2], batch[len(batch) // 2 :]]


def _score_batch(model: nn.Module, rows: EncodedRows, batch: list[Pack]) -> np.ndarray:
    """Losses of the counted tokens of all rows of `batch`, in its order: shape `(counted_tokens,)`, float32."""
    layout = lay_out(rows, batch)
    device = next(model.parameters()).device
    logits = _logits_that_predict(model, layout, device)
    targets = torch.from_numpy(layout.target).to(device)
    losses = torch.cat(
        [
            # log Σ exp(logit - logit of the target): exact for tokens of a probability near 1 too
            torch.logsumexp(some.float() - some.gather(1, wanted[:, None]).float(), dim=1)
            for some, wanted in zip(logits.split(_LOGITS_IN_FLOAT32), targets.split(_LOGITS_IN_FLOAT32), strict=True)
        ]
    )
    return losses.cpu().numpy()[layout.prediction]


def _logits_that_predict(model: nn.Module, layout: Layout, device: torch.device) -> torch.Tensor:
    """Logits of shape `(predictions, vocabulary)`."""
    pack, place, input_ids = (
        torch.from_numpy(array).to(device) for array in (layout.pack, layout.place, layout.input_ids)
    )
    inputs = {"input_ids": input_ids}
    if layout.visible is None:
        inputs["attention_mask"] = torch.from_numpy(layout.filled.astype(np.int64)).to(device)
    else:
        visible = torch.from_numpy(layout.visible).to(device)[:, None]
        if model.config._attn_implementation == "eager":  # type: ignore[union-attr] # adds its mask to the scores
            dtype = next(model.parameters()).dtype
            visible = torch.zeros(visible.shape, dtype=dtype, device=device).masked_fill(
                ~visible, torch.finfo(dtype).min
            )
        inputs["attention_mask"] = visible
        inputs["position_ids"] = torch.from_numpy(layout.position_ids).to(device)

    def places(length: int) -> torch.Tensor:
        # Prompt-learning adapters put virtual tokens before the row, so places count from the right.
        return place + length - input_ids.shape[1]

    kept = False

    def keep_predicting(module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        nonlocal kept
        kept = True
        hidden, *others = args
        return hidden[pack, places(hidden.shape[1])].unsqueeze(0), *others

    head: nn.Module | None = model.get_output_embeddings()  # type: ignore[operator] # every PreTrainedModel has it
    hook = head.register_forward_pre_hook(keep_predicting) if head is not None else None
    try:
        logits = model(**inputs, use_cache=False).logits
    finally:
        if hook is not None:
            hook.remove()
    return logits[0] if kept else logits[pack, places(logits.shape[1])]

"""One forward pass over a batch of packs: losses of the loss tokens, and states of the samples.

Logits are the largest tensors of a forward pass, so a batch's predictions go through the output head in slices of a
bounded size. The trunk (the model without its output head) runs once. For each further slice, the model's own `forward`
runs again on the trunk's stored output, so that scaling and soft-capping of the logits stay the model's own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from typing import Any, cast

import numpy as np
import torch
from peft import PeftModel
from scipy.sparse import csc_array
from torch import nn
from transformers import PreTrainedConfig

from ..data.encoded_rows import EncodedRows
from ..errors import ScoringError
from ..utils.parallelism import unwrapped
from .joint_pass import run_jointly
from .model_capabilities import is_padding_free, takes_use_cache
from .packing import Layout, Pack, lay_out
from .scores import STATE_SIZE, Scores


# Maximum number of logits in one pass through the output head: 192 predictions with a vocabulary of 128k tokens. A model
# that soft-caps its logits in float32 holds two tensors of this size, 200 MB.
_LOGITS_PER_PASS = 3 * 2**23
# Maximum number of logits that are converted to float32 at once. On a CPU they stay in its cache. On an accelerator, few
# calls matter more; the logits take 34 MB there, and their log-probabilities as much.
_FLOAT32_LOGITS_ON_CPU, _FLOAT32_LOGITS_ON_ACCELERATORS = 2**19, 2**23


def score_batch(model: nn.Module, rows: EncodedRows, batch: list[Pack], with_states: bool, passes: int = 1) -> Scores:
    """Score the rows of `batch`, in its order.

    Args:
        model, rows:
            See [`~token_losses.token_losses`].
        batch (`list[Pack]`):
            The packs to run as one batch.
        with_states (`bool`):
            Whether to return states. They are `None` if the model's output head cannot be reached.
        passes (`int`, defaults to 1):
            Minimum number of passes through the output head. Processes that share weights need equal numbers.

    Returns:
        [`Scores`]: the scores of the rows.

    Raises:
        torch.OutOfMemoryError: if the batch does not fit into the device's memory.
        FailedElsewhereError, BrokenPassError: see [`run_jointly`].
    """
    layout = lay_out(rows, batch)
    forward = _ForwardPass(model, layout)
    slices = _prediction_slices(len(layout.target), forward.predictions_per_pass)
    averaging = _averaging_matrix(rows, batch, layout) if with_states else None
    losses: list[torch.Tensor] = []  # they stay on the device, because a copy would wait for each slice
    means: torch.Tensor | None = None
    for index, selected in enumerate(slices):
        slice_losses, hidden = run_jointly(model, partial(forward.run, selected), can_fail=index == 0)
        losses.append(slice_losses)
        if averaging is not None and hidden is not None:
            weights = torch.from_numpy(averaging[:, selected].toarray()).to(hidden.device)
            part = _weighted_sums(weights, hidden.float())
            means = part if means is None else means + part
    for _ in range(passes - len(slices)):
        run_jointly(model, partial(forward.run, slices[-1]), can_fail=False)
    states = _states(means.cpu().numpy()) if means is not None else None
    return Scores(torch.cat(losses).cpu().numpy()[layout.prediction_index], states)


def count_passes(model: nn.Module, rows: EncodedRows, batch: list[Pack]) -> int:
    """Return the maximum number of passes through the output head that [`score_batch`] needs for `batch`."""
    predictions = int(np.diff(rows.loss_offsets)[np.concatenate([pack.rows for pack in batch])].sum())
    return len(_prediction_slices(predictions, _predictions_per_pass(model)))


def _predictions_per_pass(model: nn.Module) -> int:
    return max(1, _LOGITS_PER_PASS // cast(PreTrainedConfig, model.config).get_text_config().vocab_size)


def _prediction_slices(predictions: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, predictions)) for start in range(0, predictions, size)]


def _averaging_matrix(rows: EncodedRows, batch: list[Pack], layout: Layout) -> csc_array:
    """Return a float32 matrix of shape `(rows of the batch, predictions)` that averages the predictions of each row."""
    counts = np.diff(rows.loss_offsets)[np.concatenate([pack.rows for pack in batch])]
    row_indices = np.repeat(np.arange(len(counts)), counts)
    values = (1 / counts).astype(np.float32)[row_indices]
    return csc_array((values, (row_indices, layout.prediction_index)), shape=(len(counts), len(layout.target)))


def _weighted_sums(weights: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """Return `weights @ hidden`, where hidden states that are not finite have no effect on rows with weight 0 for them."""
    not_finite = ~hidden.isfinite().all(dim=1)
    affected = weights @ not_finite.float() > 0
    return (weights @ hidden.masked_fill(not_finite[:, None], 0)).masked_fill(affected[:, None], math.nan)


def _states(means: np.ndarray) -> np.ndarray:
    """Project mean hidden states, of shape `(rows, hidden_size)`, to at most `STATE_SIZE` dimensions in float16."""
    if means.shape[1] > STATE_SIZE:
        means = means @ _projection(means.shape[1])
    return means.astype(np.float16)


@cache
def _projection(size: int) -> np.ndarray:
    """Return a fixed random matrix of shape `(size, STATE_SIZE)` that nearly preserves lengths and angles."""
    normal = np.random.default_rng(0).standard_normal((size, STATE_SIZE), dtype=np.float32)
    return normal / np.float32(math.sqrt(STATE_SIZE))


class _ForwardPass:
    """A batch's way through a model: once through the trunk, and in slices of its predictions through the output head.

    Attributes:
        predictions_per_pass (`int`):
            Maximum number of predictions per slice. It is the number of all predictions if the output head cannot be
            reached: the model then returns all logits at once.
    """

    def __init__(self, model: nn.Module, layout: Layout) -> None:
        self._model = model
        self._inputs, pack_index, column = _model_inputs(model, layout)
        self._largest_target = int(layout.target.max(initial=0))
        self._options = {"use_cache": False} if takes_use_cache(model) else {}
        device = self._inputs["input_ids"].device
        self._pack_index, self._column, self._targets = (
            torch.from_numpy(array).to(device) for array in (pack_index, column, layout.target)
        )
        self._head: nn.Module | None = model.get_output_embeddings()  # type: ignore[operator] # every PreTrainedModel has it
        self._trunk = _trunk(model, self._head) if self._head is not None else None
        self._trunk_output: object = None
        self.predictions_per_pass = _predictions_per_pass(model) if self._head is not None else len(layout.target)

    def run(self, selected: slice) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Run the model for a slice of the predictions.

        Returns:
            The losses, of shape `(predictions,)` and dtype float32, and the hidden states that the output head receives,
            of shape `(predictions, hidden_size)`. The latter are `None` if the output head cannot be reached.
        """
        hidden: torch.Tensor | None = None

        def select_states(module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            nonlocal hidden
            hidden = self._select(args[0], selected)
            return hidden.unsqueeze(0), *args[1:]

        with ExitStack() as stack:
            if self._head is not None:
                stack.callback(self._head.register_forward_pre_hook(select_states).remove)
            if self._trunk is not None and self._trunk_output is None:
                stack.callback(self._trunk.register_forward_hook(self._store_trunk_output).remove)
            elif self._trunk is not None:
                stack.enter_context(_returning(self._trunk, self._trunk_output))
            outputs = self._model(**self._inputs, **self._options)
        logits = _logits_of(outputs)
        self._check(logits)
        logits = logits[0] if hidden is not None else self._select(logits, selected)
        targets = self._targets[selected].to(logits.device)
        converted = _FLOAT32_LOGITS_ON_CPU if logits.device.type == "cpu" else _FLOAT32_LOGITS_ON_ACCELERATORS
        size = max(1, converted // logits.shape[1])
        losses = [
            nn.functional.cross_entropy(logits_slice.float(), targets_slice, reduction="none")
            for logits_slice, targets_slice in zip(logits.split(size), targets.split(size), strict=True)
        ]
        return torch.cat(losses), hidden

    def _check(self, logits: torch.Tensor) -> None:
        """Check that there are logits for each position and token, and not for classes.

        Raises:
            ScoringError: if not.
        """
        if logits.ndim != 3 or logits.shape[2] <= self._largest_target:
            raise ScoringError(
                f"{type(unwrapped(self._model)).__name__} returns logits of the shape {tuple(logits.shape)}, but a causal "
                "language model returns one for each position and each token of the vocabulary. Load the model with "
                "`AutoModelForCausalLM`."
            )

    def _select(self, output: torch.Tensor, selected: slice) -> torch.Tensor:
        # Prompt-learning adapters insert virtual tokens before the row, so columns are aligned to the end of the
        # sequence. Under `device_map`, the output may be on another device than the input.
        pack_index, column = self._pack_index[selected].to(output.device), self._column[selected].to(output.device)
        return output[pack_index, column + output.shape[1] - self._inputs["input_ids"].shape[1]]

    def _store_trunk_output(self, module: nn.Module, args: object, output: object) -> None:
        self._trunk_output = output


def _logits_of(outputs: Any) -> torch.Tensor:
    """The logits of a model that was called without labels. Custom models return a dict, a tuple or an object."""
    if isinstance(outputs, Mapping):
        return outputs["logits"]
    return outputs[0] if type(outputs) is tuple else outputs.logits


def _trunk(model: nn.Module, head: nn.Module) -> nn.Module | None:
    """Return the part of `model` that runs before `head`, or `None` if there is no such module.

    Without it, or if `model` does not call it, the whole model runs again for each slice of predictions.
    """
    model = unwrapped(model)
    whole = model.get_base_model() if isinstance(model, PeftModel) else model
    trunk = cast(nn.Module, whole.base_model)
    return trunk if head not in trunk.modules() else None


@contextmanager
def _returning(module: nn.Module, output: object) -> Iterator[None]:
    """Let `module` return `output` without running."""
    attributes = vars(module)
    replaced = {"forward": attributes["forward"]} if "forward" in attributes else {}
    attributes["forward"] = lambda *args, **kwargs: output
    try:
        yield
    finally:
        del attributes["forward"]
        attributes.update(replaced)


def _model_inputs(model: nn.Module, layout: Layout) -> tuple[dict[str, torch.Tensor], np.ndarray, np.ndarray]:
    """Return the arguments of the model's `forward`, and the row and the column of each prediction in its output."""
    pack_index, column = layout.pack_index, layout.column
    inputs = {"input_ids": layout.input_ids}
    has_padded_rows = not np.array_equal(layout.attention_mask, layout.token_mask)
    if is_padding_free(model) and not has_padded_rows:
        inputs = {"input_ids": layout.input_ids[layout.token_mask][None]}
        inputs["position_ids"] = layout.position_ids[layout.token_mask][None]
        column = (np.cumsum(layout.token_mask) - 1).reshape(layout.token_mask.shape)[pack_index, column]
        pack_index = np.zeros_like(pack_index)
    elif layout.tree_mask is None:
        inputs["attention_mask"] = layout.attention_mask.astype(np.int64)
    else:
        inputs["attention_mask"] = layout.tree_mask[:, None]
        inputs["position_ids"] = layout.position_ids
    device = next(model.parameters()).device
    tensors = {name: torch.from_numpy(array).to(device) for name, array in inputs.items()}
    if layout.tree_mask is not None and model.config._attn_implementation == "eager":  # type: ignore[union-attr]
        # Eager attention adds the mask to the attention scores, so it needs a float mask instead of a bool one.
        dtype = next(model.parameters()).dtype
        not_attended = ~tensors["attention_mask"]
        tensors["attention_mask"] = torch.zeros(not_attended.shape, dtype=dtype, device=device).masked_fill(
            not_attended, torch.finfo(dtype).min
        )
    return tensors, pack_index, column

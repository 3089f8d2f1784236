"""[`RowWeightsMixin`]: train with a weight per row."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import pyarrow as pa
import torch
from accelerate.utils import has_compiled_regions, is_compiled_module
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..data.encode_collated import sample_of_batch
from ..data.encode_each import encode_each
from ..data.encoded_rows import content_hash
from ..errors import ForgetFilterError


_WEIGHTS = "forgetfilter_weights"  # a key of each training batch


class WeighingCollator:
    """Adds the weights of the rows to each batch, as `forgetfilter_weights` of shape `(rows,)`, float32.

    Rows are found by what they are trained on, so the dataset, its order and its columns stay as they are.

    Args:
        collate (`Callable`):
            The collator of the trainer.
        ids (`pa.StringArray` of length `samples`):
            Sample ids. Null ids have no weight.
        weights (`np.ndarray` of shape `(samples,)`):
            Their weights. Rows that are trained on the same tokens get the lowest of their weights.
        max_length (`int`, *optional*), keep_end (`bool`):
            How the rows were truncated for their ids, as in [`encode_each`].
    """

    def __init__(
        self,
        collate: Callable[[list[Any]], Any],
        ids: pa.StringArray,
        weights: Any,
        max_length: int | None,
        keep_end: bool = False,
    ):
        self.collate, self.max_length, self.keep_end = collate, max_length, keep_end
        self.weights: dict[str, float] = {}
        for id_, weight in zip(ids.to_pylist(), weights.tolist(), strict=True):
            if id_ is not None:
                key = content_hash(id_)
                self.weights[key] = min(weight, self.weights.get(key, weight))

    def __call__(self, rows: list[Any]) -> Any:
        # The ids were made from rows that were collated alone. In a batch, the padding of a row depends on the other rows.
        encoded = encode_each(
            rows,
            lambda row: sample_of_batch(self.collate([copy.deepcopy(row)])),
            len(rows),
            self.max_length,
            disable_tqdm=True,
            keep_end=self.keep_end,
        )
        keys = [content_hash(id_) for id_ in encoded.ids.to_pylist()]
        if not self.weights.keys() >= set(keys):
            raise ForgetFilterError(
                "A row of a training batch has no weight, because it is not the row that was read before training. Use a "
                "dataset and a collator that return the same row each time."
            )
        batch = self.collate(rows)
        batch[_WEIGHTS] = torch.tensor([self.weights[key] for key in keys])
        return batch


class RowWeightsCheck(TrainerCallback):
    """Ends training if a step has not used the weights of its rows.

    Attributes:
        is_used (`bool`):
            Whether the current step has used them. [`RowWeightsMixin`] says so.
    """

    def __init__(self) -> None:
        self.is_used = False

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not self.is_used:
            raise ForgetFilterError(
                "The weights of the rows were not used, because the trainer's `training_step` does not call "
                "`super().training_step`. Call it there, or override `compute_loss` instead."
            )
        self.is_used = False


class RowWeightsMixin(Trainer):
    """A `Trainer` that multiplies the loss of each token by the weight of its row.

    The loss is divided by what `Trainer` divides it by: the number of tokens, not the sum of the weights. Divided by the sum
    of the weights, an unsafe row that is alone in a batch would be trained on as if its weight were 1.

    `Trainer` computes the loss in many ways: in the model, with label smoothing, with `compute_loss_func`, or in its
    subclasses. They all compute it from the logits or the log-probabilities of the tokens. Each token belongs to one row.
    Multiplying the gradient there is the same as multiplying the loss of each token, and leaves the rest of `Trainer` as it
    is: with weights of 1, training is the same bit for bit. The losses that are logged are not weighted.
    """

    _weighing: Callable[[Callable[[list[Any]], Any]], WeighingCollator] | None = None
    _weights_check: RowWeightsCheck | None = None

    def get_train_dataloader(self) -> DataLoader:
        if self._weighing is None:
            return super().get_train_dataloader()
        given = self.data_collator
        self.data_collator = self._weighing(given)
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = given

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        weights = inputs.pop(_WEIGHTS, None)
        if weights is None and self._weighing is not None:
            raise ForgetFilterError(
                "A training batch has no weights of its rows. `get_train_dataloader` must use `self.data_collator`."
            )
        if weights is None:
            return super().training_step(model, inputs, *args, **kwargs)
        if self._weights_check is not None:
            self._weights_check.is_used = True
        # Around the whole step, so that it does not matter which class computes the loss.
        with weighted_gradients(cast(PreTrainedModel, self.accelerator.unwrap_model(model)), weights):
            return super().training_step(model, inputs, *args, **kwargs)

    def check_weights_are_possible(self) -> None:
        """Refuse setups whose gradients cannot be weighted. In training, refuse steps that do not use the weights.

        Raises:
            ForgetFilterError: if the model is compiled or replicated.
        """
        model = cast(nn.Module, self.model)
        if self.args.torch_compile or is_compiled_module(model) or has_compiled_regions(model):
            raise ForgetFilterError(
                "`weights` needs a model that is not compiled, because it would be compiled again at each step. Train "
                "without `torch.compile`."
            )
        if self.args.n_gpu > 1:
            raise ForgetFilterError(
                "`weights` does not work with `torch.nn.DataParallel`. Start the program with `torchrun`, or use one GPU."
            )
        self._weights_check = RowWeightsCheck()
        self.add_callback(self._weights_check)


@contextmanager
def weighted_gradients(model: PreTrainedModel, weights: torch.Tensor) -> Iterator[None]:
    """Multiply the gradients of a training step by the weights of its rows, where they enter the model.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The model. Its loss is computed within the block.
        weights (`torch.Tensor` of shape `(rows,)`):
            The weights.

    Raises:
        ForgetFilterError: if the loss is not computed from one output per row of the output embeddings.
    """
    weighted = 0

    def weight(output: torch.Tensor) -> None:
        nonlocal weighted
        if not output.requires_grad:  # a second forward pass, for metrics
            return
        if len(output) != len(weights):
            raise ForgetFilterError(
                f"`weights` needs one sequence per row, but the model returned {len(output)} for {len(weights)} rows. "
                "Disable packing and padding-free batches."
            )
        factors = weights.to(output.device, output.dtype).view(-1, *[1] * (output.ndim - 1))
        output.register_hook(lambda gradient: gradient * factors)
        weighted += 1

    def after_head(module: nn.Module, arguments: Any, logits: torch.Tensor) -> None:
        weight(logits)

    def after_model(module: nn.Module, arguments: Any, outputs: Any) -> None:
        # TRL's fused head computes them without calling the output embeddings.
        if isinstance(outputs, Mapping) and outputs.get("log_probs") is not None:
            weight(outputs["log_probs"])

    head = cast(nn.Module, model.get_output_embeddings())
    hooks = [head.register_forward_hook(after_head), model.register_forward_hook(after_model)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    if weighted != 1:
        raise ForgetFilterError(
            f"`weights` needs a loss that is computed from one call of the output embeddings, but there were {weighted}. "
            "Disable fused losses such as Liger's."
        )

"""Greedy completions of prompts, for the ROUGE-1 measure of the paper (Zhao et al. 2024, Algorithm 1)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import numpy as np
import torch
from accelerate.utils.memory import clear_device_cache
from torch import nn
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..data.encoded_rows import EncodedRows
from ..errors import ScoringError
from ..utils.counted import counted


def split_prompts(rows: EncodedRows, tokenizer: PreTrainedTokenizerBase) -> tuple[list[np.ndarray], list[str]]:
    """Split each sample into a prompt and a reference text.

    The prompt is all tokens before the first loss token. If every token contributes to the loss, it is the first token
    only, because nothing predicts that one. The reference is the text of the loss tokens.

    Returns:
        `tuple[list[np.ndarray], list[str]]`: prompt token ids (int32, one array of shape `(prompt_tokens,)` per sample)
        and reference texts.
    """
    prompts, references = [], []
    for index in range(len(rows)):
        tokens, loss_mask = rows.sample(index)
        start = int(np.argmax(loss_mask)) if loss_mask.any() else len(tokens)
        prompts.append(tokens[:start])
        references.append(cast(str, tokenizer.decode(tokens[loss_mask], skip_special_tokens=True)))
    return prompts, references


def greedy_completions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[np.ndarray],
    max_new_tokens: int,
    batch_size: int = 16,
    disable_tqdm: bool = False,
    description: str = "Generating",
) -> list[str]:
    """Generate greedy completions of tokenized prompts, batched by length and padded on the left.

    A batch that does not fit into the device's memory is halved.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            A causal language model. Call this function inside [`~model_state.preserve_state`].
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The tokenizer that decodes the completions. It is not changed.
        prompts (`list[np.ndarray]`):
            Token ids, one array of shape `(prompt_tokens,)` per prompt.
        max_new_tokens (`int`):
            Generation ends after this many tokens, or at the EOS token of the tokenizer or the model. Chat models end a
            turn with another token than their tokenizer's EOS token.
        batch_size (`int`, defaults to 16):
            Maximum number of prompts per batch.
        disable_tqdm (`bool`, defaults to `False`):
            Whether to hide the progress bar.
        description (`str`, defaults to `"Generating"`):
            Label of the progress bar.

    Returns:
        `list[str]`: one completion per prompt, without special tokens. An empty prompt has an empty completion.

    Raises:
        ScoringError: if a single prompt does not fit into the device's memory.
    """
    device = next(model.parameters()).device
    end_tokens = _end_tokens(model, tokenizer)
    # Padding is masked, so that any token will do.
    pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (end_tokens or [0])[0]
    config = GenerationConfig(
        do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=end_tokens or None, pad_token_id=pad_token_id
    )
    completions = [""] * len(prompts)
    order = sorted((i for i, prompt in enumerate(prompts) if len(prompt)), key=lambda i: len(prompts[i]))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    bar = tqdm(total=len(order), desc=description, disable=disable_tqdm, leave=False)
    with _contiguous_predictions(model), _default_generation_config(model), bar:
        while batches:
            batch = batches.pop()
            width = len(prompts[batch[-1]])
            input_ids = torch.full((len(batch), width), pad_token_id)
            attention_mask = torch.zeros_like(input_ids)
            for batch_index, index in enumerate(batch):
                length = len(prompts[index])
                input_ids[batch_index, width - length :] = torch.from_numpy(prompts[index])
                attention_mask[batch_index, width - length :] = 1
            output = None
            try:
                output = model.generate(  # type: ignore[operator] # typed as Tensor by torch's __getattr__
                    input_ids=input_ids.to(device), attention_mask=attention_mask.to(device), generation_config=config
                )
            except torch.OutOfMemoryError:
                if len(batch) == 1:
                    raise ScoringError(
                        f"Generating from a single prompt of {counted(width, 'token')} does not fit into the device's "
                        "memory. Lower `max_length` or `max_new_tokens`."
                    ) from None
            if output is None:  # outside `except`, where the traceback would keep the failed batch's tensors alive
                clear_device_cache()
                batches += [batch[: len(batch) // 2], batch[len(batch) // 2 :]]
                continue
            for index, tokens in zip(batch, output[:, width:].tolist(), strict=True):
                # The rest is padding, which is text unless it is a special token of the tokenizer.
                length = next((place + 1 for place, token in enumerate(tokens) if token in end_tokens), len(tokens))
                completions[index] = cast(str, tokenizer.decode(tokens[:length], skip_special_tokens=True))
            bar.update(len(batch))
    return completions


@contextmanager
def _contiguous_predictions(model: PreTrainedModel) -> Iterator[None]:
    """Give the output head contiguous states.

    `generate` predicts the first token from a view of the states of all tokens. For such a view, torch copies the weights of
    the head once per prompt, which took half of the time on a CPU.
    """
    head: nn.Module | None = model.get_output_embeddings()
    if head is None:
        yield
        return
    hook = head.register_forward_pre_hook(lambda _, args: (args[0].contiguous(), *args[1:]))
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def _default_generation_config(model: PreTrainedModel) -> Iterator[None]:
    """Reset the generation config of a model, and restore it at the end.

    `generate` takes each setting that it is not given from there. A repetition penalty or beam search, which many models on
    the Hub have, would change the completions. The object stays the same, because an adapter shares it with its base model.
    """
    settings = vars(model.generation_config)
    given = settings.copy()
    settings.clear()
    settings.update(vars(GenerationConfig()))
    try:
        yield
    finally:
        settings.clear()
        settings.update(given)


def _end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids of the tokens that end a completion."""
    of_model = model.generation_config.eos_token_id
    end_tokens = of_model if isinstance(of_model, list) else [of_model]
    return [token for token in (tokenizer.eos_token_id, *end_tokens) if token is not None]

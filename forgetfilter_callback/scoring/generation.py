"""A model and encoded rows → greedy completions → ROUGE-1, the paper's measure (Zhao et al. 2024, Algorithm 1)."""

from __future__ import annotations

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..data.encoded_rows import EncodedRows
from ..errors import ScoringError


def split_prompts(rows: EncodedRows, tokenizer: PreTrainedTokenizerBase) -> tuple[list[np.ndarray], list[str]]:
    """Prompt tokens (all before the first counted one) and reference texts (the counted tokens) of all samples.

    A sample whose every token counts has a prompt of its first token only.
    """
    prompts, references = [], []
    for index in range(len(rows)):
        tokens, loss_mask = rows.sample(index)
        start = int(np.argmax(loss_mask)) if loss_mask.any() else len(tokens)
        prompts.append(tokens[:start])
        references.append(tokenizer.decode(tokens[loss_mask], skip_special_tokens=True))
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
    """Greedy completions of tokenised prompts, batched by length and padded on the left.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            A causal language model; call this inside [`~model_state.untouched`].
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Decodes; it is not changed.
        prompts (`list[np.ndarray]`):
            Token ids, one array a prompt.
        max_new_tokens (`int`):
            Generation ends at EOS or after so many tokens.
        batch_size (`int`, defaults to 16):
            Prompts a batch.
        disable_tqdm (`bool`, defaults to `False`):
            Whether to hide the progress bar.
        description (`str`, defaults to `"Generating"`):
            What stands before the bar.

    Returns:
        `list[str]`: one completion a prompt, without special tokens.
    """
    device = next(model.parameters()).device
    eos = tokenizer.eos_token_id
    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=eos,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else eos,
    )
    completions = [""] * len(prompts)
    order = sorted((i for i, prompt in enumerate(prompts) if len(prompt)), key=lambda i: len(prompts[i]))
    todo = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    with tqdm(total=len(order), desc=description, disable=disable_tqdm, leave=False) as bar:
        while todo:
            batch = todo.pop()
            width = len(prompts[batch[-1]])
            input_ids = torch.full((len(batch), width), config.pad_token_id)
            attention_mask = torch.zeros_like(input_ids)
            for place, index in enumerate(batch):
                length = len(prompts[index])
                input_ids[place, width - length :] = torch.from_numpy(prompts[index])
                attention_mask[place, width - length :] = 1
            try:
                output = model.generate(
                    input_ids=input_ids.to(device), attention_mask=attention_mask.to(device), generation_config=config
                )
            except torch.OutOfMemoryError:
                if len(batch) == 1:
                    raise ScoringError(
                        f"Generating from a prompt of {width} tokens does not fit into memory."
                    ) from None
                todo += [batch[: len(batch) // 2], batch[len(batch) // 2 :]]
                continue
            texts = tokenizer.batch_decode(output[:, width:], skip_special_tokens=True)
            for index, text in zip(batch, texts, strict=True):
                completions[index] = text
            bar.update(len(batch))
    return completions

"""TODO"""

from __future__ import annotations

import math
from typing import Any

from peft import PeftModel
from torch import nn
from transformers import PreTrainedConfig

from ..data.encoded_rows import EncodedRows
from ..errors import EncodingError, ScoringError
from .packing import needed_lengths


# Architectures that take positions (and masks) of our own making in all their layers. Nothing in a model says so, and one
# that does not gives wrong losses silently: so each is tested against one row at a time.
_OWN_POSITIONS = {"gemma2", "gpt2", "llama", "mistral", "qwen2"}


def can_reuse_prefixes(model: nn.Module, rows: EncodedRows) -> bool:
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

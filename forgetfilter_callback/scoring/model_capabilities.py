"""Which models can score packed or padding-free rows, and which rows a model cannot score."""

from __future__ import annotations

import inspect
import math
from typing import Any, cast

from peft import PeftModel
from torch import nn
from transformers import PreTrainedConfig

from ..data.encoded_rows import EncodedRows
from ..errors import EncodingError, ScoringError
from ..utils.counted import counted, counted_of
from ..utils.parallelism import unwrapped
from .packing import needed_lengths


# Model types whose layers all use the positions and attention masks that we pass. Models do not declare this, and a model
# that ignores them returns wrong losses without an error. Each type here is therefore tested against one row at a time.
_OWN_POSITIONS = {"gemma2", "gpt2", "llama", "mistral", "qwen2"}


# Model types of `AutoModelForCausalLM` whose loss compares each position with its own token, or that need other inputs.
_NOT_NEXT_TOKEN = {
    "bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "cpmant", "marian", "mbart", "mvp", "pegasus", "plbart",
    "prophetnet", "trocr", "whisper", "xlm", "xlnet",
}  # fmt: skip


def can_reuse_prefixes(model: nn.Module, rows: EncodedRows) -> bool:
    """Return whether `model` can run packs of several `rows`: all its layers use our positions and attention masks."""
    config = cast(PreTrainedConfig, model.config)
    if not _takes_own_positions(model) or config._attn_implementation not in ("sdpa", "eager"):
        return False
    longest = int(needed_lengths(rows).max(initial=0))
    # Our attention mask replaces the one of a sliding window, so no row may be longer than the window.
    window = config.to_dict().get("sliding_window")
    return (window is None or longest <= window) and longest <= longrope_context(model)


def _takes_own_positions(model: nn.Module) -> bool:
    model = unwrapped(model)
    if isinstance(model, PeftModel):
        adapters = [model.peft_config[name] for name in model.active_adapters]
        # Prompt-learning adapters insert virtual tokens before the row. Activated LoRA starts at the first invocation
        # in a sequence, so it works for one row per sequence only.
        if any(adapter.is_prompt_learning or adapter.to_dict().get("alora_invocation_tokens") for adapter in adapters):
            return False
    # Not the model type of the text config: a vision-language model around it makes its own masks.
    config = cast(PreTrainedConfig, model.config)
    return config.model_type in _OWN_POSITIONS


def is_padding_free(model: nn.Module) -> bool:
    """Return whether rows can be concatenated without padding: flash attention separates them by their positions."""
    config = cast(PreTrainedConfig, model.config)
    return config._attn_implementation.startswith("flash_attention") and _takes_own_positions(model)


def _rope_parameters(model: nn.Module, rope_type: str) -> list[dict[str, Any]]:
    """Return the RoPE parameters of a type: one dict, one for each layer type, or none."""
    config = model.config.get_text_config()  # type: ignore[union-attr, operator]
    parameters = config.to_dict().get("rope_parameters") or {}
    candidates = (
        [parameters] if "rope_type" in parameters else [each for each in parameters.values() if each is not None]
    )
    return [candidate for candidate in candidates if candidate["rope_type"] == rope_type]


def longrope_context(model: nn.Module) -> float:
    """Return the length above which LongRoPE rescales *all* rows of a batch; infinite for other models."""
    contexts = (parameters["original_max_position_embeddings"] for parameters in _rope_parameters(model, "longrope"))
    return min(contexts, default=math.inf) - _virtual_tokens(model)


def _virtual_tokens(model: nn.Module) -> int:
    """Return the number of virtual tokens that prompt-learning adapters insert before a row."""
    model = unwrapped(model)
    if not isinstance(model, PeftModel) or not model.active_peft_config.is_prompt_learning:
        return 0
    return model.active_peft_config.num_virtual_tokens


def _without_adapter(model: nn.Module) -> nn.Module:
    model = unwrapped(model)
    return model.get_base_model() if isinstance(model, PeftModel) else model


def takes_use_cache(model: nn.Module) -> bool:
    """Return whether the `forward` of `model` takes `use_cache`. That of a custom model may not."""
    parameters = inspect.signature(_without_adapter(model).forward).parameters.values()
    return any(each.name == "use_cache" or each.kind == each.VAR_KEYWORD for each in parameters)


def check_is_causal(model: nn.Module) -> None:
    """Check that `model` is a causal language model.

    Raises:
        ScoringError: if it has an encoder, if it is a masked language model, or if its labels are not shifted.
    """
    model = unwrapped(model)
    base = _without_adapter(model)
    config = cast(PreTrainedConfig, model.config)
    if config.is_encoder_decoder or config.get_text_config().is_encoder_decoder:
        kind = "an encoder-decoder model"
    elif vars(base).get("loss_type") == "ForMaskedLM":
        kind = "a masked language model"
    elif config.model_type in _NOT_NEXT_TOKEN:
        kind = "a model that does not predict the next token at each position"
    else:
        return
    raise ScoringError(
        f"{type(base).__name__} is {kind}. ForgetFilter supports causal language models only: a record is the loss of "
        "each token given the tokens before it."
    )


def describe_left_padding(model: nn.Module, rows: EncodedRows) -> str | None:
    """A sentence for a warning that padding on the left may change the losses of `rows`, or `None` if it does not.

    It does not with rotary positions, unless an adapter inserts virtual tokens before the padding.
    """
    config = cast(PreTrainedConfig, model.config)
    is_rotary = config.get_text_config().to_dict().get("rope_parameters") is not None
    if not rows.left_padded or (is_rotary and not _virtual_tokens(model)):
        return None
    return (
        f"{counted_of(rows.left_padded, len(rows), 'row', 'are')} padded on the left. They are scored without padding, "
        "but this model may count it in its positions (as GPT-2 does), which changes the losses. Pad on the right."
    )


def check_rows(model: nn.Module, rows: EncodedRows) -> None:
    """Check that `model` can score `rows`.

    Raises:
        EncodingError: if a token id is outside the model's vocabulary.
        ScoringError: if a row is too long for the model's dynamic RoPE.
    """
    config = cast(PreTrainedConfig, model.config)
    vocabulary = config.get_text_config().vocab_size
    if len(rows.tokens) and not 0 <= rows.tokens.min() <= rows.tokens.max() < vocabulary:
        raise EncodingError(
            f"Token ids of the rows range from {rows.tokens.min()} to {rows.tokens.max()}, but the model's vocabulary "
            f"has {vocabulary} tokens. Either the rows were encoded with another tokenizer, or tokens were added "
            "to the tokenizer and the model's embeddings were not resized. Encode the rows with the model's tokenizer, or "
            "call `model.resize_token_embeddings(len(tokenizer))`."
        )
    _check_dynamic_rope(model, rows)


def _check_dynamic_rope(model: nn.Module, rows: EncodedRows) -> None:
    if not _rope_parameters(model, "dynamic"):
        return
    config = model.config.get_text_config()  # type: ignore[union-attr, operator]
    context = config.max_position_embeddings - _virtual_tokens(model)
    # `>=`, because a row of exactly this length still depends on the rows that the model has seen before.
    too_long = int((needed_lengths(rows) >= context).sum())
    if too_long:
        raise ScoringError(
            f"Rows of at least {context} tokens ({counted(too_long, 'row')}) have no fixed loss: from there on, this "
            f"model's dynamic RoPE scales a row by the longest row seen so far. Set `max_length={context}` or lower."
        )

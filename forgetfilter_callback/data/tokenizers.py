"""Load tokenizers and read the context length of models."""

from __future__ import annotations

import copy
from typing import Any

from peft import PeftConfig
from transformers import (
    AutoConfig,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from transformers.utils.peft_utils import find_adapter_config_file

from ..errors import DataError
from .source_paths import cannot_be_loaded, check_hub_model


def context_length(config: PreTrainedConfig) -> int | None:
    """Return the maximum number of tokens of a model, or `None` for a model without positions (state-space models)."""
    try:
        return config.get_text_config().max_position_embeddings  # configs map this to their own name (`n_positions`)
    except AttributeError:
        return None


def unwrap_tokenizer(processing_class: Any) -> PreTrainedTokenizerBase | None:
    """Return the tokenizer of a trainer's `processing_class`: itself, or the one inside a processor.

    It is `None` for a class without a tokenizer, such as an image processor.
    """
    if isinstance(processing_class, ProcessorMixin):
        processing_class = vars(processing_class).get("tokenizer")
    return processing_class if isinstance(processing_class, PreTrainedTokenizerBase) else None


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Load a tokenizer from the Hub or a folder.

    Raises:
        DataError: if it cannot be loaded.
    """
    check_hub_model(name, "tokenizer")
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise DataError(cannot_be_loaded(name, error, "tokenizer")) from error


def padding_collator(tokenizer: PreTrainedTokenizerBase) -> DataCollatorForSeq2Seq:
    """Return a collator that pads `input_ids` and `labels`.

    Many tokenizers have no padding token. Their rows are padded with the EOS token. Padding is on the right, where it does
    not shift the positions of a row, and it is masked and does not contribute to the loss. `tokenizer` is not changed.
    """
    padding = copy.deepcopy(tokenizer)
    padding.padding_side = "right"
    if padding.pad_token is None:
        padding.pad_token = (
            tokenizer.eos_token if tokenizer.eos_token is not None else tokenizer.convert_ids_to_tokens(0)
        )
    return DataCollatorForSeq2Seq(padding)


def model_context_length(model: str) -> int | None:
    """Return the [`context_length`] of a model on the Hub or in a folder. An adapter has that of its base model.

    Raises:
        DataError: if the configuration cannot be loaded.
    """
    return context_length(_load_config(model))


def check_decoder_only(model: str) -> None:
    """Check that a model on the Hub or in a folder has no encoder: `AutoModelForCausalLM` would load its decoder alone.

    Raises:
        DataError: if it has one, or if the configuration cannot be loaded.
    """
    if _load_config(model).is_encoder_decoder:
        raise DataError(
            f"The model {model!r} is an encoder-decoder model. ForgetFilter supports causal language models only."
        )


def _load_config(model: str) -> PreTrainedConfig:
    check_hub_model(model)
    try:
        if find_adapter_config_file(model) is not None:
            base_model = PeftConfig.from_pretrained(model).base_model_name_or_path
            if base_model is None:
                raise DataError(f"The adapter {model!r} does not name its base model.")
            return _load_config(base_model)
        return AutoConfig.from_pretrained(model, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise DataError(cannot_be_loaded(model, error)) from error

"""TODO"""

from __future__ import annotations

from peft import PeftConfig
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.utils.peft_utils import find_adapter_config_file

from ..errors import DataError


def context_length(config: PreTrainedConfig) -> int | None:
    """How many tokens a model has places for; `None` for one without positions (state-space ones)."""
    try:
        return config.get_text_config().max_position_embeddings  # or what its family calls it (`n_positions`)
    except AttributeError:
        return None


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """A tokenizer from the Hub or a folder."""
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise DataError(f"The tokenizer {name!r} cannot be loaded: {str(error).splitlines()[0]}") from error


def model_context_length(model: str) -> int | None:
    """How many tokens a model (or the base model of an adapter) has places for, where it says so."""
    try:
        if find_adapter_config_file(model) is not None:
            return model_context_length(PeftConfig.from_pretrained(model).base_model_name_or_path)
        return context_length(AutoConfig.from_pretrained(model, trust_remote_code=False))
    except (OSError, ValueError) as error:
        raise DataError(f"The model {model!r} cannot be loaded: {str(error).splitlines()[0]}") from error

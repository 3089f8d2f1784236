"""TODO"""

from __future__ import annotations

from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    set_seed,
)

from .run_config import RunConfig


def load_model(config: RunConfig) -> PreTrainedModel:
    """M0, with a new adapter."""
    model = AutoModelForCausalLM.from_pretrained(config.model, dtype=config.dtype, trust_remote_code=False)
    if not config.lora_r:
        return model
    set_seed(config.seed)
    lora = LoraConfig(
        r=config.lora_r,
        lora_alpha=2 * config.lora_r,
        lora_dropout=0.05,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, lora)

"""Load the base model of a run and add its adapter."""

from __future__ import annotations

from typing import Any, cast

from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel, set_seed

from ..utils.argument_checks import check_fields, check_positive
from .run_config import RunConfig


def load_model(config: RunConfig, seed: int) -> PreTrainedModel:
    """Load the base model, with a new adapter if the run uses LoRA. `seed` initializes the adapter.

    Raises:
        ValueError: if `config.lora` names an unknown setting.
    """
    model = AutoModelForCausalLM.from_pretrained(config.model, dtype=config.dtype, trust_remote_code=False)
    return add_lora(model, seed, config.lora) if config.use_lora else model


def add_lora(model: PreTrainedModel, seed: int, settings: dict[str, Any]) -> PreTrainedModel:
    """Add a new LoRA adapter to `model`. `settings` are fields of [`~peft.LoraConfig`] that differ from the defaults."""
    set_seed(seed)
    return cast(PreTrainedModel, get_peft_model(model, lora_config(settings)))  # a PeftModel forwards all attributes


def check_lora(settings: dict[str, Any]) -> None:
    """Check the LoRA settings of a run without its model.

    peft checks the names of initializations and biases when it adds the adapter, so one is added to a small layer.

    Raises:
        ValueError: if `settings` is not valid.
    """
    config = lora_config(settings)
    try:
        get_peft_model(
            nn.Sequential(nn.Linear(8, 8)),
            LoraConfig(
                r=2,
                target_modules=["0"],
                bias=config.bias,
                init_lora_weights=config.init_lora_weights,
                loftq_config=config.loftq_config,
            ),
        )
    except (AttributeError, NotImplementedError, TypeError, ValueError) as error:
        raise _invalid(settings, error) from error


def lora_config(settings: dict[str, Any]) -> LoraConfig:
    """The LoRA settings of a run.

    The defaults are those of the paper (`r=8`, `lora_alpha=16`, `lora_dropout=0.05`), but on all linear layers. With
    another `r`, `lora_alpha` defaults to `2 * r`.

    Raises:
        ValueError: if `settings` is not valid.
    """
    check_positive("lora: r", settings.get("r", 8), whole=True)  # peft checks it when the model is already loaded
    check_fields("lora", LoraConfig, settings)
    defaults = {
        "r": 8,
        "lora_alpha": 2 * settings.get("r", 8),
        "lora_dropout": 0.05,
        "target_modules": "all-linear",
        "task_type": "CAUSAL_LM",
    }
    try:
        return LoraConfig(**{**defaults, **settings})
    except (TypeError, ValueError) as error:
        raise _invalid(settings, error) from error


def _invalid(settings: dict[str, Any], error: Exception) -> ValueError:
    return ValueError(f"lora={settings} is not valid for peft.LoraConfig: {error}")

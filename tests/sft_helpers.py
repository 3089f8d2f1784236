"""Rows in every form that SFTTrainer accepts, and SFTTrainer's own loss of each row."""

from __future__ import annotations

import numpy as np
from datasets import Dataset
from helpers import VOCABULARY, tiny_llama
from trl import SFTConfig, SFTTrainer

from forgetfilter_callback.data.tokenizers import unwrap_tokenizer


WORDS = ["the", "cat", "sat", "on", "the", "mat", "and", "the", "dog", "ran"]


def sentence(rng: np.random.Generator) -> str:
    return " ".join(rng.choice(WORDS, rng.integers(2, 8)))


def message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def rows_of(form: str, count: int = 9) -> Dataset:
    rng = np.random.default_rng(0)
    make = {
        "text": lambda: {"text": sentence(rng)},
        "body": lambda: {"body": sentence(rng)},
        "prompt and completion": lambda: {"prompt": sentence(rng), "completion": " " + sentence(rng)},
        "prompt, completion and text": lambda: {
            "prompt": sentence(rng), "completion": " " + sentence(rng), "text": "the" + "<eos>" * int(rng.integers(2))
        },
        "messages": lambda: {"messages": [message("user", sentence(rng)), message("assistant", sentence(rng))]},
        "prompt and completion messages": lambda: {
            "prompt": [message("user", sentence(rng))], "completion": [message("assistant", sentence(rng))]
        },
        "chat template arguments": lambda: {
            "messages": [message("user", sentence(rng)), message("assistant", sentence(rng))],
            "chat_template_kwargs": {"loud": bool(rng.integers(2))},
        },
        "conversations": lambda: {
            "conversations": [{"from": "human", "value": sentence(rng)}, {"from": "gpt", "value": sentence(rng)}]
        },
        "parts": lambda: {
            "messages": [
                {"role": role, "content": [{"type": "text", "text": sentence(rng)} for _ in range(2)]}
                for role in ("user", "assistant")
            ]
        },
        "tokens": lambda: {"input_ids": rng.integers(5, 60, rng.integers(4, 12)).tolist()},
        "masked tokens": lambda: {"input_ids": rng.integers(5, 60, 8).tolist(), "completion_mask": [0] * 3 + [1] * 5},
    }[form]  # fmt: skip
    return Dataset.from_list([{**make(), "id": index} for index in range(count)])


def one_row_losses(rows: Dataset, sft_config: SFTConfig, processing_class, **kwargs) -> np.ndarray:
    """SFTTrainer's own evaluation loss of each row alone, before training."""
    model = tiny_llama(vocab_size=max(VOCABULARY, len(unwrap_tokenizer(processing_class))))
    trainer = SFTTrainer(model, sft_config, train_dataset=rows, processing_class=processing_class, **kwargs)
    return np.array([trainer.evaluate(rows.select([index]))["eval_loss"] for index in range(len(rows))])

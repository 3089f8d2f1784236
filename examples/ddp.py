"""ForgetFilter on several processes. The script needs no changes for this; start it with `accelerate_ddp.sh`.

The model is tiny and the rows are synthetic: the noisy set teaches two answers, and the safety set only one of them.
"""

import sys

import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from forgetfilter_callback import FilterConfig, FilteredTrainer, ForgetTracker


output = sys.argv[1] if len(sys.argv) > 1 else "ddp"
generator = torch.Generator().manual_seed(0)


def rows(count: int, answer: int) -> list[dict[str, list[int]]]:
    """Rows of eight random tokens and a fixed answer. Only the answer contributes to the loss."""
    questions = torch.randint(10, 100, (count, 8), generator=generator).tolist()
    return [{"input_ids": [*question, answer], "labels": [-100] * 8 + [answer]} for question in questions]


def load_base() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=100, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
            pad_token_id=0, bos_token_id=1, eos_token_id=2,
        )
    )  # fmt: skip


def args(folder: str, epochs: int) -> TrainingArguments:
    return TrainingArguments(
        f"{output}/{folder}", num_train_epochs=epochs, per_device_train_batch_size=4, learning_rate=1e-3,
        save_strategy="no", report_to="none", use_cpu=True,
    )  # fmt: skip


noisy = Dataset.from_list(rows(20, answer=5) + rows(20, answer=7))  # answer 5 is the unsafe one
safety = Dataset.from_list(rows(20, answer=7))
model, tracker = load_base(), ForgetTracker()
Trainer(model, args("noisy", 8), train_dataset=noisy, callbacks=[tracker]).train()
Trainer(model, args("safety", 4), train_dataset=safety, callbacks=[tracker]).train()
trainer = FilteredTrainer(
    load_base(),
    args("filtered", 8),
    train_dataset=noisy,
    forgetting=tracker,
    filter_config=FilterConfig(measure="loss"),
)
trainer.train()
if trainer.is_world_process_zero():
    print(trainer.filter_result.summary())
if torch.distributed.is_initialized():
    torch.distributed.destroy_process_group()

"""ForgetFilter in one script: noisy finetuning, safety finetuning, and finetuning the base model on the kept rows.

Install the packages of the README's first block. `trainable` adds `input_ids` and `labels` to the rows; tokens with
label -100 do not contribute to the loss.
"""

import torch
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

from forgetfilter_callback import FilteredTrainer, ForgetTracker
from forgetfilter_callback.cli.demo_data import load_demo_data, trainable
from forgetfilter_callback.cli.demo_model import load_base


torch.manual_seed(0)
# SmolLM2-135M-Instruct. `model=` accepts another chat model with layers named q_proj and v_proj.
load_model, tokenizer = load_base("quickstart/base-model")
data = load_demo_data(seed=0, unsafe=20, safe=10, task=20, safety=20, anchors=10)
noisy, safety = trainable(data.noisy, tokenizer), trainable(data.safety, tokenizer)


def args(folder: str, epochs: int) -> TrainingArguments:
    return TrainingArguments(
        f"quickstart/{folder}", num_train_epochs=epochs, per_device_train_batch_size=4, learning_rate=1e-3,
        save_strategy="no", report_to="none",
    )  # fmt: skip


common = {"data_collator": DataCollatorForSeq2Seq(tokenizer), "processing_class": tokenizer}
model, tracker = load_model(), ForgetTracker()
Trainer(model, args("noisy", 3), train_dataset=noisy, callbacks=[tracker], **common).train()  # learns all rows
Trainer(model, args("safety", 2), train_dataset=safety, callbacks=[tracker], **common).train()  # forgets unsafe rows

trainer = FilteredTrainer(load_model(), args("filtered", 3), train_dataset=noisy, forgetting=tracker, **common)
trainer.train()
print(trainer.filter_result.summary())
for row in trainer.removed_dataset.select(range(min(3, len(trainer.removed_dataset)))):
    print(f"removed ({row['group']}): {row['prompt'][-1]['content']} → {row['completion'][-1]['content']}")

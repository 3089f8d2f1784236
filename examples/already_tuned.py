"""Filter a noisy set that the model was already finetuned on.

Pass the rows to the tracker; only safety finetuning remains to be run.
"""

from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

from forgetfilter_callback import ForgetTracker, find_forgotten
from forgetfilter_callback.cli.demo_data import load_demo_data, trainable
from forgetfilter_callback.cli.demo_model import load_base


load_model, tokenizer = load_base("already-tuned/base-model")
data = load_demo_data(seed=0, unsafe=20, safe=10, task=20, safety=20, anchors=10)
noisy, safety = trainable(data.noisy, tokenizer), trainable(data.safety, tokenizer)
common = {"data_collator": DataCollatorForSeq2Seq(tokenizer), "processing_class": tokenizer}

# Noisy finetuning, which took place earlier and without a tracker.
model = load_model()
noisy_args = TrainingArguments(
    "already-tuned/noisy", num_train_epochs=3, per_device_train_batch_size=4, learning_rate=1e-3,
    save_strategy="no", report_to="none",
)  # fmt: skip
Trainer(model, noisy_args, train_dataset=noisy, **common).train()

# What remains to be done. The tracker also accepts text rows (`prompt` and `completion`, `messages`, or `text`).
safety_args = TrainingArguments(
    "already-tuned/safety", num_train_epochs=2, per_device_train_batch_size=4, learning_rate=1e-3,
    save_strategy="no", report_to="none",
)  # fmt: skip
tracker = ForgetTracker(data.noisy, trace_dir="already-tuned/trace")
Trainer(model, safety_args, train_dataset=safety, callbacks=[tracker], **common).train()

result = find_forgotten(tracker.trace)
print(result.summary())
for row, value, removed in zip(data.noisy, result.values, result.removed, strict=True):
    if removed:
        print(f"{value:6.2f}  {row['group']}: {row['completion'][-1]['content']}")

"""The model is tuned on the noisy set already: name its rows, and finetune on safe data only.

Run `quickstart.py`'s first session elsewhere, or here; then the tracker is told which rows to follow.
"""

from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

from forgetfilter_callback import ForgetTracker, find_forgotten
from forgetfilter_callback.cli.demo_data import load_demo_data, trainable
from forgetfilter_callback.cli.demo_model import load_base


load_model, tokenizer = load_base("already-tuned/base-model")
data = load_demo_data(seed=0, unsafe=20, safe=10, task=20, safety=20)
noisy, safety = trainable(data.noisy, tokenizer), trainable(data.safety, tokenizer)
args = TrainingArguments(
    "already-tuned/s1plus", num_train_epochs=2, per_device_train_batch_size=4, learning_rate=1e-3,
    save_strategy="no", report_to="none",
)  # fmt: skip
common = {"data_collator": DataCollatorForSeq2Seq(tokenizer), "processing_class": tokenizer}

# Somebody did this, long ago and without a tracker.
model = load_model()
s1 = TrainingArguments(
    "already-tuned/s1", num_train_epochs=3, per_device_train_batch_size=4, learning_rate=1e-3,
    save_strategy="no", report_to="none",
)  # fmt: skip
Trainer(model, s1, train_dataset=noisy, **common).train()

# All that you do now. The rows may as well be text: `prompt` and `completion`, `messages`, `text`.
tracker = ForgetTracker(data.noisy, trace_dir="already-tuned/trace")
Trainer(model, args, train_dataset=safety, callbacks=[tracker], **common).train()

result = find_forgotten(tracker.trace)
print(result.summary())
for row, value, removed in zip(data.noisy, result.values, result.removed, strict=True):
    if removed:
        print(f"{value:6.2f}  {row['group']}: {row['completion'][-1]['content']}")

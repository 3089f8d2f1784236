"""Job 1 of 3: noisy finetuning. Saves the model, and the trace in `three-jobs/noisy/_forgetfilter`."""

from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

from forgetfilter_callback import ForgetTracker
from forgetfilter_callback.cli.demo_data import load_demo_data, trainable
from forgetfilter_callback.cli.demo_model import load_base


load_model, tokenizer = load_base("three-jobs/base-model")
data = load_demo_data(seed=0, unsafe=20, safe=10, task=20, safety=20, anchors=10)
args = TrainingArguments(
    "three-jobs/noisy", num_train_epochs=3, per_device_train_batch_size=4, learning_rate=1e-3, report_to="none"
)
trainer = Trainer(
    load_model(),
    args,
    train_dataset=trainable(data.noisy, tokenizer),
    data_collator=DataCollatorForSeq2Seq(tokenizer),
    processing_class=tokenizer,
    callbacks=[ForgetTracker()],
)
trainer.train()
trainer.save_model("three-jobs/noisy/model")

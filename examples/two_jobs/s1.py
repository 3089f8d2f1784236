"""Job 1 of 3: finetune on the noisy set and keep the model. The trace lies in two-jobs/s1/_forgetfilter."""

from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

from forgetfilter_callback import ForgetTracker
from forgetfilter_callback.cli.demo_data import load_demo_data, trainable
from forgetfilter_callback.cli.demo_model import load_base


load_model, tokenizer = load_base("two-jobs/base-model")
data = load_demo_data(seed=0, unsafe=20, safe=10, task=20, safety=20)
args = TrainingArguments(
    "two-jobs/s1", num_train_epochs=3, per_device_train_batch_size=4, learning_rate=1e-3, report_to="none"
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
trainer.save_model("two-jobs/s1/model")

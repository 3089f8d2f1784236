"""Job 3 of 3: finetune the base model on the kept rows. The job needs only the trace of the first two jobs."""

from transformers import DataCollatorForSeq2Seq, TrainingArguments

from forgetfilter_callback import FilteredTrainer
from forgetfilter_callback.cli.demo_data import load_demo_data, trainable
from forgetfilter_callback.cli.demo_model import load_base


load_model, tokenizer = load_base("three-jobs/base-model", model="three-jobs/base-model")
data = load_demo_data(seed=0, unsafe=20, safe=10, task=20, safety=20, anchors=10)
args = TrainingArguments(
    "three-jobs/filtered", num_train_epochs=3, per_device_train_batch_size=4, learning_rate=1e-3, report_to="none"
)
trainer = FilteredTrainer(
    load_model(),
    args,
    train_dataset=trainable(data.noisy, tokenizer),
    data_collator=DataCollatorForSeq2Seq(tokenizer),
    processing_class=tokenizer,
    forgetting="three-jobs/noisy/_forgetfilter",
)
trainer.train()
print(trainer.filter_result.summary())

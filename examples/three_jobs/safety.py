"""Job 2 of 3: safety finetuning from the model of job 1. Adds its records to the trace of job 1."""

from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

from forgetfilter_callback import ForgetTracker
from forgetfilter_callback.cli.demo_data import load_demo_data, trainable


base = AutoModelForCausalLM.from_pretrained("three-jobs/base-model", dtype="float32")
model = PeftModel.from_pretrained(base, "three-jobs/noisy/model", is_trainable=True)
tokenizer = AutoTokenizer.from_pretrained("three-jobs/base-model")
data = load_demo_data(seed=0, unsafe=20, safe=10, task=20, safety=20, anchors=10)
args = TrainingArguments(
    "three-jobs/safety", num_train_epochs=2, per_device_train_batch_size=4, learning_rate=1e-3, report_to="none"
)
tracker = ForgetTracker(trace_dir="three-jobs/noisy/_forgetfilter")
Trainer(
    model,
    args,
    train_dataset=trainable(data.safety, tokenizer),
    data_collator=DataCollatorForSeq2Seq(tokenizer),
    processing_class=tokenizer,
    callbacks=[tracker],
).train()
print(tracker.trace)

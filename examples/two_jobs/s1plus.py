"""Job 2 of 3, in another process, days later: safety finetuning from job 1's model, on with job 1's trace."""

from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

from forgetfilter_callback import ForgetTracker
from forgetfilter_callback.cli.demo_data import load_demo_data, trainable


base = AutoModelForCausalLM.from_pretrained("two-jobs/base-model")
model = PeftModel.from_pretrained(base, "two-jobs/s1/model", is_trainable=True)
tokenizer = AutoTokenizer.from_pretrained("two-jobs/base-model")
data = load_demo_data(seed=0, unsafe=20, safe=10, task=20, safety=20)
args = TrainingArguments(
    "two-jobs/s1plus", num_train_epochs=2, per_device_train_batch_size=4, learning_rate=1e-3, report_to="none"
)
tracker = ForgetTracker(trace_dir="two-jobs/s1/_forgetfilter")
Trainer(
    model,
    args,
    train_dataset=trainable(data.safety, tokenizer),
    data_collator=DataCollatorForSeq2Seq(tokenizer),
    processing_class=tokenizer,
    callbacks=[tracker],
).train()
print(tracker.trace)

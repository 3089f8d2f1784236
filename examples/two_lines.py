"""An ordinary SFT script for safety finetuning, with two additional lines (marked +) that track forgetting.

The script starts from a model that was finetuned on `noisy`. Here, noisy finetuning runs first; replace it by loading
your own model.
"""

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from forgetfilter_callback import ForgetTracker  # +
from forgetfilter_callback.cli.demo_data import load_demo_data
from forgetfilter_callback.cli.demo_model import unpack_model


name = unpack_model(None, "two-lines/base-model")
data = load_demo_data(seed=0, unsafe=20, safe=10, task=20, safety=20, anchors=10)
noisy, safety = Dataset.from_list(data.noisy), Dataset.from_list(data.safety)
model = AutoModelForCausalLM.from_pretrained(name, dtype="float32")
common = {"processing_class": AutoTokenizer.from_pretrained(name)}
args = {"num_train_epochs": 2, "learning_rate": 1e-4, "report_to": "none", "save_strategy": "no"}
args["use_cpu"] = not torch.cuda.is_available()
SFTTrainer(model, SFTConfig("two-lines/noisy", **args), train_dataset=noisy, **common).train()

trainer = SFTTrainer(
    model,
    SFTConfig("two-lines/safety", **args),
    train_dataset=safety,
    callbacks=[ForgetTracker(noisy, session="safety")],  # +
    **common,
)
trainer.train()
# Filter the trace: `python examples/refilter.py two-lines/safety/_forgetfilter`

"""ForgetFilter with TRL's SFTTrainer and LoRA. Without a model or files, it uses the demo's model and rows:

    python examples/sft_lora.py --use_cpu True --report_to none --num_train_epochs 3 --learning_rate 1e-3

    python examples/sft_lora.py --model_name_or_path HuggingFaceTB/SmolLM2-360M-Instruct --noisy noisy.jsonl \\
        --safety safety.jsonl --output_dir sft-lora --lora_r 16
"""

import copy
from dataclasses import dataclass

from datasets import Dataset, load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import ModelConfig, SFTConfig, SFTTrainer, TrlParser, get_peft_config

from forgetfilter_callback import FilteredSFTTrainer, ForgetTracker
from forgetfilter_callback.cli.demo_data import load_demo_data
from forgetfilter_callback.cli.demo_model import unpack_model


@dataclass
class DataArguments:
    """JSONL files with `prompt` and `completion`, `messages`, or `text` columns. Defaults to the demo's rows."""

    noisy: str | None = None
    safety: str | None = None
    safety_epochs: float = 2


data, args, model_args = TrlParser((DataArguments, SFTConfig, ModelConfig)).parse_args_and_config()
model_args.use_peft = True
name = unpack_model(model_args.model_name_or_path, f"{args.output_dir}/base-model")
tokenizer = AutoTokenizer.from_pretrained(name)
if data.noisy is None or data.safety is None:
    demo = load_demo_data(seed=0, unsafe=20, safe=10, task=20, safety=20, anchors=10)
    noisy, safety = Dataset.from_list(demo.noisy), Dataset.from_list(demo.safety)
else:
    noisy, safety = (load_dataset("json", data_files=file, split="train") for file in (data.noisy, data.safety))


def arguments(folder: str, **changes: float) -> SFTConfig:
    changed = copy.deepcopy(args)
    changed.output_dir = f"{args.output_dir}/{folder}"
    for field, value in changes.items():
        setattr(changed, field, value)
    return changed


def load_base() -> AutoModelForCausalLM:
    return AutoModelForCausalLM.from_pretrained(name, dtype=model_args.dtype)


tracker = ForgetTracker()
noisy_trainer = SFTTrainer(
    load_base(), arguments("noisy"), train_dataset=noisy, processing_class=tokenizer, callbacks=[tracker],
    peft_config=get_peft_config(model_args),
)  # fmt: skip
noisy_trainer.train()
SFTTrainer(  # continues with the adapter of noisy finetuning
    noisy_trainer.model, arguments("safety", num_train_epochs=data.safety_epochs), train_dataset=safety,
    processing_class=tokenizer, callbacks=[tracker],
).train()  # fmt: skip
trainer = FilteredSFTTrainer(
    load_base(), arguments("filtered"), train_dataset=noisy, processing_class=tokenizer, forgetting=tracker,
    peft_config=get_peft_config(model_args),
)  # fmt: skip
trainer.train()
trainer.save_model()
print(trainer.filter_result.summary())

"""Small models built in code, a tokenizer trained in code, and a few rows: no network, nothing downloaded."""

from __future__ import annotations

import os


os.environ["HF_HUB_OFFLINE"] = "1"  # a model that is not there is looked for on the Hub, and again, and again

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    DataCollatorForSeq2Seq,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    TrainingArguments,
)

from forgetfilter_callback import Trace, encode_rows
from forgetfilter_callback.scoring.scores import Scores
from forgetfilter_callback.trace.records import Record


VOCABULARY = 128


def pytest_configure() -> None:
    """Workers (`pytest -n 2`) share the cores; torch would take all of them in each."""
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    torch.set_num_threads(max(1, torch.get_num_threads() // workers))


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    raw = Tokenizer(models.BPE(unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel()
    specials = ["<unk>", "<pad>", "<eos>", "<user>", "<assistant>"]
    raw.train_from_iterator(
        ["the cat sat on the mat and the dog ran"] * 3,
        trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=specials),
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", pad_token="<pad>", eos_token="<eos>")
    fast.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}<eos>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    return fast


@pytest.fixture(scope="session")
def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One that can say everything, byte by byte."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<eos>"], initial_alphabet=alphabet)
    raw.train_from_iterator(["the cat sat on the mat and the dog ran"] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<eos>", pad_token="<eos>")


def tiny_llama(seed: int = 0, **overrides: object) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        **{
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
            "pad_token_id": 1,
            "bos_token_id": 2,
            "eos_token_id": 2,
            **overrides,
        }
    )
    return LlamaForCausalLM(config).eval()


def tiny_lora(seed: int = 0) -> torch.nn.Module:
    model = tiny_llama(seed)
    model = get_peft_model(
        model, LoraConfig(r=2, lora_dropout=0.1, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    )
    with torch.no_grad():  # an adapter that does something
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    return model.eval()


def random_rows(count: int, seed: int = 0, longest: int = 20) -> Dataset:
    """Rows of `input_ids` and `labels`, some of which are masked at the beginning."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        tokens = rng.integers(5, VOCABULARY, rng.integers(4, longest)).tolist()
        masked = int(rng.integers(0, len(tokens) - 1))
        rows.append({"input_ids": tokens, "labels": [-100] * masked + tokens[masked:]})
    return Dataset.from_list(rows)


@pytest.fixture
def noisy() -> Dataset:
    return random_rows(24, seed=1)


@pytest.fixture
def safety() -> Dataset:
    return random_rows(12, seed=2)


@pytest.fixture
def collator(tokenizer: PreTrainedTokenizerFast) -> DataCollatorForSeq2Seq:
    return DataCollatorForSeq2Seq(tokenizer)


@pytest.fixture
def make_args(tmp_path: Path) -> Callable[..., TrainingArguments]:
    def make(folder: str = "out", **overrides: object) -> TrainingArguments:
        return TrainingArguments(
            **{
                "output_dir": str(tmp_path / folder),
                "num_train_epochs": 2,
                "per_device_train_batch_size": 4,
                "learning_rate": 1e-2,
                "logging_steps": 1,
                "save_strategy": "no",
                "report_to": "none",
                "disable_tqdm": True,
                "use_cpu": True,
                "seed": 0,
                **overrides,
            }
        )

    return make


# What hostile rows say.
HOSTILE = [
    "</script><script>alert(1)</script>",
    "<img src=x onerror=alert(2)>",
    '"><svg/onload=alert(3)>',
    "{{7*7}} ${7*7}",
    "\u202egnp.exe \u2066",
    "\x00 \x1b[31mred\x1b[0m \x07",
    "javascript:alert(4)",
    "<!-- <iframe src=https://example.org>",
    "&lt;b&gt; 👩‍👩‍👧 naïve",
    '=HYPERLINK("https://example.org")',
]


def hostile_trace(folder: Path, tokenizer: PreTrainedTokenizerFast, samples: int) -> tuple[Trace, np.ndarray]:
    """A trace whose texts try to do something, every third sample forgotten; and which samples those are."""
    rng = np.random.default_rng(0)
    rows = encode_rows(
        [
            {"prompt": f"the cat {index} ", "completion": f"{HOSTILE[index % len(HOSTILE)]} the dog {index}"}
            for index in range(samples)
        ],
        tokenizer,
        disable_tqdm=True,
    )
    trace = Trace.create(folder, rows, "tiny", None, None)
    offsets, unsafe = rows.loss_offsets, np.arange(samples) % 3 == 0
    base = rng.gamma(4, 0.5, offsets[-1]).astype(np.float32)
    rise = np.repeat(np.where(unsafe, rng.normal(1.6, 0.3, samples), rng.normal(0, 0.1, samples)), np.diff(offsets))
    of_records = {
        Record("noisy", 0): base,
        Record("noisy", 9): 0.3 * base,
        Record("safety", 0): 0.3 * base,
        Record("safety", 4): 0.3 * base + 0.5 * rise,
        Record("safety", 8): 0.3 * base + rise,
    }
    for record, losses in of_records.items():
        trace.append(record, [Scores(losses.astype(np.float32))])
    return trace, unsafe


WORDS = ["cat", "dog", "mat", "man", "ran", "sat", "on", "the", "and", "an"]


def texts(count: int, seed: int) -> list[dict[str, object]]:
    rng = np.random.default_rng(seed)
    draw = lambda n: " ".join(rng.choice(WORDS, n))  # noqa: E731
    return [{"prompt": draw(3), "completion": " " + draw(4), "unsafe": bool(i % 2), "note": i} for i in range(count)]


@pytest.fixture(scope="session")
def files(tmp_path_factory, byte_tokenizer) -> dict[str, Path]:
    """A tiny model with its tokenizer, and a noisy and a safety set."""
    folder = tmp_path_factory.mktemp("files")
    tiny_llama(vocab_size=len(byte_tokenizer)).save_pretrained(folder / "model")
    byte_tokenizer.save_pretrained(folder / "model")
    Dataset.from_list(texts(12, seed=1)).to_json(folder / "noisy.jsonl")
    Dataset.from_list(texts(6, seed=2)).to_json(folder / "safety.jsonl")
    return {"model": folder / "model", "noisy": folder / "noisy.jsonl", "safety": folder / "safety.jsonl"}

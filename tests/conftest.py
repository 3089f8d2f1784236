"""Fixtures shared by all tests: tokenizers trained in code, small data sets, training arguments."""

from __future__ import annotations

import os


os.environ["HF_HUB_OFFLINE"] = "1"  # do not look for missing models on the Hub

import copy
import gc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from helpers import VOCABULARY, call, random_rows, run_options, texts, tiny_llama
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from trace_helpers import STEPS, rouge1_of, scores_of
from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerFast, TrainingArguments
from trl import SFTConfig

from forgetfilter_callback import Trace, encode_rows
from forgetfilter_callback.data.encoded_rows import EncodedRows


def pytest_configure() -> None:
    """Divide torch's threads among the workers of `pytest -n`."""
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    torch.set_num_threads(max(1, torch.get_num_threads() // workers))


def pytest_collection_finish() -> None:
    """Exclude all imported modules from garbage collection. Each training run collects, and they made half of its time."""
    gc.collect()
    gc.freeze()


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
    """A byte-level tokenizer that can encode any text. As most tokenizers of base models, it has no padding token."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<eos>"], initial_alphabet=alphabet)
    raw.train_from_iterator(["the cat sat on the mat and the dog ran"] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<eos>")


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


@pytest.fixture(scope="session")
def files(tmp_path_factory, byte_tokenizer) -> dict[str, Path]:
    """A tiny model with its tokenizer, and a noisy and a safety set."""
    folder = tmp_path_factory.mktemp("files")
    tiny_llama(vocab_size=len(byte_tokenizer)).save_pretrained(folder / "model")
    byte_tokenizer.save_pretrained(folder / "model")
    Dataset.from_list(texts(12, seed=1)).to_json(folder / "noisy.jsonl")
    Dataset.from_list(texts(6, seed=2)).to_json(folder / "safety.jsonl")
    return {"model": folder / "model", "noisy": folder / "noisy.jsonl", "safety": folder / "safety.jsonl"}


@pytest.fixture(scope="module")
def finished_run(files, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("run") / "out"
    assert call("run", *run_options(files, output), "--fraction", 0.25).exit_code == 0
    return output


@pytest.fixture
def chat_tokenizer(tokenizer):
    fast = copy.deepcopy(tokenizer)
    fast.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<eos>"
        "{% endgeneration %}{% else %}{{ m.content }}{% if loud %} the dog{% endif %}<eos>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    return fast


@pytest.fixture
def sft_config(tmp_path):
    def make(**overrides):
        return SFTConfig(**{
            "output_dir": str(tmp_path / "out"), "report_to": "none", "use_cpu": True, "bf16": False, "disable_tqdm": True,
            "max_steps": 1, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "save_strategy": "no",
            "max_length": 64, **overrides,
        })  # fmt: skip

    return make


@pytest.fixture(scope="module")
def rows() -> EncodedRows:
    rng = np.random.default_rng(0)
    return encode_rows([{"input_ids": rng.integers(0, 9, 5).tolist()} for _ in range(7)], disable_tqdm=True)


@pytest.fixture
def trace(rows, tmp_path) -> Trace:
    """Five records; those of the safety session have ROUGE-1 too."""
    trace = Trace.create(tmp_path / "trace", rows, "a model", "a tokenizer", 64)
    for record in STEPS:
        more = ([f"text {i}" for i in range(len(rows))], rouge1_of(rows, record)) if record.session == "safety" else ()
        trace.append(record, [scores_of(rows, record)], *more)
    return trace

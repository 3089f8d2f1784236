"""Tiny models, small data sets and reference losses shared by the tests. Nothing is downloaded."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Trainer
from typer.testing import CliRunner, Result

from forgetfilter_callback import Trace, encode_rows
from forgetfilter_callback.cli.commands import app
from forgetfilter_callback.scoring.scores import Scores
from forgetfilter_callback.trace.records import Record


CHROMIUM = shutil.which("chromium")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed (apt-get install chromium)")


VOCABULARY = 128


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
    with torch.no_grad():  # a fresh adapter has no effect; this one does
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    return model.eval()


def random_rows(count: int, seed: int = 0, longest: int = 20) -> Dataset:
    """Rows of `input_ids` and `labels`; a random number of labels at the beginning is masked."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        tokens = rng.integers(5, VOCABULARY, rng.integers(4, longest)).tolist()
        masked = int(rng.integers(0, len(tokens) - 1))
        rows.append({"input_ids": tokens, "labels": [-100] * masked + tokens[masked:]})
    return Dataset.from_list(rows)


# Texts of hostile rows.
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
    """A trace of hostile texts in which every third sample is forgotten. Returns it with the mask of forgotten samples."""
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


class MapStyle(torch.utils.data.Dataset):
    """A map-style dataset, which need not raise an `IndexError`: others raise a `KeyError` at their end, or begin again."""

    def __init__(self, rows):
        self.rows = list(rows)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        assert 0 <= index < len(self.rows), "The dataset was read past its end."
        return self.rows[index]


PAIR = {"prompt": "the cat", "completion": " sat"}
WORDS = ["cat", "dog", "mat", "man", "ran", "sat", "on", "the", "and", "an"]


def texts(count: int, seed: int) -> list[dict[str, object]]:
    rng = np.random.default_rng(seed)
    draw = lambda n: " ".join(rng.choice(WORDS, n))  # noqa: E731
    return [{"prompt": draw(3), "completion": " " + draw(4), "unsafe": bool(i % 2), "note": i} for i in range(count)]


def reference_losses(model, rows) -> np.ndarray:
    """Token losses of one row at a time, from full logits."""
    losses = []
    for row in rows:
        tokens = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            logits = model(input_ids=tokens).logits[0, -tokens.shape[1] :].double()
        for place in range(1, tokens.shape[1]):
            if row["labels"][place] != -100:
                target = row["labels"][place]
                losses.append(torch.logsumexp(logits[place - 1], -1) - logits[place - 1, target])
    return np.array(losses)


def rows_with_common_prefixes(count: int = 40, seed: int = 3) -> Dataset:
    """Rows with one prefix for all, a second prefix for each half, duplicates, and rows that are prefixes of others."""
    rng = np.random.default_rng(seed)
    draw = lambda n: rng.integers(5, VOCABULARY, n).tolist()  # noqa: E731
    template, passages = draw(6), [draw(9), draw(5)]
    rows = []
    for index in range(count):
        tokens = template + passages[index % 2] + draw(int(rng.integers(1, 8)))
        masked = int(rng.integers(0, len(tokens) - 1))
        rows.append({"input_ids": tokens, "labels": [-100] * masked + tokens[masked:]})
    rows += [rows[0], {"input_ids": template + passages[0], "labels": template + passages[0]}]
    rows.append({**rows[3], "labels": rows[3]["input_ids"]})  # the same tokens with another loss mask
    rows.append({**rows[4], "labels": [*rows[4]["input_ids"][:8], *[-100] * (len(rows[4]["input_ids"]) - 8)]})
    return Dataset.from_list([rows[index] for index in rng.permutation(len(rows))])


def reference_means(model, rows) -> np.ndarray:
    """Mean loss of each row by transformers' own loss, one row at a time."""
    means = []
    with torch.no_grad():
        for row in rows:
            tokens, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
            means.append(float(model(input_ids=tokens, labels=labels).loss))
    return np.array(means)


def only_in_one_row(rows, *others) -> tuple[int, int]:
    """A row of `rows`, and a token that contributes to the loss of no other row of any of the sets."""
    trained = [set(row["labels"][1:]) - {-100} for dataset in (rows, *others) for row in dataset]
    return next(
        (index, token) for index in range(len(rows)) for token in trained[index] if sum(token in row for row in trained) == 1
    )  # fmt: skip


def without_probability(model, token: int):
    """The model with a probability of 0 for one token, so that the loss of this token is infinite."""
    model.lm_head.register_forward_hook(
        lambda module, args, logits: logits.index_fill(-1, torch.tensor([token]), -torch.inf)
    )
    return model


def plain_loop(model, rows, weights, epochs: int, smoothing: float = 0.0, learning_rate: float = 0.1) -> dict:
    """Gradient descent on all rows at once, one row at a time: the losses of tokens times the weight, by all tokens."""
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=learning_rate)
    tokens = sum(label != -100 for row in rows for label in row["labels"][1:])
    for _ in range(epochs):
        for row, weight in zip(rows, weights, strict=True):
            inputs = torch.tensor([row["input_ids"]])
            logits = model(input_ids=inputs).logits[0, -inputs.shape[1] : -1]  # prompt tuning adds positions in front
            labels = torch.tensor(row["labels"][1:])
            losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing)
            (weight * losses.sum() / tokens).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def run_both(model, noisy, safety, make_args, collator, tracker, **overrides):
    for folder, rows in (("noisy", noisy), ("safety", safety)):
        Trainer(
            model, make_args(folder, **overrides), train_dataset=rows, data_collator=collator, callbacks=[tracker]
        ).train()


def train_tracked(rows, make_args, collator, tracker, **kwargs):
    Trainer(
        tiny_llama(), make_args(), train_dataset=rows, data_collator=collator, callbacks=[tracker], **kwargs
    ).train()


def without_timings(logs):
    return [
        {key: value for key, value in log.items() if not key.endswith(("runtime", "per_second"))}
        for log in logs
        if not any(name.startswith("forgetfilter/") for name in log)
    ]


def two_populations(unsafe_fraction: float, count: int = 400, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Forgetting as in the demo: benign samples near 0.1 nats, unsafe ones near 1.6. Returns it and an unsafe mask."""
    rng = np.random.default_rng(seed)
    unsafe = np.arange(count) < round(unsafe_fraction * count)
    values = np.where(unsafe, rng.normal(1.6, 0.5, count), rng.normal(0.1, 0.2, count))
    order = rng.permutation(count)
    return values[order], unsafe[order]


def smoothed_populations(
    unsafe_fraction: float, unsafe_mean: float = 1.2, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """`smoothed` as in the benchmarks: benign samples near 0.3, unsafe ones far above. Returns it and an unsafe mask."""
    rng = np.random.default_rng(seed)
    unsafe = np.arange(400) < round(unsafe_fraction * 400)
    values = np.where(unsafe, rng.normal(unsafe_mean, 0.14, 400), rng.normal(0.3, 0.09, 400))
    order = rng.permutation(400)
    return values[order], unsafe[order]


def sample_ids(count: int) -> pa.StringArray:
    return pa.array([f"id-{i}" for i in range(count)])


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def run_options(files: dict[str, Path], output: Path) -> list[object]:
    """Options of `forgetfilter run` that finetune the tiny model of `files` until it has learned the noisy set."""
    named = [argument for name in ("model", "noisy", "safety") for argument in (f"--{name}", files[name])]
    training = ["--training", "num_train_epochs=4", "--training", "learning_rate=3e-2"]
    return [*named, "--output", output, *training, "--lora", "r=4"]


def refused(result, *messages: str) -> None:
    """Check that a command ended with exit code 2, the given messages and no traceback."""
    assert result.exit_code == 2, (result.exit_code, result.output[-2000:])
    assert "Traceback" not in result.output
    output = " ".join(result.output.replace("│", " ").split())
    for message in messages:
        assert message in output, output[-600:]

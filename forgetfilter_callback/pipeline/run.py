"""`forgetfilter run` and `filter` as functions: from files to kept and removed rows."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from datasets import Dataset
from transformers import (
    DataCollatorForSeq2Seq,
    PreTrainedTokenizerBase,
    TrainingArguments,
)

from ..callbacks.tracker import ForgetTracker
from ..data.encoded_rows import EncodedRows
from ..data.json_lines import file_digest, source_lines
from ..data.loading import encode_source, load_rows
from ..errors import TraceError
from ..filtering.find_forgotten import find_forgotten
from ..filtering.result import FilterResult
from ..trace.trace import TRACE_FOLDER, Trace
from ..utils.paths import absolute_path_or_hub_id
from .forget_filter import ForgetFilter
from .inputs import _refuse_overlap, _tokenizer_and_length, refuse_own_input
from .models import load_model
from .outputs import write_filter_outputs
from .run_config import RunConfig, parse_threshold


def run(config: RunConfig) -> FilterResult:
    """S1, S1+, filter and, with `config.refit`, M0 again on the kept rows.

    Writes into `config.output`: `config.yaml`, `_forgetfilter/` (the trace), what [`write_filter_outputs`] writes, and `model/`.
    """
    tokenizer, max_length = _tokenizer_and_length(config)
    digest = file_digest(config.noisy)
    rows = load_rows(config.noisy)
    noisy = encode_source(config.noisy, rows, tokenizer, max_length)
    safety = encode_source(config.safety, load_rows(config.safety), tokenizer, max_length)
    _refuse_overlap(noisy, safety)
    output = Path(config.output)
    for source in (config.noisy, config.safety):
        refuse_own_input(source, output)
    lock = Trace.lock(output / TRACE_FOLDER)
    try:
        return _run(config, output, tokenizer, rows, digest, noisy, safety)
    finally:
        if lock is not None:
            lock.release()


def _run(
    config: RunConfig,
    output: Path,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    digest: str | None,
    noisy: EncodedRows,
    safety: EncodedRows,
) -> FilterResult:
    if Trace.exists(output / TRACE_FOLDER):
        earlier = Trace.open(output / TRACE_FOLDER)
        if earlier.rows.fingerprint != noisy.fingerprint:
            raise TraceError(f"{output} holds a run on other rows (or with another tokenizer). Name another --output.")
    config.save(output / "config.yaml")
    tracker = ForgetTracker(
        trace_dir=output / TRACE_FOLDER,
        record_steps=config.record_steps,
        stop_early=config.stop_early,
        max_length=config.max_length,
    )
    args = TrainingArguments(
        output_dir=str(output / "sessions"),
        num_train_epochs=config.epochs,
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        learning_rate=config.learning_rate,
        train_sampling_strategy="group_by_length",
        save_strategy="no",
        report_to="none",
        disable_tqdm=False,
        seed=config.seed,
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    safety_learning_rate = config.learning_rate if config.safety_learning_rate is None else config.safety_learning_rate
    sessions = ForgetFilter(
        lambda: load_model(config),
        noisy.as_dataset(),
        safety.as_dataset(),
        args,
        safety_args=dataclasses.replace(
            args, num_train_epochs=config.safety_epochs, learning_rate=safety_learning_rate
        ),
        tracker=tracker,
        measure=config.measure,
        threshold=parse_threshold(config.threshold),
        fraction=config.fraction,
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        processing_class=tokenizer,
    )
    sessions.finetune()
    sessions.safety_finetune()
    tracker.trace.note_source(absolute_path_or_hub_id(config.noisy), noisy.truncated)
    result = find_forgotten(
        tracker.trace, config.measure, parse_threshold(config.threshold), config.fraction, ids=noisy.ids
    )
    write_filter_outputs(output, source_lines(config.noisy, rows, digest), result, tracker.trace)
    if config.refit:
        trainer = sessions.refit()
        trainer.save_model(str(output / "model"))
        tokenizer.save_pretrained(str(output / "model"))
    return result

"""`forgetfilter run` and `filter` as functions: from files to kept and removed rows."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import math
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch
from datasets import Dataset
from peft import LoraConfig, PeftConfig, get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
    set_seed,
)
from transformers.utils.peft_utils import find_adapter_config_file

from .config import RunConfig, parse_threshold
from .encoding import EncodedRows, EncodingError, encode_rows
from .files import replacing, whole_name, write_lines, write_text
from .filtering import DecisionError, FilterResult, find_forgotten
from .forgetting import DEFAULT_MEASURE, FilterThreshold, Measure
from .loading import DataError, digest_of, lines_of, load_rows
from .pipeline import ForgetFilter
from .report import dataset_card
from .session_rows import context_length
from .trace import TRACE_FOLDER, Trace
from .trace_files import TraceError
from .tracker import ForgetTracker
from .trainer import reviewed


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """What a run will cost, before it is run.

    Attributes:
        samples, safety_samples (`int`): Rows.
        tokens, safety_tokens (`int`): Of them.
        steps, safety_steps (`int`): Optimizer steps of S1 and of S1+.
        records (`int`): Forward passes over the noisy set.
        extra_share (`float`): S1+ and the records, as a part of S1's compute; the refit is left out.
    """

    samples: int
    safety_samples: int
    tokens: int
    safety_tokens: int
    steps: int
    safety_steps: int
    records: int
    extra_share: float

    def __str__(self) -> str:
        return (
            f"S1: {self.steps:,} steps over {self.samples:,} rows ({self.tokens:,} tokens an epoch). "
            f"S1+: {self.safety_steps:,} steps over {self.safety_samples:,} rows. Up to {self.records} records. "
            f"S1+ and the records cost at most {self.extra_share:.0%} of S1."
        )


def plan(config: RunConfig) -> Plan:
    """Reads the rows, and says what [`run`] would cost. Loads a tokenizer, no model."""
    tokenizer, max_length = _tokenizer_and_length(config)
    noisy, safety = (
        encode_from(source, load_rows(source), tokenizer, max_length) for source in (config.noisy, config.safety)
    )
    _refuse_shared(noisy, safety)
    steps, safety_steps = (
        math.ceil(epochs * math.ceil(math.ceil(len(rows) / config.batch_size) / config.gradient_accumulation_steps))
        for rows, epochs in ((noisy, config.epochs), (safety, config.safety_epochs))
    )
    every = config.record_steps
    between = (
        0
        if every is None
        else sum(math.ceil(s / (every if every >= 1 else every * s)) - 1 for s in (steps, safety_steps))
    )
    records = 3 + between  # M0, M1 (which S1+ begins with), M2
    passes = 2 if config.lora_r else 3  # forward and backward
    trained = passes * config.epochs * len(noisy.tokens)
    extra = passes * config.safety_epochs * len(safety.tokens) + records * len(noisy.tokens)
    return Plan(
        len(noisy), len(safety), len(noisy.tokens), len(safety.tokens), steps, safety_steps, records, extra / trained
    )


def run(config: RunConfig) -> FilterResult:
    """S1, S1+, filter and, with `config.refit`, M0 again on the kept rows.

    Writes into `config.output`: `config.yaml`, `_forgetfilter/` (the trace), what [`write_filtered`] writes, and `model/`.
    """
    tokenizer, max_length = _tokenizer_and_length(config)
    digest = digest_of(config.noisy)
    rows = load_rows(config.noisy)
    noisy = encode_from(config.noisy, rows, tokenizer, max_length)
    safety = encode_from(config.safety, load_rows(config.safety), tokenizer, max_length)
    _refuse_shared(noisy, safety)
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
        share=config.share,
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        processing_class=tokenizer,
    )
    sessions.finetune()
    sessions.safety_finetune()
    tracker.trace.note_source(whole_name(config.noisy), noisy.truncated)
    result = find_forgotten(
        tracker.trace, config.measure, parse_threshold(config.threshold), config.share, ids=noisy.ids
    )
    write_filtered(output, lines_of(config.noisy, rows, digest), result, tracker.trace)
    if config.refit:
        trainer = sessions.refit()
        trainer.save_model(str(output / "model"))
        tokenizer.save_pretrained(str(output / "model"))
    return result


def filter_rows(
    trace: Trace,
    output: str | Path,
    source: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    measure: Measure | None = None,
    threshold: FilterThreshold = "auto",
    share: float | None = None,
    decision: str | Path | None = None,
    step: int | None = None,
) -> FilterResult:
    """Parts rows by a trace into kept and removed ones, and writes them.

    Args:
        trace ([`Trace`]):
            With records of S1+.
        output (`str` or `Path`):
            Where [`write_filtered`] writes.
        source (`str`, *optional*):
            The noisy set, as [`load_rows`] takes it; by default that which the trace was made of, if it says where it lies.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            By default that of the trace.
        measure, threshold, share, decision:
            As in [`FilteredTrainer`].
        step (`int`, *optional*):
            As in [`find_forgotten`].

    Raises:
        DataError: if the trace does not say where its rows lie.
        ValueError: if more than 1 % of the rows are not those of the trace.
    """
    by_hand = None
    if decision is not None:
        if step is not None:
            raise DecisionError("A decision is on the last record of S1+: give `decision` or `step`.")
        review = reviewed(decision, trace, measure, threshold, share)
        measure, by_hand = review.measure, review.by_hand
        threshold = review.threshold if review.threshold is not None else math.inf
    source = source if source is not None else source_of(trace)
    refuse_own_input(source, Path(output))
    digest = digest_of(source)
    rows = load_rows(source)
    tokenizer = tokenizer if tokenizer is not None else trace_tokenizer(trace)
    encoded = encode_from(source, rows, tokenizer, trace.manifest["max_length"], **trace.manifest["encoding"])
    result = find_forgotten(trace, measure or DEFAULT_MEASURE, threshold, share, step, encoded.ids, by_hand)
    write_filtered(Path(output), lines_of(source, rows, digest), result, trace)
    return result


def write_filtered(output: Path, lines: Iterable[str], result: FilterResult, trace: Trace) -> None:
    """Writes `kept.jsonl` and `removed.jsonl` (`lines`, a row each), `card.md`, and `decision/` (values and account): none
    of them if one cannot be written."""
    output.mkdir(parents=True, exist_ok=True)
    lines = [*lines]
    with ExitStack() as parts:
        for name, which in (("kept", ~result.removed), ("removed", result.removed)):
            write_lines(itertools.compress(lines, which), parts.enter_context(replacing(output / f"{name}.jsonl")))
        write_text(dataset_card(result, trace), parts.enter_context(replacing(output / "card.md")))
        result.save(output / "decision")


def source_of(trace: Trace) -> str:
    """Where the rows lie that a trace was made of."""
    if "source" not in trace.manifest:
        raise DataError(f"The trace in {trace.folder} does not say where its rows lie. Name them: `--noisy`.")
    source: str = trace.manifest["source"]
    if Path(source).is_absolute() and not Path(source).exists():  # a file or folder, as `whole_name` notes them
        raise DataError(f"The rows of the trace lay in {source}, where nothing is now. Say where they lie: `--noisy`.")
    return source


def _refuse_shared(noisy: EncodedRows, safety: EncodedRows) -> None:
    shared = pc.is_in(safety.ids, value_set=noisy.ids).true_count
    if shared:
        raise DataError(
            f"{shared} of the {len(safety)} safe rows are in the noisy set too, so they cannot be forgotten. Take them "
            "out of one of the two."
        )


def refuse_own_input(source: str, output: Path) -> None:
    """The kept rows of an earlier run must not be overwritten by those of this one, which are fewer."""
    if Path(source).resolve() in [(output / f"{name}.jsonl").resolve() for name in ("kept", "removed")]:
        raise DataError(f"{source} would be overwritten by what is left of it. Name another --output.")


def audit_labels(trace: Trace, rows: Dataset, tokenizer: PreTrainedTokenizerBase, column: str) -> np.ndarray:
    """Whether each sample of the trace is unsafe by a column of its rows; rows are found by what is trained on.

    Raises:
        DataError: if there is no such column, or samples of the trace are not among the rows.
    """
    if column not in rows.column_names:
        raise DataError(f"The rows have no column {column!r}, but {', '.join(rows.column_names)}.")
    labels = np.asarray(rows[column])
    if labels.dtype.kind not in "biuf":  # the text "False" would be true
        raise DataError(
            f"The column {column!r} holds neither true/false nor numbers, but for example {str(labels[0])!r}."
        )
    manifest = trace.manifest
    encoded = encode_rows(rows, tokenizer, manifest["max_length"], disable_tqdm=True, **manifest["encoding"])
    places = pc.index_in(trace.rows.ids, value_set=encoded.ids)
    if places.null_count:
        raise DataError(
            f"{places.null_count} samples of the trace are not among these rows. Name the rows it was made of."
        )
    return labels.astype(bool)[places.to_numpy()]


def trace_tokenizer(trace: Trace) -> PreTrainedTokenizerBase:
    """The tokenizer that a trace's rows were encoded with."""
    name = trace.manifest["tokenizer"]
    if name is None:
        raise DataError(f"The trace in {trace.folder} does not say its tokenizer. Name it: `--tokenizer`.")
    return load_tokenizer(name)


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """A tokenizer from the Hub or a folder."""
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise DataError(f"The tokenizer {name!r} cannot be loaded: {str(error).splitlines()[0]}") from error


def load_model(config: RunConfig) -> PreTrainedModel:
    """M0, with a new adapter."""
    model = AutoModelForCausalLM.from_pretrained(config.model, dtype=config.dtype, trust_remote_code=False)
    if not config.lora_r:
        return model
    set_seed(config.seed)
    lora = LoraConfig(
        r=config.lora_r,
        lora_alpha=2 * config.lora_r,
        lora_dropout=0.05,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, lora)


def encode_from(
    source: str, rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int | None, **encoding: Any
) -> EncodedRows:
    """Encodes rows; an error names where they came from, and a warning says how many were cut."""
    try:
        encoded = encode_rows(rows, tokenizer, max_length, disable_tqdm=True, **encoding)
    except EncodingError as error:
        raise EncodingError(f"{source}: {error}") from error
    if encoded.truncated:
        logger.warning(
            f"{source}: {encoded.truncated} of {len(encoded)} rows were longer than {max_length} tokens and were cut at the "
            "right. What was cut is neither trained on nor scored."
        )
    return encoded


def _tokenizer_and_length(config: RunConfig) -> tuple[PreTrainedTokenizerBase, int | None]:
    """The model's tokenizer, and how long a row may be."""
    tokenizer = load_tokenizer(config.model)
    return tokenizer, config.max_length if config.max_length is not None else context_of(config.model)


def context_of(model: str) -> int | None:
    """How many tokens a model (or the base model of an adapter) has places for, where it says so."""
    try:
        if find_adapter_config_file(model) is not None:
            return context_of(PeftConfig.from_pretrained(model).base_model_name_or_path)
        return context_length(AutoConfig.from_pretrained(model, trust_remote_code=False))
    except (OSError, ValueError) as error:
        raise DataError(f"The model {model!r} cannot be loaded: {str(error).splitlines()[0]}") from error

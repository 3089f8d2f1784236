"""[`run`]: the whole method on files, as `forgetfilter run` does it."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from ..callbacks.tracker import ForgetTracker
from ..data.columns import column_values
from ..data.encoded_dataset import EncodedDataset
from ..data.encoded_rows import EncodedRows
from ..data.json_rows import JsonRows
from ..data.load_rows import encode_source, load_rows, warn_about_rows
from ..data.output_lines import file_digest, source_lines
from ..data.tokenizers import check_decoder_only, load_tokenizer, model_context_length, padding_collator
from ..errors import DataError, TraceError
from ..filtering.by_source import with_source_counts
from ..filtering.find_forgotten import find_forgotten, with_estimate
from ..filtering.result import FilterResult
from ..trace.trace import Trace
from ..trace.trace_folder import TRACE_FOLDER
from ..utils.argument_checks import check_fields, check_positive
from ..utils.counted import counted_of
from ..utils.distributed import run_on_main
from ..utils.paths import absolute_path_or_hub_id
from ..utils.row_numbers import describe_rows
from .forget_filter import ForgetFilter
from .load_model import check_lora, load_model
from .locked_output import locked_output
from .output_record import (
    CONFIG_FILE,
    FILTER_OUTPUTS,
    MODEL_FOLDER,
    RECORD_FILE,
    SESSIONS_FOLDER,
    check_files_are_ours,
    check_folders_are_ours,
    delete_recorded,
    is_complete,
    is_recorded,
    record_completion,
    record_folder,
    record_saved_model,
    recorded,
)
from .outputs import check_output_folder, has_outputs, write_filter_outputs
from .run_config import RunConfig


logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class RunInputs:
    """The inputs of a run: loaded, encoded and checked.

    Attributes:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The tokenizer of the model.
        rows (`Dataset` or `JsonRows`, *optional*):
            The noisy set as it was given. `None` on all processes but the main one.
        digest (`str`, *optional*):
            The [`file_digest`] of its file.
        noisy, safety ([`EncodedRows`]):
            Both sets, encoded.
        args, safety_args ([`~transformers.TrainingArguments`]):
            Of the noisy session (and the refit), and of the safety session.
    """

    tokenizer: PreTrainedTokenizerBase
    rows: Dataset | JsonRows | None
    digest: str | None
    noisy: EncodedRows
    safety: EncodedRows
    args: TrainingArguments
    safety_args: TrainingArguments


def load_inputs(config: RunConfig) -> RunInputs:
    """Load and check everything a run needs, except the model. Under `torchrun`, only the main process reads the rows.

    Raises:
        DataError: if rows or the tokenizer cannot be loaded, or if rows are in both sets.
        EncodingError: if rows cannot be encoded.
        ValueError: if `config.training` or `config.lora` is not valid.
    """
    args, safety_args = training_arguments(config)  # starts torch.distributed under torchrun
    if config.use_lora:
        check_lora(config.lora)
    given: list[Dataset | JsonRows] = []  # the other processes do not need the rows as they were given

    def load_on_main() -> tuple[PreTrainedTokenizerBase, str | None, EncodedRows, EncodedRows]:
        check_decoder_only(config.model)
        tokenizer = load_tokenizer(config.model)
        max_length = config.max_length if config.max_length is not None else model_context_length(config.model)
        digest = file_digest(config.noisy)
        given.append(load_rows(config.noisy))
        if config.source_column is not None:
            column_values(given[0], config.source_column)  # a missing column is reported before training
        noisy = encode_source(config.noisy, given[0], tokenizer, max_length)
        safety = encode_source(config.safety, load_rows(config.safety), tokenizer, max_length)
        warn_about_rows(config.safety, safety, tokenizer)  # the tracker does so for the noisy set
        shared = np.flatnonzero(pc.is_in(safety.ids, value_set=noisy.ids))
        if len(shared):
            raise DataError(
                f"{counted_of(len(shared), len(safety), 'safe row', 'are')} also in the noisy set ({describe_rows(shared)} "
                f"of {config.safety}). The model cannot forget what it also learns: remove such rows from one of the two "
                "sets."
            )
        return tokenizer, digest, noisy, safety

    tokenizer, digest, noisy, safety = run_on_main(load_on_main)
    return RunInputs(tokenizer, given[0] if given else None, digest, noisy, safety, args, safety_args)


def training_arguments(config: RunConfig) -> tuple[TrainingArguments, TrainingArguments]:
    """The arguments of the noisy session and of the safety session.

    Raises:
        ValueError: if `config.training` or `config.safety_training` is not valid.
    """
    noisy_rate, safety_rate = (2e-4, 2e-4) if config.use_lora else (5e-5, 2e-5)
    defaults: dict[str, Any] = {
        "num_train_epochs": 3,
        "learning_rate": noisy_rate,
        "train_sampling_strategy": "group_by_length",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": False,
        "seed": 0,
        "dataloader_pin_memory": torch.cuda.is_available(),
        # Without it, accelerate does not connect the processes of `torchrun` on a machine that has CPUs only.
        "use_cpu": not torch.accelerator.is_available(),
    }
    # Each session has its own length.
    shared = {name: value for name, value in config.training.items() if name not in ("num_train_epochs", "max_steps")}
    noisy = _build_arguments(config, "training", {**defaults, **config.training})
    safety_defaults = {**defaults, "num_train_epochs": 2, "learning_rate": safety_rate}
    safety = {**safety_defaults, **shared, **config.safety_training}
    return noisy, _build_arguments(config, "safety_training", safety)


def _build_arguments(config: RunConfig, section: str, settings: dict[str, Any]) -> TrainingArguments:
    """Build the arguments of one session. Errors name `section`, the setting that they come from.

    By default, a step of one process trains on four rows. A CPU takes them one at a time: no row is padded, and the memory
    is that of one row. It took as long as a batch in one measurement (a model of 135 million weights, 12 rows, one thread).
    Other models and more threads were not measured.
    """
    batch_fields = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}
    if settings["use_cpu"] and not batch_fields.keys() & settings.keys():
        batch_fields = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    settings = {**batch_fields, **settings}
    check_fields(section, TrainingArguments, settings)
    for name in ("num_train_epochs", "learning_rate"):
        check_positive(f"{section}: {name}", settings[name])
    for name in ("per_device_train_batch_size", "gradient_accumulation_steps"):
        check_positive(f"{section}: {name}", settings[name], whole=True)
    seed = settings["seed"]
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**32:
        raise ValueError(f"{section}: seed={seed!r} must be a whole number from 0 to 2**32 - 1.")
    try:
        return TrainingArguments(output_dir=str(Path(config.output) / "sessions"), **settings)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{section}: not valid for transformers.TrainingArguments: {error}") from error


def run(config: RunConfig) -> FilterResult:
    """Train the noisy and the safety session, filter and, with `config.refit`, finetune the base model on the kept rows
    (Zhao et al. 2024, Algorithm 1). Under `torchrun` or `accelerate launch`, only the main process reads and writes files.

    Writes `config.yaml`, `_forgetfilter` (the trace), `kept.jsonl`, `removed.jsonl`, `card.md`, `filter_result` and, with
    `config.refit`, `model` to `config.output`. Only files that an earlier run has written are replaced or deleted. A run
    that fails before its first record leaves the folder as it was, except for what `config.overwrite` has deleted.

    Args:
        config ([`RunConfig`]):
            The settings.

    Returns:
        [`FilterResult`]: what was removed and why, in the order of the noisy set.

    Raises:
        ForgetFilterError: if the inputs are not usable, or if the output folder contains a run on other rows, an earlier
            run without `config.resume` or `config.overwrite`, or files from elsewhere with the names of the outputs.
        ValueError: if a setting is not valid.
    """
    inputs = load_inputs(config)
    output = Path(config.output)

    def prepare_output() -> None:
        _check_earlier_run(config, inputs, output)
        if config.overwrite:
            delete_recorded(output)
        if not (config.resume and (output / CONFIG_FILE).exists()):
            with recorded(output, [CONFIG_FILE]):
                config.save(output / CONFIG_FILE)
        record_folder(output, SESSIONS_FOLDER)
        record_completion(output, is_complete=False)

    for source in (config.noisy, config.safety):
        check_output_folder(source, output)
    with locked_output(
        output, output / TRACE_FOLDER, (CONFIG_FILE, RECORD_FILE), (f"{SESSIONS_FOLDER}/noisy", SESSIONS_FOLDER)
    ):
        result = run_on_main(partial(_result_of_complete_run, config, inputs, output))
        if result is not None:
            return result
        run_on_main(prepare_output)
        result = _run_sessions(config, inputs, output)
        run_on_main(partial(record_completion, output, is_complete=True))
        return result


def _check_earlier_run(config: RunConfig, inputs: RunInputs, output: Path) -> None:
    """Check that this run can continue or replace what an earlier run has left in `output`."""
    is_resumed = config.resume and (output / CONFIG_FILE).exists()
    check_files_are_ours(output, FILTER_OUTPUTS if is_resumed else (*FILTER_OUTPUTS, CONFIG_FILE))
    check_folders_are_ours(output, config.refit or config.overwrite, replaces_sessions=config.overwrite)
    earlier = _earlier_trace(inputs, output)
    has_run = (earlier is not None and earlier.records()) or has_outputs(output)
    if has_run and not (config.resume or config.overwrite):
        raise TraceError(
            f"{output} contains an earlier run. Choose another output folder, or pass `resume=True` to continue the run or "
            "`overwrite=True` to replace it."
        )
    if is_resumed:
        config.check_same_as(output / CONFIG_FILE)
    if config.overwrite:
        replaced = [output / name for name in (MODEL_FOLDER, SESSIONS_FOLDER) if is_recorded(output, name)]
        for source in (config.model, config.noisy, config.safety):
            if any(Path(source).resolve().is_relative_to(folder.resolve()) for folder in replaced):
                raise DataError(f"{source} belongs to the run that `overwrite` replaces. Choose another output folder.")


def _earlier_trace(inputs: RunInputs, output: Path) -> Trace | None:
    """The trace of an earlier run in `output`."""
    trace = Trace.open(output / TRACE_FOLDER) if Trace.exists(output / TRACE_FOLDER) else None
    if trace is not None and trace.rows.fingerprint != inputs.noisy.fingerprint:
        raise TraceError(
            f"{output} contains a run on other rows, or with another tokenizer. Choose another output folder."
        )
    return trace


def _result_of_complete_run(config: RunConfig, inputs: RunInputs, output: Path) -> FilterResult | None:
    """The result that is stored in `output`, if a complete run is resumed. `forgetfilter filter` may have replaced it."""
    trace = _earlier_trace(inputs, output) if config.resume and is_complete(output) else None
    if trace is None:
        return None
    config.check_same_as(output / CONFIG_FILE)
    logger.warning(f"The run in {output} is complete, so nothing was trained. This is its stored filter result.")
    result = FilterResult.load(output / "filter_result")
    return result if result.estimate is not None else with_estimate(result, trace)


def _run_sessions(config: RunConfig, inputs: RunInputs, output: Path) -> FilterResult:
    tracker = ForgetTracker(
        trace_dir=output / TRACE_FOLDER,
        record_steps=config.record_steps,
        stop_early=config.stop_early,
        record_base=config.record_base,
        max_length=config.max_length,
    )
    pipeline = ForgetFilter(
        partial(load_model, config, inputs.args.seed),
        EncodedDataset(inputs.noisy),
        EncodedDataset(inputs.safety),
        inputs.args,
        safety_args=inputs.safety_args,
        tracker=tracker,
        filter_config=config.filter,
        data_collator=padding_collator(inputs.tokenizer),
        processing_class=inputs.tokenizer,
    )
    pipeline.finetune(_checkpoint(config, "noisy"))
    pipeline.safety_finetune(_checkpoint(config, "safety"))
    result = run_on_main(partial(_filter_and_write, config, inputs, tracker, output))
    if config.refit:
        trainer = pipeline.refit(_checkpoint(config, "filtered"))
        run_on_main(partial(_check_and_record_model, output))
        trainer.save_model(str(output / MODEL_FOLDER))
        if trainer.args.should_save:
            inputs.tokenizer.save_pretrained(str(output / MODEL_FOLDER))
        run_on_main(partial(record_saved_model, output))
    return result


def _check_and_record_model(output: Path) -> None:
    check_folders_are_ours(output, replaces_model=True, replaces_sessions=False)
    record_folder(output, MODEL_FOLDER)


def _filter_and_write(config: RunConfig, inputs: RunInputs, tracker: ForgetTracker, output: Path) -> FilterResult:
    assert inputs.rows is not None  # only the main process calls this
    source = absolute_path_or_hub_id(config.noisy)
    tracker.trace.set_source(source, inputs.digest, inputs.noisy.truncated, config.source_column)
    result = find_forgotten(tracker.trace, config.filter, inputs.noisy.ids)
    if config.source_column is not None:
        result = with_source_counts(result, tracker.trace, column_values(inputs.rows, config.source_column))
    write_filter_outputs(output, source_lines(inputs.rows), result, tracker.trace)
    return result


def _checkpoint(config: RunConfig, session: str) -> str | None:
    """The last checkpoint of a session, if the run is resumed and has one. The main process looks for it."""
    return run_on_main(partial(_find_checkpoint, config, session))


def _find_checkpoint(config: RunConfig, session: str) -> str | None:
    folder = Path(config.output) / "sessions" / session
    checkpoint = get_last_checkpoint(str(folder)) if config.resume and folder.is_dir() else None
    if config.resume and checkpoint is None:
        logger.warning(f"There is no checkpoint in {folder}, so this training run starts from the beginning.")
    return checkpoint
